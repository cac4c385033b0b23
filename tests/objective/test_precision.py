"""Trackers, LyapunovSGD and eigsh by the types of the loss, against exact Hessians.

The cases and tolerances are in precision_cases.py; docs/precision.md has the errors measured.
"""

import warnings
from pathlib import Path

import pytest
import torch
from torch import nn

import lyapcuda
import precision_cases as cases
from lyapcuda.dynamics.perturbation import default_perturbation
from lyapcuda.objective.loss_graph import loss_epsilon
from lyapcuda.params.flat import FlatLayout

BF16 = torch.bfloat16


@pytest.mark.parametrize("name", cases.PRECISIONS)
def test_values_are_those_of_the_exact_hessian(name):
    cases.check(name, cases.PRECISIONS[name]())


#: Twice what the default was measured to be off by on either side of θ. Of first order in Δq, which
#: is as large as rounding asks for; the mean of both sides is off by a tenth of that.
ONE_SIDED = {"float32": 1e-3, "TF32": 2e-2, "bfloat16 autocast": 5e-2, "bfloat16 parameters": 0.2}


@pytest.mark.parametrize("name", ONE_SIDED)
def test_the_default_is_of_one_side_and_says_how_far_off(name):
    case = cases.PRECISIONS[name]()
    tracker, h0, sides = (
        lyapcuda.CurvatureTracker(case.model.parameters()),
        case.eigenvalues[-1],
        [],
    )
    with case.during():
        for _ in range(60):
            tracker.step(case.closure)
            sides.append(float(tracker.h))
    assert sides[-2:] == pytest.approx([float(h0)] * 2, rel=ONE_SIDED[name])
    assert tracker.interval[0] < h0 < tracker.interval[1]
    assert abs(tracker.h - h0) < tracker.h_error


def test_every_case_is_in_the_docs():
    text = (Path(__file__).parents[2] / "docs" / "precision.md").read_text()
    for name in (*cases.PRECISIONS, *cases.COMPILERS):
        assert f"| {name} |" in text, name


# --- Δq follows the precision of the loss --------------------------------------------------------


def autocast_case():
    return cases.PRECISIONS["bfloat16 autocast"]()


@pytest.mark.parametrize("k", [1, 3])
def test_the_separation_grows_to_what_autocast_needs(k):
    """A difference of gradients is 16 times as long as its rounding noise, or longer."""
    case = autocast_case()
    layout = FlatLayout(case.model.parameters())
    tracker = lyapcuda.CurvatureTracker(case.model.parameters(), k=k)
    for _ in range(20):
        tracker.step(case.closure)
    (separation,) = tracker.separations
    size, noise = tracker.perturbation, tracker.sizing.noise
    assert size > 10 * default_perturbation(layout)
    assert noise > 0.0 and size * float(tracker.h.reshape(-1)[0]) > 15 * noise
    for copy in separation.place():
        pairs = zip(copy, case.model.parameters(), strict=True)
        assert sum(
            float((c - p).detach().square().sum()) for c, p in pairs
        ) ** 0.5 == pytest.approx(size, rel=1e-3)


def test_a_separation_of_the_users_stays_and_is_warned_about_where_too_small():
    case = autocast_case()
    tracker = lyapcuda.CurvatureTracker(case.model.parameters(), perturbation=1e-3)
    with pytest.warns(UserWarning, match=r"bfloat16.* perturbation=0.001 .*is advised"):
        for _ in range(14):
            tracker.step(case.closure)
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # once is enough
        for _ in range(100):
            tracker.step(case.closure)
        assert tracker.perturbation == 1e-3
        large = lyapcuda.CurvatureTracker(case.model.parameters(), perturbation=5e-2)
        for _ in range(14):
            large.step(case.closure)


def test_a_resumed_tracker_keeps_the_separation_it_was_saved_with():
    case = autocast_case()
    saved, resumed = (lyapcuda.CurvatureTracker(case.model.parameters()) for _ in range(2))
    for _ in range(3):
        saved.step(case.closure)
    resumed.load_state_dict(saved.state_dict())
    with torch.no_grad():
        for p in case.model.parameters():
            p.mul_(1.5)  # a fresh tracker would choose by another norm of θ
    for tracker in (saved, resumed):
        tracker.step(case.closure)
    assert torch.equal(saved.state, resumed.state)


def test_eigsh_under_autocast_does_not_call_rounding_converged():
    """With the differences of float32 it was off by 120 % of h0, and said it had converged."""
    case = autocast_case()
    with pytest.warns(lyapcuda.ConvergenceWarning):
        result = lyapcuda.eigsh(case.closure, case.model.parameters(), 3, mode="difference")
    assert result.difference == "central" and not bool(result.converged.any())
    with pytest.warns(lyapcuda.ConvergenceWarning):
        forward = lyapcuda.eigsh(case.closure, case.model.parameters(), 3, difference="forward")
    assert not bool(forward.converged.any())


def test_the_precision_of_a_loss_is_that_of_its_coarsest_part():
    model, x = nn.Linear(5, 2), torch.randn(3, 5)

    def loss():
        return model(x).square().mean()

    assert loss_epsilon(loss()) == torch.finfo(torch.float32).eps
    for dtype in (BF16, torch.float16):
        with torch.autocast("cpu", dtype=dtype):
            assert loss_epsilon(loss()) == torch.finfo(dtype).eps
    assert loss_epsilon(1.0) == loss_epsilon(loss().detach()) == 0.0
    assert loss_epsilon(model.double()(x.double()).sum()) == torch.finfo(torch.float64).eps
