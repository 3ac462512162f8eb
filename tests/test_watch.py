"""A watched run ends with the bits of one that is not, and its figures are those of the parts."""

from __future__ import annotations

import csv
import json
import math
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import TensorDataset

import cgh
from cgh import watch
from tests.conftest import unit

WIDTH = 8


class Backbone(nn.Module):
    """Images to features of `WIDTH` numbers, with dropout, which draws from the global generator."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Sequential(nn.Conv2d(3, WIDTH, 3, stride=2, padding=1), nn.BatchNorm2d(WIDTH), nn.ReLU())
        self.dropout = nn.Dropout(0.5)

    def forward(self, images: Tensor) -> Tensor:
        return self.dropout(self.layer(images).mean((2, 3)))


def small_model(**options: Any) -> cgh.CGH:
    return cgh.CGH(Backbone(), ["layer"], dim=8, hidden_dim=16, memory_size=32, image_shape=(3, 8, 8), **options)


def labelled(count: int = 24) -> TensorDataset:
    """Images of two classes that differ in colour."""
    generator = torch.Generator().manual_seed(0)
    labels = torch.arange(count) % 2
    return TensorDataset(torch.randn(count, 3, 8, 8, generator=generator) + 3 * labels.view(-1, 1, 1, 1), labels)


def train(watched: bool, loggers: list[watch.Logger], steps: int = 6) -> tuple[cgh.CGH, Tensor, list[dict[str, float]]]:
    """Return the model, what the generator would give next, and what was found."""
    torch.manual_seed(0)
    model = small_model(warmup_steps=2)
    optimizer = torch.optim.SGD(model.student.parameters(), lr=0.05)
    data = labelled()
    look = None
    if watched:
        probe = watch.OnlineProbe(WIDTH, classes=2, learning_rate=0.1)
        options: dict[str, Any] = {"train": data, "test": data, "neighbours_every": 3, "k": 5}
        look = watch.Watch(model, loggers, every=2, probe=probe, **options)
    found = []
    for step in range(1, steps + 1):
        images, labels = data.tensors
        output = model(images + torch.randn_like(images), images)
        output.loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        if look:
            found.append(look(step, output, labels, {"lr": 0.05}))
        model.update(output)
    return model, torch.rand(1), found


class Kept:
    def __init__(self) -> None:
        self.rows: list[tuple[int, dict[str, float]]] = []

    def log(self, step: int, figures: Any) -> None:
        self.rows.append((step, dict(figures)))


def test_a_watched_run_has_the_bits_of_another() -> None:
    kept = Kept()
    plain, following, _ = train(watched=False, loggers=[])
    model, draw, found = train(watched=True, loggers=[kept])
    torch.testing.assert_close(model.state_dict(), plain.state_dict(), rtol=0, atol=0)
    assert torch.equal(draw, following)
    assert model.training
    assert all(module.training for module in model.student.modules())
    assert [step for step, _ in kept.rows] == [2, 3, 4, 6]
    assert [figures for _, figures in kept.rows] == [figures for figures in found if figures]
    assert kept.rows[1][1] == {"knn/top1": 100.0, "knn/top5": 100.0}, "classes of a colour each"
    assert {"lr", "loss/total", "loss/global_from_hypercolumn", "probe/top1", "rank/teacher_global"} <= kept.rows[0][
        1
    ].keys()
    assert "loss/infonce" in kept.rows[0][1], "the second step still has a little of it"
    assert "loss/infonce" not in kept.rows[2][1], "which has faded out"


def test_figures_are_those_of_the_parts() -> None:
    torch.manual_seed(0)
    model = small_model(
        student_temperature=0.3,
        teacher_temperature={"global": 0.2, "hypercolumn": 0.5},
    )
    output = model(*torch.randn(2, 16, 3, 8, 8))
    found = watch.Watch(model, every=1)(1, output)
    for who, context, temperature in (("student", "global", 0.3), ("teacher", "hypercolumn", 0.5)):
        z = getattr(output, who)[context].detach()
        relation = torch.softmax(z @ model.memory[context].T / temperature, dim=1)
        entropy = -(relation * relation.log()).sum(1).mean().item()
        assert found[f"entropy/{who}_{context}"] == pytest.approx(entropy, rel=1e-4)
        rank = cgh.diagnostics.effective_rank(z).item()
        assert found[f"rank/{who}_{context}"] == pytest.approx(rank)
    assert found["loss/total"] == pytest.approx(output.loss.item())


def test_any_loop_with_embeddings_alone() -> None:
    backbone = Backbone()
    look = watch.Watch(backbone, every=1, probe=watch.OnlineProbe(WIDTH, classes=2))
    z = unit(16, WIDTH)
    backbone(torch.randn(16, 3, 8, 8))
    found = look(1, {"global": z}, torch.arange(16) % 2)
    assert found.keys() == {"rank/student_global", "probe/loss", "probe/top1"}
    assert found["rank/student_global"] == pytest.approx(cgh.diagnostics.effective_rank(z).item())


def test_one_warning_says_that_embeddings_collapse() -> None:
    look = watch.Watch(nn.Identity(), every=1)
    many, few = unit(32, 16), unit(1, 16).repeat(32, 1) + 0.01 * unit(32, 16)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        look(1, {"global": many})
        look(2, {"global": many})
    with pytest.warns(UserWarning, match=r"collapse: rank/student_global is 1\.\d, and was 1\d\.\d at most"):
        look(3, {"global": few})
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        look(4, {"global": few})


def test_the_probe_learns_what_a_linear_layer_can_and_takes_no_gradient() -> None:
    torch.manual_seed(0)
    labels = torch.arange(64) % 4
    features = (torch.eye(4, WIDTH)[labels] + 0.1 * torch.randn(64, WIDTH)).requires_grad_()
    probe = watch.OnlineProbe(WIDTH, classes=4)
    first = probe.learn(features, labels)
    torch.testing.assert_close(first[0], torch.tensor(4.0).log())
    for _ in range(30):
        loss, top1 = probe.learn(features, labels)
    assert top1 == 100
    assert loss < 0.2
    assert features.grad is None
    half = torch.where(torch.arange(64) < 32, labels, -1)
    assert probe.learn(features, half)[1] == 100, "images without labels do not count"


def separable(count: int) -> tuple[Tensor, Tensor]:
    """Features of two classes that a line parts."""
    labels = torch.arange(count) % 2
    return torch.eye(2)[labels] + 0.1 * torch.randn(count, 2), labels


def test_the_probes_figures_are_means_over_labelled_images() -> None:
    torch.manual_seed(0)
    net = nn.Identity()
    look = watch.Watch(net, every=4, probe=watch.OnlineProbe(2, classes=2, learning_rate=0.0))
    for step, labels in enumerate(([0] * 4, [-1] * 16, [1] * 8, [-1] * 8 + [0] * 4), 1):
        found = look(step, {"global": net(torch.randn(len(labels), 2))}, torch.tensor(labels))
    assert found["probe/top1"] == pytest.approx(50), "of a probe that knows nothing, and answers 0"
    assert found["probe/loss"] == pytest.approx(math.log(2))
    for step in range(5, 9):
        found = look(step, {"global": net(torch.randn(4, 2))}, torch.full((4,), -1))
    assert found.keys() == {"rank/student_global"}, "of no image there is no figure"


@pytest.mark.parametrize("bad", [torch.inf, -torch.inf, torch.nan, 1e30])
def test_the_probe_leaves_features_that_are_not_finite_out(bad: float) -> None:
    torch.manual_seed(0)
    probe, clean = (watch.OnlineProbe(2, classes=2) for _ in range(2))
    for _ in range(10):
        features, labels = separable(16)
        broken = torch.cat([features, torch.tensor([[bad, 0.0], [1.0, bad]])])
        found = probe.learn(broken, torch.cat([labels, labels[:2]]))
        torch.testing.assert_close(found, clean.learn(features, labels))
    assert probe.learn(torch.full((4, 2), bad), labels[:4]).isnan().all(), "nothing counts"
    assert probe.learn(features, labels)[1] > 90
    state = [probe.weight, probe.norm.running_mean, probe.norm.running_var]
    state += [state["momentum_buffer"] for state in probe.optimizer.state.values()]
    assert all(x is not None and x.isfinite().all() for x in state)


def test_the_probe_leaves_a_single_image_out() -> None:
    probe = watch.OnlineProbe(2, classes=2)
    features, labels = separable(2)
    assert probe.learn(features[:1], labels[:1]).isnan().all()
    assert probe.learn(torch.cat([features[:1], features[1:] / 0]), labels).isnan().all(), "one that is finite"
    assert not probe.bias.any()
    assert probe.learn(features, labels).isfinite().all()


def test_the_probe_learns_from_the_features_of_its_labels() -> None:
    images, labels = labelled(8).tensors
    net = Backbone()
    probe, expected = (watch.OnlineProbe(WIDTH, classes=2) for _ in range(2))
    look = watch.Watch(net, probe=probe)
    net(torch.randn(8, 3, 8, 8))  # of a step that was skipped
    features = net(images)
    net(images[:4])  # of another number of images
    with torch.no_grad():
        net(torch.randn(8, 3, 8, 8))
    look(1, {"global": features}, labels)
    expected.learn(features, labels)
    assert torch.equal(probe.weight, expected.weight)
    net(images)
    with pytest.raises(ValueError, match=r"there are 6 labels, and features of \[8\] images"):
        look(2, {"global": features}, labels[:6])


def test_the_probe_learns_from_the_strong_view_of_multi_crop() -> None:
    model = small_model()
    probe, expected = (watch.OnlineProbe(WIDTH, classes=2) for _ in range(2))
    look = watch.Watch(model, probe=probe)
    seen: list[Tensor] = []
    look.backbone.register_forward_hook(lambda module, args, output: seen.append(output))
    model(*torch.randn(2, 8, 3, 8, 8))  # of a step that was skipped
    output = model(*torch.randn(4, 8, 3, 8, 8))
    _, strong, *local_views = seen
    assert len(local_views) == 2
    labels = torch.arange(8) % 2
    look(1, output, labels)
    expected.learn(strong, labels)
    assert torch.equal(probe.weight, expected.weight)


def test_entropies_are_of_the_centred_relations_of_the_loss() -> None:
    torch.manual_seed(0)
    model = small_model(centring_momentum=0.5)
    for _ in range(4):
        model.update(model(*torch.randn(2, 16, 3, 8, 8)))
    output = model(*torch.randn(2, 16, 3, 8, 8))
    found = watch.Watch(model, every=1)(1, output)
    loss = model.relation_loss
    assert loss.centring is not None
    assert isinstance(loss.teacher_temperature, dict)
    for name, t in output.teacher.items():
        similarities = t @ model.memory[name].T - loss.centring[name]
        relation = torch.softmax(similarities / loss.teacher_temperature[name], dim=1)
        entropy = cgh.diagnostics.relation_entropy(relation).item()
        assert found[f"entropy/teacher_{name}"] == pytest.approx(entropy, rel=1e-4)


def test_contexts_without_a_temperature_have_no_entropy() -> None:
    model = small_model(
        pairs=[("global", "hypercolumn")],
        student_temperature={"global": 0.1},
        teacher_temperature={"hypercolumn": 0.08},
    )
    found = watch.Watch(model, every=1)(1, model(*torch.randn(2, 16, 3, 8, 8)))
    entropies = {name for name in found if name.startswith("entropy")}
    assert entropies == {"entropy/student_global", "entropy/teacher_hypercolumn"}


def test_bad_input() -> None:
    probe = watch.OnlineProbe(WIDTH, classes=2)
    with pytest.raises(ValueError, match=r"features are \(4, 5\) .* build OnlineProbe\(width=5"):
        probe.learn(torch.randn(4, 5), torch.zeros(4, dtype=torch.long))
    with pytest.raises(ValueError, match="a label is 2; the probe has classes 0 to 1"):
        probe.learn(torch.randn(4, WIDTH), torch.tensor([0, 1, 2, 0]))
    for labels in ([0, 1, 1, -3], torch.tensor([0, 1, 1, 0], dtype=torch.int32)):
        assert probe.learn(torch.randn(4, WIDTH), labels).isfinite().all()  # type: ignore[arg-type]
    with pytest.raises(TypeError, match=r"labels are torch.float32; classes are integers"):
        probe.learn(torch.randn(4, WIDTH), torch.zeros(4))
    with pytest.raises(ValueError, match="width is 8 and classes 0"):
        watch.OnlineProbe(WIDTH, classes=0)
    with pytest.raises(ValueError, match="call the model first"):
        watch.Watch(Backbone(), probe=probe)(1, {"global": unit(4, 8)}, torch.zeros(4, dtype=torch.long))
    with pytest.raises(ValueError, match="every is 0"):
        watch.Watch(Backbone(), every=0)
    with pytest.raises(ValueError, match="both train"):
        watch.Watch(Backbone(), train=labelled())
    with pytest.raises(TypeError, match=r"the output is a Tensor; pass what the CGH returned"):
        watch.Watch(Backbone(), every=1)(1, unit(4, 8))  # type: ignore[arg-type]
    with pytest.raises(TypeError, match=r"loggers are a Kept; pass a list"):
        watch.Watch(Backbone(), Kept())  # type: ignore[arg-type]
    for logger in ("runs", Kept, object()):
        with pytest.raises(TypeError, match=r"a logger is .*; each has a method log\(step, figures\)"):
            watch.Watch(Backbone(), [logger])  # type: ignore[list-item]


def test_of_the_parts_of_one_step_the_first_is_looked_at_and_the_probe_learns_from_all() -> None:
    kept, backbone = Kept(), Backbone()
    probe = watch.OnlineProbe(WIDTH, classes=2)
    look = watch.Watch(backbone, [kept], every=1, probe=probe)
    images, labels = labelled(8).tensors
    for step in (0, 0, 1, 1, 2):
        before = probe.weight.detach().clone()
        look(step, {"global": backbone(images)}, labels)
        assert not torch.equal(probe.weight, before)
    assert [step for step, _ in kept.rows] == [1, 2]


def test_csv_is_appended_to(tmp_path: Path) -> None:
    for step in (1, 2):
        watch.CSV(tmp_path / "run" / "log.csv").log(step, {"loss": 0.5, "knn/top1": 100 / 3})
    rows = list(csv.DictReader((tmp_path / "run" / "log.csv").open()))
    assert [(row["step"], row["figure"], row["value"]) for row in rows[:2]] == [
        ("1", "loss", "0.5"),
        ("1", "knn/top1", repr(100 / 3)),
    ]
    assert len(rows) == 4


def test_csv_reads_back_equal(tmp_path: Path) -> None:
    figures = {"images": 12345678, "rate": 0.1 + 0.2, "loss": 12345678.9, "tensor": torch.tensor(0.1), "nan": torch.nan}
    watch.CSV(tmp_path / "log.csv").log(1, figures)  # type: ignore[arg-type]
    values = {row["figure"]: row["value"] for row in csv.DictReader((tmp_path / "log.csv").open())}
    assert values["images"] == "12345678"
    assert values["nan"] == "nan"
    for name in ("rate", "loss", "tensor"):
        assert float(values[name]) == figures[name]


def test_tensorboard(tmp_path: Path) -> None:
    accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    watch.TensorBoard(tmp_path).log(3, {"loss": 0.5})
    (event,) = accumulator.EventAccumulator(str(tmp_path)).Reload().Scalars("loss")
    assert (event.step, event.value) == (3, 0.5)


def records(path: Path) -> Iterator[bytes]:
    """Of a run's file of Weights and Biases: seven bytes, then LevelDB's log, of blocks of 32 KiB."""
    data, at, record = path.read_bytes(), 7, b""
    while at < len(data):
        left = 32768 - at % 32768
        if left < 7:  # too few for a header
            at += left
            continue
        size, kind = int.from_bytes(data[at + 4 : at + 6], "little"), data[at + 6]  # after a checksum
        record += data[at + 7 : at + 7 + size]
        at += 7 + size
        if kind in (1, 4):  # whole, or the last part
            yield record
            record = b""


def test_weights_and_biases_offline(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    wandb = pytest.importorskip("wandb")
    internal = pytest.importorskip("wandb.proto.wandb_internal_pb2")
    monkeypatch.setenv("WANDB_SILENT", "true")
    logger = watch.WandB(project="cgh", mode="offline", dir=str(tmp_path))
    logger.log(3, {"loss": 0.5, "knn/top1": 50.0})
    logger.log(4, {"loss": 0.25})
    logger.run.finish()
    wandb.teardown()  # waits for the process that writes the file, as finish() does not
    (path,) = tmp_path.rglob("*.wandb")  # to be uploaded
    histories = [record.history for record in map(internal.Record.FromString, records(path)) if record.history.item]
    logged = [
        {
            name: json.loads(item.value_json)
            for item in history.item
            if (name := item.key or item.nested_key[0])[0] != "_"
        }
        for history in histories
    ]
    assert [history.step.num for history in histories] == [3, 4]
    assert logged == [{"loss": 0.5, "knn/top1": 50.0}, {"loss": 0.25}]


def test_mlflow_in_a_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    mlflow = pytest.importorskip("mlflow")
    monkeypatch.setenv("MLFLOW_ALLOW_FILE_STORE", "true")  # a database needs packages beside
    uri = (tmp_path / "runs").as_uri()
    logger = watch.MLflow("cgh", uri)
    logger.log(3, {"knn/top1": 50.0})
    (metric,) = mlflow.MlflowClient(uri).get_metric_history(logger.run, "knn/top1")
    assert (metric.step, metric.value) == (3, 50.0)
    assert watch.MLflow("cgh", uri).run != logger.run


@pytest.mark.parametrize(
    ("module", "build"),
    [
        ("wandb", lambda: watch.WandB()),
        ("mlflow", lambda: watch.MLflow("cgh")),
        ("tensorboard", lambda: watch.TensorBoard("runs")),
    ],
)
def test_a_missing_library_names_its_extra(module: str, build: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(__import__("sys").modules, module, None)
    with pytest.raises(ImportError, match=rf'{module}, which is not installed: pip install "cgh-ssl\[watch\]"'):
        build()


def test_a_callback_of_lightning(tmp_path: Path) -> None:
    lightning = pytest.importorskip("lightning")

    class Module(lightning.LightningModule):
        def __init__(self, model: cgh.CGH) -> None:
            super().__init__()
            self.model = model

        def training_step(self, batch: Any, batch_idx: int) -> Tensor:
            images, _ = batch
            self.output = self.model(images, images)
            return self.output.loss

        def on_train_batch_end(self, *_: object) -> None:
            self.model.update(self.output)

        def configure_optimizers(self) -> torch.optim.Optimizer:
            return torch.optim.SGD(self.model.student.parameters(), lr=0.05)

    model = small_model()
    kept = Kept()
    look = watch.Watch(model, [kept], every=2, probe=watch.OnlineProbe(WIDTH, classes=2))
    callback = watch.lightning_callback(look, lambda module, batch: (module.output, batch[1]))
    quiet = {
        "logger": False,
        "enable_checkpointing": False,
        "enable_progress_bar": False,
        "enable_model_summary": False,
    }
    trainer = lightning.Trainer(accelerator="cpu", max_epochs=2, callbacks=[callback], **quiet)
    trainer.fit(Module(model), torch.utils.data.DataLoader(labelled(), batch_size=12))
    assert [step for step, _ in kept.rows] == [2, 4]
    assert all("probe/top1" in figures for _, figures in kept.rows)
    assert model.memory.pointer == 48 % 32
