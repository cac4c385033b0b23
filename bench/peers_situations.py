"""What each tool finds in the situations that users bring: models, modes and losses.

    python bench/peers_situations.py

Every tool is asked for the largest eigenvalue of a small net's Hessian, with its defaults and
enough products. The reference is the dense Hessian in float64, of a twin that has no hindrance:
attention by its plain formula, no checkpoint, no compiler, the custom function by torch's own. A
cell is the relative error, or what went wrong. "Left behind" is what the call changed of the user's
model. PyHessian takes the model in eval mode, and leaves it so. Peers that aren't installed are
listed as such (extra "peers").
"""

from __future__ import annotations

import argparse
import copy
import io
import warnings
from collections.abc import Callable, Sequence
from contextlib import redirect_stdout
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import cross_entropy, gelu, scaled_dot_product_attention
from torch.utils.checkpoint import checkpoint

import lyapcuda

Batches = Sequence[tuple[Tensor, Tensor]]
#: Relative: what counts as right, and by how much two calls may differ.
RIGHT, SAME = 0.02, 1e-3


class Attention(nn.Module):
    """One head over eight tokens."""

    def __init__(self) -> None:
        super().__init__()
        self.qkv, self.out = nn.Linear(4, 12), nn.Linear(32, 3)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(x.view(-1, 1, 8, 4)).chunk(3, -1)
        return self.out(scaled_dot_product_attention(q, k, v).flatten(1))


class _FirstOrderGelu(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.save_for_backward(x)
        return gelu(x)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        (x,) = ctx.saved_tensors
        with torch.enable_grad():
            x = x.detach().requires_grad_()
            return torch.autograd.grad(gelu(x), x, grad)[0]


class Custom(nn.Module):
    """GELU as a function that is differentiable once, as hand-written kernels are."""

    def forward(self, x: Tensor) -> Tensor:
        return _FirstOrderGelu.apply(x)


class Checkpointed(nn.Module):
    """A part under a reentrant checkpoint."""

    def __init__(self, part: nn.Module) -> None:
        super().__init__()
        self.part = part

    def forward(self, x: Tensor) -> Tensor:
        return checkpoint(self.part, x.requires_grad_(), use_reentrant=True)


def mlp(activation: nn.Module, *more: nn.Module) -> nn.Module:
    return nn.Sequential(nn.Linear(32, 16), activation, *more, nn.Linear(16, 3))


def compiled() -> nn.Module:
    net = mlp(nn.GELU())
    net[0] = torch.compile(net[0], backend="aot_eager")
    return net


@dataclass(frozen=True)
class Situation:
    """A model, and its twin that the reference takes.

    Attributes:
        net, twin: made from the same seed, so of the same parameters.
        sizes: of the batches.
        dtype: of the parameters.
        random: the loss draws numbers, so the reference is of other ones: what counts is that two
            calls agree.
    """

    net: Callable[[], nn.Module]
    twin: Callable[[], nn.Module] | None = None
    sizes: tuple[int, ...] = (96,)
    dtype: torch.dtype = torch.float32
    random: bool = False


SITUATIONS = {
    "GELU net": Situation(lambda: mlp(nn.GELU())),
    "ReLU net": Situation(lambda: mlp(nn.ReLU())),
    "batches of 64, 24 and 8": Situation(lambda: mlp(nn.GELU()), sizes=(64, 24, 8)),
    "`scaled_dot_product_attention`": Situation(Attention),
    "reentrant checkpoint": Situation(
        lambda: nn.Sequential(Checkpointed(nn.Sequential(nn.Linear(32, 16), nn.GELU()))),
        lambda: nn.Sequential(nn.Sequential(nn.Linear(32, 16), nn.GELU())),
    ),
    "a part under `torch.compile`": Situation(compiled, lambda: mlp(nn.GELU())),
    "a function differentiable once": Situation(lambda: mlp(Custom()), lambda: mlp(nn.GELU())),
    "dropout 0.3, in train mode": Situation(lambda: mlp(nn.GELU(), nn.Dropout(0.3)), random=True),
    "BatchNorm, in train mode": Situation(lambda: mlp(nn.GELU(), nn.BatchNorm1d(16))),
    "bfloat16 parameters": Situation(lambda: mlp(nn.GELU()), dtype=torch.bfloat16),
}

# --- tools ----------------------------------------------------------------------------------------


def _ours(net: nn.Module, batches: Batches) -> float:
    found = lyapcuda.eigsh(
        lambda batch: cross_entropy(net(batch[0]), batch[1]), net.parameters(), data=batches
    )
    return float(found.eigenvalues[0])


def _pyhessian(net: nn.Module, batches: Batches) -> float:
    from pyhessian import hessian

    given = {"data": batches[0]} if len(batches) == 1 else {"dataloader": batches}
    solver = hessian(net, cross_entropy, cuda=False, **given)
    return solver.eigenvalues(maxIter=300, tol=1e-4)[0][0]


def _eigenthings(method: str) -> Callable[[nn.Module, Batches], float]:
    def run(net: nn.Module, batches: Batches) -> float:
        import hessian_eigenthings as het

        loss = het.supervised_loss(cross_entropy)
        operator = het.HessianOperator(net, batches, loss, method=method)
        return float(het.lanczos(operator, k=1, max_iter=40, which="LM", seed=0).eigenvalues[0])

    return run


def _curvlinops(net: nn.Module, batches: Batches) -> float:
    import numpy as np
    from curvlinops import HessianLinearOperator
    from scipy.sparse.linalg import eigsh

    params = list(net.parameters())
    operator = HessianLinearOperator(net, nn.CrossEntropyLoss(), params, batches)
    return float(eigsh(operator.to_scipy(np.float32), 1, which="LM", tol=1e-4)[0][0])


TOOLS: dict[str, tuple[str | None, Callable[[nn.Module, Batches], float]]] = {
    "lyapcuda": (None, _ours),
    "PyHessian": ("pyhessian", _pyhessian),
    "hessian-eigenthings": ("hessian-eigenthings", _eigenthings("autograd")),
    "hessian-eigenthings, finite differences": (
        "hessian-eigenthings",
        _eigenthings("finite_difference"),
    ),
    "curvlinops": ("curvlinops-for-pytorch", _curvlinops),
}

# --- one cell -------------------------------------------------------------------------------------


def made(make: Callable[[], nn.Module], sizes: Sequence[int]) -> tuple[nn.Module, Batches]:
    torch.manual_seed(0)
    net = make()
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(sum(sizes), 32, generator=generator)
    y = torch.randint(0, 3, (sum(sizes),), generator=generator)
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1)
    for _ in range(20):
        optimizer.zero_grad()
        cross_entropy(net(x.clone()), y).backward()
        optimizer.step()
    optimizer.zero_grad()
    return net, list(zip(x.split(list(sizes)), y.split(list(sizes)), strict=True))


def reference(net: nn.Module, batches: Batches) -> float:
    """The largest eigenvalue of the dense Hessian, in float64."""
    net = copy.deepcopy(net).double()
    params = dict(net.named_parameters())
    flat = torch.cat([p.detach().reshape(-1) for p in params.values()])
    count = sum(len(y) for _, y in batches)

    def loss(theta: Tensor) -> Tensor:
        parts = theta.split([p.numel() for p in params.values()])
        values = {n: t.view_as(p) for (n, p), t in zip(params.items(), parts, strict=True)}
        outputs = [torch.func.functional_call(net, values, (x.double(),)) for x, _ in batches]
        total = [
            cross_entropy(out, y, reduction="sum")
            for out, (_, y) in zip(outputs, batches, strict=True)
        ]
        return sum(total) / count

    with sdpa_kernel(SDPBackend.MATH):
        dense = torch.autograd.functional.hessian(loss, flat)
    return float(torch.linalg.eigvalsh(dense)[-1])


def answer(situation: Situation, run: Callable[[nn.Module, Batches], float], true: float) -> str:
    """What a tool says, and what it leaves behind, in words for a cell."""
    net, batches = made(situation.net, situation.sizes)
    net = net.to(situation.dtype)
    batches = [(x.to(situation.dtype), y) for x, y in batches]
    state = {name: value.clone() for name, value in net.state_dict().items()}
    try:
        with warnings.catch_warnings(), redirect_stdout(io.StringIO()):
            warnings.simplefilter("ignore")
            value = run(net, batches)
            again = run(net, batches) if situation.random else value
    except Exception as error:
        return f"fails: {type(error).__name__}"
    if situation.random:
        apart = abs(again - value) / abs(value)
        said = "two calls agree" if apart < SAME else f"**two calls differ by {apart:.1%}**"
    else:
        error = abs(value - true) / true
        said = f"{error:.1g}" if error < RIGHT else f"**off by {error:.0%}**"
    left = [n for n, v in net.state_dict().items() if not torch.equal(v, state[n])]
    left += ["`.grad`"] * any(p.grad is not None for p in net.parameters())
    left += ["eval mode"] * (not net.training)
    kinds = sorted({name.rsplit(".", 1)[-1] for name in left})
    return said + (f"; left behind: {', '.join(kinds)}" if kinds else "")


def main() -> None:
    argparse.ArgumentParser(description=__doc__.split("\n", 1)[0]).parse_args()
    versions, tools = [], {}
    for title, (package, run) in TOOLS.items():
        try:
            versions += [f"{package} {version(package)}"] if package else []
            tools[title] = run
        except PackageNotFoundError:
            versions.append(f"{package} isn't installed")
    print("# Beside other tools, by situation\n")
    print(__doc__.split("\n\n", 2)[2].strip() + "\n")
    print(f"torch {torch.__version__}; " + ", ".join(dict.fromkeys(versions)) + "\n")
    print("| situation | " + " | ".join(tools) + " |")
    print("|---" * (len(tools) + 1) + "|")
    for name, situation in SITUATIONS.items():
        twin, batches = made(situation.twin or situation.net, situation.sizes)
        true = 0.0 if situation.random else reference(twin, batches)
        cells = [answer(situation, run, true) for run in tools.values()]
        print(f"| {name} | " + " | ".join(cells) + " |", flush=True)
    print("\nMade by `bench/peers_situations.py`.")


if __name__ == "__main__":
    main()
