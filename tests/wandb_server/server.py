"""A stand-in for the W&B server on this machine, which the real ``wandb`` command and library take for one.

It speaks the part of the API that sweeps, agents, runs, artifacts, ``wandb sync`` and ``wandb.Api`` use::

    python -m tests.wandb_server.server STATE PORT_FILE

It has no permissions, registry or reports, and grids alone; a field that it does not know is null.
"""

from __future__ import annotations

import base64
import gzip
import json
import math
import re
import sys
import traceback
from collections.abc import Callable, Mapping
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urlsplit

from tests.wandb_server.graphql import Refused, Request, connection
from tests.wandb_server.grids import find_runs
from tests.wandb_server.state import STREAMS, Record, State, stamp

WRONG_KEY = "f" * 40
"""The one key that the server refuses."""


class Api:
    """The answers to every operation: a record, and what is computed from it."""

    def __init__(self, state: State) -> None:
        self.state = state

    def roots(self, kind: str) -> Mapping[str, Any]:
        if kind == "query":
            return {
                "viewer": self.user(),
                "project": self._project_of,
                "model": self._project_of,
                "serverInfo": {"features": []},
                "entity": lambda a: {"id": a["name"], "name": a["name"], "xxhashDigestsEnabled": False},
                "artifact": lambda a: self.artifact(self.state.artifacts[a["id"]]),
            }
        calls: dict[str, Callable[[Record], Any]] = {
            "upsertBucket": self._upsert_run,
            "upsertSweep": lambda a: {"sweep": self.sweep(self.state.upsert_sweep(a)), "configValidationWarnings": []},
            "createAgent": self.state.create_agent,
            "agentHeartbeat": self.state.agent_heartbeat,
            "createRunFiles": self._create_run_files,
            "createArtifact": self._create_artifact,
            "createArtifactFiles": self._create_artifact_files,
            "createArtifactManifest": self._artifact_manifest,
            "updateArtifactManifest": self._artifact_manifest,
            "commitArtifact": lambda a: {"artifact": self.artifact(self.state.commit_artifact(a["artifactID"]))},
            "useArtifact": lambda a: {
                "artifact": self.artifact(self.state.use_artifact(a["artifactID"], a["runName"]))
            },
        }
        return {name: lambda a, call=call: call(a["input"]) for name, call in calls.items()}

    def user(self) -> Record:
        entity = self.state.entity
        return {
            "id": "1",
            "name": entity,
            "username": entity,
            "entity": entity,
            "flags": "{}",
            "admin": False,
            "apiKeys": {"edges": []},
            "teams": {"edges": [{"node": {"name": entity}}]},
        }

    def _project_of(self, a: Record) -> Record | None:
        return self.project(a.get("entityName") or self.state.entity, a.get("name") or "uncategorized")

    def project(self, entity: str, name: str) -> Record | None:
        """A project exists as soon as a run or a sweep is in it."""
        state = self.state
        runs = [r for r in state.runs.values() if (r["entity"], r["project"]) == (entity, name)]
        sweeps = [s for s in state.sweeps.values() if (s["entity"], s["project"]) == (entity, name)]
        if not runs and not sweeps:
            return None

        def run(a: Record) -> Record | None:
            return (found := state.runs.get(state.run_key(entity, name, a["name"]))) and self.run(found)

        def version_of(collection: str, version: str) -> Record | None:
            found = state.versions(entity, name, collection)
            if version not in ("", "latest"):
                found = [x for x in found if x["version"] == version]
            return self.artifact(found[-1])["artifactMembership"] if found else None

        def collection(a: Record) -> Record:
            def member(b: Record) -> Record | None:
                return version_of(a["name"], b["aliasName"])

            return {"__typename": "ArtifactSequence", "name": a["name"], "artifactMembership": member}

        return {
            "__typename": "Project",
            "id": f"{entity}/{name}",
            "internalId": "1",
            "name": name,
            "entityName": entity,
            "entity": {"id": entity, "name": entity},
            "readOnly": False,
            "isBenchmark": False,
            "user": self.user(),
            "createdAt": (runs or sweeps)[0]["createdAt"],
            "run": run,
            "bucket": run,
            "artifactCollectionMembership": lambda a: version_of(*a["name"].split(":")),
            "artifactCollection": collection,
            "sweep": lambda a: next((self.sweep(s) for s in sweeps if s["id"] == a["sweepName"]), None),
            "runCount": lambda a: len(find_runs(runs, a)),
            "totalSweeps": len(sweeps),
            "runs": lambda a: connection(find_runs(runs, a), a, self.run),
            "sweeps": lambda a: connection(sweeps, a, self.sweep),
        }

    def run(self, run: Record) -> Record:
        rows, events, output = (run["lines"][name] for name in STREAMS.values())
        state = self.state

        def history(low: float = 0, high: float = math.inf, keys: Any = ()) -> list[Record]:
            parsed = map(json.loads, rows)
            return [row for row in parsed if low <= row.get("_step", 0) < high and set(keys) <= set(row)]

        def sampled_all(a: Record) -> list[list[Record]]:
            return [sampled(spec) for spec in ([a["specs"]] if isinstance(a["specs"], str) else a["specs"])]

        def sampled(told: str) -> list[Record]:
            spec = json.loads(told)
            keys = spec.get("keys") or []
            found = history(spec.get("minStep", 0), spec.get("maxStep", math.inf) + 1, keys) if keys else []
            return [{key: row[key] for key in keys} for row in found]

        def made(a: Record) -> Record:
            mine = [x for x in state.versions(run["entity"], run["project"]) if x["run"] == run["id"]]
            return connection(mine, a, self.artifact)

        def used(a: Record) -> Record:
            mine = [x for x in state.versions(run["entity"], run["project"]) if run["id"] in x["usedBy"]]
            return connection(mine, a, self.artifact)

        return {
            **run,
            "__typename": "Run",
            "id": run["key"],
            "name": run["id"],
            "sweepName": run["sweep"],
            "config": json.dumps(run["rawConfig"]),
            "summaryMetrics": json.dumps(run["summary"]),
            "systemMetrics": events[-1] if events else "{}",
            "heartbeatAt": stamp(run["heartbeat"]),
            "historyLineCount": len(rows),
            "eventsLineCount": len(events),
            "logLineCount": len(output),
            "historyTail": json.dumps(rows[-1:]),
            "eventsTail": json.dumps(events[-1:]),
            "projectId": 1,
            "historyKeys": {"lastStep": json.loads(rows[-1]).get("_step", -1) if rows else -1, "keys": {}},
            "history": lambda a: [json.dumps(r) for r in history(a.get("minStep", 0), a.get("maxStep", math.inf))],
            "events": events,
            "parquetHistory": {"parquetUrls": [], "liveData": []},
            "wandbConfig": json.dumps({"t": {}} if "_wandb" in run["rawConfig"] else {}),  # "t": it did start once
            "sampledHistory": sampled_all,
            "project": lambda a: self.project(run["entity"], run["project"]),
            "user": self.user(),
            "readOnly": False,
            "outputArtifacts": made,
            "inputArtifacts": used,
        }

    def sweep(self, sweep: Record) -> Record:
        runs = self.state.runs_of(sweep)
        return {
            **sweep,
            "__typename": "Sweep",
            "name": sweep["id"],
            "method": sweep["config"]["method"],
            "config": sweep["configYaml"],
            "runCount": len(runs),
            "runs": lambda a: connection(runs, a, self.run),
            "project": lambda a: self.project(sweep["entity"], sweep["project"]),
        }

    def artifact(self, artifact: Record) -> Record:
        state, folder = self.state, f"artifacts/{artifact['id']}"
        named = {
            "__typename": "ArtifactSequence",
            "id": artifact["name"],
            "name": artifact["name"],
            "project": {
                "name": artifact["project"],
                "entityName": artifact["entity"],
                "entity": {"name": artifact["entity"]},
                "id": "1",
                "internalId": "1",
            },
        }
        number = int(artifact.get("version", "v0")[1:])
        latest = state.versions(artifact["entity"], artifact["project"], artifact["name"])[-1:] == [artifact]
        alias = {"__typename": "ArtifactAlias", "id": "1", "alias": "latest"}
        kind = {"id": artifact["type"], "name": artifact["type"]}

        def listed(a: Record) -> Record:
            def make(item: tuple[str, Path]) -> Record:
                url = state.url(folder, item[0])
                return {"__typename": "File", "name": item[0], "directUrl": url}

            return connection(list(state.files_of(artifact)), a, make)

        shown: Record = {
            **artifact,
            "__typename": "Artifact",
            "artifactType": kind,
            "artifactSequence": named,
            "versionIndex": number,
            "aliases": [alias | {"artifactCollection": named}] if latest else [],
            "ttlDurationSeconds": 0,
            "ttlIsInherited": True,
            "commitHash": artifact["id"],
            "size": sum(path.stat().st_size for _, path in state.files_of(artifact)),
            "fileCount": len(list(state.files_of(artifact))),
            "tags": [],
            "createdBy": {"__typename": "Run", "name": artifact["run"], "id": artifact["run"]},
            "currentManifest": {"id": artifact["id"], "file": {"directUrl": state.url(folder, "manifest.json")}},
            "files": listed,
        }
        shown["artifactMembership"] = {
            "__typename": "ArtifactCollectionMembership",
            "id": artifact["id"],
            "createdAt": artifact["createdAt"],
            "versionIndex": number,
            "aliases": shown["aliases"],
            "artifactCollection": named,
            "artifact": shown,
            "files": listed,
        }
        return shown

    def _upsert_run(self, a: Record) -> Record:
        run, inserted = self.state.upsert_run(a)
        return {"bucket": self.run(run), "inserted": inserted}

    def _create_run_files(self, a: Record) -> Record:
        key = self.state.run(self.state.run_key(a.get("entityName"), a["projectName"], a["runName"]))["key"]
        files = [{"name": name, "uploadUrl": self.state.url(f"runs/{key}", name)} for name in a["files"]]
        return {"runID": key, "uploadHeaders": [], "files": files}

    def _create_artifact(self, a: Record) -> Record:
        found, latest = self.state.create_artifact(a)
        sequence = {"id": found["name"], "latestArtifact": latest and self.artifact(latest)}
        return {"artifact": {**self.artifact(found), "artifactSequence": sequence}}

    def _use_artifact(self, a: Record) -> Record:
        return {"artifact": self.artifact(self.state.use_artifact(a["artifactID"], a["runName"]))}

    def _artifact_manifest(self, a: Record) -> Record:
        key = a.get("artifactID") or a["artifactManifestID"]
        url = self.state.url(f"artifacts/{key}", "manifest.json")
        return {"artifactManifest": {"id": key, "file": {"id": key, "uploadHeaders": [], "uploadUrl": url}}}

    def _create_artifact_files(self, a: Record) -> Record:
        def make(f: Record) -> Record:
            url = self.state.url(f"artifacts/{f['artifactID']}", f["name"])
            return {
                "storagePath": f["name"],
                "uploadHeaders": [],
                "uploadUrl": url,
                "artifact": {"id": f["artifactID"]},
            }

        return {"files": connection(a["artifactFiles"], {}, make)}


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    state: State
    api: Api

    def log_message(self, format: str, *args: Any) -> None:
        pass

    def _dispatch(self, path: str, body: bytes, note: Record) -> Any:
        """Return the answer to one request: bytes, or what will be JSON."""
        if path.startswith("/storage/"):  # addresses of files need no key, as at W&B
            file = self.state.file(path)
            if self.command == "PUT":
                self.state.write(file, body)
                return b""
            if file.is_file():
                return file.read_bytes()
        stream = re.fullmatch(r"/files/([^/]+)/([^/]+)/([^/]+)/file_stream", path)
        if path != "/graphql" and not stream:  # telemetry too: at a 404 the client leaves it off
            raise Refused("no such file or endpoint", 404)
        told = self.headers.get("Authorization", "")
        if not told or WRONG_KEY in base64.b64decode(told.partition(" ")[2] + "==").decode(errors="replace"):
            raise Refused("user is not logged in", 401)
        content = json.loads(body or b"{}")
        with self.state.lock:
            self.state.base = "http://" + self.headers.get("Host", "127.0.0.1")
            if stream:
                return self.state.file_stream(self.state.run_key(*map(unquote, stream.groups())), content)
            request = Request(content["query"], content.get("variables"))
            note.update(operation=request.name, variables=content.get("variables"))
            return {"data": request.answer(self.api.roots(request.kind))}

    def _route(self) -> None:
        note: Record = {}
        status = 200
        body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        body = gzip.decompress(body) if self.headers.get("Content-Encoding") == "gzip" else body
        try:
            answer = self._dispatch(urlsplit(self.path).path, body, note)
        except Refused as error:
            note["error"], status = (*error.args, 400)[:2]
        except Exception as error:  # never a 5xx: the client would try it again for a long time
            traceback.print_exc()
            note["error"], status = repr(error), 400
        if status != 200:
            answer = {"errors": [{"message": note["error"], "path": []}], "data": None}
        data = answer if isinstance(answer, bytes) else json.dumps(answer).encode()
        with self.state.lock, (self.state.root / "requests.jsonl").open("a") as file:
            file.write(json.dumps({"method": self.command, "path": self.path, "status": status, **note}) + "\n")
        self.send_response(status)
        self.send_header("Content-Type", "application/octet-stream" if data is answer else "application/json")
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)

    do_GET = do_POST = do_PUT = _route


class _Server(ThreadingHTTPServer):
    daemon_threads = True

    def service_actions(self) -> None:  # twice a second
        Handler.state.tick()

    def handle_error(self, request: Any, client_address: Any) -> None:
        pass  # a client that hung up


def main(folder: str, port_file: str, port: str = "0") -> None:
    """Serve at a free port, which is written to a file once it listens."""
    Handler.state = State(Path(folder))
    Handler.api = Api(Handler.state)
    server = _Server(("127.0.0.1", int(port)), Handler)
    Handler.state.write(Path(port_file), str(server.server_port))
    server.serve_forever()


if __name__ == "__main__":
    main(*sys.argv[1:])
