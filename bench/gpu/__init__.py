"""The checks and measurements of bench/gpu_check.sh, a module an idea."""
