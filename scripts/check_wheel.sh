#!/usr/bin/env bash
# Installs a wheel and nothing else into an empty environment, and measures a net with it, far from
# the sources.
#
#   bash scripts/check_wheel.sh dist/lyapcuda-*.whl
set -euo pipefail
wheel=$(realpath "$1")
root=$(cd "$(dirname "$0")/.." && pwd)
place=$(mktemp -d)
trap 'rm -rf "$place"' EXIT
unset PYTHONPATH
"${WHEEL_PYTHON:-python3}" -m venv "$place/venv"
"$place/venv/bin/python" -m pip --disable-pip-version-check install --quiet --no-compile \
  --constraint "$root/constraints.txt" "$wheel"
cd "$place"
venv/bin/python "$root/scripts/check_installed.py"
venv/bin/lyapcuda info
