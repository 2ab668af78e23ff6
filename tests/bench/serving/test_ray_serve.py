"""A real local Ray with two replicas: answers, switching under a burst, a killed replica, and what people do wrong."""

from __future__ import annotations

import json
import os
import shutil
import signal
import socket
import tempfile
import time
import urllib.error
import urllib.request
import warnings
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch
from filelock import FileLock
from pydantic import ValidationError
from transformers import AutoTokenizer, BertForSequenceClassification

from bench.errors import BenchError
from bench.plugins.bank import PluginBank
from bench.plugins.plugin import Plugin
from bench.testing.tiny import WORDS
from tests.checkpoints import random_plugin, task_file, tiny_checkpoint
from tests.slurm_cluster import wait_until

ROOT = Path(__file__).parents[3]
LABELS = ("bad", "good")
BURST = 96
SECONDS = 60
"""After which a request has failed."""

pytestmark = [pytest.mark.timeout(900), pytest.mark.filterwarnings("ignore:Using extra keyword arguments")]


def ray_or_skip() -> None:
    """Skip where Ray Serve is not installed, and say so; fail where it must be there."""
    if not (find_spec("ray") and find_spec("starlette")):
        reason = "the deployment on Ray Serve is not tested here: no ray (pip install 'variator-bench[ray]')"
        if os.environ.get("REQUIRE_RAY") == "1":
            pytest.fail(reason)
        warnings.warn(reason, stacklevel=1)
        pytest.skip(reason)


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
    return port


@dataclass(frozen=True)
class Service:
    """What is served: two replicas of a tiny model and its plugins."""

    folder: Path
    address: str

    def arguments(self, **changes: Any) -> dict[str, Any]:
        """Return the arguments of the application."""
        plugins = ",".join(str(self.folder / f"k{k}") for k in (2, 4))
        given = {"model": str(self.folder / "model"), "plugins": plugins, "task": str(self.folder / "task/mood.yaml")}
        return given | {"policy": "queue:up=0.5,down=0.25", "replicas": "2", "max_batch": "4", "cpus": "0.5"} | changes

    def ask(self, body: object, method: str = "POST") -> tuple[int, dict[str, Any]]:
        """Return status and answer of one request."""
        data = None if body is None else body if isinstance(body, bytes) else json.dumps(body).encode()
        request = urllib.request.Request(self.address, data, method=method)
        try:
            with urllib.request.urlopen(request, timeout=SECONDS) as reply:
                return reply.status, json.load(reply)
        except urllib.error.HTTPError as error:
            said = error.read()
            try:
                return error.code, json.loads(said)
            except ValueError:  # Ray's own words
                return error.code, {"error": said.decode(errors="replace")}

    def ask_all(self, texts: Sequence[str], at_once: int = 48) -> list[dict[str, Any]]:
        """Ask for texts, many at once; each must be answered."""
        with ThreadPoolExecutor(at_once) as threads:
            replies = list(threads.map(lambda text: self.ask({"text": text}), texts))
        assert [reply for status, reply in replies if status != 200] == []
        return [reply for _, reply in replies]

    def processes(self) -> list[int]:
        """Return the process ids of the replicas."""
        below = psutil.Process().children(recursive=True)
        return sorted(p.pid for p in below if p.is_running() and "ServeReplica" in " ".join(_command(p)))


def _command(process: psutil.Process) -> list[str]:
    try:
        return process.cmdline()
    except psutil.Error:
        return []


@pytest.fixture(scope="module")
def texts() -> list[str]:
    generator = torch.Generator().manual_seed(0)
    counts = torch.randint(1, 20, (BURST,), generator=generator).tolist()
    return [" ".join(WORDS[i] for i in torch.randint(len(WORDS), (n,), generator=generator)) for n in counts]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory, texts: list[str]) -> Path:
    """Return a folder with a model, two plugins and a task."""
    folder = tmp_path_factory.mktemp("served")
    # deep, so that a batch takes long enough for requests to wait
    checkpoint = tiny_checkpoint(folder / "model", "bert", num_hidden_layers=12)
    model = BertForSequenceClassification.from_pretrained(checkpoint).eval()
    for k in (2, 4):
        random_plugin(model, k, seed=k).save_pretrained(folder / f"k{k}")
    with torch.no_grad():  # half of the texts are then good to the dense model, and none is on the border
        bad, good = torch.cat([logits(model, folder, text) for text in texts]).unbind(1)
        model.classifier.bias[0] += (good - bad).quantile(0.5)
    model.save_pretrained(checkpoint)
    task_file(folder / "task")
    return folder


@pytest.fixture(scope="module")
def service(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Service]:
    """Return the running service; the cluster ends with the module."""
    ray_or_skip()
    os.environ["RAY_USAGE_STATS_ENABLED"] = "0"
    import ray
    from ray import serve

    from bench.serving.ray_serve import Arguments, app

    scratch, port = tempfile.mkdtemp(prefix="ray-"), free_port()
    served = Service(folder, f"http://127.0.0.1:{port}/")
    # the tests of this file may be shared out among processes: one cluster at a time
    lock = FileLock(tmp_path_factory.getbasetemp().parent / "ray.lock")
    try:
        lock.acquire()
        ray.init(
            address="local",
            num_cpus=2,
            include_dashboard=False,
            log_to_driver=False,
            object_store_memory=100_000_000,
            _temp_dir=scratch,
            runtime_env={"env_vars": {"PYTHONPATH": str(ROOT)}},
        )
        serve.start(http_options={"host": "127.0.0.1", "port": port})
        serve.run(app(Arguments.model_validate(served.arguments())))
        yield served
    finally:
        if ray.is_initialized():
            serve.shutdown()
        ray.shutdown()
        lock.release()
        shutil.rmtree(scratch, ignore_errors=True)


def logits(model: Any, folder: Path, text: str) -> torch.Tensor:
    """Return the logits of one text by transformers alone, (1, 2)."""
    tokenizer = AutoTokenizer.from_pretrained(folder / "model")
    found: torch.Tensor = model(**tokenizer(text, return_tensors="pt", truncation=True, max_length=32)).logits
    return found


def expected(folder: Path, texts: Sequence[str]) -> dict[int, list[str]]:
    """Return k -> label of each text, by transformers and a bank, one text at a time."""
    model = BertForSequenceClassification.from_pretrained(folder / "model").eval()
    bank = PluginBank(Plugin.from_pretrained(folder / f"k{k}") for k in (2, 4))
    found: dict[int, list[str]] = {}
    with bank.attached(model), torch.inference_mode():
        for k in bank.ks:
            bank.select(k)
            found[k] = [LABELS[int(logits(model, folder, text).argmax())] for text in texts]
    return found


def test_a_burst_is_answered_at_larger_k_by_both_replicas_as_the_model_answers(
    service: Service, texts: list[str]
) -> None:
    by_k = expected(service.folder, texts)
    assert len({tuple(labels) for labels in by_k.values()}) == 3 and set(by_k[1]) == set(LABELS)
    seen: set[tuple[str, int]] = set()

    def all_used() -> bool:
        answers = service.ask_all(texts)
        assert [a["label"] for a in answers] == [by_k[a["k"]][i] for i, a in enumerate(answers)]
        assert all(0 < a["seconds"] < SECONDS for a in answers)
        seen.update((a["replica"], a["k"]) for a in answers)
        return {k for _, k in seen} >= {2, 4} and len({replica for replica, _ in seen}) == 2

    wait_until(all_used, "both replicas answer, at every k")


def test_when_it_is_calm_the_dense_model_answers(service: Service, texts: list[str]) -> None:
    service.ask_all(texts[:48])
    last: dict[str, int] = {}

    def calm() -> bool:  # a replica steps down once a batch, and which of them is asked is chance
        for text in texts[:4]:
            answer = service.ask({"text": text})[1]
            last[answer["replica"]] = answer["k"]
        return list(last.values()) == [1, 1]

    wait_until(calm, "k goes down")
    answers = [service.ask({"text": text})[1] for text in texts[:8]]
    assert {a["k"] for a in answers} == {1}
    assert [a["label"] for a in answers] == expected(service.folder, texts[:8])[1]


@pytest.mark.parametrize(
    ("body", "said"),
    [
        ({"txt": "good"}, "the field 'text' is missing; expected JSON such as"),
        ({"text": "good", "txet": "bad"}, "unknown field 'txet'. Did you mean 'text'?"),
        ({"text": 3}, "the field 'text' is no text"),
        (["good"], "found list"),
        (b"{good", "the body is no JSON"),
        (b'{"text": "\\ud800"}', "the field 'text' is no text"),
    ],
)
def test_what_cannot_be_read_is_400_and_says_what_was_expected(service: Service, body: object, said: str) -> None:
    status, answer = service.ask(body)
    assert status == 400 and said in answer["error"]


def test_a_request_without_a_body_is_400(service: Service) -> None:
    assert service.ask(None, "GET")[0] == 400


def test_a_killed_replica_loses_no_service(service: Service, texts: list[str]) -> None:
    before = service.processes()
    assert len(before) == 2
    os.kill(before[0], signal.SIGKILL)
    # the other one answers meanwhile; what was sent to the dead one before Ray saw it may fail
    wait_until(lambda: service.ask({"text": texts[0]})[0] == 200, "a request is answered")
    wait_until(lambda: len(set(service.processes()) - {before[0]}) == 2, "Ray starts another", 180)

    def both() -> bool:
        time.sleep(0.2)
        with ThreadPoolExecutor(12) as threads:
            replies = list(threads.map(lambda text: service.ask({"text": text}), texts[:24]))
        return len({reply.get("replica") for status, reply in replies if status == 200}) == 2

    wait_until(both, "both answer", 180)


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"policy": "qeue"}, "unknown policy 'qeue'. Did you mean 'queue'?"),
        ({"policy": "static:8"}, "the model serves k = 1, 2, 4"),
        ({"task": "sts2"}, "unknown task 'sts2'. Did you mean 'sst2'?"),
        ({"plugins": "/none/k2"}, "/none/k2"),
        ({"plugins": "k2 k2"}, "there are two plugins of k = 2"),
    ],
)
def test_what_cannot_be_served_is_refused_before_anything_starts(
    folder: Path, changes: dict[str, Any], said: str
) -> None:
    ray_or_skip()
    from bench.serving.ray_serve import Arguments, app

    if changes.get("plugins") == "k2 k2":
        changes = {"plugins": [str(folder / "k2")] * 2}
    with pytest.raises(BenchError) as refused:
        app(Arguments.model_validate(Service(folder, "").arguments(**changes)))
    assert said in str(refused.value)


def test_arguments_that_cannot_be_are_refused() -> None:
    ray_or_skip()
    from bench.serving.ray_serve import Arguments

    given = Service(Path("at"), "").arguments()
    for changes in ({"max_waiting": "3"}, {"replicas": "0"}, {"plugins": ","}, {"polcy": "queue"}):
        with pytest.raises(ValidationError):
            Arguments.model_validate(given | changes)


def test_a_task_is_known_by_its_name_though_a_folder_has_it(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    ray_or_skip()
    from bench.serving.ray_serve import Arguments, app

    (tmp_path / "sst2").mkdir()
    monkeypatch.chdir(tmp_path)
    app(Arguments.model_validate(Service(folder, "").arguments(task="sst2")))


def test_a_replica_that_cannot_start_gives_the_reason(service: Service, tmp_path: Path) -> None:
    from ray import serve

    from bench.serving.ray_serve import Arguments, app

    other = BertForSequenceClassification.from_pretrained(
        tiny_checkpoint(tmp_path / "other", "bert", num_hidden_layers=3)
    )
    random_plugin(other, 2).save_pretrained(tmp_path / "k2")
    wrong = Arguments.model_validate(service.arguments(plugins=str(tmp_path / "k2"), replicas=1))
    with pytest.raises(RuntimeError):
        serve.run(app(wrong), name="wrong", route_prefix="/wrong")
    [deployment] = serve.status().applications["wrong"].deployments.values()
    assert "the plugin does not fit this model" in deployment.message
    serve.delete("wrong")
    assert service.ask({"text": "good"})[0] == 200
