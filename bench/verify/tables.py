"""Make the committed tables and figures of a study again, beside it, and compare them file by file."""

from __future__ import annotations

import itertools
import math
import re
import zlib
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from analysis.report import regenerate
from bench.provenance import git
from bench.results import ResultStore
from bench.serving.records import SERVING_FILE, SERVING_FOLDERS
from bench.storage import STORAGE_FILE

KINDS = ("tables", "figures")
SOURCES = ("runs", "predictions", STORAGE_FILE, SERVING_FILE, *SERVING_FOLDERS)
"""What a study's tables and figures are made of."""
SVG_TOLERANCE = 0.05
"""Points by which what a figure draws may be moved, where another version of matplotlib drew it."""
PIXEL_TOLERANCE = 0.005
"""Share of a picture's pixels that may differ, where another version of matplotlib drew it."""

Outcome = Literal["identical", "within tolerance", "different", "missing", "left over"]


@dataclass(frozen=True)
class Compared:
    """One committed file against the one that was made.

    Attributes
    ----------
    name
        Such as ``tables/summary.csv``.
    outcome
        ``missing`` if it was made but is not committed, ``left over`` if it is committed but nothing makes it.
    text
        What differs.
    """

    name: str
    outcome: Outcome
    text: str = ""


@dataclass(frozen=True)
class Compilation:
    """What became of a study's tables and figures.

    Attributes
    ----------
    files
        Every file that is committed or made.
    causes
        What may explain those that differ.
    problems
        What the analysis warned of.
    """

    files: list[Compared]
    causes: list[str] = field(default_factory=list)
    problems: list[str] = field(default_factory=list)

    @property
    def good(self) -> bool:
        """Whether every file came out again."""
        return all(file.outcome in ("identical", "within tolerance") for file in self.files)


def compile_again(store: ResultStore, scratch: Path) -> Compilation:
    """Make tables and figures of a study from what else it holds, and compare them with those it has.

    Parameters
    ----------
    store
        The study, of which nothing is written.
    scratch
        An empty folder.

    Raises
    ------
    BenchError
        If the study has no run that can be read.
    """
    copy = scratch / store.study
    copy.mkdir(parents=True)
    for name in SOURCES:
        if (store.folder / name).exists():
            (copy / name).symlink_to((store.folder / name).resolve())
    report = regenerate(scratch, store.study)
    committed, made = _files(store.folder), _files(copy)
    drawn_by = _drawn_by(committed), _drawn_by(made)
    files = [
        _compare(name, committed.get(name), made.get(name), drawn_by[0] != drawn_by[1])
        for name in sorted({*committed, *made}, key=lambda name: (name.startswith("figures"), name))
    ]
    causes = []
    if any(file.outcome != "identical" for file in files):
        if drawn_by[0] != drawn_by[1]:
            causes.append(f"version: the figures were drawn by {drawn_by[0]}, here by {drawn_by[1]}")
        bad = [file.name for file in files if file.outcome not in ("identical", "within tolerance")]
        causes += _history(store.folder, [name for name in bad if name in committed])
    return Compilation(files, causes, report.problems)


def _files(folder: Path) -> dict[str, Path]:
    # what an editor or a file browser leaves there is nobody's table
    paths = (path for kind in KINDS for path in sorted((folder / kind).glob("[!.]*")) if path.is_file())
    return {path.relative_to(folder).as_posix(): path for path in paths}


def _drawn_by(files: dict[str, Path]) -> str | None:
    """Name the version of matplotlib, which an SVG says."""
    for name, path in files.items():
        if name.endswith(".svg") and (found := re.search(r"Matplotlib v([\w.]+)", path.read_text("utf-8"))):
            return f"matplotlib {found[1]}"
    return None


def _compare(name: str, committed: Path | None, made: Path | None, other_version: bool) -> Compared:
    if committed is None:
        return Compared(name, "missing", "the results make it, and it is not there")
    if made is None:
        return Compared(name, "left over", "it is there, and the results do not make it")
    before, now = committed.read_bytes(), made.read_bytes()
    if before == now:
        return Compared(name, "identical")
    compare = {".svg": _svg, ".png": _png, ".pdf": _pdf}.get(committed.suffix)
    if compare is None:
        return Compared(name, "different", _first_difference(before, now, is_csv=committed.suffix == ".csv"))
    distance, text = compare(before, now)
    within = distance == 0 or (distance <= 1 and other_version)
    return Compared(name, "within tolerance" if within else "different", text)


def _first_difference(before: bytes, now: bytes, is_csv: bool) -> str:
    """Say where two texts part: line, and column of a CSV file."""
    lines = [content.decode("utf-8", "replace").splitlines() for content in (before, now)]
    pairs = itertools.zip_longest(*lines)
    number, (old, new) = next(((n, pair) for n, pair in enumerate(pairs, 1) if pair[0] != pair[1]), (0, ("", "")))
    if not number:
        return "the ends of its lines differ"
    if old is None or new is None:
        return f"it has {len(lines[0])} lines, made again {len(lines[1])}"
    if is_csv:
        import csv

        heads, cells, others = (next(csv.reader([line])) for line in (lines[0][0], old, new))
        if lines[0][0] == lines[1][0] and len(cells) == len(others) == len(heads):
            column = next(i for i, (a, b) in enumerate(zip(cells, others, strict=True)) if a != b)
            return f"line {number}, {heads[column]}: {cells[column]!r} committed, {others[column]!r} made again"
    start = next((i for i, (a, b) in enumerate(zip(old, new, strict=False)) if a != b), min(len(old), len(new)))
    parts = (repr(line[max(0, start - 20) : start + 20]) for line in (old, new))
    return f"line {number}: {next(parts)} committed, {next(parts)} made again"


_NUMBER = re.compile(r"-?\d+\.?\d*(?:e-?\d+)?")
_NAME = re.compile(r"\b[a-z]{1,2}[0-9a-f]{10}\b")
"""An element that matplotlib names by a hash of what it draws, to digits that it does not write and layout may turn."""


# each returns how far apart two files are, 1 being the tolerance and 0 the same drawing, and what differs


def _svg(before: bytes, now: bytes) -> tuple[float, str]:
    """Compare what two SVG files draw: their words exactly, their numbers to a tolerance."""
    texts = [
        _NAME.sub("", re.sub(r"<metadata>.*?</metadata>", "", content.decode("utf-8", "replace"), flags=re.DOTALL))
        for content in (before, now)
    ]
    words = [re.findall(r"<text[^>]*>([^<]*)<", text) for text in texts]
    if words[0] != words[1]:
        pairs = itertools.zip_longest(*words)
        old, new = next(pair for pair in pairs if pair[0] != pair[1])
        return math.inf, f"it says {old!r}, made again {new!r}"
    forms = [_NUMBER.sub("#", text) for text in texts]
    if forms[0] != forms[1]:
        return math.inf, "it draws other elements"
    numbers = [[float(number) for number in _NUMBER.findall(text)] for text in texts]
    largest = max((abs(a - b) for a, b in zip(*numbers, strict=True)), default=0.0)
    return largest / SVG_TOLERANCE, f"the same elements, up to {largest:.3g} apart"


def _png(before: bytes, now: bytes) -> tuple[float, str]:
    """Compare the pixels of two pictures."""
    import io

    import numpy as np
    from matplotlib.image import imread

    try:
        old, new = (np.asarray(imread(io.BytesIO(content), format="png")) for content in (before, now))
    except Exception as error:  # Pillow has several for what is torn
        return math.inf, f"it is no picture: {error}"
    if old.shape != new.shape:
        return math.inf, f"it has {old.shape[1]} × {old.shape[0]} pixels, made again {new.shape[1]} × {new.shape[0]}"
    share = float((old != new).any(axis=-1).mean())
    return share / PIXEL_TOLERANCE, f"{share:.2%} of its pixels differ"


def _pdf(before: bytes, now: bytes) -> tuple[float, str]:
    """Compare the drawing of two PDF files, which zlib and the names of versions may wrap otherwise."""
    streams = [list(_streams(content)) for content in (before, now)]
    if streams[0] == streams[1] and streams[0]:
        return 0.0, "the same drawing, wrapped otherwise"
    return math.inf, "it draws something else"


def _streams(content: bytes) -> Iterator[bytes]:
    for match in re.finditer(rb"stream\r?\n(.*?)\r?\nendstream", content, re.DOTALL):
        try:
            yield zlib.decompress(match[1])
        except zlib.error:
            yield match[1]


def _history(folder: Path, names: list[str]) -> list[str]:
    """Say by git what happened to files that differ, and to what they are made of, since they were committed."""
    top = git(folder, "rev-parse", "--show-toplevel")
    causes = []
    edited = (git(folder, "status", "--porcelain", "--", *names) or "").splitlines() if names else []
    if edited:
        causes.append(f"record: not as committed: {', '.join(sorted(Path(line[3:]).name for line in edited))}")
    commits = {commit for name in names if (commit := git(folder, "log", "-1", "--format=%H", "--", name))}
    for commit in sorted(commits):
        code = tuple(
            f"{top}/{place}" for place in ("analysis", "bench/results.py", "bench/storage.py", "bench/serving")
        )
        sources = (("data", SOURCES, "results of this study"), ("code", code, "files of the analysis"))
        for kind, paths, what in sources:
            changed = (git(folder, "diff", "--name-only", commit, "--", *paths) or "").splitlines()
            changed += (git(folder, "ls-files", "--others", "--exclude-standard", "--", *paths) or "").splitlines()
            if changed:
                causes.append(f"{kind}: since commit {commit[:8]}, {len(changed)} {what} changed, such as {changed[0]}")
    return list(dict.fromkeys(causes)) or [
        "record: git knows no change to results or analysis since they were committed: edited by hand, or made with "
        "other versions of pandas, scipy or matplotlib"
    ]
