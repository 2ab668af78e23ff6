"""What the stand-in of the Hub knows, in a folder: repositories, their commits, and blobs by their hash."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

Record = dict[str, Any]
WRITER, READER, STRANGER = "hf_writer", "hf_reader", "hf_stranger"
ACCOUNTS = {WRITER: ("me", True), READER: ("me", False), STRANGER: ("you", True)}
"""Token -> user, and whether it may write."""


class State:
    """Kept on disk alone, so that a test can look at it, and change it, while the server runs."""

    def __init__(self, root: Path) -> None:
        self.root = root
        (root / "blobs").mkdir(parents=True, exist_ok=True)

    def repos(self) -> dict[str, Record]:
        """Return every repository, by ``models/USER/NAME`` or ``datasets/USER/NAME``."""
        path = self.root / "repos.json"
        return json.loads(path.read_text()) if path.exists() else {}

    def save(self, repos: dict[str, Record]) -> None:
        """Write the repositories whole."""
        part = self.root / "repos.part"
        part.write_text(json.dumps(repos))
        os.replace(part, self.root / "repos.json")

    def create(self, key: str, private: bool) -> bool:
        """Make a repository with one empty commit; return whether it is new."""
        repos = self.repos()
        if key in repos:
            return False
        repos[key] = {"private": private, "commits": [], "refs": {}}
        self._commit(repos[key], {}, "initial commit")
        self.save(repos)
        return True

    def commit(self, key: str, files: Mapping[str, bytes | str | None], message: str) -> str:
        """Add a commit: path -> content, the hash of a blob that is here, or ``None`` to remove it."""
        repos = self.repos()
        tree = dict(repos[key]["commits"][-1]["files"])
        for path, content in files.items():
            if content is None:
                tree.pop(path, None)
                continue
            oid = self.store(content) if isinstance(content, bytes) else content
            size = self.blob(oid).stat().st_size
            tree[path] = {"oid": oid, "size": size, "lfs": isinstance(content, str)}
        sha = self._commit(repos[key], tree, message)
        self.save(repos)
        return sha

    def _commit(self, repo: Record, tree: Record, message: str) -> str:
        known = json.dumps([repo["commits"], tree, message], sort_keys=True)
        sha = hashlib.sha1(known.encode()).hexdigest()
        repo["commits"].append({"sha": sha, "files": tree, "message": message})
        repo["refs"]["main"] = sha
        return sha

    def tag(self, key: str, name: str, sha: str) -> None:
        """Give a commit a name."""
        repos = self.repos()
        repos[key]["refs"][name] = sha
        self.save(repos)

    def store(self, content: bytes) -> str:
        """Keep a blob, and return its hash."""
        oid = hashlib.sha256(content).hexdigest()
        self.blob(oid).write_bytes(content)
        return oid

    def blob(self, oid: str) -> Path:
        """Where a blob is."""
        return self.root / "blobs" / oid

    def files(self, key: str) -> dict[str, bytes]:
        """Return the files of the newest commit."""
        return {path: self.blob(f["oid"]).read_bytes() for path, f in self.repos()[key]["commits"][-1]["files"].items()}

    def commits(self, key: str) -> list[str]:
        """Return the messages of the commits, oldest first."""
        return [commit["message"] for commit in self.repos()[key]["commits"]]

    def requests(self) -> list[Record]:
        """Return what was asked so far."""
        path = self.root / "requests.jsonl"
        return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []

    def refuse(self, word: str | None, status: int = 500) -> None:
        """Let every request whose path has ``word`` in it fail from now on; ``None`` ends that."""
        (self.root / "refuse.json").write_text(json.dumps([word, status]))

    def refused(self, path: str) -> int | None:
        """Return the status that a path is refused with, or ``None``."""
        file = self.root / "refuse.json"
        word, status = json.loads(file.read_text()) if file.exists() else (None, 0)
        return status if word and word in path else None
