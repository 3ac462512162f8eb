"""The two heads that map features to the embedding of a context."""

from __future__ import annotations

from collections import OrderedDict

from torch import nn


class ProjectionHead(nn.Sequential):
    """The head of a pooled feature: linear, ReLU, linear.

    Args:
        in_dim: width `W` of the feature.
        dim: width `D` of the embedding.
        hidden_dim: width between the two layers.

    Shape:
        `(N, in_dim)` -> `(N, dim)`, of any length (`ContextEncoder` scales it to one).

    Example:
        >>> import torch, cgh
        >>> cgh.ProjectionHead(2048, dim=512)(torch.randn(4, 2048)).shape
        torch.Size([4, 512])
    """

    def __init__(self, in_dim: int, dim: int = 512, hidden_dim: int = 4096) -> None:
        super().__init__(nn.Linear(in_dim, hidden_dim), nn.ReLU(inplace=True), nn.Linear(hidden_dim, dim))


class HypercolumnHead(nn.Sequential):
    """The head of a hypercolumn: 1x1 convolution, batch norm, ReLU, global average pool, then a `ProjectionHead`.

    Args:
        in_channels: channels `C` of the hypercolumn.
        dim: width `D` of the embedding.
        hidden_dim: width inside the projection.
        width: channels after the convolution; the paper's is the width of the backbone's pooled feature.

    Shape:
        `(N, in_channels, H, W)` -> `(N, dim)`, of any length (`ContextEncoder` scales it to one).

    Example:
        >>> import torch, cgh
        >>> cgh.HypercolumnHead(3072, dim=512)(torch.randn(4, 3072, 7, 7)).shape
        torch.Size([4, 512])
    """

    def __init__(self, in_channels: int, dim: int = 512, hidden_dim: int = 4096, width: int = 2048) -> None:
        super().__init__(
            OrderedDict(
                convolution=nn.Conv2d(in_channels, width, kernel_size=1, bias=False),
                norm=nn.BatchNorm2d(width),
                relu=nn.ReLU(inplace=True),
                pool=nn.AdaptiveAvgPool2d(1),
                flatten=nn.Flatten(),
                projection=ProjectionHead(width, dim, hidden_dim),
            )
        )
