"""What is exported gives what the live model gives, and the live model stays as it is."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import cgh
from cgh.interop import exportable
from tests.conftest import small_backbone, small_encoder

PARTS: dict[str, Callable[[cgh.ContextEncoder], nn.Module]] = {
    "backbone": lambda encoder: encoder.extractor.backbone,
    "extractor": lambda encoder: encoder.extractor,
    "student": lambda encoder: encoder,
    "compiled student": lambda encoder: torch.compile(encoder, backend="eager"),
}
IMAGES = torch.randn(3, 3, 64, 64, generator=torch.Generator().manual_seed(0))


def flat(output: Any) -> list[torch.Tensor]:
    return torch.utils._pytree.tree_leaves(output)


@pytest.mark.parametrize("part", PARTS)
def test_an_exported_program_and_the_live_model_agree(part: str) -> None:
    encoder = small_encoder().eval()
    model = PARTS[part](encoder)
    with torch.no_grad():
        expected = flat(model(IMAGES))
        batch = {0: torch.export.Dim("batch", min=2, max=64)}
        program = torch.export.export(exportable(model), (IMAGES[:2],), dynamic_shapes=[batch])
        torch.testing.assert_close(flat(program.module()(IMAGES)), expected, rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(flat(model(IMAGES)), expected, rtol=0, atol=0)


@pytest.mark.parametrize("strict", [True, False])
def test_exporting_the_live_model_leaves_it_as_it_was(strict: bool) -> None:
    encoder = small_encoder().eval()
    expected = encoder(IMAGES)
    for module in (encoder, encoder.extractor):
        torch.export.export(module, (IMAGES,), strict=strict)
        torch.testing.assert_close(encoder(IMAGES), expected, rtol=0, atol=0)


@pytest.mark.skipif(torch.__version__ < (2, 7), reason="PyTorch 2.6's exporter fails with the onnxscript of today")
@pytest.mark.parametrize("part", ["backbone", "extractor", "student"])
def test_onnx_and_the_live_model_agree(part: str, tmp_path: Path) -> None:
    pytest.importorskip("onnxscript")
    runtime = pytest.importorskip("onnxruntime")
    encoder = small_encoder().eval()
    model = PARTS[part](encoder)
    with torch.no_grad():
        expected = flat(model(IMAGES))
        torch.onnx.export(exportable(model), (IMAGES,), tmp_path / "model.onnx", dynamo=True, verbose=False)
        torch.testing.assert_close(flat(model(IMAGES)), expected, rtol=0, atol=0)
    session = runtime.InferenceSession(tmp_path / "model.onnx", providers=["CPUExecutionProvider"])
    found = session.run(None, {session.get_inputs()[0].name: IMAGES.numpy()})
    torch.testing.assert_close([torch.from_numpy(x) for x in found], expected, rtol=1e-3, atol=1e-4)


def test_a_backbone_is_scripted_without_its_hooks() -> None:
    extractor = cgh.HypercolumnExtractor(small_backbone(), ["layer3", "layer4"]).eval()
    scripted = torch.jit.script(exportable(extractor.backbone))
    torch.testing.assert_close(scripted(IMAGES), extractor(IMAGES).pooled)
    with pytest.raises(AttributeError, match=r"cgh\.interop\.exportable\(backbone\)"):
        torch.jit.script(extractor.backbone)


def test_the_copy_is_evaluated_and_the_model_is_not() -> None:
    model = cgh.CGH(small_backbone(), dim=8, hidden_dim=8, memory_size=8, image_shape=(3, 64, 64)).train()
    copied = exportable(model)
    assert not copied.training
    assert model.student.training
    assert {*copied(IMAGES)} == {"global", "hypercolumn"}
    with pytest.raises(TypeError, match="the model is 'resnet18'; pass an nn.Module"):
        exportable("resnet18")  # type: ignore[arg-type]
