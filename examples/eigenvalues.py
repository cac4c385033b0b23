"""Computes the largest eigenvalues of a trained net's Hessian, its trace and spectral density.

    python examples/eigenvalues.py --out runs/eigenvalues

Prints each eigenvalue with its error bar, and writes the density to density.png.
"""

import argparse
from pathlib import Path

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy

import lyapcuda
from digits import images_and_labels, mlp


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--out", type=Path, default=Path("runs/eigenvalues"))
    parser.add_argument("--steps", type=int, default=300, help="of training (default 300)")
    parser.add_argument("-k", type=int, default=5, help="how many eigenvalues (default 5)")
    args = parser.parse_args()
    args.out.mkdir(parents=True, exist_ok=True)

    torch.manual_seed(0)
    x, y = images_and_labels()
    model = mlp(width=50)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.5)

    def loss_of_all() -> Tensor:
        return cross_entropy(model(x), y)

    for _ in range(args.steps):
        optimizer.zero_grad()
        loss = loss_of_all()
        loss.backward()
        optimizer.step()
    print(f"loss {loss:.4g} after {args.steps} steps")

    # The Hessian at these weights; its products with vectors come from gradients.
    hessian = lyapcuda.HessianOperator(loss_of_all, model.parameters())
    found = lyapcuda.eigsh(hessian, k=args.k)
    for i, (value, (low, high)) in enumerate(zip(found.eigenvalues, found.interval, strict=True)):
        print(f"eigenvalue {i}: {value:.5g}, in [{low:.5g}, {high:.5g}]")
    trace = lyapcuda.trace(hessian, samples=30)
    print(f"trace: {trace.trace:.4g} ± {trace.standard_error:.2g}")
    density = lyapcuda.spectral_density(hessian)
    density.plot(args.out / "density.png")


if __name__ == "__main__":
    main()
