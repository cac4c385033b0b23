#!/usr/bin/env bash
# Everything there is to check and to measure on a machine with a GPU, in one command of at most nine
# minutes: builds in place with CUDA against the torch of PYTHON (default python3; nothing is
# installed or fetched), runs the tests and compute-sanitizer, then the benches.
#
#   bash bench/gpu_check.sh [--out FOLDER] [--seconds 540]
#
# Writes FOLDER/gpu_NAME.json and .md (default: bench/results). Exit status: 0, 1 when a check failed,
# 2 without a GPU. `--rehearse FOLDER` walks through all of it in tiny sizes where there is no GPU.
set -euo pipefail
cd "$(dirname "$0")/.."
python=${PYTHON:-python3}
case " $* " in
*" --rehearse"*) ;;
*)
  "$python" -c 'import sys, torch; sys.exit(not torch.cuda.is_available())' || {
    echo "gpu_check: no GPU that $python's torch can use; --rehearse FOLDER needs none" >&2
    exit 2
  }
  if [ -z "${CUDA_HOME:-}" ]; then
    command -v nvcc >/dev/null || {
      echo "gpu_check: no nvcc on PATH; set CUDA_HOME" >&2
      exit 2
    }
    # What nvcc itself calls its home: the nvcc on PATH may be a wrapper elsewhere.
    CUDA_HOME=$(nvcc --dryrun -x cu /dev/null 2>&1 | sed -n 's/^#\$ TOP=//p')
    CUDA_HOME=$(cd "$CUDA_HOME" && pwd)
    export CUDA_HOME
  fi
  ;;
esac
export PYTHONPATH="$PWD${PYTHONPATH:+:$PYTHONPATH}"
exec "$python" bench/gpu_report.py "$@"
