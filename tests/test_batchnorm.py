"""A split batch norm is as many batch norms as it has groups."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import cgh
from tests.conftest import small_backbone


@pytest.mark.parametrize("momentum", [0.1, None])
@pytest.mark.parametrize("splits", [1, 2, 4])
def test_equals_one_batch_norm_a_group(splits: int, momentum: float | None) -> None:
    split = cgh.SplitBatchNorm2d(3, splits, momentum=momentum)
    nn.init.normal_(split.weight)
    nn.init.normal_(split.bias)
    norms = [nn.BatchNorm2d(3, momentum=momentum) for _ in range(splits)]
    for norm in norms:
        norm.load_state_dict(split.state_dict())
    for _ in range(2):
        x = torch.randn(8, 3, 5, 5)
        y = split(x)
        for group, norm in enumerate(norms):
            torch.testing.assert_close(y[group::splits], norm(x[group::splits]))
    for name in ("running_mean", "running_var"):
        torch.testing.assert_close(getattr(split, name), sum(getattr(norm, name) for norm in norms) / splits)
    x = torch.randn(3, 3, 5, 5)
    merged = nn.BatchNorm2d(3)
    merged.load_state_dict(split.state_dict())
    torch.testing.assert_close(split.eval()(x), merged.eval()(x))


def test_without_parameters_or_statistics() -> None:
    x = torch.randn(4, 3, 5, 5)
    split = cgh.SplitBatchNorm2d(3, 2, affine=False, track_running_stats=False)
    plain = nn.BatchNorm2d(3, affine=False, track_running_stats=False)
    torch.testing.assert_close(split(x)[1::2], plain(x[1::2]))


def test_convert_keeps_names_parameters_and_statistics() -> None:
    backbone = small_backbone()
    state = {name: x.clone() for name, x in backbone.state_dict().items()}
    parameters = list(backbone.parameters())
    split = cgh.SplitBatchNorm2d.convert(backbone.eval(), 4)
    torch.testing.assert_close(split.state_dict(), state, rtol=0, atol=0)
    assert all(a is b for a, b in zip(parameters, split.parameters(), strict=True))
    norms = [m for m in split.modules() if isinstance(m, nn.BatchNorm2d)]
    assert all(type(m) is cgh.SplitBatchNorm2d and m.num_splits == 4 and not m.training for m in norms)


def test_bad_input() -> None:
    with pytest.raises(ValueError, match="batch of 6 does not split into 4 groups"):
        cgh.SplitBatchNorm2d(3, 4)(torch.randn(6, 3, 2, 2))
    with pytest.raises(ValueError, match="num_splits is 0"):
        cgh.SplitBatchNorm2d(3, 0)
    with pytest.raises(ValueError, match="expected 4D input"):
        cgh.SplitBatchNorm2d(3, 2)(torch.randn(6, 3))
