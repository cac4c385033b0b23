"""A training run with its curvature: step, log, checkpoint, resume."""

from __future__ import annotations

import math
import signal
import threading
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import Any

import torch
from torch import Tensor, nn

from lyapcuda.command.problem import LOSSES
from lyapcuda.command.program import usable_device
from lyapcuda.plots.figure import require_matplotlib

from . import checkpoint, plots
from .config import TrainConfig, require_same
from .data import BatchLoader, Dataset, Split, load
from .models import build
from .runlog import RunLog, read_rows
from .schedules import SCHEDULES, Schedule

CSV, PNG, CHECKPOINT = "run.csv", "run.png", "checkpoint.pt"


@dataclass(frozen=True)
class TrainResult:
    """How a run ended.

    Attributes:
        csv, png, checkpoint: its files; a run that diverged early may have left no checkpoint.
        step: steps taken in all, those before a resume included.
        loss: training loss of the last step.
        accuracy: share of test rows classified rightly; None if interrupted, diverged or not asked
            for.
        h, h_low, h_high: the last curvature and its interval.
        lr: the last learning rate.
        interrupted: whether Ctrl-C ended it.
        diverged: whether the loss stopped being finite, at ``step``.
    """

    csv: Path
    png: Path
    checkpoint: Path
    step: int
    loss: float
    accuracy: float | None
    h: float
    h_low: float
    h_high: float
    lr: float
    interrupted: bool = False
    diverged: bool = False


class _Interrupt:
    """Lets the step that Ctrl-C falls into finish; a second Ctrl-C breaks it off."""

    def __init__(self) -> None:
        self.asked = False
        self._before: Any = None

    def _handle(self, number: int, frame: FrameType | None) -> None:
        if self.asked:
            raise KeyboardInterrupt
        self.asked = True

    def __enter__(self) -> _Interrupt:
        if threading.current_thread() is threading.main_thread():  # else Python refuses
            self._before = signal.signal(signal.SIGINT, self._handle)
        return self

    def __exit__(self, *exception: object) -> None:
        if self._before is not None:
            signal.signal(signal.SIGINT, self._before)


def train(
    config: TrainConfig,
    out: str | Path,
    *,
    resume: str | Path | None = None,
    checkpoint_every: int = 1,
    progress: bool = False,
    overwrite: bool = False,
    accuracy: bool = True,
) -> TrainResult:
    """Train a model and write ``run.csv``, ``run.png`` and ``checkpoint.pt``.

    The same configuration, data, device and number of threads give the same bits, with or without
    a resume in between. torch's global generators are left as they were.

    Args:
        config: the run.
        out: the folder to write to, made if missing.
        resume: a checkpoint to go on from; its ``run.csv`` must lie beside it. ``config`` may
            differ from the checkpoint's only in epochs, max_steps and device.
        checkpoint_every: epochs between checkpoints; there is always one at the end.
        progress: show a progress bar.
        overwrite: replace another run in ``out``.
        accuracy: classify the test rows at the end.

    Raises:
        FileNotFoundError: the data, the checkpoint or its CSV is missing.
        FileExistsError: ``out`` holds another run, and ``overwrite`` wasn't given.
        ImportError: a package of the extra ``examples`` is missing.
        ValueError: malformed data or checkpoint, or one of another configuration.
        All of these are raised before any file is touched.
    """
    if checkpoint_every < 1:
        raise ValueError(f"checkpoint_every must be at least 1, got {checkpoint_every}")
    require_matplotlib()
    out = Path(out)
    resume = None if resume is None else Path(resume)
    _check_out(out, resume, overwrite)
    device = usable_device(config.device)
    saved = None if resume is None else checkpoint.load(resume)
    dataset = load(config.data, config.default_classes())
    config = config.resolved(dataset)
    fingerprint = dataset.fingerprint()
    if resume is not None and saved is not None:
        _check_same_run(resume, saved, config, fingerprint)

    with torch.random.fork_rng(devices=range(torch.cuda.device_count())):
        torch.manual_seed(config.seed)
        run = _Run(config, dataset.to(device), fingerprint, device)
        rows = None
        if resume is not None and saved is not None:
            run.restore(resume, saved)
            rows = read_rows(resume.with_name(CSV), run.step)
        bar = _progress_bar(run.step, run.total_steps) if progress else None
        out.mkdir(parents=True, exist_ok=True)
        log = RunLog(out / CSV, rows)
        try:
            return run.train(out, log, checkpoint_every, bar, accuracy)
        finally:
            log.close()
            if bar is not None:
                bar.close()


class _Run:
    """A run in progress: everything that a checkpoint holds."""

    def __init__(
        self, config: TrainConfig, dataset: Dataset, fingerprint: str, device: torch.device
    ) -> None:
        assert config.batch_size is not None and config.augment is not None  # resolved
        self.config = config
        self.dataset = dataset
        self.fingerprint = fingerprint
        self.loader = BatchLoader(dataset, config.batch_size, config.seed, config.augment)
        model = build(config.model, dataset.in_channels, dataset.image_size, len(dataset.classes))
        self.model = model.to(device)
        per_epoch = self.loader.steps_per_epoch
        self.schedule: Schedule = SCHEDULES[config.schedule](self.model, config, per_epoch)
        self.step = 0
        self.total_steps = config.epochs * per_epoch
        if config.max_steps is not None:
            self.total_steps = min(self.total_steps, config.max_steps)

    def state_dict(self) -> dict[str, Any]:
        return {
            "config": self.config.to_dict(),
            "fingerprint": self.fingerprint,
            "step": self.step,
            "model": self.model.state_dict(),
            "schedule": self.schedule.state_dict(),
            "loader": self.loader.state_dict(),
            "rng": checkpoint.rng_state(),
        }

    def restore(self, path: Path, saved: dict[str, Any]) -> None:
        try:
            self.model.load_state_dict(saved["model"])
            self.schedule.load_state_dict(saved["schedule"])
            self.loader.load_state_dict(saved["loader"])
            checkpoint.set_rng_state(saved["rng"])
        except (RuntimeError, ValueError, TypeError, LookupError, AttributeError) as error:
            reason = str(error).split("\n")[0]
            raise ValueError(f"{path}: damaged checkpoint: {reason}") from error
        self.step = saved["step"]

    def train(
        self, out: Path, log: RunLog, checkpoint_every: int, bar: Any, classify: bool
    ) -> TrainResult:
        per_epoch = self.loader.steps_per_epoch
        diverged: int | None = None

        def read_back() -> None:
            nonlocal diverged
            diverged = log.flush()
            if bar is not None and log.last:
                bar.set_postfix(
                    loss=f"{log.last['loss']:.3g}",
                    h0=f"{log.last['h']:.3g}",
                    lr=f"{log.last['lr']:.3g}",
                )

        def save() -> None:
            read_back()
            if diverged is None:  # keep the last checkpoint that can be gone on from
                log.sync()
                checkpoint.save(out / CHECKPOINT, self.state_dict())

        with _Interrupt() as interrupt:
            while self.step < self.total_steps and not interrupt.asked and diverged is None:
                self.step += 1
                log.append(self.step, self.step / per_epoch, self._one_step())
                if bar is not None:
                    bar.update()
                if log.due:
                    read_back()
                if diverged is None and self.step % (checkpoint_every * per_epoch) == 0:
                    save()
            if diverged is None:
                save()
            title = (self.config.model, self.config.loss, self.config.schedule)
            png = plots.plot_run(log.path, out / PNG, plots.title_of(*title))
        interrupted, accuracy = interrupt.asked, None
        if classify and diverged is None and not interrupted:
            try:
                accuracy = evaluate(self.model, self.dataset, self.dataset.test)
            except KeyboardInterrupt:  # everything is saved; a resume evaluates again
                interrupted = True
        last = log.last
        return TrainResult(
            csv=log.path,
            png=png,
            checkpoint=out / CHECKPOINT,
            step=diverged or self.step,
            accuracy=accuracy,
            interrupted=interrupted,
            diverged=diverged is not None,
            **{name: last.get(name, math.nan) for name in ("loss", "h", "h_low", "h_high", "lr")},
        )

    def _one_step(self) -> list[Tensor]:
        images, labels = self.loader.next()
        loss_of = LOSSES[self.config.loss]
        loss = self.schedule.step(lambda: loss_of(self.model(images), labels))
        tracker = self.schedule.tracker
        # With several curvatures the columns are those of the largest.
        low, high = tracker.interval.reshape(-1, 2)[0].unbind()
        h, exponent = tracker.h.reshape(-1)[0], tracker.exponent.reshape(-1)[0]
        return [loss, exponent, tracker.beta, h, low, high, 1.0 / h, self.schedule.lr]


def after(
    path: Path, count: int, device: str
) -> tuple[nn.Module, Callable[[Any], Tensor], list[Any]]:
    """A finished run's model, the loss of one minibatch, and the next minibatches of its stream.

    Args:
        path: its checkpoint.
        count: how many minibatches.
        device: a torch device, or ``auto``.

    Raises:
        ValueError, OSError: not a checkpoint, or its data are gone.
    """
    saved = checkpoint.load(path)
    config = saved_config(path, saved)
    place = usable_device(device)
    dataset = load(config.data, config.default_classes())
    config = config.resolved(dataset)
    fingerprint = dataset.fingerprint()
    _check_same_run(path, saved, config, fingerprint)
    with torch.random.fork_rng(devices=range(torch.cuda.device_count())):
        run = _Run(config, dataset.to(place), fingerprint, place)
        run.restore(path, saved)
        batches = [run.loader.next() for _ in range(count)]
    loss_of = LOSSES[config.loss]
    return run.model, lambda batch: loss_of(run.model(batch[0]), batch[1]), batches


@torch.no_grad()
def evaluate(model: nn.Module, dataset: Dataset, split: Split, batch_size: int = 1024) -> float:
    """The share of a split's rows that a model classifies rightly, in eval mode."""
    was_training = model.training
    model.eval()
    right = 0
    for images, labels in zip(
        split.images.split(batch_size), split.labels.split(batch_size), strict=True
    ):
        right += int((model(dataset.standardise(images)).argmax(1) == labels).sum())
    model.train(was_training)
    return right / len(split)


def _check_out(out: Path, resume: Path | None, overwrite: bool) -> None:
    if out.exists() and not out.is_dir():
        raise ValueError(f"out must be a folder, got the file {out}")
    same = resume is not None and out.resolve() == resume.parent.resolve()
    if (out / CHECKPOINT).exists() and not overwrite and not same:
        raise FileExistsError(
            f"out={out} holds another run: resume {out / CHECKPOINT}, overwrite it, "
            "or choose another folder"
        )


def saved_config(path: Path, saved: dict[str, Any]) -> TrainConfig:
    """The configuration in a loaded checkpoint.

    Raises:
        ValueError: it is malformed, naming the file.
    """
    try:
        return TrainConfig.from_dict(saved["config"])
    except ValueError as error:
        raise ValueError(f"{path}: damaged checkpoint: {error}") from error


def _check_same_run(
    path: Path, saved: dict[str, Any], config: TrainConfig, fingerprint: str
) -> None:
    before = saved_config(path, saved)
    require_same(path, before, config.to_dict())
    if saved["fingerprint"] != fingerprint:
        raise ValueError(
            f"{path}: data was {before.data} in this run, got {config.data}, which holds other rows"
        )


def _progress_bar(done: int, total: int) -> Any:
    try:
        from tqdm import tqdm
    except ImportError as error:
        raise ImportError(
            "the progress bar needs tqdm: pip install 'lyapcuda[examples]', or --no-progress"
        ) from error
    return tqdm(total=total, initial=done, unit="step", dynamic_ncols=True)
