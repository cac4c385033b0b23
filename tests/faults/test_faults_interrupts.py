"""Ctrl-C at any moment of a step, not only inside the closure."""

import signal
import sys
import threading
from pathlib import Path

import pytest
import torch
from torch import nn

import lyapcuda
from fault_cases import bits, state_of, steps, surroundings
from lyapcuda.objective.evaluator import Evaluator
from lyapcuda.objective.interrupts import allowed, deferred

PACKAGE = str(Path(lyapcuda.__file__).parent)


def interrupted_at(number, work):
    """Runs it with a SIGINT at that line of the package's own; False where there are fewer lines.

    (interrupts.py itself is left out: between two lines of it the signal can't be put off.)
    """
    seen = 0

    def trace(frame, event, arg):
        nonlocal seen
        file = frame.f_code.co_filename
        if not file.startswith(PACKAGE) or file.endswith("interrupts.py"):
            return None
        if event == "line":
            seen += 1
            if seen == number:
                sys.settrace(None)
                signal.raise_signal(signal.SIGINT)
        return trace

    before = sys.gettrace()
    sys.settrace(trace)
    try:
        work()
    finally:
        sys.settrace(before)
    return seen >= number


@pytest.mark.parametrize("options", [{}, {"k": 2}, {"momentum": 0.5}], ids=str)
@pytest.mark.parametrize("leave", [False, True])
def test_ctrl_c_at_any_line_of_a_step_leaves_it_untaken_or_whole(options, leave):
    """Parameters, gradients, buffers, random states and the tracker: of before, or of after."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 6), nn.BatchNorm1d(6), nn.Dropout(0.2), nn.Linear(6, 2))
    x = torch.randn(12, 4)
    tracker = lyapcuda.CurvatureTracker(model.parameters(), **options)

    def step():
        tracker.step(lambda: model(x).square().mean(), leave_grad=leave)

    for _ in range(3):
        step()
    model.zero_grad()
    saved = tracker.state_dict()
    buffers = [b.clone() for b in model.buffers()]
    generator = torch.get_rng_state()

    def again():
        tracker.load_state_dict(saved)
        # Each takes the same lines: the third of a closure doesn't look at what it touches.
        tracker._evaluator._counts.update(dict.fromkeys(tracker._evaluator._counts, 2))
        model.zero_grad()
        torch.set_rng_state(generator)
        for buffer, value in zip(model.buffers(), buffers, strict=True):
            buffer.copy_(value)

    def everything():
        return surroundings(model.parameters(), [model]), state_of(tracker)

    again()
    untaken = everything()
    step()
    whole = everything()
    outcomes, number, stride = [], 1, 9
    while True:
        again()
        try:
            if not interrupted_at(number, step):
                break
        except KeyboardInterrupt:
            pass
        else:
            raise AssertionError("the interrupt was lost")
        outcomes.append([untaken, whole].index(everything()))
        number += stride
    assert outcomes == sorted(outcomes) and set(outcomes) == {0, 1}  # untaken first, then whole
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
    step()  # nobody holds a turn


def test_ctrl_c_arrives_at_the_end_or_where_it_is_allowed():
    reached = []
    with pytest.raises(KeyboardInterrupt):
        with deferred():
            signal.raise_signal(signal.SIGINT)
            reached.append(1)
            with deferred():  # within: still put off
                reached.append(2)
            reached.append(3)
            with allowed():
                reached.append(4)
    assert reached == [1, 2, 3]
    with pytest.raises(KeyboardInterrupt):
        with deferred(), allowed():
            signal.raise_signal(signal.SIGINT)
    with allowed(), deferred():
        pass
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


def test_handlers_of_the_users_own_are_kept():
    asked, before = [], signal.getsignal(signal.SIGINT)

    def note(number, frame):
        asked.append(number)

    def other(number, frame):
        asked.append("other")

    try:
        signal.signal(signal.SIGINT, note)
        with deferred():
            signal.raise_signal(signal.SIGINT)
            assert asked == []
        assert asked == [signal.SIGINT] and signal.getsignal(signal.SIGINT) is note
        with deferred():
            with allowed():
                signal.signal(signal.SIGINT, other)
            signal.raise_signal(signal.SIGINT)
        assert asked[1:] == ["other"] and signal.getsignal(signal.SIGINT) is other
        signal.signal(signal.SIGINT, signal.SIG_IGN)
        with deferred(), allowed():
            signal.raise_signal(signal.SIGINT)
        assert signal.getsignal(signal.SIGINT) == signal.SIG_IGN
    finally:
        signal.signal(signal.SIGINT, before)


def test_other_threads_set_no_handlers():
    theta = nn.Parameter(torch.ones(3))
    tracker = lyapcuda.CurvatureTracker([theta])
    seen = []

    def run():
        steps(tracker, lambda: (theta * theta).sum(), 2)
        with deferred(), allowed():
            seen.append(signal.getsignal(signal.SIGINT))

    thread = threading.Thread(target=run)
    thread.start()
    thread.join()
    assert seen == [signal.default_int_handler] and int(tracker.steps) == 2


def test_ctrl_c_while_the_parameters_are_put_back():
    parameters = [nn.Parameter(torch.ones(2)) for _ in range(4)]
    before = bits(parameters)
    for number in range(1, 60):
        copies = [torch.zeros(2) for _ in parameters]

        def work(copies=copies):
            with Evaluator(parameters, list("abcd")).pointing_to(copies):
                assert bits(parameters) != before

        try:
            if not interrupted_at(number, work):
                break
        except KeyboardInterrupt:
            pass
        assert bits(parameters) == before
    assert number > 5
