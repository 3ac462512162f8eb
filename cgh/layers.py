"""What a backbone's layers give: a table to choose a hypercolumn's layers from."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn
from typing_extensions import override

from cgh.hypercolumn import first_output
from cgh.layouts import declared_prefix_tokens, find_layout, takes_maps, to_map


class Layer(NamedTuple):
    """A layer that can be part of a hypercolumn."""

    name: str
    """Dotted, as `HypercolumnExtractor` takes it."""
    shape: tuple[int, ...]
    """Of its map, `(C, H, W)`; as the layer gives it, without the batch, where the layout is not sure."""
    stride: int | None
    """Pixels of the image from one place of the map to the next."""
    layout: str | None
    """"NCHW", "NHWC" or "NLC", or None where it has to be named by `layouts` or `prefix_tokens`."""


class LayerTable(list[Layer]):
    """Layers, in the order in which they first ran; printed as a table."""

    @override
    def __str__(self) -> str:
        rows = [("layer", "map", "stride", "layout")]
        for name, shape, stride, layout in self:
            rows.append((name, " x ".join(map(str, shape)), str(stride or "?"), layout or "not sure: name it"))
        widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
        return "\n".join(
            "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows
        )


@torch.no_grad()
def list_layers(model: nn.Module, image_size: int | Sequence[int] = 224, depth: int | None = None) -> LayerTable:
    """Return the layers of `model` that a hypercolumn can be made of, found by running one black image.

    Args:
        model: any module that takes images; it is left as it was.
        image_size: of the side of a square image, or `(height, width)`.
        depth: only names of at most so many parts; `layer1.0.conv1` has three.

    Returns:
        A list of `Layer` that prints as a table.

    Raises:
        ValueError: the model cannot run on such an image.

    Example:
        >>> import torchvision, cgh
        >>> layers = cgh.list_layers(torchvision.models.swin_t(), image_size=64, depth=2)
        >>> layers[0]
        Layer(name='features.0', shape=(96, 16, 16), stride=4, layout='NHWC')
        >>> print(layers)  # doctest: +ELLIPSIS
        layer       map           stride  layout
        features.0  96 x 16 x 16  4       NHWC
        features.1  96 x 16 x 16  4       NHWC
        features.2  192 x 8 x 8   8       NHWC
        ...
    """
    image = (image_size, image_size) if isinstance(image_size, int) else (image_size[0], image_size[1])
    first = next((m for m in model.modules() if isinstance(m, nn.Conv2d)), None)
    like = next(model.parameters(), torch.empty(()))
    prefix_tokens = declared_prefix_tokens(model)
    rows: dict[str, Layer] = {}  # a layer that runs again counts as it ran last

    def record(name: str, module: nn.Module, output: object) -> None:
        x = first_output(output)
        if not isinstance(x, Tensor) or x.ndim not in (3, 4) or len(x) != 1:
            return
        layout = find_layout(tuple(x.shape), image, takes_maps(module), prefix_tokens)
        grid = None if layout is None else to_map(x, layout, image, prefix_tokens)
        if grid is None:
            rows[name] = Layer(name, tuple(x.shape[1:]), None, None)
        else:
            rows[name] = Layer(name, tuple(grid.shape[1:]), round(image[0] / grid.shape[2]), layout)

    handles = [
        module.register_forward_hook(lambda module, _, output, name=name: record(name, module, output))
        for name, module in model.named_modules()
        if name and (depth is None or name.count(".") < depth)
    ]
    modes = {module: module.training for module in model.modules()}
    model.eval()
    try:
        model(like.new_zeros((1, first.in_channels if first else 3, *image)))
    except (AssertionError, RuntimeError) as error:
        raise ValueError(f"{type(model).__name__} failed on an image of {image[0]} x {image[1]}: {error}") from error
    finally:
        for handle in handles:
            handle.remove()
        for module, training in modes.items():
            module.training = training
    return LayerTable(rows.values())
