"""Faults of LyapunovSGD under CUDA graphs. Those of GradScaler are in test_optim_amp.py."""

import pytest
import torch
from torch import nn

import lyapcuda
import simt_library
from fault_cases import bits
from optim_cases import exact, quadratic

NO_GPU = simt_library.missing("cuda")


def test_a_gain_in_a_tensor_of_another_kind_under_capturable_becomes_the_groups_own(backend):
    """A CPU float32 tensor: "lr" is float64 on the parameters' device, and none of the user's."""
    gain = torch.tensor(0.5)
    theta, closure = quadratic([4.0, 0.2])
    optimizer = exact([theta], gain=gain, capturable=True, warmup_tol=1e-4)
    (lr,) = (group["lr"] for group in optimizer.param_groups)
    assert (lr.dtype, lr.device, lr.dim()) == (torch.float64, theta.device, 0) and lr is not gain
    gain.fill_(7.0)
    optimizer.step(closure)
    assert float(optimizer.lr) == pytest.approx(0.125, rel=1e-3)


@pytest.mark.skipif(NO_GPU is not None, reason=str(NO_GPU))
def test_a_cpu_tensor_as_gain_under_capturable_goes_to_the_gpu():
    theta = nn.Parameter(torch.ones(3, device="cuda"))
    optimizer = lyapcuda.LyapunovSGD([theta], gain=torch.tensor(0.5), capturable=True)
    assert optimizer.param_groups[0]["lr"].is_cuda


def test_a_capture_without_capturable_is_an_error_and_moves_nothing(monkeypatch):
    """What is asked of torch there, answered here as on a GPU."""
    theta, closure = quadratic([4.0, 1.0])
    optimizer = exact([theta])
    optimizer.measure(closure)
    before = bits([theta, theta.grad])
    with monkeypatch.context() as patched:
        patched.setattr(torch.cuda, "is_available", lambda: True)
        patched.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
        with pytest.raises(RuntimeError, match="capturable=False"):
            optimizer.step()
        with pytest.raises(RuntimeError, match="can't be captured"):
            optimizer.measure(closure)
        assert bits([theta, theta.grad]) == before
        capturable = exact([{"params": [theta], "capturable": True}])
        with pytest.raises(RuntimeError, match="without a closure"):  # that much may be captured
            capturable.step()
    optimizer.measure(closure)
    optimizer.step()
    assert bits([theta]) != before[:1]
