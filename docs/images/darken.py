"""Write the drawings and the pictures for dark pages: the light ones in other colours.

python docs/images/darken.py

Drawings are made by hand, pictures by the examples, which write an SVG with `--format svg`. Photographs inside a
picture keep their colours. The site shows one or the other: `Variants` in docs/conf.py.
"""

from __future__ import annotations

import re
from pathlib import Path

HERE = Path(__file__).parent
DRAWINGS = sorted(path.stem for path in HERE.glob("*.svg") if not path.stem.endswith("-dark"))
MAPS = {"gallery-relations"}  # whose bitmaps are no photographs: light for nothing and dark for much
DARK = {
    "#000000": "#e6edf3",
    "#24292f": "#e6edf3",
    "#57606a": "#9da7b1",
    "#8c959f": "#6e7681",
    "#d0d7de": "#3d444d",
    "#f6f8fa": "#1c2128",
    "#ffffff": "#131416",
    "#2f6db3": "#7fb2e5",
    "#d2691e": "#f0a060",
    "#2e8b57": "#56b881",
    "#c2416b": "#e8799b",
    "#7d5ba6": "#b497d6",
    "#8c6d46": "#c4a27a",
    "#1c9aa8": "#4cc3d0",
    "#b8960c": "#dcbb3f",
    "#e07b91": "#f2a5b5",
    "#cf222e": "#ff7b72",
    "#e6eaef": "#2b3138",
}
# Light for dark in the same hue, as a filter that browsers know within an SVG.
INVERSE = """<filter id="inverse" color-interpolation-filters="sRGB">
  <feColorMatrix values="-0.92 0 0 0 1  0 -0.92 0 0 1  0 0 -0.92 0 1  0 0 0 1 0"/>
  <feColorMatrix type="hueRotate" values="180"/>
 </filter>
 """


def darken(drawing: str, invert: bool = False) -> str:
    """Return an SVG with every light colour replaced by its dark counterpart, and black, which goes without saying.

    Bitmaps stay, or with `invert` become dark where they were light.
    """
    dark = re.sub("|".join(DARK), lambda colour: DARK[colour[0]], drawing)
    if invert:
        dark = dark.replace("<defs>", INVERSE + "<defs>", 1).replace("<image ", '<image filter="url(#inverse)" ')
    return dark.replace("<svg ", f'<svg style="fill: {DARK["#000000"]}" ', 1)


if __name__ == "__main__":
    for name in DRAWINGS:
        drawing = (HERE / f"{name}.svg").read_text(encoding="utf-8")
        (HERE / f"{name}-dark.svg").write_text(darken(drawing, name in MAPS), encoding="utf-8")
