#!/usr/bin/env bash
# The whole test suite, in the environment that scripts/quickstart.sh made.
set -euo pipefail
cd "$(dirname "$0")/.."
[ -x .venv/bin/python ] ||
  { echo "test: no .venv here; run scripts/quickstart.sh first" >&2; exit 1; }
export PATH="$PWD/.venv/bin:$PATH"
exec python -m pytest "$@"
