"""What the server knows: plain files, written as requests come in and read again at its start.

::

    sweeps/SWEEP.json                              config, state, agents, its runs
    runs/ENTITY/PROJECT/RUN/run.json               state, exit code, config, summary, ...
    runs/ENTITY/PROJECT/RUN/{history,events}.jsonl, output.log, files/...
    artifacts/ID/artifact.json, manifest.json, files/...
"""

from __future__ import annotations

import datetime
import itertools
import json
import math
import random
import re
import string
import threading
import time
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any
from urllib.parse import quote, unquote

import yaml

from tests.wandb_server.graphql import Refused
from tests.wandb_server.grids import check_sweep, grid_points, plain

Record = dict[str, Any]

TERMINAL = ("finished", "failed", "crashed", "killed")
STREAMS = {"wandb-history.jsonl": "history.jsonl", "wandb-events.jsonl": "events.jsonl", "output.log": "output.log"}
RUN_FIELDS = {
    "displayName": "displayName",
    "groupName": "group",
    "jobType": "jobType",
    "notes": "notes",
    "tags": "tags",
    "host": "host",
    "commit": "commit",
    "jobProgram": "program",
    "jobRepo": "repo",
}
LOST_SECONDS = 3.0
"""Until a run counts as crashed once its agent no longer has it; W&B waits minutes."""


def load_runs(root: Path) -> list[Record]:
    """Return every run in a state folder, with its history as a list of rows."""
    found = []
    for path in root.glob("runs/*/*/*/run.json"):
        lines = path.with_name("history.jsonl")
        rows = [json.loads(line) for line in lines.read_text().splitlines()] if lines.exists() else []
        found.append({**json.loads(path.read_text()), "history": rows})
    return sorted(found, key=lambda run: run["createdAt"])


def load_artifacts(root: Path) -> list[Record]:
    """Return every artifact in a state folder, oldest first."""
    found = [json.loads(path.read_text()) for path in root.glob("artifacts/*/artifact.json")]
    return sorted(found, key=lambda artifact: artifact["createdAt"])


class State:
    """The records, in memory and on disk, and what changes them."""

    def __init__(self, root: Path, entity: str = "loopback", timeout: float = 300.0) -> None:
        self.root, self.entity, self.timeout, self.base = root, entity, timeout, ""
        self.lock = threading.RLock()
        root.mkdir(parents=True, exist_ok=True)
        self.runs = {run["key"]: run for run in load_runs(root)}
        for run in self.runs.values():
            paths = {name: root / "runs" / run["key"] / name for name in STREAMS.values()}
            run["lines"] = {n: p.read_text().splitlines() if p.exists() else [] for n, p in paths.items()}
            del run["history"]
        self.sweeps = {p.stem: json.loads(p.read_text()) for p in root.glob("sweeps/*.json")}
        self.artifacts = {artifact["id"]: artifact for artifact in load_artifacts(root)}

    def write(self, path: Path, data: str | bytes) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        part = path.with_name(f"{path.name}.{threading.get_ident()}.tmp")
        part.write_bytes(data.encode() if isinstance(data, str) else data)
        part.replace(path)

    def save(self, path: str, record: Mapping[str, Any]) -> None:
        self.write(self.root / path, json.dumps(record, indent=1))

    def url(self, folder: str, name: str) -> str:
        return f"{self.base}/storage/{folder}/{quote(name)}"

    def file(self, path: str) -> Path:
        """Return the file behind ``/storage/...``, in the ``files`` of a run or an artifact and nowhere else."""
        found = re.fullmatch(r"/storage/((?:runs/[^/.][^/]*/[^/.][^/]*|artifacts)/[^/.][^/]*)/(.+)", path)
        names = [unquote(n) for n in found[2].split("/")] if found else [".."]
        if not found or any(n in ("", ".", "..") or "/" in n for n in names) or not (self.root / found[1]).is_dir():
            raise Refused("no such file", 404)
        manifest = found[1].startswith("artifacts/") and names == ["manifest.json"]
        return (self.root / found[1]).joinpath(*([] if manifest else ["files"]), *names)

    # runs

    def run_key(self, entity: str | None, project: str | None, run_id: str) -> str:
        return "/".join(map(_safe, (entity or self.entity, project or "uncategorized", run_id)))

    def run(self, key: str) -> Record:
        if key not in self.runs:
            raise Refused("run not found", 404)
        return self.runs[key]

    def runs_of(self, sweep: Record) -> list[Record]:
        return [self.runs[key] for key in sweep["runs"] if key in self.runs]

    def make_run(
        self,
        entity: str | None,
        project: str | None,
        run_id: str,
        state: str,
        sweep: str | None = None,
        config: Record | None = None,
    ) -> Record:
        key = self.run_key(entity, project, run_id)
        self.runs[key] = {
            "id": run_id,
            "entity": entity or self.entity,
            "project": project or "uncategorized",
            "key": key,
            "displayName": f"loopback-{len(self.runs) + 1}",
            "sweep": sweep,
            "agent": None,
            "state": state,
            "exitcode": None,
            "createdAt": stamp(),
            "finishedAt": None,
            "heartbeat": time.time(),
            "lostAfter": None,
            "shouldStop": False,
            "tags": [],
            "summary": {},
            "rawConfig": config or {},
            "lines": {name: [] for name in STREAMS.values()},
        }
        return self.runs[key]

    def update(self, run: Record, **fields: Any) -> None:
        run.update(fields)
        shown = {k: v for k, v in run.items() if k != "lines"}
        shown |= {"config": plain(run["rawConfig"]), "historyLines": len(run["lines"]["history.jsonl"])}
        self.save(f"runs/{run['key']}/run.json", shown)

    def tick(self) -> None:
        """End the runs that nobody hears from, and the sweeps whose runs have ended."""
        with self.lock:
            for run in self.runs.values():
                silent = run["state"] == "running" and time.time() - run["heartbeat"] > self.timeout
                if silent or (run["state"] not in TERMINAL and time.time() > (run["lostAfter"] or math.inf)):
                    self.update(run, state="killed" if run["shouldStop"] else "crashed", finishedAt=stamp())
            for sweep in self.sweeps.values():
                ended = all(run["state"] in TERMINAL for run in self.runs_of(sweep))
                if sweep["state"] == "RUNNING" and sweep["exhausted"] and ended:
                    sweep["state"] = "FINISHED"
                    self.save(f"sweeps/{sweep['id']}.json", sweep)

    def upsert_run(self, given: Record) -> tuple[Record, bool]:
        """Make a run or change it; return it, and whether it is new."""
        name = given.get("name") or new_id()
        key = given.get("id") or self.run_key(given.get("entityName"), given.get("modelName"), name)
        inserted = key not in self.runs and not given.get("id")
        if inserted:
            run = self.make_run(given.get("entityName"), given.get("modelName"), name, "running")
        else:
            run = self.run(key)
        run["state"] = "running" if run["state"] == "pending" else run["state"]
        for told, field in (("config", "rawConfig"), ("summaryMetrics", "summary")):
            run[field] = json.loads(given[told]) if given.get(told) else run[field]
        run.update({field: given[told] for told, field in RUN_FIELDS.items() if given.get(told) is not None})
        self.update(run, heartbeat=time.time())
        return run, inserted

    def file_stream(self, key: str, body: Record) -> Record:
        """Take in lines of history, events and console, the summary, and the end of a run."""
        run = self.run(key)
        run["heartbeat"] = time.time()
        for name, chunk in (body.get("files") or {}).items():
            content = [line.rstrip("\n") for line in chunk.get("content") or []]
            if name == "wandb-summary.json" and content:
                run["summary"] = json.loads(content[-1])
            if name in STREAMS:
                lines, offset = run["lines"][STREAMS[name]], int(chunk.get("offset") or 0)
                lines.extend([""] * (offset - len(lines)))
                lines[offset : offset + len(content)] = content
                self.write(self.root / "runs" / key / STREAMS[name], "".join(f"{line}\n" for line in lines))
        if body.get("complete"):
            code = body.get("exitcode") or 0
            state = {0: "finished", 255: "killed"}.get(code, "failed")  # 255: KeyboardInterrupt
            self.update(run, state=state, exitcode=code, finishedAt=stamp())
        elif body.get("files"):
            self.update(run, state="running", finishedAt=None, lostAfter=None)
        else:
            self.update(run)
        return {"exitcode": run["exitcode"], "stopped": run["shouldStop"], "limits": {}}

    # sweeps

    def upsert_sweep(self, given: Record) -> Record:
        sweep = self.sweeps.get(given.get("id") or "")
        if given.get("id") and sweep is None:
            raise Refused("sweep not found", 404)
        if sweep is None:
            check_sweep(yaml.safe_load(given.get("config") or ""))
            sweep = {
                "id": new_id(),
                "entity": given.get("entityName") or self.entity,
                "project": given.get("projectName") or "uncategorized",
                "state": "RUNNING",
                "next": 0,
                "createdAt": stamp(),
                "runs": [],
                "agents": {},
                "exhausted": False,
            }
            self.sweeps[sweep["id"]] = sweep
        if given.get("config"):
            config = yaml.safe_load(given["config"])
            check_sweep(config)
            points = math.prod(len(p.get("values", [0])) for p in config["parameters"].values())
            sweep.update(config=config, configYaml=given["config"], runCountExpected=points)
        sweep["state"] = given.get("state") or sweep["state"]
        sweep["displayName"] = given.get("displayName") or sweep.get("displayName")
        self.save(f"sweeps/{sweep['id']}.json", sweep)
        return sweep

    def create_agent(self, given: Record) -> Record:
        if (sweep := self.sweeps.get(given["sweep"])) is None:
            raise Refused(f"could not find sweep {given['sweep']}", 404)
        agent = {"id": new_id(12), "host": given.get("host"), "createdAt": stamp()}
        sweep["agents"][agent["id"]] = agent
        self.save(f"sweeps/{sweep['id']}.json", sweep)
        return {"agent": agent}

    def agent_heartbeat(self, given: Record) -> Record:
        """Tell an agent what to do next: start a run, stop one, exit, or nothing yet."""
        sweep = next((s for s in self.sweeps.values() if given["id"] in s["agents"]), None)
        if sweep is None:
            raise Refused("agent not found", 404)
        alive = json.loads(given.get("runState") or "{}")
        mine = [run for run in self.runs_of(sweep) if run["agent"] == given["id"]]
        for run in mine:
            if run["id"] in alive and sweep["state"] == "CANCELED":
                self.update(run, shouldStop=True)
            if run["state"] not in TERMINAL and run["id"] not in alive:  # its last words may be on the way
                run["lostAfter"] = run["lostAfter"] or time.time() + LOST_SECONDS
        orders = [{"type": "stop", "run_id": r["id"]} for r in mine if r["id"] in alive and r["shouldStop"]]
        if not alive and sweep["state"] == "RUNNING" and (run := self._next_run(sweep)):
            self.update(run, agent=given["id"])
            program = sweep["config"].get("program")
            orders = [{"type": "run", "run_id": run["id"], "program": program, "args": run["rawConfig"]}]
        if not alive and not orders and (sweep["exhausted"] or sweep["state"] in ("FINISHED", "CANCELED")):
            orders = [{"type": "exit"}]
        self.save(f"sweeps/{sweep['id']}.json", sweep)
        return {"agent": {"id": given["id"]}, "commands": json.dumps(orders)}

    def _next_run(self, sweep: Record) -> Record | None:
        """Return the next point of the grid as a pending run, or ``None`` when there are no more."""
        config = sweep["config"]
        point = None
        if len(sweep["runs"]) < config.get("run_cap", math.inf):
            point = next(itertools.islice(grid_points(config), sweep["next"], None), None)
        sweep["exhausted"], sweep["next"] = point is None, sweep["next"] + 1
        if point is None:
            return None
        run = self.make_run(sweep["entity"], sweep["project"], new_id(), "pending", sweep["id"], point)
        sweep["runs"].append(run["key"])
        return run

    # artifacts

    def create_artifact(self, given: Record) -> tuple[Record, Record | None]:
        """Return an artifact to fill, or the version there is of the same content; and the latest before it."""
        name = (given.get("artifactCollectionNames") or [given.get("artifactCollectionName")])[0]
        found = {
            "id": new_id(16),
            "entity": given.get("entityName") or self.entity,
            "project": given.get("projectName"),
            "name": name,
            "state": "PENDING",
            "type": given.get("artifactTypeName"),
            "run": given.get("runName"),
            "usedBy": [],
            "digest": given.get("digest"),
            "metadata": given.get("metadata"),
            "createdAt": stamp(),
        }
        older = self.versions(found["entity"], found["project"], name)
        if same := next((a for a in older if a["digest"] == found["digest"]), None):
            return same, older[-1]
        self.artifacts[found["id"]] = found
        self.save(f"artifacts/{found['id']}/artifact.json", found)
        return found, older[-1] if older else None

    def versions(self, entity: str, project: str, name: str | None = None) -> list[Record]:
        """Return the committed versions of an artifact, or of all of a project, oldest first."""
        return [
            a
            for a in self.artifacts.values()
            if (a["entity"], a["project"], a["state"]) == (entity, project, "COMMITTED") and name in (None, a["name"])
        ]

    def commit_artifact(self, artifact_id: str) -> Record:
        found = self.artifacts[artifact_id]
        if found["state"] != "COMMITTED":
            number = len(self.versions(found["entity"], found["project"], found["name"]))
            found.update(state="COMMITTED", version=f"v{number}")
        self.save(f"artifacts/{artifact_id}/artifact.json", found)
        return found

    def use_artifact(self, artifact_id: str, run: str) -> Record:
        found = self.artifacts[artifact_id]
        found["usedBy"] = sorted({*found["usedBy"], run})
        self.save(f"artifacts/{artifact_id}/artifact.json", found)
        return found

    def manifest(self, artifact: Record) -> Record:
        """Return the manifest that the client has written."""
        found: Record = json.loads((self.root / "artifacts" / artifact["id"] / "manifest.json").read_text())
        return found

    def files_of(self, artifact: Record) -> Iterable[tuple[str, Path]]:
        folder = self.root / "artifacts" / artifact["id"] / "files"
        return [(str(p.relative_to(folder)), p) for p in sorted(folder.rglob("*")) if p.is_file()]


def stamp(at: float | None = None) -> str:
    when = datetime.datetime.fromtimestamp(time.time() if at is None else at, datetime.UTC)
    return when.isoformat(timespec="microseconds").replace("+00:00", "Z")


def new_id(length: int = 8) -> str:
    return "".join(random.SystemRandom().choices(string.ascii_lowercase + string.digits, k=length))


def _safe(name: object) -> str:
    """Return one part of a path from a name that came in with a request."""
    quoted = quote(str(name), safe="")
    return "%2E" + quoted[1:] if quoted.startswith(".") else quoted
