"""What each of the paper's figures shows: one table, from figures to panels to configurations.

Where the paper prints no value, ours is named here with the reason.
"""

from __future__ import annotations

from dataclasses import dataclass

from ..config import TrainConfig
from ..data import DIGITS
from ..plots import LOSS_NAMES, MODEL_TITLES

#: §4: Δq of Algorithm 1, and the weight decay.
PERTURBATION = 5e-2
WEIGHT_DECAY = 5e-4
#: Of the cyclic schedule only the picture is known: rates between 10⁻³ and 1 on its axis.
CYCLE_PEAK, CYCLE_RATIO = 0.3, 100.0
#: Fig. 3 names neither model nor rate.
SPECTRUM_LR = 0.1
LEADING = 14


@dataclass(frozen=True)
class Panel:
    """A training run of the paper.

    Attributes:
        model, loss, schedule: as in :class:`~examples.paper.config.TrainConfig`.
        lr: the constant rate.
        faithful: Algorithm 1 as printed, Δq = 0.05; else our default estimate and Δq.
        trains: False where the paper says that this setup does not train.
    """

    model: str
    loss: str
    schedule: str = "constant"
    lr: float | None = None
    faithful: bool = True
    trains: bool = True

    @property
    def name(self) -> str:
        """Also the name of its folder."""
        schedule = self.schedule if self.lr is None else f"{self.schedule}{self.lr:g}"
        return "-".join((self.model, self.loss, schedule, *(() if self.faithful else ("ours",))))

    @property
    def title(self) -> str:
        """For a picture."""
        rate = {
            "constant": f"α = {self.lr}",
            "cyclic": "cyclic",
            "qn": "α = 1/h₀ as printed" if self.faithful else "α = 1/h₀ unbiased",
        }[self.schedule]
        return f"{MODEL_TITLES[self.model]} {self.loss}, {rate}"

    def config(
        self, scale: Scale, data: str, *, seed: int = 0, device: str = "auto"
    ) -> TrainConfig:
        """The run of this panel at some scale."""
        peak = CYCLE_PEAK if self.schedule == "cyclic" else TrainConfig.lr
        return TrainConfig(
            model=self.model,
            data=data,
            loss=self.loss,
            schedule=self.schedule,
            lr=peak if self.lr is None else self.lr,
            cycle_epochs=scale.cycle_epochs,
            cycle_ratio=CYCLE_RATIO,
            warmup=scale.warmup,
            epochs=scale.epochs,
            max_steps=scale.max_steps,
            batch_size=scale.batch_size,
            weight_decay=WEIGHT_DECAY,
            perturbation=PERTURBATION if self.faithful else None,
            estimate="paper" if self.faithful else None,
            seed=seed,
            device=device,
        )


@dataclass(frozen=True)
class Spectrum:
    """The first eigenvalues over the first epoch (Fig. 3): Algorithm 1 with App. C.

    Attributes:
        which: "LA", the largest, or "SA", the most negative: the exponents of SGD itself (App. A).
        k: how many.
    """

    model: str
    loss: str
    which: str = "LA"
    k: int = LEADING
    lr: float = SPECTRUM_LR

    @property
    def name(self) -> str:
        return f"{self.model}-{self.loss}-spectrum{self.which}{self.k}"

    @property
    def title(self) -> str:
        end = "largest" if self.which == "LA" else "most negative"
        return f"{MODEL_TITLES[self.model]}, {LOSS_NAMES[self.loss]}: {self.k} {end}"

    def config(
        self, scale: Scale, data: str, *, seed: int = 0, device: str = "auto"
    ) -> TrainConfig:
        """The training run whose first epoch is looked at."""
        run = Panel(self.model, self.loss, lr=self.lr)
        return run.config(scale, data, seed=seed, device=device)


@dataclass(frozen=True)
class Figure:
    """A figure of the paper.

    Attributes:
        number: 1 to 10.
        shows: what is drawn.
        claim: what the paper says about it, in short.
        panels: row by row.
        columns: of the picture.
    """

    number: int
    shows: str
    claim: str
    panels: tuple[Panel | Spectrum, ...]
    columns: int = 3


@dataclass(frozen=True)
class Scale:
    """How much of a run is done.

    Attributes:
        epochs, batch_size, max_steps, cycle_epochs, warmup: as in TrainConfig.
        exact_batches: minibatches after the last step, over whose mean loss h0 is computed by
            Lanczos on exact products; 0 for no such check.
        accuracy: whether to classify the test rows at the end.
    """

    epochs: int
    batch_size: int
    max_steps: int | None = None
    cycle_epochs: float = 4.0
    warmup: int = 100
    exact_batches: int = 4
    accuracy: bool = True


_SMALL = ("mlp", "lenet1", "resnet0")
_RATES = (0.05, 0.1, 0.3)


def _constant(lr: float, *untrainable: tuple[str, str]) -> tuple[Panel, ...]:
    shown = [(model, loss) for loss in LOSS_NAMES for model in _SMALL] + [("linear", "mse")]
    return tuple(
        Panel(model, loss, lr=lr, trains=(model, loss) not in untrainable) for model, loss in shown
    )


def _qn(*runs: tuple[str, str]) -> tuple[Panel, ...]:
    return tuple(
        Panel(model, loss, "qn", faithful=faithful)
        for faithful in (True, False)
        for model, loss in runs
    )


_LINEAR = ("linear", "mse")
_FOLLOWS = "1/h0 follows the constant learning rate, whatever the model and the loss"

FIGURES: dict[int, Figure] = {
    figure.number: figure
    for figure in (
        Figure(
            1,
            "MLP and tiny ResNet (cross-entropy), MLP (MSE): rates 0.1, 0.3, cyclic",
            "1/h0 closely follows α in all cases",
            tuple(
                panel
                for model, loss in (("mlp", "ce"), ("resnet0", "ce"), ("mlp", "mse"))
                for panel in (
                    Panel(model, loss, lr=0.1),
                    Panel(model, loss, lr=0.3),
                    Panel(model, loss, "cyclic"),
                )
            ),
        ),
        Figure(
            2,
            "quasi-Newton: MLP, LeNet-1 (two classes), ResNet-18 (ten), both losses",
            "with α = 1/h0 training is stable, the loss falls monotonically, and α decreases",
            _qn(*((m, loss) for loss in LOSS_NAMES for m in ("mlp", "lenet1", "resnet18"))),
        ),
        Figure(
            3,
            "the first 14 eigenvalues, averaged over the first epoch",
            "the values depend only weakly on their number (App. C); several directions of SGD "
            "are unstable, with timescales of tens of iterations (§2.1)",
            (Spectrum("mlp", "ce"), Spectrum("lenet1", "ce"), Spectrum("mlp", "ce", "SA")),
        ),
        Figure(
            4,
            "rate 0.05: MLP, LeNet-1, tiny ResNet, both losses",
            f"{_FOLLOWS}; the linear regression does not train",
            _constant(0.05, _LINEAR),
        ),
        Figure(
            5,
            "rate 0.1: MLP, LeNet-1, tiny ResNet, both losses",
            f"{_FOLLOWS}; the linear regression does not train",
            _constant(0.1, _LINEAR),
        ),
        Figure(
            6,
            "rate 0.3: MLP, LeNet-1, tiny ResNet, both losses",
            f"{_FOLLOWS}; the linear regression, and the ResNet with MSE, do not train",
            _constant(0.3, _LINEAR, ("resnet0", "mse")),
        ),
        Figure(
            7,
            "cyclic rate: MLP, LeNet-1, tiny ResNet, both losses",
            "1/h0 follows α, but where α is too small it cannot; the linear regression does not "
            "train",
            (
                *(Panel(model, loss, "cyclic") for loss in LOSS_NAMES for model in _SMALL),
                Panel(*_LINEAR, "cyclic", trains=False),
            ),
        ),
        Figure(
            8,
            "quasi-Newton, cross-entropy: MLP, LeNet-1, tiny ResNet; ResNet-18 on ten classes",
            "training is stable and the loss falls",
            _qn(*((model, "ce") for model in (*_SMALL, "resnet18"))),
            columns=4,
        ),
        Figure(
            9,
            "quasi-Newton, MSE: linear, MLP, LeNet-1, tiny ResNet",
            "training is stable, and the linear regression trains too",
            _qn(*((model, "mse") for model in ("linear", *_SMALL))),
            columns=4,
        ),
        # A title in the picture reads "ResNet18 mse", which the caption doesn't mention.
        Figure(
            10,
            "ResNet-18, ten classes: quasi-Newton, cyclic, constant 0.05; quasi-Newton with MSE",
            "the same behaviour for the larger network",
            (
                Panel("resnet18", "ce", "qn"),
                Panel("resnet18", "ce", "cyclic"),
                Panel("resnet18", "ce", lr=0.05),
                Panel("resnet18", "mse", "qn"),
            ),
            columns=2,
        ),
    )
}

#: The paper's scale. Epochs are read off the axes, which end beyond 10 (ResNet-18: beyond 100).
_FULL = Scale(epochs=50, batch_size=512)
_FULL_RESNET18 = Scale(epochs=150, batch_size=512)
#: Of the digits there are 1437: batches of 512 would be three steps an epoch.
_DIGITS_BATCH = 128
#: Minutes for a figure on two cores: fewer steps and, for convolutions, smaller batches. Where that
#: is less than an epoch (156 steps of 64 for two classes, 3125 of 16 for ten) the cycles are short
#: enough for the run to see two of them. ResNet-18 would be minutes at its 10 000 test rows.
_QUICK = {
    "linear": Scale(10, 512),
    "mlp": Scale(15, 512),
    "lenet1": Scale(4, 128, cycle_epochs=1.0),
    "resnet0": Scale(1, 64, 40, cycle_epochs=0.127, warmup=20, exact_batches=0),
    "resnet18": Scale(1, 16, 8, cycle_epochs=0.00128, warmup=4, exact_batches=0, accuracy=False),
}
_QUICK_DIGITS = {
    "linear": Scale(10, _DIGITS_BATCH),
    "mlp": Scale(25, _DIGITS_BATCH),
    "lenet1": Scale(25, _DIGITS_BATCH),
    "resnet0": Scale(15, _DIGITS_BATCH, exact_batches=1),
    "resnet18": Scale(1, 32, max_steps=12, cycle_epochs=0.13, warmup=10, exact_batches=1),
}


def scale_of(model: str, data: str, quick: bool) -> Scale:
    """How much of a run of this model to do."""
    if quick:
        return (_QUICK_DIGITS if data == DIGITS else _QUICK)[model]
    full = _FULL_RESNET18 if model == "resnet18" else _FULL
    if data != DIGITS:
        return full
    return Scale(full.epochs, _DIGITS_BATCH)
