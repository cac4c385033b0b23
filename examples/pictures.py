"""The pictures of the examples."""

from pathlib import Path

import matplotlib.pyplot as plt


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
