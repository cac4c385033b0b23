"""The tests of the ops once more, on the CUDA backend: emulated, and on a GPU if there is one.

They are written for torch.ops.lyapcuda with CPU tensors; tests/simt_library.py puts the other
library in its place.
"""

import importlib

import pytest

import simt_library

MODULES = (
    "test_ascent",
    "test_benettin",
    "test_benettin_rate",
    "test_benettin_refine",
    "test_combine",
    "test_descend",
    "test_difference",
    "test_displace",
    "test_exponent",
    "test_gram",
    "test_panel_ascent",
    "test_panel_descend",
    "test_panel_recenter",
    "test_panel_slopes",
    "test_project",
    "test_recenter",
    "test_reseed",
    "test_stream_copy",
)
#: What the CPU backend alone promises: nothing about threads is asked of a GPU, and a sum may end
#: in other digits where a kernel of another shape adds it (test_cuda_binding.py says how close).
CPU_ONLY = {
    "a_run_gives_the_same_bits_on_any_number_of_threads",
    "a_panel_with_itself_is_symmetric_to_the_bit_and_the_same_as_with_a_copy",
}
HERE = [name for name in simt_library.HERE if name != "simt reverse"]


@pytest.fixture(scope="module", params=HERE, autouse=True)
def library(request):
    with simt_library.use(request.param):
        yield


for _module in MODULES:
    for _name, _test in vars(importlib.import_module(_module)).items():
        _what = f"{_module}__{_name.removeprefix('test_')}".removeprefix("test_")
        if _name.startswith("test_") and not {_what, _what.split("__")[1]} & CPU_ONLY:
            globals()[f"test_{_what}"] = _test
