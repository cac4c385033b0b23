"""The models that bench/peers.py measures, at a state early in their training.

`prepare` trains one for a moment and saves it with its batch; `load` is what every tool's process
then starts from, so all of them see the same bits.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from dataclasses import dataclass
from itertools import count
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

from gpt import GPT

sys.path.insert(0, str(Path(__file__).parents[1]))

from examples.paper.data import BatchLoader  # noqa: E402
from examples.paper.data import load as load_data  # noqa: E402
from examples.paper.models import BasicBlock, build  # noqa: E402

#: The first 64 kB of it are the GPT's text: every Python has it.
TEXT = "argparse"


@dataclass(frozen=True)
class Spec:
    """A problem before it is made.

    Attributes:
        title: for the report.
        batch: of the measured Hessian.
        steps, train_batch, lr: SGD before it (Adam for the GPT).
        training: whether the measured loss has the model in training mode.
        smooth: no kinks: an exact product and a difference of gradients see the same Hessian.
        ks: how many eigenvalues.
        seeds: of the start vectors; a setting has to be accurate enough for all of them.
        share: of the run's time.
    """

    title: str
    batch: int
    steps: int
    train_batch: int
    lr: float
    training: bool
    smooth: bool
    ks: tuple[int, ...]
    seeds: int
    share: float


SPECS = {
    "mlp_gelu": Spec("MLP 3×200, GELU", 512, 100, 512, 0.1, True, True, (1, 5), 2, 0.22),
    "mlp_relu": Spec("MLP 3×200, ReLU", 512, 100, 512, 0.1, True, False, (1, 5), 2, 0.16),
    "resnet18_gelu": Spec(
        "ResNet-18 with GELU, BatchNorm in eval mode", 32, 60, 32, 0.02, False, True, (1, 5), 1, 0.3
    ),
    "resnet18": Spec(
        "ResNet-18, BatchNorm in training mode", 32, 60, 32, 0.02, True, False, (1,), 1, 0.12
    ),
    "gpt": Spec("GPT, scaled_dot_product_attention", 8, 60, 8, 3e-3, True, True, (1, 5), 2, 0.2),
    # For --quick and the test: seconds.
    "small": Spec("MLP 2×16 on made-up data, GELU", 64, 100, 64, 0.3, True, True, (1, 5), 2, 1.0),
}
FULL = tuple(name for name in SPECS if name != "small")
# The ResNets see so many pictures of half the size, over and over, so that two cores get somewhere.
_POOL = 512


class SmoothBlock(BasicBlock):
    """With GELU."""

    def forward(self, x: Tensor) -> Tensor:
        y = self.norm2(self.conv2(F.gelu(self.norm1(self.conv1(x)))))
        return F.gelu(y + self.shortcut(x))


class Rows(nn.Module):
    """(batch, length, vocabulary) as rows of logits, which every tool's criterion takes."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, tokens: Tensor) -> Tensor:
        return self.model(tokens).flatten(0, 1)


@dataclass
class Problem:
    """A model at some θ and one batch: the loss is criterion(model(inputs), targets)."""

    name: str
    spec: Spec
    model: nn.Module
    criterion: nn.Module
    inputs: Tensor
    targets: Tensor

    @property
    def parameters(self) -> list[nn.Parameter]:
        return list(self.model.parameters())

    def loss(self) -> Tensor:
        return self.criterion(self.model(self.inputs), self.targets)

    def double(self) -> Problem:
        """In float64, in place; the ResNets stay in float32, good for 1e-6: it takes half."""
        if self.name.startswith("resnet"):
            return self
        self.model.double()
        if self.inputs.is_floating_point():
            self.inputs = self.inputs.double()
        return self

    def reset(self) -> None:
        """The mode that the spec asks for, and no gradients."""
        self.model.train(self.spec.training)
        self.model.zero_grad(set_to_none=True)


def attention(name: str, math: bool) -> object:
    """A context in which attention is twice differentiable, where that is asked for."""
    return sdpa_kernel(SDPBackend.MATH) if math and name == "gpt" else nullcontext()


def prepare(name: str, folder: Path | None, path: Path) -> dict[str, object]:
    """Trains it for ``spec.steps`` and saves it; returns what the report says of it."""
    spec = SPECS[name]
    torch.manual_seed(0)
    batches, shape, source = _batches(name, spec, folder)
    model = _model(name, shape)
    adam = name == "gpt"
    make: Callable = torch.optim.AdamW if adam else torch.optim.SGD
    optimizer = make(model.parameters(), lr=spec.lr)
    criterion = nn.CrossEntropyLoss()
    for _, (inputs, targets) in zip(range(spec.steps), batches, strict=False):
        optimizer.zero_grad()
        criterion(model(inputs), targets).backward()
        optimizer.step()
    inputs, targets = next(batches)
    rows = spec.batch * len(targets) // len(inputs)
    inputs, targets = inputs[: spec.batch].clone(), targets[:rows].clone()
    model.train(spec.training)
    torch.save(
        {"shape": shape, "state": model.state_dict(), "inputs": inputs, "targets": targets}, path
    )
    with torch.no_grad():
        loss = float(criterion(model(inputs), targets))
    parameters = sum(p.numel() for p in model.parameters())
    return {"data": source, "parameters": parameters, "loss": loss, "input": list(inputs.shape)}


def load(name: str, path: Path) -> Problem:
    """What `prepare` saved."""
    saved = torch.load(path, weights_only=True)
    model = _model(name, saved["shape"])
    model.load_state_dict(saved["state"])
    parts = (model, nn.CrossEntropyLoss(), saved["inputs"], saved["targets"])
    problem = Problem(name, SPECS[name], *parts)
    problem.reset()
    return problem


def _model(name: str, shape: list[int]) -> nn.Module:
    if name == "small":
        layers = [nn.Flatten(), nn.Linear(192, 16), nn.GELU(), nn.Linear(16, 16), nn.GELU()]
        return nn.Sequential(*layers, nn.Linear(16, 10))
    if name == "gpt":
        return Rows(GPT(vocabulary=256, length=64, width=192, heads=6, depth=4))
    model = build("mlp" if name.startswith("mlp") else "resnet18", *shape)
    for path, module in list(model.named_modules()):
        if name.endswith("gelu") and isinstance(module, nn.ReLU):
            model.set_submodule(path, nn.GELU())
        if name.endswith("gelu") and isinstance(module, BasicBlock):
            module.__class__ = SmoothBlock
        if isinstance(module, nn.BatchNorm2d):
            module.momentum = 0.3  # so that few steps do
    return model


def _batches(
    name: str, spec: Spec, folder: Path | None
) -> tuple[Iterator[tuple[Tensor, Tensor]], list[int], str]:
    """Endless batches of training; the model's shape (channels, size, classes); where from."""
    if name == "gpt":
        return _text(spec.train_batch), [], f"source text of Python's {TEXT}"
    classes = 2 if name.startswith("mlp") else 10
    few = name.startswith("resnet")
    batch = _POOL if few else spec.train_batch
    size = 8 if name == "small" else 16 if few else 32
    if folder is None or name == "small":
        batches, source = _made_up(batch, size, classes), "made-up pictures"
    else:
        loader = BatchLoader(load_data(folder, tuple(range(classes))), batch, augment=not few)
        pictures = (loader.next() for _ in count())
        batches = ((F.avg_pool2d(x, 32 // size), y) for x, y in pictures)
        source = f"CIFAR-10, {classes} classes"
    if few:
        batches = _again(next(batches), spec.train_batch)
        source += f", {_POOL} pictures at half size"
    return batches, [3, size, classes], source


def _again(pool: tuple[Tensor, Tensor], batch: int) -> Iterator[tuple[Tensor, Tensor]]:
    """Random batches out of one."""
    generator = torch.Generator().manual_seed(0)
    while True:
        rows = torch.randperm(len(pool[0]), generator=generator)[:batch]
        yield pool[0][rows], pool[1][rows]


def _made_up(batch: int, size: int, classes: int) -> Iterator[tuple[Tensor, Tensor]]:
    """Noise around one smooth picture a class."""
    generator = torch.Generator().manual_seed(0)
    centres = F.interpolate(
        torch.randn(classes, 3, 4, 4, generator=generator), size=(size, size), mode="bilinear"
    )
    while True:
        labels = torch.randint(classes, (batch,), generator=generator)
        noise = torch.randn(batch, 3, size, size, generator=generator)
        yield 0.5 * centres[labels] + noise, labels


def _text(batch: int, length: int = 64) -> Iterator[tuple[Tensor, Tensor]]:
    """Bytes, and the byte that follows each."""
    path = Path(__import__(TEXT).__file__)
    text = torch.frombuffer(bytearray(path.read_bytes()[: 1 << 16]), dtype=torch.uint8).long()
    generator = torch.Generator().manual_seed(0)
    while True:
        starts = torch.randint(len(text) - length - 1, (batch, 1), generator=generator)
        rows = text[starts + torch.arange(length + 1)]
        yield rows[:, :-1].contiguous(), rows[:, 1:].flatten()
