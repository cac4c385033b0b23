"""Runs the panels of figures, each once, and goes on where it was interrupted."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch

import lyapcuda
from lyapcuda.command.program import usable_device
from lyapcuda.files import finite, write_json
from lyapcuda.plots.figure import require_matplotlib

from .. import plots
from ..config import TrainConfig
from ..data import DIGITS, Dataset, load
from ..train import CHECKPOINT, CSV, after, train
from . import draw, summary
from .spectrum import exact, first_epoch
from .table import FIGURES, Figure, Panel, Scale, Spectrum, scale_of

PANELS = "panels"
DONE = "panel.json"
# Not part of what a run is: the same rows may lie elsewhere, and have a fingerprint.
_ELSEWHERE = ("data", "device")


@dataclasses.dataclass(frozen=True)
class Job:
    """What to run.

    Attributes:
        out: the folder of pictures, summaries and, under ``panels``, the runs.
        data: ``digits`` or a CIFAR-10 folder.
        quick: minutes a figure instead of the paper's scale.
        epochs, max_steps, batch_size: instead of the scale's, for every panel.
        seed, device: as in TrainConfig.
        overwrite: run panels anew that the folder already holds.
        draw_only: run nothing: pictures and summaries of the panels that are there, of unfinished
            ones as far as they got.
        progress: show progress bars.
    """

    out: Path
    data: str = DIGITS
    quick: bool = False
    epochs: int | None = None
    max_steps: int | None = None
    batch_size: int | None = None
    seed: int = 0
    device: str = "auto"
    overwrite: bool = False
    draw_only: bool = False
    progress: bool = False

    def scale(self, model: str) -> Scale:
        """The scale of a model's runs."""
        given = {
            name: value
            for name in ("epochs", "max_steps", "batch_size")
            if (value := getattr(self, name)) is not None
        }
        return dataclasses.replace(scale_of(model, self.data, self.quick), **given)

    def config(self, panel: Panel | Spectrum) -> TrainConfig:
        """The run of a panel.

        Raises:
            ValueError: a value out of range, naming it.
        """
        scale = self.scale(panel.model)
        return panel.config(scale, self.data, seed=self.seed, device=self.device)


def run_figures(
    numbers: Sequence[int], job: Job, say: Callable[[str], None] = lambda line: None
) -> list[dict[str, Any]]:
    """Run what is missing of some figures; write ``figN.png`` and ``figN.json`` of each.

    Args:
        numbers: of figures, 1 to 10.
        job: how.
        say: called with a line for each panel and figure.

    Returns:
        The contents of the JSON files.

    Raises:
        KeyboardInterrupt: after Ctrl-C; the running panel is saved, and the same call goes on.
        FileNotFoundError, ImportError: as :func:`examples.paper.train.train`.
        ValueError: an unknown figure, a value out of range, malformed data, ``out`` is a file or
            holds a panel of another configuration. Raised before anything is run.
    """
    for number in numbers:
        if number not in FIGURES:
            raise ValueError(f"FIG must be 1 to {max(FIGURES)}, got {number}")
    require_matplotlib()
    usable_device(job.device)
    if job.out.exists() and not job.out.is_dir():
        raise ValueError(f"out must be a folder, got the file {job.out}")
    figures = [FIGURES[number] for number in numbers]
    runs = _Runs(job)
    for figure in figures:
        for panel in figure.panels:
            runs.found(panel)
    return [_figure(figure, job, runs, say) for figure in figures]


def _figure(figure: Figure, job: Job, runs: _Runs, say: Callable[[str], None]) -> dict[str, Any]:
    panels, pictures = [], []
    for place, panel in enumerate(figure.panels, 1):
        say(f"figure {figure.number}, {place}/{len(figure.panels)}: {panel.title}")
        done = runs.so_far(panel) if job.draw_only else runs.done(panel)
        if done is None:
            say("    not run")
            pictures.append(draw.Missing(panel))
            panels.append({"name": panel.name, "title": panel.title, "run": False, "checks": []})
            continue
        if isinstance(panel, Spectrum):
            numbers = summary.of_spectrum(panel, done)
            pictures.append(draw.SpectrumPicture(panel, numbers))
        else:
            columns = plots.read_columns(runs.folder(panel) / CSV)
            numbers = summary.of_run(panel, columns, done)
            finished = done.get("finished", True)
            numbers["finished"] = finished
            if not finished:  # a claim is about the whole run
                numbers["checks"] = []
            pictures.append(draw.RunPicture(panel, columns, numbers))
        config = {name: value for name, value in done["config"].items() if name not in _ELSEWHERE}
        panels.append(
            {"name": panel.name, "title": panel.title, "run": True, **numbers, "config": config}
        )
        for check in numbers["checks"]:
            say(f"    {'yes' if check['holds'] else 'NO '}  {check['claim']}")
    report = {
        "figure": figure.number,
        "shows": figure.shows,
        "claim": figure.claim,
        "data": runs.dataset(figure.panels[0]).name,
        "quick": job.quick,
        "panels": panels,
        "lyapcuda": lyapcuda.__version__,
        "torch": torch.__version__,
    }
    if not any(panel["run"] for panel in panels):
        raise ValueError(f"out={job.out}: no panel of figure {figure.number} was run")
    stem = job.out / f"fig{figure.number}"
    draw.draw_figure(figure, pictures, stem.with_suffix(".png"))
    write_json(stem.with_suffix(".json"), report)
    say(f"figure {figure.number}: {stem.with_suffix('.png')}")
    return finite(report)


class _Runs:
    """The panels of a folder."""

    def __init__(self, job: Job) -> None:
        self.job = job
        self._datasets: dict[tuple[int, ...] | None, tuple[Dataset, str]] = {}
        self._fresh: set[str] = set()  # run in this call: not to be overwritten again

    def folder(self, panel: Panel | Spectrum) -> Path:
        return self.job.out / PANELS / panel.name

    def dataset(self, panel: Panel | Spectrum) -> Dataset:
        return self._loaded(self.job.config(panel))[0]

    def _loaded(self, config: TrainConfig) -> tuple[Dataset, str]:
        classes = config.default_classes()
        if classes not in self._datasets:
            dataset = load(config.data, classes)
            self._datasets[classes] = dataset, dataset.fingerprint()
        return self._datasets[classes]

    def found(self, panel: Panel | Spectrum) -> dict[str, Any] | None:
        """What a finished run of the panel left, or None.

        Raises:
            ValueError: it is of another configuration or other data, or damaged.
        """
        config = self.job.config(panel)
        dataset, fingerprint = self._loaded(config)
        path = self.folder(panel) / DONE
        if not path.exists() or (self.job.overwrite and panel.name not in self._fresh):
            return None
        wanted = _plain(config.resolved(dataset))
        try:
            done = json.loads(path.read_text(encoding="utf-8"))
            # Fields that a later version added had their default's meaning.
            before = TrainConfig().to_dict() | done["config"]
            differing = [n for n in wanted if before[n] != wanted[n] and n not in _ELSEWHERE]
            same_rows = done["fingerprint"] == fingerprint
        except (ValueError, LookupError, TypeError) as error:
            raise ValueError(f"{path}: damaged, --overwrite runs it again: {error}") from error
        if differing:
            name = differing[0]
            raise ValueError(
                f"{path}: {name} was {before[name]} in this run, got {wanted[name]}; choose "
                "another --out, or --overwrite"
            )
        if not same_rows:
            raise ValueError(
                f"{path}: this run was of other rows than {config.data}; choose another --out, or "
                "--overwrite"
            )
        return done

    def so_far(self, panel: Panel | Spectrum) -> dict[str, Any] | None:
        """What a finished run left, or as much as there is of an unfinished one, or None."""
        done = self.found(panel)
        if done is not None or not (self.folder(panel) / CSV).exists():
            return done
        columns = plots.read_columns(self.folder(panel) / CSV)
        if not len(columns["loss"]):
            return None
        config = self.job.config(panel)
        nothing = {"diverged": False, "accuracy": None, "exact": None, "finished": False}
        return {"config": _plain(config.resolved(self._loaded(config)[0])), **nothing}

    def done(self, panel: Panel | Spectrum) -> dict[str, Any]:
        """What a run of the panel left; runs it if need be."""
        before = self.found(panel)
        if before is not None:
            return before
        config = self.job.config(panel)
        dataset, fingerprint = self._loaded(config)
        work = self._spectrum if isinstance(panel, Spectrum) else self._train
        values = work(panel, config)
        done = {"config": _plain(config.resolved(dataset)), "fingerprint": fingerprint, **values}
        self.folder(panel).mkdir(parents=True, exist_ok=True)
        write_json(self.folder(panel) / DONE, done)
        self._fresh.add(panel.name)
        return finite(done)

    def _train(self, panel: Panel, config: TrainConfig) -> dict[str, Any]:
        folder = self.folder(panel)
        saved = folder / CHECKPOINT
        scale = self.job.scale(panel.model)
        result = train(
            config,
            folder,
            resume=saved if saved.exists() and not self.job.overwrite else None,
            progress=self.job.progress,
            overwrite=self.job.overwrite,
            accuracy=scale.accuracy,
        )
        if result.interrupted:
            raise KeyboardInterrupt
        values = None
        if scale.exact_batches and not result.diverged:
            values = exact(
                *after(saved, scale.exact_batches, config.device),
                config.weight_decay,
                k=1,
                which="LA",
            )
        return {
            "diverged": result.diverged,
            "accuracy": result.accuracy,
            "exact": None if values is None else values[0],
        }

    def _spectrum(self, panel: Spectrum, config: TrainConfig) -> dict[str, Any]:
        # An epoch of a few steps: nothing of it is saved before its end.
        dataset, _ = self._loaded(config)
        # The lower end lies dense near 0: Lanczos would need hundreds of products for 14 of it.
        check = self.job.scale(panel.model).exact_batches > 0 and panel.which == "LA"
        return first_epoch(panel, config.resolved(dataset), dataset, check=check)


def _plain(config: TrainConfig) -> dict[str, Any]:
    return json.loads(json.dumps(config.to_dict()))  # tuples as JSON gives them back
