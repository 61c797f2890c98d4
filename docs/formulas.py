"""Draws the formulas of a page into it as SVG: the site then needs no script for them, so no CDN either."""

from __future__ import annotations

import base64
import html
import io
import re
from typing import Any

from matplotlib import rc_context
from matplotlib.figure import Figure
from matplotlib.font_manager import FontProperties
from matplotlib.mathtext import MathTextParser

SIZE = 11.0
"""Points of the text around; images are scaled to it, so only their proportions count."""

# What pymdownx.arithmatex leaves of $…$ and $$…$$
FORMULA = re.compile(r'<(span|div) class="arithmatex">\\[(\[](.*?)\\[)\]]</\1>', re.DOTALL)


def on_page_content(content: str, **_: Any) -> str:
    """Replace each formula by an image; mkdocs calls this for every page."""
    return FORMULA.sub(lambda found: _image(found[2], found[1] == "div"), content)


def _image(escaped: str, block: bool) -> str:
    """Draw one formula. Its source is the alternative text, and an unknown command in it is an error."""
    source = " ".join(html.unescape(escaped).split())
    font = FontProperties(size=SIZE, math_fontfamily="stix")
    drawn = f"${source}$"
    width, height, depth, *_ = MathTextParser("path").parse(drawn, dpi=72, prop=font)
    figure = Figure(figsize=(width / 72, height / 72))
    figure.text(0, depth / height, drawn, fontproperties=font)
    svg = io.BytesIO()
    with rc_context({"svg.hashsalt": "modq"}):  # one source, one image
        figure.savefig(svg, format="svg", transparent=True, metadata={"Date": None})
    data = base64.b64encode(svg.getvalue()).decode()
    style = f"height:{height / SIZE:.3f}em;vertical-align:{-depth / SIZE:.3f}em"
    image = f'<img alt="{html.escape(source)}" src="data:image/svg+xml;base64,{data}" style="{style}">'
    return f'<p style="text-align:center">{image}</p>' if block else image
