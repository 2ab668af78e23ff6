"""A stand-in for the Hugging Face Hub on this machine, which the real `huggingface_hub` takes for one.

It speaks the part of the API that a repository needs to be made, committed to, listed and read::

    python -m tests.hub_server.server STATE PORT_FILE

It has no pull requests, branches to push to, Xet storage, or search. As on the Hub, a private repository does not exist
for others.
"""

from __future__ import annotations

import base64
import json
import re
import sys
import threading
import traceback
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urlsplit

import yaml

from tests.hub_server.state import ACCOUNTS, Record, State

BINARY = (".safetensors", ".parquet", ".png", ".pdf", ".pkl", ".bin")
"""What goes by LFS; the rest is sent inside the commit."""


class Refused(Exception):
    """An answer that is an error."""

    def __init__(self, status: int, message: str, code: str = "", **more: str) -> None:
        super().__init__(message)
        self.status, self.code, self.answer = status, code, {"error": message, **more}


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    state: State
    lock = threading.RLock()

    def log_message(self, format: str, *args: Any) -> None:
        pass

    @property
    def base(self) -> str:
        return f"http://{self.headers['Host']}"

    def _user(self) -> tuple[str | None, bool]:
        told = self.headers.get("Authorization", "").removeprefix("Bearer ")
        if told and told not in ACCOUNTS:
            raise Refused(401, "Invalid credentials in Authorization header")
        return ACCOUNTS.get(told, (None, False))

    def _repo(self, key: str) -> Record:
        """Return a repository that this user may see."""
        user, _ = self._user()
        repo = self.state.repos().get(key)
        if repo is None or (repo["private"] and key.split("/")[1] != user):
            raise Refused(404 if user else 401, "Repository not found", "RepoNotFound")
        return repo

    def _may_write(self, owner: str) -> None:
        user, writes = self._user()
        if user is None:
            raise Refused(401, "Invalid username or password.")
        if not writes or owner != user:
            raise Refused(403, "You don't have the rights to create or change a repo under this namespace")

    def _commit_of(self, key: str, revision: str) -> Record:
        repo = self._repo(key)
        sha = repo["refs"].get(revision, revision)
        for commit in repo["commits"]:
            if commit["sha"] == sha:
                return commit
        raise Refused(404, f"Invalid rev id: {revision}", "RevisionNotFound")

    def _dispatch(self, path: str, body: bytes) -> Any:
        if status := self.state.refused(path):
            raise Refused(status, "as the test wants it")
        if found := re.fullmatch(r"/lfs/([0-9a-f]{64})", path):  # its address is all that is needed, as at S3
            return self._blob(found[1], body)
        if path == "/lfs/verify":
            told = json.loads(body)
            if not self.state.blob(told["oid"]).is_file():
                raise Refused(422, "not uploaded")
            return {}
        if path == "/api/validate-yaml":
            return self._validate(json.loads(body))
        if path == "/api/repos/create":
            return self._create(json.loads(body))
        api = re.fullmatch(r"/api/(models|datasets)/([^/]+/[^/]+)(?:/(revision|tree|preupload|commit)/(.+))?", path)
        if api:
            kind, name, what, rest = api.groups()
            answer = {None: self._info, "revision": self._info, "tree": self._tree, "preupload": self._preupload,
                      "commit": self._take}[what]  # fmt: skip
            return answer(f"{kind}/{name}", unquote(rest or "main"), body)
        if batch := re.fullmatch(r"/(datasets/)?([^/]+/[^/]+)\.git/info/lfs/objects/batch", path):
            return self._batch(batch[2], json.loads(body))
        if file := re.fullmatch(r"/(datasets/)?([^/]+/[^/]+)/resolve/([^/]+)/(.+)", path):
            key = f"{(file[1] or 'models/').strip('/')}/{file[2]}"
            return self._resolve(key, unquote(file[3]), unquote(file[4]))
        raise Refused(404, "no such endpoint")

    def _create(self, a: Record) -> Any:
        owner = a.get("organization") or self._user()[0]
        self._may_write(owner)
        key = f"{a.get('type') or 'model'}s/{owner}/{a['name']}"
        private = a.get("private", a.get("visibility") == "private")
        url = f"{self.base}/{key.removeprefix('models/')}"
        if not self.state.create(key, private):
            raise Refused(409, "You already created this repo", url=url)
        return {"url": url, "name": f"{owner}/{a['name']}"}

    def _info(self, key: str, revision: str, body: bytes) -> Any:
        commit, repo = self._commit_of(key, revision), self._repo(key)
        name = key.split("/", 1)[1]
        return {
            "_id": "1",
            "id": name,
            "sha": commit["sha"],
            "private": repo["private"],
            "tags": [],
            "downloads": 0,
            "likes": 0,
            "siblings": [{"rfilename": path} for path in commit["files"]],
        }

    def _tree(self, key: str, rest: str, body: bytes) -> Any:
        commit = self._commit_of(key, rest.split("/")[0])
        return [
            {
                "type": "file",
                "path": path,
                "size": file["size"],
                "oid": file["oid"][:40],
                **({"lfs": {"oid": file["oid"], "size": file["size"], "pointerSize": 130}} if file["lfs"] else {}),
            }
            for path, file in commit["files"].items()
        ]

    def _preupload(self, key: str, revision: str, body: bytes) -> Any:
        self._may_write(key.split("/")[1])
        files, here = json.loads(body)["files"], self._commit_of(key, revision)["files"]
        return {
            "files": [
                {
                    "path": file["path"],
                    "uploadMode": "lfs" if file["path"].endswith(BINARY) else "regular",
                    "shouldIgnore": False,
                    "oid": here.get(file["path"], {}).get("oid"),
                }
                for file in files
            ]
        }

    def _batch(self, name: str, a: Record) -> Any:
        self._may_write(name.split("/")[0])
        objects = []
        for wanted in a["objects"]:
            one = {"oid": wanted["oid"], "size": wanted["size"]}
            if not self.state.blob(wanted["oid"]).is_file():
                one["actions"] = {
                    "upload": {"href": f"{self.base}/lfs/{wanted['oid']}"},
                    "verify": {"href": f"{self.base}/lfs/verify"},
                }
            objects.append(one)
        return {"transfer": "basic", "objects": objects}

    def _blob(self, oid: str, body: bytes) -> Any:
        if self.command == "PUT":
            if self.state.store(body) != oid:
                raise Refused(400, "the content is not what its hash says")
            return b""
        return self.state.blob(oid).read_bytes()

    def _take(self, key: str, revision: str, body: bytes) -> Any:
        self._may_write(key.split("/")[1])
        header, files = {}, {}
        for line in map(json.loads, body.splitlines()):
            value = line["value"]
            if line["key"] == "header":
                header = value
            elif line["key"] == "file":
                files[value["path"]] = base64.b64decode(value["content"])
            elif line["key"] == "lfsFile":
                if not self.state.blob(value["oid"]).is_file():
                    raise Refused(400, "an LFS file was not uploaded")
                files[value["path"]] = value["oid"]
            elif line["key"] == "deletedFile":
                files[value["path"]] = None
        sha = self.state.commit(key, files, header["summary"])
        return {"commitUrl": f"{self.base}/{key}/commit/{sha}", "commitOid": sha, "pullRequestUrl": None}

    def _resolve(self, key: str, revision: str, path: str) -> Any:
        commit = self._commit_of(key, revision)
        if path not in commit["files"]:
            raise Refused(404, "Entry not found", "EntryNotFound")
        file = commit["files"][path]
        headers = {"ETag": f'"{file["oid"]}"', "X-Repo-Commit": commit["sha"]}
        return self.state.blob(file["oid"]).read_bytes(), headers

    def _validate(self, a: Record) -> Any:
        """Read a card's front matter as the Hub does, in the parts that it is strict about."""
        found = re.match(r"---\n(.*?)\n---", a["content"], re.DOTALL)
        data = yaml.safe_load(found[1]) if found else {}
        errors = [] if "license" in data else ["license is missing"]
        for entry in data.get("model-index", []):
            for result in entry["results"]:
                errors += [f"model-index lacks {part}" for part in ("task", "dataset", "metrics") if part not in result]
        return {"errors": [{"message": error} for error in errors], "warnings": []}

    def _route(self) -> None:
        length = int(self.headers.get("Content-Length") or 0)
        if self.headers.get("Transfer-Encoding") == "chunked":
            body = b"".join(iter(self._chunk, b""))
        else:
            body = self.rfile.read(length)
        path, status, headers, code = urlsplit(self.path).path, 200, dict[str, str](), ""
        with self.lock:
            try:
                answer = self._dispatch(path, body)
            except Refused as error:
                status, code, answer = error.status, error.code, error.answer
            except Exception:
                traceback.print_exc()
                status, answer = 400, {"error": traceback.format_exc(limit=1)}
            with (self.state.root / "requests.jsonl").open("a") as log:
                log.write(
                    json.dumps({"method": self.command, "path": path, "status": status, "bytes": len(body)}) + "\n"
                )
        if isinstance(answer, tuple):
            answer, headers = answer
        data = answer if isinstance(answer, bytes) else json.dumps(answer).encode()
        self.send_response(status)
        if code:
            headers["X-Error-Code"] = code
        if status >= 400:
            headers["X-Error-Message"] = str(json.loads(data)["error"]).splitlines()[0]
        headers.setdefault("Content-Type", "application/octet-stream" if data is answer else "application/json")
        for name, value in (headers | {"Content-Length": str(len(data))}).items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(data)

    def _chunk(self) -> bytes:
        size = int(self.rfile.readline(), 16)
        data = self.rfile.read(size)
        self.rfile.readline()
        return data

    do_GET = do_POST = do_PUT = do_HEAD = _route


class _Server(ThreadingHTTPServer):
    daemon_threads = True

    def handle_error(self, request: Any, client_address: Any) -> None:
        pass  # a client that hung up


def main(folder: str, port_file: str) -> None:
    """Serve at a free port, which is written to a file once it listens."""
    Handler.state = State(Path(folder))
    server = _Server(("127.0.0.1", 0), Handler)
    part = Path(port_file).with_suffix(".part")
    part.write_text(str(server.server_port))
    part.rename(port_file)
    server.serve_forever()


if __name__ == "__main__":
    main(*sys.argv[1:])
