"""What names a run of Variator: what can change its number, and nothing else; stored results keep their names."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from bench.cell import Cell, Surroundings
from bench.config import RunConfig, run_id
from tests.checkpoints import quick_config, task_file, tiny_checkpoint

ROOT = Path(__file__).parents[3]
PARAMETER_FREE: dict[str, Any] = {"compression": "mean", "decompression": "copy"}


def identity(**options: Any) -> dict[str, Any]:
    return RunConfig.build({"method": "variator", "ratio": 4, **options}).identity("data", "model")


ADAPTATION = {"steps": 7, "lr": 0.5, "decay": "constant", "losses": "logits=1", "temperature": 3.0}


@pytest.mark.parametrize(
    ("options", "unread", "read"),
    [
        ({"decompression": "copy"}, {"bottleneck": 3}, {"init": "released", **ADAPTATION}),
        ({"decompression": "copy", "compression": "conv"}, {"bottleneck": 3, "init": "released"}, ADAPTATION),
        ({"adapt": False}, {**ADAPTATION, "batch_size": 3}, {"init": "released", "warmup": 0.2, "pretrain_lr": 0.1}),
        (
            {"adapt": False, "pretrain_steps": 0},
            {**ADAPTATION, "warmup": 0.2, "weight_decay": 0.3, "clip": 3.0, "pretrain_lr": 0.1},
            {"batch_size": 3, "init": "released"},  # the fit is on batches of the task
        ),
        ({"adapt": False, "pretrain_steps": 0, "init": "released"}, {**ADAPTATION, "batch_size": 3}, {"bottleneck": 3}),
        (
            {"adapt": False, "pretrain_steps": 0, "decompression": "copy"},  # its scores are fitted on T5
            {**ADAPTATION, "bottleneck": 3},
            {"batch_size": 3, "init": "released"},
        ),
        (
            {"adapt": False, "pretrain_steps": 0, "decompression": "copy", "compression": "conv"},
            {**ADAPTATION, "batch_size": 3, "init": "released"},
            {"seed": 1},
        ),
        (
            PARAMETER_FREE,
            {**ADAPTATION, "batch_size": 3, "bottleneck": 3, "init": "released", "adapt": False, "warmup": 0.2,
             "weight_decay": 0.3, "clip": 3.0, "pretrain_steps": 9, "pretrain_lr": 0.1},
            {"mask_padding": False, "attention_k": 2, "ratio": 8, "seed": 1},
        ),
    ],
    ids=lambda values: "-".join(map(str, values)),
)  # fmt: skip
def test_what_is_not_read_is_no_identity(options: dict[str, Any], unread: dict[str, Any], read: dict[str, Any]) -> None:
    for name, value in unread.items():
        assert identity(**options, **{name: value}) == identity(**options), name
    for name, value in read.items():
        assert identity(**options, **{name: value}) != identity(**options), name


def test_the_standard_plugin_keeps_the_name_that_it_had_before_its_variants() -> None:
    """Stored results are found by it. The hash is that of the same run as it was named before there were any."""
    explicit = {"compression": "attention", "decompression": "adapter", "attention_k": 1, "adapt": True}
    then = {"pretrain_steps": 0, "lr": 1e-3}
    assert run_id(identity(**then, **explicit)) == run_id(identity(**then)) == "659f87e15dfdd077"


@pytest.mark.parametrize("path", sorted((ROOT / "results").glob("*/runs/*.json")), ids=lambda path: path.stem)
def test_committed_results_keep_their_names(path: Path) -> None:
    stored = json.loads(path.read_text("utf-8"))
    identity, fields = stored["identity"], stored["config"]
    values = {name: value for name, value in fields.items() if name in RunConfig.model_fields and name != "options"}
    config = RunConfig.build(values | fields["options"])
    again = config.identity(identity["data"], identity["model"], family=fields["family"])
    if identity["method"] != again["method"] or fields["method"] != "variator":
        pytest.skip("made by another method or version")
    assert run_id(again) == stored["run_id"] == path.stem


@pytest.mark.parametrize(
    ("options", "version"),
    [
        ({}, 2),
        ({"compression": "mean"}, 2),
        ({"decompression": "copy"}, 2),
        ({"init": "released"}, 1),
        ({"recipe": "released"}, 1),
        ({"decompression": "copy", "compression": "conv"}, 1),  # starts as it did
        (PARAMETER_FREE, 1),
    ],
    ids=str,
)
def test_a_start_that_changed_on_t5_renames_its_runs_alone(options: dict[str, Any], version: int) -> None:
    config = RunConfig.build({"method": "variator", "ratio": 4, **options})
    methods = [config.identity("data", "model", family=family)["method"] for family in ("bert", "t5")]
    assert methods == ["variator@1", f"variator@{version}"]


@pytest.mark.parametrize(("family", "version"), [("bert", 1), ("t5", 2)])
def test_a_cell_knows_its_family(tmp_path: Path, family: Any, version: int) -> None:
    task, backbone = task_file(tmp_path / "task"), tiny_checkpoint(tmp_path / "tiny", family)
    config = quick_config(task, backbone, method="variator", ratio=2)
    assert Cell.resolve(config, Surroundings(cache_dir=tmp_path / "cache")).identity["method"] == f"variator@{version}"
