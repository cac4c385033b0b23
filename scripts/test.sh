#!/usr/bin/env bash
# The whole test suite, in the environment that scripts/quickstart.sh made, on every core (at most
# eight), and one process more: some tests wait for others' processes. Arguments go to pytest:
# `-n 0` runs in one process, as --pdb needs.
set -euo pipefail
cd "$(dirname "$0")/.."
[ -x .venv/bin/python ] ||
  { echo "test: no .venv here; run scripts/quickstart.sh first" >&2; exit 1; }
export PATH="$PWD/.venv/bin:$PATH"
python tests/support/simt_library.py
processes=$(python -c 'import os; print(min(os.cpu_count() or 1, 8) + 1)')
exec python -m pytest --numprocesses "$processes" --dist worksteal "$@"
