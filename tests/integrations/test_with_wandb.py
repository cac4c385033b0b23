"""`WandbWriter` with the real package, offline."""

from __future__ import annotations

import json
import struct
import time

import pytest
import torch
import wandb
from wandb.proto import wandb_internal_pb2

import lyapcuda
from lyapcuda.integrations.wandb import WandbWriter, readings


@pytest.fixture
def run(tmp_path):
    return wandb.init(project="curvature", mode="offline", dir=tmp_path)


P = torch.nn.Parameter(torch.tensor([1.0, 2.0]))


def loss():
    return (P**4).sum()


def test_rows_of_their_own_come_late_and_leave_the_users_rows_alone(run, tmp_path):
    tracker = lyapcuda.CurvatureTracker([P], every=2)
    with lyapcuda.CurvatureLog(tracker, WandbWriter(run), every=3):
        for step in range(1, 11):
            tracker.step(loss)
            run.log({"mine": step})
    run.finish()
    rows = list(written(tmp_path))
    assert [row["mine"] for row in rows if "mine" in row] == list(range(1, 11))
    ours = [row for row in rows if "curvature/h" in row]
    assert [row["curvature/step"] for row in ours] == [1, 3, 5, 7, 9]
    assert [row["curvature/h"] for row in ours] == tracker.history().h.tolist()


def test_readings_join_the_users_rows_at_the_users_step(run, tmp_path):
    tracker, h = lyapcuda.CurvatureTracker([P]), []
    for step in range(100, 110, 2):
        tracker.step(loss)
        h.append(float(tracker.h))
        run.log({"mine": step, **readings(tracker)}, step=step)
    run.finish()
    rows = list(written(tmp_path))
    assert [row["_step"] for row in rows] == [row["mine"] for row in rows] == [*range(100, 110, 2)]
    assert [row["curvature/h"] for row in rows] == pytest.approx(h)


def written(folder):
    """The rows of history of an offline run; `run.finish` may return before the file is whole."""
    path, until = next(folder.rglob("*.wandb")), time.monotonic() + 30
    while not (found := records(path.read_bytes())) or not found[-1].HasField("exit"):
        assert time.monotonic() < until, f"{len(found)} records, and no end"
        time.sleep(0.05)
    for items in (record.history.item for record in found):
        if items:
            yield {i.key or "/".join(i.nested_key): json.loads(i.value_json) for i in items}


def records(data):
    """Those of a file in LevelDB's log format, behind 7 bytes."""
    found, at, whole = [], 7, b""
    while at + 7 <= len(data):
        if 32768 - at % 32768 < 7:  # a header doesn't cross a block
            at += 32768 - at % 32768
        size, kind = struct.unpack_from("<HB", data, at + 4)
        whole, at = whole + data[at + 7 : at + 7 + size], at + 7 + size
        if at > len(data):
            break  # not all of it is there yet
        if kind in (1, 4):  # whole, or the last of its parts
            found.append(wandb_internal_pb2.Record.FromString(whole))
            whole = b""
    return found


def test_another_thing_is_refused():
    with pytest.raises(TypeError, match="run=3: expected the run"):
        WandbWriter(3)
