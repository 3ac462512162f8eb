"""Pictures of a run and of what it learned, each a matplotlib `Figure`.

pip install "cgh-ssl[plot]". No window is opened and no global state of matplotlib is touched. A notebook shows what a
function returns; in PDFs its words are words, in an embedded TrueType font.

Every function takes `size`, the width and height of the figure in inches, or `ax`, the axes to draw on in a figure of
your own: one for each panel, in reading order.
"""

from __future__ import annotations

import functools
import io
import os
import textwrap
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeAlias

import torch
import torch.nn.functional as F
from torch import Tensor

from cgh.contexts import check_finite
from cgh.extras import require

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

AxesLike: TypeAlias = "Axes | Sequence[Axes]"
Curve: TypeAlias = tuple[Sequence[float] | Tensor, Sequence[float] | Tensor]

# One place for colours: of runs and classes in turn, of right and wrong, and of what is not data.
COLOURS = ("#2f6db3", "#d2691e", "#2e8b57", "#c2416b", "#7d5ba6", "#8c6d46", "#1c9aa8", "#b8960c", "#57606a", "#e07b91")
RIGHT, WRONG = "#2e8b57", "#cf222e"
INK, QUIET, FAINT = "#24292f", "#57606a", "#e6eaef"

RELATIONS = "Blues"
MARKERS = "o^sDvP*X"  # of classes beyond the colours, one for each round of them

CHARACTER = 0.0085  # inches for each point of a font: the width of a letter, on the broad side
LINE = 0.017  # likewise: from one line to the next
MOST_COLUMNS = 8192  # of a relation matrix; more than can be told apart


def curves(
    runs: Mapping[str, Mapping[str, Curve]],
    window: int = 1,
    *,
    ax: AxesLike | None = None,
    size: tuple[float, float] | None = None,
) -> Figure:
    """Return curves of runs: a panel for each quantity, the runs over one another.

    Args:
        runs: `{run: {quantity: (steps, values)}}`. A run need not have every quantity; what is not finite is a gap.
        window: values in a moving mean, behind which the values themselves are drawn faintly; quantities of fewer than
            four windows are drawn as they are.
        ax: axes to draw on, one a quantity.
        size: of the figure, in inches.

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
    figure, panels = _figure(len(quantities), min(len(quantities), 3), 3.3, 2.5, ax, size)
    lines: dict[str, Any] = {}
    for axes, quantity in zip(panels, quantities, strict=True):
        _title(axes, quantity)
        _steps(axes)
        for number, (run, values_by_name) in enumerate(runs.items()):
            if quantity in values_by_name:
                curve = _curve(values_by_name[quantity], f"{quantity!r} of run {run!r}")
                lines.setdefault(run, _line(axes, curve, COLOURS[number % len(COLOURS)], window, _dashes(number)))
    if len(runs) > 1 and ax is None:
        _legend(figure, lines, figure.get_figwidth(), loc="outside upper center")
    elif len(runs) > 1:
        _legend(panels[0], lines, _width(panels[0]) / 2)
    return figure


def groups(
    run: Mapping[str, Curve],
    members: Mapping[str, Sequence[str]] | None = None,
    levels: Mapping[str, Mapping[str, float]] | None = None,
    window: int = 1,
    *,
    ax: AxesLike | None = None,
    size: tuple[float, float] | None = None,
) -> Figure:
    """Return the curves of one run in groups: a panel a group, its quantities over one another.

    Args:
        run: `{quantity: (steps, values)}`.
        members: `{group: quantities}`; by default a quantity such as "entropy/teacher_global" belongs to "entropy".
        levels: `{group: {name: value}}`, drawn as dotted lines, such as `{"entropy": {"log K": math.log(131_072)}}`.
        window: as in `curves`.
        ax: axes to draw on, one a group.
        size: of the figure, in inches.

    Raises:
        ValueError: nothing to draw, a quantity that the run has not, levels of no group, steps and values of different
            lengths, or a window below one.

    Example:
        >>> from cgh import plot
        >>> losses = {"loss/global": ([0, 1], [7.0, 5.0]), "loss/hypercolumn": ([0, 1], [7.1, 6.0])}
        >>> figure = plot.groups(losses | {"lr": ([0, 1], [0.1, 0.0])})
        >>> [axes.get_title(loc="left") for axes in figure.axes]
        ['loss', 'lr']
    """
    levels = levels or {}
    if members is None:
        names = dict.fromkeys(quantity.split("/")[0] for quantity in run)
        members = {name: [quantity for quantity in run if quantity.split("/")[0] == name] for name in names}
    unknown = [q for quantities in members.values() for q in quantities if q not in run] + [*(levels.keys() - members)]
    if not members or not all(members.values()) or unknown or window < 1:
        raise ValueError(
            f"groups are {dict(members)}, window is {window}, and unknown are {unknown}; the run has {list(run)}."
        )
    entries = max(len(quantities) + len(levels.get(group, {})) for group, quantities in members.items())
    height = max(2.4, 9 * LINE * 1.4 * entries + 0.6)  # of a panel beside its legend
    figure, panels = _figure(len(members), 1 if len(members) < 3 else 2, 5.2, height, ax, size)
    for axes, (group, quantities) in zip(panels, members.items(), strict=True):
        _title(axes, group)
        _steps(axes)
        lines = {}
        for number, quantity in enumerate(quantities):
            name = quantity.removeprefix(f"{group}/")
            colour = COLOURS[number % len(COLOURS)]
            lines[name] = _line(axes, _curve(run[quantity], repr(quantity)), colour, window, _dashes(number))
        for name, level in levels.get(group, {}).items():
            lines[name] = axes.axhline(level, color=INK, linestyle=":", linewidth=1.2)
        if [*lines] != [group]:
            _legend(axes, lines, 2.4, ncols=1, loc="upper left", bbox_to_anchor=(1.0, 1.0))
    return figure


def neighbours(
    queries: Tensor,
    images: Tensor,
    features: Mapping[str, tuple[Tensor, Tensor]],
    labels: tuple[Sequence[int] | Tensor, Sequence[int] | Tensor],
    k: int = 8,
    classes: Sequence[str] | None = None,
    *,
    ax: AxesLike | None = None,
    size: tuple[float, float] | None = None,
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
        classes: names of the classes; by default their numbers. Long ones are broken, and cut after two lines.
        ax: axes to draw on, one a model.
        size: of the figure, in inches.

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
    names = {int(label): _broken(_name(int(label), classes)) for label in torch.cat([truth, found]).unique()}
    lines = max(name.count("\n") + 1 for name in names.values())
    broad = max(len(line) for name in names.values() for line in name.split("\n"))
    side = max(0.42, 7 * CHARACTER * broad / 1.05)  # of a picture, in inches: its words are no wider
    row = 1 + (7 * LINE * lines + 0.06) / (side * height / width)  # to the next one, in heights of a picture
    figure, panels = _figure(
        len(features),
        len(features),
        side * (1.1 * k + 1.6),
        side * height / width * row * len(queries) + 0.3,
        ax,
        size,
    )
    below: dict[str, Any] = {"fontsize": 7, "ha": "center", "va": "top", "linespacing": 1.0}
    for axes, (model, (ours, theirs)) in zip(panels, features.items(), strict=True):
        nearest = (_unit(ours, len(queries), model) @ _unit(theirs, len(images), model).T).topk(k, dim=1).indices
        right = found[nearest] == truth[:, None]
        for place, picture in enumerate(pictures):
            y = row * place
            _draw(axes, picture, 0, y, INK)
            axes.text(0.5, y + 1.03, names[int(truth[place])], color=INK, **below)
            for column, (index, same) in enumerate(zip(nearest[place].tolist(), right[place].tolist(), strict=True)):
                x = 1.4 + 1.1 * column
                _draw(axes, candidates[index], x, y, RIGHT if same else WRONG)
                if not same:
                    axes.text(x + 0.5, y + 1.03, names[int(found[index])], color=WRONG, **below)
        axes.set(xlim=(-0.1, 1.4 + 1.1 * k), ylim=(len(queries) * row, -0.1), aspect=height / width)
        axes.set_axis_off()
        _title(axes, f"{model}: {100 * right.double().mean():.0f} % right")
    return figure


def detections(
    image: Tensor,
    found: tuple[Tensor, Tensor, Tensor],
    truth: tuple[Tensor, Tensor] | None = None,
    classes: Sequence[str] | None = None,
    least: float = 0.5,
    *,
    ax: AxesLike | None = None,
    size: tuple[float, float] | None = None,
) -> Figure:
    """Return an image with what a detector found: frames in the colours of a legend, each with its class and score.

    The ground truth is drawn below, as broad white frames edged in the colour of their class. Of words that would lie
    on one another, that of the lower score moves down.

    Args:
        image: `(1 or 3, H, W)`, floating point in [0, 1] or uint8.
        found: boxes `(n, 4)` as left, top, right and bottom in pixels of the image, labels `(n,)` from 0, and scores
            `(n,)` in [0, 1].
        truth: boxes and labels of what is there, likewise.
        classes: names of the classes; by default their numbers.
        least: the lowest score that is drawn.
        ax: axes to draw on.
        size: of the figure, in inches.

    Raises:
        ValueError: an image of another shape or range, boxes that are not `(n, 4)`, labels or scores that are not one
            a box, or a label without a name.

    Example:
        >>> import torch
        >>> from cgh import plot
        >>> boxes, labels, scores = torch.tensor([[4.0, 6.0, 30.0, 24.0]]), torch.tensor([1]), torch.tensor([0.93])
        >>> figure = plot.detections(torch.rand(3, 32, 48), (boxes, labels, scores), classes=["cat", "dog"])
        >>> [text.get_text() for text in figure.axes[0].texts]
        ['dog 0.93']
    """
    (picture,) = _pictures(image[None], "images")
    boxes, labels, scores = (x.detach().cpu() for x in found)
    there, theirs = (torch.zeros(0, 4), torch.zeros(0, dtype=torch.long)) if truth is None else truth
    shapes = [tuple(x.shape) for x in (boxes, labels, scores, there, theirs)]
    n, m = len(boxes), len(there)
    if shapes != [(n, 4), (n,), (n,), (m, 4), (m,)]:
        raise ValueError(
            f"boxes, labels and scores have shapes {shapes[:3]} and the truth has {shapes[3:]}; they are (n, 4), one "
            "label a box, and one score a box that was found."
        )
    order = scores.argsort(descending=True, stable=True)
    order = order[scores[order] >= least]
    seen = [*zip(boxes[order].tolist(), labels[order].tolist(), scores[order].tolist(), strict=True)]
    known = [*zip(there.tolist(), theirs.tolist(), strict=True)]
    present = sorted({label for _, label, *_ in [*seen, *known]})
    names = {label: _name(label, classes) for label in present}
    entries = [*names.values()] + ["ground truth"] * bool(known)
    broad = 0.6 + 9 * CHARACTER * min(40, max(map(len, entries), default=0)) if entries else 0
    height, width = image.shape[-2:]
    scale = 6.4 / max(height, width)  # inches a pixel
    figure, (axes,) = _figure(1, 1, scale * width + broad, max(scale * height, 9 * LINE * 1.4 * len(entries)), ax, size)
    axes.imshow(picture, interpolation="nearest")
    axes.set_axis_off()
    rectangle = require("matplotlib.patches", extra="plot").Rectangle
    stroke = require("matplotlib.patheffects", extra="plot").withStroke
    white: dict[str, Any] = {
        "edgecolor": "white",
        "linewidth": 4.0,
        "path_effects": [stroke(linewidth=5, foreground=QUIET)],
    }
    style: dict[int, dict[str, Any]] = {
        label: {"edgecolor": COLOURS[label % len(COLOURS)], "linestyle": _dashes(label)} for label in present
    }

    def frame(box: Sequence[float], **options: Any) -> Any:
        (left, top, right, bottom) = box
        return axes.add_patch(rectangle((left - 0.5, top - 0.5), right - left, bottom - top, fill=False, **options))

    for box, label in known:
        frame(box, **white)
        frame(box, linewidth=1.2, **style[label])
    words: list[Any] = []
    word: dict[str, Any] = {"xytext": (3, -3), "textcoords": "offset points", "va": "top", "fontsize": 8}
    for box, label, score in seen:
        frame(box, linewidth=2.0, **style[label])
        paint: dict[str, Any] = {
            "color": COLOURS[label % len(COLOURS)],
            "path_effects": [stroke(linewidth=2.5, foreground="white")],
        }
        words.append(axes.annotate(f"{_short(names[label])} {score:.2f}", box[:2], **word, **paint))
        words[-1].set_in_layout(False)
    legend = {name: rectangle((0, 0), 1, 1, fill=False, linewidth=2.0, **style[c]) for c, name in names.items()}
    if known:
        legend["ground truth"] = rectangle((0, 0), 1, 1, fill=False, **white)
    if legend and ax is None:
        _legend(figure, legend, 4.0, ncols=1, loc="outside right upper")
    elif legend:
        _legend(axes, legend, 4.0, ncols=1, loc="upper left", bbox_to_anchor=(1.0, 1.0))
    _part(axes, words)
    return figure


def relation_matrix(
    relations: Mapping[str, Tensor],
    row_labels: Sequence[int] | Tensor | None = None,
    column_labels: Sequence[int] | Tensor | None = None,
    classes: Sequence[str] | None = None,
    *,
    ax: AxesLike | None = None,
    size: tuple[float, float] | None = None,
) -> Figure:
    """Return the relations of a batch to a memory, one row an image, in each context; darker is more alike.

    Args:
        relations: `(N, K)` by context, rows that sum to one as `cgh.RelationMatrix` gives them; all of one shape.
        row_labels: `(N,)` classes from 0, by which rows are sorted.
        column_labels: `(K,)`, by which columns are sorted: relations within a class then lie on the diagonal.
        classes: names of the classes; by default their numbers. A class too thin for its name goes without.
        ax: axes to draw on, one a context.
        size: of the figure, in inches.

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
    named = [[] if x is None else [_short(_name(label, classes)) for label in x.unique().tolist()] for x in labels]
    side = max(3.0, 8.5 * LINE * max(map(len, named)))
    broad_rows, broad_columns = (8 * CHARACTER * max(map(len, names), default=0) for names in named)
    upright = broad_columns * len(named[1]) > side  # names of columns that have no room beside one another
    height = side + 0.5 + (broad_columns if upright else 8 * LINE)
    figure, panels = _figure(len(relations), len(relations), side + 0.8 + broad_rows, height, ax, size)
    for axes, (name, p) in zip(panels, relations.items(), strict=True):
        image = axes.imshow(p.detach().float().cpu()[rows][:, columns].numpy(), RELATIONS, norm=norm, aspect="auto")
        _title(axes, name)
        axes.set(xlabel="memory", ylabel="batch")
        for axis, ordered, names in zip((axes.yaxis, axes.xaxis), labels, named, strict=True):
            if ordered is not None:
                counts = ordered.unique(return_counts=True)[1]
                middles = (counts.cumsum(0) - (counts + 1) / 2).tolist()
                axis.set_ticks(middles, names, rotation=90 if axis is axes.xaxis and upright else 0)
                axis.set_tick_params(length=0)
        if labels[0] is not None:
            axes.hlines((labels[0].bincount().cumsum(0)[:-1] - 0.5).tolist(), *axes.get_xlim(), FAINT, linewidth=0.8)
        if labels[1] is not None:
            axes.vlines((labels[1].bincount().cumsum(0)[:-1] - 0.5).tolist(), *axes.get_ylim(), FAINT, linewidth=0.8)
    bar = figure.colorbar(image, ax=panels, shrink=0.9, pad=0.02)
    bar.set_label("relation, square-root scale", color=QUIET, size=9)
    bar.ax.tick_params(colors=QUIET, labelsize=8)
    bar.outline.set_visible(False)
    figure.draw_without_rendering()  # lays out what the names have room in
    for axes in panels:
        _thin(axes.yaxis, _height(axes), 8 * LINE)
        _thin(axes.xaxis, _width(axes), 8 * LINE if upright else broad_columns + 8 * CHARACTER)
    return figure


def hypercolumns(
    images: Tensor,
    maps: Mapping[str, Tensor],
    *,
    ax: AxesLike | None = None,
    size: tuple[float, float] | None = None,
) -> Figure:
    """Return images with their hypercolumns as `principal_colours` below them: like colours are like features.

    Args:
        images: `(N, 1 or 3, H, W)`, floating point in [0, 1] or uint8.
        maps: `(N, C, h, w)` by name, such as the `hypercolumns` of `cgh.HypercolumnExtractor`.
        ax: axes to draw on, one for the images and one for each of the maps.
        size: of the figure, in inches.

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
    figure, panels = _figure(len(rows), 1, 1.1 * len(images) + 0.4, 1.1 * height / width + 0.3, ax, size)
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
    features: Mapping[str, Tensor],
    labels: Sequence[int] | Tensor,
    classes: Sequence[str] | None = None,
    *,
    ax: AxesLike | None = None,
    size: tuple[float, float] | None = None,
) -> Figure:
    """Return a map of the features of each model, coloured by class: t-SNE (van der Maaten and Hinton, 2008).

    Names of up to three letters stand where their class is, each beside the next; longer ones in a legend.
    Near points are alike by cosine similarity; distances between clusters and their sizes mean little. Takes seconds
    for a thousand images, and the time of scikit-learn for more.

    Args:
        features: `(N, W)` by model, of any length.
        labels: `(N,)`, classes from 0.
        classes: names of the classes; by default their numbers.
        ax: axes to draw on, one a model.
        size: of the figure, in inches.

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
    present = label.unique().tolist()
    names = [_name(c, classes) for c in present]
    legend, rows = max(map(len, names)) > 3, max(1, int(5 * (3.6 if size is None else size[1])))
    columns = -(-len(names) // rows)
    broad = columns * (0.5 + 9 * CHARACTER * min(40, max(map(len, names)))) if legend else 0
    figure, panels = _figure(len(features), len(features), 3.6 + broad / len(features), 3.6, ax, size)
    dots: dict[str, Any] = {}
    for axes, (model, x) in zip(panels, features.items(), strict=True):
        unit = _unit(x, len(label), model).double().numpy()
        points = torch.from_numpy(tsne(perplexity=min(30, len(unit) / 4), random_state=0).fit_transform(unit))
        for c, name in zip(present, names, strict=True):
            here, marker = points[label == c], MARKERS[c // len(COLOURS) % len(MARKERS)]
            colour = COLOURS[c % len(COLOURS)]
            dots[name] = axes.scatter(here[:, 0], here[:, 1], s=9, color=colour, marker=marker, alpha=0.7, linewidth=0)
        axes.set(xticks=[], yticks=[], aspect="equal", adjustable="datalim")
        axes.spines[:].set_visible(False)
        _title(axes, model)
        if not legend:
            medians = torch.stack([points[label == c].median(dim=0).values for c in present])
            span = (points.max(dim=0).values - points.min(dim=0).values).max().item()
            _write(axes, names, [COLOURS[c % len(COLOURS)] for c in present], medians, span / _width(axes))
    if legend and ax is None:
        _legend(figure, dots, 4.0, ncols=columns, markerscale=2, loc="outside right center")
    elif legend:
        _legend(panels[-1], dots, 4.0, ncols=columns, markerscale=2, loc="upper left", bbox_to_anchor=(1.0, 1.0))
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


@functools.cache
def _figure_class() -> type[Figure]:
    """A figure that a notebook shows, and whose words stay words in a PDF."""
    matplotlib = require("matplotlib", extra="plot")
    base: type[Figure] = require("matplotlib.figure", extra="plot").Figure

    class Picture(base):  # type: ignore[misc, valid-type]  # a class that is imported where it is used
        def savefig(self, *arguments: Any, **options: Any) -> None:
            with matplotlib.rc_context({"pdf.fonttype": 42, "ps.fonttype": 42}):
                super().savefig(*arguments, **options)

        def _repr_png_(self) -> bytes:
            file = io.BytesIO()
            self.savefig(file, format="png")
            return file.getvalue()

    return Picture


def _figure(
    count: int, columns: int, width: float, height: float, ax: AxesLike | None, size: tuple[float, float] | None
) -> tuple[Figure, list[Axes]]:
    """`count` panels with frames on the left and below alone, of `width` x `height` inches each without a `size`."""
    if ax is not None:
        panels = list(ax.flat) if hasattr(ax, "flat") else list(ax) if isinstance(ax, Sequence) else [ax]
        if len(panels) != count or size is not None:
            raise ValueError(
                f"{len(panels)} axes are given for {count} panels, and size is {size}; give one for each panel and no "
                "size, or neither."
            )
        figure: Figure = panels[0].figure.figure  # the figure itself, also of a subfigure
    else:
        rows = -(-count // columns)
        inches = (width * columns, height * rows) if size is None else size
        if min(inches) <= 0:
            raise ValueError(f"size is {size}; it is the width and the height of the figure in inches.")
        figure = _figure_class()(inches, dpi=150)
        figure.set_layout_engine("constrained")
        panels = list(figure.subplots(rows, columns, squeeze=False).flat)
        for axes in panels[count:]:
            axes.remove()
        panels = panels[:count]
    for axes in panels:
        axes.spines[["top", "right"]].set_visible(False)
        axes.spines[["left", "bottom"]].set_color(QUIET)
        axes.tick_params(colors=QUIET, labelsize=8)
        axes.xaxis.label.set(color=QUIET, size=9)
        axes.yaxis.label.set(color=QUIET, size=9)
    return figure, panels


def _width(axes: Axes) -> float:
    """Of axes in inches, before they are laid out."""
    return float(axes.get_window_extent().width / axes.figure.dpi)


def _height(axes: Axes) -> float:
    return float(axes.get_window_extent().height / axes.figure.dpi)


def _title(axes: Axes, title: str) -> None:
    broken = textwrap.fill(title, max(8, int(_width(axes) / (10 * CHARACTER))))
    axes.set_title(broken, loc="left", color=INK, fontsize=10)


def _steps(axes: Axes) -> None:
    axes.grid(color=FAINT)
    axes.set_axisbelow(True)
    axes.set_xlabel("step")
    axes.locator_params("x", integer=True, min_n_ticks=1)


def _curve(curve: Curve, name: str) -> tuple[Tensor, Tensor]:
    """Steps and values, checked to be of one length."""
    steps, values = (torch.as_tensor(x).detach().cpu().double() for x in curve)
    if steps.ndim != 1 or steps.shape != values.shape or not len(steps):
        raise ValueError(
            f"{name} has steps of shape {tuple(steps.shape)} and values of {tuple(values.shape)}; they are two lists "
            "of one length."
        )
    return steps, values


def _line(axes: Axes, curve: tuple[Tensor, Tensor], colour: str, window: int, dashes: str) -> Any:
    """Draw a curve, or its moving mean over it, and return the line that a legend names."""
    steps, values = curve
    width = window if len(steps) >= 4 * window else 1
    if width > 1:
        axes.plot(steps, values, color=colour, linewidth=0.8, alpha=0.3)
    means = values.unfold(0, width, 1).mean(dim=1)
    (line,) = axes.plot(steps[width - 1 :], means, color=colour, linewidth=1.6, linestyle=dashes)
    if len(steps) == 1:
        line.set(marker="o", markersize=4)  # a point has no line to be seen by
    return line


def _dashes(number: int) -> str:
    """What tells curves apart that share a colour."""
    return ("-", "--", ":", "-.")[number // len(COLOURS) % 4]


def _legend(parent: Any, handles: Mapping[str, Any], width: float, ncols: int | None = None, **options: Any) -> None:
    """A legend in as many columns as fit into `width` inches; names that are longer are broken."""
    letters = max(8, int((width - 0.6) / (9 * CHARACTER)))
    names = [textwrap.fill(name, letters) for name in handles]
    broad = 0.6 + 9 * CHARACTER * max(len(line) for name in names for line in name.split("\n"))
    columns = min(len(names), max(1, int(width / broad))) if ncols is None else ncols
    parent.legend(list(handles.values()), names, ncols=columns, frameon=False, labelcolor=INK, fontsize=9, **options)


def _thin(axis: Any, inches: float, room: float) -> None:
    """Drop names of an axis of `inches` that lie nearer than `room` to others, those of the thinnest classes first."""
    middles, names = axis.get_ticklocs(), [label.get_text() for label in axis.get_ticklabels()]
    if not any(names):
        return
    low, high = sorted(axis.get_view_interval())
    gap = room / inches * (high - low)
    bounds = [low]
    for middle in middles:
        bounds.append(2 * middle - bounds[-1])
    kept: list[int] = []
    for index in sorted(range(len(names)), key=lambda i: bounds[i] - bounds[i + 1]):
        if all(abs(middles[index] - middles[other]) >= gap for other in kept):
            kept.append(index)
    axis.set_ticks([middles[i] for i in sorted(kept)], [names[i] for i in sorted(kept)])


def _write(axes: Axes, names: Sequence[str], colours: Sequence[str], places: Tensor, unit: float) -> None:
    """Write names at `places` `(N, 2)`, moved apart where they would lie over one another; an inch is `unit` long."""
    half = torch.tensor([[12 * CHARACTER * len(name), 12 * LINE] for name in names]) * unit / 2
    places = places.clone()
    for _ in range(200):
        apart = places[:, None] - places[None]
        overlap = half[:, None] + half[None] - apart.abs()
        overlap[range(len(names)), range(len(names))] = -1
        hit = (overlap > 0).all(dim=2)
        if not hit.any():
            break
        along = overlap.argmin(dim=2)  # the shorter way out
        push = torch.zeros_like(apart).scatter(2, along[..., None], overlap.gather(2, along[..., None]))
        order = torch.arange(len(names))
        sign = torch.where(apart == 0, torch.sign(order[:, None] - order[None])[..., None].to(apart), apart.sign())
        places += 0.5 * torch.where(hit[..., None], push * sign, 0).sum(dim=1)
    stroke = require("matplotlib.patheffects", extra="plot").withStroke(linewidth=3, foreground="white")
    for name, colour, (x, y) in zip(names, colours, places.tolist(), strict=True):
        text = axes.text(x, y, name, color=colour, fontsize=12, weight="bold", ha="center", va="center")
        text.set_path_effects([stroke])


def _part(axes: Axes, words: Sequence[Any]) -> None:
    """Move words into the axes, and down past those before them, or up where there is no room below."""
    figure: Figure = axes.figure.figure
    figure.draw_without_rendering()  # lays out how large the words are
    room, points = axes.get_window_extent(), 72 / figure.dpi
    taken: list[tuple[float, float, float, float]] = []
    for word in words:
        box = word.get_window_extent()
        left = max(room.x0, min(box.x0, room.x1 - box.width))
        top = max(room.y0 + box.height, min(box.y1, room.y1))

        def free(y: float, left: float = left, box: Any = box) -> bool:
            right, low = left + box.width, y - box.height
            return not any(left < r and x < right and low < t and b < y for x, b, r, t in taken)

        below = sorted((b for _, b, _, _ in taken if room.y0 <= b - box.height and b < top), reverse=True)
        above = sorted(t + box.height for *_, t in taken if t + box.height <= room.y1)
        top = next((y for y in [top, *below, *above] if free(y)), top)
        taken.append((left, top - box.height, left + box.width, top))
        x, y = word.get_position()
        word.set_position((x + points * (left - box.x0), y + points * (top - box.y1)))


def _draw(axes: Axes, picture: Any, x: float, y: float, frame: str) -> None:
    """A framed picture in the unit square whose upper left corner is at `x` and `y`."""
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
    images = images.float() if images.is_floating_point() else images  # NumPy has no bfloat16
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
    if classes is not None and not 0 <= label < len(classes):
        raise ValueError(f"classes has {len(classes)} names and a label is {label}; give every class from 0 its name.")
    return str(label) if classes is None else classes[label]


def _broken(name: str) -> str:
    """A name in up to two lines of up to twelve letters; a longer one keeps its end, in which classes often differ."""
    first, *others = textwrap.wrap(name, 12) or [name]
    return "\n".join([first, *others] if len(others) < 2 else [first, f"...{others[-1][-9:]}"])


def _short(name: str) -> str:
    """A name of up to 24 letters; a longer one keeps its last word."""
    last = name.rpartition(" ")[2][-12:]
    width = 21 - len(last)
    first = textwrap.shorten(name.removesuffix(last), width, placeholder="") or name[:width]
    return name if len(name) <= 24 else f"{first}...{last}"
