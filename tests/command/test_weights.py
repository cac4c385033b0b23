"""Checkpoints in the layouts that trainers leave behind: read, or told apart in one sentence."""

from __future__ import annotations

import argparse
import json
import os
import sys
import textwrap
import warnings
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn
from torch.distributed import checkpoint
from torch.distributed.checkpoint.format_utils import dcp_to_torch_save
from torch.nn.parallel import DistributedDataParallel
from torch.optim.swa_utils import AveragedModel

from lyapcuda.__main__ import main
from lyapcuda.command.weights import load_weights

safetensors = pytest.importorskip("safetensors.torch")


class Tied(nn.Module):
    """Its head is its embedding."""

    def __init__(self):
        super().__init__()
        self.embedding, self.head = nn.Embedding(7, 4), nn.Linear(4, 7, bias=False)
        self.head.weight = self.embedding.weight


def net(seed=0, width=6):
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(4, width), nn.BatchNorm1d(width), nn.Linear(width, 3))


TRAINED = net(7)
STATE = TRAINED.state_dict()


def renamed(prefix, state=STATE):
    return {prefix + name: value for name, value in state.items()}


def is_trained(model, state=STATE):
    return all(
        torch.equal(a, b) for a, b in zip(model.state_dict().values(), state.values(), strict=True)
    )


@pytest.fixture
def ddp():
    torch.distributed.init_process_group(
        "gloo", store=torch.distributed.HashStore(), rank=0, world_size=1
    )
    yield DistributedDataParallel(TRAINED)
    torch.distributed.destroy_process_group()


LAYOUTS = {
    "state_dict": STATE,
    "state_dict within": {"epoch": 3, "state_dict": STATE, "optimizer": {"state": {}}},
    "beside tensors": {"epoch": torch.tensor(3), "model": STATE},
    "model_state_dict": {"model_state_dict": STATE},
    "deepspeed": {"module": STATE, "lr_scheduler": None},
    "twice within": {"model": {"state_dict": STATE}},
    "lightning": {"state_dict": renamed("model."), "hyper_parameters": {"path": Path("runs/a")}},
    "torch.compile": torch.compile(TRAINED).state_dict(),
    "DataParallel": nn.DataParallel(TRAINED).state_dict(),
    "DDP of torch.compile": renamed("module._orig_mod."),
    "a part compiled": {n.replace("0.", "0._orig_mod.", 1): v for n, v in STATE.items()},
    "FSDP and activation checkpointing": {
        n.replace("0.", "0._checkpoint_wrapped_module._fsdp_wrapped_module."): v
        for n, v in STATE.items()
    },
    "arguments": {"args": argparse.Namespace(lr=0.1, out=Path("runs")), "model": STATE},
    "numpy": {"best": np.float64(0.9), "seen": np.arange(3), "model": STATE},
    "a whole state of float64": {n: v.double() for n, v in STATE.items()},
}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_common_layouts_are_read_without_a_word(tmp_path, layout):
    torch.save(LAYOUTS[layout], tmp_path / "it.pt")
    model = net()
    assert not is_trained(model)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        load_weights(model, tmp_path / "it.pt")
    assert is_trained(model)


def test_a_model_of_ranks(tmp_path, ddp):
    torch.save({"model": ddp.state_dict()}, tmp_path / "it.pt")
    model = net()
    load_weights(model, tmp_path / "it.pt")
    assert is_trained(model)


def test_a_compiled_model_takes_what_a_plain_one_left(tmp_path):
    torch.save(STATE, tmp_path / "it.pt")
    model = torch.compile(net())
    load_weights(model, tmp_path / "it.pt")
    assert is_trained(model)


def test_safetensors_in_one_file_or_several(tmp_path):
    safetensors.save_file(STATE, tmp_path / "it.safetensors")
    model = net()
    load_weights(model, tmp_path / "it.safetensors")
    assert is_trained(model)

    names = list(STATE)
    for file, part in (("1.safetensors", names[:3]), ("2.safetensors", names[3:])):
        safetensors.save_file({name: STATE[name] for name in part}, tmp_path / file)
    where = {name: f"{1 + (i >= 3)}.safetensors" for i, name in enumerate(names)}
    index = tmp_path / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": where}))
    for path in (index, tmp_path):
        model = net()
        load_weights(model, path)
        assert is_trained(model)

    (tmp_path / "2.safetensors").unlink()
    with pytest.raises(FileNotFoundError, match=r"2\.safetensors: no such file"):
        load_weights(net(), index)
    for text in ("{", "[]", '{"weight_map": {"a": 3}}'):
        index.write_text(text)
        with pytest.raises(ValueError, match=r"index\.json: no index of weights"):
            load_weights(net(), tmp_path)


def test_a_parameter_of_two_names_is_there_once(tmp_path):
    trained = Tied()
    safetensors.save_model(trained, tmp_path / "it.safetensors")
    assert len(safetensors.load_file(tmp_path / "it.safetensors")) == 1
    model = Tied()
    load_weights(model, tmp_path / "it.safetensors")
    assert model.head.weight is model.embedding.weight
    assert torch.equal(model.head.weight, trained.head.weight)

    other = {"embedding.weight": torch.ones(7, 4), "head.weight": torch.zeros(7, 4)}
    torch.save(other, tmp_path / "it.pt")
    with pytest.raises(ValueError, match="embedding.weight, head.weight differ, and are one"):
        load_weights(Tied(), tmp_path / "it.pt")


def test_a_model_that_has_seen_no_data_yet(tmp_path):
    torch.save(nn.Linear(4, 3).state_dict(), tmp_path / "it.pt")
    model = nn.LazyLinear(3)
    load_weights(model, tmp_path / "it.pt")
    assert model.weight.shape == (3, 4)


def test_what_else_a_trainer_holds_is_left_and_named(tmp_path):
    for wrapped, others in (
        (
            {**renamed("model."), "criterion.weight": torch.ones(3)},
            r"model\.\* .*criterion\.weight",
        ),
        (AveragedModel(TRAINED).state_dict(), r"module\.\* .*n_averaged"),
    ):
        torch.save(wrapped, tmp_path / "it.pt")
        model = net()
        with pytest.warns(UserWarning, match=f"only {others}$"):
            load_weights(model, tmp_path / "it.pt")
        assert is_trained(model)


def test_one_of_several_models_by_its_key(tmp_path):
    other = net(8).state_dict()
    within = {"model": other, "ema": {"state_dict": renamed("module.")}}
    beside = {"state_dict": {**renamed("model.", other), **renamed("ema_model.")}}
    for saved, key in ((within, "ema"), (beside, "ema_model")):
        torch.save(saved, tmp_path / "it.pt")
        model = net()
        load_weights(model, tmp_path / "it.pt", key)
        assert is_trained(model)
    with pytest.raises(ValueError, match="several such models.*--weights-key: ema_model, model$"):
        load_weights(net(), tmp_path / "it.pt")
    with pytest.raises(ValueError, match="nothing under 'best'; it has ema_model"):
        load_weights(net(), tmp_path / "it.pt", "best")
    torch.save({"policy": STATE, "value": STATE}, tmp_path / "it.pt")
    with pytest.raises(ValueError, match="it has policy, value: choose by --weights-key"):
        load_weights(net(), tmp_path / "it.pt")
    load_weights(net(), tmp_path / "it.pt", "policy")


OTHERS = {
    "missing": ({n: v for n, v in STATE.items() if n != "2.bias"}, "it lacks 2.bias$"),
    "more": ({**STATE, "3.bias": torch.ones(3)}, "it has 3.bias, which the model hasn't$"),
    "missing within": (
        {"state_dict": {n: v for n, v in renamed("model.").items() if n != "model.2.bias"}},
        "it lacks 2.bias$",
    ),
    "another width": (
        net(0, 8).state_dict(),
        r"0\.weight has shape \(8, 4\), the model's \(6, 4\)",
    ),
    "numbers": ({**STATE, "2.bias": 3.0}, r"2\.bias is a float, the model's is a tensor"),
    "quantized": (
        {**STATE, "0.weight": STATE["0.weight"].to(torch.int8)},
        r"0\.weight is of torch\.int8, the model's of torch\.float32",
    ),
    "an optimizer's": (
        torch.optim.SGD(TRAINED.parameters(), lr=0.1).state_dict(),
        "no weights .*; it has param_groups, state",
    ),
    "nothing": ({}, "no weights .*; it is empty"),
    "a list": ([STATE], "a list, expected a state_dict"),
    "a whole model": (TRAINED, r"objects \(torch\.nn\.modules\.\S+, .*save model.state_dict\(\)"),
}


@pytest.mark.parametrize("case", OTHERS)
def test_what_is_not_this_models_is_told(tmp_path, case):
    saved, words = OTHERS[case]
    torch.save(saved, tmp_path / "it.pt")
    model = net()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    with pytest.raises(ValueError, match=rf"it\.pt: .*{words}"):
        load_weights(model, tmp_path / "it.pt")
    assert is_trained(model, before)


def test_a_whole_model_whose_classes_are_allowed(tmp_path):
    torch.save(TRAINED, tmp_path / "it.pt")
    model = net()
    with torch.serialization.safe_globals([nn.Sequential, nn.Linear, nn.BatchNorm1d]):
        load_weights(model, tmp_path / "it.pt")
    assert is_trained(model)


class Maker:
    """Makes a folder when it is unpickled."""

    def __reduce__(self):
        return os.mkdir, ("made",)


def test_nothing_in_a_checkpoint_is_run(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    torch.save({"model": STATE, "more": Maker()}, "it.pt")
    with pytest.raises(ValueError, match=r"objects \(\w+\.mkdir\)"):
        load_weights(net(), Path("it.pt"))
    assert not Path("made").exists()


def test_files_that_are_no_checkpoints(tmp_path):
    torch.save(STATE, tmp_path / "whole.pt")
    data = (tmp_path / "whole.pt").read_bytes()
    contents = {"cut.pt": data[: len(data) // 2], "empty.pt": b"", "words.pt": b"hello"}
    for name, content in contents.items():
        (tmp_path / name).write_bytes(content)
        with pytest.raises(ValueError, match=f"{name}: can't be read as weights: it is cut off"):
            load_weights(net(), tmp_path / name)
    (tmp_path / "it.safetensors").write_bytes(b"hello")
    with pytest.raises(ValueError, match=r"it\.safetensors: can't be read as weights: .*header"):
        load_weights(net(), tmp_path / "it.safetensors")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of torch.jit's age
        torch.jit.save(torch.jit.trace(TRAINED.eval(), torch.zeros(2, 4)), tmp_path / "script.pt")
    with warnings.catch_warnings(), pytest.raises(ValueError, match="a TorchScript archive"):
        warnings.simplefilter("error")
        load_weights(net(), tmp_path / "script.pt")
    with pytest.raises(FileNotFoundError, match=r"none\.pt: no such file of weights"):
        load_weights(net(), tmp_path / "none.pt")
    (tmp_path / "folder").mkdir()
    with pytest.raises(FileNotFoundError, match=r"a folder without model\.safetensors, pytorch"):
        load_weights(net(), tmp_path / "folder")


def test_a_folder_of_ranks_is_made_a_file_as_the_message_says(tmp_path):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that there is one rank only
        checkpoint.save({"model": STATE}, checkpoint_id=tmp_path / "ranks")
    with pytest.raises(ValueError, match="format_utils dcp_to_torch .*ranks weights.pt$"):
        load_weights(net(), tmp_path / "ranks")
    dcp_to_torch_save(tmp_path / "ranks", tmp_path / "it.pt")
    model = net()
    load_weights(model, tmp_path / "it.pt")
    assert is_trained(model)


FACTORIES = """
    import torch
    from torch import nn

    def net():
        torch.manual_seed(0)
        return nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 3)).double()

    def batches():
        generator = torch.Generator().manual_seed(1)
        x = torch.randn(40, 4, generator=generator, dtype=torch.float64)
        return [(x, torch.randint(0, 3, (40,), generator=generator))]
"""


def test_the_command_reads_them(tmp_path, monkeypatch, capsys):
    """Of two models in one checkpoint, the chosen one's eigenvalue; what is left is one line."""
    monkeypatch.chdir(tmp_path)
    Path("it.py").write_text(textwrap.dedent(FACTORIES))
    names: dict = {}
    exec(textwrap.dedent(FACTORIES), names)
    one, three = names["net"]().state_dict(), names["net"]().state_dict()
    three = {name: 3 * value for name, value in three.items()}
    torch.save({"model": one, "ema": {**renamed("net.", three), "decay": torch.ones(1)}}, "it.pt")
    common = ["eigs", "--model", "it.py:net", "--data", "it.py:batches", "-k", "1", "--json"]

    def value(*arguments):
        assert main([*common, *arguments]) == 0
        out, err = capsys.readouterr()
        return json.loads(out)["eigenvalues"][0], err

    plain, _ = value()
    assert value("--weights", "it.pt") == (pytest.approx(plain), "")
    found, told = value("--weights", "it.pt", "--weights-key", "ema")
    assert abs(found / plain - 1) > 0.05
    assert told == "lyapcuda: warning: it.pt: only net.* is read, not decay\n"
    assert main([*common, "--weights", "it.pt", "--weights-key", "best"]) == 2
    assert "nothing under 'best'" in capsys.readouterr().err
    sys.modules.pop("it", None)
