"""What the tests share: small real networks and embeddings."""

from __future__ import annotations

from collections.abc import Mapping

import pytest
import torch
import torch.nn.functional as F
import torchvision
from torch import Tensor, nn

import cgh


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    if not torch.cuda.is_available():
        for item in items:
            if item.get_closest_marker("cuda"):
                item.add_marker(pytest.mark.skip(reason="needs a CUDA GPU; PyTorch sees none"))


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


def small_backbone() -> nn.Module:
    """A torchvision ResNet with one block a stage."""
    return torchvision.models.ResNet(torchvision.models.resnet.BasicBlock, [1, 1, 1, 1])


def small_encoder(backbone: nn.Module | None = None) -> cgh.ContextEncoder:
    features = cgh.HypercolumnExtractor(backbone or small_backbone(), ["layer3", "layer4"])
    return cgh.ContextEncoder(features, dim=16, hidden_dim=32, image_shape=(3, 64, 64))


def unit(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float64) -> Tensor:
    """Random rows of unit length."""
    return F.normalize(torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=dtype), dim=1)


def embeddings(count: int, dims: Mapping[str, int], seed: int = 0) -> dict[str, Tensor]:
    """Random unit embeddings in float64, by context."""
    return {name: unit(count, dim, seed=seed + i) for i, (name, dim) in enumerate(dims.items())}


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    reports = terminalreporter.getreports("passed")
    inputs = sum(int(str(x)) for report in reports for name, x in report.user_properties if name == "inputs")
    if inputs:
        terminalreporter.write_line(f"{inputs:,} broken files were read, or refused by the errors that are documented.")
