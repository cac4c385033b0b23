"""What bench/import_time.py and tests/extension/test_imports.py run in a fresh interpreter."""

#: Prints the seconds that both imports take, how many modules the second one brings, and whose.
#: (torch brings NumPy, and tqdm where it is installed.)
IMPORTS = """
import json, sys, time
start = time.perf_counter()
import torch
between, before = time.perf_counter(), set(sys.modules)
import lyapcuda
end, new = time.perf_counter(), set(sys.modules) - before
packages = {name.partition(".")[0] for name in new} - set(sys.stdlib_module_names)
print(json.dumps([between - start, end - between, len(new), sorted(packages)]))
"""
