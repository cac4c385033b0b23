"""Parameters as flat buffers: which take part, where they lie, and that no module notices."""

from __future__ import annotations

import copy
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import nn

import lyapcuda
from lyapcuda.params.flat import ALIGNMENT, FlatLayout


def tied_model():
    model = nn.Sequential(nn.Linear(6, 6), nn.Tanh(), nn.Linear(6, 6))
    model[2].weight = model[0].weight
    return model


def test_tied_weights_count_once_and_stay_tied():
    torch.manual_seed(0)
    model, x = tied_model(), torch.randn(8, 6)
    both = [model[0].weight, model[2].weight, model[0].bias, model[2].bias]
    assert FlatLayout(both).numel == FlatLayout(model.parameters()).numel == 36 + 12
    untied = copy.deepcopy(model)
    tracker = lyapcuda.CurvatureTracker(model.parameters(), debug=False)
    seen = []
    model.register_forward_pre_hook(lambda m, _: seen.append(torch.equal(m[0].weight, m[2].weight)))
    for _ in range(30):
        tracker.step(lambda: model(x).square().mean())
    assert seen == [True] * 60
    assert untied[2].weight is untied[0].weight  # deepcopy kept the tie as well
    h = float(tracker.h)
    other = lyapcuda.CurvatureTracker(untied.parameters())
    for _ in range(30):
        other.step(lambda: untied(x).square().mean())
    assert float(other.h) == h


def test_frozen_parameters_are_left_out():
    model, x = nn.Sequential(nn.Linear(4, 5), nn.Linear(5, 2)), torch.randn(8, 4)
    model[0].requires_grad_(False)
    tracker = lyapcuda.CurvatureTracker(model.parameters())
    frozen = model[0].weight.clone()
    tracker.step(lambda: model(x).square().mean())
    assert [p.name for p in tracker._layout.parameters] == ["parameter 2", "parameter 3"]
    assert torch.equal(model[0].weight, frozen) and model[0].weight.grad is None


def test_mixed_dtypes_get_buffers_of_their_own():
    a, b = nn.Parameter(torch.randn(7)), nn.Parameter(torch.randn(5, dtype=torch.float64))
    c = nn.Parameter(torch.randn(3).bfloat16())
    layout = FlatLayout([a, b, c])
    assert [g.buffer_dtype for g in layout.groups] == [torch.float32, torch.float64, torch.float32]
    # ½(2a² + 3b² + 4c²): the largest eigenvalue, 4, lies in the 16-bit part.
    tracker = lyapcuda.CurvatureTracker([a, b, c])
    for _ in range(60):
        tracker.step(
            lambda: a.square().sum() + 1.5 * b.square().sum() + 2 * c.double().square().sum()
        )
    assert float(tracker.h) == pytest.approx(4.0, rel=0.02)
    assert [v.dtype for v in tracker.vector()] == [torch.float32, torch.float64, torch.float32]


def test_a_missing_gradient_is_a_zero():
    used, unused = nn.Parameter(torch.randn(6)), nn.Parameter(torch.randn(4))
    tracker = lyapcuda.CurvatureTracker([used, unused])
    for _ in range(40):
        tracker.step(lambda: 1.5 * used.square().sum())
    assert float(tracker.h) == pytest.approx(3.0, rel=1e-4)
    assert unused.grad is None


def strided_parameters():
    torch.manual_seed(0)
    base = torch.randn(6, 8)
    return {
        "transposed": base.clone().t(),
        "channels_last": torch.randn(2, 3, 4, 5).contiguous(memory_format=torch.channels_last),
        "every_second": base.clone()[:, ::2],
        "offset": base.clone().flatten()[3:20],
        "scalar": torch.tensor(0.7),
        "empty": torch.empty(0, 3),
    }


@pytest.mark.parametrize("name", strided_parameters())
def test_non_contiguous_parameters(name):
    """The same curvature as a contiguous parameter of the same values, and the strides
    untouched.
    """
    value = strided_parameters()[name]
    companion = nn.Parameter(torch.full((2,), 0.5))
    weights = torch.rand(value.shape) + 0.5

    def h(tensor):
        parameter = nn.Parameter(tensor)
        before = parameter.stride(), parameter.data_ptr(), parameter.detach().clone()
        tracker = lyapcuda.CurvatureTracker([parameter, companion])
        for _ in range(200):
            tracker.step(
                lambda: (weights * parameter.square()).sum() + 0.01 * companion.square().sum()
            )
        assert (parameter.stride(), parameter.data_ptr()) == before[:2]
        assert torch.equal(parameter.detach(), before[2])
        vectors = tracker.vector()
        assert [v.shape for v in vectors] == [parameter.shape, companion.shape]
        return float(tracker.h)

    exact = max(2 * float(weights.max()) if weights.numel() else 0.0, 0.02)
    assert h(value) == pytest.approx(exact, rel=0.05)


def test_the_copies_keep_shape_stride_and_dtype():
    value = strided_parameters()["channels_last"].bfloat16()
    parameter = nn.Parameter(value)
    seen = []
    tracker = lyapcuda.CurvatureTracker([parameter], debug=False)

    def closure():
        seen.append((parameter.shape, parameter.stride(), parameter.dtype, parameter.data_ptr()))
        return parameter.float().square().sum()

    tracker.step(closure)
    (copy_, original) = seen
    assert copy_[:3] == original[:3] == (value.shape, value.stride(), torch.bfloat16)
    assert copy_[3] != original[3] and copy_[3] % 64 == 0


def test_segments_are_aligned_and_disjoint():
    tensors = [nn.Parameter(torch.randn(n)) for n in (1, ALIGNMENT, ALIGNMENT + 1, 5)]
    (group,) = FlatLayout(tensors).groups
    assert group.offsets == [0, ALIGNMENT, 2 * ALIGNMENT, 4 * ALIGNMENT]
    assert group.length == 5 * ALIGNMENT


def test_state_dict_and_deepcopy_are_right_between_and_after_steps():
    torch.manual_seed(0)
    model, x = tied_model(), torch.randn(8, 6)
    before = {k: v.clone() for k, v in model.state_dict().items()}
    tracker = lyapcuda.CurvatureTracker(model.parameters())
    for _ in range(3):
        tracker.step(lambda: model(x).square().mean())
        for k, v in model.state_dict().items():
            assert torch.equal(v, before[k])
        twin = copy.deepcopy(model)
        assert all(
            torch.equal(a, b) for a, b in zip(twin.parameters(), model.parameters(), strict=True)
        )
    storage = model[0].weight.untyped_storage()
    assert storage.nbytes() == 36 * 4  # the parameter owns its own memory, not a flat buffer's


def test_names_and_groups_like_torch_optim():
    model = nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 2))
    named = FlatLayout(model.named_parameters())
    assert [p.name for p in named.parameters] == ["0.weight", "0.bias", "1.weight", "1.bias"]
    groups = FlatLayout(
        [
            {"params": model[0].parameters(), "weight_decay": 0.1},
            {"params": [("last", model[1].weight)]},
            {"params": model[1].bias},
        ],
        weight_decay=0.2,
    )
    assert [p.weight_decay for p in groups.parameters] == [0.1, 0.1, 0.2, 0.2]
    assert groups.parameters[2].name == "last"


@pytest.mark.parametrize(
    ("params", "error", "message"),
    [
        ([], ValueError, "params: empty"),
        ([torch.zeros(3)], ValueError, "none of the 1 parameters requires"),
        (torch.zeros(3), TypeError, "one tensor"),
        (["weight"], TypeError, "params: parameter 0 is a str"),
        ([torch.zeros(3, dtype=torch.int64)], ValueError, "none of the 1 parameters requires"),
        ([torch.zeros(3, dtype=torch.complex64, requires_grad=True)], TypeError, "complex64"),
        ([torch.zeros(3, requires_grad=True) * 2], ValueError, "not a leaf"),
        (
            [torch.zeros(3, device="meta", requires_grad=True)],
            ValueError,
            "on meta; this build serves",
        ),
        ([torch.zeros(0, requires_grad=True)], ValueError, "empty"),
        ([("w", torch.eye(3).to_sparse().requires_grad_())], TypeError, "w.*sparse"),
        ([nn.LazyLinear(3).weight], ValueError, "parameter 0 has no shape yet.*forward pass"),
        (
            [torch.zeros(3, requires_grad=True), nn.UninitializedParameter(requires_grad=False)],
            ValueError,
            "parameter 1 has no shape yet.*forward pass",
        ),
    ],
)
def test_bad_parameters(params, error, message):
    with pytest.raises(error, match=message):
        lyapcuda.CurvatureTracker(params)


def frozen_kinds():
    """Tensors that couldn't be tracked, were they trained."""
    return {
        "int8": torch.ones(3, dtype=torch.int8),
        "bool": torch.ones(3, dtype=torch.bool),
        "float8": torch.ones(3).to(torch.float8_e4m3fn),
        "complex": torch.ones(3, dtype=torch.complex64),
        "sparse": torch.eye(3).to_sparse(),
        "sparse_csr": torch.eye(3).to_sparse_csr(),
        "quantised": torch.quantize_per_tensor(torch.ones(3), 0.1, 0, torch.qint8),
        "expanded": torch.ones(1).expand(3),
        "meta": torch.empty(3, device="meta"),
    }


@pytest.mark.parametrize("kind", frozen_kinds())
def test_frozen_parameters_of_any_kind_are_left_out(kind):
    class Module(nn.Module):
        def __init__(self):
            super().__init__()
            self.base = nn.Parameter(frozen_kinds()[kind], requires_grad=False)
            self.adapter = nn.Parameter(torch.ones(2))

    module = Module()
    closure = lambda: 1.5 * module.adapter.square().sum()  # noqa: E731
    tracker = lyapcuda.CurvatureTracker(module.parameters())
    for _ in range(3):
        tracker.step(closure)
    assert float(tracker.h) == pytest.approx(3.0, rel=1e-4)
    found = lyapcuda.eigsh(closure, module.parameters(), k=1)
    assert float(found.eigenvalues[0]) == pytest.approx(3.0, rel=1e-4)
    optimizer = lyapcuda.LyapunovSGD(module.parameters())
    optimizer.step(closure)
    assert float(optimizer.lr) == pytest.approx(1.5 / 3, rel=1e-3)
    optimizer.load_state_dict(optimizer.state_dict())
    optimizer.step(closure)


def test_a_parameter_that_changed_its_type_is_named():
    model, x = nn.Linear(3, 2), torch.randn(4, 3)
    tracker = lyapcuda.CurvatureTracker(model.named_parameters())
    tracker.step(lambda: model(x).square().sum())
    model.double()
    with pytest.raises(ValueError, match="weight is now .*float64.*was.*float32"):
        tracker.step(lambda: model(x.double()).square().sum())


def test_a_panel_is_zeros_on_cache_lines_and_takes_memory_where_it_is_written():
    """In a process of its own: where earlier tests left a large gap in the heap, the C library
    fills that with zeros instead of asking the system for pages.
    """
    code = f"import runpy; runpy.run_path({__file__!r})['check_panels']()"
    command = [sys.executable, "-c", code]
    done = subprocess.run(
        command,
        capture_output=True,
        text=True,
        env=os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)},
    )
    assert done.returncode == 0, done.stderr


def check_panels():
    for dtype in (torch.float32, torch.float64, torch.bfloat16):
        (group,) = FlatLayout([nn.Parameter(torch.zeros(2_999_937, dtype=dtype))]).groups
        panel = group.new_panel(20)
        assert panel.shape == (20, group.length) and panel.dtype == group.buffer_dtype
        assert panel.data_ptr() % 64 == 0 and panel.is_contiguous()
        before = resident(panel[3])
        panel[3] = 1.0
        after = resident(panel[3])
        row = panel[0].numel() * panel.itemsize
        if before is not None and after is not None:
            assert before < 2 * row and 0.5 * row < after - before < 3 * row
        assert not panel[:3].any() and not panel[4:].any() and bool((panel[3] == 1).all())


def resident(tensor: torch.Tensor) -> int | None:
    """Bytes in memory of the mapping that holds `tensor`; None where the system doesn't tell. (The
    process's own count, in statm, is an estimate: each core counts for itself.)
    """
    maps = Path("/proc/self/smaps")
    inside = False
    for line in maps.read_text().splitlines() if maps.exists() else ():
        if bounds := re.match(r"([0-9a-f]+)-([0-9a-f]+) ", line):
            start, end = (int(bound, 16) for bound in bounds.groups())
            inside = start <= tensor.data_ptr() < end
        elif inside and line.startswith("Rss:"):
            return 1024 * int(line.split()[1])
    return None
