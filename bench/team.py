"""The processes that train the cells of one command together: the first leads, the others follow.

The leader runs the command as it would alone. It alone reads and writes results, holds locks, prints, evaluates and
measures; before it trains it says which cell, and the others come along (`bench.execution.follow`). What it decides on
the way, it says through the store by which the processes found each other and not by a collective: that takes no GPU,
may take hours, and is there also where one of them has failed. Imports no torch.
"""

from __future__ import annotations

import dataclasses
import json
import os
import tempfile
import threading
import time
import traceback
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from bench.artifacts import Artifact, ArtifactCache
from bench.errors import BenchError, MachineError

if TYPE_CHECKING:
    from bench.training.parallel import Ranks

GRACE = 20.0
"""Seconds after a process has failed in which the others fail likewise, or are stuck waiting for it."""
COLLECTIVE_SECONDS = 600
"""Longest that a process waits for the others in a sum, which all reach within the time of a step."""
_POLL = 0.02

_team: Team | None = None


def processes() -> int:
    """Return how many processes were launched together for this command."""
    return int(os.environ.get("WORLD_SIZE", "1"))


def current() -> Team | None:
    """Return the team that this process is of, or ``None`` where it is alone."""
    return _team


class _Abandoned(Exception):
    """The leader does not go on with the cell."""


class Team:
    """The processes of one command.

    Parameters
    ----------
    connect
        Opens a connection of its own to the store that all share.
    ranks
        Who they are.
    """

    def __init__(self, connect: Callable[[], Any], ranks: Ranks) -> None:
        self.connect, self.ranks, self.rank, self.size = connect, ranks, ranks.rank, ranks.size
        self._store = connect()
        self._said = self._cell = 0
        self._inside = False

    def tell(self, kind: str, **what: Any) -> None:
        """Say something to all followers."""
        self._store.set(f"said/{self._said}", json.dumps({"kind": kind, **what}))
        self._said += 1

    def hear(self, *kinds: str) -> dict[str, Any]:
        """Wait for what the leader says next."""
        key = f"said/{self._said}"
        while not self._store.check([key]):
            # what a leader has failed in, it says nothing more of
            if self._inside and self._failures(self._store):
                raise _Abandoned
            time.sleep(_POLL)
        said: dict[str, Any] = json.loads(self._store.get(key))
        if said["kind"] not in kinds:
            raise _Abandoned
        self._said += 1
        return said

    @contextmanager
    def leading(self, lost: Callable[[str], None], **cell: Any) -> Iterator[None]:
        """Let the others come along with a cell for the length of a ``with`` block.

        Parameters
        ----------
        lost
            Called with the reason, from another thread, where another process has failed alone: this one may wait for
            it in a sum and cannot be woken, so that it ends for good once ``lost`` returns.
        cell
            What the others need to know.
        """
        self._cell += 1
        self.tell("cell", **cell)
        with self._together(lost):
            try:
                yield
            except BenchError:
                raise  # in which all fail alike
            except Exception:
                # where another process has died, the launcher ends this one meanwhile and no failure is put down
                self._fail()
                until = time.monotonic() + GRACE
                while self._failures(self._store) < self.size and time.monotonic() < until:
                    time.sleep(_POLL)
                raise

    def follow(self, run: Callable[[dict[str, Any]], None]) -> None:
        """Come along with every cell of the leader's until it is done; ``run`` is called with what it said of each."""
        while (said := self._next())["kind"] == "cell":
            self._cell += 1
            try:
                with self._together(lambda _: None):
                    run(said)
            except _Abandoned:
                pass
            except BenchError:
                pass  # in which all fail alike
            except Exception:  # which the leader, if it does not fail alike, puts down
                self._store.set(f"reason/{self._cell}", f"process {self.rank}: {traceback.format_exc()}")

    def _next(self) -> dict[str, Any]:
        while True:
            try:
                return self.hear("cell", "end")
            except _Abandoned:  # said of a cell that this process has left
                self._said += 1

    @contextmanager
    def _together(self, lost: Callable[[str], None]) -> Iterator[None]:
        ended = threading.Event()
        threading.Thread(target=self._watch, args=(self.connect(), ended, lost), daemon=True).start()
        self._inside = True
        try:
            yield
        except BaseException as error:
            if not isinstance(error, _Abandoned):
                self._fail()
            raise
        finally:
            self._inside = False
            ended.set()

    def _fail(self) -> None:
        self._store.set(f"failed/{self._cell}/{self.rank}", "")

    def _failures(self, store: Any) -> int:
        return sum(store.check([f"failed/{self._cell}/{rank}"]) for rank in range(self.size))

    def _watch(self, store: Any, ended: threading.Event, lost: Callable[[str], None]) -> None:
        """End this process if it is in the cell for long after another has failed in it."""
        while not ended.wait(0.2):
            if self._failures(store):
                if not ended.wait(GRACE):
                    key = f"reason/{self._cell}"
                    lost(store.get(key).decode() if store.check([key]) else "another process of this run has failed")
                    os._exit(1)
                return


class TeamCache(ArtifactCache):
    """The cache as all processes of a team use it: the leader finds or makes, the others make along with it.

    Parameters
    ----------
    root
        The cache's folder, which all of them can read.
    team
        Who they are.
    """

    def __init__(self, root: Path, team: Team) -> None:
        super().__init__(root)
        self.team = team

    def get(
        self,
        kind: str,
        identity: Mapping[str, Any],
        make: Callable[[Path, Path], Mapping[str, Any]],
        waiting: Callable[[str], None] = lambda message: None,
    ) -> Artifact:
        """Return the artifact, made by all together if it is not there."""
        if self.team.rank:
            return self._along(kind, identity, make)

        def make_together(folder: Path, checkpoint: Path) -> Mapping[str, Any]:
            self.team.tell("make")
            return make(folder, checkpoint)

        found = super().get(kind, identity, make_together, waiting)
        self.team.tell("made")
        return found

    def _along(
        self, kind: str, identity: Mapping[str, Any], make: Callable[[Path, Path], Mapping[str, Any]]
    ) -> Artifact:
        made = self.team.hear("make", "made")["kind"] == "make"
        if made:
            with tempfile.TemporaryDirectory() as folder:  # what is written there, the leader writes too
                make(Path(folder), self.partial(self.key(kind, identity)))
            self.team.hear("made")
        found = self.find(kind, identity)
        if found is None:
            raise MachineError(
                f"{self.key(kind, identity)} is not in {self.root}, where the first process put it: processes on "
                "several machines need a --cache-dir that all of them share"
            )
        return dataclasses.replace(found, cached=not made)


@contextmanager
def joined() -> Iterator[Team | None]:
    """Join the processes that were launched together, if there are several, for the length of a ``with`` block."""
    global _team
    if processes() < 2:
        yield None
        return
    from datetime import timedelta

    import torch
    import torch.distributed as dist
    from accelerate import PartialState

    from bench.training.parallel import Ranks, set_current

    cpu = not torch.cuda.is_available() or os.environ.get("ACCELERATE_USE_CPU", "").lower() == "true"
    state = PartialState(cpu=cpu, timeout=timedelta(seconds=COLLECTIVE_SECONDS))
    device = torch.device("cpu") if cpu else state.device
    host, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
    again = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")  # a store may outlive what was said in it

    def connect() -> Any:
        own = dist.TCPStore(host, port, is_master=False, wait_for_workers=False)  # type: ignore[attr-defined]
        return dist.PrefixStore(f"bench/{again}", own)  # type: ignore[attr-defined]

    sharded = os.environ.get("ACCELERATE_USE_FSDP", "").lower() == "true"
    ranks = Ranks(state.process_index, state.num_processes, device, sharded)
    set_current(ranks)
    _team = Team(connect, ranks)
    try:
        yield _team
    finally:
        if not _team.rank:
            _team.tell("end")
        _team = None
        set_current(None)
        state.destroy_process_group()
