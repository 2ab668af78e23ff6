"""Plugins of several tasks in one batch: each row is compressed by the plugin of its own task, all at one k."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import cast

import torch
from torch import Tensor, nn

from bench.backbones.sites import EncoderView
from bench.errors import PluginError
from bench.plugins.layers import CompressionPair
from bench.plugins.plugin import Plugin


class Rows:
    """Which task each row of the batch belongs to; shared by all layers of one model.

    Attributes
    ----------
    tasks
        Of each row, its task.
    groups
        Task -> its rows, (rows,), in the order in which tasks first appear.
    """

    def __init__(self) -> None:
        self.tasks: tuple[str, ...] = ()
        self.groups: dict[str, Tensor] = {}

    def set(self, tasks: Sequence[str], device: torch.device | str = "cpu") -> None:
        """Say which task each row belongs to."""
        self.tasks = tuple(tasks)
        places = {task: [i for i, own in enumerate(tasks) if own == task] for task in dict.fromkeys(tasks)}
        self.groups = {task: torch.tensor(rows, device=device) for task, rows in places.items()}

    def each(self, of_task: Callable[[str, Tensor | None], Tensor]) -> Tensor:
        """Return what ``of_task`` says of the rows of each task, in the order of the batch.

        Parameters
        ----------
        of_task
            Task and its rows, ``None`` where they are the whole batch -> a tensor with as many rows.
        """
        if len(self.groups) == 1:
            return of_task(next(iter(self.groups)), None)
        parts = [of_task(task, rows) for task, rows in self.groups.items()]
        back = torch.cat(list(self.groups.values())).argsort()
        return torch.cat(parts).index_select(0, back)


def _of(tensor: Tensor | None, rows: Tensor | None) -> Tensor | None:
    return tensor if tensor is None or rows is None else tensor.index_select(0, rows)


class TaskPairs(nn.Module):
    """The compression pairs of one layer at one k, a task each; called like a `CompressionPair`.

    Parameters
    ----------
    pairs
        Task -> its pair.
    rows
        Shared by all layers.
    """

    def __init__(self, pairs: Mapping[str, CompressionPair], rows: Rows) -> None:
        super().__init__()
        # a list, since a task may have a dot in its name, which a module may not
        self.names, self.of_tasks, self.rows = list(pairs), nn.ModuleList(pairs.values()), rows
        self.k = next(iter(pairs.values())).k

    def of(self, task: str) -> CompressionPair:
        """Return the pair of one task."""
        return cast(CompressionPair, self.of_tasks[self.names.index(task)])

    def compress(self, u: Tensor, mask: Tensor | None) -> Tensor:
        """Merge groups of k, (batch, n, d) -> (batch, n/k, d), each row as its task does."""
        return self.rows.each(lambda task, rows: self.of(task).compress(cast(Tensor, _of(u, rows)), _of(mask, rows)))

    def decompress(self, y: Tensor, u: Tensor) -> Tensor:
        """Expand (batch, n/k, d) to (batch, n, d), each row as its task does."""
        return self.rows.each(
            lambda task, rows: self.of(task).decompress(cast(Tensor, _of(y, rows)), cast(Tensor, _of(u, rows)))
        )


class TaskPlugins(Plugin):
    """Plugins of several tasks at one k that stand in for one plugin, in a `bench.plugins.bank.PluginBank` too.

    The frozen FFN runs once on the rows of all tasks together; what differs by task is a few small matrices.

    Parameters
    ----------
    plugins
        Task -> its plugin, all at one k and for one backbone. How they compress and expand may differ.
    rows
        Says which task a row belongs to; the caller sets it before each batch.

    Raises
    ------
    PluginError
        If there is none, or they differ in k or in the k of their keys and values.
    """

    def __init__(self, plugins: Mapping[str, Plugin], rows: Rows) -> None:
        nn.Module.__init__(self)
        if not plugins:
            raise PluginError("no task has a plugin")
        first, *others = plugins.values()
        for field in ("k", "attention_k"):
            if len(found := {getattr(p.config, field) for p in plugins.values()}) > 1:
                raise PluginError(
                    f"the plugins of {', '.join(plugins)} cannot share a batch: they differ in {field} "
                    f"({', '.join(map(str, sorted(found, key=str)))})"
                )
        self.config, self.plugins = first.config, dict(plugins)
        layers = range(first.config.n_layers)
        if any(len(other.pairs) != len(layers) for other in others):
            raise PluginError(f"the plugins of {', '.join(plugins)} were made for backbones of different depth")

        def of_layer(lists: Mapping[str, nn.ModuleList], layer: int) -> TaskPairs:
            return TaskPairs({task: cast(CompressionPair, pairs[layer]) for task, pairs in lists.items()}, rows)

        own = {task: plugin.pairs for task, plugin in plugins.items()}
        self.pairs = nn.ModuleList(of_layer(own, i) for i in layers)
        self.attention = None
        if first.attention is not None:
            merging = {task: cast(nn.ModuleList, plugin.attention) for task, plugin in plugins.items()}
            self.attention = nn.ModuleList(of_layer(merging, i) for i in layers)

    def check_fits(self, view: EncoderView) -> None:
        """Raise ``PluginError`` unless every task's plugin fits."""
        for plugin in self.plugins.values():
            plugin.check_fits(view)
