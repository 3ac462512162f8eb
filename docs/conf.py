"""Configuration of the site: `nox -s docs`."""

import re
from html.parser import HTMLParser
from itertools import groupby
from pathlib import Path, PurePosixPath
from typing import Any
from urllib.parse import unquote, urlsplit

from docutils import nodes
from latex2mathml.converter import convert
from sphinx.application import Sphinx
from sphinx.transforms import SphinxTransform
from sphinx.util import logging
from sphinx.writers.html5 import HTML5Translator

import cgh

project = "CGH"
author = "The CGH authors"
copyright = "The CGH authors, Apache License 2.0"
version = release = cgh.__version__

extensions = ["myst_parser", "sphinx.ext.autodoc", "sphinx.ext.napoleon", "sphinx.ext.viewcode"]
myst_enable_extensions = ["colon_fence", "deflist", "dollarmath", "fieldlist"]
myst_heading_anchors = 3
exclude_patterns = ["_build"]
html_math_renderer = "mathml"

# Signatures show names and defaults; types stand beside each parameter's description.
autodoc_typehints = "description"
autodoc_typehints_description_target = "documented"
autodoc_typehints_format = "short"
autodoc_type_aliases = {
    "AxesLike": "Axes | Sequence[Axes]",
    "Banks": "cgh.MemoryBank | dict[str, Tensor]",
    "Contexts": "cgh.Contexts",
    "Curve": "tuple[Sequence[float], Sequence[float]]",
}
autodoc_preserve_defaults = True
autodoc_inherit_docstrings = False
autodoc_default_options = {"members": True, "member-order": "bysource"}
# Names in single backticks link where they are documented and are code elsewhere.
default_role = "py:obj"
maximum_signature_line_length = 88
python_use_unqualified_type_names = True
napoleon_google_docstring = True
napoleon_numpy_docstring = False
napoleon_custom_sections = ["Shape"]

# Python's and PyTorch's own inventories would have to be downloaded, so their names are shown without a link.
nitpick_ignore_regex = [
    ("py:obj", "(?s).*"),
    ("py:.*", r"(torch|nn|collections|typing|os|pathlib)\..*"),
    (
        "py:class",
        r"Axes|AxesLike|Curve|Dataset|TypeAliasForwardRef|'cgh\.Contexts'|Tensor|Module|Path|PathLike|Callable|Mapping|Sequence|Iterable|optional",
    ),
    ("py:exc", r"(Type|Value|Key|Runtime|FileNotFound)Error(, (Type|Value)Error)*"),
]

html_theme = "furo"
html_title = f"CGH {version}"
html_static_path = ["_static"]
html_css_files = ["cgh.css"]
html_copy_source = False
html_show_sphinx = False
pygments_style = "default"
pygments_dark_style = "github-dark"
html_theme_options = {
    "sidebar_hide_name": False,
    "light_css_variables": {"color-brand-primary": "#2f6db3", "color-brand-content": "#2f6db3"},
    "dark_css_variables": {"color-brand-primary": "#7fb2e5", "color-brand-content": "#7fb2e5"},
}


PRIME = "<mi>&#x02032;</mi>"


def equation(text: str, display: str) -> str:
    """Return MathML, with primes beside their letter: as superscripts browsers draw them so high that they are lost."""
    mathml = convert(text, display=display)
    mathml = re.sub(rf"<msup>(<mi>[^<]*</mi>){PRIME}</msup>", rf"<mrow>\1{PRIME}</mrow>", mathml)
    subscript = r"(<mi>[^<]*</mi>|<mrow>.*?</mrow>)"
    return re.sub(
        rf"<msubsup>(<mi>[^<]*</mi>){subscript}{PRIME}</msubsup>", rf"<msub><mrow>\1{PRIME}</mrow>\2</msub>", mathml
    )


def math_inline(self: HTML5Translator, node: nodes.math) -> None:
    """Write an equation as MathML, which browsers draw by themselves: no script, no font, no network."""
    self.body.append(equation(node.astext(), "inline"))
    raise nodes.SkipNode


def math_block(self: HTML5Translator, node: nodes.math_block) -> None:
    """Write an equation in a line of its own."""
    self.body.append(f'<div class="math">{equation(node.astext(), "block")}</div>')
    raise nodes.SkipNode


def tables(app: Sphinx, what: str, name: str, thing: object, options: object, lines: list[str]) -> None:
    """Turn the Markdown tables of a docstring, which read well in the source, into those of reStructuredText."""
    blocks = [(table, list(block)) for table, block in groupby(lines, key=lambda line: line.startswith("|"))]
    lines.clear()
    for table, block in blocks:
        if not table:
            lines += block
            continue
        head, _, *rows = ([cell.strip() for cell in line.strip("|").split("|")] for line in block)
        lines += [".. list-table::", f"   :header-rows: {int(any(head))}", ""]
        for row in [head, *rows] if any(head) else rows:
            lines += [f"   {'  ' if column else '* '}- {cell}" for column, cell in enumerate(row)]
        lines.append("")


VARIANTS = ("", "-dark", "-narrow", "-narrow-dark")


class Variants(SphinxTransform):
    """Put the dark and the narrow variants of a picture beside it, where `NAME-dark.svg` and the like exist.

    The style sheet shows one of them. A picture without a narrow variant scrolls where the page is narrow.
    """

    default_priority = 210

    def apply(self, **options: object) -> None:
        folder = Path(self.env.doc2path(self.env.docname)).parent
        for image in list(self.document.findall(nodes.image)):
            picture = PurePosixPath(image["uri"])
            variants = {end: picture.with_stem(picture.stem + end) for end in VARIANTS}
            ends = [end for end, variant in variants.items() if (folder / variant).exists()]
            frame = nodes.container(classes=["drawing" if "-narrow" in ends else "picture"])
            for end in ends:
                frame += image.deepcopy()
                frame[-1]["uri"] = str(variants[end])
                if "-dark" in ends:
                    frame[-1]["classes"].append("only-dark" if "dark" in end else "only-light")
                if "-narrow" in ends:
                    frame[-1]["classes"].append("narrow" if "narrow" in end else "wide")
            image.replace_self(frame)


def mend_ways_back(app: Sphinx, name: str, template: str, context: dict[str, Any], doctree: object) -> None:
    """Lead from a source to where it is documented; viewcode takes all names of a module to be of `cgh` itself."""
    if name.startswith("_modules/cgh/"):
        known = app.env.domains["py"].objects

        def mend(link: re.Match[str]) -> str:
            return link[0] if f"cgh.{link[1]}" in known else link[0].replace("#cgh", f"#{context['title']}")

        context["body"] = re.sub(r'#cgh\.([\w.]+)">\[docs\]', mend, context["body"])


class Page(HTMLParser):
    """The links and the anchors of a page."""

    def __init__(self, path: Path) -> None:
        super().__init__()
        self.links: list[str] = []
        self.anchors: set[str] = set()
        self.feed(path.read_text(encoding="utf-8"))

    def handle_starttag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        for name, value in attributes:
            if value and name in ("href", "src"):
                self.links.append(value)
            elif value and name == "id":
                self.anchors.add(value)


def check_links(app: Sphinx, error: Exception | None) -> None:
    """Warn of every link within the site that leads to no file or no anchor."""
    pages = {} if error else {path.resolve(): Page(path) for path in Path(app.outdir).rglob("*.html")}
    for path, page in pages.items():
        for link in page.links:
            parts = urlsplit(link)
            target = (path.parent / unquote(parts.path)).resolve() if parts.path else path
            anchors = pages[target].anchors if target in pages else set()
            outside = parts.scheme or parts.netloc
            if not outside and (not target.exists() or (parts.fragment and unquote(parts.fragment) not in anchors)):
                logging.getLogger(__name__).warning(
                    "%s links to %s, which is not there", path.relative_to(app.outdir), link
                )


def setup(app: Sphinx) -> None:
    """Make the renderer of equations, the tables, the variants of pictures and the check of links known."""
    app.add_transform(Variants)
    app.connect("html-page-context", mend_ways_back)
    app.connect("build-finished", check_links)
    app.connect("autodoc-process-docstring", tables)
    app.add_html_math_renderer("mathml", (math_inline, None), (math_block, None))
