"""Pictures of what a detector found over what is there."""

from __future__ import annotations

from collections.abc import Sequence

from matplotlib import colormaps
from matplotlib.font_manager import findfont
from PIL import ImageDraw, ImageFont
from torch import Tensor
from torchvision.transforms.v2.functional import pil_to_tensor, resize, to_pil_image
from torchvision.utils import draw_bounding_boxes

SIDE = 640  # pixels: the longer side is at least this, so that the words can be read
SCORE = 0.5  # what is drawn of the detections
FONT = ImageFont.truetype(findfont("DejaVu Sans"), size=13)
TRUTH = (255, 255, 255)


def draw(
    image: Tensor,
    truth_boxes: Tensor,
    truth_labels: Tensor,
    boxes: Tensor,
    labels: Tensor,
    scores: Tensor,
    classes: Sequence[str],
) -> Tensor:
    """Return the picture: ground truth as broad white frames, detections of a score of at least 0.5 as narrow ones.

    The edge of a white frame has the colour of its class, as detections of that class have.

    Args:
        image: uint8 `(3, H, W)`.
        truth_boxes: `(n, 4)`, left, top, right, bottom in pixels of the image.
        truth_labels: `(n,)`, from 0.
        boxes: `(m, 4)`, likewise.
        labels: `(m,)`, from 0.
        scores: `(m,)`, 0 to 1.
        classes: the names of the labels.

    Returns:
        uint8 `(3, H', W')`, enlarged if the image is small.
    """
    scale = max(1.0, SIDE / max(image.shape[1:]))
    height, width = (round(scale * side) for side in image.shape[1:])
    picture = resize(image, [height, width])
    palette = [tuple(round(255 * x) for x in colormaps["tab10"](i % 10)[:3]) for i in range(len(classes))]
    if len(truth_boxes):
        edges = [palette[label] for label in truth_labels.tolist()]
        picture = draw_bounding_boxes(picture, scale * truth_boxes, colors=TRUTH, width=5)
        picture = draw_bounding_boxes(picture, scale * truth_boxes, colors=edges, width=1)
    seen = scores >= SCORE
    if not seen.any():
        return picture
    boxes, found = scale * boxes[seen], labels[seen].tolist()
    picture = draw_bounding_boxes(picture, boxes, colors=[palette[label] for label in found], width=2)
    canvas = to_pil_image(picture)
    pen = ImageDraw.Draw(canvas)
    for (left, top, *_), label, score in zip(boxes.tolist(), found, scores[seen].tolist(), strict=True):
        word = f"{classes[label]} {score:.2f}"
        pen.text((left + 4, top + 2), word, palette[label], FONT, stroke_width=2, stroke_fill=TRUTH)
    return pil_to_tensor(canvas)
