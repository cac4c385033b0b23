"""More than 2³¹ elements, in 8 MB: every window of the address space is the same memory."""

import ctypes
import mmap
import os
import sys

import pytest
import torch

from lyapcuda import ops

pytestmark = [
    pytest.mark.skipif(sys.platform != "linux", reason="maps memory as Linux does"),
    pytest.mark.slow,
]

WINDOW = 1 << 21  # bytes: a multiple of what any op does at a time
N = (1 << 31) + 40  # float32: the last 40 elements are beyond what 32 bits, signed, reach


@pytest.fixture
def windows():
    """make(window) → a float32 tensor of N elements that repeats it."""
    libc = ctypes.CDLL(None, use_errno=True)
    libc.mmap.restype = ctypes.c_void_p
    arguments = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int, ctypes.c_int, ctypes.c_int]
    libc.mmap.argtypes = [*arguments, ctypes.c_long]
    libc.munmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t]
    count = -(-4 * N // WINDOW)
    mapped = []

    def make(window):
        file = os.memfd_create("window")
        os.truncate(file, WINDOW)
        nothing = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | getattr(mmap, "MAP_NORESERVE", 0x4000)
        base = libc.mmap(None, count * WINDOW, 0, nothing, -1, 0)
        assert base not in (None, ctypes.c_void_p(-1).value), "no address space"
        mapped.append(base)
        writable, fixed = mmap.PROT_READ | mmap.PROT_WRITE, 0x10
        for i in range(count):
            at = libc.mmap(base + i * WINDOW, WINDOW, writable, mmap.MAP_SHARED | fixed, file, 0)
            assert at == base + i * WINDOW, os.strerror(ctypes.get_errno())
        os.close(file)
        memory = (ctypes.c_char * (4 * N)).from_address(base)
        tensor = torch.frombuffer(memory, dtype=torch.float32)
        tensor[: WINDOW // 4] = window
        return tensor

    yield make
    for base in mapped:
        libc.munmap(base, count * WINDOW)


def numbers(seed):
    """Small whole numbers, so that every sum is exact."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(-3, 4, (WINDOW // 4,), generator=generator).float()


def total(window):
    """Over all windows, the last of which holds 40 elements."""
    whole, rest = divmod(N, WINDOW // 4)
    return float(window.double().sum() * whole + window[:rest].double().sum())


def test_a_step_over_more_elements_than_an_int32_counts(windows):
    q, g0, g1 = (numbers(seed) for seed in range(3))
    big_q, big_g0, big_g1 = windows(q)[None], windows(g0), windows(g1)[None]
    state = ops.new_state("cpu", perturbation=1.0, transform=0.5, beta=0.25)
    # d lies where g1 does, and each window is read before it is written: but the next is the same
    # memory. So d gets its own.
    d = windows(torch.zeros(WINDOW // 4))[None]
    gram = ops.ascent_(d, big_q, [big_g0], big_g1, [0], state)
    y, carried = g1 - g0, 0.5 * q
    expected = {(0, 0): carried * carried, (0, 1): carried * y, (1, 0): carried * y, (1, 1): y * y}
    for place, window in expected.items():
        assert float(gram[place]) == total(window), place
    assert torch.equal(d[0, : WINDOW // 4], carried + 0.25 * y)
    # And back beside θ: the copy's last elements are beyond 2³¹.
    ops.recenter_(big_q, d, d, [big_g0], [0], state)
    assert torch.equal(d[0, -40:], (g0 + carried)[:40]) and torch.equal(big_q[0, -40:], q[:40])


def test_a_gram_matrix_over_more_elements_than_an_int32_counts(windows):
    q = numbers(3)
    row = windows(q).view(1, N)
    assert float(ops.gram(row, row)) == total(q * q)


def test_another_separation_of_more_elements_than_an_int32_counts(windows):
    """reseed_ writes numbers that depend on the place: the last window's remain."""
    panel = windows(torch.zeros(WINDOW // 4))
    state = ops.new_state("cpu", perturbation=1.0, reseed=1.0)
    first = N - 40
    ops.reseed_(panel[None], [first], [40], state, elements=N)
    assert bool((panel[-40:] != 0).all()) and int((panel[: WINDOW // 4] != 0).sum()) == 40
