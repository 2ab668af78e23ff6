"""Imports point one way, and what only plans or prints starts without the heavy libraries."""

from __future__ import annotations

import ast
import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]

# Group -> the groups that it may import, at the top of a module or inside a function; itself always. Listed bottom up,
# so an arrow points to an earlier line. A module belongs to the longest name that begins its own (without "bench.").
_CONTRACTS = "errors progress locks results backbones.spec tasks.spec methods.base registry config"
_PARTS = "backbones tasks measure"
ARROWS = {
    "version": "",  # bench/__init__.py
    "errors": "",
    "entry_points": "",
    "progress": "",
    "determinism": "",
    "locks": "errors",
    "results": "errors locks",
    "processor": "",
    "provenance": "version results processor",
    "storage": "errors results",
    "backbones.spec": "errors",
    "tasks.spec": "errors",
    "methods.base": "errors backbones.spec tasks.spec",
    "registry": "errors entry_points methods.base",
    "config": "errors results methods.base registry",
    "artifacts": "errors locks config",
    "tasks": "errors entry_points results tasks.spec",
    "backbones": "errors entry_points backbones.spec tasks tasks.spec",
    "measure": "errors results backbones.spec",
    "cell": f"{_CONTRACTS} {_PARTS}",
    "incoming": "errors results config",
    "hub": "version errors results storage incoming backbones tasks",
    "plugins": "version errors hub backbones backbones.spec measure",
    "context": f"{_CONTRACTS} {_PARTS} artifacts",
    "training": f"{_CONTRACTS} {_PARTS} plugins context processor",
    "costing": f"{_CONTRACTS} {_PARTS} plugins context training",
    "methods": f"{_CONTRACTS} {_PARTS} plugins context training",
    "team": "errors artifacts training",
    "execution": f"{_CONTRACTS} {_PARTS} cell artifacts context training costing team determinism",
    "runner": f"{_CONTRACTS} cell provenance execution",
    "tracking": f"{_CONTRACTS} cell artifacts incoming runner",
    "serving.records": "errors results",
    "serving.times": "serving.records",
    "serving": (
        f"{_CONTRACTS} {_PARTS} plugins cell artifacts context training execution determinism provenance storage "
        "entry_points serving.records serving.times"
    ),
    "serving.agreement": "errors serving.records serving.times serving",
    "describe": f"{_CONTRACTS} {_PARTS}",
    "testing": f"{_CONTRACTS} {_PARTS} artifacts context training costing cell runner describe",
    "analysis": "errors results storage serving.records serving.times serving.agreement",
    "verify": f"{_CONTRACTS} {_PARTS} cell provenance storage runner analysis serving.records",
    "launch": (
        f"{_CONTRACTS} {_PARTS} plugins cell artifacts runner tracking describe analysis storage incoming serving hub "
        "verify serving.records"
    ),
    "cli": "version errors results config cell tracking describe launch",
    "__main__": "team execution cli",
}
HEAVY = {"torch", "transformers", "datasets", "pandas", "wandb"}


def _modules() -> dict[str, Path]:
    files = [p for package in ("bench", "analysis") for p in (ROOT / package).rglob("*.py")]
    return {".".join(p.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__"): p for p in files}


def _group(module: str) -> str:
    parts = module.split(".")
    if parts[0] == "bench":
        parts = parts[1:] or ["version"]
    names = (".".join(parts[:n]) for n in range(len(parts), 0, -1))
    return next((name for name in names if name in ARROWS), f"{module} (in no group)")


def _imports(source: str) -> Iterator[tuple[int, str]]:
    """Yield line and module of each import that runs, at whatever depth; those for type checkers do not run."""
    known = _modules()
    nodes: list[ast.AST] = [ast.parse(source)]
    while nodes:
        node = nodes.pop()
        if isinstance(node, ast.If) and ast.unparse(node.test).endswith("TYPE_CHECKING"):
            nodes += node.orelse
            continue
        nodes += ast.iter_child_nodes(node)
        if isinstance(node, ast.Import):
            yield from ((node.lineno, alias.name) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            for alias in node.names:
                inner = f"{node.module}.{alias.name}"
                yield node.lineno, inner if inner in known else str(node.module)


def _violations(files: dict[str, Path]) -> list[str]:
    found = []
    for module, path in sorted(files.items()):
        group = _group(module)
        allowed = {group, *ARROWS.get(group, "").split()}
        for line, target in _imports(path.read_text()):
            if target.split(".")[0] in ("bench", "analysis") and _group(target) not in allowed:
                found.append(f"{path.name}:{line}: {module} imports {target}")
    return found


def _loaded_by(statement: str) -> set[str]:
    """Return the heavy libraries that a fresh interpreter holds after ``statement``."""
    code = f"import json, sys\n{statement}\nprint(json.dumps(sorted(set(sys.modules) & set({sorted(HEAVY)}))))"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return set(json.loads(done.stdout.splitlines()[-1]))


def test_imports_point_one_way() -> None:
    assert _violations(_modules()) == []


def test_arrows_point_to_earlier_groups() -> None:
    order = list(ARROWS)
    assert [(g, n) for g in order for n in ARROWS[g].split() if order.index(n) >= order.index(g)] == []


@pytest.mark.parametrize(
    ("module", "source", "wrong"),
    [
        ("bench.tasks.fake", "from bench.training.loop import train", True),
        ("bench.tasks.fake", "def f():\n    from bench import runner", True),
        ("bench.tasks.fake", "from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    import bench.runner", False),
        ("bench.training.fake", "from bench.tasks import spec", False),
        ("bench.newcomer", "from bench.errors import BenchError", True),
        ("analysis.fake", "import bench.tasks.data", True),
    ],
)
def test_a_wrong_import_is_found(tmp_path: Path, module: str, source: str, wrong: bool) -> None:
    file = tmp_path / "fake.py"
    file.write_text(source)
    assert bool(_violations({module: file})) is wrong


def test_analysis_never_imports_torch() -> None:
    files = {name: path for name, path in _modules().items() if name.startswith("analysis")}
    direct = {name: {target.split(".")[0] for _, target in _imports(path.read_text())} for name, path in files.items()}
    assert "pandas" in direct["analysis.frames"]
    assert [name for name, roots in direct.items() if roots & (HEAVY - {"pandas"})] == []
    assert _loaded_by(f"import {', '.join(files)}") == {"pandas"}


@pytest.mark.parametrize("module", ["bench.cli", "bench.config", "bench.registry", "bench.launch.plan"])
def test_planning_loads_nothing_heavy(module: str) -> None:
    assert _loaded_by(f"import {module}") == set()


@pytest.mark.parametrize(
    "words", ["--help", "run --help", "list tasks", "list keys", "list policies", "plan quickstart"]
)
def test_commands_that_only_show_load_nothing_heavy(
    words: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("BENCH_CACHE", str(tmp_path))
    call = f"from bench.cli import main\ntry: main({words.split()})\nexcept SystemExit as stop: assert not stop.code"
    assert _loaded_by(call) == set()


def test_help_loads_few_modules() -> None:
    """A budget that holds on any machine, where seconds would not: numpy alone would break it."""
    code = "import sys; from bench.cli import main; main(['--help'], standalone_mode=False); print(len(sys.modules))"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert int(done.stdout.splitlines()[-1]) < 330
