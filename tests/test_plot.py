"""Pictures show what they were given, and refuse what they cannot show."""

from __future__ import annotations

import io
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from tests.conftest import unit

pytest.importorskip("matplotlib")
from matplotlib.colors import to_hex
from matplotlib.figure import Figure
from matplotlib.image import imread

from cgh import plot

GREY = torch.linspace(0, 1, 6 * 16).view(6, 1, 4, 4)


def pixels(figure: Figure) -> Any:
    """The drawn figure `(H, W, 4)`, for it must draw without error and not be blank."""
    file = io.BytesIO()
    figure.savefig(file, format="png")
    file.seek(0)
    drawn = imread(file)
    assert drawn.std() > 0.01
    return drawn


def test_curves_lay_runs_over_one_another() -> None:
    figure = plot.curves(
        {
            "CGH": {"loss": ([0, 1, 2], [3.0, 2.0, 1.0]), "accuracy": ([2], [98.0])},
            "InfoNCE": {"loss": (torch.arange(2), torch.tensor([3.0, 2.5]))},
        }
    )
    pixels(figure)
    loss, accuracy = figure.axes
    assert [line.get_ydata().tolist() for line in loss.get_lines()] == [[3, 2, 1], [3, 2.5]]
    assert [line.get_ydata().tolist() for line in accuracy.get_lines()] == [[98]]
    assert loss.get_lines()[0].get_color() == accuracy.get_lines()[0].get_color() != loss.get_lines()[1].get_color()
    assert [text.get_text() for text in figure.legends[0].get_texts()] == ["CGH", "InfoNCE"]


def test_curves_take_a_moving_mean() -> None:
    steps, values = torch.arange(8), torch.tensor([0.0, 2, 4, 2, 0, 2, 4, 6])
    raw, mean = plot.curves({"run": {"loss": (steps, values)}}, window=2).axes[0].get_lines()
    assert raw.get_ydata().tolist() == values.tolist()
    assert mean.get_xdata().tolist() == [1, 2, 3, 4, 5, 6, 7]
    assert mean.get_ydata().tolist() == [1, 3, 3, 1, 1, 3, 5]


def test_neighbours_are_the_nearest_and_framed_by_their_class() -> None:
    # By angle the query's neighbours are 0, 2, 1; all lengths differ, which must not matter.
    theirs = torch.tensor([[9.0, 0.1], [0.1, 0.2], [3.0, 1.0]])
    figure = plot.neighbours(
        GREY[:1],
        GREY[1:4],
        {"model": (torch.tensor([[1.0, 0.0]]), theirs)},
        ([1], [1, 0, 1]),
        k=3,
        classes=["cat", "dog"],
    )
    pixels(figure)
    (axes,) = figure.axes
    shown = [image.get_array()[..., 0].tolist() for image in axes.get_images()]
    assert shown == [GREY[index, 0].tolist() for index in (0, 1, 3, 2)]
    assert [to_hex(frame.get_edgecolor()) for frame in axes.patches] == [plot.INK, plot.RIGHT, plot.RIGHT, plot.WRONG]
    assert [text.get_text() for text in axes.texts] == ["dog", "cat"]
    assert axes.get_title(loc="left") == "model: 67 % right"


def test_a_relation_matrix_is_sorted_by_class() -> None:
    p = torch.tensor([[0.1, 0.2, 0.7], [0.5, 0.25, 0.25]])
    axes, _ = plot.relation_matrix({"global": p}).axes
    assert axes.get_images()[0].get_array().tolist() == p.tolist()
    figure = plot.relation_matrix({"global": p, "hypercolumn": p.flip(1)}, [2, 0], [1, 0, 1], classes=["a", "b", "c"])
    pixels(figure)
    axes = figure.axes[0]
    assert axes.get_images()[0].get_array().tolist() == p[[1, 0]][:, [1, 0, 2]].tolist()
    assert [label.get_text() for label in axes.get_yticklabels()] == ["a", "c"]
    assert [label.get_text() for label in axes.get_xticklabels()] == ["a", "b"]
    assert axes.get_xticks().tolist() == [0, 1.5]


def test_principal_colours_follow_the_features() -> None:
    # Places of three kinds span two components: three colours without blue, whatever the basis.
    kinds = torch.arange(2 * 6 * 6).remainder(3).view(2, 6, 6)
    basis = torch.linalg.qr(unit(16, 16).float()).Q[:3]
    state = torch.get_rng_state()
    colours = plot.principal_colours((basis * torch.tensor([[3.0], [2.0], [1.0]]))[kinds].permute(0, 3, 1, 2))
    assert torch.equal(torch.get_rng_state(), state)
    assert colours.shape == (2, 3, 6, 6)
    assert colours[:, 2].max() < 0.01
    of_kind = [colours.permute(0, 2, 3, 1)[kinds == kind] for kind in range(3)]
    means = torch.stack([c.mean(dim=0) for c in of_kind])
    assert max((c - m).abs().max().item() for c, m in zip(of_kind, means, strict=True)) < 1e-3
    assert torch.pdist(means).min() > 0.5
    assert (means[:, :2].amin(dim=0) < 1e-3).all()
    assert (means[:, :2].amax(dim=0) > 0.999).all()


def test_hypercolumns_lie_below_their_images() -> None:
    maps = {"shallow": torch.rand(6, 5, 4, 4), "deep": torch.rand(6, 7, 2, 2)}
    figure = plot.hypercolumns(GREY, maps)
    pixels(figure)
    assert [axes.get_title(loc="left") for axes in figure.axes] == ["input", "shallow", "deep"]
    deep = figure.axes[2].get_images()
    expected = plot.principal_colours(maps["deep"]).permute(0, 2, 3, 1)
    assert [image.get_array().tolist() for image in deep] == expected.tolist()


def test_an_embedding_keeps_clusters_apart() -> None:
    pytest.importorskip("sklearn")
    labels = torch.arange(60) % 3
    features = torch.eye(3)[labels].repeat(1, 4) + 0.05 * unit(60, 12).float()
    figure = plot.embedding({"model": features}, labels, classes=["a", "b", "c"])
    pixels(figure)
    (axes,) = figure.axes
    clusters = [torch.as_tensor(c.get_offsets().data) for c in axes.collections]
    assert [len(c) for c in clusters] == [20, 20, 20]
    assert [text.get_text() for text in axes.texts] == ["a", "b", "c"]
    within = max(torch.pdist(c).max() for c in clusters)
    between = min(torch.cdist(clusters[i], clusters[j]).min() for i, j in ((0, 1), (0, 2), (1, 2)))
    assert between > within


NAMES = [f"{adjective} {noun}" for adjective in ("electric", "African bush") for noun in ("owl", "car", "hummingbird")]
NAMES += [f"delivery van of the {nation}" for nation in ("Swiss", "French", "British", "Dutch", "Danes", "Finns")]
NAMES += ["cat", "dog", "zebra", "violin", "umbrella", "washbasin", "sea lion", "airliner"]
TWENTY = torch.arange(400) % 20


def boxes(figure: Figure) -> list[Any]:
    """Where words stand in the drawn figure, in pixels."""
    figure.draw_without_rendering()
    texts = [text for axes in figure.axes for text in axes.texts]
    for axis in (axis for axes in figure.axes if axes.axison for axis in (axes.xaxis, axes.yaxis)):
        low, high = sorted(axis.get_view_interval())
        texts += [t for at, t in zip(axis.get_ticklocs(), axis.get_ticklabels(), strict=True) if low <= at <= high]
    texts += [axes._left_title for axes in figure.axes]  # type: ignore[attr-defined]
    legends = [*figure.legends, *(axes.get_legend() for axes in figure.axes if axes.get_legend())]
    texts += [text for legend in legends for text in legend.get_texts()]
    return [text.get_window_extent() for text in texts if text.get_text()]


def relations() -> dict[str, Tensor]:
    rows = unit(100, 300).float().abs()
    return {"global": rows / rows.sum(dim=1, keepdim=True)}


def detections(**changes: Any) -> Figure:
    """Six boxes nearly in one place at the lower right, two of which score too little."""
    shift = torch.arange(6.0)[:, None]
    arguments: dict[str, Any] = {
        "image": torch.full((3, 60, 80), 0.5),
        "found": (torch.tensor([[50.0, 45, 70, 50]]) + shift, TWENTY[:6], 0.4 + 0.1 * torch.arange(6) - 0.05),
        "truth": (torch.tensor([[5.0, 10, 20, 30]]), torch.tensor([19])),
        "classes": NAMES,
    }
    return plot.detections(**(arguments | changes))


CROWDED: dict[str, Callable[[], Figure]] = {
    "six runs": lambda: plot.curves(
        {f"runs/resnet50-batch{n}-warmup{n}": {q: ([0, 1], [1.0, 0.5]) for q in NAMES[:4]} for n in range(6)}
    ),
    "a group of twenty": lambda: plot.groups(
        {f"loss/{name}": ([0, 1], [1.0, 0.5]) for name in NAMES} | {"rank": ([0], [1.0])}
    ),
    "neighbours": lambda: plot.neighbours(
        torch.rand(5, 1, 8, 8),
        torch.rand(60, 1, 8, 8),
        {"before training of a ResNet-50 for 200 epochs": (torch.randn(5, 4), torch.randn(60, 4))},
        (TWENTY[:5], TWENTY[:60]),
        classes=NAMES,
    ),
    "relations": lambda: plot.relation_matrix(relations(), TWENTY[:100], TWENTY[100:], classes=NAMES),
    "relations of thin classes": lambda: plot.relation_matrix(
        relations(), [0] * 81 + list(range(1, 20)), TWENTY[100:], classes=NAMES, size=(4, 3)
    ),
    "detections": detections,
    "a map": lambda: plot.embedding({"before": torch.randn(400, 4)}, TWENTY, classes=NAMES),
    "a map of numbers": lambda: plot.embedding({"before": torch.randn(400, 4)}, TWENTY),
}


@pytest.mark.parametrize("name", CROWDED)
def test_no_word_lies_on_another_or_leaves_the_figure(name: str) -> None:
    if "map" in name:
        pytest.importorskip("sklearn")
    torch.manual_seed(0)
    figure = CROWDED[name]()
    drawn = boxes(figure)
    assert len(drawn) > 5
    whole = figure.bbox
    assert all(whole.x0 <= b.x0 and b.x1 <= whole.x1 and whole.y0 <= b.y0 and b.y1 <= whole.y1 for b in drawn)
    rows = torch.tensor([[b.x0 + 1, b.y0 + 1, b.x1 - 1, b.y1 - 1] for b in drawn])
    width = torch.minimum(rows[:, None, 2], rows[None, :, 2]) - torch.maximum(rows[:, None, 0], rows[None, :, 0])
    height = torch.minimum(rows[:, None, 3], rows[None, :, 3]) - torch.maximum(rows[:, None, 1], rows[None, :, 1])
    assert not ((width > 0) & (height > 0)).fill_diagonal_(False).any()


def test_long_names_of_classes_stay_apart() -> None:
    vans = [f"delivery van of the {nation}" for nation in ("Swiss", "French", "British")] + ["x" * 40, "y" * 40]
    maps = plot.relation_matrix({"global": torch.full((50, 50), 0.02)}, TWENTY[:50] % 5, TWENTY[:50] % 5, classes=vans)
    pixels(maps)
    shown = [text.get_text() for text in maps.axes[0].get_yticklabels()]
    assert shown[:3] == ["delivery van of...Swiss", "delivery van of...French", "delivery van...British"]
    assert shown[3:] == ["xxxxxxxxx...xxxxxxxxxxxx", "yyyyyyyyy...yyyyyyyyyyyy"]
    captions = eight(labels=([0, 1], [1, 2, 3, 4]), classes=vans)
    pixels(captions)
    words = {text.get_text() for axes in captions.axes for text in axes.texts}
    assert "delivery van\n...French" in words


def test_steps_are_whole_numbers() -> None:
    for steps in ([0, 1], [3], [1, 3]):
        figure = plot.curves({"run": {"loss": (steps, [1.0] * len(steps))}})
        pixels(figure)
        assert all(tick == round(tick) for tick in figure.axes[0].get_xticks())


def test_detections_have_frames_in_the_colours_of_a_legend() -> None:
    boxes, labels = torch.tensor([[2.0, 3, 12, 23], [30.0, 10, 50, 20], [5.0, 5, 9, 9]]), torch.tensor([2, 0, 1])
    found, truth = (boxes, labels, torch.tensor([0.7, 0.914, 0.3])), (boxes[:1], labels[:1])
    figure = detections(found=found, truth=truth, classes=["ant", "bee", "cat"])
    pixels(figure)
    (axes,) = figure.axes
    frames = [(*frame.get_xy(), frame.get_width(), frame.get_height()) for frame in axes.patches]
    assert frames == [(1.5, 2.5, 10, 20), (1.5, 2.5, 10, 20), (29.5, 9.5, 20, 10), (1.5, 2.5, 10, 20)]
    colours = [to_hex(frame.get_edgecolor()) for frame in axes.patches]
    assert colours == ["#ffffff", plot.COLOURS[2], plot.COLOURS[0], plot.COLOURS[2]]
    assert [text.get_text() for text in axes.texts] == ["ant 0.91", "cat 0.70"]
    (legend,) = figure.legends
    assert [text.get_text() for text in legend.get_texts()] == ["ant", "cat", "ground truth"]
    assert [to_hex(patch.get_edgecolor()) for patch in legend.get_patches()] == [
        *(plot.COLOURS[i] for i in (0, 2)),
        "#ffffff",
    ]
    assert not detections(found=tuple(x[:0] for x in found), truth=None).legends


def test_pictures_in_half_precision() -> None:
    image = torch.rand(3, 4, 6).bfloat16()
    nothing = torch.zeros(0, 4), torch.zeros(0, dtype=torch.long), torch.zeros(0)
    (picture,) = plot.detections(image, nothing).axes[0].images
    assert torch.equal(torch.as_tensor(picture.get_array()), image.float().permute(1, 2, 0))


def test_groups_of_a_run_and_their_levels() -> None:
    run = {"entropy/student": ([0, 1], [5.0, 4.0]), "entropy/teacher": ([0, 1], [5.0, 3.0]), "lr": ([0, 1], [0.1, 0.0])}
    figure = plot.groups(run, levels={"entropy": {"log K": 5.5}})
    pixels(figure)
    entropy, rate = figure.axes
    assert [line.get_ydata()[-1] for line in entropy.get_lines()] == [4, 3, 5.5]
    assert [text.get_text() for text in entropy.get_legend().get_texts()] == ["student", "teacher", "log K"]
    assert rate.get_legend() is None
    chosen = plot.groups(run, {"teacher and rate": ["entropy/teacher", "lr"]})
    assert [len(axes.get_lines()) for axes in chosen.axes] == [2]


def test_on_axes_of_ones_own_and_in_a_size_of_ones_own() -> None:
    figure = Figure(figsize=(6, 3))
    left, right = figure.subplots(1, 2)
    assert plot.curves({"run": {"loss": ([0, 1], [2.0, 1.0])}}, ax=left) is figure
    assert plot.relation_matrix({"global": torch.full((2, 3), 1 / 3)}, ax=[right]) is figure
    assert len(left.get_lines()) == 1
    assert len(right.get_images()) == 1
    one, two = Figure().subfigures(1, 2)
    assert plot.hypercolumns(GREY, {"deep": torch.rand(6, 7, 2, 2)}, ax=two.subplots(2, 1)) is one.figure
    assert plot.curves({"run": {"loss": ([0], [1.0])}}, size=(5, 2)).get_size_inches().tolist() == [5, 2]


def test_a_notebook_shows_it_and_a_pdf_holds_its_words_in_truetype(tmp_path: Path) -> None:
    figure = plot.curves({"run": {"loss": ([0, 1], [2.0, 1.0])}})
    assert figure._repr_png_().startswith(b"\x89PNG")
    plot.save(figure, tmp_path / "curves.pdf")
    written = (tmp_path / "curves.pdf").read_bytes()
    assert b"/FontFile2" in written
    assert b"/Type3" not in written


def eight(**changes: Any) -> Figure:
    arguments: dict[str, Any] = {
        "queries": GREY[:2],
        "images": GREY[2:],
        "features": {"model": (torch.eye(2, 4), torch.eye(4))},
        "labels": ([0, 1], [0, 1, 0, 1]),
        "k": 2,
    }
    return plot.neighbours(**(arguments | changes))


def bad(*shape: int, value: float = 0.5) -> Tensor:
    return torch.full(shape, value)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: plot.curves({}), "each is one or more"),
        (lambda: plot.curves({"run": {"loss": ([0], [1.0])}}, window=0), "window is 0"),
        (lambda: plot.curves({"run": {"loss": ([0, 1], [1.0])}}), r"'loss' of run 'run' has steps of shape \(2,\)"),
        (lambda: plot.groups({}), "the run has"),
        (lambda: plot.groups({"loss": ([0], [1.0])}, {"losses": ["los"]}), r"unknown are \['los'\]"),
        (lambda: plot.groups({"loss": ([0], [1.0])}, levels={"rank": {"N": 4}}), r"unknown are \['rank'\]"),
        (lambda: plot.curves({"run": {"loss": ([0], [1.0])}}, ax=[]), "0 axes are given for 1 panels"),
        (lambda: plot.curves({"run": {"loss": ([0], [1.0])}}, size=(3, 0)), r"size is \(3, 0\)"),
        (lambda: eight(queries=GREY[:2] - 1), "from -1 to -0.6"),
        (lambda: eight(images=GREY[2:, 0]), r"images are torch.float32 of shape \(4, 4, 4\)"),
        (lambda: eight(k=5), "k from 1 to the 4 images"),
        (lambda: eight(labels=([0], [0, 1, 0, 1])), r"labels of the queries are torch.int64 of shape \(1,\)"),
        (lambda: eight(labels=([0.5, 1], [0, 1, 0, 1])), "they are 2 integers from 0"),
        (lambda: eight(features={"model": (torch.eye(3), torch.eye(4))}), r"'model' have shape \(3, 3\)"),
        (lambda: eight(classes=["cat"]), "classes has 1 names and a label is 1"),
        (lambda: plot.relation_matrix({"global": bad(0, 3)}), "give one context or more"),
        (lambda: plot.relation_matrix({}), "give one context or more"),
        (lambda: plot.relation_matrix({"global": bad(2, 3), "deep": bad(2, 4)}), r"'deep': \(2, 4\)"),
        (lambda: plot.relation_matrix({"global": bad(2, 3, value=2)}), "'global' holds 2 to 2"),
        (lambda: plot.relation_matrix({"global": bad(2, 3)}, [0, 1, 2]), "labels of the rows"),
        (lambda: plot.relation_matrix({"global": bad(1, 10_000)}), r"K from 1 to 8192"),
        (lambda: plot.hypercolumns(GREY, {"deep": torch.rand(5, 4, 2, 2)}), "for 6 images"),
        (lambda: plot.principal_colours(torch.rand(5, 2, 2, 2)), r"shape \(5, 2, 2, 2\)"),
        (lambda: plot.principal_colours(bad(5, 4, 2, 2, value=float("nan"))), "not finite"),
        (lambda: detections(truth=(torch.zeros(2, 4), TWENTY[:1])), r"the truth has \[\(2, 4\), \(1,\)\]"),
        (lambda: detections(classes=NAMES[:3]), "classes has 3 names"),
        (lambda: detections(truth=(torch.zeros(1, 4), torch.tensor([-1])), classes=NAMES), "a label is -1"),
        (lambda: detections(image=torch.zeros(60, 80)), r"shape \(1, 60, 80\)"),
        (lambda: plot.embedding({"model": torch.rand(4, 3)}, [0, 1, 0, 1]), "five images or more"),
    ],
)
def test_bad_input(call: Callable[[], Figure], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        call()
