"""The adapters against the real packages, where they are installed, and a writer that keeps what it is given."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from torch.utils.data import DataLoader, TensorDataset

from eigenfunc import callbacks, functional_loss
from eigenfunc.errors import InputError
from eigenfunc.records import Alert, Record
from eigenfunc.track import SpectrumTracker

G = torch.Generator().manual_seed(0)
INPUTS, TARGETS = torch.randn(32, 6, generator=G), torch.arange(32) % 3


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("accumulated", [1, 2])
def test_lightning(accumulated: int, tmp_path: Path) -> None:
    lightning = pytest.importorskip("lightning.pytorch")
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)

    class Lit(lightning.LightningModule):  # type: ignore[misc, name-defined]
        def __init__(self) -> None:
            super().__init__()
            self.net = nn.Linear(6, 3)

        def training_step(self, batch: Any, index: int) -> Tensor:
            return cross_entropy(self.net(batch[0]), batch[1])

        def configure_optimizers(self) -> Any:
            optimizer = torch.optim.SGD(self.parameters(), lr=1.0)
            schedule = torch.optim.lr_scheduler.StepLR(optimizer, 3, gamma=100.0)
            return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}

    def trained(watched: bool) -> tuple[Any, SpectrumTracker]:
        torch.manual_seed(0)
        model = Lit()
        loss, _ = functional_loss(model.net, cross_entropy)
        tracker = SpectrumTracker(loss, (INPUTS, TARGETS), k=2, every=2)
        trainer = lightning.Trainer(
            max_steps=5, callbacks=[callbacks.lightning(tracker)] if watched else [], logger=False, barebones=False,
            enable_checkpointing=False, enable_progress_bar=False, enable_model_summary=False, accelerator="cpu",
            accumulate_grad_batches=accumulated, default_root_dir=tmp_path,
        )  # fmt: skip
        trainer.fit(model, DataLoader(TensorDataset(INPUTS, TARGETS), 8, shuffle=True))
        return model.state_dict(), tracker

    with torch.random.fork_rng(devices=[]):
        plain, (state, tracker) = trained(False)[0], trained(True)
    assert all(torch.equal(plain[name], state[name]) for name in plain)
    assert [record.step for record in tracker.records] == [2, 4]
    assert [seen.step for seen in tracker.state.observations] == [1, 2, 3, 4, 5]
    assert all(seen.loss is not None for seen in tracker.state.observations)
    assert [alert.step for alert in tracker.alerts if alert.rule == "stability"] == [3]  # the rate for the fourth step
    assert tracker.records[-1].limit == pytest.approx(2 / 100)


@pytest.mark.filterwarnings("ignore")
def test_the_trainer_of_transformers(tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers")
    pytest.importorskip("accelerate")

    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(6, 3)

        def forward(self, x: Tensor, labels: Tensor) -> dict[str, Tensor]:
            logits = self.layer(x)
            return {"loss": cross_entropy(logits, labels), "logits": logits}

    def trained(watched: bool) -> tuple[Any, SpectrumTracker]:
        torch.manual_seed(0)
        net = Net()
        loss, _ = functional_loss(net)
        tracker = SpectrumTracker(loss, {"x": INPUTS, "labels": TARGETS}, k=2, every=2)
        arguments = transformers.TrainingArguments(
            output_dir=str(tmp_path), max_steps=5, per_device_train_batch_size=8, logging_steps=1, learning_rate=1e-2,
            report_to=[], save_strategy="no", use_cpu=True, disable_tqdm=True, seed=0,
        )  # fmt: skip
        rows = [{"x": x, "labels": y} for x, y in zip(INPUTS, TARGETS, strict=True)]
        made = transformers.Trainer(
            model=net, args=arguments, train_dataset=rows, callbacks=[callbacks.trainer(tracker)] if watched else []
        )
        made.train()
        return net.state_dict(), tracker

    with torch.random.fork_rng(devices=[]):
        plain, (state, tracker) = trained(False)[0], trained(True)
    assert all(torch.equal(plain[name], state[name]) for name in plain)
    assert [record.step for record in tracker.records] == [2, 4]
    assert isinstance(tracker.core.optimizer, torch.optim.AdamW)
    assert {record.matrix for record in tracker.records} == {"preconditioned hessian"}
    assert all(seen.loss is not None and seen.grad_norm is not None for seen in tracker.state.observations)
    assert tracker.records[0].limit == pytest.approx(38 / tracker.records[0].rate)


RECORD = Record(7, (3.0, 1.0), (0.1, 0.1), (0.1, 0.1), (True, True), limit=20.0, trace=4.0)
ALERT = Alert("stability", 8, "it is over", 3.0, 2.0, "certified")


def test_scalars_and_texts_reach_tensorboard(tmp_path: Path) -> None:
    tensorboard = pytest.importorskip("torch.utils.tensorboard", exc_type=ImportError)
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    writer = tensorboard.SummaryWriter(str(tmp_path))
    write = callbacks.tensorboard(writer)
    write(RECORD)
    write(ALERT)
    writer.close()
    read = EventAccumulator(str(tmp_path)).Reload()
    assert [(event.step, event.value) for event in read.Scalars("eigenvalues/1")] == [(7, 3.0)]
    assert [event.value for event in read.Scalars("spectrum/stability limit")] == [20.0]
    assert b"it is over" in read.Tensors("alerts/stability/text_summary")[0].tensor_proto.string_val[0]


def test_a_writer_gets_each_number_that_is_known() -> None:
    calls: list[tuple[Any, ...]] = []

    class Writer:
        def add_scalar(self, *arguments: Any) -> None:
            calls.append(arguments)

        def add_text(self, *arguments: Any) -> None:
            calls.append(arguments)

    write = callbacks.tensorboard(Writer())
    write(RECORD)
    write(ALERT)
    assert ("eigenvalues/2", 1.0, 7) in calls
    assert ("spectrum/trace", 4.0, 7) in calls
    assert "spectrum/gradient share" not in [call[0] for call in calls]
    assert calls[-1] == ("alerts/stability", str(ALERT), 8)


def test_a_missing_package_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    def missing(name: str) -> Any:
        raise ImportError(name)

    monkeypatch.setattr(callbacks, "import_module", missing)
    tracker = SpectrumTracker(lambda params, batch: params["x"].sum(), torch.zeros(1))
    for make, name in ((callbacks.lightning, "lightning"), (callbacks.trainer, "transformers")):
        with pytest.raises(InputError, match=f"pip install {name}"):
            make(tracker)


def test_a_training_that_ends_without_a_look_is_a_warning(caplog: pytest.LogCaptureFixture) -> None:
    net = nn.Linear(6, 3)
    loss, _ = functional_loss(net, cross_entropy)
    for every, level in ((None, "WARNING"), (1, "INFO")):
        tracker = SpectrumTracker(loss, (INPUTS, TARGETS), k=1, every=every, max_overhead=1e-9)
        steps = callbacks._Steps(tracker, net)
        steps.end(1, net)
        steps.end(2, net)
        caplog.clear()
        with caplog.at_level(logging.INFO, "eigenfunc"):
            steps.close()
        (said,) = caplog.records
        assert said.levelname == level
        assert ("bought no look" in said.getMessage()) == (every is None)
