#!/usr/bin/env bash
# From a fresh clone to a training run with its picture: makes .venv, builds, trains on the digits.
# PYTHON=... chooses the interpreter (3.11 or newer); pip's own settings choose where packages
# come from.
set -euo pipefail
cd "$(dirname "$0")/.."
python=${PYTHON:-python3}
"$python" -c 'import sys; sys.exit(sys.version_info < (3, 11))' ||
  { echo "quickstart: $python is too old; set PYTHON to Python 3.11 or newer" >&2; exit 1; }
command -v "${CXX:-c++}" >/dev/null ||
  { echo "quickstart: no C++ compiler (${CXX:-c++}) found; install g++ or clang++" >&2; exit 1; }

[ -x .venv/bin/python ] || "$python" -m venv .venv
export PATH="$PWD/.venv/bin:$PATH"
# Bytecode is made of what is imported, when it is first: most of torch never is.
pip="python -m pip --disable-pip-version-check install --quiet --no-compile"
pip="$pip --constraint constraints.txt"
# The interpreter's own flags ask for debug information, a third of the compiler's work.
export CFLAGS="${CFLAGS--g0}"
# torch first: the extension is built against it (and not in isolation, which would fetch another).
$pip torch numpy setuptools setuptools-scm ninja
$pip --no-build-isolation --editable ".[examples,test]"

lyapcuda info
python examples/tracking.py --out runs/quickstart "$@"
