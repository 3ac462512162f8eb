"""Figures that tell how a run goes: how sharp relations are, how far contexts agree, whether embeddings collapse."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from cgh.contexts import check_finite


@torch.no_grad()
def relation_entropy(relations: Tensor) -> Tensor:
    """Return the mean entropy of relations, in nats: 0 where each image has one neighbour, `log K` where all are alike.

    Args:
        relations: `(N, K)`, rows that sum to one, as `cgh.RelationMatrix` gives them.

    Raises:
        ValueError: another shape, rows that do not sum to one, or values below zero.

    Example:
        >>> import torch
        >>> from cgh import diagnostics
        >>> round(diagnostics.relation_entropy(torch.full((2, 4), 0.25)).exp().item(), 3)
        4.0
    """
    _check_rows(relations, "relations", at_least=1)
    sums = relations.double().sum(dim=1)
    if relations.min() < 0 or not torch.allclose(sums, torch.ones_like(sums), atol=1e-2):
        raise ValueError(
            f"relations sum to {sums.min():.3g} to {sums.max():.3g} in a row and their least is {relations.min():.3g}; "
            "they are distributions, such as cgh.RelationMatrix gives."
        )
    entropy: Tensor = torch.special.entr(_float(relations))
    return entropy.sum(dim=1).mean()


@torch.no_grad()
def top_neighbour_agreement(first: Tensor, second: Tensor, k: int = 1) -> Tensor:
    """Return the share of an image's `k` nearest memory rows that two contexts have in common, the mean over images.

    Args:
        first: relations or similarities of images to the memory in one context, `(N, K)`.
        second: of the same images to the same memory in another, or of another model.
        k: neighbours to compare.

    Raises:
        ValueError: shapes that differ or are not `(N, K)`, or a `k` outside 1 to `K`.

    Example:
        >>> import torch
        >>> from cgh import diagnostics
        >>> first, second = torch.tensor([[0.1, 0.7, 0.2]]), torch.tensor([[0.3, 0.6, 0.1]])
        >>> [diagnostics.top_neighbour_agreement(first, second, k=k).item() for k in (1, 2)]
        [1.0, 0.5]
    """
    _check_rows(first, "first", at_least=1)
    _check_rows(second, "second", at_least=1)
    if first.shape != second.shape or not 1 <= k <= first.shape[1]:
        raise ValueError(
            f"first is {tuple(first.shape)} and second {tuple(second.shape)}, with k of {k}; they are both (N, K), and "
            "k lies between 1 and K."
        )
    mine, theirs = first.topk(k, dim=1).indices, second.topk(k, dim=1).indices
    return (mine[:, :, None] == theirs[:, None, :]).any(dim=2).float().mean()


@torch.no_grad()
def alignment(z: Tensor, t: Tensor, alpha: float = 2.0) -> Tensor:
    """Return how far two views of an image lie apart: the mean of `|z - t|^alpha` (Wang and Isola, 2020).

    Args:
        z: unit-length embeddings of one view, `(N, D)`.
        t: of the other view of the same images.
        alpha: the power.

    Raises:
        ValueError: shapes that differ or are not `(N, D)`, or rows that are not of unit length.

    Example:
        >>> import torch
        >>> from cgh import diagnostics
        >>> round(diagnostics.alignment(torch.tensor([[1.0, 0.0]]), torch.tensor([[0.0, 1.0]])).item(), 3)
        2.0
    """
    z, t = _unit_rows(z, "z", at_least=1), _unit_rows(t, "t", at_least=1)
    if z.shape != t.shape:
        raise ValueError(f"z is {tuple(z.shape)} and t {tuple(t.shape)}; they are two views of the same images.")
    return torch.mean(torch.linalg.vector_norm(z - t, dim=1) ** alpha)


@torch.no_grad()
def uniformity(z: Tensor, temperature: float = 2.0) -> Tensor:
    """Return how evenly embeddings cover the sphere (Wang and Isola, 2020); the lower, the more evenly.

    `log mean exp(-temperature * |z_i - z_j|^2)` over all pairs of images: 0 where all embeddings are one, and about
    `-2 * temperature` where they point every way in many dimensions. Takes memory for `N^2 / 2` numbers.

    Args:
        z: unit-length embeddings `(N, D)`.
        temperature: of the Gaussian; the authors' `t`.

    Raises:
        ValueError: another shape, fewer than two rows, or rows that are not of unit length.

    Example:
        >>> import torch
        >>> from cgh import diagnostics
        >>> round(diagnostics.uniformity(torch.eye(8)).item(), 3)
        -4.0
    """
    z = _unit_rows(z, "z", at_least=2)
    distances = F.pdist(z).square()
    return torch.logsumexp(-temperature * distances, dim=0) - torch.tensor(float(len(distances))).log()


@torch.no_grad()
def effective_rank(features: Tensor) -> Tensor:
    """Return how many dimensions features really fill: RankMe (Garrido et al., 2023), between 1 and `min(N, W)`.

    The exponential of the entropy of the singular values, scaled to sum to one. A fall is a sign of collapse.

    Args:
        features: `(N, W)`; take more images than dimensions.

    Raises:
        ValueError: another shape, values that are not finite, or nothing but zeros.

    Example:
        >>> import torch
        >>> from cgh import diagnostics
        >>> [round(diagnostics.effective_rank(x).item(), 3) for x in (torch.eye(8), torch.ones(8, 8))]
        [8.0, 1.0]
    """
    _check_rows(features, "features", at_least=1)
    values = torch.linalg.svdvals(_float(features))
    if not values.any():
        raise ValueError(f"features {tuple(features.shape)} are all zero; their rank has no meaning.")
    entropy: Tensor = torch.special.entr(values / values.sum())
    return entropy.sum().exp()


def _float(x: Tensor) -> Tensor:
    return x.to(torch.promote_types(x.dtype, torch.float32))


def _check_rows(x: Tensor, name: str, at_least: int) -> None:
    if x.ndim != 2 or len(x) < at_least or not x.shape[1]:
        raise ValueError(f"{name} has shape {tuple(x.shape)}; it has {at_least} or more rows, one an image.")
    check_finite(x, name)


def _unit_rows(x: Tensor, name: str, at_least: int) -> Tensor:
    """`x`, checked, in float32 at least."""
    _check_rows(x, name, at_least)
    lengths = torch.linalg.vector_norm(_float(x), dim=1)
    if not torch.allclose(lengths, torch.ones_like(lengths), atol=1e-2):
        raise ValueError(
            f"{name} has rows of length {lengths.min():.3g} to {lengths.max():.3g}; scale them to one with "
            "torch.nn.functional.normalize(x, dim=1)."
        )
    return _float(x)
