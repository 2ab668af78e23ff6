"""Links that lead out of docs/ on a git forge, turned to the page that shows the same thing in the site."""

from __future__ import annotations

import posixpath
import re
from typing import Any

import api

STUDY_PAGE = re.compile(r"studies/([\w-]+)\.md")
ELSEWHERE = (
    (re.compile(r"results/([\w-]+)/README\.md"), r"docs/studies/\1.md"),
    (re.compile(r"results/([\w-]+)/figures/([\w.-]+\.png)"), r"docs/studies/\1/\2"),
    (re.compile(r"(docs/notebooks/\w+)\.ipynb"), r"\1.md"),
)
"""File in the repository -> what shows it in the site."""
MODULES = {"bench/config.py": "docs/reference/config.md"} | {
    f"{module.replace('.', '/')}.py": f"docs/reference/api/{page}.md"
    for page, section in api.sections().items()
    for module in section.modules
    if module != "bench.config"
}
"""Source of a public module -> the page that says what is in it."""
LINK = re.compile(r"(?P<open>\]\()(?P<path>[^)#\s:]+)(?P<rest>(?:#[^)\s]*)?\))")


def in_site(markdown: str, page: str) -> str:
    """Return the text of a page with the links that it has in the repository turned to where they lead in the site.

    Parameters
    ----------
    markdown
        Text as it is in the repository.
    page
        Source path of the page in the site, such as ``studies/pilot.md``.
    """
    study = STUDY_PAGE.fullmatch(page)
    source = f"results/{study[1]}" if study else posixpath.dirname(f"docs/{page}")
    here = posixpath.dirname(page)

    def turned(match: re.Match[str]) -> str:
        target = posixpath.normpath(posixpath.join(source, match["path"]))
        for pattern, shown in ELSEWHERE:
            if pattern.fullmatch(target):
                target = pattern.sub(shown, target)
        target = MODULES.get(target, target)
        if not target.startswith("docs/"):
            return match[0]
        path = posixpath.relpath(target.removeprefix("docs/"), here or ".")
        return f"{match['open']}{path}{match['rest']}"

    return LINK.sub(turned, markdown)


def on_page_content(html: str, **_: Any) -> str:
    """Say ``:`` where a docstring begins a literal block by ``::`` (called by MkDocs)."""
    return html.replace("::</p>", ":</p>")


def on_page_markdown(markdown: str, page: Any, **_: Any) -> str:
    """Turn the links of a page (called by MkDocs)."""
    return in_site(markdown, page.file.src_uri)
