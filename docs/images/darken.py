"""Write the drawings for dark pages: the light ones in other colours.

python docs/images/darken.py
"""

from __future__ import annotations

import re
from pathlib import Path

HERE = Path(__file__).parent
DRAWINGS = ("method", "method-narrow")
DARK = {
    "#24292f": "#e6edf3",
    "#57606a": "#9da7b1",
    "#8c959f": "#6e7681",
    "#d0d7de": "#3d444d",
    "#f6f8fa": "#1c2128",
    "#ffffff": "#131416",
    "#2f6db3": "#7fb2e5",
    "#d2691e": "#f0a060",
}


def darken(drawing: str) -> str:
    """Return an SVG with every light colour replaced by its dark counterpart."""
    return re.sub("|".join(DARK), lambda colour: DARK[colour[0]], drawing)


if __name__ == "__main__":
    for name in DRAWINGS:
        drawing = (HERE / f"{name}.svg").read_text(encoding="utf-8")
        (HERE / f"{name}-dark.svg").write_text(darken(drawing), encoding="utf-8")
