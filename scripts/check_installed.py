"""Checks an installed lyapcuda: its files, and what it measures of a small net.

python scripts/check_installed.py
"""

from __future__ import annotations

import sys
from importlib.metadata import distribution, metadata, version
from pathlib import Path

import torch
from torch import nn

import lyapcuda

#: Needed for extras alone.
OPTIONAL = ("matplotlib", "scipy", "tqdm", "tensorboard", "lightning", "transformers", "wandb")


def main() -> None:
    folder = Path(lyapcuda.__file__).parent
    assert "site-packages" in folder.parts, f"{folder}: this is not an installed lyapcuda"
    for name in ("py.typed", "_C.pyi"):
        assert (folder / name).exists(), f"{name} is missing: the type hints aren't shipped"
    compiled = [path.name for path in folder.glob("_C.*") if path.suffix != ".pyi"]
    assert compiled == ["_C.abi3.so"], compiled
    assert lyapcuda.__version__ == version("lyapcuda")
    tags = distribution("lyapcuda").read_text("WHEEL")
    assert "Tag: cp311-abi3-" in tags, tags
    assert metadata("lyapcuda")["License-Expression"] == "MIT"
    loaded = [name for name in OPTIONAL if name in sys.modules]
    assert not loaded, f"import lyapcuda imports {loaded}"

    torch.manual_seed(0)
    x, y = torch.randn(256, 10), torch.randint(0, 3, (256,))
    model = nn.Sequential(nn.Linear(10, 32), nn.GELU(), nn.Linear(32, 3))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    tracker = lyapcuda.CurvatureTracker(model.parameters(), optimizer=optimizer)

    def loss() -> torch.Tensor:
        return nn.functional.cross_entropy(model(x), y)

    for _ in range(50):
        optimizer.zero_grad()
        tracker.backward(loss)
        optimizer.step()
    for _ in range(100):
        tracker.step(loss)  # θ stands still
    h0 = lyapcuda.eigsh(loss, model.parameters()).eigenvalues[0]
    assert abs(tracker.h / h0 - 1) < 0.01, (tracker.h, h0)
    cdat = lyapcuda.CDAT(torch.optim.Adam(model.parameters()))
    before = loss().item()
    for _ in range(20):
        cdat.zero_grad()
        cdat.step(loss)
    assert loss().item() < before
    print(f"lyapcuda {lyapcuda.__version__}, Python {sys.version.split()[0]}: works")


if __name__ == "__main__":
    main()
