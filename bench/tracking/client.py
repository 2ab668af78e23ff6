"""The process beside a run that talks to W&B: one JSON message a line in, and one a line out.

In: what the run is, then ``{"stage": ...}`` and ``{"at": step, "numbers": {...}}`` as it goes, then ``{"end": {...}}``.
Out: one answer, ``{"folder": ..., "sent": ..., "problem": ...}`` or ``{"lost": why}``. Input that ends without a last
message means that the run was killed, and the run at W&B is ended for it.
"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from bench.artifacts import META_FILE
from bench.results import RunResult, parse
from bench.tracking.account import first_line
from bench.tracking.record import exit_code, notes_of, summary_of

if TYPE_CHECKING:
    import wandb

INIT_SECONDS = 15.0
"""Longest wait for the server before a run is kept here instead."""
UPLOAD_SECONDS = 25.0
"""Longest wait at the end for what is still to be sent."""


def main() -> None:
    """Follow one run to its end."""
    out = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # whatever wandb prints is no message
    try:
        answer = follow(json.loads(sys.stdin.readline()), map(json.loads, sys.stdin))
    except BaseException as error:
        answer = {"lost": first_line(error)}
    try:
        out.write(json.dumps(answer) + "\n")
        out.flush()
    finally:
        os._exit(0)  # wandb's own goodbye waits for a dead server


def follow(setup: dict[str, Any], messages: Iterable[dict[str, Any]]) -> dict[str, Any]:
    """Track a run from its first message to its last; return the answer."""
    run, problem = _start(setup)
    stage, end = "", {"status": "interrupted", "reason": "the process that ran it ended"}
    axes = set()
    for message in messages:
        if "stage" in message:
            stage = message["stage"]
        elif "at" in message:
            if stage not in axes:
                axes.add(stage)
                run.define_metric(f"{stage}/*", step_metric=f"{stage}/step")
            run.log({f"{stage}/{k}": v for k, v in message["numbers"].items()} | {f"{stage}/step": message["at"]})
        elif "end" in message:
            end = message["end"]
            break
    _conclude(run, setup, end)
    folder = str(Path(run.settings.sync_dir))
    try:
        run.finish(exit_code=exit_code(end["status"]))
    except TimeoutError:
        problem = f"not all was sent within {UPLOAD_SECONDS:.0f} s"
    return {"folder": folder, "sent": setup["online"] and problem is None, "problem": problem}


def _start(setup: dict[str, Any]) -> tuple[wandb.Run, str | None]:
    """Start the run, offline where the server does not take it; return why with it."""
    import wandb

    def start(mode: str) -> wandb.Run:
        return wandb.init(
            **setup["init"],
            mode=mode,  # type: ignore[arg-type]
            settings=wandb.Settings(
                console="off",
                silent=True,
                init_timeout=INIT_SECONDS,
                finish_timeout=UPLOAD_SECONDS,
                finish_timeout_raises=True,
                x_stats_pid=os.getppid(),
                program="bench",
            ),
        )

    if not setup["online"]:
        return start("offline"), None
    try:
        return start("online"), None
    except Exception as error:
        return start("offline"), first_line(error)


def _conclude(run: wandb.Run, setup: dict[str, Any], end: dict[str, Any]) -> None:
    """Log what came of the run: its summary and, where it has a result that stands, its files."""
    if not end.get("result"):
        run.summary.update({"status": end["status"], "reason": end.get("reason") or ""})
        return
    path = Path(end["result"])
    result = parse(path.read_bytes(), path)
    earlier = {"reason": ""} if run.resumed else {}  # a run that failed before had one, and nothing is ever removed
    run.summary.update(earlier | summary_of(result))
    run.config.update({"knob": result.knob}, allow_val_change=True)  # type: ignore[no-untyped-call]
    run.notes = notes_of(setup["command"], path, result)
    if result.status != "interrupted":
        for key in dict.fromkeys(stage.artifact for stage in result.training):
            _log_part(run, Path(end["artifacts"]) / key, result)
        _log_result(run, path, Path(end["predictions"]), result)


def _log_part(run: wandb.Run, folder: Path, result: RunResult) -> None:
    """Log a teacher, by its description alone since it may be gigabytes, or a plugin whole."""
    import wandb

    kind = folder.name.partition("-")[0]
    if kind not in ("teacher", "plugin") or not (folder / META_FILE).exists():
        return
    config = {key: result.config.get(key) for key in ("task", "backbone", "method", "ratio", "seed")}
    if kind == "teacher":
        config = {key: config[key] for key in ("task", "backbone", "seed")}
    artifact = wandb.Artifact(folder.name, kind, metadata=config)
    if kind == "teacher":
        artifact.add_file(str(folder / META_FILE), skip_cache=True)
    else:
        artifact.add_dir(str(folder), skip_cache=True)
    made = any(stage.artifact == folder.name and not stage.cached for stage in result.training)
    # `use_artifact` refuses to work offline, and waits for the server; this is what it does without either
    run._log_artifact(artifact, is_user_created=not made, use_after_commit=not made)


def _log_result(run: wandb.Run, path: Path, predictions: Path, result: RunResult) -> None:
    import wandb

    facts = {key: result.config.get(key) for key in ("task", "backbone", "method", "ratio", "seed")}
    facts |= {"run_id": result.run_id, "study": result.study, "status": result.status}
    facts["made_with"] = sorted({stage.artifact for stage in result.training})
    artifact = wandb.Artifact(f"result-{result.run_id}", "result", metadata=facts)
    artifact.add_file(str(path), "result.json", skip_cache=True)
    if result.predictions and predictions.exists():
        artifact.add_file(str(predictions), "predictions.parquet", skip_cache=True)
    run.log_artifact(artifact)


if __name__ == "__main__":
    main()
