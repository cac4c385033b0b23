"""States that don't fit are refused, by name."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import lyapcuda
from lyapcuda.params.saved_state import check_shapes, require_entries


@pytest.mark.parametrize("saved", [None, [1], "text", torch.zeros(2)])
def test_what_is_no_dictionary_is_refused(saved):
    with pytest.raises(ValueError, match=f"expected a dictionary, got a {type(saved).__name__}"):
        require_entries(saved, "q")


def test_missing_entries_are_named():
    require_entries({"q": 1, "more": 2}, "q")
    with pytest.raises(ValueError, match=r"incomplete, it lacks \['p', 'q'\]"):
        require_entries({"state": 1}, "q", "p", "state")
    with pytest.raises(ValueError, match="not the state of a LyapunovSGD, it lacks"):
        require_entries({}, "lr", of="a LyapunovSGD")


def test_other_shapes_and_dtypes_are_refused():
    check_shapes("q", [torch.zeros(2), None], [torch.ones(2), None])
    for other in (torch.zeros(3), torch.zeros(2, dtype=torch.float64), None):
        with pytest.raises(ValueError, match="q holds .* another model"):
            check_shapes("q", [torch.zeros(2)], [other])


@pytest.mark.parametrize("k", [1, 3])
@pytest.mark.parametrize("entry", ["state", "q", "p"])
def test_a_tracker_whose_saved_separation_is_incomplete(k, entry):
    model = nn.Linear(4, 3)
    tracker = lyapcuda.CurvatureTracker(model.parameters(), k)
    tracker.step(lambda: model(torch.ones(2, 4)).square().sum())
    saved = tracker.state_dict()
    del saved["separations"][0][entry]
    with pytest.raises(ValueError, match=f"lacks \\['{entry}'\\]"):
        tracker.load_state_dict(saved)


def test_an_optimizer_names_what_is_missing():
    optimizer = lyapcuda.LyapunovSGD(nn.Linear(4, 3).parameters())
    with pytest.raises(ValueError, match="LyapunovSGD, it lacks .*'warm'"):
        optimizer.load_state_dict(torch.optim.SGD(nn.Linear(4, 3).parameters()).state_dict())


def test_a_state_that_is_refused_leaves_a_tracker_that_had_not_started():
    model = nn.Linear(4, 3)
    tracker = lyapcuda.CurvatureTracker(model.parameters())
    tracker.step(lambda: model(torch.ones(2, 4)).square().sum())
    saved = tracker.state_dict()
    saved["separations"][0]["q"] = [torch.zeros(3)]
    fresh = lyapcuda.CurvatureTracker(model.parameters())
    with pytest.raises(ValueError, match="q holds"):
        fresh.load_state_dict(saved)
    assert fresh.perturbation is None and fresh.calls == 0  # Δq is chosen at the first step
