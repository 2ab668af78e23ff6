"""The page of a plugin or a study on the Hub, written from its results."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from bench.backbones.catalogue import known_backbones
from bench.results import Evaluation, RunResult
from bench.tasks.catalogue import TASKS

if TYPE_CHECKING:
    from huggingface_hub import EvalResult

LICENSE = "apache-2.0"
LIBRARY = "variator-bench"
TAGS = ("variator", "compression-plugin", "efficient-inference")
_TASK_TYPES = {
    "single": "text-classification",
    "pair": "text-classification",
    "regression": "text-classification",
    "qa": "question-answering",
}
_METRIC_TYPES = {"token_f1": "f1"}


def plugin_card(config: Mapping[str, Any], repo: str, result: RunResult | None = None, license: str = LICENSE) -> str:
    """Write the page of a plugin.

    Parameters
    ----------
    config
        Its ``plugin_config.json``.
    repo
        Where it goes, for the lines that load it.
    result
        The run that made it, if it is known.
    license
        What its page says that its licence is, as the Hub names it.
    """
    from huggingface_hub import ModelCardData

    backbone, k = str(config.get("backbone") or ""), config["k"]
    data = ModelCardData(
        license=license,
        library_name=LIBRARY,
        tags=[*TAGS, str(config["family"])],
        base_model=known_backbones().get(backbone, backbone if "/" in backbone else None),
        datasets=_datasets(result),
        pipeline_tag=_TASK_TYPES.get(str(result.task.get("kind"))) if result else None,
        model_name=repo.split("/")[-1] if result else None,
        eval_results=_eval_results(result) if result else None,
    )
    task = f" on {result.task['name']}" if result else ""
    tuned = f", fine-tuned{task} (those weights are not here)" if task else ""
    what = f"`{backbone}`" if backbone else f"a {str(config['family']).upper()} of width {config['d_model']}"
    text = [
        f"# Variator plugin for {backbone or config['family']}, k = {k}\n",
        f"A compression plugin for {what}: around each of the {config['n_layers']} encoder FFNs it merges {k} "
        "neighbouring hidden vectors into one, runs the FFN on the shorter sequence, and expands the result again "
        "([Xiao et al., Findings of EMNLP 2023](https://aclanthology.org/2023.findings-emnlp.666)). "
        "It holds no weight of the backbone, which stays as it is.\n",
        "## Load it\n",
        "```python\nfrom bench.plugins.plugin import Plugin\n"
        f'plugin = Plugin.from_pretrained("{repo}")\n'
        "with plugin.attached(model): logits = model(**batch).logits\n```\n",
        f"`model` is the transformers model that it was made for{tuned}; "
        "after the `with` block it is bit-identical to before.\n",
    ]
    if result:
        text += [_costs(result), _scores(result), _training(result), _origin(result)]
    text.append(_settings(config))
    return f"---\n{data.to_yaml()}\n---\n\n" + "\n".join(text)


def study_card(name: str, results: Sequence[RunResult], summary: str, readme: str, license: str = LICENSE) -> str:
    """Write the page of a study.

    Parameters
    ----------
    name
        Its name.
    results
        Its runs.
    summary
        Its table, in Markdown; may be empty.
    readme
        What its folder says of itself; may be empty.
    license
        As for `plugin_card`.
    """
    from huggingface_hub import DatasetCardData

    data = DatasetCardData(license=license, tags=[*TAGS, "benchmark-results"], pretty_name=f"{LIBRARY}: {name}")
    states: dict[str, int] = {}
    for result in results:
        states[result.status] = states.get(result.status, 0) + 1
    text = [
        f"{len(results)} runs of [{LIBRARY}](https://aclanthology.org/2023.findings-emnlp.666): "
        f"{', '.join(f'{n} {state}' for state, n in sorted(states.items()))}. One JSON a run below `runs/`, with "
        "configuration, costs, raw timings and provenance; the predictions for each example below `predictions/`.\n",
        f"```sh\nbench hub pull REPO        # into results/, beside what is there\nbench report {name}\n```\n",
    ]
    body = readme.strip() or f"# {name}"
    return (
        f"---\n{data.to_yaml()}\n---\n\n{body}\n\n## What is in it\n\n"
        + "\n".join(text)
        + (f"\n{summary}" if summary else "")
    )


def _datasets(result: RunResult | None) -> list[str] | None:
    spec = TASKS.get(str(result.task.get("name"))) if result else None
    return [spec.source.hub] if spec and spec.source.hub else None


def _eval_results(result: RunResult) -> list[EvalResult] | None:
    """Return what the Hub's leaderboards read; a task that is not on the Hub goes by its own name."""
    from huggingface_hub import EvalResult

    evaluation, name = result.evaluation("dev"), str(result.task.get("name"))
    if evaluation is None:
        return None
    source = TASKS[name].source if name in TASKS else None
    return [
        EvalResult(
            task_type=_TASK_TYPES.get(str(result.task.get("kind")), "other"),
            dataset_type=(source.hub if source and source.hub else name),
            dataset_name=name,
            dataset_config=source.config if source else None,
            dataset_split=source.dev if source else "dev",
            dataset_revision=source.revision if source and source.hub else None,
            metric_type=_METRIC_TYPES.get(metric, metric),
            metric_name=metric,
            metric_value=round(interval.value, 6),
        )
        for metric, interval in evaluation.metrics.items()
    ]


def _table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    return "\n".join(f"| {' | '.join(line)} |" for line in (head, ["---"] * len(head), *rows)) + "\n"


def _costs(result: RunResult) -> str:
    cost = result.cost
    if cost is None:
        return ""
    requested = cost.requested_remaining
    real = cost.real.compressed.encoder / 1e9
    rows = [
        ["remaining encoder FLOPs", _percent(requested), f"**{_percent(cost.achieved_remaining)}**"],
        [
            "saved encoder FLOPs",
            _percent(None if requested is None else 1 - requested),
            f"**{_percent(1 - cost.achieved_remaining)}**",
        ],
        ["remaining FLOPs of the whole model", "", _percent(cost.real.remaining_total)],
        ["parameters added", "", f"{cost.parameters_added:,} ({cost.parameters_added / cost.parameters_teacher:.3%})"],
        ["bytes added on disk", "", f"{cost.bytes_added:,}"],
    ]
    return (
        "## What it costs\n\n"
        + _table(["", "requested", "achieved"], rows)
        + (
            "\nRemaining is FLOPs(compressed) / FLOPs(teacher), saved one minus it. FLOPs are 2 × "
            "multiply–accumulates, counted on the module that ran, on the real tokens of the dev set "
            f"({real:,.1f} GFLOPs in all).\n"
        )
    )


def _percent(share: float | None) -> str:
    return "" if share is None else f"{share:.2%}"


def _score(evaluation: Evaluation | None, metric: str) -> str:
    interval = evaluation.metrics.get(metric) if evaluation else None
    if interval is None:
        return "n/a"
    return f"{interval.value:.4f} [{interval.low:.4f}, {interval.high:.4f}]"


def _scores(result: RunResult) -> str:
    own, teacher = result.evaluation("dev"), next((e for e in result.teacher_evaluations if e.split == "dev"), None)
    if own is None:
        return ""
    rows = [[metric.replace("_", " "), _score(own, metric), _score(teacher, metric)] for metric in own.metrics]
    level = next(iter(own.metrics.values())).level
    caveat = f"\n{result.task['caveat']}\n" if result.task.get("caveat") else ""
    return (
        f"## What it answers: {result.task['name']}\n\n"
        + _table(["", "with the plugin", "teacher (dense)"], rows)
        + (f"\nOn {own.n_examples} dev examples; brackets are {level:.0%} bootstrap intervals over examples.\n{caveat}")
    )


def _training(result: RunResult) -> str:
    rows = [
        [stage.name, f"{stage.steps:,}", f"{stage.examples:,}", f"{stage.flops:.2e}", f"{stage.seconds:,.0f}"]
        for stage in result.training
    ]
    if not rows:
        return ""
    used = ", ".join(f"{name.replace('_', ' ')} {n:,}" for name, n in result.examples.items())
    return (
        "## How it was trained\n\n"
        + _table(["stage", "steps", "examples", "FLOPs", "seconds"], rows)
        + (f"\nExamples: {used}.\n" if used else "")
    )


def _origin(result: RunResult) -> str:
    p = result.provenance
    changed = {True: ", with changes that are in no commit", False: "", None: ""}[p.dirty]
    rows = [
        ["run", f"`{result.run_id}` of study {result.study}"],
        ["command", f"`{' '.join(p.command)}`"],
        ["commit", f"`{p.commit}`{changed}" if p.commit else "unknown"],
        ["versions", ", ".join(f"{name} {version}" for name, version in p.versions.items())],
        ["hardware", f"{p.hardware}; {p.device}, {p.threads} thread{'s' if p.threads > 1 else ''}; {p.platform}"],
        ["seeds", ", ".join(f"{name} {seed}" for name, seed in p.seeds.items())],
        ["data", f"`{p.data_digest}`"],
        ["model", f"`{p.model_digest}`"],
        ["started", p.started],
    ]
    return "## Where it comes from\n\n" + _table(["", ""], rows) + "\n`result.json` beside it is the whole record.\n"


def _settings(config: Mapping[str, Any]) -> str:
    return f"## Settings\n\n```json\n{json.dumps(dict(config), indent=1)}\n```\n"
