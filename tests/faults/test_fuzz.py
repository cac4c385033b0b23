"""A few hundred damaged files for every reader (bench/robustness.py reads 1e5), and that the watch
kept on them sees what it should.
"""

import os
import pickle

import pytest
import torch

import fuzz
from examples.paper import checkpoint


@pytest.mark.parametrize(("kind", "count"), [("bin", 600), ("pickle", 1500), ("checkpoint", 300)])
def test_damaged_files_are_refused_or_read_right(kind, count):
    counts = fuzz.fuzz(kind, count)
    assert sum(counts.values()) == count
    assert counts["refused"] > count // 10 and counts["read"] > 0


class _Run:
    def __reduce__(self):
        return os.system, ("true",)


def test_an_unguarded_unpickler_would_be_caught(monkeypatch):
    monkeypatch.setattr(fuzz, "seeds", lambda kind: [pickle.dumps(_Run())])
    monkeypatch.setattr(fuzz, "mutated", lambda whole, rng: whole)
    monkeypatch.setitem(
        fuzz.READERS, "pickle", (lambda path: pickle.loads(path.read_bytes()), lambda result: True)
    )
    with pytest.raises(AssertionError, match=r"os\.system"):
        fuzz.fuzz("pickle", 1)


def test_checkpoints_are_loaded_with_weights_only(tmp_path, monkeypatch):
    path = tmp_path / "checkpoint.pt"
    path.write_bytes(fuzz.seeds("checkpoint")[0])
    options = []
    load = torch.load

    def watched(*args, **kwargs):
        options.append(kwargs)
        return load(*args, **kwargs)

    monkeypatch.setattr(torch, "load", watched)
    assert checkpoint.load(path)["config"] == {"model": "mlp"}
    assert [o["weights_only"] for o in options] == [True]
    torch.save({"format": checkpoint.FORMAT, "version": checkpoint.VERSION, "x": _Run()}, path)
    with pytest.raises(ValueError, match="not a readable checkpoint"):
        checkpoint.load(path)
