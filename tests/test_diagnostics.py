"""The diagnostics have the values that can be worked out by hand."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from cgh import diagnostics
from tests.conftest import unit


def close(actual: Tensor, expected: float) -> bool:
    return actual.item() == pytest.approx(expected, rel=1e-6, abs=1e-6)


def test_relation_entropy() -> None:
    assert close(diagnostics.relation_entropy(torch.eye(5)), 0)
    assert close(diagnostics.relation_entropy(torch.full((3, 7), 1 / 7)), math.log(7))
    rows = torch.tensor([[0.5, 0.5, 0.0], [1.0, 0.0, 0.0]])
    assert close(diagnostics.relation_entropy(rows), math.log(2) / 2)


def test_top_neighbour_agreement() -> None:
    first = torch.tensor([[4.0, 3.0, 2.0, 1.0], [4.0, 3.0, 2.0, 1.0]])
    second = torch.tensor([[3.0, 4.0, 1.0, 2.0], [4.0, 1.0, 3.0, 2.0]])
    assert close(diagnostics.top_neighbour_agreement(first, second), 0.5)
    assert close(diagnostics.top_neighbour_agreement(first, second, k=2), 0.75)
    assert close(diagnostics.top_neighbour_agreement(first, second, k=4), 1)


def test_alignment() -> None:
    z = torch.tensor([[1.0, 0.0], [0.0, 1.0], [1.0, 0.0]])
    t = torch.tensor([[1.0, 0.0], [1.0, 0.0], [-1.0, 0.0]])
    assert close(diagnostics.alignment(z, t), (0 + 2 + 4) / 3)
    assert close(diagnostics.alignment(z, t, alpha=1), (0 + math.sqrt(2) + 2) / 3)


def test_uniformity() -> None:
    assert close(diagnostics.uniformity(torch.tensor([[1.0, 0.0], [-1.0, 0.0]])), -8)
    assert close(diagnostics.uniformity(torch.tensor([[1.0, 0.0]]).repeat(4, 1)), 0)
    # Two pairs at right angles and one of opposites.
    z = torch.tensor([[1.0, 0.0], [0.0, 1.0], [-1.0, 0.0]])
    assert close(diagnostics.uniformity(z), math.log((2 * math.exp(-4) + math.exp(-8)) / 3))


def test_effective_rank() -> None:
    assert close(diagnostics.effective_rank(torch.eye(6, 9)), 6)
    assert close(diagnostics.effective_rank(torch.outer(torch.arange(1.0, 5), torch.arange(1.0, 4))), 1)
    singular = torch.diag(torch.tensor([3.0, 1.0]))
    assert close(diagnostics.effective_rank(singular), math.exp(-0.75 * math.log(0.75) - 0.25 * math.log(0.25)))
    rotated = torch.linalg.qr(unit(2, 2).float()).Q @ singular
    assert close(diagnostics.effective_rank(5 * rotated), diagnostics.effective_rank(singular).item())


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: diagnostics.relation_entropy(torch.ones(2, 3)), "relations sum to 3 to 3"),
        (lambda: diagnostics.relation_entropy(torch.tensor([[1.5, -0.5]])), "their least is -0.5"),
        (lambda: diagnostics.relation_entropy(torch.ones(3)), r"shape \(3,\)"),
        (lambda: diagnostics.top_neighbour_agreement(torch.ones(2, 3), torch.ones(2, 4)), r"second \(2, 4\)"),
        (lambda: diagnostics.top_neighbour_agreement(torch.ones(2, 3), torch.ones(2, 3), k=4), "k of 4"),
        (lambda: diagnostics.alignment(torch.eye(2), torch.eye(3)), r"z is \(2, 2\) and t \(3, 3\)"),
        (lambda: diagnostics.alignment(2 * torch.eye(2), torch.eye(2)), "z has rows of length 2 to 2"),
        (lambda: diagnostics.uniformity(torch.eye(1)), "it has 2 or more rows"),
        (lambda: diagnostics.uniformity(torch.tensor([[math.nan, 0.0], [1.0, 0.0]])), "not finite"),
        (lambda: diagnostics.effective_rank(torch.zeros(2, 3)), "all zero"),
    ],
)
def test_bad_input(call: Callable[[], Tensor], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        call()
