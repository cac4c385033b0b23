"""A rank that fails: an error on all, no hang, nothing lost."""

from __future__ import annotations

import os
import time
from datetime import timedelta

import pytest
import torch

import lyapcuda
from lyapcuda.params.ranks import RankError
from ranks import equal_everywhere, on_ranks, outcomes
from wrapped_nets import loss_of, same, setting, snapshot

#: No step gets there: all further gradients are taken.
FURTHER = {"tol": 1e-9, "iterations": 2}


def fails_after_backward(rank: int, how: str, options: dict, leave: bool, further: int = 0) -> None:
    """In the last evaluation, or at a further copy: the others get to the exchange and hear of
    it.
    """
    model, x, y, tracker = setting(rank, how, **options)
    wrong, calls = False, 0

    def closure():
        nonlocal calls
        calls += 1
        loss = loss_of(model, x, y)
        model.zero_grad()
        loss.backward()
        if wrong and calls == tracker.k + 1 + further and rank == 1:
            raise ValueError("out of coffee")
        return loss

    for _ in range(2):
        tracker.step(closure, leave_grad=True)
    for p in model.parameters():
        p.grad = 3 * p.grad  # another one than that of this step
    before = snapshot(model, tracker)
    wrong, calls = True, 0
    error = (ValueError, "coffee") if rank == 1 else (RankError, "rank 1 failed")
    start = time.monotonic()
    with pytest.raises(error[0], match=error[1]):
        tracker.step(closure, leave_grad=leave)
    assert time.monotonic() - start < 9.0  # not by running out of time
    assert same(before, snapshot(model, tracker))
    wrong = False
    tracker.step(closure, leave_grad=leave)
    assert int(tracker.steps.max()) == 3 and equal_everywhere(tracker.h)
    assert tracker.gradients == 3 * (tracker.k + (2 if further else 0))


def not_finite_on_one(rank: int, how: str) -> None:
    """All skip the step where one rank's loss isn't finite."""
    model, x, y, tracker = setting(rank, how, k=2)
    infinite = 0.0

    def closure():
        # The gradient stays finite, so only the losses tell.
        return loss_of(model, x, y) + (infinite if rank == 1 else 0.0)

    for _ in range(3):
        tracker.step(closure)
    h = tracker.h
    infinite = float("inf")
    tracker.step(closure)
    assert int(tracker.skipped) == 1 and torch.equal(tracker.h, h)
    infinite = 0.0
    tracker.step(closure)
    assert int(tracker.steps) == 4 and equal_everywhere(tracker.state)


def not_averaged(rank: int) -> None:
    """DDP's no_sync(): refused around a step, found out inside the closure."""
    model, x, y, tracker = setting(rank, "ddp_view")
    tracker.step(lambda: loss_of(model, x, y), leave_grad=True)
    before = snapshot(model, tracker)
    with model.no_sync(), pytest.raises(RuntimeError, match="no_sync"):
        tracker.step(lambda: loss_of(model, x, y))

    def closure():
        with model.no_sync():
            return loss_of(model, x, y)

    with pytest.raises(RankError, match="averaged"):
        tracker.step(closure)
    assert same(before, snapshot(model, tracker))

    def accumulated():
        """Two halves, one exchange of gradients."""
        model.zero_grad()
        with model.no_sync():
            (loss_of(model, x[:3], y[:3]) / 2).backward()
        last = loss_of(model, x[3:], y[3:]) / 2
        last.backward()
        return last

    tracker.step(accumulated)
    assert int(tracker.steps) == 2 and equal_everywhere(tracker.state)


def arguments_differ(rank: int) -> None:
    for how in ("ddp", "fsdp"):
        model, x, y, tracker = setting(rank, how, seed=rank)
        with pytest.raises(ValueError, match="seed: differs between the ranks: .0.0, 1.0"):
            tracker.step(lambda m=model, x=x, y=y: loss_of(m, x, y))


def deferred(rank: int) -> None:
    """Where nothing is read back (CUDA): the step is skipped on all, the error comes with the
    next."""

    class Event:
        def query(self) -> bool:
            return True

    def heed(self, status, now):
        if now:
            return self._raise(status)
        self._late = (status.clone(), Event())

    ranks = lyapcuda.params.ranks.Ranks
    ranks.reads_back, kept = staticmethod(lambda device: False), ranks.reads_back
    ranks._heed, heeded = heed, ranks._heed
    try:
        for options in ({}, {"k": 3}):
            model, x, y, tracker = setting(rank, "fsdp", **options)
            wrong = True

            def closure(model=model, x=x, y=y):
                loss = loss_of(model, x, y)
                loss.backward()
                if wrong and rank == 1 and not lyapcuda.objective.pointing.at_a_copy():  # noqa: B023
                    raise ValueError("out of coffee")
                return loss

            if rank == 1:
                with pytest.raises(ValueError, match="coffee"):
                    tracker.step(closure)
            else:
                tracker.step(closure)
                assert int(tracker.skipped) == 1 and int(tracker.steps) == 0
                with pytest.raises(RankError, match="rank 1"):
                    tracker.step(closure)
    finally:
        ranks.reads_back, ranks._heed = staticmethod(kept), heeded


def in_step(rank: int) -> None:
    """Everything that all ranks get through."""
    fails_after_backward(rank, "ddp", {"k": 2}, True)
    fails_after_backward(rank, "fsdp_root", {}, True)
    fails_after_backward(rank, "fsdp", {"k": 3, "which": "BE"}, False)
    fails_after_backward(rank, "ddp", FURTHER, True, further=1)
    fails_after_backward(rank, "ddp_view", {"k": 2, **FURTHER}, False, further=2)
    fails_after_backward(rank, "fsdp", {"k": 3, "which": "BE", **FURTHER}, True, further=2)
    not_finite_on_one(rank, "ddp")
    not_finite_on_one(rank, "fsdp")
    not_averaged(rank)
    arguments_differ(rank)
    deferred(rank)


def test_errors_that_all_ranks_hear_of():
    on_ranks(2, in_step, limit=30.0)


def lost(rank: int, how: str, manner: str) -> None:
    """Rank 1 leaves the others alone in their collectives."""
    lyapcuda.params.ranks.GRACE = timedelta(seconds=2)
    model, x, y, tracker = setting(rank, how)
    tracker.step(lambda: loss_of(model, x, y))
    before = snapshot(model, tracker)

    def closure():
        loss = loss_of(model, x, y)
        if rank == 1 and manner == "dies":
            os._exit(7)
        if rank == 1:
            raise ValueError("out of coffee")
        return loss

    try:
        tracker.step(closure)
    except Exception:
        assert same(before, snapshot(model, tracker))
        if rank == 1 and manner == "stays":
            time.sleep(7.0)
        raise
    raise AssertionError("no error")


@pytest.mark.parametrize(
    ("size", "how", "manner"),
    [(3, "ddp", "dies"), (2, "fsdp", "dies"), (3, "fsdp", "raises"), (2, "ddp", "stays")],
)
def test_a_rank_that_leaves_the_others_alone(size, how, manner):
    # Where its process ends, the others needn't wait for their group's timeout.
    limit = 4.0 if manner == "stays" else 80.0
    found = outcomes(size, lost, how, manner, limit=limit, deadline=120.0)
    for rank, outcome in enumerate(found):
        if rank == 1 and manner == "dies":
            assert outcome.exit_code == 7
            continue
        assert outcome.error is not None, f"rank {rank} hung: {outcome}"
        assert "AssertionError" not in outcome.error, outcome.error
        assert ("coffee" in outcome.error) == (rank == 1)
        assert outcome.seconds < 60.0
