"""What W&B shows of a result."""

from __future__ import annotations

from pathlib import Path

import pytest

from bench.results import Latency
from bench.tracking.record import exit_code, notes_of, settings_of, summary_of
from tests.bench.test_results import whole
from tests.checkpoints import quick_config


def test_a_summary_has_the_pareto_point_and_every_interval() -> None:
    result = whole(
        latency=[Latency(batch_size=8, sequence_length=4, dense_seconds=[2, 4, 6], compressed_seconds=[1, 4, 3])]
    )
    found = summary_of(result)
    assert (found["pareto/remaining_encoder_flops"], found["pareto/dev_primary"]) == (1 / 3, 1 / 3)
    for name in ("selection/primary", "dev/primary", "dev/accuracy"):
        assert [found[name + end] for end in ("", "_low", "_high")] == [1 / 3, 0.1, 0.7]
    assert (found["flops/requested_encoder"], found["flops/saved_encoder"]) == (0.7, 1 - 1 / 3)
    assert (found["flops/dense_encoder"], found["flops/compressed_total"]) == (10**15 + 1, 9)
    assert [found[f"latency/batch_8_{what}"] for what in ("dense_ms", "compressed_ms", "ratio")] == [4e3, 3e3, 0.5]
    assert found["memory/batch_1_dense_bytes"] == 2
    assert (found["size/parameters_added"], found["status"]) == (1, "done")


def test_a_run_that_failed_has_its_reason_and_no_point() -> None:
    found = summary_of(whole(status="failed", reason="x" * 10_000))
    assert found["status"] == "failed" and found["reason"] == "x" * 2000
    assert not [name for name in found if name.startswith("pareto/")]


@pytest.mark.parametrize(
    ("status", "code"), [("done", 0), ("skipped", 0), ("failed", 1), ("diverged", 1), ("interrupted", 255)]
)
def test_how_a_run_ends(status: str, code: int) -> None:
    assert exit_code(status) == code


def test_options_stand_beside_fields_as_in_a_sweep() -> None:
    config = quick_config(Path("mood.yaml"), Path("bert"), bottleneck=4)
    found = settings_of(config)
    assert (found["bottleneck"], found["task"]) == (4, "mood.yaml") and "options" not in found


def test_notes_are_for_a_person() -> None:
    result = whole(task={"caveat": "small"}, notes=["solved twice"])
    text = notes_of(["bench", "run", "--task", "my task"], Path("results/x.json"), result)
    assert text.split("\n\n") == [
        "Again: `bench run --task 'my task'`",
        "Result: `results/x.json`",
        "Note: small",
        "Note: solved twice",
    ]
