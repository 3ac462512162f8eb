"""What a backbone's layers give: a table to choose a hypercolumn's layers from."""

from __future__ import annotations

import html
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn
from typing_extensions import override

from cgh.hypercolumn import first_output, same_output, version_of
from cgh.layouts import declared_prefix_tokens, find_layout, takes_maps, to_map
from cgh.modes import check_module, evaluating
from cgh.wrappers import plain_names, unwrap


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
    """Layers, in the order in which they first ran; shown as a table."""

    @override
    def __repr__(self) -> str:
        rows = self._cells()
        widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
        return "\n".join(
            "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows
        )

    def _repr_html_(self) -> str:
        """The table of a notebook."""
        head, *rows = (
            "".join(f"<{tag}>{html.escape(cell)}</{tag}>" for cell in row)
            for tag, row in zip(["th", *["td"] * len(self)], self._cells(), strict=True)
        )
        return f"<table><tr>{head}</tr>{''.join(f'<tr>{row}</tr>' for row in rows)}</table>"

    def _cells(self) -> list[tuple[str, ...]]:
        rows: list[tuple[str, ...]] = [("layer", "map", "stride", "layout")]
        for name, shape, stride, layout in self:
            rows.append((name, " x ".join(map(str, shape)), str(stride or "?"), layout or "not sure: name it"))
        return rows


def list_layers(model: nn.Module, image_size: int | Sequence[int] = 224, depth: int | None = None) -> LayerTable:
    """Return the layers of `model` that a hypercolumn can be made of, found by running one black image.

    A layer whose output a later one changes in place, such as a norm before an in-place ReLU, is left out.

    Args:
        model: any module that takes images; it is left as it was.
        image_size: of the side of a square image, or `(height, width)`.
        depth: only names of at most so many parts; `layer1.0.conv1` has three.

    Returns:
        A list of `Layer` that shows itself as a table.

    Raises:
        TypeError: `model` is no module.
        ValueError: the model cannot run on such an image, or `image_size` is none.

    Example:
        >>> import torchvision, cgh
        >>> layers = cgh.list_layers(torchvision.models.swin_t(), image_size=64, depth=2)
        >>> layers[0]
        Layer(name='features.0', shape=(96, 16, 16), stride=4, layout='NHWC')
        >>> layers  # doctest: +ELLIPSIS
        layer       map           stride  layout
        features.0  96 x 16 x 16  4       NHWC
        features.1  96 x 16 x 16  4       NHWC
        features.2  192 x 8 x 8   8       NHWC
        ...
    """
    check_module(model, "the model", 'cgh.interop.build_backbone("resnet18")')
    image = tuple(image_size) if isinstance(image_size, (list, tuple)) else (image_size, image_size)
    if len(image) != 2 or not all(isinstance(side, int) and side > 0 for side in image):
        raise ValueError(f"image_size is {image}; give one side, or (height, width).")
    first = next((m for m in model.modules() if isinstance(m, nn.Conv2d)), None)
    like = next(model.parameters(), torch.empty(()))
    named = dict(model.named_modules())
    layers = [
        (name, named[wrapped])
        for name, wrapped in plain_names(model, named).items()
        if name and (depth is None or name.count(".") < depth)
    ]
    prefix_tokens = declared_prefix_tokens(unwrap(model))
    outputs: dict[str, tuple[nn.Module, Tensor, int]] = {}  # a layer that runs again counts as it ran last

    def record(name: str, module: nn.Module, output: object) -> None:
        x = first_output(output)
        if isinstance(x, Tensor) and x.ndim in (3, 4) and len(x) == 1:
            outputs[name] = module, x, version_of(x)

    handles = [
        last.register_forward_hook(lambda _, __, output, name=name, module=module: record(name, module, output))
        for name, module in layers
        for last in same_output(module, model)
    ]
    try:
        with torch.inference_mode(False), torch.no_grad(), evaluating(model):
            model(like.new_zeros((1, first.in_channels if first else 3, *image)))
    except (AssertionError, RuntimeError, TypeError) as error:
        raise ValueError(f"{type(model).__name__} failed on an image of {image[0]} x {image[1]}: {error}") from error
    finally:
        for handle in handles:
            handle.remove()

    table = LayerTable()
    for name, (module, x, version) in outputs.items():
        if version_of(x) != version:
            continue
        layout = find_layout(tuple(x.shape), image, takes_maps(module), prefix_tokens)
        grid = None if layout is None else to_map(x, layout, image, prefix_tokens)
        if grid is None:
            table.append(Layer(name, tuple(x.shape[1:]), None, None))
        else:
            table.append(Layer(name, tuple(grid.shape[1:]), round(image[0] / grid.shape[2]), layout))
    return table
