"""Variator: compression plugins around every encoder FFN of the frozen teacher."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

from pydantic import Field

from bench.backbones.spec import BackboneSpec
from bench.measure.closed_form import (
    Compression,
    Decompression,
    PluginShape,
    plugin_parameters,
    remaining,
    remaining_with,
)
from bench.methods.base import Count, Method, NonNegative, Positive, PositiveCount, Setting, Share, Work
from bench.tasks.spec import TaskSpec
from bench.training.mix import HIDDEN_PARTS, parse_mix

if TYPE_CHECKING:
    from torch import Tensor

    from bench.artifacts import Artifact
    from bench.backbones.model import TaskModel
    from bench.context import RunContext, Teacher
    from bench.plugins.plugin import Plugin
    from bench.tasks.data import TaskData
    from bench.training.stage import FeatureBatches

FIT_TOKENS = 20_000
"""Tokens of the closed-form fit."""

_ADAPTATION = frozenset({"lr", "decay", "losses", "temperature"})
_TRAINING = frozenset({"warmup", "weight_decay", "clip"})
"""Options of the adaptation alone, and of both trainings."""


@dataclass(frozen=True)
class Variator(Method):
    """Compression plugins: merge k neighbouring hidden vectors, run the FFN, expand again.

    Attributes
    ----------
    compression
        How vectors are merged: ``attention`` weighs them by learned scores; ``mean`` is their mean; ``conv`` has a
        learned weight for each place and channel.
    decompression
        How each position gets a vector of its own again: ``adapter`` corrects the merged one, ``copy`` takes it as it
        is.
    attention_k
        How many vectors are merged into one, in the same way, before keys and values are made of them, which the paper
        does not do; 1 leaves it out.
    bottleneck
        Width of the decompression adapter.
    mask_padding
        Whether padding is left out of scores, softmax and mean.
    init
        ``fit`` starts from the closed-form fit of ``bench.plugins.fit``, and trains in the units of
        ``bench.plugins.units`` where the backbone is a T5; ``released`` starts from random weights.
    pretrain_steps
        Steps of task-agnostic pre-training on text; 0 leaves it out.
    pretrain_corpus
        Text to pre-train on: ``wikitext2``, which is bundled, or a path; see ``bench.tasks.corpus``.
    pretrain_batch_size
        Spans of text a step of pre-training.
    pretrain_length
        Tokens of a span.
    pretrain_lr
        Peak learning rate of pre-training, which then falls linearly.
    pretrain_losses
        Mix of the loss parts of pre-training, as for ``losses``.
    adapt
        Whether the plugin is trained on the task; without, it stays as pre-training, or the start, leaves it.
    lr
        Peak learning rate on the task.
    decay
        Learning rate on the task after the warm-up: ``linear`` or ``cosine`` to zero, or ``constant``.
    warmup
        Share of a stage's steps over which the learning rate rises.
    weight_decay
        AdamW's weight decay.
    clip
        Largest gradient norm.
    losses
        Mix of loss parts on the task; ``bench.training.losses`` says what each is.
    temperature
        Temperature of the ``logits`` part.
    """

    name = "variator"
    paper = "Xiao et al., Variator, Findings of EMNLP 2023"
    version = 1
    summary = "merge k neighbouring hidden vectors around each encoder FFN and expand them again"
    trains = "the plugin alone; the backbone stays frozen"
    saves = "FFN rows: n/k instead of n in every encoder layer"
    knob = "k, the vectors that are merged into one"
    frozen = True

    compression: Compression = "attention"
    decompression: Decompression = "adapter"
    attention_k: PositiveCount = 1
    bottleneck: PositiveCount = 64
    mask_padding: bool = True
    init: Literal["fit", "released"] = "fit"
    pretrain_steps: Count = 200
    pretrain_corpus: str = "wikitext2"
    pretrain_batch_size: PositiveCount = 16
    pretrain_length: Annotated[int, Field(ge=8)] = 128
    pretrain_lr: Positive = 1e-3
    pretrain_losses: str = "all_hidden=1"
    adapt: bool = True
    lr: Positive = 3e-4
    decay: Literal["linear", "cosine", "constant"] = "linear"
    warmup: Share = 0.05
    weight_decay: NonNegative = 0.0
    clip: Positive = 1.0
    losses: str = "all_hidden=1,logits=0.1"
    temperature: Positive = 1.0

    def __post_init__(self) -> None:
        parse_mix(self.losses)
        parse_mix(self.pretrain_losses, HIDDEN_PARTS)

    def skip(self, backbone: BackboneSpec, task: TaskSpec, ratio: float | None) -> str | None:
        """Refuse a ratio that is no whole number of vectors."""
        if ratio is None or ratio < 2 or ratio != int(ratio):
            return f"the ratio of variator is k, a whole number of at least 2; got {ratio}"
        return None

    def in_parts(self) -> bool:
        """Return that the backbone is only run."""
        return True

    @property
    def learns(self) -> bool:
        """Whether the plugin has a parameter."""
        return self.compression != "mean" or self.decompression != "copy"

    def shape(self, k: int) -> PluginShape:
        """Return the shape of the plugin at ``k``."""
        return PluginShape(
            k,
            self.bottleneck,
            compression=self.compression,
            decompression=self.decompression,
            attention_k=self.attention_k if self.attention_k > 1 else None,
        )

    def setting(self, backbone: BackboneSpec, ratio: float | None, lengths: Mapping[int, int]) -> Setting:
        """Return k and what it costs; a twin of the standard plugin has k in common with it, and not the cost."""
        k = int(ratio or 0)
        shape, standard = self.shape(k), PluginShape(k)
        share, budget = remaining_with(backbone, shape, lengths), remaining(backbone, k, lengths)
        differs = [f"compression by {shape.compression}"] if shape.compression != standard.compression else []
        if shape.decompression != standard.decompression:
            differs.append(f"decompression by {shape.decompression}")
        elif shape.bottleneck != standard.bottleneck:
            differs.append(f"a bottleneck of {shape.bottleneck}")
        if shape.attention_k is not None:
            differs.append(f"keys and values of {shape.attention_k} vectors each")
        note = f"{share:.1%} remain with {', '.join(differs)}, where the standard plugin at k = {k} leaves {budget:.1%}"
        knob = {"k": k} if shape.attention_k is None else {"k": k, "attention_k": shape.attention_k}
        added = plugin_parameters(backbone.d_model, backbone.encoder_layers, shape)
        return Setting(knob, share, added, note=note if differs else "")

    def work(self, steps: int, batch_size: int) -> list[Work]:
        """Return pre-training and adaptation."""
        if not self.learns:
            return []
        pretrain = Work("pretrain", self.pretrain_steps, self.pretrain_batch_size, self.pretrain_length, shared=True)
        return [w for w in (pretrain, Work("adapt", steps if self.adapt else 0, batch_size)) if w.steps]

    def reads(self) -> frozenset[str]:
        """Leave out the budget of a training that is left out."""
        if self.learns and self.adapt:
            return self.uses
        # the fit is on batches of the task where nothing was pre-trained
        return frozenset({"ratio", "batch_size"} if self._fitted and not self.pretrain_steps else {"ratio"})

    @property
    def _fitted(self) -> bool:
        """Whether a parameter starts from the closed-form fit; scores do on T5."""
        return self.init == "fit" and (self.decompression == "adapter" or self.compression == "attention")

    def version_on(self, family: str) -> int:
        """Return 2 on T5 where something starts from the fit, which has weighed errors by the stream since."""
        return 2 if self._fitted and family == "t5" else self.version

    def identity(self, data_root: Path | None) -> dict[str, Any]:
        """Leave out the settings of what is left out; name the corpus by its content."""
        fields = dataclasses.asdict(self)
        # newer options are named only where they say something, so that runs which are older keep their names
        newer = {"compression": "attention", "decompression": "adapter", "attention_k": 1, "adapt": True}
        unread = {name for name, default in newer.items() if fields[name] == default}
        if self.decompression == "copy":
            unread |= {"bottleneck"} if self.compression == "attention" else {"bottleneck", "init"}
        if not self.learns:
            unread |= {"init", "adapt"} | _ADAPTATION | _TRAINING
        elif not self.adapt:
            unread |= _ADAPTATION if self.pretrain_steps else _ADAPTATION | _TRAINING
        if not (self.learns and self.pretrain_steps):
            unread |= {name for name in fields if name.startswith("pretrain_")}
        identity = {name: value for name, value in fields.items() if name not in unread}
        if "pretrain_corpus" in identity:
            from bench.tasks.corpus import corpus_revision

            identity["pretrain_corpus"] = corpus_revision(self.pretrain_corpus, data_root)
        return identity

    def compress(self, teacher: Teacher, data: TaskData, ctx: RunContext) -> TaskModel:
        """Pre-train and adapt a plugin, and attach it to a copy that shares the teacher's weights."""
        from bench.measure.size import bytes_on_disk
        from bench.plugins.plugin import WEIGHTS_FILE, Plugin
        from bench.training.distill import attach_for_good

        artifact = ctx.cache.get(
            "plugin",
            ctx.identity,
            lambda folder, checkpoint: self._adapt(teacher.model, ctx, folder, checkpoint),
            ctx.progress.message,
        )
        ctx.record(artifact)
        plugin = Plugin.from_pretrained(artifact.folder).to(ctx.device).eval().requires_grad_(False)
        ctx.trained_parameters = plugin.num_parameters()
        ctx.bytes_added = bytes_on_disk(artifact.folder / WEIGHTS_FILE)
        return attach_for_good(teacher.model, plugin)

    def _adapt(self, model: TaskModel, ctx: RunContext, folder: Path, checkpoint: Path) -> dict[str, Any]:
        """Make the plugin of this run: from the pre-trained one if there is one, on the task's training split."""
        from bench.plugins.plugin import Plugin
        from bench.training.stage import FeatureBatches

        config = ctx.config
        batches = FeatureBatches(
            ctx.features["train"], config.batch_size, ctx.tokenizer.pad_token_id, config.seed, ctx.device
        )
        stages = []
        if self.learns and self.pretrain_steps:
            pretrained = self._pretrained(ctx)
            stages += [stage | {"cached": pretrained.cached} for stage in pretrained.meta["stages"]]
            plugin = Plugin.from_pretrained(pretrained.folder).to(ctx.device)
        else:
            plugin = self._start(model, batches, ctx)
        if self.learns and self.adapt and config.steps:
            stages.append(
                self._distill("adapt", plugin, model, batches, self.losses, self.lr, config.steps, ctx, checkpoint)
                | {"artifact": ctx.cache.key("plugin", ctx.identity)}
            )
        plugin.save_pretrained(folder)
        return {"stages": stages}

    def _pretrained(self, ctx: RunContext) -> Artifact:
        """Return the task-agnostic plugin, pre-training it if no run has yet."""
        own = {
            name: value for name, value in self.identity(ctx.data_root).items() if name not in _ADAPTATION | {"adapt"}
        }
        identity = {
            "method": f"{self.name}@{self.version_on(ctx.spec.family)}",
            "model": ctx.revisions["model"],
            "k": ctx.config.ratio,
            "seed": ctx.config.seed,
            "precision": ctx.config.precision,
            **own,
        }

        def make(folder: Path, checkpoint: Path) -> dict[str, Any]:
            model = ctx.pretrained()
            batches = self._corpus_batches(ctx)
            plugin = self._start(model, batches, ctx)
            stage = self._distill(
                "pretrain",
                plugin,
                model,
                batches,
                self.pretrain_losses,
                self.pretrain_lr,
                self.pretrain_steps,
                ctx,
                checkpoint,
            )
            plugin.save_pretrained(folder)
            return {"stages": [stage | {"artifact": ctx.cache.key("pretrained", identity)}]}

        return ctx.cache.get("pretrained", identity, make, ctx.progress.message)

    def _corpus_batches(self, ctx: RunContext) -> FeatureBatches:
        """T5 sees span-corrupted text, as it was pre-trained; BERT sees the text as it is.

        The targets are hidden states of the same model and not words, so that masking BERT's input would only make it
        unlike the inputs of the tasks.
        """
        from bench.tasks.corpus import load_corpus, spans
        from bench.tasks.corruption import bert_features, t5_features
        from bench.training.stage import FeatureBatches

        special = 2 if ctx.spec.family == "bert" else 1
        texts = load_corpus(self.pretrain_corpus, ctx.data_root)
        cut = spans(
            texts,
            ctx.tokenizer,
            self.pretrain_length - special,
            limit=self.pretrain_steps * self.pretrain_batch_size,
        )
        seed = ctx.config.seed
        features = (
            bert_features(cut, ctx.tokenizer) if ctx.spec.family == "bert" else t5_features(cut, ctx.tokenizer, seed)
        )
        return FeatureBatches(features, self.pretrain_batch_size, ctx.tokenizer.pad_token_id, seed, ctx.device)

    def _start(self, model: TaskModel, batches: FeatureBatches, ctx: RunContext) -> Plugin:
        """Return a new plugin, by closed-form fit or random."""
        import torch

        from bench.plugins.fit import fit_least_squares
        from bench.plugins.plugin import Plugin

        torch.manual_seed(ctx.config.seed)
        shape = self.shape(int(ctx.config.ratio or 0))
        plugin = Plugin.for_model(
            model,
            shape.k,
            bottleneck=shape.bottleneck,
            mask_padding=self.mask_padding,
            compression=shape.compression,
            decompression=shape.decompression,
            attention_k=shape.attention_k,
            backbone=ctx.spec.name,
        ).to(ctx.device)
        if self.learns and self.init == "fit":
            ctx.progress.stage("fit", ctx.spec.encoder_layers)
            fit_least_squares(plugin, model, _fit_inputs(batches), ctx.progress.advance)
        return plugin

    def _distill(
        self,
        name: Literal["pretrain", "adapt"],
        plugin: Plugin,
        model: TaskModel,
        batches: FeatureBatches,
        mix: str,
        lr: float,
        steps: int,
        ctx: RunContext,
        checkpoint: Path,
    ) -> dict[str, Any]:
        from bench.plugins.fit import measure_units
        from bench.training.distill import distill_plugin
        from bench.training.loop import Schedule

        schedule = Schedule(
            steps=steps,
            lr=lr,
            warmup=round(self.warmup * steps),
            decay="linear" if name == "pretrain" else self.decay,
            weight_decay=self.weight_decay,
            clip=self.clip,
            precision=ctx.config.precision,
        )
        return distill_plugin(
            name,
            plugin,
            model,
            batches,
            mix=mix,
            kind=None if name == "pretrain" else ctx.task.kind,
            temperature=self.temperature,
            schedule=schedule,
            ctx=ctx,
            checkpoint=checkpoint,
            units=measure_units(plugin, model, _fit_inputs(batches)) if self.init == "fit" else None,
        )


def _fit_inputs(batches: FeatureBatches) -> Iterator[dict[str, Tensor]]:
    """Return what the model is called with in the first batches of a training, some `FIT_TOKENS` tokens."""
    from bench.training.stage import model_inputs

    needed = max(1, round(FIT_TOKENS / (batches.mean_length * batches.batch_size)))
    return (model_inputs(batches(step)) for step in range(needed))
