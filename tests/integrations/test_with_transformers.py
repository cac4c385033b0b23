"""`watch` in a real Trainer: training is bitwise what it was, and h is right."""

from __future__ import annotations

import copy
import warnings

import pytest
import torch
import transformers
from transformers import GPT2Config, GPT2LMHeadModel, Trainer, TrainingArguments
from transformers.utils import logging

import lyapcuda
from lyapcuda.command.problem import Problem
from lyapcuda.command.weights import load_weights
from lyapcuda.integrations.transformers import FILE, watch

logging.set_verbosity_error()
logging.disable_progress_bar()

IDS = torch.randint(0, 40, (8, 10), generator=torch.Generator().manual_seed(0))


class Rows(torch.utils.data.Dataset):
    def __len__(self):
        return len(IDS)

    def __getitem__(self, i):
        return {"input_ids": IDS[i], "labels": IDS[i]}


def model(dropout=0.1):
    torch.manual_seed(1)
    config = GPT2Config(
        vocab_size=40,
        n_positions=10,
        n_embd=16,
        n_layer=2,
        n_head=2,
        initializer_range=0.15,
        bos_token_id=0,
        eos_token_id=0,
        **dict.fromkeys(("resid_pdrop", "embd_pdrop", "attn_pdrop"), dropout),
    )
    return GPT2LMHeadModel(config)


def trainer_of(net, folder, **changed):
    options = {
        "output_dir": str(folder),
        "max_steps": 4,
        "per_device_train_batch_size": 8,
        "learning_rate": 0.05,
        "optim": "sgd",
        "lr_scheduler_type": "constant",
        "use_cpu": True,
        "report_to": [],
        "save_strategy": "no",
        "logging_steps": 1,
        "disable_tqdm": True,
        "dataloader_pin_memory": False,
        **changed,
    }
    return Trainer(model=net, args=TrainingArguments(**options), train_dataset=Rows())


def trained(folder, watched, dropout=0.1, **changed):
    """The trainer after training, and its watch; what training left, to the bit."""
    trainer = trainer_of(model(dropout), folder, **changed)
    found = watch(trainer) if watched else None
    torch.manual_seed(3)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        trainer.train()
    rows = [
        {k: v for k, v in row.items() if not k.startswith("curvature") and "loss" in k}
        for row in trainer.state.log_history
        if "loss" in row
    ]
    left = [p.detach().clone() for p in trainer.model.parameters()]
    return trainer, found, (left, rows, torch.get_rng_state())


def same(a, b):
    return all(torch.equal(x, y) for x, y in zip(a[0], b[0], strict=True)) and (
        a[1] == b[1] and torch.equal(a[2], b[2])
    )


CASES = {
    "plain": {},
    "clipped": {"max_grad_norm": 0.1},
    "adamw": {"optim": "adamw_torch", "learning_rate": 1e-3},
    "accumulation": {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 4},
    "bf16": {"bf16": True},
    "checkpointing": {"gradient_checkpointing": True},
}


@pytest.mark.parametrize("case", CASES)
def test_training_is_bitwise_what_it_was_and_the_rows_have_the_curvature(tmp_path, case):
    _, _, plain = trained(tmp_path / "a", False, **CASES[case])
    trainer, found, watched = trained(tmp_path / "b", True, **CASES[case])
    assert same(plain, watched)
    rows = [row for row in trainer.state.log_history if "loss" in row]
    first = 2 if case == "adamw" else 1  # before its first step Adam has no preconditioner
    for row in rows[first - 1 :]:
        assert row["curvature/h_low"] <= row["curvature/h"] <= row["curvature/h_high"]
        assert "curvature/edge" in row
    assert [row["step"] for row in rows] == [1, 2, 3, 4]
    assert int(found.tracker.steps) == 4 - (first - 1)


def test_the_edge_is_that_of_the_steps_own_rate(tmp_path):
    trainer, found, _ = trained(tmp_path, True, lr_scheduler_type="linear")
    rows = [row for row in trainer.state.log_history if "loss" in row]
    assert [row["learning_rate"] for row in rows] == pytest.approx([0.05, 0.0375, 0.025, 0.0125])
    for row in rows:
        edge = row["learning_rate"] * row["curvature/h"] / 2
        assert row["curvature/edge"] == pytest.approx(edge)
    assert [row["curvature/h"] for row in rows] == pytest.approx(found.tracker.history().h.tolist())


@pytest.mark.parametrize("batch", [8, 4])
def test_h_is_that_of_the_loss_of_a_micro_batch(tmp_path, batch):
    """With accumulation, of the last of them: the model stands still, the rows come as they are.
    The trainer divides by the number of labels, of which every row's first has no loss.
    """
    changed = {"learning_rate": 0.0, "max_steps": 100, "logging_steps": 100, "save_strategy": "no"}
    changed |= {"per_device_train_batch_size": batch, "gradient_accumulation_steps": 8 // batch}
    trainer = trainer_of(model(0.0), tmp_path, **changed)
    trainer._get_train_sampler = lambda *_: torch.utils.data.SequentialSampler(IDS)
    found = watch(trainer)
    trainer.train()
    net, rows = copy.deepcopy(trainer.model).double(), IDS[-batch:]
    true = lyapcuda.eigsh(lambda: net(input_ids=rows, labels=rows).loss, net.parameters())
    assert float(found.tracker.h) == pytest.approx(0.9 * float(true.eigenvalues[0]), rel=0.01)


def test_a_resumed_run_goes_on_where_the_tracker_was(tmp_path):
    changed = {"save_strategy": "steps", "save_steps": 2, "max_steps": 4}
    whole, found, _ = trained(tmp_path / "whole", True, dropout=0.0, **changed)
    assert (tmp_path / "whole" / "checkpoint-2" / FILE).exists()
    trainer = trainer_of(model(0.0), tmp_path / "whole", **changed)
    again = watch(trainer)
    torch.manual_seed(3)  # of the order of the rows
    trainer.train(resume_from_checkpoint=str(tmp_path / "whole" / "checkpoint-2"))
    assert again.tracker.calls == found.tracker.calls == 4
    assert torch.equal(again.tracker.h, found.tracker.h)
    for a, b in zip(trainer.model.parameters(), whole.model.parameters(), strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("parts", [1, 2])
def test_an_exception_of_the_model_leaves_everything_as_it_was(tmp_path, parts):
    changed = {"per_device_train_batch_size": 4, "gradient_accumulation_steps": parts}
    trainer, found, _ = trained(tmp_path, True, **changed)
    batch = {"input_ids": IDS[:4], "labels": IDS[:4]}
    trainer.training_step(trainer.model, batch)
    before = [p.grad.clone() for p in trainer.model.parameters()]
    h, calls, random = found.tracker.h.clone(), found.tracker.calls, torch.get_rng_state()

    def broken(*args, **kwargs):
        raise ZeroDivisionError("here")

    trainer.model.transformer.ln_f.forward = broken
    with pytest.raises(ZeroDivisionError, match="here"):
        trainer.training_step(trainer.model, batch)
    assert torch.equal(torch.get_rng_state(), random)
    assert torch.equal(found.tracker.h, h) and found.tracker.calls == calls
    for p, grad in zip(trainer.model.parameters(), before, strict=True):
        assert torch.equal(p.grad, grad)


def test_remove_leaves_the_trainer_as_it_was(tmp_path):
    trainer = trainer_of(model(), tmp_path)
    before, callbacks = dict(vars(trainer)), list(trainer.callback_handler.callbacks)
    watch(trainer, every=2).remove()
    assert vars(trainer).keys() == before.keys()
    assert trainer.callback_handler.callbacks == callbacks


def test_bad_arguments_are_named_before_anything_changes(tmp_path):
    trainer = trainer_of(model(), tmp_path)
    before = dict(vars(trainer))
    with pytest.raises(TypeError, match="trainer=<GPT2LMHeadModel>"):
        watch(trainer.model)
    with pytest.raises(TypeError, match="tracker=3"):
        watch(trainer, 3)
    tracker = lyapcuda.CurvatureTracker(trainer.model)
    with pytest.raises(ValueError, match="every: an option"):
        watch(trainer, tracker, every=2)
    assert dict(vars(trainer)) == before


def test_the_command_line_reads_what_is_saved(tmp_path):
    """GPT-2's head is its embedding, which a file has once; a size in bytes makes it several."""
    saved = model()
    torch.nn.init.normal_(saved.lm_head.weight)
    saved.save_pretrained(tmp_path / "one")
    saved.save_pretrained(tmp_path / "several", max_shard_size=5000)
    assert len(list((tmp_path / "several").glob("*.safetensors"))) > 1
    for folder in ("one", "several"):
        net = model()
        load_weights(net, tmp_path / folder)
        left = saved.state_dict()
        assert all(torch.equal(value, left[name]) for name, value in net.state_dict().items())
    body = model().transformer
    load_weights(body, tmp_path / "one")
    assert torch.equal(body.wte.weight, saved.lm_head.weight)


def test_the_command_line_takes_its_loss():
    batch = transformers.BatchEncoding({"input_ids": IDS, "labels": IDS})
    net = model(dropout=0.0)
    assert Problem(net, None, [batch], 0.0, {}).closure(batch) == net(**batch).loss
    with pytest.raises(ValueError, match="without a loss; .*They have input_ids"):
        Problem(net, None, [], 0.0, {}).closure({"input_ids": IDS})


def test_remove_gives_back_what_was_the_users_own(tmp_path):
    trainer = trainer_of(model(), tmp_path)
    trainer.log = mine = lambda *_: None
    first = watch(trainer)
    second = watch(trainer)
    with pytest.raises(RuntimeError, match="training_step was replaced after watch"):
        first.remove()
    second.remove()
    first.remove()
    assert trainer.log is mine and "train" not in vars(trainer)
