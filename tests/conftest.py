"""Settings for every test."""

import gc
import os
import signal

# The tests' tensors are small: a second thread would only be waited for. Processes that tests start
# see it too.
os.environ.setdefault("OMP_NUM_THREADS", "1")
# Where a test asks for two: they don't spin, which would keep other tests' processes waiting.
os.environ.setdefault("OMP_WAIT_POLICY", "passive")

import pytest  # noqa: E402
import torch  # noqa: E402
from torch import nn  # noqa: E402

import simt_library  # noqa: E402
from noisy import Noisy  # noqa: E402

torch.set_num_threads(1)
# A shell that runs the suite in the background (`&`, nohup) has SIGINT ignored.
if signal.getsignal(signal.SIGINT) == signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)


def pytest_collection_finish():
    freeze()


@pytest.hookimpl(trylast=True)  # once the file's fixtures are gone
def pytest_runtest_teardown(item, nextitem):
    if nextitem is not None and nextitem.path != item.path:
        freeze()


def freeze():
    """What was made so far is kept from the garbage collector: every tracker asks it for modules,
    and would look through thousands of tests and all that they have imported."""
    gc.collect()
    gc.freeze()


@pytest.fixture(params=["cpu", *(name for name in simt_library.HERE if name != "simt reverse")])
def backend(request):
    """The ops of a test that asks for it run on every backend that can be had: the CPU's, the
    CUDA backend on the emulator, and where there is a GPU, there."""
    if request.param == "cpu":
        yield request.param
    else:
        with simt_library.use(request.param):
            yield request.param


@pytest.fixture(scope="module", params=simt_library.HERE)
def library(request):
    """The ops of a module that asks for it are that library's: each in turn that can be had."""
    with simt_library.use(request.param):
        yield request.param


@pytest.fixture
def noisy():
    """A model whose evaluations leave traces, and its closure."""
    torch.manual_seed(0)
    model = Noisy()
    x, y = torch.randn(32, 6), torch.randint(0, 3, (32,))
    return model, lambda: nn.functional.cross_entropy(model(x), y)
