"""The pictures of the examples."""

from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np


def draw_run(csv: Path, png: Path) -> None:
    """Draw λ, 1/h0 with its interval, the rate, the edge and the loss over the steps of a log."""
    run = np.genfromtxt(csv, delimiter=",", names=True)
    # 1/h0 of a separation that has found no eigenvector yet is anything: not to scale to it.
    low, h, high = (run[name].clip(1e-3) for name in ("h_low", "h", "h_high"))
    figure, (top, middle, bottom) = plt.subplots(
        3, sharex=True, figsize=(8, 6.4), height_ratios=[2, 1, 1], layout="constrained"
    )
    top.semilogy(run["step"], run["exponent"], linewidth=1, label="λ")
    top.semilogy(run["step"], 1 / h, linewidth=1.2, label="1/h0")
    band = {"color": "C1", "alpha": 0.2, "linewidth": 0, "label": "1/h0, interval"}
    top.fill_between(run["step"], 1 / high, 1 / low, **band)
    top.semilogy(run["step"], run["lr"], color="C3", label="learning rate")
    top.semilogy(
        run["step"], run["lr"] / 2, "--", color="C3", linewidth=1, label="learning rate / 2"
    )
    usual = np.r_[run["exponent"], 1 / h[5:], run["lr"] / 2]
    usual = usual[np.isfinite(usual) & (usual > 0)]
    top.set_ylim(usual.min() / 2, min(usual.max(), 1e2) * 2)
    top.set_ylabel("λ, 1/h0, learning rate")
    middle.semilogy(run["step"], run["edge"].clip(1e-3), color="C4", linewidth=1)
    middle.axhline(1.0, color="black", linestyle=":", linewidth=1)
    middle.set_ylabel("edge")
    bottom.semilogy(run["step"], run["loss"], color="C2", linewidth=1)
    bottom.set(xlabel="step", ylabel="loss", xlim=(run["step"][0], run["step"][-1]))
    for axes in (top, middle, bottom):
        axes.grid(which="major", alpha=0.3)
        axes.spines[["top", "right"]].set_visible(False)
    figure.legend(loc="outside upper center", ncols=5, frameon=False)
    figure.savefig(png, dpi=150)
    plt.close(figure)


def draw_losses(losses: dict[str, list[float]], png: Path) -> None:
    """Draw the losses of every epoch, a curve under each name."""
    figure, axes = plt.subplots(figsize=(7, 4), layout="constrained")
    for name, values in losses.items():
        axes.semilogy(range(1, len(values) + 1), values, label=name)
    axes.set(xlabel="epoch", ylabel="training loss")
    axes.xaxis.get_major_locator().set_params(integer=True)
    axes.grid(which="major", alpha=0.3)
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False)
    figure.savefig(png, dpi=150)
    plt.close(figure)
