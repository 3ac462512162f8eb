"""Batch norm in groups: one device computes the statistics that many would."""

from __future__ import annotations

import torch.nn.functional as F
from einops import rearrange, reduce, repeat
from torch import Tensor, nn
from typing_extensions import override


class SplitBatchNorm2d(nn.BatchNorm2d):
    """Batch norm that normalises a batch in `num_splits` groups, each by its own mean and variance.

    Image `i` belongs to group `i % num_splits`, which is how a distributed sampler deals images to ranks; so one
    device with `num_splits=8` computes what eight devices with plain batch norm do. The running statistics take the
    mean over the groups, and evaluation is plain batch norm. MoCo's CIFAR demo calls this "split batch norm".

    Args:
        num_features: channels `C`.
        num_splits: groups; the batch must be a multiple of it.
        **options: of `torch.nn.BatchNorm2d`.

    Shape:
        `(N, C, H, W)` -> the same.

    Raises:
        ValueError: the batch is not a multiple of `num_splits`, or `num_splits` is below one.

    Example:
        >>> import torch, cgh
        >>> cgh.SplitBatchNorm2d(16, num_splits=4)(torch.randn(8, 16, 5, 5)).shape
        torch.Size([8, 16, 5, 5])
    """

    def __init__(self, num_features: int, num_splits: int, **options: object) -> None:
        super().__init__(num_features, **options)  # type: ignore[arg-type]  # checked by BatchNorm2d itself
        if num_splits < 1:
            raise ValueError(f"num_splits is {num_splits}; it is 1 or more.")
        self.num_splits = num_splits

    @override
    def forward(self, input: Tensor) -> Tensor:
        if not self.training:
            return super().forward(input)
        self._check_input_dim(input)
        splits = self.num_splits
        if len(input) % splits:
            raise ValueError(
                f"a batch of {len(input)} does not split into {splits} groups; use a multiple of {splits}."
            )
        weight, bias, mean, variance = (
            None if x is None else repeat(x, "c -> (s c)", s=splits)
            for x in (self.weight, self.bias, self.running_mean, self.running_var)
        )
        factor = self.momentum
        if self.num_batches_tracked is not None:
            self.num_batches_tracked.add_(1)
            if factor is None:
                factor = 1.0 / float(self.num_batches_tracked)
        groups = rearrange(input, "(n s) c h w -> n (s c) h w", s=splits)
        output = F.batch_norm(groups, mean, variance, weight, bias, True, factor or 0.0, self.eps)
        for running, grouped in ((self.running_mean, mean), (self.running_var, variance)):
            if running is not None and grouped is not None:
                running.copy_(reduce(grouped, "(s c) -> c", "mean", s=splits))
        return rearrange(output, "n (s c) h w -> (n s) c h w", s=splits)

    @classmethod
    def convert(cls, module: nn.Module, num_splits: int) -> nn.Module:
        """Return `module` with every `BatchNorm2d` in it replaced by a split one of the same parameters and buffers.

        Example:
            >>> import torchvision, cgh
            >>> cgh.SplitBatchNorm2d.convert(torchvision.models.resnet18(), num_splits=8).bn1.num_splits
            8
        """
        if type(module) is nn.BatchNorm2d:
            split = cls(
                module.num_features,
                num_splits,
                eps=module.eps,
                momentum=module.momentum,
                affine=module.affine,
                track_running_stats=module.track_running_stats,
            )
            split.__dict__.update({key: module.__dict__[key] for key in ("_parameters", "_buffers", "training")})
            return split
        for name, child in module.named_children():
            setattr(module, name, cls.convert(child, num_splits))
        return module

    @override
    def extra_repr(self) -> str:
        return f"{nn.BatchNorm2d.extra_repr(self)}, num_splits={self.num_splits}"
