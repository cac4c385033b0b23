#!/usr/bin/env bash
# Builds what others install, into dist/: the sdist, a wheel of it with the CPU backend for every
# Python from 3.11 on and torch 2.11 to 2.15, and tests that wheel in an empty environment.
# Uses the environment that scripts/quickstart.sh made.
#
#   bash scripts/build_wheel.sh              # on Linux the wheel is tagged manylinux, as its symbols allow
#   WHEEL_PYTHON=python3.13 bash scripts/build_wheel.sh    # tests it there
set -euo pipefail
cd "$(dirname "$0")/.."
[ -x .venv/bin/python ] ||
  { echo "build_wheel: no .venv here; run scripts/quickstart.sh first" >&2; exit 1; }
export PATH="$PWD/.venv/bin:$PATH"
pip="python -m pip --disable-pip-version-check"
tools=$(python -c 'if True:
  import tomllib
  project = tomllib.load(open("pyproject.toml", "rb"))["project"]
  print(*project["optional-dependencies"]["release"])')
# shellcheck disable=SC2086  # one word a tool
$pip install --quiet --no-compile --constraint constraints.txt $tools
rm -rf dist build/wheel && mkdir -p build
python -m build --no-isolation --sdist --outdir dist . >build/sdist.log 2>&1 ||
  { cat build/sdist.log; exit 1; }
# Stripped, and without debug information. Of the sdist: a file that it lacks would fail here.
CFLAGS="${CFLAGS--g0}" LDFLAGS="${LDFLAGS--s}" LYAPCUDA_CUDA=0 \
  $pip wheel --quiet --no-deps --no-build-isolation --wheel-dir build/wheel dist/*.tar.gz
if [ "$(uname)" = Linux ]; then
  # torch's libraries are torch's to bring.
  auditwheel repair --exclude "libtorch*.so*" --exclude "libc10*.so*" --wheel-dir dist \
    build/wheel/*.whl
else
  cp build/wheel/*.whl dist/
fi
# Every symbol of Python's is in the limited API of the Python that the tag names.
abi3audit --strict dist/*.whl
bash scripts/check_wheel.sh dist/*.whl
