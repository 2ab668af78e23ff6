"""Many tasks on one resident backbone: each is a LoRA, a head and a plugin per k, and a batch may mix them."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, cast

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

from bench.artifacts import META_FILE
from bench.backbones.load import load_task_model, load_tokenizer, wrap
from bench.backbones.model import TextToTextModel
from bench.backbones.sites import EncoderView
from bench.backbones.source import model_revision
from bench.backbones.spec import BackboneSpec
from bench.errors import BackboneError, BenchError, PluginError, suggest
from bench.plugins.bank import PluginBank
from bench.plugins.plugin import Plugin
from bench.plugins.tasks import Rows, TaskPlugins
from bench.tasks.catalogue import TASKS
from bench.tasks.features import Feature, collate
from bench.tasks.spec import TaskSpec
from bench.training.teacher import WEIGHTS_FILE, lora_config

_PREFIX = "model.base_model.model."
"""What the weights of a LoRA teacher are called by, before the name that the backbone gives them."""


class EncoderHead(nn.Module):
    """What an encoder's task has above the last hidden state.

    Parameters
    ----------
    pooler
        Reads the first token; ``None`` for spans.
    out
        The last matrix.
    """

    def __init__(self, pooler: nn.Module | None, out: nn.Linear) -> None:
        super().__init__()
        self.pooler, self.out = pooler, out

    def forward(self, hidden: Tensor) -> Tensor:
        """Map (batch, n, d) to logits: (batch, classes), for regression (batch, 1), for spans (batch, n, 2)."""
        logits: Tensor = self.out(hidden if self.pooler is None else self.pooler(hidden))
        return logits


class MultiTaskModel(nn.Module):
    """One frozen backbone in memory, and what each task has of its own.

    The backbone's matrices run once, on the rows of all tasks together. Each row passes the LoRA and the head of its
    own task, and its own task's plugin at the k that is selected for the batch.

    Parameters
    ----------
    backbone
        Built-in name, Hub id or local folder.
    spec
        Its shape.

    Examples
    --------
    >>> model = MultiTaskModel("minilm-l6", spec)                          # doctest: +SKIP
    >>> model.add("sst2", sst2, teacher, [plugin2, plugin4])               # doctest: +SKIP
    >>> model.add("rte", rte, other_teacher, [other2, other4])             # doctest: +SKIP
    >>> model.select(4, ["sst2", "rte", "sst2"])                           # doctest: +SKIP
    >>> first, second, third = model(**batch)                              # doctest: +SKIP
    """

    def __init__(self, backbone: str, spec: BackboneSpec) -> None:
        super().__init__()
        self.spec, self.revision = spec, f"{spec.name}@{model_revision(backbone)}"
        self.tokenizer = load_tokenizer(backbone)
        # a span head brings no pooler, so that what is kept is the body that all tasks share
        loaded = load_task_model(backbone, spec, TASKS["squad"], self.tokenizer, seed=0).model
        self.body: Any = loaded.bert if spec.family == "bert" else loaded
        self.heads = nn.ModuleList()
        self.plugins: dict[str, dict[int, Plugin]] = {}
        self._peft: Any = None
        self._rows = Rows()
        self._bank: tuple[PluginBank, list[Any]] | None = None
        self.eval().requires_grad_(False)

    @property
    def tasks(self) -> tuple[str, ...]:
        """Names of the tasks, in the order in which they were added."""
        return tuple(self.plugins)

    @property
    def device(self) -> torch.device:
        """Where the backbone is."""
        return cast(torch.device, self.body.device)

    def add(self, name: str, task: TaskSpec, teacher: Path, plugins: Iterable[Plugin] = ()) -> None:
        """Add a task beside those that are there; the backbone's weights stay as they are.

        Parameters
        ----------
        name
            What it is called by in `select`.
        task
            What it asks, which decides on the head.
        teacher
            Folder of its LoRA teacher, as the artifact cache keeps it.
        plugins
            Its plugins, at most one for each k.

        Raises
        ------
        BackboneError
            If the teacher is no LoRA, is torn, or is of another backbone.
        PluginError
            If a plugin does not fit, or two have one k.
        BenchError
            If the name is taken.
        """
        if name in self.plugins:
            raise BenchError(f"task '{name}' is there already")
        own: dict[int, Plugin] = {}
        view = EncoderView(self.body)
        for plugin in plugins:
            plugin.check_fits(view)
            if own.setdefault(plugin.config.k, plugin) is not plugin:
                raise PluginError(f"two plugins of task '{name}' have k={plugin.config.k}")
        self._check_backbone(teacher)
        lora, saved = _read(teacher, "bert." if self.spec.family == "bert" else "")
        head = self._head(task, saved, teacher)
        self._detach()
        self._load_lora(f"task{len(self.heads)}", lora, teacher)
        self.heads.append(head.eval().requires_grad_(False).to(self.device))
        self.plugins[name] = {k: plugin.eval().requires_grad_(False) for k, plugin in own.items()}
        # registered, so that `.to` and `.parameters` reach them
        self.add_module(f"plugins{len(self.heads) - 1}", nn.ModuleList(own.values()))

    def select(self, k: int, tasks: Sequence[str]) -> None:
        """Say which task each row of the next batches belongs to, and at which k they run; 1 is dense.

        Raises
        ------
        BenchError
            If a task is not here.
        PluginError
            If a task has no plugin at ``k``.
        """
        for task in dict.fromkeys(tasks):
            if task not in self.plugins:
                raise BenchError(
                    f"no task '{task}' on this backbone.{suggest(task, self.tasks)} It has {', '.join(self.tasks)}."
                )
            if k != 1 and k not in self.plugins[task]:
                known = ", ".join(map(str, (1, *sorted(self.plugins[task]))))
                raise PluginError(f"task '{task}' has no plugin for k={k}; it has k = {known}")
        self._attached().select(k)
        self._rows.set(tasks, self.device)

    @torch.inference_mode()
    def forward(
        self, input_ids: Tensor, attention_mask: Tensor | None = None, token_type_ids: Tensor | None = None
    ) -> list[Tensor]:
        """Answer a batch whose rows belong to the tasks that were selected.

        Returns
        -------
        list
            Of each row its logits: (classes,), for regression (1,), for an encoder's spans (n, 2).
        """
        self._check_rows(input_ids)
        heads = dict(zip(self.plugins, self.heads, strict=True))
        answers: dict[int, Tensor] = {}
        if self.spec.family == "bert":
            states = self.body(
                input_ids=input_ids, attention_mask=attention_mask, token_type_ids=token_type_ids
            ).last_hidden_state
        else:
            free = [task for task in self._rows.groups if not len(cast(TextToTextModel, heads[task]).label_ids)]
            if free:
                raise BenchError(f"task '{free[0]}' has no labels to choose from; `generate` decodes its answers")
            first = cast(TextToTextModel, heads[self._rows.tasks[0]])
            states = self.body(
                input_ids=input_ids,
                attention_mask=attention_mask,
                decoder_input_ids=first.cloze(input_ids),
                use_cache=False,
            ).logits
        for task, rows in self._rows.groups.items():
            head = heads[task]
            own = states.index_select(0, rows)
            logits = head.read(own) if isinstance(head, TextToTextModel) else head(own)
            answers |= dict(zip(rows.tolist(), logits, strict=True))
        return [answers[i] for i in range(len(answers))]

    @torch.inference_mode()
    def generate(self, input_ids: Tensor, attention_mask: Tensor | None = None, max_new_tokens: int = 32) -> Tensor:
        """Decode a batch greedily (text-to-text backbones); (batch, length) token ids.

        Raises
        ------
        BenchError
            If the backbone is an encoder.
        """
        if self.spec.family == "bert":
            raise BenchError(f"{self.spec.name} is an encoder and generates nothing; call the model")
        self._check_rows(input_ids)
        tokens: Tensor = self.body.generate(
            input_ids=input_ids,
            attention_mask=attention_mask,
            max_new_tokens=max_new_tokens,
            do_sample=False,
            num_beams=1,
        )
        return tokens

    def _check_rows(self, input_ids: Tensor) -> None:
        if len(input_ids) != len(self._rows.tasks):
            raise BenchError(
                f"the batch has {len(input_ids)} rows, and tasks were selected for {len(self._rows.tasks)}; "
                "call select(k, tasks) with a task for each row"
            )

    def _check_backbone(self, teacher: Path) -> None:
        try:
            made_of = json.loads((teacher / META_FILE).read_bytes())["identity"]["model"]
        except FileNotFoundError:
            return  # a folder that came without its record; names and shapes of its weights are checked
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise BackboneError(f"{teacher / META_FILE} cannot be read: {error}") from None
        if made_of != self.revision:
            raise BackboneError(f"the teacher in {teacher} is of backbone {made_of}, and this one is {self.revision}")

    def _head(self, task: TaskSpec, saved: Mapping[str, Tensor], teacher: Path) -> nn.Module:
        """Return the head of a task with its weights; that of T5 is which tokens its labels are."""
        if self.spec.family == "t5":
            if saved:
                raise BackboneError(f"the teacher in {teacher} has a head, which a text-to-text backbone has not")
            model = wrap(self.body, task, self.tokenizer)
            model.model = _Config(self.body.config)
            return model
        from transformers.models.bert.modeling_bert import BertPooler

        width = self.spec.d_model
        head = EncoderHead(
            None if task.kind == "qa" else BertPooler(self.body.config), nn.Linear(width, task.n_outputs)
        )
        out = "qa_outputs" if task.kind == "qa" else "classifier"
        renamed = {name.replace(f"{out}.", "out."): tensor for name, tensor in saved.items()}
        try:
            head.load_state_dict(renamed)
        except RuntimeError as error:
            problem = " ".join(str(error).split())
            raise BackboneError(
                f"the head of the teacher in {teacher} is not that of task '{task.name}': {problem}"
            ) from None
        return head

    def _load_lora(self, adapter: str, weights: Mapping[str, Tensor], teacher: Path) -> None:
        import peft

        config = lora_config(self.spec.family)
        if self._peft is None:
            # kept in a list, since its modules are those of the body
            self._peft = [peft.get_peft_model(self.body, config, adapter_name=adapter)]
            for module in self.body.modules():
                if isinstance(module, peft.tuners.lora.LoraLayer):
                    cast(nn.Module, module).register_forward_pre_hook(self._name_rows, with_kwargs=True)
        else:
            self._peft[0].add_adapter(adapter, config)
        self.body.eval().requires_grad_(False)
        places = {n: p for n, p in self.body.named_parameters() if f".{adapter}." in n}
        wanted = {name.replace(".default.", f".{adapter}."): tensor for name, tensor in weights.items()}
        differing = sorted(places.keys() ^ wanted.keys())
        differing += [name for name in places.keys() & wanted.keys() if places[name].shape != wanted[name].shape]
        if differing:
            self._peft[0].delete_adapter(adapter)
            raise BackboneError(
                f"the teacher in {teacher} is not one of {self.spec.name}: it lacks, has too many or has in another "
                f"shape {len(differing)} weights such as {differing[0]}"
            )
        for name, place in places.items():
            place.data = wanted[name].to(place.device)

    def _name_rows(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, Any]:
        """Tell a LoRA layer which adapter each row has (forward pre-hook)."""
        places = {task: f"task{i}" for i, task in enumerate(self.plugins)}
        return args, kwargs | {"adapter_names": [places[task] for task in self._rows.tasks]}

    def _attached(self) -> PluginBank:
        """Return the bank of all tasks' plugins, around the backbone."""
        if self._bank is None:
            ks = sorted({k for own in self.plugins.values() for k in own})
            of_k = {k: {task: own[k] for task, own in self.plugins.items() if k in own} for k in ks}
            bank = PluginBank(TaskPlugins(plugins, self._rows) for plugins in of_k.values())
            self._bank = bank, bank.attach(self.body)
        return self._bank[0]

    def _detach(self) -> None:
        if self._bank is not None:
            bank, attachment = self._bank
            bank.detach(attachment)
            self._bank = None


def stacked(features: Sequence[Feature], pad_token_id: int) -> dict[str, Tensor]:
    """Stack what a model reads of examples, whatever their tasks, into one padded batch.

    Labels and decoder inputs, which tasks of one kind alone have, are left out.
    """
    read = ("input_ids", "token_type_ids")
    bare = [cast(Feature, {name: feature[name] for name in read if name in feature}) for feature in features]  # type: ignore[literal-required]
    batch = collate(bare, pad_token_id)
    return {name: batch[name] for name in (*read, "attention_mask") if name in batch}


class _Config(nn.Module):
    """Stands in for the backbone in a head that only reads logits: it has the config and no weight."""

    def __init__(self, config: Any) -> None:
        super().__init__()
        self.config = config


def _read(teacher: Path, body: str) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Return the LoRA's and the head's weights of a teacher, by the names that they have in the body and in a head."""
    try:
        tensors = load_file(teacher / WEIGHTS_FILE)
    except (OSError, SafetensorError) as error:
        raise BackboneError(f"the teacher in {teacher} cannot be read: {error}") from None
    if not any(".lora_A." in name for name in tensors):
        raise BackboneError(
            f"the teacher in {teacher} is a whole model of its own and cannot share a backbone; "
            "fine-tune it with --teacher-lora true"
        )
    lora: dict[str, Tensor] = {}
    head: dict[str, Tensor] = {}
    for name, tensor in tensors.items():
        # what load_file returns is mapped from the file; a copy is memory of its own, whatever becomes of the file
        own, tensor = name.removeprefix(_PREFIX).removeprefix(body), tensor.clone()
        if ".lora_" in own:
            lora[own] = tensor
        else:
            head[own.replace(".modules_to_save.default", "")] = tensor
    return lora, head
