"""Operators compose as matrices do, and take vectors of every kind."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn.functional import cross_entropy

import lyapcuda

X = torch.randn(24, 5, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
Y = torch.randint(0, 3, (24,), generator=torch.Generator().manual_seed(1))


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(5, 6), nn.GELU(), nn.Linear(6, 3)).double()


@pytest.fixture
def hessian(model):
    return lyapcuda.HessianOperator(lambda: cross_entropy(model(X), Y), model.named_parameters())


@pytest.fixture
def ggn(model):
    return lyapcuda.GGNOperator(
        lambda: model(X), lambda out: cross_entropy(out, Y), model.named_parameters()
    )


def dense(operator):
    return operator @ torch.eye(operator.shape[0], dtype=operator.dtype)


def close(found, true, rtol=1e-9):
    return bool((found - true).norm() <= rtol * true.norm())


def test_sums_multiples_and_shifts(hessian, ggn):
    H, G, eye = dense(hessian), dense(ggn), torch.eye(len(dense(ggn)), dtype=torch.float64)
    for found, true in (
        (hessian + ggn, H + G),
        (hessian - ggn, H - G),
        (2 * hessian, 2 * H),
        (hessian * np.float64(0.5), H / 2),
        (hessian / 4.0, H / 4),
        (-hessian, -H),
        (hessian.shifted(0.3), H + 0.3 * eye),
        (2 * (hessian - ggn).shifted(1.0) + ggn / 3, 2 * (H - G + eye) + G / 3),
    ):
        assert close(dense(found), true)
        assert found.mode == "exact"
        largest = float(torch.linalg.eigvalsh(true)[-1])
        assert float(lyapcuda.eigsh(found).eigenvalues) == pytest.approx(largest, rel=1e-3)


def test_deflation_takes_out_what_was_found(hessian):
    H = dense(hessian)
    values, vectors = torch.linalg.eigh(H)
    found = lyapcuda.eigsh(hessian, k=2, tol=1e-9)
    rest = hessian.deflated(found)
    assert float(lyapcuda.eigsh(rest).eigenvalues) == pytest.approx(float(values[-3]), rel=1e-3)
    top = vectors[:, -2:].T
    inside = torch.eye(len(H), dtype=H.dtype) - top.T @ top
    assert close(dense(hessian.deflated(3.0 * top + top.flip(0))), inside @ H @ inside)


def test_blocks_are_the_principal_submatrices(hessian, ggn):
    for operator in (hessian, ggn, hessian + 2 * ggn, ggn.shifted(0.5)):
        whole = dense(operator)
        assert close(dense(operator.block("0.*")), whole[:36, :36])
        assert close(dense(operator.block(["2.bias"])), whole[-3:, -3:])
    blocks = hessian.blocks()
    assert list(blocks) == ["0", "2"]
    assert close(dense(blocks["2"]), dense(hessian)[36:, 36:])


def test_exclude_leaves_out_by_pattern(model, hessian):
    def loss():
        return cross_entropy(model(X), Y)

    found = lyapcuda.HessianOperator(loss, model.named_parameters(), exclude="*.bias")
    keep = [*range(30), *range(36, 54)]
    assert close(dense(found), dense(hessian)[keep][:, keep])
    one = lyapcuda.eigsh(loss, model.named_parameters(), select="2.*", exclude=["2.bias"])
    assert one.eigenvectors.shape == (1, 18)


def test_the_preconditioner_stays_with_a_sum(model):
    def loss():
        return cross_entropy(model(X), Y)

    scales = [torch.rand_like(p) + 0.5 for p in model.parameters()]
    options = {"preconditioner": scales}
    H = lyapcuda.HessianOperator(loss, model.named_parameters(), **options)
    twice = H + H
    one, two = (lyapcuda.eigsh(A, tol=1e-8) for A in (H, twice))
    assert float(two.eigenvalues) == pytest.approx(2 * float(one.eigenvalues), rel=1e-7)
    assert abs(float(one.eigenvectors[0] @ two.eigenvectors[0])) == pytest.approx(1.0, abs=1e-5)
    with pytest.raises(ValueError, match="preconditioners differ"):
        _ = H + lyapcuda.HessianOperator(loss, model.named_parameters())


def test_one_operator_in_several_parts_counts_its_gradients_once(hessian):
    both = hessian + hessian
    before = hessian.gradient_evaluations
    _ = both @ torch.ones(both.shape[0], dtype=torch.float64)
    assert both.gradient_evaluations == hessian.gradient_evaluations > before


@pytest.mark.parametrize("kind", ["hessian", "ggn", "sum"])
def test_vectors_of_every_kind_come_back_as_they_were(model, hessian, ggn, kind):
    operator = {"hessian": hessian, "ggn": ggn, "sum": hessian + ggn}[kind]
    v = torch.randn(operator.shape[0], dtype=torch.float64)
    true = dense(operator) @ v
    assert close(operator @ v, true)
    array = operator @ v.numpy()
    assert isinstance(array, np.ndarray) and close(torch.from_numpy(array), true)
    matrix = operator @ np.stack([v.numpy()] * 2, 1)
    assert isinstance(matrix, np.ndarray) and matrix.shape == (operator.shape[0], 2)
    parts = v.split([p.numel() for p in model.parameters()])
    shaped = [part.view(p.shape) for part, p in zip(parts, model.parameters(), strict=True)]
    found = operator @ shaped
    assert [part.shape for part in found] == [p.shape for p in model.parameters()]
    assert close(torch.cat([part.reshape(-1) for part in found]), true)
    assert np.allclose(operator.to_scipy() @ v.numpy(), true)


def test_start_vectors_of_every_kind(model, hessian):
    top = lyapcuda.eigsh(hessian, tol=1e-9)
    whole = lyapcuda.eigsh(hessian, v0=top.eigenvectors[0]).gradient_evaluations
    for v0 in (top.eigenvectors.numpy(), top.eigenvectors[0].numpy(), top.unflatten(0)):
        again = lyapcuda.eigsh(hessian, v0=v0)
        assert again.gradient_evaluations == whole
        assert float(again.eigenvalues) == pytest.approx(float(top.eigenvalues), rel=1e-6)


def test_what_doesnt_fit_is_named(model, hessian):
    other = nn.Linear(5, 3).double()
    fewer = lyapcuda.HessianOperator(lambda: cross_entropy(other(X), Y), other.named_parameters())
    with pytest.raises(ValueError, match="of 4 and of 2 parameters that aren't the same"):
        _ = hessian + fewer
    with pytest.raises(TypeError):
        _ = hessian + 1.0
    with pytest.raises(ValueError, match="factor=inf"):
        _ = float("inf") * hessian
    with pytest.raises(TypeError, match="value='a'"):
        hessian.shifted("a")
    with pytest.raises(ValueError, match="vectors: expected an EigenResult"):
        hessian.deflated(torch.ones(3))
    with pytest.raises(ValueError, match="linearly dependent"):
        hessian.deflated(torch.ones(2, hessian.shape[0]))
    with pytest.raises(ValueError, match="select: no parameter's name matches"):
        hessian.block("layer9.*")
    with pytest.raises(NotImplementedError, match="take the block, then deflate"):
        hessian.deflated(torch.ones(1, hessian.shape[0])).block("0.*")
    for bad in ([torch.ones(3)], np.array(["a"]), torch.ones(3), np.ones((2, 2, 2)), 3.0):
        with pytest.raises(ValueError, match="v: expected"):
            _ = hessian @ bad
