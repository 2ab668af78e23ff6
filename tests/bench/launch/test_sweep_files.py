"""A sweep file in W&B's format becomes the runs that it means, or an error that names the file and the right word."""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import Any

import pytest
import yaml

from bench.config import RunConfig
from bench.errors import ConfigError
from bench.launch.sweep import MOST_POINTS, expand, find_sweep, parse_list, read_sweep
from bench.registry import methods as registered

ROOT = Path(__file__).parents[3]
SHIPPED = sorted((ROOT / "sweeps").glob("*.yaml"))


def write(folder: Path, text: str) -> Path:
    path = folder / "mine.yaml"
    path.write_text(text)
    return path


def grid(folder: Path, **parameters: Any) -> Path:
    return write(folder, yaml.safe_dump({"method": "grid", "parameters": parameters}))


def cells(configs: tuple[RunConfig, ...]) -> list[tuple[str, str, float | None, int]]:
    return [(c.task, c.method, c.ratio if c.method != "dense" else None, c.seed) for c in configs]


@pytest.mark.parametrize("path", SHIPPED, ids=lambda path: path.stem)
def test_every_shipped_sweep_expands_to_distinct_runs(path: Path) -> None:
    sweep = read_sweep(path)
    content = yaml.safe_load(path.read_text())
    assert sweep.name == content["name"]
    assert f"--study {sweep.study}" in " ".join(content["command"]), "an agent's runs go where the sweep's go"
    identities = [repr(c.identity(c.task, c.backbone)) for c in sweep.configs]
    assert len(set(identities)) == len(identities) > 1


def test_results_go_to_the_study_that_the_command_names(tmp_path: Path) -> None:
    body = {"method": "grid", "name": "mine", "parameters": {"ratio": {"values": [2, 4]}}}
    assert read_sweep(write(tmp_path, yaml.safe_dump(body))).study == "mine"
    told = body | {"command": ["bench", "run", "--study", "pilot", "${args}"]}
    sweep = read_sweep(write(tmp_path, yaml.safe_dump(told)))
    assert (sweep.name, sweep.study) == ("mine", "pilot")
    elsewhere = body | {"command": ["bench", "run", "--study", "../up"]}
    with pytest.raises(ConfigError, match=r"the study '\.\./up' is to be the name of a folder"):
        read_sweep(write(tmp_path, yaml.safe_dump(elsewhere)))


def test_the_glue_grid_is_the_papers_with_every_method_here() -> None:
    configs = read_sweep(find_sweep("glue")).configs
    tasks = {"mnli", "qnli", "qqp", "rte", "sst2", "mrpc", "squad"}
    methods = sorted(set(registered()) - {"dense", "quantization"})  # these two have no ratio
    expected = {
        (task, method, ratio, seed)
        for task in tasks
        for method, ratio in [("dense", None), ("quantization", None), *itertools.product(methods, (2, 4, 8))]
        for seed in range(3)
    }
    for backbone in ("t5-base", "t5-large"):
        found = cells(tuple(c for c in configs if c.backbone == backbone))
        assert len(found) == len(expected) and set(found) == expected


def test_points_that_differ_in_what_their_method_ignores_are_one_run(tmp_path: Path) -> None:
    path = grid(
        tmp_path,
        method={"values": ["variator", "dense"]},
        ratio={"values": [2, 4, "2"]},
        steps={"values": [10]},
        recipe={"value": "default"},
    )
    found = [(c.method, c.ratio) for c in read_sweep(path).configs]
    assert [method for method, _ in found] == ["dense", "variator", "variator"]
    assert [ratio for _, ratio in found[1:]] == [2.0, 4.0]


def test_runs_of_one_teacher_stand_together_and_dense_comes_first() -> None:
    order = cells(
        expand(
            {
                "method": ["variator", "dense"],
                "ratio": [8, 2],
                "seed": [1, 0],
                "task": ["sst2", "rte"],
            }
        )
    )
    blocks = [(task, seed) for seed in (1, 0) for task in ("sst2", "rte")]
    expected = [
        (task, method, ratio, seed)
        for task, seed in blocks
        for method, ratio in [("dense", None), ("variator", 8), ("variator", 2)]
    ]
    assert order == expected


def test_overrides_replace_the_files_values(tmp_path: Path) -> None:
    path = grid(tmp_path, task={"values": ["sst2", "rte"]}, ratio={"values": [2, 4]}, seed={"value": 0})
    configs = read_sweep(path, {"task": "mrpc", "seed": "3, 4", "losses": "all_hidden=1,logits=2"}).configs
    assert {(c.task, c.ratio, c.seed) for c in configs} == {("mrpc", k, s) for k in (2, 4) for s in (3, 4)}
    assert {c.options["losses"] for c in configs} == {"all_hidden=1,logits=2"}
    assert read_sweep(path).configs[0].options["losses"] != "all_hidden=1,logits=2"


@pytest.mark.parametrize(
    ("key", "text", "values"),
    [("ratio", "2,4, 8", ["2", "4", "8"]), ("task", "x", ["x"]), ("losses", "a=1,b", ["a=1,b"])],
)
def test_a_list_on_the_command_line(key: str, text: str, values: list[str]) -> None:
    assert parse_list(key, text) == values


def test_numbers_may_be_written_as_people_write_them(tmp_path: Path) -> None:
    """YAML 1.1 reads ``2e-5``, without a point, as text."""
    text = "method: grid\nparameters: {lr: {value: 2e-5}, teacher_lr: {value: 1e-4}, ratio: {value: 2.0}}"
    assert isinstance(yaml.safe_load(text)["parameters"]["lr"]["value"], str)
    [config] = read_sweep(write(tmp_path, text)).configs
    assert (config.options["lr"], config.teacher_lr, config.ratio) == (2e-5, 1e-4, 2.0)


def test_null_is_the_default(tmp_path: Path) -> None:
    configs = read_sweep(grid(tmp_path, train_examples={"values": [None, 100]}, ratio={"value": 2})).configs
    assert [c.train_examples for c in configs] == [None, 100]


def test_the_name_of_a_sweep_without_one_is_the_files(tmp_path: Path) -> None:
    assert read_sweep(grid(tmp_path, ratio={"value": 2})).name == "mine"


WRONG = {
    "parameters: {ratio: {value: 2}}\nmethod: grid\nparamters: 1": "unknown key 'paramters'. Did you mean 'parameters'",
    "2: x\nmethod: grid\nparameters: {ratio: {value: 2}}": "unknown key '2'",
    "method: grid\nparameters: {raito: {value: 2}}": "unknown parameter 'raito'. Did you mean 'ratio'",
    "method: grid\nparameters: {7: {value: 2}}": "unknown parameter '7'",
    "method: grid\nparameters: {task: {value: sst2}, method: {value: varitor}}": "Did you mean 'variator'",
    "method: grid\nparameters: {recipe: {value: relased}}": "Did you mean 'released'",
    "method: bayes\nparameters: {ratio: {value: 2}}": "'bayes'; only `grid`",
    "method: random\nparameters: {ratio: {value: 2}}": "'random'; only `grid`",
    "parameters: {ratio: {value: 2}}": "method is None; only `grid`",
    "": "expected a mapping",
    "- method: grid": "expected a mapping",
    "method: grid": "`parameters` must map keys",
    "method: grid\nparameters: [task]": "`parameters` must map keys",
    "method: grid\nparameters: {task: [": "no valid YAML",
    "method: grid\nparameters: {? [a, b] : {value: 2}}": "no valid YAML",
    "method: grid\nparameters: {seed: {value: 2020-13-45}}": "no valid YAML",
    "method: grid\nparameters: {task: }": "'task' needs either",
    "method: grid\nparameters: {task: sst2}": "'task' needs either",
    "method: grid\nparameters: {lr: {distribution: uniform, min: 0, max: 1}}": "'lr' needs either",
    "method: grid\nparameters: {lr: {value: 1, values: [2]}}": "'lr' needs either",
    "method: grid\nparameters: {seed: {values: []}}": "list that is not empty",
    "method: grid\nparameters: {seed: {values: 3}}": "list that is not empty",
    "method: grid\nparameters: {task: {value: [sst2]}}": "one word or number",
    "method: grid\nparameters: {method: {values: [{a: b}]}}": "one word or number",
    "method: grid\nparameters: {seed: {value: x}}": "seed = 'x'",
    "method: grid\nparameters: {lr: {value: fast}}": "lr = 'fast'",
    "method: grid\nname: ../elsewhere\nparameters: {ratio: {value: 2}}": "name of a folder",
    "method: grid\nname: [a]\nparameters: {ratio: {value: 2}}": "name of a folder",
    "[" * 20_000: "nested too deeply",
}


@pytest.mark.parametrize("text", WRONG, ids=lambda text: text.replace("\n", " ")[:60])
def test_what_cannot_be_meant_is_refused(tmp_path: Path, text: str) -> None:
    path = write(tmp_path, text)
    with pytest.raises(ConfigError) as caught:
        read_sweep(path)
    assert str(caught.value).startswith(str(path))
    assert WRONG[text] in str(caught.value)


def test_bytes_that_are_no_text_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "mine.yaml"
    path.write_bytes(b"\xff\xfe\x00\x01")
    with pytest.raises(ConfigError, match="no valid YAML"):
        read_sweep(path)


@pytest.mark.parametrize("place", ["{task: *x29}", "{task: {value: *x29}}", "{task: {values: *x29}}"])
def test_a_bomb_of_aliases_is_refused_in_a_line(tmp_path: Path, place: str) -> None:
    """Thirty lists of ten, each in the next: 10^30 items if anything walked or printed them."""
    lines = ["- &x0 [lol]", *(f"- &x{i} [{', '.join([f'*x{i - 1}'] * 10)}]" for i in range(1, 30))]
    text = f"description:\n{chr(10).join(lines)}\nmethod: grid\nparameters: {place}\n"
    with pytest.raises(ConfigError) as caught:
        read_sweep(write(tmp_path, text))
    assert "'task'" in str(caught.value) and len(str(caught.value)) < 400


def test_a_grid_beyond_reason_is_refused_at_once(tmp_path: Path) -> None:
    ten = {"values": list(range(1, 11))}
    path = grid(tmp_path, **dict.fromkeys(["seed", "steps", "batch_size", "ratio", "bottleneck"], ten))
    with pytest.raises(ConfigError, match=f"100,000 combinations.*{MOST_POINTS:,}"):
        read_sweep(path)


def test_a_corpus_may_lie_below_the_data_root(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("BENCH_DATA_ROOT", raising=False)
    corpus = tmp_path / "data" / "lore" / "train.jsonl"
    corpus.parent.mkdir(parents=True)
    corpus.write_text('{"text": "once upon a time"}\n')
    path = grid(tmp_path, pretrain_corpus={"value": "lore"}, pretrain_steps={"value": 5}, ratio={"value": 2})
    assert len(read_sweep(path, data_root=tmp_path / "data").configs) == 1
    with pytest.raises(ConfigError, match="unknown corpus 'lore'"):
        read_sweep(path)


def test_sweeps_are_found_by_path_and_by_shipped_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert find_sweep("quickstart") == ROOT / "sweeps" / "quickstart.yaml"
    own = grid(tmp_path, ratio={"value": 2})
    assert find_sweep("mine.yaml").samefile(own)


@pytest.mark.parametrize(("name", "near"), [("quickstrat", "quickstart"), ("sweeps/gleu.yaml", "glue")])
def test_a_misspelt_sweep_names_the_nearest(tmp_path: Path, name: str, near: str) -> None:
    with pytest.raises(ConfigError, match=f"no sweep file '{name}'. Did you mean '{near}'"):
        find_sweep(name)
