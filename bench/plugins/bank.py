"""A bank of plugins that stay resident on one model, and switch between batches without copying a weight."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from bench.backbones.encoder import Overhead
from bench.backbones.sites import EncoderView, FFNSite
from bench.errors import PluginError
from bench.plugins.layers import CompressionPair
from bench.plugins.plugin import Plugin


class Selection:
    """Which k is active, and the mask of the batch that is running; shared by all layers of one attachment."""

    def __init__(self) -> None:
        self.k = 1
        self.mask: Tensor | None = None

    def capture_mask(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Note the attention mask that the encoder is called with (forward pre-hook)."""
        mask = kwargs.get("attention_mask", args[1] if len(args) > 1 else None)
        self.mask = None if mask is None else mask.bool()

    def release_mask(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
        """Forget the mask after the encoder has run (forward hook)."""
        self.mask = None


class CompressedFFN(Overhead):
    """Stands in for one encoder FFN: the frozen FFN between the compression pair that is selected.

    Parameters
    ----------
    inner
        The frozen FFN, (batch, n, d) -> (batch, n, d).
    pairs
        Compression pair of this layer by k, as text.
    selection
        Shared by all layers; ``k == 1`` is the dense path.
    """

    def __init__(self, inner: nn.Module, pairs: nn.ModuleDict, selection: Selection) -> None:
        super().__init__()
        self.inner, self.pairs, self.selection = inner, pairs, selection

    def backbone_modules(self) -> tuple[nn.Module, ...]:
        """Return the frozen FFN."""
        return (self.inner,)

    def forward(self, u: Tensor) -> Tensor:
        """Map (batch, n, d) -> (batch, n, d), running the FFN on ceil(n/k) rows."""
        k = self.selection.k
        if k == 1:
            return self._dense(u)
        pair, mask = self.pair(k), self.selection.mask
        n = u.shape[1]
        short = -n % k
        if short:
            u = F.pad(u, (0, 0, 0, short))
            mask = torch.ones(u.shape[0], n, dtype=torch.bool, device=u.device) if mask is None else mask
            mask = F.pad(mask, (0, short))
        z = pair.decompress(self._dense(pair.compress(u, mask)), u)
        return z[:, :n] if short else z

    def pair(self, k: int) -> CompressionPair:
        """Return the compression pair of this layer at ``k``."""
        return cast(CompressionPair, self.pairs[str(k)])

    def _dense(self, rows: Tensor) -> Tensor:
        return cast(Tensor, self.inner(rows))


class PluginBank:
    """Plugins of one backbone, resident together.

    Parameters
    ----------
    plugins
        At most one plugin per k, all made for the same shape.

    Raises
    ------
    PluginError
        If two plugins have the same k.

    Examples
    --------
    >>> bank = PluginBank([plugin2, plugin4])           # doctest: +SKIP
    >>> with bank.attached(model):                      # doctest: +SKIP
    ...     bank.select(4); fast = model(**batch)
    ...     bank.select(1); exact = model(**batch)
    """

    def __init__(self, plugins: Iterable[Plugin]) -> None:
        self.plugins: dict[int, Plugin] = {}
        for plugin in plugins:
            if self.plugins.setdefault(plugin.config.k, plugin) is not plugin:
                raise PluginError(f"two plugins of this bank have k={plugin.config.k}; it can hold one for each k")
        self._selection: Selection | None = None

    @property
    def ks(self) -> tuple[int, ...]:
        """Every k that can be selected, 1 (dense) included."""
        return (1, *sorted(self.plugins))

    def select(self, k: int) -> None:
        """Switch to the plugin at ``k``; 1 is the dense model.

        Raises
        ------
        PluginError
            If the bank holds no plugin for ``k``, or is attached to no model.
        """
        if k not in self.ks:
            raise PluginError(f"no plugin for k={k} in this bank; it holds k = {', '.join(map(str, self.ks))}")
        if self._selection is None:
            raise PluginError("the bank is attached to no model; use `with bank.attached(model): ...`")
        self._selection.k = k

    def attach(self, model: nn.Module) -> list[Any]:
        """Put the bank around every encoder FFN of ``model`` for good; the dense path is selected.

        Returns
        -------
        list
            What ``detach`` needs to undo it.

        Raises
        ------
        PluginError
            If a plugin does not fit the model, or one is attached already.
        """
        if self._selection is not None:
            raise PluginError("the bank is attached already; detach it first, or make a second bank")
        view = EncoderView(model)
        if any(isinstance(module, CompressedFFN) for layer in view.layers for module in layer.modules()):
            raise PluginError("another bank is attached to this model; detach it first")
        for plugin in self.plugins.values():
            plugin.check_fits(view)
        sites, selection = view.sites(), Selection()
        for index, site in enumerate(sites):
            pairs = nn.ModuleDict({str(k): plugin.pairs[index] for k, plugin in self.plugins.items()})
            site.install(CompressedFFN(site.inner, pairs, selection))
        handles = [
            view.masked.register_forward_pre_hook(selection.capture_mask, with_kwargs=True),
            view.masked.register_forward_hook(selection.release_mask, with_kwargs=True, always_call=True),
        ]
        self._selection = selection
        return [sites, handles]

    def detach(self, attachment: list[Any]) -> None:
        """Undo ``attach``: the model is bit-identical to what it was.

        Raises
        ------
        PluginError
            If the bank is attached to no model.
        """
        if self._selection is None:
            raise PluginError("the bank is attached to no model, so there is nothing to detach")
        sites, handles = attachment
        site: FFNSite
        for site in sites:
            site.restore()
        for handle in handles:
            handle.remove()
        self._selection = None

    @contextmanager
    def attached(self, model: nn.Module, k: int | None = None) -> Iterator[PluginBank]:
        """Attach to ``model`` for the length of a ``with`` block, with ``k`` selected (the dense path by default)."""
        attachment = self.attach(model)
        try:
            if k is not None:
                self.select(k)
            yield self
        finally:
            self.detach(attachment)
