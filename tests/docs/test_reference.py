"""The reference pages say all that there is, and say it as the code does."""

from __future__ import annotations

import ast
import re
from pathlib import Path
from typing import Any

import click
import pytest

import bench.cli
from bench.cli.keys import KeyOption
from bench.config import RunConfig, run_id
from bench.describe import keys
from bench.registry import methods
from tests.documents import ROOT, hook
from tests.readme_commands import commands, problem

reference, links, studies, api = (hook(name) for name in ("reference", "links", "studies", "api"))


def _rows(page: str, heading: str) -> dict[str, list[str]]:
    """Return the first cell of each row of the table below a heading, without its backticks -> the other cells."""
    part = page.partition(f"## {heading}\n")[2].partition("\n## ")[0]
    lines = [re.split(r"(?<!\\) \| ", line[2:-2]) for line in part.splitlines() if line.startswith("| ")]
    return {cells[0].strip("`"): cells[1:] for cells in lines[2:]}


def test_every_key_has_a_row_with_its_default_and_meaning() -> None:
    page = reference.config_page()
    own = _rows(page, "Keys of a run")
    assert list(own) == [name for name in RunConfig.model_fields if name != "options"]
    assert own["steps"] == ["int ≥ 0", "`1200`", "Optimiser steps on the task of every method that trains.",
                            "every method but `dense`, `pruning`, `quantization`; `token_merging` and "
                            "`ffn_token_merging` only with options that train", "where it is read"]  # fmt: skip
    shared = re.findall(r"^\| `(\w+)` ", page.partition("## Options of methods")[2].partition("## Recipes")[0], re.M)
    assert shared == [key.name for key in keys() if "run" not in key.defaults]
    assert "`0.0001`; `0.0003` in" in page
    assert "`pretrain_steps=60000`" in page and "|  |" not in page


def _another(name: str) -> Any:
    """Return a value of a field that is not its default."""
    field = RunConfig.model_fields[name]
    choices = {"teacher_decay": "cosine", "precision": "fp32", "teacher_lora": True, "max_length": 64}
    return choices.get(name, 7 if field.default is None else field.default / 2 if name.endswith("p") else 5)


@pytest.mark.parametrize("name", [name for name in RunConfig.model_fields if name not in reference.AS])
def test_a_key_is_said_to_be_in_the_identity_if_it_changes_the_run(name: str) -> None:
    changed = {}
    for method in methods():
        given = {"method": method, "ratio": 4}
        value = "pruning" if method == "dense" else "dense"
        ids = [
            run_id(RunConfig.build(values).identity("data", "model"))
            for values in (given, given | {name: value if name == "method" else _another(name)})
        ]
        changed[method] = ids[0] != ids[1]
    said = reference.identified(name)
    assert said == ("yes" if all(changed.values()) else "where it is read" if any(changed.values()) else "no")
    if name in ("ratio", "steps", "batch_size"):
        assert {f"`{m}`" for m, does in changed.items() if not does} == set(
            re.findall("`.*?`", reference.readers(name))
        )


def test_what_is_in_the_identity_in_another_way_is_said_for_each_such_field() -> None:
    plain = {key for identity in reference._identities() for key in identity}
    assert set(RunConfig.model_fields) - plain == set(reference.AS)


@pytest.mark.parametrize(
    ("annotation", "words"),
    [
        (RunConfig.model_fields["precision"].annotation, "`fp32` or `bf16`"),
        (float | None, "float or none"),
        (bool, "bool"),
        (reference._annotated(int | None, RunConfig.model_fields["max_length"]), "int ≥ 8 or none"),
        (reference._annotated(float, RunConfig.model_fields["teacher_warmup"]), "float ≥ 0 < 1"),
    ],
)
def test_types_are_said_in_words(annotation: Any, words: str) -> None:
    assert reference.kind(annotation) == words


def test_every_method_has_a_section_with_all_its_options() -> None:
    page = reference.methods_page()
    assert re.findall(r"^## (\w+)$", page, re.M) == list(methods())
    for name, cls in methods().items():
        rows = _rows(page, name) if cls.options() else {}
        assert list(rows) == list(cls.options())
        for option, default in cls.options().items():
            assert rows[option][1] == reference.value(default)
            assert rows[option][2], f"{name}.{option} has no meaning"


def _all_commands(command: click.Command, name: str) -> dict[str, click.Command]:
    if isinstance(command, click.Group):
        return {k: v for sub, part in command.commands.items() for k, v in _all_commands(part, f"{name} {sub}").items()}
    return {name: command}


def test_an_option_is_said_to_be_in_the_identity_if_it_alone_changes_it() -> None:
    page = reference.methods_page()
    variator, merging = _rows(page, "variator"), _rows(page, "token_merging")
    assert {row[3] for row in variator.values()} == {"yes"}
    assert merging["finetune"][3] == "yes" and merging["lr"][3] == "where it is read"


def test_a_cell_of_a_table_is_one_cell() -> None:
    assert reference.table(("a", "b"), [("x|y <z>", "`p|q <r>`")]).splitlines()[2] == r"| x\|y &lt;z> | `p|q <r>` |"


def test_every_command_and_option_is_on_the_page_of_commands() -> None:
    page = reference.cli_page()
    for name, command in _all_commands(bench.cli.main, "bench").items():
        section = re.split(rf"^#+ {re.escape(name)}$", page, flags=re.M)[1].partition("\n## ")[0]
        options = [p for p in command.params if isinstance(p, click.Option)]
        own = [option for option in options if not isinstance(option, KeyOption)]
        assert [o.opts[0] for o in own if f"`{o.opts[0]}" not in section] == [], name
        assert ("keys of the [configuration]" in section) == (len(own) < len(options))
        for option in own:
            assert option.help and option.help.partition("  [default")[0].replace("<", "&lt;") in section
    assert "`--mode [missing|retry-failed|force|read-only]`" in page, "a bar in code needs no escape here"
    assert "`auto`" in page and "| 240 |" in page.replace("`", "")


def test_the_commands_of_the_generated_pages_exist() -> None:
    text = "\n".join(reference.pages().values())
    found = list(commands(text))
    assert "bench plan sweeps/glue.yaml" in found
    assert {command: why for command in found if (why := problem(command))} == {}


def test_every_variable_that_the_code_reads_is_documented() -> None:
    page = (ROOT / "docs" / "environment.md").read_text()
    read = set()
    for path in [*(ROOT / "bench").rglob("*.py"), *(ROOT / "analysis").rglob("*.py")]:
        if "testing" not in path.parts:
            read |= _variables(ast.parse(path.read_text()))
    assert {"BENCH_CACHE", "BENCH_DATA_ROOT", "WANDB_DISABLED", "OMP_NUM_THREADS", "MASTER_PORT"} <= read
    assert sorted(name for name in read if f"`{name}`" not in page) == []


def _variables(tree: ast.Module) -> set[str]:
    """Return what is asked of ``os.environ``: by subscript, ``get`` and the like, ``in``, or through a constant."""
    constants = {
        target.id: node.value.value
        for node in ast.walk(tree)
        if isinstance(node, ast.Assign) and isinstance(node.value, ast.Constant)
        for target in node.targets
        if isinstance(target, ast.Name)
    }
    found = []
    for node in ast.walk(tree):
        match node:
            case ast.Subscript(value=ast.Attribute(attr="environ"), slice=name):
                found.append(name)
            case ast.Call(func=ast.Attribute(value=ast.Attribute(attr="environ")), args=[name, *_]):
                found.append(name)
            case ast.Compare(left=name, comparators=[ast.Attribute(attr="environ")]):
                found.append(name)
            case ast.AugAssign(target=ast.Attribute(attr="environ"), value=ast.Dict(keys=names)):
                found += [name for name in names if name]
    values = [n.value if isinstance(n, ast.Constant) else constants.get(getattr(n, "id", "")) for n in found]
    return {value for value in values if isinstance(value, str)}


def test_the_scan_finds_every_way_of_reading_a_variable() -> None:
    code = """
NAME = "A"
os.environ.get(NAME); os.environ["B"]; "C" in os.environ; os.environ.setdefault("D", 1); os.environ |= {"E": 1}
"""
    assert _variables(ast.parse(code)) == set("ABCDE")


@pytest.mark.parametrize(
    ("page", "link", "turned"),
    [
        ("findings.md", "../results/pilot/README.md", "studies/pilot.md"),
        ("tours/reviewer.md", "../measuring.md#scores", "../measuring.md#scores"),
        ("tours/reviewer.md", "../../results/t5/README.md#a", "../studies/t5.md#a"),
        ("index.md", "../results/pilot/figures/pareto_overview.png", "studies/pilot/pareto_overview.png"),
        ("tours/analyst.md", "../../analysis/frames.py", "../reference/api/analysis.md"),
        ("tours/researcher.md", "../../bench/config.py", "../reference/config.md"),
        ("tours/serving.md", "../notebooks/tour.ipynb", "../notebooks/tour.md"),
        ("studies/pilot.md", "../rates/README.md", "rates.md"),
        ("studies/pilot.md", "../../docs/findings.md", "../findings.md"),
        ("tasks.md", "https://example.org/docs/x.md", "https://example.org/docs/x.md"),
        ("tasks.md", "../LICENSE", "../LICENSE"),
    ],
)
def test_links_of_the_repository_lead_to_the_same_thing_in_the_site(page: str, link: str, turned: str) -> None:
    assert links.in_site(f"a [b]({link}) c", page) == f"a [b]({turned}) c"


def test_a_study_is_shown_whole(tmp_path: Path) -> None:
    files = {
        "README.md": "# s\n\ntext\n",
        "tables/summary.md": "# s\n\n## bert\n\n| a |\n",
        "figures/pareto_a.png": "p",
        "figures/drops_a.png": "d",
        "figures/storage.png": "s",
        "tables/storage.md": "# s: storage\n\n## On disk, MB\n\n| b |\n",
        "runs/x.json": "{}",
    }
    for name, text in files.items():
        path = tmp_path / "s" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    made = studies.pages(tmp_path)
    assert set(made) == {"studies/s.md", "studies/s/storage.png", "studies/s/pareto_a.png", "studies/s/drops_a.png"}
    page = made["studies/s.md"]
    assert page.startswith("# s\n\ntext\n\n## Figures\n\n![Bytes against the number of tasks](s/storage.png)")
    assert page.index("](s/storage") < page.index("![Score against") < page.index("![What is lost: a](")
    assert page.index("\n### On disk, MB\n") < page.index("\n### bert\n") and page.count("# s\n") == 1


def test_every_built_in_method_and_public_package_has_an_api_page() -> None:
    modules = {module for section in api.sections().values() for module in section.modules}
    assert {cls.__module__ for cls in methods().values()} <= modules
    assert {"bench.plugins.plugin", "bench.plugins.bank", "bench.methods.base", "bench.config", "bench.results",
            "bench.measure.flops", "bench.training.loop", "analysis.frames"} <= modules  # fmt: skip
