"""Where the encoder FFNs of each family sit, and how one is swapped for another module and put back.

One class a family. Everything that compresses works through these, so that a new family is one class here.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from bench.backbones.spec import BackboneSpec
from bench.errors import BackboneError


class FFNSite(ABC):
    """One encoder FFN: the function u -> FFN(u) between its input (norm applied) and the residual addition."""

    inner: nn.Module
    """The frozen FFN, (batch, n, d) -> (batch, n, d)."""

    @abstractmethod
    def install(self, module: nn.Module) -> None:
        """Let ``module``, called like ``inner``, stand in for the FFN."""

    @abstractmethod
    def restore(self) -> None:
        """Put the FFN back exactly as it was."""


class _T5Site(FFNSite):
    def __init__(self, layer: Any) -> None:
        self.sublayer = layer.layer[-1]
        self.inner = self.sublayer.DenseReluDense

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

    def install(self, module: nn.Module) -> None:
        self.layer.ffn = module

    def restore(self) -> None:
        self.layer.ffn = self.inner


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
        self.family, self.masked, self.modules, self.layers, self._site = found

    def sites(self) -> list[FFNSite]:
        """Return the FFN of every encoder layer, bottom first."""
        return [self._site(layer) for layer in self.layers]

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


_View = tuple[str, nn.Module, list[nn.Module], list[nn.Module], Callable[[nn.Module], FFNSite]]


def _view(module: Any) -> _View | None:
    # transformers is imported by whoever built the model, so class names are enough here
    kind = type(module).__name__
    if kind == "BertModel":
        parts, written = [module.embeddings, module.encoder], getattr(module.encoder, "written", None)
        if written is not None:
            return "bert", module, parts, list(written.layers), _WrittenSite
        return "bert", module, parts, list(module.encoder.layer), _BertSite
    if kind == "T5EncoderStack":
        return "t5", module, [module], list(module.written.layers), _WrittenSite
    if kind == "T5Stack" and not module.is_decoder:
        return "t5", module, [module], list(module.block), _T5Site
    return None


def digest(module: nn.Module) -> str:
    """Return a sha256 over every parameter and buffer of ``module``, by name."""
    import hashlib

    total = hashlib.sha256()
    for name, tensor in sorted(module.state_dict().items()):
        total.update(name.encode())
        total.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes())
    return total.hexdigest()
