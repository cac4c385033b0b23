"""Trackers, LyapunovSGD and eigsh on compiled and checkpointed models, kernels that can't be
differentiated twice, and other memory layouts, against exact Hessians.

The cases and tolerances are in precision_cases.py; docs/precision.md has the errors measured.
"""

import pytest
import torch
from torch import nn

import lyapcuda
import precision_cases as cases


@pytest.mark.parametrize("name", cases.COMPILERS)
def test_values_are_those_of_the_exact_hessian(name):
    torch._dynamo.reset()
    cases.check(name, cases.COMPILERS[name]())


def test_a_compiled_model_is_compiled_once():
    """θ + q are other memory, not another graph."""
    torch._dynamo.reset()
    graphs = []

    def backend(graph, inputs):
        graphs.append(graph)
        return graph.forward

    case = cases.problem(forward=lambda model: torch.compile(model, backend=backend))
    tracker = lyapcuda.CurvatureTracker(case.model.parameters(), k=3)
    for _ in range(4):
        tracker.step(case.closure)
    assert len(graphs) == 1


@pytest.mark.skipif(not torch.cuda.is_available(), reason="CUDA graphs need a GPU")
def test_a_model_compiled_to_cuda_graphs():
    """mode="reduce-overhead" (never run so far: no GPU was at hand)."""
    torch._dynamo.reset()
    case = cases.problem()
    x = torch.randn(64, 10, device="cuda")
    y = torch.randint(0, 4, (64,), device="cuda")
    model = case.model.cuda()
    fast = torch.compile(model, mode="reduce-overhead")

    def tracked(forward):
        tracker = lyapcuda.CurvatureTracker(model.parameters(), seed=1)
        for _ in range(30):
            torch.compiler.cudagraph_mark_step_begin()
            tracker.step(lambda: nn.functional.cross_entropy(forward(x), y))
        return float(tracker.h)

    assert tracked(fast) == pytest.approx(tracked(model), rel=1e-3)
