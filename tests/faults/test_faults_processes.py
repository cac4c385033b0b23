"""Faults of running beside others: DataLoader workers, forked processes, threads."""

import os
import signal
import sys
import threading
import time

import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, Dataset

import lyapcuda
import nets
from fault_cases import bits, bowl, state_of, steps, surroundings

posix = pytest.mark.skipif(sys.platform == "win32", reason="needs fork")
TIMEOUT = 60  # seconds that no test here needs; a hang is a failure, not a wait


class Noise(Dataset):
    """Rows of random numbers, and random noise on each, as augmentation has it."""

    def __init__(self, n=24):
        self.x = torch.randn(n, 4, generator=torch.Generator().manual_seed(0))

    def __len__(self):
        return len(self.x)

    def __getitem__(self, i):
        return self.x[i] + 0.1 * torch.randn(4)


class Measuring(Noise):
    """A dataset whose every row is weighed by a measurement of its own, taken in the worker."""

    def __getitem__(self, i):
        theta, closure = bowl([3.0, 3.0, 3.0])
        tracker = lyapcuda.CurvatureTracker([theta], k=2)
        steps(tracker, closure, 3)
        assert int(tracker.steps) == 3
        return self.x[i] * float(tracker.h[0])


def trained(context, track):
    """Losses and last parameters of two epochs over workers of that kind."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 6), nn.Dropout(0.1), nn.Linear(6, 1))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    loader = DataLoader(
        Noise(), batch_size=8, shuffle=True, num_workers=2, multiprocessing_context=context,
        timeout=TIMEOUT, persistent_workers=True,
    )  # fmt: skip
    tracker = lyapcuda.CurvatureTracker(model.parameters(), k=2)
    losses = []
    for _ in range(2):
        for x in loader:
            optimizer.zero_grad()
            if track:
                loss = tracker.step(lambda x=x: model(x).square().mean(), leave_grad=True)
            else:
                loss = model(x).square().mean()
                loss.backward()
            optimizer.step()
            losses.append(float(loss.detach()))
    if track:
        assert int(tracker.steps) == 6 and tracker.h.isfinite().all()
    return losses, bits(list(model.parameters()))


@pytest.fixture(scope="module")
def untracked():
    return trained("fork", False)


@posix
@pytest.mark.slow
@pytest.mark.parametrize("context", ["fork", "spawn"])
def test_training_over_dataloader_workers_is_bitwise_what_it_is_without(context, untracked):
    """Shuffling, the workers' seeds and dropout all come from the global generator."""
    assert trained(context, True) == untracked


@pytest.mark.parametrize("context", [pytest.param("fork", marks=posix), "spawn"])
@pytest.mark.parametrize("measure", [1, 2])
def test_workers_can_measure_themselves(context, measure):
    """The ops run in a worker that was forked from a process whose threads were at work."""
    if measure == 2 and context == "spawn":
        pytest.skip("a spawned worker has no threads of its parent's")
    threads = torch.get_num_threads()
    torch.set_num_threads(measure)
    try:
        big = torch.ones(400000)
        lyapcuda.ops.gram(big[None], big[None])  # with threads of the pool
        loader = DataLoader(
            Measuring(6), batch_size=3, num_workers=1, multiprocessing_context=context,
            timeout=TIMEOUT,
        )  # fmt: skip
        rows = torch.cat(list(loader))
        torch.testing.assert_close(rows, Measuring(6).x * 3.0, rtol=1e-5, atol=1e-6)
    finally:
        torch.set_num_threads(threads)


@posix
def test_eigsh_over_a_loader_with_forked_workers():
    """Every product rewinds the loader: the same batches, in the same order."""
    torch.manual_seed(0)
    model = nn.Linear(4, 1, bias=False).double()
    rows = torch.randn(12, 4, generator=torch.Generator().manual_seed(1)).double()
    loader = DataLoader(
        list(rows), batch_size=4, shuffle=True, num_workers=1, multiprocessing_context="fork",
        timeout=TIMEOUT,
    )  # fmt: skip
    result = lyapcuda.eigsh(
        lambda x: model(x).square().mean(), model.parameters(), k=2, data=loader
    )
    exact = torch.linalg.eigvalsh(2 * rows.T @ rows / 12).flip(0)[:2]
    torch.testing.assert_close(torch.as_tensor(result.eigenvalues), exact, rtol=1e-4, atol=0)


@posix
def test_a_forked_copy_of_a_tracker_goes_on_by_itself():
    """A process that forks in the midst of a run: parent and child take the same next step."""
    theta, closure = bowl(2)
    tracker = lyapcuda.CurvatureTracker([theta], k=2, debug=False)
    steps(tracker, closure, 3)
    twin = lyapcuda.CurvatureTracker([theta], k=2, debug=False)
    twin.load_state_dict(tracker.state_dict())
    gradient = theta.detach() * torch.tensor([5.0, 4.5, 0.2, 0.1, 0.0, -0.1], dtype=theta.dtype)

    def plain():  # (autograd's own threads don't outlive a fork)
        theta.grad = theta.detach() * torch.tensor([5.0, 4.5, 0.2, 0.1, 0.0, -0.1]).double()
        return 1.0

    assert gradient.shape == theta.shape
    reader, writer = os.pipe()
    pid = os.fork()
    if pid == 0:
        try:
            steps(tracker, plain, 2)
            os.write(writer, tracker.h.numpy().tobytes())
        finally:
            os._exit(0)
    os.close(writer)
    deadline, child = time.monotonic() + TIMEOUT, 0
    while not child and time.monotonic() < deadline:
        child, _ = os.waitpid(pid, os.WNOHANG)
        time.sleep(0.01)
    if not child:
        os.kill(pid, signal.SIGKILL)
        os.waitpid(pid, 0)
    steps(twin, plain, 2)
    assert child == pid and os.read(reader, 64) == twin.h.numpy().tobytes()
    os.close(reader)
    steps(tracker, plain, 2)
    assert bits(tracker.h) == bits(twin.h)


def test_a_measurement_inside_a_graph_capture_is_an_error(monkeypatch):
    """What is asked of torch there, answered here as on a GPU."""
    theta, closure = bowl()
    tracker = lyapcuda.CurvatureTracker([theta])
    tracker.step(closure)
    before, state = surroundings([theta]), state_of(tracker)
    with monkeypatch.context() as patched:
        patched.setattr(torch.cuda, "is_available", lambda: True)
        patched.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
        with pytest.raises(RuntimeError, match="can't be captured in a CUDA graph"):
            tracker.step(closure)
    assert surroundings([theta]) == before and state_of(tracker) == state
    tracker.step(closure)


# --- threads -------------------------------------------------------------------------------------


def in_threads(*work):
    """Runs each in a thread of its own, all at once; raises what one of them raised."""
    barrier, errors = threading.Barrier(len(work)), []

    def run(function):
        try:
            barrier.wait(TIMEOUT)
            function()
        except BaseException as error:
            errors.append(error)

    threads = [threading.Thread(target=run, args=(function,), daemon=True) for function in work]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(TIMEOUT)
        assert not thread.is_alive(), "a thread hangs"
    if errors:
        raise errors[0]


@pytest.mark.parametrize("k", [1, 2])
def test_trackers_of_separate_models_in_threads_are_what_each_is_alone(k):
    def problem(seed):
        case = nets.case("tanh_mlp", seed)
        return lyapcuda.CurvatureTracker(case.model.parameters(), k=k, model=case.model), case

    alone = []
    for seed in range(4):
        tracker, case = problem(seed)
        steps(tracker, case.closure, 12)
        alone.append(state_of(tracker))
    together = [problem(seed) for seed in range(4)]
    before = [surroundings(case.model.parameters())[:3] for _, case in together]
    in_threads(*(lambda t=t, c=c: steps(t, c.closure, 12) for t, c in together))
    assert [state_of(tracker) for tracker, _ in together] == alone
    assert [surroundings(case.model.parameters())[:3] for _, case in together] == before


def test_modules_are_found_while_other_threads_make_some():
    """Without ``model=`` a tracker asks the garbage collector for the modules."""
    stop = threading.Event()

    def make():
        while not stop.is_set():
            nn.Sequential(nn.Linear(2, 2), nn.BatchNorm1d(2))

    def measure():
        try:
            for seed in range(5):
                case = nets.case("linear", seed)
                tracker = lyapcuda.CurvatureTracker(case.model.parameters())
                steps(tracker, case.closure, 2)
        finally:
            stop.set()

    in_threads(measure, make, make)


@pytest.mark.parametrize("k", [1, 2])
def test_one_tracker_from_two_threads_takes_one_step_after_the_other(k):
    theta, closure = bowl(k)
    tracker, twin = (lyapcuda.CurvatureTracker([theta], k=k) for _ in range(2))
    inside, most = 0, 0

    def watched():
        nonlocal inside, most
        inside += 1
        most = max(most, inside)
        time.sleep(0.001)  # lets the other thread run, if it may
        inside -= 1
        return closure()

    before = surroundings([theta])
    in_threads(*[lambda: steps(tracker, watched, 10)] * 3)
    steps(twin, closure, 30)
    assert most == 1 and int(tracker.steps) == 30
    assert state_of(tracker) == state_of(twin) and surroundings([theta]) == before


def test_a_thread_that_fails_lets_the_next_one_go_on():
    theta, closure = bowl()
    tracker = lyapcuda.CurvatureTracker([theta])
    failures = []

    def failing():
        for _ in range(5):
            with pytest.raises(ZeroDivisionError):
                tracker.step(lambda: 1 / 0)
            failures.append(1)

    in_threads(failing, lambda: steps(tracker, closure, 5), failing)
    assert len(failures) == 10 and int(tracker.steps) == 5
