"""What the drawn training runs train: small nets, each of which has something that an evaluation
touches besides its parameters and its gradients.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils import parametrizations
from torch.utils.checkpoint import checkpoint

__all__ = ["SCENES", "Part", "Scene"]

Loss = Callable[[Any], Tensor]
Batch = tuple[Tensor, Tensor]


@dataclass
class Part:
    """Parameters that one optimizer trains, and their loss of a batch."""

    parameters: list[Tensor]
    loss: Loss


@dataclass
class Scene:
    """What is trained.

    Attributes:
        modules: all of them.
        parts: trained in turn.
        batch: draws a minibatch.
        tracked: what a tracker is given.
        loose: tensors in no module.
        midway: called after the second step.
    """

    modules: list[nn.Module]
    parts: list[Part]
    batch: Callable[[], Any]
    tracked: list[Tensor]
    loose: list[Tensor] = field(default_factory=list)
    midway: Callable[[], None] = lambda: None


def _labelled(features: int = 5, classes: int = 3, count: int = 8) -> Batch:
    return torch.randn(count, features), torch.randint(0, classes, (count,))


def _mlp(act: nn.Module, *more: nn.Module) -> nn.Sequential:
    return nn.Sequential(nn.Linear(5, 7), *more, act, nn.Linear(7, 3))


def _classifier(model: nn.Module, batch: Callable[[], Any] = _labelled) -> Scene:
    """One net, all of whose parameters are trained and tracked."""

    def loss(batch: Batch) -> Tensor:
        x, y = batch
        return F.cross_entropy(model(x).flatten(0, -2), y.flatten())

    parameters = list(model.parameters())
    return Scene([model], [Part(parameters, loss)], batch, parameters)


# --- nets with something of their own ------------------------------------------------------------


class Recurrent(nn.Module):
    """Keeps its hidden state from one batch to the next."""

    def __init__(self) -> None:
        super().__init__()
        self.lstm, self.head = nn.LSTM(3, 4, batch_first=True), nn.Linear(4, 3)
        self.hidden: tuple[Tensor, ...] | None = None

    def forward(self, x: Tensor) -> Tensor:
        out, hidden = self.lstm(x, self.hidden)
        self.hidden = tuple(h.detach() for h in hidden)
        return self.head(out)


class Tied(nn.Module):
    """A language model whose embedding is its last layer too."""

    def __init__(self, max_norm: float | None = None) -> None:
        super().__init__()
        self.embedding, self.mix = nn.Embedding(6, 4, max_norm=max_norm), nn.Linear(4, 4)
        self.head = nn.Linear(4, 6, bias=False)
        self.head.weight = self.embedding.weight

    def forward(self, x: Tensor) -> Tensor:
        return self.head(torch.tanh(self.mix(self.embedding(x))))


class Clamped(nn.Module):
    """Writes to its own weights in every forward pass."""

    def __init__(self) -> None:
        super().__init__()
        self.net = _mlp(nn.Tanh())

    def forward(self, x: Tensor) -> Tensor:
        with torch.no_grad():
            for p in self.net.parameters():
                p.clamp_(-0.4, 0.4)
        return self.net(x)


class Checkpointed(nn.Module):
    """Two checkpointed parts, which share a layer: its gradient comes in two parts."""

    def __init__(self, reentrant: bool) -> None:
        super().__init__()
        self.first, self.shared, self.last = nn.Linear(5, 7), nn.Linear(7, 7), nn.Linear(7, 3)
        self.dropout, self.reentrant = nn.Dropout(0.2), reentrant

    def _part(self, x: Tensor) -> Tensor:
        return self.dropout(torch.tanh(self.shared(x)))

    def forward(self, x: Tensor) -> Tensor:
        x = self.first(x)
        for _ in range(2):
            x = checkpoint(self._part, x, use_reentrant=self.reentrant)
        return self.last(x)


class Attributes(nn.Module):
    """Uses plain attributes of its own, and changes them, by ``change(self, output)``."""

    def __init__(self, change: Callable[[Attributes, Tensor], Tensor], **attributes: Any) -> None:
        super().__init__()
        self.net, self.change = _mlp(nn.Tanh()), change
        for name, value in attributes.items():
            setattr(self, name, value)

    def forward(self, x: Tensor) -> Tensor:
        return self.change(self, self.net(x).float())


# In what follows an output goes in after it was used: the loss keeps its gradient.
def _count(net: Attributes, out: Tensor) -> Tensor:
    net.calls += 1
    return out * (1.0 + 0.01 * net.calls)


def _list(net: Attributes, out: Tensor) -> Tensor:
    centred = out - sum(net.means)
    net.means.append(0.1 * float(out.mean()))
    return centred


def _average(net: Attributes, out: Tensor) -> Tensor:
    centred = out - net.mean
    net.mean = 0.9 * net.mean + 0.1 * out.detach().mean(0)
    return centred


def _average_in_place(net: Attributes, out: Tensor) -> Tensor:
    centred = out - net.mean.clone()
    net.mean.lerp_(out.detach().mean(0), 0.1)
    return centred


def _every_third(net: Attributes, out: Tensor) -> Tensor:
    """A sum that changes at every third call."""
    centred = out - net.mean
    net.calls += 1
    if net.calls % 3 == 0:
        net.mean += 0.1 * out.detach().mean(0)
    return centred


def _remember(net: Attributes, out: Tensor) -> Tensor:
    """A memory bank, written in turns."""
    centred = out - net.bank.mean(0)
    rows = (net.at + torch.arange(len(out))) % len(net.bank)
    net.bank[rows] = out.detach()
    net.at = int(rows[-1]) + 1
    return centred


class Bank(Attributes):
    """A memory bank in a buffer."""

    def __init__(self) -> None:
        super().__init__(_remember, at=0)
        self.register_buffer("bank", torch.zeros(20, 3))


class Late(nn.Module):
    """Registers a buffer in its first forward pass, and replaces it in others."""

    def __init__(self) -> None:
        super().__init__()
        self.net = _mlp(nn.Tanh())

    def forward(self, x: Tensor) -> Tensor:
        out = self.net(x).float()
        if "mean" not in self._buffers:
            self.register_buffer("mean", torch.zeros(3))
        centred = out - self.mean
        self.mean = 0.9 * self.mean + 0.1 * out.detach().mean(0)
        return centred


class Hooked(nn.Module):
    """Gives its net a hook in its first forward pass, and remembers that it did."""

    def __init__(self) -> None:
        super().__init__()
        self.net, self.hooked = _mlp(nn.Tanh()), False

    def forward(self, x: Tensor) -> Tensor:
        if not self.hooked:
            self.net[1].register_forward_hook(lambda module, inputs, out: 1.01 * out)
            self.hooked = True
        return self.net(x)


class _Cube(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.save_for_backward(x)
        return x**3

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        return 3.0 * ctx.saved_tensors[0] ** 2 * gradient


class Cube(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return _Cube.apply(x)


class HostNoise(nn.Module):
    """Random numbers of Python and NumPy."""

    def forward(self, x: Tensor) -> Tensor:
        return x * (1.0 + 0.1 * random.random()) + 0.1 * float(np.random.randn())


class Unused(nn.Module):
    """Has parameters that get no gradient."""

    def __init__(self) -> None:
        super().__init__()
        self.net, self.never = _mlp(nn.Tanh()), nn.Linear(2, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.net(x)


class Momentum(nn.Module):
    """Follows its net with a second one, written in every forward pass (as MoCo does)."""

    def __init__(self) -> None:
        super().__init__()
        self.net, self.follower = nn.Linear(5, 3), nn.Linear(5, 3).requires_grad_(False)

    def forward(self, x: Tensor) -> Tensor:
        out = torch.tanh(self.net(x)) + self.follower(x)
        with torch.no_grad():
            for mine, other in zip(self.net.parameters(), self.follower.parameters(), strict=True):
                other.lerp_(mine, 0.1)
        return out


# --- scenes --------------------------------------------------------------------------------------


def _conv_batchnorm() -> Scene:
    layers = [nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Flatten(), nn.Linear(64, 3)]
    images = lambda: (torch.randn(8, 1, 6, 6), torch.randint(0, 3, (8,)))  # noqa: E731
    return _classifier(nn.Sequential(*layers), images)


def _lstm() -> Scene:
    return _classifier(Recurrent(), lambda: (torch.randn(4, 5, 3), torch.randint(0, 3, (4, 5))))


def _tied(max_norm: float | None = None) -> Scene:
    net = Tied(max_norm)
    return _classifier(net, lambda: (torch.randint(0, 6, (4, 5)), torch.randint(0, 6, (4, 5))))


def _normed(norm: Callable[..., nn.Module]) -> Callable[[], Scene]:
    return lambda: _classifier(
        nn.Sequential(norm(nn.Linear(5, 7)), nn.Tanh(), norm(nn.Linear(7, 3)))
    )


def _shared() -> Scene:
    inner = nn.Linear(7, 7)
    layers = [nn.Linear(5, 7), inner, nn.Tanh(), inner, nn.Tanh(), nn.Linear(7, 3)]
    return _classifier(nn.Sequential(*layers))


def _encoder_head(optimizers: int) -> Scene:
    """Two modules in one loss; the head is tracked."""
    encoder = nn.Sequential(nn.Linear(5, 6), nn.BatchNorm1d(6), nn.Tanh(), nn.Dropout(0.1))
    head = nn.Linear(6, 3)
    loss: Loss = lambda batch: F.cross_entropy(head(encoder(batch[0])), batch[1])  # noqa: E731
    of_encoder, of_head = list(encoder.parameters()), list(head.parameters())
    parts = [Part([*of_head, *of_encoder], loss)]
    if optimizers == 2:
        parts = [Part(of_head, loss), Part(of_encoder, loss)]
    return Scene([encoder, head], parts, _labelled, of_head)


def _gan(toggles: bool) -> Scene:
    """A discriminator, tracked, and its generator, which has buffers."""
    generator = nn.Sequential(nn.Linear(3, 6), nn.BatchNorm1d(6), nn.Tanh(), nn.Linear(6, 5))
    parametrizations.spectral_norm(generator[3])
    critic = nn.Sequential(nn.Linear(5, 7), nn.Tanh(), nn.Linear(7, 1))

    def tell(batch: Sequence[Tensor]) -> Tensor:
        if toggles:
            generator.requires_grad_(False)
        made = generator(batch[1]) if toggles else generator(batch[1]).detach()
        if toggles:
            generator.requires_grad_(True)
        return F.softplus(-critic(batch[0])).mean() + F.softplus(critic(made)).mean()

    def fool(batch: Sequence[Tensor]) -> Tensor:
        return F.softplus(-critic(generator(batch[1]))).mean()

    parts = [Part(list(critic.parameters()), tell), Part(list(generator.parameters()), fool)]
    batch = lambda: (torch.randn(8, 5), torch.randn(8, 3))  # noqa: E731
    return Scene([critic, generator], parts, batch, parts[0].parameters)


def _frozen(thaws: bool) -> Scene:
    """A backbone that isn't trained (until midway), in train mode; the head is tracked."""
    backbone = nn.Sequential(nn.Linear(5, 6), nn.BatchNorm1d(6), nn.Tanh()).requires_grad_(False)
    model = nn.Sequential(backbone, nn.Linear(6, 3))
    scene = _classifier(model)
    scene.tracked = list(model[1].parameters())
    if thaws:
        scene.midway = lambda: backbone.requires_grad_(True)
    return scene


def _latent(tracks: str) -> Scene:
    """A loose code beside a decoder."""
    decoder = nn.Sequential(nn.Linear(3, 6), nn.BatchNorm1d(6), nn.Tanh(), nn.Linear(6, 5))
    code = torch.randn(8, 3, requires_grad=True)
    loss: Loss = lambda batch: F.mse_loss(decoder(code), batch)  # noqa: E731
    parameters = list(decoder.parameters())
    tracked = [code] if tracks == "code" else parameters
    part = Part([*parameters, code], loss)
    return Scene([decoder], [part], lambda: torch.randn(8, 5), tracked, [code])


def _input_gradient() -> Scene:
    """Inputs that get a gradient, which accumulates."""
    scene = _classifier(_mlp(nn.Tanh()))
    x, y = _labelled()
    scene.batch = lambda: (x, y)
    scene.loose.append(x.requires_grad_())
    return scene


def _input_gradient_from_midway() -> Scene:
    scene = _input_gradient()
    (x,) = scene.loose
    x.requires_grad_(False)
    scene.midway = x.requires_grad_
    return scene


def _functional(fresh: bool) -> Scene:
    """Parameters and buffers kept in dictionaries, and a module that computes with them."""

    def make() -> nn.Module:
        return nn.Sequential(nn.Linear(5, 6), nn.BatchNorm1d(6), nn.Tanh(), nn.Linear(6, 3))

    model = make()
    parameters = {n: p.detach().clone().requires_grad_() for n, p in model.named_parameters()}
    buffers = {n: b.clone() for n, b in model.named_buffers()}

    def loss(batch: Batch) -> Tensor:
        with torch.random.fork_rng():
            net = make() if fresh else model
        out = torch.func.functional_call(net, (parameters, buffers), batch[:1])
        return F.cross_entropy(out, batch[1])

    trained = list(parameters.values())
    loose = [*trained, *buffers.values()]
    return Scene([] if fresh else [model], [Part(trained, loss)], _labelled, trained, loose)


def _penalty() -> Scene:
    """A gradient with respect to the inputs is part of the loss."""
    model = _mlp(nn.Softplus())

    def loss(batch: Batch) -> Tensor:
        x = batch[0].clone().requires_grad_()
        out = model(x)
        (slope,) = torch.autograd.grad(out.sum(), x, create_graph=True)
        return F.cross_entropy(out, batch[1]) + (slope.norm(dim=1) - 1.0).square().mean()

    parameters = list(model.parameters())
    return Scene([model], [Part(parameters, loss)], _labelled, parameters)


def _teacher() -> Scene:
    """The loss runs another net, and switches it to eval mode."""
    student, teacher = _mlp(nn.Tanh()), _mlp(nn.Tanh(), nn.BatchNorm1d(7))

    def loss(batch: Batch) -> Tensor:
        teacher.eval()
        with torch.no_grad():
            aim = teacher(batch[0])
        return F.mse_loss(student(batch[0]), aim)

    parameters = list(student.parameters())
    return Scene([student, teacher], [Part(parameters, loss)], _labelled, parameters)


def _teacher_from_midway() -> Scene:
    """A net with buffers that is made, and takes part, after the first steps."""
    student = _mlp(nn.Tanh())
    teachers: list[nn.Module] = []

    def loss(batch: Batch) -> Tensor:
        out = student(batch[0])
        aims = [F.mse_loss(out, teacher(batch[0]).detach()) for teacher in teachers]
        return F.cross_entropy(out, batch[1]) + sum(aims)

    scene = _classifier(student)
    scene.parts[0].loss = loss

    def midway() -> None:
        teachers.append(_mlp(nn.Tanh(), nn.BatchNorm1d(7)))
        scene.modules.append(teachers[0])

    scene.midway = midway
    return scene


SCENES: dict[str, Callable[[], Scene]] = {
    "tanh": lambda: _classifier(_mlp(nn.Tanh())),
    "relu": lambda: _classifier(_mlp(nn.ReLU())),
    "gelu": lambda: _classifier(_mlp(nn.GELU(), nn.LayerNorm(7))),
    "conv, BatchNorm": _conv_batchnorm,
    "dropout": lambda: _classifier(_mlp(nn.Tanh(), nn.Dropout(0.3))),
    "hidden state": _lstm,
    "tied": _tied,
    "tied, max_norm": lambda: _tied(1.0),
    "clamped": lambda: _classifier(Clamped()),
    "spectral_norm": _normed(parametrizations.spectral_norm),
    "spectral_norm, old": _normed(nn.utils.spectral_norm),
    "weight_norm": _normed(parametrizations.weight_norm),
    "weight_norm, old": _normed(nn.utils.weight_norm),
    "checkpoint": lambda: _classifier(Checkpointed(False)),
    "checkpoint, reentrant": lambda: _classifier(Checkpointed(True)),
    "encoder, head": lambda: _encoder_head(1),
    "encoder, head, two optimizers": lambda: _encoder_head(2),
    "GAN": lambda: _gan(False),
    "GAN, toggled": lambda: _gan(True),
    "frozen": lambda: _frozen(False),
    "thawed": lambda: _frozen(True),
    "latent code": lambda: _latent("decoder"),
    "latent code, tracked": lambda: _latent("code"),
    "input's gradient": _input_gradient,
    "input's gradient, from midway": _input_gradient_from_midway,
    "counter": lambda: _classifier(Attributes(_count, calls=0)),
    "list": lambda: _classifier(Attributes(_list, means=[])),
    "running mean": lambda: _classifier(Attributes(_average, mean=torch.zeros(3))),
    "running mean, in place": lambda: _classifier(
        Attributes(_average_in_place, mean=torch.zeros(3))
    ),
    "sum at every third call": lambda: _classifier(
        Attributes(_every_third, mean=torch.zeros(3), calls=0)
    ),
    "bank": lambda: _classifier(Attributes(_remember, bank=torch.zeros(20, 3), at=0)),
    "bank, buffer": lambda: _classifier(Bank()),
    "late hook": lambda: _classifier(Hooked()),
    "late buffer": lambda: _classifier(Late()),
    "custom function": lambda: _classifier(_mlp(Cube())),
    "host's noise": lambda: _classifier(_mlp(nn.Tanh(), HostNoise())),
    "functional_call": lambda: _functional(False),
    "functional_call, fresh module": lambda: _functional(True),
    "unused": lambda: _classifier(Unused()),
    "shared": _shared,
    "momentum encoder": lambda: _classifier(Momentum()),
    "gradient penalty": _penalty,
    "teacher": _teacher,
    "teacher, from midway": _teacher_from_midway,
}
