"""The whole chain, pre-training and the four evaluations, with backbones that are no ResNets."""

from __future__ import annotations

import importlib
import json
from pathlib import Path

import pytest

from tests.examples.imagenet.runs import EXAMPLE, SMALL, Started, make_images, run
from tests.examples.imagenet.test_evaluations import _examples, evaluate  # noqa: F401  # a fixture of every test here

pytestmark = pytest.mark.skipif(not EXAMPLE.exists(), reason="the examples are not here")
pytest.importorskip("timm")


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_images(tmp_path_factory.mktemp("images"), train=16)


@pytest.mark.parametrize(
    ("arch", "layers", "options"),
    [
        ("timm/vit_tiny_patch16_224", ["blocks.7", "blocks.11"], ["--optimizer=adamw"]),
        ("timm/convnext_atto", ["stages.2", "stages.3"], ["--optimizer=lars", "--batch-norm-splits=2"]),
    ],
)
def test_the_whole_chain(arch: str, layers: list[str], options: list[str], root: Path, tmp_path: Path) -> None:
    given = [f"--root={root}", f"--folder={tmp_path / 'run'}", f"--arch={arch}", "--drop-path=0.1", *options]
    run([*SMALL, *given, "--log-steps=1", "--knn-epochs=2", "--lr=0.001"], tmp_path / "output.txt")
    assert json.loads((tmp_path / "run" / "config.json").read_text())["layers"] == layers

    kept = f"--features={tmp_path / 'features'}"
    evaluated = [f"--weights={tmp_path / 'run' / 'checkpoint.pt'}", f"--root={root}"]
    neighbours = evaluate("knn", tmp_path / "knn", *evaluated, kept, "--k", 5)
    assert neighbours["5 neighbours"]["top1"] > 70  # each class has a colour
    assert evaluate("cluster", tmp_path / "cluster", kept)["accuracy"] > 40
    assert evaluate("linear", tmp_path / "linear", *evaluated, "--epochs=20", "--lr=0.01")["top1"] > 50
    assert (
        evaluate("semisup", tmp_path / "semisup", *evaluated, "--epochs=1", "--fraction=0.5", "--layer-decay=0.7")[
            "labels"
        ]
        == 8
    )


def test_layers_that_do_not_fit_are_answered_by_those_that_do(root: Path, tmp_path: Path) -> None:
    arguments = [
        *SMALL,
        f"--root={root}",
        f"--folder={tmp_path}",
        "--arch=timm/vit_tiny_patch16_224",
        "--layers=layer4",
    ]
    failed = Started(arguments, tmp_path / "output.txt")
    assert failed.wait() == 1
    assert "--layers layer4: the backbone (VisionTransformer) has no layer 'layer4'" in failed.text()
    assert "blocks.11             192 x 2 x 2  16      NLC" in failed.text()


def test_a_backbone_without_known_layers_or_prefix_tokens() -> None:
    pretrain = importlib.import_module("pretrain")
    told = [*SMALL, "--root=images", "--folder=run"]
    with pytest.raises(ValueError, match="--layers: no layers are known for a Twins.*\n *layer "):
        pretrain.build_model(pretrain.parse_arguments([*told, "--arch=timm/twins_svt_small"]), 0, 1)
    config = pretrain.parse_arguments([*told, "--arch=timm/gmlp_ti16_224"])
    with pytest.raises(ValueError, match="unknown number of prefix tokens"):
        pretrain.build_model(config, 0, 1)
    config.prefix_tokens = 0
    model, _ = pretrain.build_model(config, 0, 1)
    assert model.student.extractor.prefix_tokens == (0,)
