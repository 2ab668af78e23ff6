"""The API reference: which modules have a page, and in which order."""

from __future__ import annotations

from importlib.util import find_spec
from pkgutil import iter_modules
from typing import NamedTuple

from bench.registry import methods

BLOCK = """\
## `{module}`

::: {module}
    options:
      show_root_heading: false
      show_root_toc_entry: false
"""


class Section(NamedTuple):
    """A page of the reference."""

    title: str
    text: str
    modules: tuple[str, ...]


def _in(package: str, first: tuple[str, ...] = (), leave_out: tuple[str, ...] = ()) -> tuple[str, ...]:
    """Name the modules of a package, some first; nothing where there is no such package."""
    found = find_spec(package)
    names = [module.name for module in iter_modules(found.submodule_search_locations or [])] if found else []
    ordered = [name for name in first if name in names] + [name for name in names if name not in first]
    return tuple(f"{package}.{name}" for name in ordered if name not in leave_out)


def _methods() -> tuple[str, ...]:
    """Name the module of the base class, and that of every built-in method."""
    own = [cls.__module__ for cls in methods().values() if cls.__module__.startswith("bench.")]
    return ("bench.methods.base", *own)


def sections() -> dict[str, Section]:
    """Return page -> what is on it."""
    found = {
        "plugins": Section(
            "Plugins",
            "Make, fit, attach, switch, save and load plugins.",
            _in("bench.plugins", ("plugin", "bank", "fit", "layers")),
        ),
        "methods": Section("Methods", "What a method is, and every method of the suite.", _methods()),
        "backbones": Section(
            "Backbones",
            "Checkpoints: their shape, their weights, and where their encoder layers sit.",
            tuple(f"bench.backbones.{name}" for name in ("catalogue", "spec", "load", "model", "sites")),
        ),
        "tasks": Section(
            "Tasks",
            "Data, prompts, encoding, metrics and evaluation.",
            tuple(
                f"bench.tasks.{name}"
                for name in ("catalogue", "spec", "own", "data", "encoding", "features", "evaluation", "metrics")
            ),
        ),
        "training": Section(
            "Training",
            "The one training loop, its losses, and distillation.",
            tuple(f"bench.training.{name}" for name in ("loop", "losses", "mix", "stage", "distill")),
        ),
        "measure": Section(
            "Measuring",
            "FLOPs by arithmetic and counted, time, memory and size.",
            ("bench.costing", *_in("bench.measure", ("closed_form", "flops"))),
        ),
        "serving": Section("Serving", "Policies that choose k as the load changes.", _in("bench.serving")),
        "runs": Section(
            "Runs and results",
            "What a run is, what it leaves, and what a method is given.",
            tuple(
                f"bench.{name}"
                for name in ("config", "results", "runner", "context", "artifacts", "registry", "errors")
            ),
        ),
        "analysis": Section(
            "Analysis",
            "From results to tables and figures. Imports no torch.",
            tuple(
                f"analysis.{name}"
                for name in ("report", "frames", "cells", "comparisons", "statistics", "figures", "tables")
            ),
        ),
        "testing": Section(
            "Testing",
            "What a method promises, as tests that run on yours.",
            ("bench.testing.conformance", "bench.testing.case"),
        ),
    }
    return {page: section for page, section in found.items() if section.modules}


def pages() -> dict[str, str]:
    """Return source path -> Markdown, for mkdocstrings to fill from the docstrings."""
    found = sections()
    rows = [f"| [{section.title}]({page}.md) | {section.text} |" for page, section in found.items()]
    made = {
        "reference/api/index.md": "\n".join(
            [
                "# API\n",
                "What you would import. Vectors are (batch, n, d): examples, tokens, width. Everything else is "
                "internal, and may change without notice.\n",
                "| | |",
                "| --- | --- |",
                *rows,
                "",
            ]
        )
    }
    for page, section in found.items():
        blocks = [BLOCK.format(module=module) for module in section.modules]
        made[f"reference/api/{page}.md"] = f"# {section.title}\n\n{section.text}\n\n" + "\n".join(blocks)
    return made
