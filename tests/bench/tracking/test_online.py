"""Runs that the real client sends to a server, and brings back from there."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.bench_command import Command, bench, results, tiny_sweep
from tests.wandb_account import Account, account


@pytest.fixture(scope="module")
def online(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Account]:
    with account(tmp_path_factory.mktemp("account")) as found:
        yield found


@pytest.fixture(scope="module")
def finished(online: Account, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Command]:
    """Return a sweep of a dense cell and k = 4 that was tracked to its end."""
    at = tmp_path_factory.mktemp("finished")
    code, command = bench(["sweep", tiny_sweep(at, ratio=4)], at, online.environ)
    assert code == 0, command.err
    return at, command


def test_a_run_is_there_as_a_person_looks_for_it(online: Account, finished: tuple[Path, Command]) -> None:
    at, command = finished
    stored = results(at)
    dense, variator = online.runs()
    assert "W&B" not in command.err and "wandb" not in command.err + command.out
    assert [run["id"] for run in (dense, variator)] == [stored[n]["run_id"] for n in ("dense", "variator-4")]
    assert (variator["state"], variator["exitcode"], variator["group"]) == ("finished", 0, "tiny")
    assert variator["displayName"] == "mood · bert · variator k=4 · seed 0"
    assert variator["tags"] == ["mood", "bert", "variator", "k=4", "tiny"]
    assert (
        "Again: `bench run --task" in variator["notes"]
        and f"{stored['variator-4']['run_id']}.json" in variator["notes"]
    )
    config = variator["config"]
    assert (config["ratio"], config["bottleneck"], config["family"], config["knob"]) == (4, 8, "bert", {"k": 4})


def test_every_step_is_live_and_the_last_numbers_are_the_results(
    online: Account, finished: tuple[Path, Command]
) -> None:
    result, [dense, variator] = results(finished[0])["variator-4"], online.runs()
    for run, stage in ((dense, "teacher"), (variator, "adapt")):
        rows = [row for row in run["history"] if f"{stage}/loss" in row]
        assert [row[f"{stage}/step"] for row in rows] == list(range(1, len(rows) + 1)) and len(rows) > 2
    summary = variator["summary"]
    score = result["evaluations"][1]["metrics"]["accuracy"]
    assert [summary[f"dev/primary{end}"] for end in ("", "_low", "_high")] == [
        score[k] for k in ("value", "low", "high")
    ]
    point = (summary["pareto/remaining_encoder_flops"], summary["pareto/dev_primary"])
    assert point == (result["cost"]["achieved_remaining"], score["value"])
    assert summary["selection/primary"] == result["evaluations"][0]["metrics"]["accuracy"]["value"]


def test_the_lineage_leads_from_the_teacher_to_the_result(online: Account, finished: tuple[Path, Command]) -> None:
    at, _ = finished
    stored, made = results(at), online.artifacts()
    dense, variator = stored["dense"]["run_id"], stored["variator-4"]["run_id"]
    [teacher], [plugin] = ([a for a in made.values() if a["type"] == kind] for kind in ("teacher", "plugin"))
    assert (teacher["run"], teacher["usedBy"]) == (dense, [variator])
    assert (plugin["run"], plugin["usedBy"]) == (variator, [])
    assert made[f"result-{variator}"]["run"] == variator
    folder = at / "cache" / "artifacts" / plugin["name"]
    assert online.content(plugin, "plugin.safetensors") == (folder / "plugin.safetensors").read_bytes()
    files = [path.name for path in (online.state / "artifacts" / teacher["id"] / "files").iterdir()]
    assert files == ["artifact.json"], "a teacher's weights may be gigabytes"


def test_what_is_done_is_not_tracked_again(online: Account, finished: tuple[Path, Command]) -> None:
    at, _ = finished
    before = (online.state / "requests.jsonl").read_bytes()
    code, again = bench(["sweep", at / "tiny.yaml"], at, online.environ)
    assert (code, again.err) == (0, "")
    assert (online.state / "requests.jsonl").read_bytes() == before


def test_another_machine_fetches_what_the_project_has(
    online: Account, finished: tuple[Path, Command], tmp_path: Path
) -> None:
    at, _ = finished
    for name in ("mood", "bert", "tiny.yaml"):
        copy = shutil.copytree if (at / name).is_dir() else shutil.copy
        copy(at / name, tmp_path / name)
    code, command = bench(["sweep", "tiny.yaml"], tmp_path, online.environ)
    assert code == 0 and "2 of 2 runs were done in variator-bench already" in command.err
    assert files(tmp_path) == files(at)
    assert not (tmp_path / "cache" / "artifacts").exists(), "nothing was trained"
    assert len(online.runs()) == 2


def files(at: Path) -> dict[str, bytes]:
    """Return the files of the study's results by name."""
    found = [p for kind in ("runs", "predictions") for p in (at / "results" / "tiny" / kind).iterdir()]
    return {path.name: path.read_bytes() for path in found}


def pull(words: list[str], at: Path, online: Account) -> tuple[int, str, str]:
    at.mkdir(exist_ok=True)
    code, command = bench(["pull", *words], at, online.environ, machine=False)
    return code, command.out, command.err


def test_results_come_back_as_they_were(online: Account, finished: tuple[Path, Command], tmp_path: Path) -> None:
    at, _ = finished
    code, out, err = pull(["loopback/variator-bench"], tmp_path, online)
    assert (code, err) == (0, "") and "2 fetched, 0 here already" in out
    assert files(tmp_path) == files(at)
    runs = tmp_path / "results" / "tiny" / "runs"
    one, other = sorted(runs.iterdir())
    changed = json.dumps({**json.loads(one.read_bytes()), "notes": ["mine"]}).encode()
    one.write_bytes(changed)
    other.write_bytes(json.dumps({**json.loads(other.read_bytes()), "status": "failed"}).encode())
    code, out, err = pull(["loopback/variator-bench"], tmp_path, online)
    assert f"another result is here and stays: {one.relative_to(tmp_path)}" in out
    assert one.read_bytes() == changed, "what stands here is not replaced"
    assert other.read_bytes() == (at / "results" / "tiny" / "runs" / other.name).read_bytes()


@pytest.mark.parametrize(
    ("project", "environ", "expected"),
    [
        ("loopback/nowhere", {}, "W&B does not give loopback/nowhere"),
        ("loopback/variator-bench/nosweep", {}, "W&B does not give loopback/variator-bench/nosweep"),
        ("loopback", {}, "expected ENTITY/PROJECT"),
        ("loopback/variator-bench", {"WANDB_API_KEY": ""}, "`wandb login`"),
        ("loopback/variator-bench", {"WANDB_API_KEY": "f" * 40}, "not logged in"),
    ],
)
def test_what_cannot_be_pulled_is_said_in_a_line(
    project: str,
    environ: dict[str, Any],
    expected: str,
    online: Account,
    finished: tuple[Path, Command],
    tmp_path: Path,
) -> None:
    asking = Account(online.state, {**online.environ, **environ})
    code, out, err = pull([project], tmp_path, asking)
    assert code == 2 and out == ""
    assert err.startswith("error: ") and expected in err and err.count("\n") == 1, err
