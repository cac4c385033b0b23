"""A call of every op, for what is asked of all alike."""

from __future__ import annotations

import torch

from ops_cases import F64, make_case, state_with
from panel_cases import make_panel_case
from quasi_newton_cases import KINDS, newton_case, step_arguments, step_options

SUMS = torch.tensor([1.5, 1.0, 0.5, 1.0, 1.0, 0.5], dtype=F64)
LOSSES = torch.tensor([0.3, 0.4], dtype=F64)


def calls(buffer=torch.float32, storage=torch.float32):
    """(name, tensors and other positional arguments, keyword arguments) of each op."""
    case = make_case([5, 33, (), (2, 9)], buffer, storage)
    step = (case.d, case.q, case.g0, case.g1, case.offsets, case.state)
    moved = {"theta": case.theta, "momentum": 0.9, "p": case.p, "p_next": case.p_next}
    number = torch.tensor([0.3], dtype=F64)
    skipped = state_with(case.state, committed=0.0)
    lost = state_with(case.state, reseed=1.0)
    gradients = (case.g1, case.g0, case.offsets, number.clone())
    return {
        "ascent_": (step, {}),
        "ascent_ with everything": (step, {"sign": -1, "weight_decay": 0.1, **moved}),
        "exponent_": ((case.state, SUMS.clone(), LOSSES.clone()), {"estimate": 1, "ema": 0.9}),
        "secant_": ((case.state, SUMS.clone()), {"sign": -1}),
        "recenter_": ((case.theta1, case.q, case.p, case.theta, case.offsets, case.state), {}),
        "recenter_ with momentum": (
            (case.theta1, case.q, case.p, case.theta, case.offsets, skipped),
            {"p": case.d, "p_previous": case.p_next},
        ),
        "descend_": ((case.theta, case.g0, case.state), {"weight_decay": 0.1}),
        "descend_ with everything": (
            (case.theta, case.g0, case.state),
            {
                "momentum": 0.9,
                "nesterov": True,
                "buffer": case.p,
                "offsets": case.offsets,
                "factor": torch.ones(1, dtype=F64),
            },
        ),
        "stream_copy_": ((case.d, case.q), {}),
        "reseed_": (
            (case.q, case.offsets, [t.numel() for t in case.theta], lost),
            {"elements": 57, "p": case.p},
        ),
        "displace_": ((case.theta1, case.q, case.theta, case.offsets, number), {}),
        "difference_": ((case.d, *gradients), {}),
        "difference_ with everything": (
            (case.d, *gradients),
            {"keep": 0.5, "weight_decay": 0.1, "v": case.q},
        ),
        **panel_calls(buffer, storage),
    }


def panel_calls(buffer, storage):
    k = 3
    case = make_panel_case(k, [5, 33, (), (2, 9)], buffer, storage, pending=1.0, again=1.0)
    step = (case.d, case.q, case.g0, case.g1, case.offsets, case.state)
    moved = {"theta": case.theta, "momentum": 0.9, "p": case.p, "p_next": case.p_next}
    identity = torch.eye(2 * k, dtype=F64)
    gate = torch.ones(1, dtype=F64)
    return {
        "panel_ascent_": (step, {}),
        "panel_ascent_ with everything": (step, {"sign": -1, "weight_decay": 0.1, **moved}),
        "benettin_": ((case.state, identity, LOSSES.clone(), k), {"estimate": 1}),
        "benettin_refine_": ((case.state, torch.eye(k, dtype=F64), k), {}),
        "panel_recenter_": (
            (case.q, case.copies, case.d, case.theta, case.offsets, case.state),
            {},
        ),
        "gram": ((case.q, case.d), {"gate": gate}),
        "combine_": ((case.d, case.q, torch.eye(k, dtype=F64)), {"gate": gate}),
        "project_": ((case.d[0].clone(), case.q, torch.ones(k, dtype=F64)), {}),
        **newton_calls(storage),
    }


def newton_calls(storage):
    case = newton_case(3, [5, 33, (), (2, 9)], storage)
    step, slopes = step_arguments(case), torch.ones(3, dtype=F64)
    everything = step_options(case, KINDS[2], factor=torch.ones(1, dtype=F64))
    return {
        "panel_slopes_": (step, {}),
        "panel_slopes_ with everything": (step, everything),
        "panel_descend_": ((*step, slopes), {}),
        "panel_descend_ with everything": ((*step, slopes), {"max_lr": 0.1, **everything}),
    }


NAMES = list(calls())


def small_calls(device, sizes=(5, 33)):
    """(arguments by name) of each op, on one device."""
    case = make_case(sizes, gap=2)

    def to(value):
        if isinstance(value, list):
            return [to(item) for item in value]
        return value.to(device) if isinstance(value, torch.Tensor) else value

    flat = {"q": case.q, "state": case.state, "offsets": case.offsets}
    sums, losses = torch.tensor([1.5, 1.0, 0.5, 1.0, 1.0, 0.5], dtype=F64), torch.ones(2, dtype=F64)
    moved = {"theta": case.theta, "momentum": 0.9, "p": case.p, "p_next": case.p_next}
    calls = {
        "ascent_": {"d": case.d, "g0": case.g0, "g1": case.g1, **flat, **moved},
        "exponent_": {"state": case.state, "sums": sums, "losses": losses},
        "secant_": {"state": case.state, "sums": sums},
        "recenter_": {
            "theta1": case.theta1,
            "q_previous": case.p,
            "theta": case.theta,
            **flat,
            "p": case.d,
            "p_previous": case.p_next,
        },
        "descend_": {
            "theta": case.theta,
            "gradient": case.g0,
            "state": case.state,
            "buffer": case.p,
            "offsets": case.offsets,
            "factor": torch.ones(1, dtype=F64),
        },
        "stream_copy_": {"destination": case.d, "source": case.q},
    }
    step = torch.ones(1, dtype=F64)
    where = {"offsets": case.offsets}
    calls["displace_"] = {"v": case.q, "copies": case.theta1, "theta": case.theta, "step": step}
    calls["displace_"] |= where
    calls["difference_"] = {"out": case.d, "plus": case.g0, "minus": case.g1, "scale": step}
    calls["difference_"] |= {"v": case.q, **where}
    panel = make_panel_case(2, sizes, gap=2)
    both = {"q": panel.q, "d": panel.d, "state": panel.state, "offsets": panel.offsets}
    moved = {"theta": panel.theta, "momentum": 0.9, "p": panel.p, "p_next": panel.p_next}
    calls["panel_ascent_"] = {"g0": panel.g0, "g1": panel.g1, **both, **moved}
    calls["panel_recenter_"] = {"copies": panel.copies, "theta": panel.theta, **both}
    square = torch.eye(4, dtype=F64)
    calls["benettin_"] = {"state": panel.state, "gram": square, "losses": losses, "k": 2}
    calls["benettin_refine_"] = {"state": panel.state, "gram": square[:2, :2].contiguous(), "k": 2}
    newton = {"theta": panel.theta, "gradient": panel.g0, "panel": panel.d, "buffer": panel.p[0]}
    calls["panel_slopes_"] = {**newton, "offsets": panel.offsets, "state": panel.state}
    calls["panel_slopes_"]["factor"] = torch.ones(1, dtype=F64)
    calls["panel_descend_"] = {**calls["panel_slopes_"], "slopes": torch.ones(2, dtype=F64)}
    calls["gram"] = {"a": panel.q, "b": panel.d, "gate": step}
    calls["combine_"] = {"panel": panel.q, "out": panel.d, "gate": step}
    calls["combine_"] |= {"matrix": square[:2, :2].contiguous()}
    whole = {"offsets": panel.offsets, "sizes": list(sizes), "elements": sum(sizes)}
    calls["reseed_"] = {"panel": panel.q, "state": panel.state, "p": panel.p, **whole}
    calls["project_"] = {"w": panel.d[0], "v": panel.q, "coefficients": torch.ones(2, dtype=F64)}
    return {
        name: {key: to(value) for key, value in arguments.items()}
        for name, arguments in calls.items()
    }
