"""A real Chromium for the tests of pages: the system's own, without a network."""

from __future__ import annotations

import os
import shutil
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

NAMES = ("chromium", "chromium-browser", "google-chrome")
SLOW = 60_000
"""Milliseconds after which something is taken to never happen; machines that test may be busy."""


def find_chromium() -> str:
    """Return the browser; where none is installed, the tests are skipped, and say so."""
    found = next((path for name in NAMES if (path := shutil.which(name))), None)
    if found:
        return found
    reason = "pages are not tested here: no chromium (Debian: chromium)"
    if os.environ.get("REQUIRE_CHROMIUM") == "1":
        pytest.fail(reason)
    warnings.warn(reason, stacklevel=2)
    pytest.skip(reason)


@contextmanager
def chromium() -> Iterator[Any]:
    """Start the browser."""
    path = find_chromium()
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        # as root there is no sandbox to be had; what is opened here was written here
        browser = playwright.chromium.launch(executable_path=path, args=["--no-sandbox"])
        try:
            yield browser
        finally:
            browser.close()


class Visit:
    """A page that was opened from disk, and what it did that it must not.

    Attributes
    ----------
    page
        Of playwright.
    complaints
        What stood on the console, and errors.
    requests
        Addresses that it asked for, but for its own, each with why it got no answer, if it got none.
    """

    def __init__(
        self, browser: Any, path: Path, *, width: int = 1280, scheme: str = "light", address: str = ""
    ) -> None:
        self.context = browser.new_context(
            viewport={"width": width, "height": 900}, color_scheme=scheme, reduced_motion="reduce",
            permissions=["clipboard-read", "clipboard-write"],
        )  # fmt: skip
        self.context.set_default_timeout(SLOW)
        self.page = self.context.new_page()
        self.complaints: list[str] = []
        self.requests: dict[str, str] = {}
        self.page.on("console", lambda message: self.complaints.append(f"{message.type}: {message.text}"))
        self.page.on("pageerror", lambda error: self.complaints.append(str(error)))
        self.page.on("request", lambda request: self._note(request.url, path))
        self.page.on("requestfailed", lambda request: self._note(request.url, path, str(request.failure)))
        self.page.goto(path.as_uri() + address)
        self.drawn(1)

    def _note(self, url: str, path: Path, failure: str = "") -> None:
        if url.partition("#")[0] != path.as_uri():
            self.requests[url] = failure

    def drawn(self, times: int) -> None:
        """Wait until the charts were drawn so many times."""
        self.page.wait_for_selector(f'html[data-drawn="{times}"]', state="attached")

    @property
    def draws(self) -> int:
        """How many times the charts were drawn."""
        return int(self.page.get_attribute("html", "data-drawn"))

    def choose(self, key: str, value: str) -> None:
        """Press one of the filters and wait for the charts."""
        before = self.draws
        chips = self.page.locator(f'.chip[data-key="{key}"]')
        values = [chips.nth(i).get_attribute("data-value") for i in range(chips.count())]
        chips.nth(values.index(value)).click()
        self.drawn(before + 1)
