"""What goes to the Hub and comes back: a plugin with the run that made it, or a study.

Nothing but JSON, Parquet and safetensors is read, and never a pickle.
"""

from __future__ import annotations

import json
import shutil
import tempfile
from dataclasses import dataclass
from pathlib import Path

from bench.errors import BenchError, PluginError
from bench.hub.card import LICENSE, plugin_card, study_card
from bench.hub.client import Pushed, download, upload
from bench.incoming import Pulled, take
from bench.results import ResultStore, RunResult, parse, write_atomic
from bench.storage import STORAGE_FILE, read_storage

PLUGIN_FILES = ("plugin_config.json", "plugin.safetensors")
RESULT_FILE, PREDICTIONS_FILE, CARD_FILE = "result.json", "predictions.parquet", "README.md"
_OF_STUDY = ("runs/*.json", "predictions/*.parquet", STORAGE_FILE)


def push_plugin(
    folder: Path,
    repo: str,
    *,
    result: RunResult | None = None,
    predictions: Path | None = None,
    private: bool = True,
    license: str = LICENSE,
    token: str | None = None,
) -> Pushed:
    """Send a plugin, its page, and the record of the run that made it.

    Parameters
    ----------
    folder
        What ``Plugin.save_pretrained`` wrote; nothing else in it is sent.
    repo
        ``USER/NAME``.
    result, predictions
        The run that made it, and its predictions.
    private, license, token
        As for ``Plugin.push_to_hub``.

    Raises
    ------
    PluginError
        If the folder is no plugin, or the run is not one that made it.
    HubError
        See `bench.hub.client.upload`.
    """
    for name in PLUGIN_FILES:
        if not (folder / name).is_file():
            raise PluginError(f"{folder} holds no plugin: {name} is missing")
    try:
        config = json.loads((folder / PLUGIN_FILES[0]).read_text("utf-8"))
        k = config["k"]
    except (ValueError, KeyError, TypeError) as error:
        raise PluginError(f"{folder / PLUGIN_FILES[0]} is no plugin's config: {error}") from None
    if result and (result.config.get("method") != "variator" or result.config.get("ratio") != k):
        made = f"{result.config.get('method')} at ratio {result.config.get('ratio')}"
        raise PluginError(f"run {result.run_id} is {made}, which did not make this plugin at k = {k}")
    with tempfile.TemporaryDirectory() as scratch:
        parcel = Path(scratch)
        for name in PLUGIN_FILES:
            shutil.copy(folder / name, parcel)
        (parcel / CARD_FILE).write_text(plugin_card(config, repo, result, license), "utf-8")
        if result:
            (parcel / RESULT_FILE).write_text(result.model_dump_json(indent=1) + "\n", "utf-8")
            if predictions and predictions.is_file():
                shutil.copy(predictions, parcel / PREDICTIONS_FILE)
        # the record of another plugin, which this one replaces, must not stay beside it
        stale = (RESULT_FILE, PREDICTIONS_FILE)
        message = f"Plugin at k = {k}"
        return upload(parcel, repo, "model", private=private, message=message, stale=stale, token=token)


def pull_plugin(repo: str, revision: str | None = None, token: str | None = None, record: bool = False) -> Path:
    """Fetch a plugin, and with ``record`` the run that made it; return the folder, which is the Hub's cache.

    Raises
    ------
    PluginError
        If the repository holds no plugin.
    HubError
        See `bench.hub.client.download`.
    """
    files = (*PLUGIN_FILES, *((RESULT_FILE, PREDICTIONS_FILE) if record else ()))
    folder = download(repo, "model", files, revision=revision, token=token)
    for name in PLUGIN_FILES:
        if not (folder / name).is_file():
            at = f" at revision {revision}" if revision else ""
            raise PluginError(f"{repo}{at} holds no plugin: {name} is missing")
    return folder


def keep_plugin(folder: Path, out: Path, root: Path, study: str | None = None) -> Pulled:
    """Copy a plugin that was fetched to ``out``, which must not exist, and its run into the results.

    Raises
    ------
    BenchError
        If ``out`` exists, or the record is not that of a run.
    """
    if out.exists():
        raise BenchError(f"{out} is there already; name another folder with --out")
    pulled = Pulled()
    if (folder / RESULT_FILE).is_file():
        path = folder / RESULT_FILE
        take(path, folder / PREDICTIONS_FILE, parse(path.read_bytes(), path).run_id, root, study, pulled)
    for name in PLUGIN_FILES:
        write_atomic(out / name, (folder / name).read_bytes())
    return pulled


def push_study(store: ResultStore, repo: str, *, private: bool = True, license: str = LICENSE) -> Pushed:
    """Send the runs of a study with their predictions, its tables and figures, and a page.

    Raises
    ------
    BenchError
        If the study has no run, or one is not valid.
    HubError
        See `bench.hub.client.upload`.
    """
    results = list(store)
    if not results:
        raise BenchError(f"study '{store.study}' has no run in {store.folder / 'runs'}")
    read_storage(store.folder)
    with tempfile.TemporaryDirectory() as scratch:
        parcel = Path(scratch)
        kinds = (*_OF_STUDY, "tables/*.*", "figures/*.*")
        for path in (path for kind in kinds for path in sorted(store.folder.glob(kind))):
            place = parcel / path.relative_to(store.folder)
            place.parent.mkdir(exist_ok=True)
            shutil.copy(path, place)
        summary, readme = (
            path.read_text("utf-8") if path.is_file() else ""
            for path in (store.folder / "tables" / "summary.md", store.folder / "README.md")
        )
        card = study_card(store.study, results, summary, readme, license)
        (parcel / CARD_FILE).write_text(card.replace("bench hub pull REPO", f"bench hub pull {repo}"), "utf-8")
        message = f"{len(results)} runs of study {store.study}"
        return upload(parcel, repo, "dataset", private=private, message=message)


@dataclass(frozen=True)
class Study:
    """A study that was fetched.

    Attributes
    ----------
    pulled
        What became of its runs.
    names
        The studies in ``results/`` that they belong to.
    """

    pulled: Pulled
    names: list[str]


def pull_study(repo: str, root: Path, study: str | None = None, revision: str | None = None) -> Study:
    """Fetch the runs of a study into the results; what is there stays as it is.

    Raises
    ------
    HubError
        If the repository has no run, or see `bench.hub.client.download`.
    """
    folder = download(repo, "dataset", _OF_STUDY, revision=revision)
    files = sorted((folder / "runs").glob("*.json"))
    if not files:
        raise BenchError(f"{repo} holds no study: it has no runs/*.json")
    pulled = Pulled()
    for path in files:
        try:
            take(path, folder / "predictions" / f"{path.stem}.parquet", path.stem, root, study, pulled)
        except (BenchError, OSError) as error:
            pulled.problems.append(f"{path.name}: {str(error).splitlines()[0]}")
    names = sorted({study or result.study for result in (*pulled.fetched, *pulled.same, *pulled.kept)})
    if (folder / STORAGE_FILE).is_file() and len(names) == 1:
        try:
            read_storage(folder)
            if not (root / names[0] / STORAGE_FILE).exists():
                write_atomic(root / names[0] / STORAGE_FILE, (folder / STORAGE_FILE).read_bytes())
        except BenchError as error:
            pulled.problems.append(f"{STORAGE_FILE}: {str(error).splitlines()[0]}")
    return Study(pulled, names)
