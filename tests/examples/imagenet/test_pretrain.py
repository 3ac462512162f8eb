"""A pre-training run leaves what it says, goes on where it stopped, and says what is wrong."""

from __future__ import annotations

import gzip
import importlib
import itertools
import json
import math
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest
import torch
from torch import Tensor

import cgh
from tests.conftest import unit
from tests.examples.imagenet.runs import EXAMPLE, SMALL, Started, figures, make_images, run, same, start_ranks, trained

pytestmark = pytest.mark.skipif(not EXAMPLE.exists(), reason="the examples are not here")


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    pytest.importorskip("tyro")
    pytest.importorskip("tensorboard")
    return make_images(tmp_path_factory.mktemp("images"))


@pytest.fixture(scope="module")
def whole(root: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a run that nothing disturbed."""
    folder = tmp_path_factory.mktemp("whole")
    run([*SMALL, "--root", root, "--folder", folder, "--knn-epochs=1", "--profile"], folder / "output.txt")
    return folder


def test_a_run_leaves_its_configuration_weights_logs_and_curves(whole: Path) -> None:
    config = json.loads((whole / "config.json").read_text())
    assert (config["arch"], config["batch"], config["layers"]) == ("resnet18", 8, ["layer3", "layer4"])
    assert config["precision"] == "float32"  # what "auto" is on a CPU
    assert cgh.interop.trained_backbone(whole / "checkpoint.pt")(torch.randn(2, 3, 32, 32)).shape == (2, 512)
    state = trained(whole)
    assert (state["epoch"], state["step"], state["model"]["_extra_state"].item()) == (2, 16, 16)
    assert (whole / "curves.png").stat().st_size > 10_000
    with gzip.open(whole / "trace.json.gz") as file:
        events = {event["name"] for event in json.load(file)["traceEvents"]}
    assert {f"ProfilerStep#{step}" for step in range(7, 12)} | {"aten::convolution"} <= events

    rows = figures(whole)
    assert [int(row["step"]) for row in rows] == [1, 2, 4, 6, 8, 8, 10, 12, 14, 16, 16]
    assert float(rows[-1]["knn/top1"]) > 90  # each class has a colour
    assert [bool(row["loss/infonce"]) for row in rows] == [True] * 5 + [False] * 6  # it has faded out
    for name, most in (
        ("entropy/student_global", 3.69),
        ("rank/teacher_hypercolumn", 8),
        ("agreement/global_from_hypercolumn", 1),
    ):
        values = [float(row[name]) for row in rows if row[name]]
        assert len(values) == 4
        assert all(0 <= value <= most for value in values)
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    board = EventAccumulator(str(whole)).Reload()
    for name in ("loss/total", "knn/top1", "time/waiting_for_data"):
        assert len(board.Scalars(name)) == (2 if name == "knn/top1" else 9)


def test_curves_of_several_runs(whole: Path, tmp_path: Path) -> None:
    (tmp_path / "other").mkdir()
    shutil.copy(whole / "log.csv", tmp_path / "other")
    command = [sys.executable, EXAMPLE / "plot.py", whole, tmp_path / "other", "--out", tmp_path / "curves.png"]
    assert subprocess.run(command, capture_output=True, text=True).stdout.strip() == str(tmp_path / "curves.png")
    assert (tmp_path / "curves.png").stat().st_size > (whole / "curves.png").stat().st_size


def test_curves_of_one_run_in_groups(whole: Path, tmp_path: Path) -> None:
    command = [sys.executable, EXAMPLE / "plot.py", whole, "--out", tmp_path / "curves.svg"]
    subprocess.run(command, check=True, capture_output=True)
    drawing = (tmp_path / "curves-groups.svg").read_text(encoding="utf-8")
    titles = ["loss", "entropy", "log K", "rank", "agreement", "knn", "time/images_per_second"]
    assert [title for title in titles if f"<!-- {title} -->" not in drawing] == []
    failed = subprocess.run([*command[:2], tmp_path], capture_output=True, text=True)
    assert f"{tmp_path} has no log.csv; name the --folder of a run" in failed.stderr


@pytest.mark.parametrize(
    "number",
    [
        signal.SIGINT,
        pytest.param(signal.SIGTERM, marks=pytest.mark.slow),
        pytest.param(signal.SIGUSR1, marks=pytest.mark.slow),
    ],
)
def test_a_signal_saves_and_the_run_goes_on_bit_by_bit(number: int, root: Path, whole: Path, tmp_path: Path) -> None:
    arguments = [*SMALL, "--root", root, "--folder", tmp_path / "run", "--knn-epochs=1"]
    started = Started([*arguments, "--workers=2"], tmp_path / "output.txt")
    started.wait_for("step 2/16")
    os.kill(started.process.pid, number)
    assert started.wait() == 0
    assert "stopped; start it again" in started.text()
    assert 2 <= trained(tmp_path / "run")["step"] < 16

    run(arguments, tmp_path / "output.txt")
    assert same(trained(tmp_path / "run"), trained(whole))
    assert figures(tmp_path / "run") == figures(whole)


@pytest.mark.slow
def test_after_a_kill_the_log_is_cut_to_the_checkpoint(root: Path, whole: Path, tmp_path: Path) -> None:
    arguments = [*SMALL, "--root", root, "--folder", tmp_path / "run", "--knn-epochs=1"]
    started = Started([*arguments, "--checkpoint-steps=3"], tmp_path / "output.txt")
    started.wait_for("step 4/16")
    started.kill_group()
    run(arguments, tmp_path / "output.txt")
    assert figures(tmp_path / "run") == figures(whole)
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    scalars = EventAccumulator(str(tmp_path / "run")).Reload().Scalars("loss/total")
    assert [event.step for event in scalars] == [1, *range(2, 17, 2)]


@pytest.mark.slow
def test_a_truncated_checkpoint_gives_way_to_the_one_before(root: Path, whole: Path, tmp_path: Path) -> None:
    folder = tmp_path / "run"
    arguments = [*SMALL, "--root", root, "--folder", folder, "--knn-epochs=1"]
    started = Started([*arguments, "--checkpoint-steps=3"], tmp_path / "output.txt")
    started.wait_for("step 10/16")  # the save after step 9 waits until that after step 6 is whole
    started.kill_group()
    checkpoint = folder / "checkpoint.pt"
    os.truncate(checkpoint, checkpoint.stat().st_size // 2)
    text = run(arguments, tmp_path / "output.txt")
    assert "checkpoint.pt is not a checkpoint of plain data, or is cut short" in text
    assert f"Going on from {folder / 'checkpoint-previous.pt'}." in text
    assert same(trained(folder), trained(whole))

    for path in (checkpoint, folder / "checkpoint-previous.pt"):
        os.truncate(path, 1000)
    failed = Started(arguments, tmp_path / "output.txt")
    assert failed.wait() == 1
    assert "No checkpoint of this run can be read" in failed.text()


def test_two_checkpoints_are_good_while_a_third_is_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(EXAMPLE))
    last = importlib.import_module("run").Run(tmp_path)
    last.save({"step": 1})
    last.save({"step": 2})
    save = cgh.checkpoint.save

    def killed(state: object, path: Path) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(cgh.checkpoint, "save", killed)
    with pytest.raises(KeyboardInterrupt):
        last.save({"step": 3})
    assert last.load() == {"step": 2}
    os.truncate(last.checkpoint, 100)
    with pytest.warns(UserWarning, match="(?s)cut short.* Going on from .*checkpoint-previous.pt"):
        assert last.load() == {"step": 1}

    monkeypatch.setattr(cgh.checkpoint, "save", save)
    last.save({"step": 4})  # in place of the broken one, and not of the good one
    assert last.load() == {"step": 4}
    assert cgh.checkpoint.load(last.previous) == {"step": 1}


@pytest.mark.parametrize("call", [1, 2, 3])
def test_a_save_killed_between_its_renames_leaves_two_files(
    call: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.syspath_prepend(str(EXAMPLE))
    last = importlib.import_module("run").Run(tmp_path)
    last.save({"step": 1})
    last.save({"step": 2})
    replace, calls = Path.replace, iter(range(1, 4))

    def killed(path: Path, target: Path) -> Path:
        if next(calls) == call:
            raise KeyboardInterrupt
        return replace(path, target)

    with monkeypatch.context() as patched, pytest.raises(KeyboardInterrupt):
        patched.setattr(Path, "replace", killed)
        last.save({"step": 3})
    state = last.load()
    assert state == {"step": 3 if call == 3 else 2}
    os.truncate(last.checkpoint, 100)  # in place, so that another name of this file would break as well
    with pytest.warns(UserWarning, match="Going on from .*checkpoint-previous.pt"):
        assert last.load() == {"step": 1}
    last.save({"step": 4})
    last.save({"step": 5})
    assert [cgh.checkpoint.load(path) for path in (last.checkpoint, last.previous)] == [{"step": 5}, {"step": 4}]
    assert sorted(path.name for path in tmp_path.glob("*checkpoint*")) == ["checkpoint-previous.pt", "checkpoint.pt"]


@pytest.mark.slow
def test_a_full_disk_ends_the_run_and_leaves_the_last_checkpoint(root: Path, whole: Path, tmp_path: Path) -> None:
    folder = tmp_path / "run"
    arguments = [*SMALL, "--root", root, "--folder", folder, "--knn-epochs=1", "--checkpoint-steps=2"]
    started = Started(arguments, tmp_path / "output.txt")
    started.wait_for("step 4/16")
    os.kill(started.process.pid, signal.SIGTERM)
    started.wait()
    step = trained(folder)["step"]

    failed = Started(arguments, tmp_path / "output.txt", {"FILE_LIMIT": "1000000"})
    assert failed.wait() == 1
    assert "is not written, and what was there is untouched; is the disk full?" in failed.text()
    assert trained(folder)["step"] == step
    assert not list(folder.glob(".*.tmp"))
    run(arguments, tmp_path / "output.txt")
    assert same(trained(folder), trained(whole))


def test_one_run_at_a_time_in_a_folder(root: Path, tmp_path: Path) -> None:
    arguments = [*SMALL, "--root", root, "--folder", tmp_path / "run"]
    first = Started(arguments, tmp_path / "first.txt")
    first.wait_for("step 2/16")
    second = Started(arguments, tmp_path / "second.txt")
    assert second.wait() == 1
    assert f"is in use by process {first.process.pid} on " in second.text()
    os.kill(first.process.pid, signal.SIGTERM)
    assert first.wait() == 0


@pytest.mark.parametrize(
    ("every", "message"),
    [
        ("--checkpoint-steps=0", "step 3: student['global'] holds 128 values that are not finite"),
        ("--checkpoint-steps=1", "after step 2 the student's weights are not finite"),
    ],
)
def test_what_is_not_finite_is_named_and_not_saved(every: str, message: str, root: Path, tmp_path: Path) -> None:
    arguments = [*SMALL, "--root", root, "--folder", tmp_path / "run", "--lr=1e30", every]  # at first it is still 0
    failed = Started(arguments, tmp_path / "output.txt")
    assert failed.wait() == 1
    assert message in failed.text()
    assert "The last checkpoint is from before, and good" in failed.text()
    if every == "--checkpoint-steps=1":
        assert trained(tmp_path / "run")["step"] == 1


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--dim=32"], "holds another run: dim was 16 and is now 32. Start with the same options"),
        (["--warmup-epochs=3"], "--warmup-epochs 3 does not lie in --epochs 2: warmup_steps is 24 of 16 steps"),
        (["--accumulate=3"], "do not divide into --accumulate 3 x --batch-norm-splits 1; make it a multiple of 3"),
        (["--arch=resnet19"], "arch is 'resnet19', which is no classifier of torchvision"),
        pytest.param(
            ["--device=cuda"],
            "--device cuda for process 0 of this machine, counted from 0, but PyTorch",
            marks=pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU"),
        ),
    ],
)
def test_bad_input(arguments: list[str], message: str, root: Path, whole: Path, tmp_path: Path) -> None:
    folder = whole if arguments == ["--dim=32"] else tmp_path / "run"
    failed = Started([*SMALL, "--root", root, "--folder", folder, *arguments], tmp_path / "output.txt")
    assert failed.wait() == 1
    assert message in failed.text()


def test_a_batch_that_does_not_divide_over_the_ranks(root: Path, tmp_path: Path) -> None:
    ranks = start_ranks(2, [*SMALL, "--root", root, "--folder", tmp_path / "run", "--batch=9"], tmp_path)
    assert [rank.wait() for rank in ranks] == [1, 1]
    assert "--batch 9 does not divide over 2 ranks; make it a multiple" in ranks[0].text()


# What a run tells


@pytest.fixture
def pretrain(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(str(EXAMPLE))
    return importlib.import_module("pretrain")


@pytest.mark.parametrize(("dim", "size"), [(512, 20_000), (16, 64)])
def test_embeddings_that_point_one_way_are_told_from_those_that_say_nothing(
    pretrain: ModuleType, dim: int, size: int
) -> None:
    method = pretrain.parse(["a", "b"], [], pretrain.Recipe.student_temperature, pretrain.Recipe.teacher_temperature)
    memory = cgh.MemoryBank({"global": dim, "hypercolumn": dim}, size)  # random, so that relations to it say nothing
    noise = {name: unit(64, dim, seed=i, dtype=torch.float32) for i, name in enumerate(memory.dims)}
    output = cgh.CGHOutput(*[torch.zeros(())] * 2, {}, cgh.LossWeights()(0), noise, noise)
    assert pretrain.signs_of_collapse(pretrain.collapse(output, memory, method), memory, method) is None

    one = torch.nn.functional.normalize(torch.ones(size, dim) + 0.01 * torch.randn(size, dim))
    memory.enqueue(dict.fromkeys(memory.dims, one))
    output = output._replace(teacher=dict.fromkeys(memory.dims, one[:64]))
    signs = pretrain.signs_of_collapse(pretrain.collapse(output, memory, method), memory, method)
    for name in memory.dims:
        assert f"entropy/teacher_{name} is {math.log(size):.4g} of at most" in signs
        assert f"rank/teacher_{name} is 1." in signs
        assert f"rank/student_{name}" not in signs


@pytest.mark.parametrize("options", [["--epochs=1"], ["--epochs=1", "--accumulate=2"]])
def test_a_short_trial_works_and_logs_its_first_and_last_step(root: Path, tmp_path: Path, options: list[str]) -> None:
    small = [option for option in SMALL if not option.startswith(("--warmup", "--infonce", "--log", "--epochs"))]
    text = run([*small, "--root", root, "--folder", tmp_path / "run", *options], tmp_path / "output.txt")
    config = json.loads((tmp_path / "run" / "config.json").read_text())
    assert (config["warmup_epochs"], config["infonce_epochs"]) == (0.5, 0.5)
    rows = figures(tmp_path / "run")
    assert [int(row["step"]) for row in rows] == [1, 8]
    assert [bool(row["rank/student_global"]) for row in rows] == [False, True]
    assert ("--batch-norm-splits 8 normalises it as eight devices would" in text) == (len(options) == 1)
    assert "Warning" not in text


def test_images_without_labels_name_the_option_that_does_without(root: Path, tmp_path: Path) -> None:
    options = [*SMALL, "--root", root / "train" / "class_0", "--folder", tmp_path, "--knn-epochs=1"]
    failed = Started(options, tmp_path / "output.txt")
    assert failed.wait() == 1
    assert "in train and val: --knn-epochs 0 pre-trains without it" in failed.text()


def test_accumulation_updates_as_the_whole_batch_does(
    pretrain: ModuleType, root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def train(accumulate: int, splits: int) -> dict[str, Tensor]:
        folder = tmp_path / str(accumulate)
        options = ["--root", str(root), "--folder", str(folder), "--warmup-epochs=0", f"--accumulate={accumulate}"]
        training = pretrain.Pretraining(pretrain.parse_arguments([*SMALL, *options]))
        # Two parts are normalised as two groups are; the teacher's shuffling would mix each of them by itself.
        if splits > 1:
            cgh.SplitBatchNorm2d.convert(training.model, splits)
        training.model.double().shuffle = None
        augment = training.augment
        training.augment = lambda crops, seed: [view.double() for view in augment(crops, seed)]
        for crops, _ in itertools.islice(training.batches.epoch(0), 3):
            training.train_step(crops)
        training.log.close()
        assert (training.step, int(training.model.steps), training.model.memory.pointer) == (3, 3, 24)
        return {name: x.clone() for name, x in training.model.state_dict().items() if x.is_floating_point()}

    monkeypatch.setattr(pretrain, "Stop", lambda: None)
    whole, parts = train(1, splits=2), train(2, splits=1)
    for name, x in whole.items():
        if "running" not in name:  # which move once for each part
            assert torch.allclose(parts[name], x, rtol=1e-6, atol=1e-8), name


@pytest.mark.cuda
@pytest.mark.parametrize("precision", ["bf16", "fp16"])
def test_no_step_waits_for_the_gpu(precision: str, pretrain: ModuleType, root: Path, tmp_path: Path) -> None:
    handlers = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT)}
    arguments = [*SMALL, "--root", str(root), "--folder", str(tmp_path), "--device=cuda", f"--precision={precision}"]
    training = pretrain.Pretraining(pretrain.parse_arguments([*arguments, "--no-compile", "--log-steps=1000"]))
    try:
        memory = training.model.memory
        assert {memory[name].dtype for name in memory} == {pretrain.PRECISIONS[precision]}
        for number, (crops, _) in enumerate(training.batches.epoch(0)):
            if number == 3:  # once all is loaded that is loaded on first use
                torch.cuda.set_sync_debug_mode("error")
            training.train_step(crops)
            assert not training.stop()
    finally:
        torch.cuda.set_sync_debug_mode("default")
        training.close(finished=False)
        for number, handler in handlers.items():
            signal.signal(number, handler)
