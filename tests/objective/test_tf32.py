"""TF32: which products count as it, and what the package makes of it, emulated on the CPU.

The errors of each method are cases of test_precision.py.
"""

import warnings
from contextlib import contextmanager
from types import SimpleNamespace
from unittest import mock

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

import lyapcuda
import precision_cases as cases
from emulated_tf32 import Rounding, emulated, rounded, truncated
from lyapcuda.dynamics.perturbation import default_perturbation
from lyapcuda.objective import tf32
from lyapcuda.objective.loss_graph import loss_epsilon
from lyapcuda.params.flat import FlatLayout

FLOAT32 = torch.finfo(torch.float32).eps
CUDA = torch.device("cuda", 0)


@contextmanager
def settings(conv="ieee", rnn="ieee", matmul="ieee"):
    cudnn = torch.backends.cudnn
    parts = (cudnn.conv, conv), (cudnn.rnn, rnn), (torch.backends.cuda.matmul, matmul)
    before = [part.fp32_precision for part, _ in parts]
    for part, value in parts:
        part.fp32_precision = value
    try:
        yield
    finally:
        for (part, _), value in zip(parts, before, strict=True):
            part.fp32_precision = value


def node(name, dtype=torch.float32, device=CUDA):
    made = SimpleNamespace(dtype=dtype, device=device)
    return SimpleNamespace(name=lambda: name, _input_metadata=(made,), next_functions=())


@pytest.mark.parametrize(
    ("name", "kind"),
    [
        ("ConvolutionBackward0", "conv"),
        ("CudnnConvolutionBackward0", "conv"),
        ("CudnnRnnBackward0", "rnn"),
        *((f"{op}Backward0", "matmul") for op in ("Mm", "Addmm", "Bmm", "Baddbmm", "Linear")),
        ("MvBackward0", None),
        ("AddmvBackward0", None),
        ("ScaledDotProductEfficientAttentionBackward0", None),
        ("MkldnnConvolutionBackward0", None),
        ("SparseAddmmBackward0", None),
        ("GeluBackward0", None),
        ("torch::autograd::AccumulateGrad", None),
    ],
)
def test_each_function_follows_its_setting(name, kind):
    for allowed in ("conv", "rnn", "matmul"):
        for capability, has in (((7, 5), False), ((8, 0), True), ((9, 0), True)):
            with (
                settings(**{allowed: "tf32"}),
                mock.patch("torch.cuda.get_device_capability", return_value=capability),
            ):
                expected = tf32.EPSILON if has and allowed == kind else 0.0
                assert tf32.node_epsilon(node(name)) == expected
                assert tf32.node_epsilon(node(name, torch.bfloat16)) == 0.0
                assert tf32.node_epsilon(node(name, torch.float64)) == 0.0
                assert tf32.node_epsilon(node(name, device=torch.device("cpu"))) == 0.0


def test_settings_are_read_in_either_api_and_in_a_mix_of_both(monkeypatch):
    assert tf32.is_allowed("conv") and tf32.is_allowed("rnn")  # torch's defaults
    assert not tf32.is_allowed("matmul")
    with settings(conv="tf32"):
        assert [tf32.is_allowed(kind) for kind in ("conv", "rnn", "matmul")] == [True, False, False]
        with pytest.raises(RuntimeError):  # the older API, now
            torch.backends.cudnn.allow_tf32  # noqa: B018
    with torch.backends.cudnn.flags(allow_tf32=False):
        assert not tf32.is_allowed("conv")
    before = torch.get_float32_matmul_precision()
    try:
        for precision in ("high", "medium"):  # on CUDA, torch takes TF32 for both
            torch.set_float32_matmul_precision(precision)
            assert tf32.is_allowed("matmul")
    finally:
        torch.set_float32_matmul_precision(before)
    with settings(conv="tf32"), monkeypatch.context() as patch:
        patch.setattr(torch.backends.cudnn, "enabled", False)
        assert not tf32.is_allowed("conv")  # a matrix product, then
    monkeypatch.setenv("NVIDIA_TF32_OVERRIDE", "0")
    with settings("tf32", "tf32", "tf32"):
        assert not any(map(tf32.is_allowed, ("conv", "rnn", "matmul")))


def conv_net():
    return nn.Sequential(nn.Conv2d(1, 2, 3), nn.GELU(), nn.Flatten(), nn.Linear(8, 2))


def mlp():
    return nn.Sequential(nn.Flatten(), nn.Linear(16, 3), nn.GELU(), nn.Linear(3, 2))


def hidden(model, how):
    if how == "compiled":
        return torch.compile(model, backend="aot_eager")
    if how == "checkpointed":
        # The reentrant kind gives gradients only where an input wants one.
        return lambda x: checkpoint(model, x.clone().requires_grad_(), use_reentrant=True)
    return model


@pytest.mark.parametrize(
    ("make", "how", "conv", "matmul"),
    [
        (conv_net, "plain", True, True),
        (mlp, "plain", False, True),
        (conv_net, "compiled", True, True),
        (mlp, "compiled", False, True),
        # It shows no weights: whatever is allowed counts.
        (conv_net, "checkpointed", True, True),
        (mlp, "checkpointed", True, True),
    ],
)
def test_a_loss_with_products_that_take_tf32(make, how, conv, matmul):
    x = torch.randn(3, 1, 4, 4)
    model = make()
    for part, expected in (("conv", conv), ("matmul", matmul)):
        with settings(**{part: "tf32"}):
            loss = hidden(model, how)(x).square().mean()
            assert loss_epsilon(loss) == FLOAT32  # on the CPU
            with mock.patch.object(tf32, "has_tf32", lambda device: True):
                assert loss_epsilon(loss) == (tf32.EPSILON if expected else FLOAT32)
                with settings():
                    assert loss_epsilon(loss) == FLOAT32


def test_a_loss_on_the_cpu_asks_no_device():
    with (
        settings("tf32", "tf32", "tf32"),
        mock.patch("torch.cuda.get_device_capability", side_effect=AssertionError),
    ):
        assert loss_epsilon(conv_net()(torch.randn(3, 1, 4, 4)).sum()) == FLOAT32


# --- emulated ------------------------------------------------------------------------------------


def test_the_emulation_rounds_to_10_bits():
    ulp = 2.0**-10
    x = torch.tensor([1.0, 1 + ulp / 2, 1 + 1.5 * ulp, 1 + 0.51 * ulp, -1 - 0.51 * ulp])
    assert rounded(x).tolist() == [1.0, 1.0, 1 + 2 * ulp, 1 + ulp, -1 - ulp]
    assert truncated(x).tolist() == [1.0, 1.0, 1 + ulp, 1.0, -1.0]
    model, x = conv_net(), torch.randn(3, 1, 4, 4)
    with Rounding() as rounding:
        model(x).square().mean().backward()
    assert rounding.count == 2 + 3  # the linear layer's backward pass makes two


@pytest.mark.parametrize("k", [1, 3])
def test_the_separation_grows_to_what_tf32_needs(k):
    case = cases.problem("conv")
    layout = FlatLayout(case.model.parameters())
    tracker = lyapcuda.CurvatureTracker(case.model.parameters(), k=k)
    with emulated():
        for _ in range(20):
            tracker.step(case.closure)
    size, noise = tracker.perturbation, tracker.sizing.noise
    assert size > 3 * default_perturbation(layout)  # 64 times the noise, as far as it bends
    assert noise > 0.0 and size * float(tracker.h.reshape(-1)[0]) > 15 * noise


def test_a_small_separation_of_the_users_is_warned_about():
    case = cases.problem("conv")
    tracker = lyapcuda.CurvatureTracker(case.model.parameters(), perturbation=1e-4)
    with emulated(), pytest.warns(UserWarning, match=r"TF32.* perturbation=0.0001 "):
        for _ in range(14):
            tracker.step(case.closure)


@pytest.mark.parametrize("name", ["gelu_mlp", "conv", "tanh_mlp"])
@pytest.mark.parametrize("k", [1, 3])
def test_eigsh_in_tf32_does_not_call_rounding_converged(name, k):
    """With the differences of float32 it was off by up to 630 % of h0, called converged."""
    case = cases.problem(name)
    exact = case.eigenvalues.flip(0)[:k]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", lyapcuda.ConvergenceWarning)
        with cases.tf32():
            found = lyapcuda.eigsh(case.closure, case.model.parameters(), k, mode="difference")
        plain = lyapcuda.eigsh(case.closure, case.model.parameters(), k, mode="difference")
    off = (found.eigenvalues - exact).abs()
    assert not bool((found.converged & (off > 1e-3 * exact.abs())).any())
    assert found.difference == "central"
    assert float(off.max()) < 1e-2 * float(exact[0])
    assert bool(((found.interval[:, 0] <= exact) & (exact <= found.interval[:, 1])).all())
    assert found.gradient_evaluations <= 2.5 * plain.gradient_evaluations
