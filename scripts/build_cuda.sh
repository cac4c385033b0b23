#!/usr/bin/env bash
# Builds the extension with its CUDA backend into one stripped file, for every Python from 3.11 on.
# Needs nvcc and a torch, which may be the CPU wheel: a machine that has neither a GPU nor a CUDA torch
# can build for one that has both.
#
#   bash scripts/build_cuda.sh                                  # into lyapcuda/
#   bash scripts/build_cuda.sh --arch 9.0 --out build/carry     # to take along
#   bash scripts/build_cuda.sh --python python3.13              # tries to import it there
#
# PYTHON=... is the interpreter whose torch has the headers (default: .venv's, else python3).
set -euo pipefail
cd "$(dirname "$0")/.."
python=${PYTHON:-.venv/bin/python}
[ -n "${PYTHON:-}" ] || [ -x "$python" ] || python=python3
exec "$python" scripts/build_cuda.py "$@"
