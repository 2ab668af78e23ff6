"""What ``bench hub`` does and prints."""

from __future__ import annotations

import re
from pathlib import Path

from bench.artifacts import ArtifactCache
from bench.cell import Surroundings
from bench.errors import BenchError, suggest
from bench.hub.client import HubError, NoSuchRepo
from bench.hub.share import PLUGIN_FILES, keep_plugin, pull_plugin, pull_study, push_plugin, push_study
from bench.incoming import Pulled
from bench.launch.display import console, say
from bench.launch.remote import print_pulled
from bench.results import ResultStore, RunResult, studies


def push_and_print(what: str, repo: str, results: Path, where: Surroundings, *, private: bool, license: str) -> None:
    """Send a study, the plugin of a run, or a plugin's folder, and say where it is.

    Raises
    ------
    BenchError
        If ``what`` is none of them, the plugin of the run is not in the cache, or the Hub does not take it.
    """
    folder, out = Path(what), console()
    if (folder / PLUGIN_FILES[0]).is_file():
        _check(folder)
        pushed = push_plugin(folder, repo, private=private, license=license)
    elif re.fullmatch(r"[0-9a-f]{16}", what) and (found := _find_run(what, results)):
        store, result = found
        plugin = _plugin_of(result, where)
        _check(plugin)
        predictions = store.predictions_path(what)
        pushed = push_plugin(plugin, repo, result=result, predictions=predictions, private=private, license=license)
    else:
        known = studies(results)
        if what not in known:
            raise BenchError(
                f"'{what}' is no study or run in {results}, and no folder of a plugin.{suggest(what, known)} "
                f"Studies: {', '.join(known) or 'none'}."
            )
        pushed = push_study(ResultStore(results, what), repo, private=private, license=license)
    say(out, f"{pushed.url}  ({'private' if pushed.private else 'public'}, commit {pushed.commit})")


def _check(folder: Path) -> None:
    """Raise ``PluginError`` unless the folder holds a plugin that is whole."""
    from bench.plugins.plugin import Plugin

    Plugin.from_pretrained(folder)


def _find_run(run_id: str, results: Path) -> tuple[ResultStore, RunResult] | None:
    for path in sorted(results.glob(f"*/runs/{run_id}.json")):
        store = ResultStore(results, path.parent.parent.name)
        if (result := store.read(run_id)) is not None:
            return store, result
    return None


def _plugin_of(result: RunResult, where: Surroundings) -> Path:
    """Return the folder of the plugin that a run made."""
    label = f"run {result.run_id} ({result.config.get('method')} on {result.task.get('name')})"
    if result.config.get("method") != "variator":
        raise BenchError(f"{label} made no plugin; push its study, or a run of variator")
    if result.status != "done":
        raise BenchError(f"{label} is {result.status} and has no plugin to show")
    cache = ArtifactCache(where.artifacts)
    artifact = cache.find("plugin", result.identity)
    if artifact is None:
        raise BenchError(
            f"the plugin of {label} is not in {cache.root}. Name the cache that has it with --cache-dir, or make it "
            f"again: {' '.join(result.provenance.command)} --mode force"
        )
    return artifact.folder


def pull_and_print(repo: str, results: Path, study: str | None, revision: str | None, out: Path | None) -> int:
    """Bring a study or a plugin back, say what became of it, and return the exit code: 1 where something is unreadable.

    Raises
    ------
    BenchError
        If the Hub has neither, or cannot be asked.
    """
    try:
        fetched = pull_study(repo, results, study, revision)
    except NoSuchRepo as no_study:
        try:
            folder = pull_plugin(repo, revision, record=True)
        except NoSuchRepo:
            raise HubError(f"{no_study}, be it a plugin or a study") from None
        _check(folder)
        place = out or Path("plugins") / repo.split("/")[1]
        pulled = keep_plugin(folder, place, results, study)
        code = print_pulled(pulled, results, study) if pulled != Pulled() else 0
        say(console(), f"plugin: {place}")
        return code
    code = print_pulled(fetched.pulled, results, study)
    for name in fetched.names:
        say(console(), f"bench report {name}")
    return code
