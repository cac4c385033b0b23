"""Memory over a thousand steps (bench/robustness.py takes 10,000)."""

from pathlib import Path

import pytest

from soak import soak


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="needs /proc")
def test_memory_is_flat():
    found = soak(1000)
    assert found.tensors[0] == found.tensors[1]
    assert found.memory[1] - found.memory[0] < 4 << 20
