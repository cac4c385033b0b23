"""RunningPeak: rises at once, falls slowly, and never counts what is no curvature."""

from __future__ import annotations

import math

import pytest
import torch

from lyapcuda.running_peak import RunningPeak
from sync import no_waiting


def test_it_rises_at_once_and_falls_by_its_decay():
    peak, x = RunningPeak(decay=0.75), torch.tensor(8.0)
    assert math.isnan(float(peak.value))
    with no_waiting():
        peak.update(x)
        found = peak.update(x / 2)
    assert found.dtype == torch.float64 and float(found) == 7.0  # 0.75·8 + 0.25·4
    assert float(peak.update(torch.tensor(7.5))) == 7.5


@pytest.mark.parametrize("x", [math.nan, math.inf, -math.inf, 0.0, -3.0])
def test_what_is_no_curvature_leaves_a_peak_as_it_is(x):
    peak = RunningPeak((2,))
    assert bool(peak.update(torch.tensor([x, 1.0])).isnan().equal(torch.tensor([True, False])))
    peak.update(torch.tensor([2.0, 5.0]))
    assert peak.update(torch.tensor([x, 5.0])).tolist() == [2.0, 5.0]


def test_what_it_returns_and_saves_are_copies_and_it_stays_in_place():
    """A CUDA graph reads and writes one place."""
    peak, other = RunningPeak(), RunningPeak()
    place = other._peak.data_ptr()
    found, saved = peak.update(torch.tensor(4.0)), peak.state_dict()
    peak.restart()
    assert math.isnan(float(peak.value)) and float(found) == float(saved["peak"]) == 4.0
    other.load_state_dict(saved)
    other.update(torch.tensor(6.0))
    assert other._peak.data_ptr() == place and float(saved["peak"]) == 4.0


@pytest.mark.parametrize("saved", [{}, {"peak": 1.0}, {"peak": torch.ones(2)}, None])
def test_another_state_is_refused_and_changes_nothing(saved):
    peak = RunningPeak()
    peak.update(torch.tensor(4.0))
    with pytest.raises(ValueError, match="state_dict"):
        peak.load_state_dict(saved)
    assert float(peak.value) == 4.0


def test_a_wrong_decay_is_named():
    with pytest.raises(ValueError, match=r"decay=1\.0"):
        RunningPeak(decay=1.0)
