"""What the examples learn: scikit-learn's handwritten digits, and a small net for them."""

import torch
from sklearn.datasets import load_digits
from torch import Tensor, nn


def images_and_labels() -> tuple[Tensor, Tensor]:
    """The 1797 images as float32 ``(n, 64)`` of mean 0 and deviation 1, and int64 ``(n,)`` labels,
    in random order."""
    images, labels = map(torch.tensor, load_digits(return_X_y=True))
    order = torch.randperm(len(images))
    return ((images - images.mean()) / images.std()).float()[order], labels[order]


def mlp(width: int = 200) -> nn.Module:
    """Three hidden layers. GELU, not ReLU: on a loss with kinks the curvature that a tracker
    measures belongs to the scale of its difference of gradients."""
    return nn.Sequential(
        nn.Linear(64, width),
        nn.GELU(),
        nn.Linear(width, width),
        nn.GELU(),
        nn.Linear(width, width),
        nn.GELU(),
        nn.Linear(width, 10),
    )
