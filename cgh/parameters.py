"""Groups of parameters for an optimiser: what decays, and how fast each block of a backbone learns."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from torch import Tensor, nn

from cgh.interop.backbone import find_backbone
from cgh.modes import check_module


def parameter_groups(
    model: nn.Module, learning_rate: float, weight_decay: float | None = None, layer_decay: float = 1.0
) -> list[dict[str, Any]]:
    """Return a model's parameters in groups for an optimiser of torch or timm.

    With layer-wise decay the blocks of the backbone learn the more slowly the nearer they are to the images: of `n`
    blocks, block `i`, counted from 0, has `layer_decay ** (n - i)` of the learning rate, what comes before the first
    `layer_decay ** (n + 1)`, and what follows the last all of it, as heads do. What stands between two blocks belongs
    to the second.

    Args:
        model: any; a backbone inside it is found, as in a `cgh.CGH` or a `ContextEncoder`.
        learning_rate: of what learns fastest.
        weight_decay: of the weights of linear, convolutional and recurrent layers; biases, norms, embeddings, class
            tokens and the scales of layers have none. By default all have the optimiser's own.
        layer_decay: above 0, up to 1, which treats all alike.

    Returns:
        Groups from the slowest to the fastest, what decays first, each with its "lr", which a scheduler keeps in
        proportion.

    Raises:
        ValueError: a layer decay outside that range, or a backbone in which no blocks follow one another.

    Example:
        >>> import torchvision, cgh
        >>> groups = cgh.parameter_groups(torchvision.models.resnet18(), 1.0, layer_decay=0.5)  # of eight blocks
        >>> [group["lr"] for group in groups]
        [0.001953125, 0.00390625, 0.0078125, 0.015625, 0.03125, 0.0625, 0.125, 0.25, 0.5, 1.0]
        >>> [group["weight_decay"] for group in cgh.parameter_groups(torchvision.models.resnet18(), 0.1, 1e-4)]
        [0.0001, 0.0]
    """
    check_module(model, "the model", "a cgh.CGH's student")
    if not 0 < layer_decay <= 1:
        raise ValueError(f"layer_decay is {layer_decay}; it is above 0, and up to 1, which treats all layers alike.")
    scales = _scales(find_backbone(model), layer_decay) if layer_decay < 1 else {}
    groups: dict[tuple[float, bool], list[Tensor]] = {}
    for name, parameter in model.named_parameters():
        spared = weight_decay is not None and not _decays(model, name, parameter)
        groups.setdefault((scales.get(parameter, 1.0), spared), []).append(parameter)
    return [
        {"params": groups[scale, spared], "lr": learning_rate * scale}
        | ({} if weight_decay is None else {"weight_decay": 0.0 if spared else weight_decay})
        for scale, spared in sorted(groups)
    ]


def _decays(model: nn.Module, name: str, parameter: Tensor) -> bool:
    """Whether a parameter is a weight of a layer that decays, also where it is parametrized."""
    path, _, original = f".{name}".partition(".parametrizations.")
    plain = f"{path}.{original.partition('.')[0]}" if original else path
    owner, _, leaf = plain.removeprefix(".").rpartition(".")
    layer = model.get_submodule(owner)
    # By name, as each library has norms of its own, and parametrized layers theirs with a prefix.
    spared = isinstance(layer, nn.Embedding) or "Norm" in type(layer).__name__ or type(layer).__name__.endswith("GRN")
    is_scale = original.endswith("original0") or leaf == "weight_g"  # of a weight norm
    return parameter.ndim > 1 and "weight" in leaf and not spared and not is_scale


def _scales(backbone: nn.Module, decay: float) -> dict[Tensor, float]:
    """The share of the learning rate of each parameter that does not have all of it."""
    parts = list(_parts(backbone))
    blocks = [place for place, (_, is_block) in enumerate(parts) if is_block]
    if not blocks:
        raise ValueError(
            f"layer_decay is {decay}, and in a {type(backbone).__name__} no blocks follow one another whose learning "
            "rates could decay; leave it at 1."
        )
    scales: dict[Tensor, float] = {}
    for place, (part, _) in enumerate(parts[: blocks[-1] + 1]):
        parameters = [part] if isinstance(part, Tensor) else part.parameters()
        before = sum(block < place for block in blocks) if place >= blocks[0] else -1
        scales |= dict.fromkeys(parameters, decay ** (len(blocks) - before))
    return scales


def _parts(module: nn.Module, within: bool = False) -> Iterator[tuple[nn.Module | Tensor, bool]]:
    """All parts of a module in their order, and whether they are blocks: what sequences and stages are made of."""
    for parameter in module.parameters(recurse=False):
        yield parameter, False
    for child in module.children():
        if _holds_blocks(child):
            yield from _parts(child, _is_sequence(child) or not any(map(_is_sequence, child.children())))
        else:
            yield child, within and _is_block(child)


def _holds_blocks(module: nn.Module) -> bool:
    """Whether a module is a sequence of blocks, or a stage that has such a sequence, all of one kind."""
    children = list(module.children())
    if _is_sequence(module):
        return any(_is_block(child) or _holds_blocks(child) for child in children)
    within = [list(child.children()) for child in children if _is_sequence(child)]
    return any(len({type(x) for x in each}) == 1 and all(map(_is_block, each)) for each in (children, *within) if each)


def _is_block(module: nn.Module) -> bool:
    return not _is_sequence(module) and any(True for _ in module.children())


def _is_sequence(module: nn.Module) -> bool:
    return isinstance(module, (nn.Sequential, nn.ModuleList, nn.ModuleDict))
