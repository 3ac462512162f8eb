"""Pictures of a run and of what it learned, each a matplotlib `Figure`.

pip install "cgh-ssl[plot]". No window is opened and no global state of matplotlib is touched.
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor

from cgh.contexts import check_finite
from cgh.extras import require

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

# One place for colours: of runs and classes in turn, of right and wrong, and of what is not data.
COLOURS = ("#2f6db3", "#d2691e", "#2e8b57", "#c2416b", "#7d5ba6", "#8c6d46", "#1c9aa8", "#b8960c", "#57606a", "#e07b91")
RIGHT, WRONG = "#2e8b57", "#cf222e"
INK, QUIET, FAINT = "#24292f", "#57606a", "#e6eaef"

RELATIONS = "Blues"

ROW = 1.35  # from one row of pictures to the next, in heights of a picture; leaves room for a line of text
MOST_COLUMNS = 8192  # of a relation matrix; more than can be told apart


def curves(
    runs: Mapping[str, Mapping[str, tuple[Sequence[float] | Tensor, Sequence[float] | Tensor]]],
    window: int = 1,
) -> Figure:
    """Return curves of runs: a panel for each quantity, the runs over one another.

    Args:
        runs: `{run: {quantity: (steps, values)}}`. A run need not have every quantity; what is not finite is a gap.
        window: values in a moving mean, behind which the values themselves are drawn faintly; quantities of fewer than
            four windows are drawn as they are.

    Raises:
        ValueError: nothing to draw, steps and values of different lengths, or a window below one.

    Example:
        >>> from cgh import plot
        >>> figure = plot.curves({"CGH": {"loss": ([0, 1, 2], [7.0, 5.0, 4.5]), "k-NN, %": ([2], [95.0])}})
        >>> [axes.get_title(loc="left") for axes in figure.axes]
        ['loss', 'k-NN, %']
    """
    quantities = list(dict.fromkeys(quantity for run in runs.values() for quantity in run))
    if not quantities or window < 1:
        raise ValueError(f"runs have the quantities {quantities} and window is {window}; each is one or more.")
    columns = min(len(quantities), 3)
    rows = -(-len(quantities) // columns)
    figure, panels = _figure(rows, columns, width=3.3, height=2.5)
    for axes in panels[len(quantities) :]:
        axes.remove()
    lines: dict[str, Any] = {}
    for axes, quantity in zip(panels, quantities, strict=False):
        _title(axes, quantity)
        axes.grid(color=FAINT)
        axes.set_axisbelow(True)
        axes.set_xlabel("step")
        for number, (run, values_by_name) in enumerate(runs.items()):
            if quantity not in values_by_name:
                continue
            steps, values = (torch.as_tensor(x).detach().cpu().double() for x in values_by_name[quantity])
            if steps.ndim != 1 or steps.shape != values.shape or not len(steps):
                raise ValueError(
                    f"{quantity!r} of run {run!r} has steps of shape {tuple(steps.shape)} and values of "
                    f"{tuple(values.shape)}; they are two lists of one length."
                )
            colour = COLOURS[number % len(COLOURS)]
            width = window if len(steps) >= 4 * window else 1
            if width > 1:
                axes.plot(steps, values, color=colour, linewidth=0.8, alpha=0.3)
            means = values.unfold(0, width, 1).mean(dim=1)
            (line,) = axes.plot(steps[width - 1 :], means, color=colour, linewidth=1.6)
            if len(steps) == 1:
                line.set(marker="o", markersize=4)  # a point has no line to be seen by
            lines.setdefault(run, line)
    if len(runs) > 1:
        handles, names = list(lines.values()), list(lines)
        figure.legend(handles, names, loc="outside upper center", ncols=4, frameon=False, labelcolor=INK, fontsize=9)
    return figure


def neighbours(
    queries: Tensor,
    images: Tensor,
    features: Mapping[str, tuple[Tensor, Tensor]],
    labels: tuple[Sequence[int] | Tensor, Sequence[int] | Tensor],
    k: int = 8,
    classes: Sequence[str] | None = None,
) -> Figure:
    """Return query images with their nearest neighbours by cosine similarity, the nearest first; a panel a model.

    The query's class is written below it. A neighbour of that class has a green frame, one of another a red frame and
    its own class below.

    Args:
        queries: one a row, `(Q, 1 or 3, H, W)`, floating point in [0, 1] or uint8.
        images: where neighbours are looked for, `(N, 1 or 3, H, W)`; leave the queries out.
        features: `{model: (of the queries (Q, W), of the images (N, W))}`, of any length.
        labels: of the queries `(Q,)` and of the images `(N,)`, classes from 0.
        k: neighbours to show.
        classes: names of the classes; by default their numbers.

    Raises:
        ValueError: images of another shape or range, features or labels that are not one an image, or a `k` outside 1
            to `N`.

    Example:
        >>> import torch
        >>> from cgh import plot
        >>> images, labels = torch.rand(30, 1, 8, 8), torch.arange(30) % 3
        >>> pixels = images.flatten(1)
        >>> features = {"pixels": (pixels[:4], pixels[4:])}
        >>> figure = plot.neighbours(images[:4], images[4:], features, (labels[:4], labels[4:]), k=5)
        >>> len(figure.axes)
        1
    """
    pictures, candidates = _pictures(queries, "queries"), _pictures(images, "images")
    truth, found = (
        _labels(x, len(y), n) for x, y, n in zip(labels, (queries, images), ("queries", "images"), strict=True)
    )
    if not features or not 1 <= k <= len(images):
        raise ValueError(
            f"{len(features)} models and k of {k}; name 1 or more, and k from 1 to the {len(images)} images."
        )
    height, width = queries.shape[-2:]
    figure, panels = _figure(1, len(features), 0.42 * width / height * (1.1 * k + 1.6), 0.42 * ROW * len(queries) + 0.3)
    below: dict[str, Any] = {"fontsize": 7, "ha": "center", "va": "top"}
    for axes, (model, (ours, theirs)) in zip(panels, features.items(), strict=True):
        nearest = (_unit(ours, len(queries), model) @ _unit(theirs, len(images), model).T).topk(k, dim=1).indices
        right = found[nearest] == truth[:, None]
        for row, picture in enumerate(pictures):
            _draw(axes, picture, 0, row, INK)
            axes.text(0.5, row * ROW + 1.03, _name(int(truth[row]), classes), color=INK, **below)
            for column, (index, same) in enumerate(zip(nearest[row].tolist(), right[row].tolist(), strict=True)):
                x = 1.4 + 1.1 * column
                _draw(axes, candidates[index], x, row, RIGHT if same else WRONG)
                if not same:
                    name = _name(int(found[index]), classes)
                    axes.text(x + 0.5, row * ROW + 1.03, name, color=WRONG, **below)
        axes.set(xlim=(-0.1, 1.4 + 1.1 * k), ylim=(len(queries) * ROW, -0.1), aspect=height / width)
        axes.set_axis_off()
        _title(axes, f"{model}: {100 * right.double().mean():.0f} % right")
    return figure


def relation_matrix(
    relations: Mapping[str, Tensor],
    row_labels: Sequence[int] | Tensor | None = None,
    column_labels: Sequence[int] | Tensor | None = None,
    classes: Sequence[str] | None = None,
) -> Figure:
    """Return the relations of a batch to a memory, one row an image, in each context; darker is more alike.

    Args:
        relations: `(N, K)` by context, rows that sum to one as `cgh.RelationMatrix` gives them; all of one shape.
        row_labels: `(N,)` classes from 0, by which rows are sorted.
        column_labels: `(K,)`, by which columns are sorted: relations within a class then lie on the diagonal.
        classes: names of the classes; by default their numbers.

    Raises:
        ValueError: no context, relations of other shapes, values outside [0, 1], labels that are not one a row or
            column, or more columns than can be seen.

    Example:
        >>> import torch, cgh
        >>> from cgh import plot
        >>> z = torch.nn.functional.normalize(torch.randn(40, 8), dim=1)
        >>> p = cgh.RelationMatrix(0.1)(z[:10], z[10:])
        >>> figure = plot.relation_matrix({"global": p}, torch.arange(10) % 3, torch.arange(30) % 3)
        >>> figure.axes[0].get_title(loc="left")
        'global'
    """
    shapes = {name: tuple(p.shape) for name, p in relations.items()}
    shape = next(iter(shapes.values()), ())
    if len(set(shapes.values())) != 1 or len(shape) != 2 or not shape[0] or not 0 < shape[1] <= MOST_COLUMNS:
        raise ValueError(
            f"relations are {shapes}; give one context or more, all (N, K) with K from 1 to {MOST_COLUMNS}, such as "
            "relations[:, :1000] of the memory."
        )
    for name, p in relations.items():
        if not (p.min() >= 0 and p.max() <= 1 + 1e-4):
            raise ValueError(
                f"{name!r} holds {p.min():.3g} to {p.max():.3g}; relations lie between 0 and 1: see cgh.RelationMatrix."
            )
    norm = require("matplotlib.colors", extra="plot").PowerNorm(0.5, 0, max(p.max().item() for p in relations.values()))
    labels = [
        None if x is None else _labels(x, count, name)
        for x, count, name in zip((row_labels, column_labels), shape, ("rows", "columns"), strict=True)
    ]
    rows, columns = (slice(None) if x is None else x.argsort(stable=True) for x in labels)
    figure, panels = _figure(1, len(relations), width=3.6, height=3.2)
    for axes, (name, p) in zip(panels, relations.items(), strict=True):
        image = axes.imshow(p.detach().float().cpu()[rows][:, columns].numpy(), RELATIONS, norm=norm, aspect="auto")
        _title(axes, name)
        axes.set(xlabel="memory", ylabel="batch")
        for axis, ordered in ((axes.yaxis, labels[0]), (axes.xaxis, labels[1])):
            if ordered is not None:
                present, counts = ordered.unique(return_counts=True)
                middles = counts.cumsum(0) - (counts + 1) / 2
                axis.set_ticks(middles.tolist(), [_name(label, classes) for label in present.tolist()])
                axis.set_tick_params(length=0)
        if labels[0] is not None:
            axes.hlines((labels[0].bincount().cumsum(0)[:-1] - 0.5).tolist(), *axes.get_xlim(), FAINT, linewidth=0.8)
        if labels[1] is not None:
            axes.vlines((labels[1].bincount().cumsum(0)[:-1] - 0.5).tolist(), *axes.get_ylim(), FAINT, linewidth=0.8)
    bar = figure.colorbar(image, ax=panels, shrink=0.9, pad=0.02)
    bar.set_label("relation, square-root scale", color=QUIET, size=9)
    bar.ax.tick_params(colors=QUIET, labelsize=8)
    bar.outline.set_visible(False)
    return figure


def hypercolumns(images: Tensor, maps: Mapping[str, Tensor]) -> Figure:
    """Return images with their hypercolumns as `principal_colours` below them: like colours are like features.

    Args:
        images: `(N, 1 or 3, H, W)`, floating point in [0, 1] or uint8.
        maps: `(N, C, h, w)` by name, such as the `hypercolumns` of `cgh.HypercolumnExtractor`.

    Raises:
        ValueError: images of another shape or range, no maps, or others than one an image.

    Example:
        >>> import torch, torchvision, cgh
        >>> from cgh import plot
        >>> extractor = cgh.HypercolumnExtractor(torchvision.models.resnet18(), ["layer2", "layer3"])
        >>> images = torch.rand(3, 3, 64, 64)
        >>> figure = plot.hypercolumns(images, extractor(images).hypercolumns)
        >>> len(figure.axes)
        2
    """
    if not maps or any(len(x) != len(images) for x in maps.values()):
        shapes = {name: tuple(x.shape) for name, x in maps.items()}
        raise ValueError(f"maps are {shapes} for {len(images)} images; give one hypercolumn or more, (N, C, h, w).")
    rows = {"input": _pictures(images, "images")}
    rows |= {name: _pictures(principal_colours(x), name) for name, x in maps.items()}
    height, width = images.shape[-2:]
    figure, panels = _figure(len(rows), 1, width=1.1 * len(images) + 0.4, height=1.1 * height / width + 0.3)
    for axes, (name, pictures) in zip(panels, rows.items(), strict=True):
        for column, picture in enumerate(pictures):
            _draw(axes, picture, 1.1 * column, 0, FAINT)
        axes.set(xlim=(-0.05, 1.1 * len(images)), ylim=(1.05, -0.05), aspect=height / width)
        axes.set_axis_off()
        _title(axes, name)
    return figure


@torch.no_grad()
def principal_colours(maps: Tensor) -> Tensor:
    """Return maps `(N, C, H, W)` as colours `(N, 3, H, W)` in [0, 1]: the three principal components of all places.

    Each component runs from its first to its 99th percentile.

    Raises:
        ValueError: another shape, fewer than three channels, or values that are not finite.

    Example:
        >>> import torch
        >>> from cgh import plot
        >>> plot.principal_colours(torch.randn(2, 16, 4, 4)).shape
        torch.Size([2, 3, 4, 4])
    """
    if maps.ndim != 4 or maps.shape[1] < 3 or maps.numel() < 3 * maps.shape[1]:
        raise ValueError(
            f"maps have shape {tuple(maps.shape)}; they are (N, C, H, W), with three channels and places or more."
        )
    places = maps.detach().float().cpu().permute(0, 2, 3, 1).flatten(0, 2)
    check_finite(places, "maps")
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)  # the decomposition starts from random directions
        _, _, directions = torch.pca_lowrank(places, q=min(6, *places.shape))
    components = (places - places.mean(dim=0)) @ directions[:, :3]
    low, high = (torch.quantile(components, q, dim=0) for q in (0.01, 0.99))
    span = (high - low).clamp_min(1e-3 * (high - low).max().item() + 1e-12)  # a component of rounding errors stays dark
    colours = ((components - low) / span).clamp(0, 1)
    n, _, h, w = maps.shape
    return colours.view(n, h, w, 3).permute(0, 3, 1, 2)


def embedding(
    features: Mapping[str, Tensor], labels: Sequence[int] | Tensor, classes: Sequence[str] | None = None
) -> Figure:
    """Return a map of the features of each model, coloured by class: t-SNE (van der Maaten and Hinton, 2008).

    Near points are alike by cosine similarity; distances between clusters and their sizes mean little. Takes seconds
    for a thousand images, and the time of scikit-learn for more.

    Args:
        features: `(N, W)` by model, of any length.
        labels: `(N,)`, classes from 0.
        classes: names of the classes; by default their numbers.

    Raises:
        ValueError: no model, fewer than five images, or features or labels that are not one an image.

    Example:
        >>> import torch
        >>> from cgh import plot
        >>> labels = torch.arange(30) % 3
        >>> figure = plot.embedding({"one of three": torch.eye(3)[labels] + 0.1 * torch.randn(30, 3)}, labels)
        >>> figure.axes[0].get_title(loc="left")
        'one of three'
    """
    label = _labels(labels, len(labels), "labels")
    if not features or len(label) < 5:
        raise ValueError(
            f"{len(features)} models and {len(label)} images; a map takes one model and five images or more."
        )
    tsne = require("sklearn.manifold", extra="plot").TSNE
    figure, panels = _figure(1, len(features), width=3.6, height=3.6)
    for axes, (model, x) in zip(panels, features.items(), strict=True):
        rows = _unit(x, len(label), model).double().numpy()
        points = torch.from_numpy(tsne(perplexity=min(30, len(rows) / 4), random_state=0).fit_transform(rows))
        for c in label.unique().tolist():
            here, colour = points[label == c], COLOURS[c % len(COLOURS)]
            axes.scatter(here[:, 0], here[:, 1], s=9, color=colour, alpha=0.7, linewidth=0)
            x0, y0 = here.median(dim=0).values.tolist()
            text = axes.text(
                x0, y0, _name(c, classes), color=colour, fontsize=12, weight="bold", ha="center", va="center"
            )
            text.set_path_effects(
                [require("matplotlib.patheffects", extra="plot").withStroke(linewidth=3, foreground="white")]
            )
        axes.set(xticks=[], yticks=[], aspect="equal", adjustable="datalim")
        axes.spines[:].set_visible(False)
        _title(axes, model)
    return figure


def save(figure: Figure, path: str | os.PathLike[str]) -> None:
    """Write a figure whole or not at all, in the format that the path's ending names; its folder is made if missing.

    Raises:
        ValueError: matplotlib knows no such ending.

    Example:
        >>> import pathlib, tempfile
        >>> from cgh import plot
        >>> path = pathlib.Path(tempfile.mkdtemp(), "run", "curves.png")
        >>> plot.save(plot.curves({"run": {"loss": ([0, 1], [7.0, 5.0])}}), path)
        >>> [file.name for file in path.parent.iterdir()]
        ['curves.png']
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.stem}.{os.getpid()}{path.suffix}")
    try:
        figure.savefig(temporary)
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


def _figure(rows: int, columns: int, width: float, height: float) -> tuple[Figure, list[Axes]]:
    """A figure of panels of `width` x `height` inches each, with frames on the left and below alone."""
    figure = require("matplotlib.figure", extra="plot").Figure((width * columns, height * rows), dpi=150)
    figure.set_layout_engine("constrained")
    panels = list(figure.subplots(rows, columns, squeeze=False).flat)
    for axes in panels:
        axes.spines[["top", "right"]].set_visible(False)
        axes.spines[["left", "bottom"]].set_color(QUIET)
        axes.tick_params(colors=QUIET, labelsize=8)
        axes.xaxis.label.set(color=QUIET, size=9)
        axes.yaxis.label.set(color=QUIET, size=9)
    return figure, panels


def _title(axes: Axes, title: str) -> None:
    axes.set_title(title, loc="left", color=INK, fontsize=10)


def _draw(axes: Axes, picture: Any, x: float, row: int, frame: str) -> None:
    """A framed picture in the unit square whose upper left corner is at `x` in `row`."""
    y = ROW * row
    axes.imshow(picture, extent=(x, x + 1, y + 1, y), interpolation="nearest")
    axes.add_patch(
        require("matplotlib.patches", extra="plot").Rectangle((x, y), 1, 1, fill=False, edgecolor=frame, linewidth=1.4)
    )


def _pictures(images: Tensor, name: str) -> Any:
    """Checked images as arrays `(N, H, W, 3)` that matplotlib draws."""
    low, high = (images.min(), images.max()) if images.numel() else (0, 0)
    top = 255 if images.dtype == torch.uint8 else 1
    if images.ndim != 4 or images.shape[1] not in (1, 3) or not images.numel() or not 0 <= low <= high <= top:
        raise ValueError(
            f"{name} are {images.dtype} of shape {tuple(images.shape)} from {low:.3g} to {high:.3g}; pictures are "
            "(N, 1 or 3, H, W), floating point in [0, 1] or uint8. Undo a normalisation first."
        )
    return images.detach().cpu().expand(-1, 3, -1, -1).permute(0, 2, 3, 1).numpy()


def _labels(labels: Sequence[int] | Tensor, count: int, name: str) -> Tensor:
    """Labels, checked to be one for each of the `count` things named."""
    labels = torch.as_tensor(labels).detach().cpu()
    if labels.shape != (count,) or labels.is_floating_point() or not count or labels.min() < 0:
        raise ValueError(
            f"labels of the {name} are {labels.dtype} of shape {tuple(labels.shape)}; they are {count} integers from 0."
        )
    return labels


def _unit(features: Tensor, count: int, model: str) -> Tensor:
    """Features, checked to be one an image, at unit length."""
    if features.ndim != 2 or len(features) != count:
        raise ValueError(
            f"features of {model!r} have shape {tuple(features.shape)}; they are ({count}, W), one an image."
        )
    features = features.detach().float().cpu()
    check_finite(features, f"features of {model!r}")
    return F.normalize(features, dim=1)


def _name(label: int, classes: Sequence[str] | None) -> str:
    if classes is not None and label >= len(classes):
        raise ValueError(f"classes has {len(classes)} names and a label is {label}; give every class from 0 its name.")
    return str(label) if classes is None else classes[label]
