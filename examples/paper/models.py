"""The paper's models, for square images of any size from 8x8 on."""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor, nn
from torch.nn import functional as F


def linear(in_channels: int, image_size: int, classes: int) -> nn.Module:
    """Linear (or, with cross-entropy, logistic) regression on the pixels."""
    return nn.Sequential(nn.Flatten(), nn.Linear(in_channels * image_size**2, classes))


def mlp(in_channels: int, image_size: int, classes: int) -> nn.Module:
    """Three hidden layers of 200 ReLU units."""
    return nn.Sequential(
        nn.Flatten(),
        nn.Linear(in_channels * image_size**2, 200),
        nn.ReLU(),
        nn.Linear(200, 200),
        nn.ReLU(),
        nn.Linear(200, 200),
        nn.ReLU(),
        nn.Linear(200, classes),
    )


def lenet1(in_channels: int, image_size: int, classes: int) -> nn.Module:
    """LeNet-1 with ReLU; small images are padded, for two valid 5x5 convolutions would eat them."""
    padding = 0 if image_size >= 20 else 2
    size = image_size
    for _ in range(2):
        size = (size - 4 + 2 * padding) // 2
    return nn.Sequential(
        nn.Conv2d(in_channels, 4, 5, padding=padding),
        nn.ReLU(),
        nn.AvgPool2d(2),
        nn.Conv2d(4, 12, 5, padding=padding),
        nn.ReLU(),
        nn.AvgPool2d(2),
        nn.Flatten(),
        nn.Linear(12 * size**2, classes),
    )


class BasicBlock(nn.Module):
    """Two 3x3 convolutions with BatchNorm, added to their input (projected where shapes differ)."""

    def __init__(self, inputs: int, outputs: int, stride: int = 1) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(inputs, outputs, 3, stride, padding=1, bias=False)
        self.norm1 = nn.BatchNorm2d(outputs)
        self.conv2 = nn.Conv2d(outputs, outputs, 3, padding=1, bias=False)
        self.norm2 = nn.BatchNorm2d(outputs)
        self.shortcut: nn.Module = nn.Identity()
        if stride != 1 or inputs != outputs:
            self.shortcut = nn.Sequential(
                nn.Conv2d(inputs, outputs, 1, stride, bias=False), nn.BatchNorm2d(outputs)
            )

    def forward(self, x: Tensor) -> Tensor:
        """Map ``(n, inputs, h, w)`` to ``(n, outputs, h / stride, w / stride)``."""
        y = self.norm2(self.conv2(F.relu(self.norm1(self.conv1(x)))))
        return F.relu(y + self.shortcut(x))


def _resnet(in_channels: int, classes: int, widths: list[int], strides: list[int]) -> nn.Module:
    layers: list[nn.Module] = [
        nn.Conv2d(in_channels, widths[0], 3, padding=1, bias=False),
        nn.BatchNorm2d(widths[0]),
        nn.ReLU(),
    ]
    before = [widths[0], *widths]
    layers += [BasicBlock(*shape) for shape in zip(before, widths, strides, strict=False)]
    layers += [nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(widths[-1], classes)]
    return nn.Sequential(*layers)


def resnet0(in_channels: int, image_size: int, classes: int) -> nn.Module:
    """The paper's tiny ResNet: a stem and two residual blocks of 16 and 32 channels."""
    return _resnet(in_channels, classes, [16, 32], [1, 2])


def resnet18(in_channels: int, image_size: int, classes: int) -> nn.Module:
    """ResNet-18 for small images: a 3x3 stem and no pooling before the blocks."""
    widths = [64, 64, 128, 128, 256, 256, 512, 512]
    return _resnet(in_channels, classes, widths, [1, 1, 2, 1, 2, 1, 2, 1])


MODELS: dict[str, Callable[[int, int, int], nn.Module]] = {
    "linear": linear,
    "mlp": mlp,
    "lenet1": lenet1,
    "resnet0": resnet0,
    "resnet18": resnet18,
}


def build(name: str, in_channels: int, image_size: int, classes: int) -> nn.Module:
    """Build a model with torch's default initialisation, from torch's global generator.

    Args:
        name: one of :data:`MODELS`.
        in_channels: channels of the images.
        image_size: their height and width, 8 or more.
        classes: number of outputs.

    Returns:
        A module from float32 ``(n, in_channels, image_size, image_size)`` to ``(n, classes)``.

    Raises:
        ValueError: an unknown name, or a size the models can't take.
    """
    if name not in MODELS:
        raise ValueError(f"model must be one of {', '.join(MODELS)}, got {name!r}")
    for what, value, least in (
        ("in_channels", in_channels, 1),
        ("image_size", image_size, 8),
        ("classes", classes, 2),
    ):
        if value < least:
            raise ValueError(f"{what} must be at least {least}, got {value}")
    return MODELS[name](in_channels, image_size, classes)
