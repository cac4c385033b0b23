"""The pictures of docs/concepts and docs/howto: what its pages say, drawn from running it.

    python bench/doc_pictures.py [FOLDER]

FOLDER is docs/images by default. Half a minute.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from matplotlib.figure import Figure
from torch import nn

import lyapcuda
from lyapcuda.plots.figure import BLUE, GREEN, ORANGE, RED, new_figure, tidy

IMAGES = Path(__file__).parents[1] / "docs" / "images"


def curvature(figure: Figure) -> None:
    """Gradient descent in a valley, by the rate in units of 2/h0."""
    steep, flat = 5.0, 0.5
    u, v = np.meshgrid(np.linspace(-1.3, 1.3, 200), np.linspace(-1.6, 1.6, 200))
    axes = figure.subplots(1, 3, sharey=True)
    for ax, share, colour in zip(axes, (0.15, 0.97, 1.03), (GREEN, BLUE, RED), strict=True):
        ax.contour(u, v, steep * u**2 + flat * v**2, levels=12, colors="0.8", linewidths=0.8)
        path = [np.array([0.55, 1.4])]
        for _ in range(14):
            path.append(path[-1] * (1 - share * 2 / steep * np.array([steep, flat])))
        ax.plot(*np.array(path).T, "o-", color=colour, markersize=3, linewidth=1)
        ax.set(xlim=(-1.3, 1.3), ylim=(-1.6, 1.6), xlabel="steep direction, h0 = 5")
        ax.set_title(f"rate = {share} · 2/h0", fontsize=10)
        tidy(ax)
    axes[0].set_ylabel("flat direction, h1 = 0.5")


def lyapunov(figure: Figure) -> None:
    """Two copies climb: how their distance grows, without and with scaling back."""
    h = np.array([5.0, 2.0, 0.5])
    beta = 0.1
    q = np.ones(3) * 1e-6
    distances, exponents = [np.linalg.norm(q)], []
    for _ in range(25):
        q = q + beta * h * q
        distances.append(np.linalg.norm(q))
        exponents.append(np.log(distances[-1] / distances[-2]))
    left, right = figure.subplots(1, 2)
    left.semilogy(distances, "o-", color=BLUE, markersize=3)
    left.set(xlabel="step", title="how far the copies are apart")
    left.title.set_fontsize(10)
    right.plot(
        range(1, 26), exponents, "o-", color=BLUE, markersize=3, label="λ = log of the growth"
    )
    right.axhline(np.log1p(beta * h[0]), color=ORANGE, label="log(1 + β·h0)")
    right.set(xlabel="step")
    right.set_title("growth per step", fontsize=10)
    right.legend(frameon=False)
    for ax in (left, right):
        tidy(ax)


def kinks(figure: Figure) -> None:
    """The gradient of relu(p) + p², and its differences over a short and a long distance."""
    ax = figure.subplots()
    p = np.linspace(-0.6, 0.9, 1001)
    gradient = (p > 0) + 2 * p
    ax.plot(
        np.where(np.abs(p) < 1e-3, np.nan, p), np.where(np.abs(p) < 1e-3, np.nan, gradient), "k"
    )
    for size, colour in ((0.07, GREEN), (0.2, RED), (0.5, BLUE)):
        ends = np.array([0.1 - size, 0.1 + size])
        values = (ends > 0) + 2 * ends
        slope = (values[1] - values[0]) / (2 * size)
        ax.plot(ends, values, "o-", color=colour, label=f"Δq = {size}: slope {slope:.2g}")
    ax.axvline(0.1, color="0.6", linestyle=":", label="θ")
    ax.set(xlabel="p", ylabel="gradient of relu(p) + p²")
    ax.legend(frameon=False)
    tidy(ax)


def edge_rates(figure: Figure) -> None:
    """One net at three rates: curvature rises to 2/rate, and stays."""
    torch.manual_seed(0)
    x = torch.randn(512, 20)
    y = x[:, :3].sin()
    above, below = figure.subplots(2, 1, sharex=True)
    for rate, colour in ((0.4, BLUE), (0.7, GREEN), (0.9, ORANGE)):
        torch.manual_seed(1)
        model = nn.Sequential(nn.Linear(20, 64), nn.GELU(), nn.Linear(64, 3))
        optimizer = torch.optim.SGD(model.parameters(), lr=rate)
        tracker = lyapcuda.CurvatureTracker(
            model.parameters(), optimizer=optimizer, tol=0.1, history=2500
        )

        def closure(model: nn.Module = model) -> torch.Tensor:
            return nn.functional.mse_loss(model(x), y)

        for _ in range(2500):
            optimizer.zero_grad()
            tracker.backward(closure)
            optimizer.step()
        history = tracker.history()
        above.plot(history.step[5:], history.h[5:], color=colour, label=f"h0 at a rate of {rate}")
        above.axhline(2 / rate, color=colour, linestyle="--", linewidth=0.8)
        below.plot(history.step[5:], history.edge[5:], color=colour)
    below.axhline(1, color=RED, linewidth=0.8)
    above.set(ylabel="h0, and 2/rate (dashed)")
    below.set(ylabel="edge", xlabel="step")
    above.legend(frameon=False)
    for ax in (above, below):
        tidy(ax)


def spectrum(figure: Figure) -> None:
    """What solvers find of a small net that was trained for 200 steps."""
    torch.manual_seed(0)
    x = torch.randn(256, 20)
    y = x[:, :3].sin()
    model = nn.Sequential(nn.Linear(20, 32), nn.GELU(), nn.Linear(32, 3))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.7)
    for _ in range(200):
        optimizer.zero_grad()
        nn.functional.mse_loss(model(x), y).backward()
        optimizer.step()
    H = lyapcuda.HessianOperator(lambda: nn.functional.mse_loss(model(x), y), model.parameters())
    result = lyapcuda.eigsh(H, k=8)
    left, middle, right = figure.subplots(1, 3)
    result.plot(ax=left)
    lyapcuda.spectral_density(H, draws=2, steps=30).plot(ax=middle)
    lyapcuda.finite_scale(H, result).plot(ax=right)


#: By name, with its width and height in inches.
PICTURES: dict[str, tuple[Callable[[Figure], None], float, float]] = {
    "curvature": (curvature, 8, 3.4),
    "lyapunov": (lyapunov, 8, 3),
    "kinks": (kinks, 6, 3.6),
    "edge_rates": (edge_rates, 8, 4.6),
    "spectrum": (spectrum, 12, 3.6),
}


def main(folder: Path = IMAGES) -> None:
    for name, (draw, width, height) in PICTURES.items():
        figure = new_figure(width, height)
        figure.set_layout_engine("constrained")
        draw(figure)
        figure.savefig(folder / f"{name}.png")


if __name__ == "__main__":
    main(*map(Path, sys.argv[1:]))
