"""What `optimizers.py` trains: seven problems, and two that no setting was chosen on."""

from __future__ import annotations

import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

sys.path.insert(0, str(Path(__file__).parents[1]))

from examples.paper.config import LOSSES  # noqa: E402
from examples.paper.data import Dataset  # noqa: E402
from examples.paper.models import build  # noqa: E402

Loss = Callable[[nn.Module, Tensor, Tensor], Tensor]


@dataclass(frozen=True)
class Problem:
    """A model, its loss on a minibatch, and how long it is trained.

    Attributes:
        cifar: on CIFAR-10's planes and cars, or else on scikit-learn's digits.
        held_out: no setting of ours was chosen on it.
    """

    name: str
    model: Callable[[Dataset], nn.Module]
    loss: Loss
    cifar: bool = False
    steps: int = 200
    batch: int = 128
    held_out: bool = False


class Transformer(nn.Module):
    """Two layers of attention over an image's rows."""

    def __init__(self, size: int, classes: int, width: int = 32) -> None:
        super().__init__()
        self.embed = nn.Linear(size, width)
        self.place = nn.Parameter(0.1 * torch.randn(size, width))
        layer = nn.TransformerEncoderLayer(
            width, 4, 2 * width, 0.0, "gelu", batch_first=True, norm_first=True
        )
        self.layers = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)
        self.out = nn.Linear(width, classes)

    def forward(self, x: Tensor) -> Tensor:
        return self.out(self.layers(self.embed(x.flatten(1, 2)) + self.place).mean(1))


def autoencoder(pixels: int) -> nn.Module:
    return nn.Sequential(
        nn.Flatten(),
        nn.Linear(pixels, 64),
        nn.GELU(),
        nn.Linear(64, 8),
        nn.Linear(8, 64),
        nn.GELU(),
        nn.Linear(64, pixels),
    )


def of_labels(kind: str) -> Loss:
    return lambda model, x, y: LOSSES[kind](model(x), y)


def reconstruction(model: nn.Module, x: Tensor, y: Tensor) -> Tensor:
    return (model(x) - x.flatten(1)).square().mean()


def papers(name: str) -> Callable[[Dataset], nn.Module]:
    return lambda data: build(name, data.in_channels, data.image_size, len(data.classes))


_SHORT = {"cifar": True, "steps": 120, "batch": 256}
PROBLEMS = (
    Problem("linear, MSE", papers("linear"), of_labels("mse")),
    Problem("MLP", papers("mlp"), of_labels("ce")),
    Problem("LeNet-1", papers("lenet1"), of_labels("ce")),
    Problem("ResNet0", papers("resnet0"), of_labels("ce")),
    Problem("MLP, planes", papers("mlp"), of_labels("ce"), **_SHORT),
    Problem("MLP, MSE, planes", papers("mlp"), of_labels("mse"), **_SHORT),
    Problem("LeNet-1, planes", papers("lenet1"), of_labels("ce"), True, 100, 256),
    Problem(
        "transformer",
        lambda data: Transformer(data.image_size, len(data.classes)),
        of_labels("ce"),
        held_out=True,
    ),
    Problem(
        "autoencoder",
        lambda data: autoencoder(data.in_channels * data.image_size**2),
        reconstruction,
        held_out=True,
    ),
)
