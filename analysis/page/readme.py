"""A study's README as a part of the page."""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple

from markdown_it import MarkdownIt


class Readme(NamedTuple):
    """What a README says.

    Attributes
    ----------
    title
        Its first heading.
    body
        The rest, as HTML without scripts, images or markup of its own.
    """

    title: str
    body: str


def read_readme(path: Path) -> Readme | None:
    """Read a README; ``None`` if there is none.

    Headings come one level lower, below the page's own. Images are left out, as the page is one file.
    """
    try:
        text = path.read_text("utf-8", errors="replace")
    except OSError:
        return None
    parser = MarkdownIt("commonmark", {"html": False}).enable("table").disable("image")
    tokens = parser.parse(text)
    title = ""
    if [token.type for token in tokens[:1]] == ["heading_open"] and tokens[0].tag == "h1":
        title, tokens = tokens[1].content, tokens[3:]
    for token in tokens:
        if token.tag in ("h1", "h2", "h3", "h4", "h5"):
            token.tag = f"h{max(3, int(token.tag[1]) + 1)}"
        if token.type == "table_open":
            token.attrSet("class", "plain")
        if token.type == "fence":
            token.info = ""
    return Readme(title, str(parser.renderer.render(tokens, parser.options, {})))
