"""A bank of plugins that stay resident on one model, and switch between batches without copying a weight."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from bench.backbones.encoder import Attention, Overhead, Seen
from bench.backbones.sites import AroundAttention, EncoderView
from bench.errors import PluginError
from bench.plugins.layers import CompressionPair
from bench.plugins.plugin import Plugin


class Selection:
    """Which k is active, and the mask of the batch that is running; shared by all layers of one attachment."""

    def __init__(self) -> None:
        self.k = 1
        self.mask: Tensor | None = None
        self._bias: tuple[Tensor, Tensor] | None = None

    def merged_bias(self, bias: Tensor | None, real: Tensor) -> Tensor:
        """Return `merged_bias`, made once a batch where all layers share one bias."""
        if bias is None:
            return merged_bias(bias, real)
        if self._bias is None or self._bias[0] is not bias:
            self._bias = bias, merged_bias(bias, real)
        return self._bias[1]

    def capture_mask(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Note the attention mask that the encoder is called with (forward pre-hook)."""
        mask = kwargs.get("attention_mask", args[1] if len(args) > 1 else None)
        self.mask = None if mask is None else mask.bool()

    def release_mask(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
        """Forget the batch after the encoder has run (forward hook)."""
        self.mask = self._bias = None


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
        pair = self.pair(k)
        whole, mask = whole_groups(u, self.selection.mask, k)
        z: Tensor = pair.decompress(self._dense(pair.compress(whole, mask)), whole)
        return z[:, : u.shape[1]]

    def pair(self, k: int) -> CompressionPair:
        """Return the compression pair of this layer at ``k``."""
        return cast(CompressionPair, self.pairs[str(k)])

    def _dense(self, rows: Tensor) -> Tensor:
        return cast(Tensor, self.inner(rows))


class MergedAttention(AroundAttention):
    """Stands in for one encoder self-attention: its keys and values are made of merged vectors.

    There are as many queries as before. A merged vector stands for all of its m tokens: log m is added to the logits of
    its key, so that m tokens which are alike get the attention that they got apart. T5's position bias of a merged key
    is the mean over its tokens. Not in the paper.

    Parameters
    ----------
    inner
        The frozen attention.
    pairs
        By k, as text, what merges the vectors of this layer, for the plugins that merge them here; nothing is expanded.
    selection
        Shared by all layers.
    """

    def __init__(self, inner: Attention, pairs: nn.ModuleDict, selection: Selection) -> None:
        super().__init__(inner)
        self.pairs, self.selection = pairs, selection

    @property
    def active(self) -> bool:
        """Whether the selected plugin merges keys and values."""
        return str(self.selection.k) in self.pairs

    def forward(self, x: Tensor, bias: Tensor | None) -> tuple[Tensor, Seen | None]:
        """Attend from n queries to ceil(n/k) keys."""
        pair = cast(CompressionPair, self.pairs[str(self.selection.k)])
        whole, mask = whole_groups(x, self.selection.mask, pair.k)
        real = whole.new_ones(whole.shape[:2], dtype=torch.bool) if mask is None else mask
        bias = self.selection.merged_bias(bias, real.unflatten(1, (-1, pair.k)))
        attended: tuple[Tensor, Seen | None] = self.inner(x, bias, keys=pair.compress(whole, mask))
        return attended


def whole_groups(u: Tensor, mask: Tensor | None, k: int) -> tuple[Tensor, Tensor | None]:
    """Pad vectors (batch, n, d) and mask (batch, n) with zeros to a multiple of k."""
    short = -u.shape[1] % k
    if not short:
        return u, mask
    mask = u.new_ones(u.shape[:2], dtype=torch.bool) if mask is None else mask
    return F.pad(u, (0, 0, 0, short)), F.pad(mask, (0, short))


def merged_bias(bias: Tensor | None, real: Tensor) -> Tensor:
    """Return what is added to the logits of merged keys, (batch, heads or 1, n or 1, groups).

    Parameters
    ----------
    bias
        What is added to those of the vectors themselves, (batch or 1, heads or 1, n or 1, n), or ``None``.
    real
        True at tokens, (batch, groups, k).
    """
    size = real.sum(-1)
    added = size.log().masked_fill(size == 0, torch.finfo().min)[:, None, None]
    if bias is None:
        return added
    share = (real / size.clamp_min(1).unsqueeze(-1))[:, None, None]
    groups, k = real.shape[1:]
    whole: Tensor = F.pad(bias, (0, groups * k - bias.shape[-1])).unflatten(-1, (groups, k))
    return (whole * share).sum(-1) + added


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
        """Put the bank around every encoder layer of ``model`` for good; the dense path is selected.

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
        merging = {str(k): plugin.attention for k, plugin in self.plugins.items() if plugin.attention is not None}
        attention_sites = view.attention_sites() if merging else []
        for index, attention_site in enumerate(attention_sites):
            pairs = nn.ModuleDict({k: attention[index] for k, attention in merging.items()})
            attention_site.install(MergedAttention(attention_site.attention, pairs, selection))
        handles = [
            view.masked.register_forward_pre_hook(selection.capture_mask, with_kwargs=True),
            view.masked.register_forward_hook(selection.release_mask, with_kwargs=True, always_call=True),
        ]
        self._selection = selection
        return [[*sites, *attention_sites], handles]

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
