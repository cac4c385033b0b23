#!/usr/bin/env bash
# The whole test suite, in the environment that scripts/quickstart.sh made, on every core (at most
# eight). Arguments go to pytest: `-n 0` runs in one process, as --pdb needs.
set -euo pipefail
cd "$(dirname "$0")/.."
[ -x .venv/bin/python ] ||
  { echo "test: no .venv here; run scripts/quickstart.sh first" >&2; exit 1; }
export PATH="$PWD/.venv/bin:$PATH"
python tests/simt_library.py
exec python -m pytest --numprocesses auto --maxprocesses 8 --dist worksteal "$@"
