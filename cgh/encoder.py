"""The student: a hypercolumn extractor and a head for each context."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from typing_extensions import override

from cgh.heads import HypercolumnHead, ProjectionHead
from cgh.hypercolumn import Features, HypercolumnExtractor


class ContextEncoder(nn.Module):
    """Images to unit-length embeddings in their contexts, "global" and "hypercolumn" (Gao et al., 2024).

    An extractor of several hypercolumns gives a context for each, by its name, beside "global".

    Args:
        extractor: the backbone and its chosen layers.
        dim: width `D` of the embeddings, one for all contexts or one for each by name.
        hidden_dim: width inside both heads.
        image_shape: `(channels, height, width)` for finding the feature widths, where the backbone cannot run on an
            image of 224 pixels.

    Shape:
        images `(N, 3, H, W)` -> `{"global": (N, D), "hypercolumn": (N, D)}`, float32 or wider also under autocast.

    Raises:
        TypeError: `extractor` is none, but a bare backbone, say.
        ValueError: `dim` lacks a context, an unknown context is asked for, or the extractor finds something wrong.

    Example:
        >>> import torch, torchvision, cgh
        >>> features = cgh.HypercolumnExtractor(torchvision.models.resnet18(), layers=["layer3", "layer4"])
        >>> student = cgh.ContextEncoder(features, dim=128, hidden_dim=512)
        >>> z = student(torch.randn(2, 3, 64, 64))
        >>> z["global"].shape, z["hypercolumn"].shape
        (torch.Size([2, 128]), torch.Size([2, 128]))
    """

    def __init__(
        self,
        extractor: HypercolumnExtractor,
        dim: int | Mapping[str, int] = 512,
        hidden_dim: int = 4096,
        image_shape: Sequence[int] | None = None,
    ) -> None:
        super().__init__()
        if not isinstance(extractor, HypercolumnExtractor):
            raise TypeError(
                f"the extractor is a {type(extractor).__name__}; pass cgh.HypercolumnExtractor(backbone, layers)."
            )
        names = ("global", *extractor.hypercolumns)
        self.dims = dict(dim) if isinstance(dim, Mapping) else dict.fromkeys(names, dim)
        if set(self.dims) != set(names):
            raise ValueError(f"dim names the contexts {sorted(self.dims)}; the encoder has {list(names)}.")
        pooled, hypercolumns = extractor.widths(image_shape)
        self.extractor = extractor
        self.heads = nn.ModuleDict({"global": ProjectionHead(pooled, self.dims["global"], hidden_dim)})
        for name, channels in hypercolumns.items():
            self.heads[name] = HypercolumnHead(channels, self.dims[name], hidden_dim, width=pooled)

    if TYPE_CHECKING:

        def __call__(self, images: Tensor, contexts: Sequence[str] | None = None) -> dict[str, Tensor]: ...

    @override
    def forward(self, images: Tensor, contexts: Sequence[str] | None = None) -> dict[str, Tensor]:
        """Return the embeddings of `images` in the named `contexts`, by default in all.

        Multi-crop's extra views need `contexts=["global"]` alone, which costs no hypercolumn.
        """
        names = tuple(self.dims) if contexts is None else tuple(contexts)
        for name in names:
            if name not in self.dims:
                raise ValueError(f"the encoder has no context {name!r}; it has {list(self.dims)}.")
        if names == ("global",):
            return self.project(Features(self.extractor.pooled(images), {}), names)
        return self.project(self.extractor(images), names)

    def project(self, features: Features, contexts: Sequence[str] | None = None) -> dict[str, Tensor]:
        """Return the embeddings of what the extractor gave, where something else needs the same features too."""
        inputs = {"global": features.pooled, **features.hypercolumns}
        names = inputs if contexts is None else contexts
        return {name: _unit_length(self.heads[name](inputs[name])) for name in names}


def _unit_length(x: Tensor) -> Tensor:
    """Scale the rows of `x` `(N, D)` to unit length, in float32 at least."""
    return F.normalize(x.to(torch.promote_types(x.dtype, torch.float32)), dim=1)
