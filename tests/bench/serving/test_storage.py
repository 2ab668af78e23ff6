"""What many tasks take: files that are really there, tensors that are really loaded, and that they still answer."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from bench.cell import Cell, Surroundings
from bench.config import RunConfig
from bench.errors import BenchError
from bench.execution import rebuild
from bench.measure.size import bytes_on_disk
from bench.plugins.plugin import Plugin
from bench.serving.keeping import Adapters, Cells, Keeping, Models, keeping, varied
from bench.serving.store import measure_storage, series_of
from bench.storage import StorageResult, StorageSeries, read_storage
from tests.bench_command import bench, results, tiny_sweep
from tests.checkpoints import quick_config, task_file, tiny_checkpoint
from tests.workers import PATIENCE

COUNTS = (1, 2, 5)


@pytest.fixture(scope="module")
def configs(tmp_path_factory: pytest.TempPathFactory) -> list[RunConfig]:
    at = tmp_path_factory.mktemp("storage")
    backbone, tasks = tiny_checkpoint(at / "bert", "bert"), []
    for name in ("mood", "other"):
        path = task_file(at / name, examples=40 if name == "mood" else 44, words=(1, 14) if name == "mood" else (5, 9))
        tasks.append(path.rename(path.with_name(f"{name}.yaml")))
    cells: list[tuple[str, int | None, bool]] = [
        ("dense", None, True), ("dense", None, False), ("variator", 2, True), ("variator", 4, True),
        ("distillation", 2, True), ("pruning", 2, True),
    ]  # fmt: skip
    return [
        quick_config(task, backbone, method=method, ratio=ratio, teacher_lora=lora, train_examples=30)
        for task in tasks
        for method, ratio, lora in cells
    ]


@pytest.fixture(scope="module")
def where(tmp_path_factory: pytest.TempPathFactory) -> Surroundings:
    return Surroundings(cache_dir=tmp_path_factory.mktemp("cache"), device="cpu")


@pytest.fixture(scope="module")
def result(configs: list[RunConfig], where: Surroundings) -> StorageResult:
    # a process for each way: those that the tests below ask for
    configs = [c for c in configs if c.method in ("variator", "pruning") or not c.teacher_lora]
    return measure_storage(configs, where, "tiny", ["bench", "storage", "tiny"], COUNTS)


def _series(result: StorageResult, method: str, lora: bool = True, ratios: tuple[float, ...] = ()) -> StorageSeries:
    (found,) = [s for s in result.series if (s.method, s.lora, tuple(s.ratios)) == (method, lora, ratios)]
    return found


def _kept(configs: list[RunConfig], where: Surroundings, method: str, lora: bool = True) -> Keeping:
    chosen: dict[str, list[Cell]] = {}
    for config in configs:
        if (config.method, config.teacher_lora) == (method, lora):
            chosen.setdefault(config.task, []).append(Cell.resolve(config, where))
    return keeping(Cells(tuple(tuple(cells) for cells in chosen.values()), where))


def test_every_way_is_measured_at_every_count(result: StorageResult) -> None:
    assert {(s.method, s.lora, tuple(s.ratios)) for s in result.series} == {
        ("dense", False, ()), ("variator", True, (2.0,)), ("variator", True, (2.0, 4.0)), ("pruning", True, (2.0,)),
    }  # fmt: skip
    for series in result.series:
        assert [(p.tasks, p.distinct, p.ran) for p in series.points] == [(1, 1, 1), (2, 2, 2), (5, 2, 5)]
        assert all(p.reason is None and p.resident_bytes is not None and p.load_seconds for p in series.points)
        assert series.task_bytes.keys() == {"mood", "other"}


def test_disk_is_the_backbone_once_and_the_artifacts_for_each_task(
    result: StorageResult, configs: list[RunConfig], where: Surroundings
) -> None:
    series, expected = _series(result, "variator", ratios=(2.0, 4.0)), []
    for task in dict.fromkeys(config.task for config in configs):
        files = []
        for config in configs:
            if (config.task, config.method) == (task, "variator"):
                ctx, teacher, _ = rebuild(Cell.resolve(config, where), where)
                artifact = ctx.cache.find("plugin", ctx.identity)
                assert artifact
                files += [artifact.folder / name for name in ("plugin.safetensors", "plugin_config.json")]
        expected.append(sum(path.stat().st_size for path in [*files, teacher.artifact.folder / "teacher.safetensors"]))
    assert list(series.task_bytes.values()) == expected
    one, two, five = (point.disk_bytes for point in series.points)
    assert two - one == expected[1]
    assert five - two == expected[0] + expected[1] + expected[0]  # copies of the first, the second, and the first
    assert series.shared_bytes < one - expected[0] < series.shared_bytes + 20_000  # beside the names in the file
    full = _series(result, "dense", lora=False)
    assert full.shared_bytes == 0
    assert series.points[-1].disk_bytes < full.points[-1].disk_bytes


def test_memory_is_the_backbone_once_and_each_tasks_own_tensors(result: StorageResult) -> None:
    for series in result.series:
        one, two, five = (point.tensor_bytes or 0 for point in series.points)
        first, second = series.task_bytes.values()
        # tensors are as large in memory as in a file but for its header; a kind of model has its buffers once
        assert 0.7 * (2 * first + second) < five - two <= 2 * first + second, series.method
        assert 0.7 * second < two - one <= second + 10_000, series.method
        assert series.shared_bytes < one


def test_pruned_models_share_what_they_leave_as_it_was(
    result: StorageResult, configs: list[RunConfig], where: Surroundings
) -> None:
    shared = _kept(configs, where, "pruning").shared()
    assert "embeddings.word_embeddings.weight" in shared
    own = sum(tensor.numel() * tensor.element_size() for tensor in shared.values())
    assert _series(result, "pruning", ratios=(2.0,)).shared_bytes == own
    assert _kept(configs, where, "distillation").shared() == {}  # all of its weights were trained


def test_mixed_batches_agree_with_each_tasks_own_model(result: StorageResult) -> None:
    for series in result.series:
        ks = [1, *series.ratios] if series.method == "variator" else []
        assert [agreement.k for agreement in series.agreement] == ks
        for agreement in series.agreement:
            assert agreement.same == agreement.examples == 84
            assert agreement.largest_difference < 1e-5


@pytest.mark.parametrize(("method", "lora"), [("pruning", True), ("distillation", True), ("dense", False)])
def test_what_is_loaded_answers_as_what_was_written(
    configs: list[RunConfig], where: Surroundings, tmp_path: Path, method: str, lora: bool
) -> None:
    from safetensors.torch import save_file

    kept = _kept(configs, where, method, lora)
    assert isinstance(kept, Models)
    with torch.inference_mode():
        before = [kept.models[i][0](**kept.inputs[i]).logits for i in range(2)]
    shared = {name: tensor.detach().contiguous() for name, tensor in kept.shared().items()}
    if shared:
        save_file(shared, tmp_path / "shared.safetensors")
    for i in range(3):
        (tmp_path / str(i)).mkdir()
        kept.write(i, tmp_path / str(i))
    kept.empty()
    assert all(p.is_meta for models in kept.models for model in models for p in model.parameters())
    kept.load_shared(tmp_path / "shared.safetensors" if shared else None)
    for i in range(3):
        kept.load(i, tmp_path / str(i))
    held: Any = kept.held
    with torch.inference_mode():
        for i in range(2):
            torch.testing.assert_close(held[i](**kept.inputs[i]).logits, before[i], atol=0, rtol=0)
        copied = held[2](**kept.inputs[0]).logits
    assert not torch.equal(copied, before[0]) and torch.allclose(copied, before[0], atol=0.1)


def test_a_copy_has_no_tensor_in_common_with_its_model(
    configs: list[RunConfig], where: Surroundings, tmp_path: Path
) -> None:
    kept = _kept(configs, where, "variator")
    assert isinstance(kept, Adapters)
    for i in (0, 2, 4):
        (tmp_path / str(i)).mkdir()
        kept.write(i, tmp_path / str(i))
    names = [str(path.relative_to(tmp_path / "0")) for path in sorted((tmp_path / "0").rglob("*.safetensors"))]
    assert names == ["k2/plugin.safetensors", "k4/plugin.safetensors", "teacher.safetensors"]
    for name in names:
        first, *copies = (load_file(tmp_path / str(i) / name) for i in (0, 2, 4))
        for tensors in copies:
            assert {n: t.shape for n, t in tensors.items()} == {n: t.shape for n, t in first.items()}
            assert not any(torch.equal(tensors[n], first[n]) for n in first)
        assert not any(torch.equal(copies[0][n], copies[1][n]) for n in first)
    assert bytes_on_disk(tmp_path / "0") == bytes_on_disk(tmp_path / "2")
    assert Plugin.from_pretrained(tmp_path / "2" / "k4").config.k == 4


def test_a_copy_is_a_pure_function_of_its_number() -> None:
    given = {"a": torch.randn(4, 4), "zero": torch.zeros(3), "ids": torch.arange(3)}
    once, again, other = varied(given, 7), varied(given, 7), varied(given, 8)
    for name in ("a", "zero"):
        assert torch.equal(once[name], again[name]) and not torch.equal(once[name], other[name])
    assert torch.equal(once["ids"], given["ids"])


def _config(**values: Any) -> RunConfig:
    return RunConfig.build({"task": "rte", "backbone": "minilm-l6", "teacher_lora": True, **values})


def test_ways_are_compared_at_equal_cost_and_at_all_of_theirs() -> None:
    cells = [_config(task=t, method="variator", ratio=k) for t in ("rte", "mrpc") for k in (2, 4, 8)]
    cells += [_config(task=t, method="pruning", ratio=4) for t in ("rte", "mrpc")]
    cells += [_config(task=t, method="dense", seed=s) for t in ("rte", "mrpc") for s in (0, 1)]
    found = {way: [(c.task, c.ratio) for c in cells] for way, cells in series_of(cells).items()}
    assert found == {
        ("variator", True, (4.0,)): [("rte", 4), ("mrpc", 4)],
        ("variator", True, (2.0, 4.0, 8.0)): [
            ("rte", 2),
            ("rte", 4),
            ("rte", 8),
            ("mrpc", 2),
            ("mrpc", 4),
            ("mrpc", 8),
        ],
        ("pruning", True, (4.0,)): [("rte", 4), ("mrpc", 4)],
        ("dense", True, ()): [("rte", None), ("mrpc", None)],
    }


@pytest.mark.parametrize(
    ("cells", "message"),
    [
        ([_config(), _config(backbone="bert-base-uncased")], "one backbone at a time"),
        ([_config(ratio=4), _config(ratio=4, bottleneck=8)], "differ in some other key"),
        ([_config(ratio=4), _config(task="mrpc", ratio=2)], "for some tasks or ratios only"),
        ([_config(ratio=4), _config(method="dense", task="mrpc")], "for some tasks or ratios only"),
    ],
)
def test_cells_that_cannot_be_compared_are_refused(cells: list[RunConfig], message: str) -> None:
    with pytest.raises(BenchError, match=message):
        series_of(cells)


def test_text_to_text_tasks_are_kept_beside_each_other_and_answer(tmp_path: Path, where: Surroundings) -> None:
    from safetensors.torch import save_file

    backbone = tiny_checkpoint(tmp_path / "t5", "t5")
    choice = task_file(tmp_path / "choice", examples=20)
    answer = task_file(
        tmp_path / "answer", examples=20, kind="qa", text="other", text_pair="text", label="answer", labels=None,
        prompt='"{text} {text_pair}"',
    )  # fmt: skip
    cells = tuple(
        (Cell.resolve(quick_config(task, backbone, method="variator", ratio=2, teacher_lora=True), where),)
        for task in (choice, answer)
    )
    kept = keeping(Cells(cells, where))
    assert isinstance(kept, Adapters)
    save_file({name: tensor.contiguous() for name, tensor in kept.shared().items()}, tmp_path / "shared.safetensors")
    for i in range(3):
        (tmp_path / str(i)).mkdir()
        kept.write(i, tmp_path / str(i))
    kept.empty()
    kept.load_shared(tmp_path / "shared.safetensors")
    for i in range(3):
        kept.load(i, tmp_path / str(i))
    assert kept.run() == 3
    kept.model.select(2, ["1"] * 4)
    with pytest.raises(BenchError, match="`generate` decodes"):
        kept.model(**kept.inputs[1])


def _bench(words: list[str | Path], at: Path) -> subprocess.CompletedProcess[str]:
    """Run ``bench`` in a process that may have children of its own."""
    command = [sys.executable, "-m", "tests.bench_command", *map(str, words), "--cache-dir", at / "cache"]
    environ = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[3]), "OMP_NUM_THREADS": "1"}
    return subprocess.run(command, cwd=at, env=environ, capture_output=True, text=True, timeout=PATIENCE)


def test_the_command_runs_what_is_missing_and_then_measures(tmp_path: Path) -> None:
    sweep = tiny_sweep(tmp_path, teacher_lora=True, ratio=2)
    done = _bench(["storage", sweep, "--tasks", "1,2"], tmp_path)
    assert done.returncode == 0, done.stderr
    result = read_storage(tmp_path / "results" / "tiny")
    assert result is not None and [s.method for s in result.series] == ["dense", "variator"]
    assert [[p.tasks for p in s.points] for s in result.series] == [[1, 2], [1, 2]]
    assert result.series[1].runs["mood"] == [results(tmp_path)["variator-2"]["run_id"]]
    assert "results/tiny/tables/storage.md" in done.stdout and "results/tiny/storage.json" in done.stdout


def test_what_cannot_be_measured_is_said(tmp_path: Path) -> None:
    sweep, another = tiny_sweep(tmp_path), tiny_sweep(tmp_path, "another")
    for words, message in (
        (["storage", sweep, "--tasks", "0,1"], "expected numbers of tasks"),
        (["storage", sweep, another], "say with --study"),
    ):
        code, command = bench(words, tmp_path)
        assert code == 2 and message in command.err
