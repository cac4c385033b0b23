"""`CurvatureCallback` in a real Lightning Trainer: training is bitwise what it was, h is right."""

from __future__ import annotations

import csv
import logging
import warnings
from pathlib import Path

import lightning
import pytest
import torch
import torchmetrics
from lightning.pytorch.loggers import CSVLogger
from torch import nn

import lyapcuda
from lyapcuda.command.weights import load_weights
from lyapcuda.integrations.lightning import CurvatureCallback

logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
warnings.filterwarnings("ignore", module="lightning")

X = torch.randn(64, 10, generator=torch.Generator().manual_seed(0))
Y = torch.randint(0, 3, (64,), generator=torch.Generator().manual_seed(1))


class Net(lightning.LightningModule):
    def __init__(self, lr=0.1, make=torch.optim.SGD, dropout=0.1):
        super().__init__()
        torch.manual_seed(1)
        parts = nn.Linear(10, 16), nn.GELU(), nn.Dropout(dropout), nn.BatchNorm1d(16)
        self.net = nn.Sequential(*(parts if dropout else parts[:2]), nn.Linear(16, 3))
        self.accuracy = torchmetrics.Accuracy("multiclass", num_classes=3)
        self.lr, self.make = lr, make

    def training_step(self, batch, batch_idx):
        out = self.net(batch[0])
        self.accuracy.update(out, batch[1])
        loss = nn.functional.cross_entropy(out, batch[1])
        self.log("loss", loss, on_epoch=True, on_step=False)
        self.log("accuracy", self.accuracy, on_epoch=True, on_step=False)
        return {"loss": loss}

    def configure_optimizers(self):
        return self.make(self.net.parameters(), lr=self.lr)


def fit(folder, net, callback=None, batch=16, epochs=2, checkpoint=None, data=None, **options):
    shuffle, data = data is None, data or torch.utils.data.TensorDataset(X, Y)
    trainer = lightning.Trainer(
        max_epochs=epochs,
        accelerator="cpu",
        logger=CSVLogger(folder),
        log_every_n_steps=1,
        enable_progress_bar=False,
        enable_model_summary=False,
        enable_checkpointing=False,
        default_root_dir=folder,
        callbacks=[] if callback is None else [callback],
        **options,
    )
    torch.manual_seed(5)
    loader = torch.utils.data.DataLoader(data, batch_size=batch, shuffle=shuffle)
    trainer.fit(net, loader, ckpt_path=checkpoint, weights_only=False)
    return trainer


def left_by(trainer, net):
    """What training left, to the bit."""
    tensors = [*net.state_dict().values(), torch.get_rng_state()]
    metrics = {n: float(v) for n, v in trainer.callback_metrics.items() if "curvature" not in n}
    return tensors, metrics


CASES = {
    "plain": {},
    "accumulation": {"accumulate_grad_batches": 3},  # of four batches: the last stands alone
    "clipped": {"gradient_clip_val": 0.1},
    "bf16": {"precision": "bf16-mixed"},
}


@pytest.mark.parametrize("case", CASES)
def test_training_is_bitwise_what_it_was(tmp_path, case):
    plain = Net()
    before = left_by(fit(tmp_path / "a", plain, **CASES[case]), plain)
    watched, callback = Net(), CurvatureCallback()
    trainer = fit(tmp_path / "b", watched, callback, **CASES[case])
    after = left_by(trainer, watched)
    assert all(torch.equal(a, b) for a, b in zip(before[0], after[0], strict=True))
    assert before[1] == after[1]
    steps = trainer.global_step
    assert steps == (4 if case == "accumulation" else 8)
    assert int(callback.tracker.steps) == steps
    with (Path(trainer.logger.log_dir) / "metrics.csv").open() as file:
        rows = [row for row in csv.DictReader(file) if row["curvature/h"]]
    assert len(rows) == steps
    assert all(float(row["curvature/h_low"]) <= float(row["curvature/h"]) for row in rows)
    assert float(rows[-1]["curvature/edge"]) == pytest.approx(
        float(callback.tracker.edge), rel=1e-5
    )


def test_a_loader_of_unknown_length_and_another_name_for_the_index(tmp_path):
    class Stream(torch.utils.data.IterableDataset):
        def __iter__(self):
            return zip(X, Y, strict=True)

    class Other(Net):
        def training_step(self, batch, i):
            return super().training_step(batch, i)

    callback = CurvatureCallback()
    trainer = fit(tmp_path, Other(), callback, data=Stream(), accumulate_grad_batches=3)
    assert int(callback.tracker.steps) == trainer.global_step == 4


def test_the_edge_is_that_of_the_steps_own_rate(tmp_path):
    class Decaying(Net):
        def configure_optimizers(self):
            optimizer = super().configure_optimizers()
            schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1 - step / 4)
            return [optimizer], [{"scheduler": schedule, "interval": "step"}]

    callback = CurvatureCallback()
    trainer = fit(tmp_path, Decaying(), callback, epochs=1)
    with (Path(trainer.logger.log_dir) / "metrics.csv").open() as file:
        rows = [row for row in csv.DictReader(file) if row["curvature/h"]]
    rates = [0.1, 0.075, 0.05, 0.025]
    expected = [rate * float(row["curvature/h"]) / 2 for rate, row in zip(rates, rows, strict=True)]
    assert [float(row["curvature/edge"]) for row in rows] == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize("case", ["plain", "clipped"])
def test_h_is_the_losses_own_largest_eigenvalue(tmp_path, case):
    net, callback = Net(lr=0.0, dropout=0), CurvatureCallback()
    fit(tmp_path, net, callback, batch=64, epochs=60, **CASES[case])
    true = lyapcuda.eigsh(lambda: nn.functional.cross_entropy(net.net(X), Y), net.net.parameters())
    assert float(callback.tracker.h) == pytest.approx(float(true.eigenvalues[0]), rel=0.01)


def test_adam_is_measured_from_its_second_step_on(tmp_path):
    callback = CurvatureCallback(k=2, prefix="h0/")
    trainer = fit(tmp_path, Net(1e-3, torch.optim.AdamW), callback, epochs=1)
    assert int(callback.tracker.steps) == 3 and float(callback.tracker.edge) > 0
    assert {"h0/h_0", "h0/h_1", "h0/edge"} <= trainer.callback_metrics.keys()


def test_a_resumed_run_goes_on_where_the_tracker_was(tmp_path):
    first = CurvatureCallback()
    trainer = fit(tmp_path, Net(), first, epochs=1)
    trainer.save_checkpoint(tmp_path / "one.ckpt")
    again = CurvatureCallback()
    fit(tmp_path, Net(), again, epochs=2, checkpoint=tmp_path / "one.ckpt")
    assert first.tracker.calls == 4 and again.tracker.calls == 8
    assert torch.equal(again.tracker.history().h[:4], first.tracker.history().h)


def test_a_batch_that_the_module_leaves_out_isnt_measured(tmp_path):
    class Sometimes(Net):
        def training_step(self, batch, batch_idx):
            loss = super().training_step(batch, batch_idx)
            return None if batch_idx == 1 else loss

    callback = CurvatureCallback()
    fit(tmp_path, Sometimes(), callback, epochs=1)
    assert int(callback.tracker.steps) == 3


def test_manual_optimization_is_refused_with_what_to_do(tmp_path):
    class Manual(Net):
        def __init__(self):
            super().__init__()
            self.automatic_optimization = False

    with pytest.raises(RuntimeError, match=r"tracker\.backward\(closure\) in training_step"):
        fit(tmp_path, Manual(), CurvatureCallback(), epochs=1)


def test_an_exception_of_the_module_leaves_its_log_as_it_was(tmp_path):
    class Broken(Net):
        def training_step(self, batch, batch_idx):
            raise ZeroDivisionError("here")

    net = Broken()
    with pytest.raises(ZeroDivisionError, match="here"):
        fit(tmp_path, net, CurvatureCallback(), epochs=1)
    assert "log" not in vars(net)


def test_the_command_line_reads_its_checkpoints(tmp_path):
    net = Net()
    fit(tmp_path, net, epochs=1).save_checkpoint(tmp_path / "it.ckpt")
    whole, part = Net(lr=0.2), Net().net
    load_weights(whole, tmp_path / "it.ckpt")
    load_weights(part, tmp_path / "it.ckpt")  # the module inside of it
    left = net.state_dict()
    assert all(torch.equal(value, left[name]) for name, value in whole.state_dict().items())
    assert all(torch.equal(v, left[f"net.{name}"]) for name, v in part.state_dict().items())
