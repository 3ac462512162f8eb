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
        """Return the normalised batch, each group by its own statistics in training."""
        if not self.training or self.num_splits == 1:
            return self._rest(super().forward(input))
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
        return self._rest(rearrange(output, "n (s c) h w -> (n s) c h w", s=splits))

    def _rest(self, output: Tensor) -> Tensor:
        """What belongs to the norm's layer and comes after it: the drop and the activation of timm's."""
        for module in self.children():
            output = module(output)
        return output

    @classmethod
    def convert(cls, module: nn.Module, num_splits: int) -> nn.Module:
        """Make every `BatchNorm2d` in `module` a split one, and return `module`.

        Each stays the same object with the same parameters, buffers and hooks, so it makes no difference whether an
        extractor or an optimiser was made before. timm's norms with an activation, `BatchNormAct2d`, keep it. Norms
        that take no statistics from the batch, or of fewer or more dimensions, are left as they are.

        Raises:
            ValueError: `num_splits` is below one.
            TypeError: a batch norm is of another class, such as `SyncBatchNorm`, which splits over the ranks itself;
                nothing is converted then.

        Example:
            >>> import torchvision, cgh
            >>> cgh.SplitBatchNorm2d.convert(torchvision.models.resnet18(), num_splits=8).bn1.num_splits
            8
        """
        if num_splits < 1:
            raise ValueError(f"num_splits is {num_splits}; it is 1 or more.")
        norms = {name: part for name, part in module.named_modules() if _uses_batch_statistics(part)}
        for name, norm in norms.items():
            kind = f"{type(norm).__module__}.{type(norm).__qualname__}"
            if type(norm) not in (cls, nn.BatchNorm2d) and kind != "timm.layers.norm_act.BatchNormAct2d":
                raise TypeError(
                    f"{name or 'the module'} is a {kind}, which cannot be split; build the network with "
                    "torch.nn.BatchNorm2d in its place."
                )
        for norm in norms.values():
            norm.__class__ = cls  # the object stays, for all that refer to it
            norm.num_splits = num_splits
        return module

    @override
    def extra_repr(self) -> str:
        return f"{nn.BatchNorm2d.extra_repr(self)}, num_splits={self.num_splits}"


def _uses_batch_statistics(module: nn.Module) -> bool:
    """Whether a module is a batch norm of maps, of whatever library; a frozen one keeps its weight as a buffer."""
    if isinstance(module, (nn.BatchNorm1d, nn.BatchNorm3d, nn.modules.instancenorm._InstanceNorm)):
        return False
    frozen = module._buffers.get("weight") is not None
    return isinstance(module, nn.modules.batchnorm._BatchNorm) or ("running_mean" in module._buffers and not frozen)
