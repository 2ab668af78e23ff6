"""Where the encoder's FFNs and attentions of each family sit, and how one is swapped for another module and put back.

One class a family and sublayer. Everything that compresses works through these, so that a new family is one class here.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from bench.backbones.encoder import Attention, Overhead, Seen
from bench.backbones.spec import BackboneSpec
from bench.errors import BackboneError


class FFNSite(ABC):
    """One encoder FFN: the function u -> FFN(u) between its input (norm applied) and the residual addition."""

    inner: nn.Module
    """The frozen FFN, (batch, n, d) -> (batch, n, d)."""

    norm: nn.Module | None = None
    """Makes u of the residual stream that FFN(u) is added to; ``None`` where the stream itself is normalised."""

    @abstractmethod
    def install(self, module: nn.Module) -> None:
        """Let ``module``, called like ``inner``, stand in for the FFN."""

    @abstractmethod
    def restore(self) -> None:
        """Put the FFN back exactly as it was."""


class _T5Site(FFNSite):
    def __init__(self, layer: Any) -> None:
        self.sublayer = layer.layer[-1]
        self.inner, self.norm = self.sublayer.DenseReluDense, self.sublayer.layer_norm

    def install(self, module: nn.Module) -> None:
        self.sublayer.DenseReluDense = module

    def restore(self) -> None:
        self.sublayer.DenseReluDense = self.inner


class BertFFN(nn.Module):
    """BERT's two dense layers as one function of the attention output."""

    def __init__(self, intermediate: nn.Module, dense: nn.Module) -> None:
        super().__init__()
        self.intermediate, self.dense = intermediate, dense

    def forward(self, u: Tensor) -> Tensor:
        """Map (batch, n, d) -> (batch, n, d)."""
        out: Tensor = self.dense(self.intermediate(u))
        return out


class BertSublayer(nn.Module):
    """What follows the attention output in a BERT layer: LayerNorm(u + dropout(ffn(u)))."""

    def __init__(self, ffn: nn.Module, dropout: nn.Module, norm: nn.Module) -> None:
        super().__init__()
        self.ffn, self.dropout, self.LayerNorm = ffn, dropout, norm

    def forward(self, hidden_states: Tensor, input_tensor: Tensor) -> Tensor:
        """Take the attention output twice, as ``BertOutput`` is called behind an identity ``intermediate``."""
        out: Tensor = self.LayerNorm(self.dropout(self.ffn(input_tensor)) + input_tensor)
        return out


class _BertSite(FFNSite):
    def __init__(self, layer: Any) -> None:
        self.layer, self.intermediate, self.output = layer, layer.intermediate, layer.output
        self.inner = BertFFN(self.intermediate, self.output.dense)

    def install(self, module: nn.Module) -> None:
        self.layer.intermediate = nn.Identity()
        self.layer.output = BertSublayer(module, self.output.dropout, self.output.LayerNorm)

    def restore(self) -> None:
        self.layer.intermediate, self.layer.output = self.intermediate, self.output


class _WrittenSite(FFNSite):
    def __init__(self, layer: Any) -> None:
        self.layer, self.inner = layer, layer.ffn
        self.norm = layer.ffn_norm if layer.pre_norm else None

    def install(self, module: nn.Module) -> None:
        self.layer.ffn = module

    def restore(self) -> None:
        self.layer.ffn = self.inner


class AroundAttention(Overhead):
    """Stands in for the self-attention of one encoder layer whenever it is active.

    Parameters
    ----------
    inner
        The backbone's attention.
    """

    def __init__(self, inner: Attention) -> None:
        super().__init__()
        self.inner = inner

    @property
    def active(self) -> bool:
        """Whether it runs now, in the backbone's stead."""
        raise NotImplementedError

    def backbone_modules(self) -> tuple[nn.Module, ...]:
        """Return the attention."""
        return (self.inner,)

    def forward(self, x: Tensor, bias: Tensor | None) -> tuple[Tensor, Seen | None]:
        """Attend as `Attention` does; the bias need not leave padding out."""
        raise NotImplementedError


class AttentionSite(ABC):
    """The self-attention of one encoder layer.

    Attributes
    ----------
    attention
        The frozen attention, written out.
    """

    attention: Attention

    @abstractmethod
    def install(self, module: AroundAttention) -> None:
        """Let ``module`` stand in for the attention while it is active; while it is not, nothing changes."""

    @abstractmethod
    def restore(self) -> None:
        """Put the attention back exactly as it was."""


def t5_attention(own: Any) -> Attention:
    """Return transformers' T5 self-attention, written out with the same weights."""
    return Attention(own.q, own.k, own.v, own.o, own.n_heads, own.scaling, own.dropout).train(own.training)


def bert_attention(sublayer: Any) -> Attention:
    """Return transformers' BERT self-attention with its output matrix, written out with the same weights."""
    own, heads = sublayer.self, sublayer.self.num_attention_heads
    attention = Attention(
        own.query, own.key, own.value, sublayer.output.dense, heads, own.scaling, own.dropout.p
    )  # fmt: skip
    return attention.train(own.training)


class _T5Attention(nn.Module):
    """Called as a T5 block calls its self-attention."""

    def __init__(self, inner: Any, around: AroundAttention) -> None:
        super().__init__()
        self.inner, self.around = inner, around

    def forward(self, hidden_states: Tensor, position_bias: Tensor | None = None, **kwargs: Any) -> Any:
        if not self.around.active:
            return self.inner(hidden_states, position_bias=position_bias, **kwargs)
        if position_bias is None:
            position_bias = self.inner.compute_bias(hidden_states.shape[1], hidden_states.shape[1])
        # the bias as it came, for the layers above share it
        return self.around(hidden_states, position_bias)[0], position_bias, None


class _T5AttentionSite(AttentionSite):
    def __init__(self, layer: Any) -> None:
        self.sublayer = layer.layer[0]
        self.inner = self.sublayer.SelfAttention
        self.attention = t5_attention(self.inner)

    def install(self, module: AroundAttention) -> None:
        self.sublayer.SelfAttention = _T5Attention(self.inner, module)

    def restore(self) -> None:
        self.sublayer.SelfAttention = self.inner


class _BertAttention(nn.Module):
    """Called as a BERT layer calls its attention sublayer, residual addition and norm included."""

    def __init__(self, inner: Any, around: AroundAttention) -> None:
        super().__init__()
        self.inner, self.around = inner, around

    def forward(self, hidden_states: Tensor, *args: Any, **kwargs: Any) -> Any:
        if not self.around.active:
            return self.inner(hidden_states, *args, **kwargs)
        out = self.inner.output
        z, _ = self.around(hidden_states, None)
        return out.LayerNorm(out.dropout(z) + hidden_states), None


class _BertAttentionSite(AttentionSite):
    def __init__(self, layer: Any) -> None:
        self.layer, self.inner = layer, layer.attention
        self.attention = bert_attention(self.inner)

    def install(self, module: AroundAttention) -> None:
        self.layer.attention = _BertAttention(self.inner, module)

    def restore(self) -> None:
        self.layer.attention = self.inner


class _WrittenAttention(nn.Module):
    """Called as a written-out layer calls its attention."""

    def __init__(self, inner: Attention, around: AroundAttention) -> None:
        super().__init__()
        self.inner, self.around = inner, around

    def forward(self, x: Tensor, bias: Tensor | None, probabilities: bool = False) -> Any:
        return self.around(x, bias) if self.around.active else self.inner(x, bias, probabilities)


class _WrittenAttentionSite(AttentionSite):
    def __init__(self, layer: Any) -> None:
        self.layer, self.attention = layer, layer.attention

    def install(self, module: AroundAttention) -> None:
        self.layer.attention = _WrittenAttention(self.attention, module)

    def restore(self) -> None:
        self.layer.attention = self.attention


class EncoderView:
    """The encoder inside a model of a supported family.

    Parameters
    ----------
    model
        A transformers model of the family, with or without a head, or anything that holds just one.

    Raises
    ------
    BackboneError
        If no supported encoder is inside.

    Attributes
    ----------
    family
        Name of the family.
    masked
        The module that is called with the ``attention_mask`` of the encoder's input.
    modules
        The modules that make up the encoder, for attributing cost.
    layers
        The encoder layers, bottom first.
    """

    def __init__(self, model: nn.Module) -> None:
        found = next((v for m in model.modules() if (v := _view(m)) is not None), None)
        if found is None:
            raise BackboneError(f"{type(model).__name__} holds no encoder of a supported family (bert, t5)")
        self.family, self.masked, self.modules, self.layers, self._site, self._attention_site = found

    def sites(self) -> list[FFNSite]:
        """Return the FFN of every encoder layer, bottom first."""
        return [self._site(layer) for layer in self.layers]

    def attention_sites(self) -> list[AttentionSite]:
        """Return the self-attention of every encoder layer, bottom first."""
        return [self._attention_site(layer) for layer in self.layers]

    @property
    def spec(self) -> BackboneSpec:
        """Shape of the backbone."""
        config: Any = self.masked.config
        return BackboneSpec.from_config(str(config.name_or_path), config.to_dict())

    @property
    def d_model(self) -> int:
        """Width of the residual stream."""
        config: Any = self.masked.config
        return int(config.hidden_size)


class _View(NamedTuple):
    family: str
    masked: nn.Module
    modules: list[nn.Module]
    layers: list[nn.Module]
    site: Callable[[nn.Module], FFNSite]
    attention_site: Callable[[nn.Module], AttentionSite]


def _view(module: Any) -> _View | None:
    # transformers is imported by whoever built the model, so class names are enough here
    kind = type(module).__name__
    if kind == "BertModel":
        parts, written = [module.embeddings, module.encoder], getattr(module.encoder, "written", None)
        if written is not None:
            return _View("bert", module, parts, list(written.layers), _WrittenSite, _WrittenAttentionSite)
        return _View("bert", module, parts, list(module.encoder.layer), _BertSite, _BertAttentionSite)
    if kind == "T5EncoderStack":
        return _View("t5", module, [module], list(module.written.layers), _WrittenSite, _WrittenAttentionSite)
    if kind == "T5Stack" and not module.is_decoder:
        return _View("t5", module, [module], list(module.block), _T5Site, _T5AttentionSite)
    return None


def digest(module: nn.Module) -> str:
    """Return a sha256 over every parameter and buffer of ``module``, by name."""
    import hashlib

    total = hashlib.sha256()
    for name, tensor in sorted(module.state_dict().items()):
        total.update(name.encode())
        total.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes())
    return total.hexdigest()
