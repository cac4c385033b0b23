"""The experiments' data: images kept as ``uint8`` on the device, standardised batch by batch."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from .cifar import CLASSES, read_folder

DIGITS = "digits"
CROP_PADDING = 4
# The split belongs to the data set, not to the run: another --seed must not move test rows.
_SPLIT_SEED = 0


@dataclass(frozen=True)
class Split:
    """Images ``uint8 (n, c, h, w)`` and labels ``int64 (n,)``, counted from 0."""

    images: Tensor
    labels: Tensor

    def __len__(self) -> int:
        return len(self.labels)

    def to(self, device: torch.device | str) -> Split:
        """The same rows on another device."""
        return Split(self.images.to(device), self.labels.to(device))


@dataclass(frozen=True)
class Dataset:
    """A data set with the training rows' statistics.

    Attributes:
        name: ``digits`` or ``cifar10``.
        train, test: the rows.
        classes: the original label that each label 0, 1, ... stands for.
        scale: the pixel value that counts as 1.
        mean, std: float32 ``(c, 1, 1)``, of the training pixels divided by ``scale``.
    """

    name: str
    train: Split
    test: Split
    classes: tuple[int, ...]
    scale: float
    mean: Tensor
    std: Tensor

    @property
    def in_channels(self) -> int:
        return self.train.images.shape[1]

    @property
    def image_size(self) -> int:
        return self.train.images.shape[2]

    def to(self, device: torch.device | str) -> Dataset:
        """The same data set on another device."""
        return Dataset(
            self.name,
            self.train.to(device),
            self.test.to(device),
            self.classes,
            self.scale,
            self.mean.to(device),
            self.std.to(device),
        )

    def standardise(self, images: Tensor) -> Tensor:
        """Turn ``uint8 (n, c, h, w)`` into float32 with the training rows' mean 0 and std 1."""
        return (images.float() / self.scale - self.mean) / self.std

    def fingerprint(self) -> str:
        """A digest of every row: equal for equal data, wherever the folder lies."""
        digest = hashlib.sha256()
        for split in (self.train, self.test):
            digest.update(repr(tuple(split.images.shape)).encode())
            digest.update(split.images.cpu().contiguous().numpy())
            digest.update(split.labels.cpu().numpy())
        return digest.hexdigest()[:16]


def load(source: str | Path, classes: Sequence[int] | None = None) -> Dataset:
    """Load a data set.

    Args:
        source: ``digits``, or a CIFAR-10 folder (see :func:`examples.paper.cifar.read_folder`;
            a folder that is itself called ``digits`` is meant by ``./digits``).
        classes: labels to keep, which become 0, 1, ... in this order; default all ten.

    Raises:
        FileNotFoundError: the folder or one of its files is missing.
        ImportError: ``digits`` without scikit-learn.
        ValueError: a malformed file, or classes that are not two or more different ones of 0..9.
    """
    chosen = tuple(range(CLASSES)) if classes is None else tuple(classes)
    if len(chosen) < 2 or len(set(chosen)) != len(chosen):
        raise ValueError(f"classes must be two or more different ones, got {_listed(chosen)}")
    if not all(0 <= c < CLASSES for c in chosen):
        raise ValueError(f"classes must lie in 0..{CLASSES - 1}, got {_listed(chosen)}")
    if source == DIGITS:
        name, scale, (train, test) = DIGITS, 16.0, _read_digits()
    else:
        name, scale, (train, test) = "cifar10", 255.0, read_folder(Path(source))
    splits = [_keep(*arrays, chosen) for arrays in (train, test)]
    for split, what in zip(splits, ("training", "test"), strict=True):
        counts = torch.bincount(split.labels, minlength=len(chosen))
        if what == "training" and not counts.all():
            missing = chosen[int(counts.argmin())]
            raise ValueError(f"{source}: no {what} images of class {missing}")
        if not len(split):
            raise ValueError(f"{source}: no {what} images of classes {_listed(chosen)}")
    mean, std = _statistics(splits[0].images, scale)
    return Dataset(name, splits[0], splits[1], chosen, scale, mean, std)


def _listed(classes: Sequence[int]) -> str:
    return ",".join(map(str, classes)) or "none"


def _read_digits() -> tuple[tuple[np.ndarray, np.ndarray], tuple[np.ndarray, np.ndarray]]:
    try:
        from sklearn.datasets import load_digits
    except ImportError as error:
        raise ImportError(
            "data=digits needs scikit-learn: pip install 'lyapcuda[examples]'"
        ) from error
    bunch = load_digits()
    images = bunch.images.astype(np.uint8)[:, None]
    labels = bunch.target.astype(np.int64)
    order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(_SPLIT_SEED))
    train, test = np.split(order.numpy(), [len(labels) * 4 // 5])
    return (images[train], labels[train]), (images[test], labels[test])


def _keep(images: np.ndarray, labels: np.ndarray, classes: tuple[int, ...]) -> Split:
    new_label = np.full(CLASSES, -1, np.int64)
    new_label[list(classes)] = np.arange(len(classes))
    relabelled = new_label[labels]
    rows = relabelled >= 0
    return Split(
        torch.from_numpy(np.ascontiguousarray(images[rows])), torch.from_numpy(relabelled[rows])
    )


def _statistics(images: Tensor, scale: float) -> tuple[Tensor, Tensor]:
    # From a histogram of the 256 pixel values: exact, and no float copy of the images.
    values = torch.arange(256, dtype=torch.float64) / scale
    mean, std = [], []
    for channel in range(images.shape[1]):
        counts = torch.bincount(images[:, channel].flatten().long(), minlength=256).double()
        average = (counts * values).sum() / counts.sum()
        variance = (counts * (values - average) ** 2).sum() / counts.sum()
        mean.append(average)
        # Constant pixels (a tiny made-up file) must not divide by zero.
        std.append(variance.sqrt() if variance > 0 else torch.ones_like(variance))
    return tuple(torch.stack(t).float().reshape(-1, 1, 1) for t in (mean, std))  # type: ignore


def augment_batch(
    images: Tensor, generator: torch.Generator, padding: int = CROP_PADDING
) -> Tensor:
    """Random crop out of a zero-padded image, then a horizontal flip of every other one.

    Args:
        images: ``(n, c, h, w)``, any dtype and device.
        generator: a CPU generator, so that the draws don't depend on the images' device.
        padding: pixels added on each side.

    Returns:
        A new tensor of the same shape, dtype and device.
    """
    n, channels, height, width = images.shape
    shift = torch.randint(0, 2 * padding + 1, (2, n, 1), generator=generator)
    flip = torch.randint(0, 2, (n, 1), generator=generator).bool()
    rows = shift[0] + torch.arange(height)
    cols = shift[1] + torch.arange(width)
    cols = torch.where(flip, cols.flip(1), cols)
    rows, cols = (index.to(images.device, non_blocking=True) for index in (rows, cols))
    padded = F.pad(images, (padding,) * 4)
    image = torch.arange(n, device=images.device)[:, None, None, None]
    channel = torch.arange(channels, device=images.device)[None, :, None, None]
    return padded[image, channel, rows[:, None, :, None], cols[:, None, None, :]]


class BatchLoader:
    """An endless stream of standardised minibatches whose order is a function of (seed, epoch).

    The last, partial batch of an epoch is left out if it holds less than half a batch.

    Args:
        dataset: the rows, on the device where the batches are wanted.
        batch_size: rows in a batch.
        seed: of the order and of the augmentation.
        augment: whether to crop and flip.

    Attributes:
        epoch: finished epochs.
        batch: batches taken from the running epoch.
        steps_per_epoch: batches in an epoch.

    Raises:
        ValueError: ``batch_size`` below 1.
    """

    def __init__(
        self, dataset: Dataset, batch_size: int, seed: int = 0, augment: bool = False
    ) -> None:
        if batch_size < 1:
            raise ValueError(f"batch_size must be at least 1, got {batch_size}")
        self.dataset = dataset
        self.batch_size = batch_size
        self.seed = seed
        self.augment = augment
        whole, rest = divmod(len(dataset.train), batch_size)
        self.steps_per_epoch = max(1, whole + (2 * rest >= batch_size))
        self._start(epoch=0)

    def _start(self, epoch: int) -> None:
        self.epoch, self.batch = epoch, 0
        self._generator = torch.Generator().manual_seed((self.seed * 1_000_003 + epoch) % 2**63)
        order = torch.randperm(len(self.dataset.train), generator=self._generator)
        self._order = order.to(self.dataset.train.labels.device)

    def next(self) -> tuple[Tensor, Tensor]:
        """The next batch: float32 ``(b, c, h, w)`` and int64 ``(b,)``."""
        rows = self._order[self.batch * self.batch_size :][: self.batch_size]
        images, labels = self.dataset.train.images[rows], self.dataset.train.labels[rows]
        if self.augment:
            images = augment_batch(images, self._generator)
        self.batch += 1
        if self.batch == self.steps_per_epoch:
            self._start(self.epoch + 1)
        return self.dataset.standardise(images), labels

    def state_dict(self) -> dict[str, Any]:
        """The place in the stream."""
        return {
            "epoch": self.epoch,
            "batch": self.batch,
            "generator": self._generator.get_state(),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go to a place that :meth:`state_dict` gave.

        Raises:
            ValueError: the place doesn't exist with this data set and batch size.
        """
        epoch, batch = state["epoch"], state["batch"]
        if epoch < 0 or not 0 <= batch < self.steps_per_epoch:
            raise ValueError(f"no batch {batch} in an epoch of {self.steps_per_epoch} batches")
        self._start(epoch)
        self.batch = batch
        self._generator.set_state(state["generator"])
