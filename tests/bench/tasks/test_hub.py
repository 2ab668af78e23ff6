"""Without a network: a fast, useful refusal, and the local cache of the Hub still serves."""

import json
import os
import shutil
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from bench.tasks.catalogue import TASKS
from bench.tasks.sources import bundled

REVISION = TASKS["sst2"].source.revision
LOAD = """
import sys, time
from bench.errors import DataError
from bench.tasks.catalogue import TASKS
from bench.tasks.data import load_task
start = time.monotonic()
try:
    data = load_task(TASKS["sst2"])
    print(len(data.train) + len(data.selection), len(data.dev))
except DataError as error:
    print(error)
print(time.monotonic() - start)
"""


@pytest.fixture
def closed() -> Iterator[str]:
    """A loopback address where nothing listens, held so that nothing else can."""
    with socket.socket() as held:
        held.bind(("127.0.0.1", 0))
        yield f"http://127.0.0.1:{held.getsockname()[1]}"


def load(home: Path, **variables: str) -> tuple[str, float]:
    kept = {k: v for k, v in os.environ.items() if not k.startswith(("HF_", "BENCH_")) and "proxy" not in k.lower()}
    done = subprocess.run(
        [sys.executable, "-c", LOAD],
        env={**kept, "HF_HOME": str(home), **variables},
        capture_output=True,
        text=True,
        timeout=120,
        check=True,
    )
    *message, seconds = done.stdout.strip().splitlines()
    return "\n".join(message), float(seconds)


def hub_cache(home: Path, revision: str) -> None:
    """Lay out what the datasets library leaves behind after fetching nyu-mll/glue (sst2) at a revision."""
    from datasets import load_dataset

    files = {split: str(bundled("movie_snippets") / f"{split}.parquet") for split in ("train", "validation")}
    load_dataset("parquet", data_files=files, cache_dir=str(home / "made"))
    made = next((home / "made").glob("parquet/*/*/*/dataset_info.json")).parent
    folder = home / "datasets" / "nyu-mll___glue" / "sst2" / "0.0.0" / revision
    folder.mkdir(parents=True)
    for path in made.iterdir():
        shutil.copy(path, folder / path.name.replace("parquet-", "glue-"))
    info = json.loads((folder / "dataset_info.json").read_text())
    info.update(dataset_name="glue", config_name="sst2")
    (folder / "dataset_info.json").write_text(json.dumps(info))


def test_no_network_is_said_within_seconds_with_the_way_out(tmp_path: Path, closed: str) -> None:
    message, seconds = load(tmp_path, HF_ENDPOINT=closed)
    assert seconds < 15
    for part in ("nyu-mll/glue", "sst2", "no network", "--data-root", "BENCH_DATA_ROOT", "DIR/sst2/train.parquet"):
        assert part in message


def test_the_cache_serves_without_a_network(tmp_path: Path, closed: str) -> None:
    hub_cache(tmp_path, REVISION)
    message, seconds = load(tmp_path, HF_ENDPOINT=closed)
    assert (message, seconds < 15) == ("9282 1034", True)
    assert load(tmp_path, HF_HUB_OFFLINE="1")[0] == "9282 1034"


def test_the_cache_of_another_revision_is_refused(tmp_path: Path) -> None:
    hub_cache(tmp_path, "0" * 40)
    assert f"is not of revision {REVISION}" in load(tmp_path, HF_HUB_OFFLINE="1")[0]
