"""What the documents tell a reader exists: commands, files, links; and nothing names the machine it was written on."""

from __future__ import annotations

import re
import subprocess
from pathlib import Path

import pytest

from tests.readme_commands import ROOT, commands, problem

DOCUMENTS = [ROOT / "README.md", *sorted(ROOT.glob("docs/**/*.md")), *sorted(ROOT.glob("results/**/README.md"))]


def _names(documents: list[Path]) -> list[str]:
    return [p.relative_to(ROOT).as_posix() for p in documents]


@pytest.mark.parametrize("document", DOCUMENTS, ids=_names(DOCUMENTS))
def test_every_command_exists(document: Path) -> None:
    found = list(commands(document.read_text()))
    assert {command: why for command in found if (why := problem(command))} == {}


def test_the_readme_shows_how_to_start() -> None:
    assert {"make quickstart", "make test"} <= set(commands((ROOT / "README.md").read_text()))


@pytest.mark.parametrize(
    "command",
    [
        "make quickstrat",
        "make test PYTHNO=python3.12",
        "bench swep sweeps/glue.yaml",
        "bench",
        "bench sweep",
        "bench sweep sweeps/gleu.yaml",
        "bench run --taks sst2",
        "bench run --ratio",
        "bench run --mode sometimes",
        "bench list task",
        "bench report quickstart surplus",
        ".venv/bin/bench plan --sed 3",
        "python -m analysis --resluts results",
        "python -m analisis",
        "python scripts/none.py",
        "pip install -e '.[quikstart]'",
        "pip install -c constraint.txt -e .",
        "wandb swep sweeps/glue.yaml",
        "benhc run",
    ],
)
def test_a_command_that_does_not_exist_is_found(command: str) -> None:
    assert [problem(c) for c in commands(f"Do:\n\n```sh\n{command}\n```\n")] != [None]


@pytest.mark.parametrize(
    ("block", "expected"),
    [
        ("make test PYTHON=python3.12   # tests", ["make test PYTHON=python3.12"]),
        ("bench run --task sst2 \\\n    --ratio 4", ["bench run --task sst2 --ratio 4"]),
        ("cd there && make test; bench list tasks | head", ["cd there", "make test", "bench list tasks", "head"]),
        ("$ BENCH_CACHE=x bench status\n\n# only a comment", ["BENCH_CACHE=x bench status"]),
    ],
)
def test_commands_are_read_as_a_shell_reads_them(block: str, expected: list[str]) -> None:
    assert list(commands(f"```sh\n{block}\n```\n```python\nmake nothing\n```")) == expected


def test_inline_commands_are_read_too() -> None:
    assert list(commands("Call `bench list\ntasks`, not `benchmark` or `make`.")) == ["bench list tasks"]


def _anchors(document: Path) -> set[str]:
    headings = re.findall(r"^#+ (.+)$", document.read_text(), re.M)
    plain = [re.sub(r"[^\w\- ]", "", heading.strip().lower()).replace(" ", "-") for heading in headings]
    return set(plain)


def _dead_links(document: Path) -> list[str]:
    text = re.sub(r"^[ ]*```.*?^[ ]*```", "", document.read_text(), flags=re.M | re.S)
    targets = re.findall(r"\]\(<?([^)\s>]+)", text) + re.findall(r"(?:src|href)=\"([^\"]+)\"", text)
    targets += re.findall(r"^\[[^\]]+\]:\s+(\S+)", text, re.M)
    dead = []
    for target in targets:
        if re.match(r"(https?:|mailto:)", target):
            continue
        path, _, anchor = target.partition("#")
        file = (document.parent / path).resolve() if path else document
        if not file.exists() or (anchor and file.suffix == ".md" and anchor not in _anchors(file)):
            dead.append(target)
    return dead


@pytest.mark.parametrize("document", DOCUMENTS, ids=_names(DOCUMENTS))
def test_every_local_link_leads_somewhere(document: Path) -> None:
    assert _dead_links(document) == []


def test_a_dead_link_is_found(tmp_path: Path) -> None:
    page = tmp_path / "page.md"
    page.write_text("# A b, c\n[x](#a-b-c) [y](page.md#none) [z](none.md) ![i](i.png) [w](https://example.org/none)\n")
    assert _dead_links(page) == ["page.md#none", "none.md", "i.png"]


# Written so that none of them matches itself.
MACHINE = re.compile(
    r"(?<![\w.-])/(work|opt|root|home|Users|mnt|srv|scratch|tmp)/[\w.]|\b[A-Z]:\\Users|"
    r"\b(pypi|pythonhosted|download\.pytorch|npmjs)\.(org|com)"
)


def _tracked() -> list[Path]:
    """Return the files of the repository: those git knows or would add, or all where this is no checkout."""
    command = ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"]
    listing = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    if listing.returncode == 0:
        return [ROOT / name for name in listing.stdout.split("\0") if name and (ROOT / name).is_file()]
    hidden = re.compile(r"^\.(?!ci/|gitignore)|/__pycache__/|^(build|dist|wandb)/")
    return [p for p in ROOT.rglob("*") if p.is_file() and not hidden.search(p.relative_to(ROOT).as_posix())]


def test_no_file_names_this_machine_or_a_registry() -> None:
    found = []
    for path in _tracked():
        content = path.read_bytes()
        text = "" if b"\0" in content else content.decode(errors="replace")
        found += [f"{path.relative_to(ROOT)}: {match[0]}" for match in MACHINE.finditer(text)]
    assert found == []


@pytest.mark.parametrize("bad", ["/" + "work/main/x", "/" + "root/.cache", "https://py" + "pi.org/simple"])
def test_a_machine_path_is_found(bad: str) -> None:
    assert MACHINE.search(f"see {bad}.")
