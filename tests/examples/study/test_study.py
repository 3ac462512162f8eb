"""The study's methods are what they say, it goes on as if never stopped, and its search sees no test image."""

from __future__ import annotations

import csv
import importlib
import json
import math
from pathlib import Path
from types import ModuleType, SimpleNamespace

import pytest
import torch
import torchvision
from PIL import Image
from torch import Tensor
from torchvision.transforms.v2.functional import pil_to_tensor, to_pil_image

import cgh

EXAMPLE = Path(__file__).parents[3] / "examples" / "study"
CLASSES, EACH, SIZE = 4, 60, 8

pytestmark = pytest.mark.skipif(not EXAMPLE.exists(), reason="the examples are not here")


@pytest.fixture
def study(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    for module in ("matplotlib", "rich", "tyro"):
        pytest.importorskip(module)
    monkeypatch.syspath_prepend(str(EXAMPLE))
    return importlib.import_module("study")


@pytest.fixture
def methods(study: ModuleType) -> ModuleType:
    return importlib.import_module("methods")


def make_images(root: Path, *splits: str) -> Path:
    """Write stripes of a slope for each class, under noise."""
    generator = torch.Generator().manual_seed(0)
    rows, columns = torch.meshgrid(torch.arange(SIZE), torch.arange(SIZE), indexing="ij")
    for split in splits:
        for label in range(CLASSES):
            folder = root / split / f"class{label}"
            folder.mkdir(parents=True)
            for i in range(EACH):
                stripes = 128 + 90 * torch.sin((rows + label * columns) * 1.0)
                noisy = stripes + 20 * torch.randn(3, SIZE, SIZE, generator=generator)
                to_pil_image(noisy.clamp(0, 255).to(torch.uint8)).save(folder / f"{i:04d}.jpg", quality=95)
    return root


def options(study: ModuleType, root: Path, out: Path, **changes: object) -> dict[str, object]:
    small = {"epochs": 3, "batch": 48, "size": SIZE, "width": 8, "dim": 8, "every": 2, "device": "cpu"}
    return {
        "root": root,
        "out": out,
        **small,
        "settings": study.Settings(memory_size=96, warmup=0.3, hidden=16),
        **changes,
    }


def learner(methods: ModuleType, name: str, warmup: float = 0.0, **changes: object) -> torch.nn.Module:
    torch.manual_seed(0)
    settings = methods.Settings(memory_size=32, warmup=warmup, hidden=16, **changes)
    return methods.Learner(methods.METHODS[name], settings, 10, methods.resnet18(8), (3, 16, 16), dim=8, seed=0)


def loss_of(model: torch.nn.Module, strong: Tensor, weak: Tensor, step: int) -> tuple[Tensor, dict[str, Tensor]]:
    return model(strong, weak, model.weights(step))


@pytest.mark.parametrize(
    ("name", "pairs"),
    [
        ("infonce-global", []),
        ("infonce", []),
        ("ressl", [("global", "global")]),
        ("within", [("global", "global"), ("hypercolumn", "hypercolumn")]),
        ("across", [("global", "hypercolumn"), ("hypercolumn", "global")]),
        (
            "three",
            [
                ("global", "shallow"),
                ("global", "deep"),
                ("shallow", "global"),
                ("shallow", "deep"),
                ("deep", "global"),
                ("deep", "shallow"),
            ],
        ),
    ],
)
def test_a_method_is_its_pairs_and_nothing_else(methods: ModuleType, name: str, pairs: list[tuple[str, str]]) -> None:
    model = learner(methods, name)
    strong, weak = torch.randn(2, 8, 3, 16, 16)
    loss, _ = loss_of(model, strong, weak, step=0)
    model = learner(methods, name)  # batch norms as at the first call
    z, t = model.student(strong), model.teacher(weak)
    contexts = model.memory.dims
    if not pairs:
        expected = sum(cgh.InfoNCELoss()({c: z[c]}, {c: t[c]}, {c: model.memory[c]}) for c in contexts)
    else:
        student, teacher = (
            {"global": g} | dict.fromkeys(set(contexts) - {"global"}, h) for g, h in ((0.1, 0.08), (0.04, 0.08))
        )
        terms = [cgh.CrossContextLoss(student, teacher, [pair])(z, t, model.memory) for pair in pairs]
        expected = torch.stack(terms).mean()
    torch.testing.assert_close(loss, expected)


def test_all_methods_start_from_the_same_weights(methods: ModuleType) -> None:
    first = learner(methods, "infonce-global").student.state_dict()
    for name in ("infonce", "ressl", "within", "across"):
        for key, value in learner(methods, name).student.state_dict().items():
            assert torch.equal(value, first[key]), (name, key)


def test_infonce_fades_into_the_relations(methods: ModuleType) -> None:
    strong, weak = torch.randn(2, 8, 3, 16, 16)
    at_start, _ = loss_of(learner(methods, "across", warmup=1.0), strong, weak, step=0)
    infonce, _ = loss_of(learner(methods, "infonce"), strong, weak, step=0)
    relations, _ = loss_of(learner(methods, "across"), strong, weak, step=0)
    half, _ = loss_of(learner(methods, "across", warmup=1.0), strong, weak, step=5)
    torch.testing.assert_close(at_start, infonce)
    torch.testing.assert_close(half, (infonce + relations) / 2)


def test_the_network_is_torchvisions_with_another_stem(methods: ModuleType) -> None:
    ours, theirs = methods.resnet18().eval(), torchvision.models.resnet18().eval()
    theirs.conv1, theirs.maxpool, theirs.fc = ours.conv1, torch.nn.Identity(), torch.nn.Identity()
    theirs.load_state_dict(ours.state_dict())
    images = torch.randn(2, 3, 16, 16)
    torch.testing.assert_close(ours(images), theirs(images))


def state(folder: Path) -> dict[str, Tensor]:
    saved = torch.load(folder / "checkpoint.pt", weights_only=True)
    momenta = {f"momentum {key}": value["momentum_buffer"] for key, value in saved["optimizer"]["state"].items()}
    return saved["learner"] | momenta | {"losses": torch.tensor([row["loss"] for row in saved["log"]])}


def test_stopping_and_going_on_gives_the_bits_of_never_stopping(study: ModuleType, tmp_path: Path) -> None:
    root = make_images(tmp_path / "images", "train", "test")
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    study.main(
        study.Run(results=tmp_path / "results.csv", **options(study, root, whole, methods=("across",), seeds=(3,)))
    )
    for done in (1, 2, 3):
        study.main(
            study.Run(
                results=tmp_path / "results.csv",
                **options(study, root, parts, methods=("across",), seeds=(3,), minutes=0.0),
            )
        )
        assert len(state(parts / "runs/across-3")["losses"]) == done
    study.main(
        study.Run(
            results=tmp_path / "results.csv",
            **options(study, root, parts, methods=("across",), seeds=(3,), minutes=0.0),
        )
    )

    first, second = state(whole / "runs/across-3"), state(parts / "runs/across-3")
    assert first.keys() == second.keys()
    for key in first:
        assert torch.equal(first[key], second[key]), key
    results = [json.loads((out / "runs/across-3/result.json").read_text()) for out in (whole, parts)]
    for column in ("20 neighbours", "200 neighbours", "linear"):
        assert results[0][column] == results[1][column]
    # Three epochs with an evaluation after the second, and after the last.
    assert [bool(row["20 neighbours"]) for row in csv.DictReader((whole / "runs/across-3/log.csv").open())] == [
        False,
        True,
        True,
    ]
    assert "relations across (CGH)" in (whole / "table.md").read_text()
    assert (whole / "curves.png").stat().st_size > 10_000

    with pytest.raises(ValueError, match="batch 48, not 40"):
        study.main(
            study.Run(
                results=tmp_path / "results.csv",
                **options(study, root, parts, methods=("across",), seeds=(3,), batch=40),
            )
        )


@pytest.mark.parametrize(
    ("arch", "layers"),
    [
        ("timm/vit_tiny_patch16_224", ["blocks.7", "blocks.11"]),
        ("timm/convnext_atto", ["stages.2", "stages.3"]),
        ("shufflenet_v2_x0_5", ["stage3", "conv5"]),
    ],
)
def test_any_backbone_is_studied(study: ModuleType, tmp_path: Path, arch: str, layers: list[str]) -> None:
    root = make_images(tmp_path / "images", "train", "test")
    given = options(study, root, tmp_path / "out", epochs=1, arch=arch, size=32, methods=("across",), seeds=(0,))
    config = study.Run(results=tmp_path / "results.csv", **given | {"width": 64})
    study.main(config)
    assert json.loads((tmp_path / "out/runs/across-0/config.json").read_text())["layers"] == layers
    row = study.read_rows(tmp_path / "results.csv")[-1]
    assert row["settings"].startswith(f"{arch}: hidden 16")
    assert float(row["20 neighbours"]) >= 0
    study.main(config)
    assert len(study.read_rows(tmp_path / "results.csv")) == 1


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"arch": "resnet19"}, r"arch is 'resnet19'.*close names: resnet18"),
        ({"arch": "shufflenet_v2_x0_5", "methods": ("three",)}, r"(?s)no layer 'layer1'.*stage3"),
        ({"arch": "shufflenet_v2_x0_5", "width": 32}, r"--width 32 is of resnet18, but --arch is shufflenet_v2_x0_5"),
        ({"images": 192}, r"192 training images have not the 200 neighbours"),
        ({"small_images": True}, r"--small-images is of other ResNets"),
    ],
)
def test_a_backbone_that_does_not_fit_is_told(
    study: ModuleType, tmp_path: Path, changes: dict[str, object], message: str
) -> None:
    root = make_images(tmp_path / "images", "train", "test")
    given = {"epochs": 1, "methods": ("across",), "seeds": (0,), "width": 64, "size": 32, **changes}
    with pytest.raises(ValueError, match=message):
        study.main(study.Run(results=tmp_path / "results.csv", **options(study, root, tmp_path / "out", **given)))


def test_a_run_that_was_started_with_fewer_options_goes_on(study: ModuleType, tmp_path: Path) -> None:
    root = make_images(tmp_path / "images", "train", "test")
    config = study.Run(
        results=tmp_path / "results.csv",
        **options(study, root, tmp_path / "out", epochs=2, methods=("ressl",), seeds=(0,), minutes=0.0),
    )
    study.main(config)
    path = tmp_path / "out/runs/ressl-0/config.json"
    there = json.loads(path.read_text())
    path.write_text(json.dumps({key: value for key, value in there.items() if key not in ("arch", "small_images")}))
    study.main(config)
    study.main(config)
    assert [row["epoch"] for row in study.read_rows(tmp_path / "results.csv")] == ["2"]


def test_a_search_needs_no_test_images(study: ModuleType, tmp_path: Path) -> None:
    root = make_images(tmp_path / "images", "train")
    search = study.Search(
        **options(study, root, tmp_path / "out", methods=("ressl",), epochs=1),
        learning_rate=(0.06, 0.12),
        temperature=((0.1, 0.1, 0.04, 0.04), (0.1, 0.3, 0.04, 0.3)),  # the same, where there is one context
        infonce_temperature=(0.2,),
        momentum=(0.99,),
        memory_size=(96,),
        warmup=(0.3, 0.6),
    )
    study.main(search)
    trials = list(csv.DictReader((tmp_path / "out/search/ressl.csv").open()))
    tried = [(float(t["learning_rate"]), float(t["teacher_global"]), float(t["warmup"])) for t in trials]
    rate = max(trials[:2], key=lambda trial: float(trial["20 neighbours"]))["learning_rate"]
    assert tried[:2] == [(0.06, 0.04, 0.3), (0.12, 0.04, 0.3)]
    assert tried[2:] == [(float(rate), 0.04, 0.6)]
    best = max(trials, key=lambda trial: float(trial["20 neighbours"]))
    chosen = json.loads((tmp_path / "out/search/ressl.json").read_text())
    assert (chosen["learning_rate"], chosen["warmup"]) == (float(best["learning_rate"]), float(best["warmup"]))


def test_a_seed_decides_the_order_and_the_views(study: ModuleType, tmp_path: Path) -> None:
    images = study.Images(torch.zeros(240, 3, SIZE, SIZE, dtype=torch.uint8), torch.zeros(240, dtype=torch.long))
    job = study.Study(study.Run(**options(study, tmp_path, tmp_path)), images, images)

    def drawn(seed: int, epoch: int) -> list[Tensor]:
        steps = []

        def step(rate: float, weights: object, *draws: Tensor) -> Tensor:
            steps.append(draws)
            return torch.zeros(())

        weights = SimpleNamespace(weights=lambda step: None)
        job._epoch(step, weights, lambda step: 0.0, seed, epoch)
        return [torch.stack(draws) for draws in zip(*steps, strict=True)]

    first, again, *others = drawn(0, 1), drawn(0, 1), drawn(1, 1), drawn(2**32, 1), drawn(0, 2)
    for number, draws in enumerate(first):  # order, crops, colours
        assert torch.equal(draws, again[number])
        assert not any(torch.equal(draws, other[number]) for other in others)


def test_held_out_images_are_not_trained_on(study: ModuleType) -> None:
    images = study.Images(torch.arange(100), torch.zeros(100, dtype=torch.long))
    train, held_out = study.hold_out(images, 60)
    assert (len(train.pixels), len(held_out.pixels)) == (60, 10)
    assert not set(train.pixels.tolist()) & set(held_out.pixels.tolist())
    everything, _ = study.hold_out(images, None)
    assert len(everything.pixels) == 90


def test_the_table_is_the_mean_and_the_spread_of_the_seeds(study: ModuleType, tmp_path: Path) -> None:
    results = importlib.import_module("results")
    budget = {"epochs": 4, "images": 9, "size": 8, "width": 8, "batch": 3, "settings": "default"}
    for method, gain in (("within", 0.0), ("across", 2.0)):
        for seed, accuracy in enumerate((40.0, 41.0, 43.5)):
            key = {"method": method, "seed": seed, **budget}
            evaluations = [
                {
                    **key,
                    "epoch": epoch,
                    "20 neighbours": accuracy + gain,
                    "200 neighbours": accuracy - epoch,
                    "linear": x,
                }
                for epoch, x in ((2, None), (4, 50.0))
            ]
            results.add_rows(tmp_path / "rows.csv", evaluations)
    study.main(study.Table(tmp_path, tmp_path / "rows.csv"))
    text = (tmp_path / "table.md").read_text()
    assert "| relations, each context from itself | 3 | 41.5 ± 1.8 | 37.5 ± 1.8 | 39.5 ± 1.8 | 50.0 ± 0.0 |" in text
    assert "| relations, each context from itself | 3 | +2.0 ± 0.0 | +0.0 ± 0.0 | +0.0 ± 0.0 | +0.0 ± 0.0 |" in text
    assert (tmp_path / "curves.png").stat().st_size > 10_000


def test_rows_are_added_and_never_overwritten(study: ModuleType, tmp_path: Path) -> None:
    results = importlib.import_module("results")
    path = tmp_path / "new" / "rows.csv"
    results.add_rows(path, [{"method": "a", "accuracy": 0.123456789}])
    before = path.read_text()
    results.add_rows(path, [{"method": "b"}])
    assert path.read_text().startswith(before)
    rows = results.read_rows(path)
    assert [(row["method"], row["accuracy"]) for row in rows] == [("a", "0.123457"), ("b", "")]
    with pytest.raises(ValueError, match="no column 'colour'"):
        results.add_rows(path, [{"method": "c", "colour": "red"}])
    assert len(results.read_rows(path)) == 2


def test_a_finished_run_has_its_rows_once(study: ModuleType, tmp_path: Path) -> None:
    root, results = make_images(tmp_path / "images", "train", "test"), tmp_path / "results.csv"
    command = study.Run(results=results, **options(study, root, tmp_path / "out", methods=("untrained",), seeds=(0, 1)))
    study.main(command)
    text = results.read_text()
    study.main(command)
    assert results.read_text() == text
    assert [row["seed"] for row in csv.DictReader(results.open())] == ["0", "1"]


def test_factors_are_told_from_the_noise(study: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    factors = importlib.import_module("factors")
    monkeypatch.setattr(factors, "FACTORS", {"layers": ({"layers": ("layer4",)}, {"layers": ("layer3", "layer4")})})
    root, results = make_images(tmp_path / "images", "train"), tmp_path / "factors.csv"
    small = options(study, root, tmp_path / "out", epochs=1)
    command = study.Factors(results=results, noise_seeds=2, seeds=1, factors=("layers",), **small)
    with pytest.raises(ValueError, match="no factor 'depth'; there are 'layers'"):
        study.main(study.Factors(results=results, factors=("depth",), **small))
    study.main(command)
    rows = list(csv.DictReader(results.open()))
    assert [(row["change"], row["seed"]) for row in rows] == [("start", "0"), ("start", "1"), ("layers layer4", "0")]
    text = results.read_text()
    study.main(command)
    assert results.read_text() == text

    judged = {
        ("start", "start"): (40.0, 41.0, 42.0),
        ("layers", "more"): (45.0, 46.0),
        ("layers", "less"): (41.0, 42.0),
    }
    text = factors.factors_table(
        [
            {
                "method": "across",
                "factor": factor,
                "change": change,
                "seed": str(seed),
                **dict.fromkeys(factors.TARGETS, ""),
            }
            | {"20 neighbours": str(x), "200 neighbours": str(x)}
            for (factor, change), values in judged.items()
            for seed, x in enumerate(values)
        ],
        "20 neighbours",
    )
    # The noise is 1.0, and so is that of a difference over two seeds; a change has moved where it exceeds 2.0.
    assert "(noise 1.0)" in text
    assert "| +5.0 | yes |" in text
    assert "| +1.0 | no |" in text


def test_both_views_by_turns_is_the_mean_of_both_ways(methods: ModuleType) -> None:
    strong, weak = torch.randn(2, 8, 3, 16, 16)
    both, _ = loss_of(learner(methods, "across", symmetric=True), strong, weak, step=0)
    model = learner(methods, "across")
    ways = [loss_of(model, first, second, step=0)[0] for first, second in ((strong, weak), (weak, strong))]
    torch.testing.assert_close(both, torch.stack(ways).mean())


def test_the_teachers_momentum_rises_in_a_cosine(methods: ModuleType) -> None:
    momentum = methods.momentum(methods.Settings(momentum=0.99, momentum_end=1.0), steps=10)
    assert [momentum(step) for step in (0, 5, 10, 11)] == pytest.approx([0.99, 0.995, 1.0, 1.0])
    assert methods.momentum(methods.Settings(momentum=0.99), steps=10) == 0.99


def test_targets_tell_how_sharp_the_teacher_is(methods: ModuleType) -> None:
    figures = [learner(methods, "across", teacher_global=x).targets(torch.randn(8, 3, 16, 16)) for x in (0.04, 100.0)]
    assert figures[0]["entropy global"] < figures[1]["entropy global"] == pytest.approx(math.log(32), abs=1e-3)
    assert figures[0]["entropy hypercolumn"] == figures[1]["entropy hypercolumn"]
    assert 0 <= figures[0]["agreement"] <= 1


def test_the_digits_by_every_method(study: ModuleType, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("sklearn")
    digits = importlib.import_module("digits")
    paths = {"results": tmp_path / "digits.csv", "pictures": tmp_path}
    digits.main(digits.Run(methods=("ressl", "across", "three"), seeds=(0,), epochs=1, **paths))
    rows = list(csv.DictReader(paths["results"].open()))
    assert [row["method"] for row in rows] == ["ressl", "across", "three"]
    assert all(70 < float(row["20 neighbours"]) <= 100 for row in rows)
    text = paths["results"].read_text()
    capsys.readouterr()
    digits.main(digits.Table(**paths))
    assert paths["results"].read_text() == text
    assert "| relations across (CGH) | 1 | " in capsys.readouterr().out
    assert all((tmp_path / f"digits-{name}.svg").stat().st_size > 10_000 for name in ("methods", "curves"))
    curves = list(csv.DictReader((tmp_path / "digits-curves.csv").open()))
    assert [(row["method"], row["epoch"]) for row in curves] == [(row["method"], "1") for row in rows]
    # Evaluated on the way and at the end, which is the same here.
    assert [row["20 neighbours"] for row in curves] == [row["20 neighbours"] for row in rows]


def test_images_are_decoded_once_and_scaled_by_area(study: ModuleType, tmp_path: Path) -> None:
    root = make_images(tmp_path / "images", "train")
    full = study.load(root, "train", SIZE, tmp_path / "cache")
    assert full.pixels.shape == (CLASSES * EACH, 3, SIZE, SIZE)
    assert full.labels.tolist() == [label for label in range(CLASSES) for _ in range(EACH)]
    file = root / "train/class2/0007.jpg"
    assert torch.equal(full.pixels[2 * EACH + 7], pil_to_tensor(Image.open(file)))
    file.unlink()
    half = study.load(root, "train", SIZE // 2, tmp_path / "cache")
    means = full.pixels.float().unfold(2, 2, 2).unfold(3, 2, 2).mean(dim=(4, 5))
    assert torch.equal(half.pixels, means.round().to(torch.uint8))
    with pytest.raises(FileNotFoundError, match="no folder 'test'"):
        study.load(root, "test", SIZE, tmp_path / "cache")


def test_an_unknown_method_is_named(study: ModuleType, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="no method 'moco'; there are infonce-global"):
        study.main(study.Run(root=tmp_path, methods=("moco",)))


def test_narrow_networks_are_refused_on_a_processor(study: ModuleType) -> None:
    images = study.Images(torch.zeros(48, 3, SIZE, SIZE, dtype=torch.uint8), torch.zeros(48, dtype=torch.long))
    with pytest.raises(ValueError, match="--width 4 on a CPU: .* Take 8 or more"):
        study.Study(study.Budget(root=Path(), batch=48, width=4, device="cpu"), images, images)
