"""Pictures of a run and of what it learned, each a matplotlib `Figure`: save one with `figure.savefig("curves.png")`.

pip install "cgh-ssl[plot]". No window is opened and no global state of matplotlib is touched.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from cgh.extras import require

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

# One place for colours: of runs and classes in turn, of right and wrong, and of what is not data.
COLOURS = ("#2f6db3", "#d2691e", "#2e8b57", "#c2416b", "#7d5ba6", "#8c6d46", "#1c9aa8", "#b8960c", "#57606a", "#e07b91")
RIGHT, WRONG = "#2e8b57", "#cf222e"
INK, QUIET, FAINT = "#24292f", "#57606a", "#e6eaef"

Numbers = Sequence[float] | Tensor


def curves(runs: Mapping[str, Mapping[str, tuple[Numbers, Numbers]]], window: int = 1) -> Figure:
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
        raise ValueError(f"runs holds the quantities {quantities} and window is {window}; draw one or more, over 1 up.")
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
        place = "outside upper center"
        figure.legend(lines.values(), lines, loc=place, ncols=4, frameon=False, labelcolor=INK, fontsize=9)
    return figure


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
