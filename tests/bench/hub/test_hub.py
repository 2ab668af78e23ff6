"""Plugins and studies to a stand-in of the Hub and back, by the real client in real processes."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from huggingface_hub import ModelCard

from bench.artifacts import ArtifactCache
from bench.cell import Surroundings
from bench.plugins.plugin import Plugin
from bench.results import ResultStore, RunResult
from bench.runner import run
from tests.checkpoints import quick_config, random_plugin, task_file, tiny_checkpoint, tiny_model
from tests.hub_account import Hub, serving
from tests.hub_server.state import READER, STRANGER

FILES = {"README.md", "plugin.safetensors", "plugin_config.json"}


@pytest.fixture(scope="module")
def hub(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Hub]:
    with serving(tmp_path_factory.mktemp("hub")) as served:
        yield served


@pytest.fixture(autouse=True)
def _willing(hub: Hub) -> Iterator[None]:
    yield
    hub.state.refuse(None)


@pytest.fixture(scope="module")
def study(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, RunResult]:
    """Return a folder with ``results/tiny`` and ``cache``, and its run of variator."""
    import bench.costing
    import bench.methods.variator

    at = tmp_path_factory.mktemp("study")
    task, backbone = task_file(at / "mood"), tiny_checkpoint(at / "bert", "bert")
    store, where = ResultStore(at / "results", "tiny"), Surroundings(cache_dir=at / "cache", device="cpu")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(bench.costing, "TIMED_BATCH_SIZES", (2,))
        patch.setattr(bench.costing, "TIMED_LENGTH", 16)
        patch.setattr(bench.methods.variator, "FIT_TOKENS", 2000)
        results = [run(quick_config(task, backbone, method=m, ratio=2), store, where) for m in ("dense", "variator")]
    assert [result.status for result in results] == ["done", "done"], [result.traceback for result in results]
    return at, results[1]


@pytest.fixture(scope="module")
def plugin(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("plugin")
    random_plugin(tiny_model("bert"), 4).save_pretrained(folder)
    return folder


def _key(repo: str, kind: str = "models") -> str:
    return f"{kind}/{repo}"


def test_a_plugin_goes_there_and_back(hub: Hub, tmp_path: Path) -> None:
    code = """
import torch
from bench.plugins.plugin import Plugin
from tests.checkpoints import random_plugin, tiny_model, tokens

model, ids = tiny_model("bert"), tokens(2, 9)
plugin = random_plugin(model, 4)
plugin.push_to_hub("me/there-and-back")
back = Plugin.from_pretrained("me/there-and-back")
assert back.config == plugin.config
with plugin.attached(model): expected = model(ids).logits
with back.attached(model): assert torch.equal(model(ids).logits, expected)
"""
    done = hub.python(code, at=tmp_path)
    assert done.returncode == 0, done.stderr
    assert hub.state.files(_key("me/there-and-back")).keys() == FILES
    # one commit beside that which makes the repository: nobody ever sees a part
    assert hub.state.commits(_key("me/there-and-back")) == ["initial commit", "Plugin at k = 4"]
    assert hub.state.repos()[_key("me/there-and-back")]["private"]


def test_the_page_says_what_the_run_says_and_its_three_lines_run(
    hub: Hub, study: tuple[Path, RunResult], tmp_path: Path
) -> None:
    at, result = study
    code, said = hub.bench(["hub", "push", result.run_id, "me/card", "--public", "--cache-dir", at / "cache"], at)
    assert code == 0 and "public" in said, said
    assert not hub.state.repos()[_key("me/card")]["private"]
    files = hub.state.files(_key("me/card"))
    assert files.keys() == FILES | {"result.json", "predictions.parquet"}
    assert RunResult.model_validate_json(files["result.json"]) == result
    page = files["README.md"].decode()

    card = ModelCard(page)
    entries: Any = card.data.eval_results
    evaluation = result.evaluation("dev")
    assert evaluation and result.cost
    accuracy = evaluation.metrics["accuracy"]
    assert {e.metric_name: e.metric_value for e in entries} == pytest.approx(
        {name: interval.value for name, interval in evaluation.metrics.items()}, abs=1e-6
    )
    assert (card.data.license, card.data.library_name) == ("apache-2.0", "variator-bench")

    teacher = result.teacher_evaluations[0].metrics["accuracy"]
    achieved = result.cost.achieved_remaining
    assert result.cost.requested_remaining is not None
    for text in (
        f"{accuracy.value:.4f} [{accuracy.low:.4f}, {accuracy.high:.4f}]",
        f"{teacher.value:.4f} [{teacher.low:.4f}, {teacher.high:.4f}]",
        f"| remaining encoder FLOPs | {result.cost.requested_remaining:.2%} | **{achieved:.2%}** |",
        f"| saved encoder FLOPs | {1 - result.cost.requested_remaining:.2%} | **{1 - achieved:.2%}** |",
        f"{result.cost.parameters_added:,}",
        f"`{result.provenance.data_digest}`",
        f"`{result.provenance.model_digest}`",
        f"torch {result.provenance.versions['torch']}",
        result.provenance.hardware,
        " ".join(result.provenance.command),
        result.run_id,
        "k = 2",
        "mood",
    ):
        assert text in page, text

    lines = re.search(r"## Load it\n\n```python\n(.*?)```", page, re.DOTALL)
    assert lines and len(lines[1].strip().splitlines()) == 3
    around = f"""
import sys, torch
from transformers import BertForSequenceClassification
from tests.checkpoints import tokens
model = BertForSequenceClassification.from_pretrained({str(at / "bert")!r}).eval()
batch = {{"input_ids": tokens(2, 9)}}
dense = model(**batch).logits
exec(sys.argv[1])
assert logits.shape == dense.shape and not torch.equal(logits, dense) and torch.equal(model(**batch).logits, dense)
"""
    done = hub.python(around, lines[1], at=tmp_path, HF_TOKEN="")  # it is public
    assert done.returncode == 0, done.stderr


def test_a_plugin_and_its_result_come_back(hub: Hub, study: tuple[Path, RunResult], tmp_path: Path) -> None:
    at, result = study
    assert hub.bench(["hub", "push", result.run_id, "me/result", "--cache-dir", at / "cache"], at)[0] == 0
    code, said = hub.bench(["hub", "pull", "me/result"], tmp_path)
    assert code == 0 and "1 fetched" in said, said
    back = ResultStore(tmp_path / "results", "tiny")
    original = ResultStore(at / "results", "tiny")
    assert back.read(result.run_id) == result
    assert back.predictions_path(result.run_id).read_bytes() == original.predictions_path(result.run_id).read_bytes()
    artifact = ArtifactCache(at / "cache" / "artifacts").find("plugin", result.identity)
    assert artifact
    for a, b in zip(
        Plugin.from_pretrained(tmp_path / "plugins" / "result").parameters(),
        Plugin.from_pretrained(artifact.folder).parameters(),
        strict=True,
    ):
        assert torch.equal(a, b)
    code, said = hub.bench(["hub", "pull", "me/result"], tmp_path)
    assert code == 2 and "--out" in said, said


def test_a_study_comes_back_byte_for_byte_and_replaces_nothing(
    hub: Hub, study: tuple[Path, RunResult], tmp_path: Path
) -> None:
    at, result = study
    code, said = hub.bench(["hub", "push", "tiny", "me/study"], at)
    assert code == 0, said
    assert b"bench hub pull me/study" in hub.state.files(_key("me/study", "datasets"))["README.md"]
    code, said = hub.bench(["hub", "pull", "me/study"], tmp_path)
    assert code == 0 and "2 fetched" in said and "bench report tiny" in said, said
    for path in sorted((at / "results" / "tiny").glob("[rp]*/*")):
        assert (tmp_path / path.relative_to(at)).read_bytes() == path.read_bytes()

    own = ResultStore(tmp_path / "results", "tiny")
    changed = result.model_copy(update={"notes": ["made here"]})
    own.write(changed)
    code, said = hub.bench(["hub", "pull", "me/study"], tmp_path)
    assert code == 0 and "1 here already, 1 here and different" in said, said
    assert own.read(result.run_id) == changed
    code, said = hub.bench(["hub", "pull", "me/study", "--study", "other"], tmp_path)
    assert code == 0 and ResultStore(tmp_path / "results", "other").read(result.run_id) == result, said


def test_what_is_wrong_in_a_study_is_named_and_the_rest_comes(
    hub: Hub, study: tuple[Path, RunResult], tmp_path: Path
) -> None:
    at, result = study
    store = ResultStore(at / "results", "tiny")
    good = store.path(result.run_id).read_bytes()
    other = json.loads(next(p for p in store.path("x").parent.glob("*") if p.stem != result.run_id).read_bytes())
    newer = other | {"schema_version": 99}
    renamed = other | {"run_id": "d" * 16, "predictions": None}  # its name is right, and not the hash of what it is
    hub.state.create(_key("me/mixed", "datasets"), private=True)
    hub.state.commit(
        _key("me/mixed", "datasets"),
        {
            f"runs/{result.run_id}.json": good,
            f"predictions/{result.run_id}.parquet": store.predictions_path(result.run_id).read_bytes(),
            f"runs/{'a' * 16}.json": good,
            f"runs/{'b' * 16}.json": good[:100],
            f"runs/{'c' * 16}.json": json.dumps(newer).encode(),
            f"runs/{'d' * 16}.json": json.dumps(renamed).encode(),
            "runs/evil.pkl": b"\x80\x04.",
        },
        "by somebody",
    )
    code, said = hub.bench(["hub", "pull", "me/mixed"], tmp_path)
    assert code == 1 and "1 fetched" in said and "4 not readable" in said, said
    assert said.count("is of another run") == 2 and "schema_version is 99" in said and "is not a valid result" in said
    assert [path.stem for path in (tmp_path / "results" / "tiny" / "runs").glob("*")] == [result.run_id]
    assert not any("evil" in r["path"] for r in hub.state.requests())


def test_a_push_that_is_broken_off_leaves_nothing_and_goes_on(hub: Hub, plugin: Path, tmp_path: Path) -> None:
    hub.state.refuse("/commit/")
    code, said = hub.bench(["hub", "push", plugin, "me/broken"], tmp_path)
    assert code == 2 and "try again later" in said, said
    assert hub.state.files(_key("me/broken")) == {}
    hub.state.refuse(None)
    sent = [r for r in hub.state.requests() if r["method"] == "PUT"]
    code, said = hub.bench(["hub", "push", plugin, "me/broken"], tmp_path)
    assert code == 0, said
    assert hub.state.files(_key("me/broken")).keys() == FILES
    assert [r for r in hub.state.requests() if r["method"] == "PUT"] == sent  # the weights were there already


def test_the_record_of_another_plugin_does_not_stay(
    hub: Hub, study: tuple[Path, RunResult], plugin: Path, tmp_path: Path
) -> None:
    at, result = study
    assert hub.bench(["hub", "push", result.run_id, "me/replaced", "--cache-dir", at / "cache"], at)[0] == 0
    assert hub.bench(["hub", "push", plugin, "me/replaced"], tmp_path)[0] == 0
    assert hub.state.files(_key("me/replaced")).keys() == FILES


def test_a_revision_is_what_it_was(hub: Hub, plugin: Path, tmp_path: Path) -> None:
    assert hub.bench(["hub", "push", plugin, "me/versions"], tmp_path)[0] == 0
    first = hub.state.repos()[_key("me/versions")]["refs"]["main"]
    hub.state.tag(_key("me/versions"), "v1", first)
    random_plugin(tiny_model("bert"), 8).save_pretrained(tmp_path / "new")
    assert hub.bench(["hub", "push", "new", "me/versions"], tmp_path)[0] == 0
    for name, revision, k in (("tag", "v1", 4), ("commit", first, 4), ("newest", "main", 8)):
        words = ["hub", "pull", "me/versions", "--revision", revision, "--out", name]
        code, said = hub.bench(words, tmp_path)
        assert code == 0, said
        assert Plugin.from_pretrained(tmp_path / name).config.k == k


def test_what_was_fetched_serves_where_there_is_no_network(hub: Hub, plugin: Path, tmp_path: Path) -> None:
    assert hub.bench(["hub", "push", plugin, "me/offline"], tmp_path)[0] == 0
    load = "from bench.plugins.plugin import Plugin; print(Plugin.from_pretrained('me/offline').config.k)"
    assert hub.python(load, at=tmp_path).stdout == "4\n"
    for environ in ({"HF_HUB_OFFLINE": "1"}, {"HF_ENDPOINT": "http://127.0.0.1:9"}):
        assert hub.python(load, at=tmp_path, **environ).stdout == "4\n"
        done = hub.python(load.replace("offline", "never-seen"), at=tmp_path, **environ)
        assert "and nothing of it was fetched before" in done.stderr


REFUSED: list[tuple[str, dict[str, str], str]] = [
    ("push PLUGIN me/new", {"HF_TOKEN": ""}, "no token of the Hugging Face Hub is known"),
    ("push PLUGIN me/new", {"HF_TOKEN": "hf_wrong"}, "does not know the token"),
    ("push PLUGIN me/new", {"HF_TOKEN": READER}, "no right to that"),
    ("push PLUGIN you/new", {}, "no right to that"),
    ("push PLUGIN new", {}, "expected USER/NAME"),
    ("push PLUGIN me/../new", {}, "expected USER/NAME"),
    ("push pliot me/new", {}, "no study or run"),
    ("pull me/none", {}, "there is none of that name"),
    ("pull me/there --revision v7", {}, "has no revision 'v7'"),
    ("pull me/there", {"HF_TOKEN": STRANGER}, "or this account may not see it"),
    ("pull me/there", {"HF_TOKEN": ""}, "needs a token"),
    ("pull me/pickle", {}, "holds no plugin: plugin_config.json is missing"),
    ("pull me/empty", {}, "holds no study"),
    ("pull me/outward", {}, "leads out of it"),
    ("pull me/torn", {}, "is torn or no safetensors file"),
]
UNREACHED: list[tuple[dict[str, str], str]] = [
    ({"HF_HUB_OFFLINE": "1"}, "HF_HUB_OFFLINE is set"),
    ({"HF_ENDPOINT": "http://127.0.0.1:9"}, "cannot be reached"),
]


def test_what_cannot_be_done_is_said_in_a_line(hub: Hub, plugin: Path, tmp_path: Path) -> None:
    state, here = hub.state, {name: (plugin / name).read_bytes() for name in sorted(FILES - {"README.md"})}
    repos: dict[str, dict[str, bytes]] = {
        "models/me/there": here,
        "models/me/pickle": {"pytorch_model.bin": b"\x80\x04."},
        "datasets/me/empty": {"data.csv": b"a"},
        "models/me/outward": here | {"../../../evil.json": b"{}"},
        "models/me/torn": here | {"plugin.safetensors": here["plugin.safetensors"][:200]},
    }
    for name, files in repos.items():
        state.create(name, private=True)
        state.commit(name, files, "files")
    asked = len(state.requests())

    def words(line: str) -> list[str]:
        return ["hub", *(str(plugin) if word == "PLUGIN" else word for word in line.split())]

    answers = hub.benches([(words(line), environ) for line, environ, _ in REFUSED], tmp_path)
    expected = [text for *_, text in REFUSED]
    for environ, text in UNREACHED:
        lines = ["push PLUGIN me/new", "pull me/never-seen"]
        answers += hub.benches([(words(line), {}) for line in lines], tmp_path, **environ)
        expected += [text, text]
    for (code, said), text in zip(answers, expected, strict=True):
        assert code == 2 and text in said and said.startswith("error: ") and said.count("\n") == 1, (said, text)
    assert not any("new" in repo for repo in state.repos())
    assert not any(r["path"].endswith((".bin", "evil.json")) for r in state.requests()[asked:])
    assert list(tmp_path.iterdir()) == []


def test_a_run_without_a_plugin_says_so(hub: Hub, study: tuple[Path, RunResult], tmp_path: Path) -> None:
    at, result = study
    dense = next(r for r in ResultStore(at / "results", "tiny") if r.config["method"] == "dense")
    code, said = hub.bench(["hub", "push", dense.run_id, "me/x", "--cache-dir", at / "cache"], at)
    assert code == 2 and "made no plugin" in said, said
    code, said = hub.bench(["hub", "push", result.run_id, "me/x", "--cache-dir", tmp_path], at)
    assert code == 2 and "--mode force" in said and " ".join(result.provenance.command) in said, said


def test_a_damaged_study_is_not_sent(hub: Hub, study: tuple[Path, RunResult], tmp_path: Path) -> None:
    at, result = study
    shutil.copytree(at / "results", tmp_path / "results")
    path = ResultStore(tmp_path / "results", "tiny").path(result.run_id)
    path.write_bytes(path.read_bytes()[:-40])
    code, said = hub.bench(["hub", "push", "tiny", "me/damaged"], tmp_path)
    assert code == 2 and str(path.relative_to(tmp_path)) in said, said
    assert "datasets/me/damaged" not in hub.state.repos()
