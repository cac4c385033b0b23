"""Faults of saved states and files: what doesn't fit, is cut off or damaged; processes killed and
disks full while a file is written."""

import errno
import io
import os
import pickle
import random
import signal
import sys
import time

import pytest
import torch
from torch import nn

import lyapcuda
import nets
import simt_library
from examples.paper import checkpoint
from fault_cases import bits, bowl, state_of, steps
from lyapcuda.files import replace_file

NO_GPU = simt_library.missing("cuda")
gpu = pytest.mark.skipif(NO_GPU is not None, reason=str(NO_GPU))
posix = pytest.mark.skipif(sys.platform == "win32", reason="needs fork and signals")


def tracked(dtype=torch.float32, steps_taken=6, device="cpu", **options):
    """(tracker, closure) in the midst of a run."""
    case = nets.case("tanh_mlp", 4, dtype)
    model = case.model.to(device)
    x = torch.randn(32, 6, generator=torch.Generator().manual_seed(0)).to(device, dtype)
    tracker = lyapcuda.CurvatureTracker(model.parameters(), **options)

    def closure():
        return model(x).float().square().mean()

    steps(tracker, closure, steps_taken)
    return tracker, closure


def through_a_file(saved, path, **options):
    torch.save(saved, path)
    return torch.load(path, weights_only=True, **options)


# --- round trips ---------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32, torch.float64])
@pytest.mark.parametrize("options", [{}, {"k": 2, "momentum": 0.5}], ids=str)
def test_a_state_goes_on_to_the_bit_whatever_the_parameters_dtype(
    backend, dtype, options, tmp_path
):
    tracker, closure = tracked(dtype, **options)
    resumed = lyapcuda.CurvatureTracker(tracker.parameters, seed=9, **options)
    resumed.load_state_dict(through_a_file(tracker.state_dict(), tmp_path / "state.pt"))
    assert state_of(resumed) == state_of(tracker)
    for t in (tracker, resumed):
        steps(t, closure, 3)
    assert state_of(resumed) == state_of(tracker)
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    assert all(q.dtype == wide for part in tracker.state_dict()["separations"] for q in part["q"])


@pytest.mark.parametrize("k", [1, 3])
def test_a_reseeded_separation_is_saved(backend, k, tmp_path):
    """Right after a separation was replaced, before the next step."""
    theta, closure = bowl()
    tracker = lyapcuda.CurvatureTracker([theta], k=k)
    steps(tracker, closure, 3)
    saved = tracker.state_dict()
    (q,) = saved["separations"][0]["q"]
    (q if k == 1 else q[2]).zero_()
    tracker.load_state_dict(saved)
    tracker.step(closure)
    assert int(tracker.reseeds) == 1
    resumed = lyapcuda.CurvatureTracker([theta], k=k)
    resumed.load_state_dict(through_a_file(tracker.state_dict(), tmp_path / "state.pt"))
    for t in (tracker, resumed):
        steps(t, closure, 5)
    assert state_of(resumed) == state_of(tracker)


@gpu
@pytest.mark.parametrize("k", [1, 3])
def test_a_cpu_checkpoint_goes_on_on_a_device(k, tmp_path):
    tracker, closure = tracked(torch.float64, k=k)
    path = tmp_path / "state.pt"
    torch.save(tracker.state_dict(), path)
    there, closure_there = tracked(torch.float64, steps_taken=0, device="cuda", k=k)
    for where in ("cpu", "cuda"):
        there.load_state_dict(torch.load(path, map_location=where, weights_only=True))
        assert there.state.is_cuda
    for t, c in ((tracker, closure), (there, closure_there)):
        steps(t, c, 5)
    torch.testing.assert_close(there.h.cpu(), tracker.h, rtol=1e-6, atol=0)


def test_a_state_of_other_numbers_on_another_device_lands_on_the_trackers(tmp_path):
    """Without a GPU: what map_location gives is copied, never adopted."""
    tracker, _ = tracked()
    saved = through_a_file(tracker.state_dict(), tmp_path / "state.pt", map_location="cpu")
    other, closure = tracked(seed=5)
    pointers = [part.q.data_ptr() for part in next(iter(other.separations))._groups]
    other.load_state_dict(saved)
    assert [part.q.data_ptr() for part in next(iter(other.separations))._groups] == pointers
    before = bits(saved)
    steps(other, closure, 3)
    assert bits(saved) == before


# --- what doesn't fit ----------------------------------------------------------------------------


def nested(saved, *path):
    for key in path[:-1]:
        saved = saved[key]
    return saved, path[-1]


def put(*path, value):
    def change(saved):
        inner, key = nested(saved, *path)
        inner[key] = value

    return change


def drop(*path):
    def change(saved):
        inner, key = nested(saved, *path)
        del inner[key]

    return change


def spoil(field):
    def change(saved):
        k, state = saved["k"], saved["separations"][0]["state"]
        lyapcuda.ops.state_field(state, k, field).fill_(float("nan"))

    return change


FIRST = ("separations", 0)
DAMAGE = {
    "another k": (put("k", value=4), "k is 4"),
    "another end": (put("which", value="SA"), "which is 'SA'"),
    "another estimate": (put("estimate", value="paper"), "estimate is 'paper'"),
    "other sizes": (put("sizes", value=[[3, 3]]), r"sizes is \[\[3, 3\]\]"),
    "no format": (drop("format"), "not the state of a CurvatureTracker"),
    "an older format": (put("format", value=1), "of format 1, .*reads 9"),
    "no calls": (drop("calls"), r"lacks \['calls'\]"),
    "calls of text": (put("calls", value="12"), "calls='12'"),
    "calls below 0": (put("calls", value=-1), "calls=-1"),
    "no separations": (drop("separations"), r"lacks \['separations'\]"),
    "a number for separations": (put("separations", value=3), "separations=3"),
    "nothing for a separation": (
        put("separations", value=[None]),
        "expected a dictionary, got a NoneType",
    ),
    "too many separations": (put("separations", value=[{}, {}, {}]), "separations=<list of 3>"),
    "no state": (drop(*FIRST, "state"), r"lacks \['state'\]"),
    "a state too short": (put(*FIRST, "state", value=torch.zeros(3)), r"state holds .*\(3,\)"),
    "a list for a state": (put(*FIRST, "state", value=[1.0]), "state holds a list"),
    "no q": (drop(*FIRST, "q"), r"lacks \['q'\]"),
    "text for q": (put(*FIRST, "q", value="q"), "q is a str"),
    "q of other shape": (put(*FIRST, "q", value=[torch.zeros(5)]), "q holds 1 tensors"),
    "q of no tensors": (put(*FIRST, "q", value=[1.0]), "q holds a float"),
    "q missing": (put(*FIRST, "q", value=[None]), "q holds 1 tensors"),
    "q not finite": (lambda s: s["separations"][0]["q"][0].fill_(float("inf")), "q isn't finite"),
    "beta not finite": (spoil("beta"), "state isn't finite"),
    "perturbation not finite": (spoil("perturbation"), "state isn't finite"),
    "transform not finite": (spoil("transform"), "state isn't finite"),
    "p for a tracker without momentum": (
        lambda s: s["separations"][0].update(p=[torch.zeros(3)]),
        "p holds",
    ),
}


@pytest.mark.parametrize("k", [1, 2])
@pytest.mark.parametrize("damage", DAMAGE)
def test_a_state_that_does_not_fit_is_refused_and_changes_nothing(damage, k):
    change, message = DAMAGE[damage]
    tracker, closure = tracked(k=k, steps_taken=2)
    fresh = lyapcuda.CurvatureTracker(tracker.parameters, k=k)
    saved = tracker.state_dict()
    change(saved)
    for t in (tracker, fresh):
        before = state_of(t)
        with pytest.raises(ValueError, match=f"state_dict: .*{message}"):
            t.load_state_dict(saved)
        assert state_of(t) == before
    steps(fresh, closure, 2)
    assert state_of(fresh) == state_of(tracker)


@pytest.mark.parametrize("share", [0.0, 0.01, 0.5, 0.9, 0.999])
def test_a_truncated_checkpoint_is_an_error_not_a_state(share, tmp_path):
    """Of a tracker's own state, and of a training run's file."""
    tracker, _ = tracked()
    buffer = io.BytesIO()
    torch.save(tracker.state_dict(), buffer)
    whole = buffer.getvalue()
    path = tmp_path / "cut.pt"
    path.write_bytes(whole[: int(len(whole) * share)])
    with pytest.raises((RuntimeError, EOFError, pickle.UnpicklingError, OSError)):
        torch.load(path, weights_only=True)
    with pytest.raises(ValueError, match="cut.pt: not a readable checkpoint"):
        checkpoint.load(path)


# --- while a file is written ---------------------------------------------------------------------

ENTRIES = ("config", "fingerprint", "step", "model", "schedule", "loader", "rng")


def content(step):
    kinds = {"fingerprint": "x", "step": step}
    entries = {name: kinds.get(name, {}) for name in ENTRIES}
    return entries | {"model": {"w": torch.full((20000,), float(step))}}


def check_whole(path):
    saved = checkpoint.load(path)
    assert bool((saved["model"]["w"] == saved["step"]).all())
    return saved["step"]


def in_a_child(work):
    """Runs it in a forked process, which never returns from here; its pid."""
    pid = os.fork()
    if pid == 0:
        try:
            os._exit(work() or 0)
        finally:
            os._exit(99)
    return pid


@posix
def test_kill_9_in_the_midst_of_a_write_leaves_the_previous_checkpoint(tmp_path):
    path = tmp_path / "checkpoint.pt"
    checkpoint.save(path, content(1))
    before = path.read_bytes()
    reader, writer = os.pipe()

    def half(file):
        file.write(before[: len(before) // 2])
        file.flush()
        os.write(writer, b"x")
        time.sleep(60)

    pid = in_a_child(lambda: replace_file(path, half))
    assert os.read(reader, 1) == b"x"  # half of the new file is on the disk
    os.kill(pid, signal.SIGKILL)
    assert os.WTERMSIG(os.waitpid(pid, 0)[1]) == signal.SIGKILL
    os.close(reader)
    os.close(writer)
    assert path.read_bytes() == before and check_whole(path) == 1
    checkpoint.save(path, content(2))
    assert check_whole(path) == 2


@posix
def test_kill_9_at_any_moment_leaves_a_whole_checkpoint(tmp_path):
    """25 processes that write without end, each killed at a random moment."""
    path = tmp_path / "checkpoint.pt"
    checkpoint.save(path, content(0))
    rng, seen = random.Random(0), set()
    for round in range(25):

        def write(first=100 * round):
            for step in range(first, first + 10**6):
                checkpoint.save(path, content(step))

        pid = in_a_child(write)
        time.sleep(rng.uniform(0.0, 0.04))
        os.kill(pid, signal.SIGKILL)
        os.waitpid(pid, 0)
        seen.add(check_whole(path))
    assert len(seen) > 1  # some were written


@posix
@pytest.mark.parametrize("room", [0, 100, 5000, 60000])
def test_a_full_disk_is_an_oserror_that_names_the_file_and_leaves_the_previous(tmp_path, room):
    """The kernel refuses every byte beyond ``room``, as it does on a full disk (RLIMIT_FSIZE)."""
    import resource

    path = tmp_path / "checkpoint.pt"
    checkpoint.save(path, content(1))
    before = path.read_bytes()
    assert len(before) > 60000

    def fill():
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (room, resource.RLIM_INFINITY))
        try:
            checkpoint.save(path, content(2))
        except OSError as error:
            named = error.errno == errno.EFBIG and str(path) in str(error)
            return 0 if named and os.listdir(tmp_path) == ["checkpoint.pt"] else 1
        return 2

    pid = in_a_child(fill)
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 0
    assert path.read_bytes() == before and check_whole(path) == 1


@posix
def test_a_disk_without_room_is_an_oserror_too():
    """/dev/full answers every write as a full disk does."""
    if not os.path.exists("/dev/full"):
        pytest.skip("no /dev/full here")
    with open("/dev/full", "wb", buffering=0) as file, pytest.raises(OSError) as caught:
        file.write(b"x")
    assert caught.value.errno == errno.ENOSPC
    model = nn.Linear(2, 2)
    tracker = lyapcuda.CurvatureTracker(model.parameters())
    before = state_of(tracker)
    with pytest.raises((OSError, RuntimeError)):  # torch.save's own errors
        torch.save(tracker.state_dict(), "/dev/full")
    assert state_of(tracker) == before
