#!/usr/bin/env bash
# Everything there is to check and to measure on a machine with one GPU, in three stages of at most
# nine minutes together: A is it right, B how fast is it, C what the kernels wait for. Every line is in
# FOLDER as soon as it is known: a run that is cut off has lost only what it was at.
#
#   bash bench/gpu_check.sh [--out FOLDER] [--stage A] [--stage B] [--stage C] [--no-build]
#   bash bench/gpu_check.sh --rehearse FOLDER          # all of it in tiny sizes, without a GPU
#   bash bench/gpu_check.sh --report FILE.jsonl ...    # the report anew, from the lines of runs
#
# Uses the torch of PYTHON (default python3) and the extension in lyapcuda/. Only where that has no
# CUDA or doesn't import is one built (scripts/build_cuda.sh); with --no-build that is an error. Nothing is
# installed or fetched. Writes gpu_NAME.jsonl, .log and .md, and from stage C _counters.csv, into FOLDER
# (default: bench/results). Exit status: 0, 1 when a check failed or didn't end, 2 without a GPU.
set -euo pipefail
root=$(cd "$(dirname "$0")/.." && pwd)
export PYTHONPATH="$root:$root/bench${PYTHONPATH:+:$PYTHONPATH}"
exec "${PYTHON:-python3}" -P -m gpu.check "$@"
