"""The student gives unit vectors in both contexts, with the paper's heads."""

from __future__ import annotations

import pytest
import torch
import torchvision

import cgh
from tests.conftest import small_backbone, small_encoder


def test_heads_have_the_papers_layers() -> None:
    features = cgh.HypercolumnExtractor(torchvision.models.resnet50(), ["layer3", "layer4"])
    encoder = cgh.ContextEncoder(features)
    shapes = {name: tuple(p.shape) for name, p in encoder.heads.named_parameters() if p.ndim > 1}
    assert shapes == {
        "global.0.weight": (4096, 2048),
        "global.2.weight": (512, 4096),
        "hypercolumn.convolution.weight": (2048, 3072, 1, 1),
        "hypercolumn.projection.0.weight": (4096, 2048),
        "hypercolumn.projection.2.weight": (512, 4096),
    }
    assert encoder.heads["hypercolumn"].convolution.bias is None


@pytest.mark.parametrize("autocast", [False, True])
def test_embeddings_have_unit_length_in_float32(autocast: bool) -> None:
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        z = small_encoder()(torch.randn(3, 3, 64, 64))
    for x in z.values():
        assert x.dtype == torch.float32
        torch.testing.assert_close(x.norm(dim=1), torch.ones(3))


def test_each_context_can_be_asked_for_alone() -> None:
    encoder, images = small_encoder().eval(), torch.randn(3, 3, 64, 64)
    both = encoder(images)
    for name in ("global", "hypercolumn"):
        (alone,) = encoder(images, contexts=[name]).values()
        torch.testing.assert_close(alone, both[name])


def test_the_global_context_alone_runs_no_hypercolumn() -> None:
    encoder = small_encoder()
    encoder.heads["hypercolumn"].register_forward_hook(lambda *_: pytest.fail("the hypercolumn head ran"))
    encoder(torch.randn(3, 3, 64, 64), contexts=["global"])


def test_contexts_may_have_widths_of_their_own() -> None:
    features = cgh.HypercolumnExtractor(small_backbone(), ["layer3", "layer4"])
    encoder = cgh.ContextEncoder(features, dim={"global": 8, "hypercolumn": 4}, hidden_dim=16)
    z = encoder(torch.randn(3, 3, 64, 64))
    assert (z["global"].shape, z["hypercolumn"].shape) == ((3, 8), (3, 4))


def test_compiles_as_one_graph() -> None:
    encoder, images = small_encoder().eval(), torch.randn(2, 3, 64, 64)
    compiled = torch.compile(encoder, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(images), encoder(images))


def test_bad_input() -> None:
    features = cgh.HypercolumnExtractor(small_backbone(), ["layer3", "layer4"])
    with pytest.raises(ValueError, match=r"dim names the contexts \['global'\]; the encoder has"):
        cgh.ContextEncoder(features, dim={"global": 8})
    with pytest.raises(ValueError, match="encoder has no context 'deep'; it has"):
        small_encoder()(torch.randn(2, 3, 64, 64), contexts=["deep"])
