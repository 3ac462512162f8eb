"""A split batch norm is as many batch norms as it has groups."""

from __future__ import annotations

import pytest
import timm
import torch
from torch import nn
from torchvision.ops import FrozenBatchNorm2d

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
        x = torch.randn(8, 3, 5, 5, requires_grad=True)
        y, weights = split(x), torch.randn(8, 3, 5, 5)
        (gradient,) = torch.autograd.grad((y * weights).sum(), x)
        for group, norm in enumerate(norms):
            expected = norm(x[group::splits])
            torch.testing.assert_close(y[group::splits], expected)
            (of_group,) = torch.autograd.grad((expected * weights[group::splits]).sum(), x)
            torch.testing.assert_close(gradient[group::splits], of_group[group::splits])
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


@pytest.mark.parametrize("name", ["resnet18", "efficientnet_b0", "regnety_002"])
def test_every_norm_of_timm_is_split_and_keeps_its_activation(name: str) -> None:
    net = timm.create_model(name, num_classes=0).double().train()
    images = torch.randn(4, 3, 64, 64, dtype=torch.float64)
    with torch.no_grad():
        whole = net(images)
        cgh.SplitBatchNorm2d.convert(net, num_splits=1)
        assert all(type(m) is cgh.SplitBatchNorm2d for m in net.modules() if isinstance(m, nn.BatchNorm2d))
        torch.testing.assert_close(net(images), whole)  # one group is plain batch norm

        cgh.SplitBatchNorm2d.convert(net, num_splits=2)
        halves = torch.stack([timm_twin(net, name)(half) for half in (images[::2], images[1::2])], dim=1).flatten(0, 1)
        torch.testing.assert_close(net(images), halves)
        torch.testing.assert_close(net.eval()(images), timm_twin(net, name).eval()(images))


def timm_twin(net: nn.Module, name: str) -> nn.Module:
    twin = timm.create_model(name, num_classes=0).double().train()
    twin.load_state_dict(net.state_dict())
    return twin


def test_conversion_keeps_hooks_references_and_modes() -> None:
    features = cgh.HypercolumnExtractor(timm.create_model("efficientnet_b0"), ["blocks.5", "bn2"])
    norm = features.backbone.bn2.eval()
    assert cgh.SplitBatchNorm2d.convert(features, num_splits=2) is features
    assert features.backbone.bn2 is norm
    assert not norm.training
    assert features(torch.randn(4, 3, 64, 64)).hypercolumn.shape == (4, 192 + 1280, 2, 2)


def test_other_batch_norms_are_refused_before_anything_changes() -> None:
    class Own(nn.BatchNorm2d):
        pass

    class Foreign(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.register_buffer("running_mean", torch.zeros(4))

    for norm in (nn.SyncBatchNorm(4), nn.LazyBatchNorm2d(), Own(4), Foreign()):
        net = nn.Sequential(nn.BatchNorm2d(4), norm)
        with pytest.raises(TypeError, match=rf"^1 is a .*{type(norm).__name__}, which cannot be split"):
            cgh.SplitBatchNorm2d.convert(net, num_splits=2)
        assert type(net[0]) is nn.BatchNorm2d
    with pytest.raises(ValueError, match="num_splits is 0"):
        cgh.SplitBatchNorm2d.convert(nn.BatchNorm2d(4), num_splits=0)


def test_norms_without_the_batchs_statistics_are_left() -> None:
    net = nn.Sequential(
        FrozenBatchNorm2d(4), nn.BatchNorm1d(4), nn.InstanceNorm2d(4, track_running_stats=True), nn.GroupNorm(2, 4)
    )
    kinds = [type(m) for m in net]
    assert [type(m) for m in cgh.SplitBatchNorm2d.convert(net, num_splits=2)] == kinds
