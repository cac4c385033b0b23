"""Memory of trackers beside a plain backward pass, in float32 vectors of N numbers.

    python bench/memory.py > bench/results/memory.md

By torch's allocator on the CPU, to the byte: the most that a measured step holds beyond what one
plain forward and backward pass does. The net is wide and the batch small, so that activations
hardly count; its largest tensor is half of N. docs/howto/large_models.md makes gigabytes of it.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path

import torch
from torch import nn

import lyapcuda

sys.path.insert(0, str(Path(__file__).parents[1] / "tests" / "support"))
from allocated_memory import peak_allocated  # noqa: E402

WIDTH = 1000
TYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


def tracker_vectors(k: int, bf16: bool = False, metric: bool = False) -> float:
    """What a tracker takes by docs/howto/large_models.md, but for its largest parameter."""
    return (2.5 * k + 0.5 if bf16 else 2 * k + 1) + metric


class Setting:
    """A net that has taken a step of AdamW: gradients and the optimizer's state are there."""

    def __init__(self, dtype: torch.dtype) -> None:
        torch.manual_seed(0)
        layers = nn.Linear(WIDTH, WIDTH), nn.GELU(), nn.Linear(WIDTH, WIDTH)
        self.model = nn.Sequential(*layers).to(dtype)
        self.optimizer = torch.optim.AdamW(self.model.parameters(), lr=1e-4)
        self.x = torch.randn(2, WIDTH, dtype=dtype)
        self.numel = sum(p.numel() for p in self.model.parameters())
        self.plain()
        self.optimizer.step()

    def loss(self) -> torch.Tensor:
        return self.model(self.x).float().square().mean()

    def plain(self) -> None:
        self.optimizer.zero_grad()
        self.loss().backward()

    def beyond_plain(self, work: Callable[[], object]) -> float:
        """The peak of ``work()`` over that of `plain`, in float32 vectors."""
        return (peak_allocated(work) - peak_allocated(self.plain)) / (4 * self.numel)


def of_tracker(dtype: torch.dtype, k: int, metric: bool, **options: object) -> float:
    """Vectors that three measured steps hold, the tracker's own among them."""
    setting = Setting(dtype)
    own = {"optimizer": setting.optimizer} if metric else {}

    def work() -> None:
        tracker = lyapcuda.CurvatureTracker(
            setting.model.parameters(), k=k, debug=False, **options, **own
        )
        for _ in range(3):
            setting.optimizer.zero_grad()
            tracker.backward(setting.loss)

    return setting.beyond_plain(work)


def main() -> None:
    print("# Memory beside plain training\n")
    print(
        f"Vectors of N float32 numbers; torch {torch.__version__}, CPU. `python bench/memory.py`\n"
    )
    print("| tracker | float32 | bfloat16 parameters |\n|---|---|---|")
    for k in (1, 5):
        for metric in (False, True):
            cells = [f"{of_tracker(dtype, k, metric):.1f}" for dtype in TYPES.values()]
            print(f"| k = {k}{', optimizer=AdamW' * metric} | {' | '.join(cells)} |")


if __name__ == "__main__":
    main()
