"""The site builds strictly and without a network, its links lead somewhere, and it fetches nothing."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path
from urllib.parse import unquote, urldefrag, urlsplit

import pytest
import yaml

from bench.registry import methods
from tests.documents import ROOT, hook

NOWHERE = "http://127.0.0.1:9"
LOADING = {"script": "src", "img": "src", "iframe": "src", "source": "src", "audio": "src", "video": "src"}


def _build(folder: Path, config: Path) -> subprocess.CompletedProcess[str]:
    offline = dict.fromkeys(("http_proxy", "https_proxy", "HTTP_PROXY", "HTTPS_PROXY"), NOWHERE)
    return subprocess.run(
        [sys.executable, "-m", "mkdocs", "build", "--strict", "--config-file", str(config), "--site-dir", str(folder)],
        cwd=ROOT,
        env={**os.environ, **offline, "NO_MKDOCS_2_WARNING": "1"},
        capture_output=True,
        text=True,
    )


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("site")
    done = _build(folder, ROOT / "mkdocs.yml")
    assert done.returncode == 0, done.stderr
    assert "WARNING" not in done.stderr and "ERROR" not in done.stderr
    return folder


class _Page(HTMLParser):
    """What a page links to, what it loads, and what can be linked to in it."""

    def __init__(self, path: Path) -> None:
        super().__init__()
        self.links: set[str] = set()
        self.loads: set[str] = set()
        self.anchors: set[str] = set()
        self.unnamed_images = 0
        self.feed(path.read_text("utf-8"))

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        given = {name: value or "" for name, value in attrs}
        self.anchors |= {given[name] for name in ("id", "name") if given.get(name)}
        if tag == "a" and "href" in given:
            self.links.add(given["href"])
        if tag in LOADING and given.get(LOADING[tag]):
            self.loads.add(given[LOADING[tag]])
        if tag == "link" and given.get("rel") in ("stylesheet", "icon", "preload", "preconnect", "modulepreload"):
            self.loads.add(given["href"])
        self.unnamed_images += tag == "img" and not given.get("alt")


@pytest.fixture(scope="module")
def pages(site: Path) -> dict[Path, _Page]:
    return {path: _Page(path) for path in site.rglob("*.html") if path.name != "404.html"}


def _dead(pages: dict[Path, _Page], here: Path) -> list[str]:
    dead = []
    for target in sorted(pages[here].links | pages[here].loads):
        if urlsplit(target).scheme:
            continue
        path, anchor = urldefrag(unquote(target))
        file = (here.parent / path).resolve() if path else here
        if not file.is_file() or (anchor and file in pages and anchor not in pages[file].anchors):
            dead.append(target)
    return dead


def test_every_link_and_anchor_leads_somewhere(pages: dict[Path, _Page], site: Path) -> None:
    assert len(pages) > 30
    assert {str(path.relative_to(site)): dead for path in pages if (dead := _dead(pages, path))} == {}


def test_a_dead_link_is_found(tmp_path: Path) -> None:
    page = tmp_path / "a.html"
    page.write_text('<h1 id="x"></h1><a href="#x"></a><a href="#y"></a><a href="b.html"></a><img src="c.png" alt="c">')
    assert _dead({page: _Page(page)}, page) == ["#y", "b.html", "c.png"]


def test_nothing_is_fetched_from_elsewhere(pages: dict[Path, _Page], site: Path) -> None:
    remote = {load for page in pages.values() for load in page.loads if urlsplit(load).scheme not in ("", "data")}
    assert remote == set()
    for sheet in site.rglob("*.css"):
        assert re.findall(r"(?:url\(|@import)\s*[\"']?(?:https?:)?//", sheet.read_text("utf-8")) == [], sheet.name


def test_every_picture_has_words(pages: dict[Path, _Page]) -> None:
    assert {path.name: page.unnamed_images for path, page in pages.items() if page.unnamed_images} == {}


def test_the_search_knows_the_generated_pages_too(site: Path) -> None:
    index = json.loads((site / "search" / "search_index.json").read_text("utf-8"))
    text = {entry["location"]: entry["text"] for entry in index["docs"]}
    assert "merge k neighbouring" in " ".join(text.values()).lower()
    for location in ("reference/config.html", "reference/cli.html", "reference/api/plugins.html", "studies/pilot.html"):
        assert location in text
    assert all(f"reference/methods.html#{name}" in text for name in methods())
    assert (site / "search" / "search_index.js").is_file(), "for a site that is opened from the disk"


def test_the_api_pages_hold_what_the_modules_have(site: Path, pages: dict[Path, _Page]) -> None:
    for page, section in hook("api").sections().items():
        anchors = pages[site / "reference" / "api" / f"{page}.html"].anchors
        for module in section.modules:
            assert any(anchor.startswith(module) for anchor in anchors), f"{module} is empty on {page}"
    plugins = pages[site / "reference" / "api" / "plugins.html"].anchors
    assert {"bench.plugins.plugin.Plugin.from_pretrained", "bench.plugins.bank.PluginBank.select"} <= plugins
    text = (site / "reference" / "api" / "plugins.html").read_text("utf-8")
    assert "doctest: +SKIP" not in text


def test_the_navigation_is_short(pages: dict[Path, _Page]) -> None:
    text = (ROOT / "mkdocs.yml").read_text("utf-8")
    nav = yaml.safe_load(re.search(r"^nav:\n.*?\n\n", text, re.M | re.S)[0])["nav"]  # type: ignore[index]
    assert len(nav) <= 7
    titles = [re.search("<title>(.*?)</title>", path.read_text("utf-8")) for path in pages]
    assert all(titles) and len({title[1] for title in titles if title}) == len(titles), "each page has its own title"


def test_a_dead_anchor_ends_a_build(tmp_path: Path) -> None:
    """The strict settings of the site, on two pages of their own."""
    docs = tmp_path / "docs"
    docs.mkdir()
    (docs / "index.md").write_text("# A\n\n[b](b.md#none)\n")
    (docs / "b.md").write_text("# B\n")
    text = (ROOT / "mkdocs.yml").read_text("utf-8")
    validation = text[text.index("validation:") :]
    config = tmp_path / "mkdocs.yml"
    config.write_text(f"site_name: x\nplugins: []\n{validation}")
    done = _build(tmp_path / "site", config)
    assert done.returncode != 0 and "does not contain an anchor '#none'" in done.stderr
