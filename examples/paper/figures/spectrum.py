"""Several eigenvalues over a first epoch (Fig. 3), and exact ones beside them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

import lyapcuda
from lyapcuda.command.problem import LOSSES
from lyapcuda.command.program import usable_device

from ..config import TrainConfig
from ..data import BatchLoader, Dataset
from ..models import build
from .table import Spectrum

# Measurements at the initial weights, at most.
_WARMUP = 10
# Of the exact values, relative.
_TOL = 1e-2


def first_epoch(
    panel: Spectrum, config: TrainConfig, dataset: Dataset, *, check: bool
) -> dict[str, Any]:
    """Algorithm 1 with the orthogonalisation of App. C, at every step of the first epoch.

    As for the paper's quasi-Newton runs it begins at the initial weights, without training.

    Args:
        panel: how many eigenvalues, of which end.
        config: the run, resolved.
        dataset: its data.
        check: also compute the values after the last step exactly, on the next minibatch.

    Returns:
        ``printed`` and ``unbiased``, steps × k; ``exact``, k values or None.
    """
    assert config.batch_size is not None and config.augment is not None  # resolved
    device = usable_device(config.device)
    dataset = dataset.to(device)
    with torch.random.fork_rng(devices=range(torch.cuda.device_count())):
        torch.manual_seed(config.seed)
        shape = (dataset.in_channels, dataset.image_size, len(dataset.classes))
        model = build(config.model, *shape).to(device)
    loader = BatchLoader(dataset, config.batch_size, config.seed, config.augment)
    decay = config.weight_decay
    tracker = lyapcuda.CurvatureTracker(
        model.parameters(),
        panel.k,
        which=panel.which,
        estimate="paper",
        perturbation=config.perturbation,
        weight_decay=decay,
        seed=config.seed,
        model=model,
    )
    optimizer = torch.optim.SGD(model.parameters(), lr=config.lr, weight_decay=decay)
    loss_of = LOSSES[config.loss]

    def closure(batch: Any) -> Tensor:
        return loss_of(model(batch[0]), batch[1])

    steps = loader.steps_per_epoch
    if config.max_steps is not None:
        steps = min(steps, config.max_steps)
    printed, unbiased = [], []
    for step in range(-min(steps, _WARMUP), steps):
        batch = loader.next()
        tracker.step(lambda: closure(batch), leave_grad=True)  # noqa: B023
        if step >= 0:
            optimizer.step()
            printed.append(tracker.h.clone())
            unbiased.append(tracker.rayleigh.clone())
    values = None
    if check:
        values = exact(model, closure, [loader.next()], decay, k=panel.k, which=panel.which)
    return {
        "printed": torch.stack(printed).tolist(),
        "unbiased": torch.stack(unbiased).tolist(),
        "exact": values,
    }


def exact(
    model: nn.Module,
    closure: Callable[[Any], Tensor],
    batches: list[Any],
    weight_decay: float,
    *,
    k: int,
    which: str,
) -> list[float] | None:
    """Eigenvalues by Lanczos on exact products, from the outer end; None if not converged.

    Args:
        model: as trained, in the mode it is trained in.
        closure: the loss of a minibatch, without the weight decay.
        batches: minibatches over whose mean loss the Hessian is taken.
        weight_decay: counts as part of the loss.
        k, which: as for :func:`lyapcuda.eigsh`.
    """
    result = lyapcuda.eigsh(
        closure,
        model.parameters(),
        k,
        which,
        tol=_TOL,
        mode="exact",
        data=batches,
        weight_decay=weight_decay,
        model=model,
    )
    return result.eigenvalues.tolist() if bool(result.converged.all()) else None
