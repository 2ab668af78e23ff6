"""The authors' released plugin checkpoints -> plugins; they are pickles, of which nothing but tensors is read.

Source: the released code of Xiao et al., "Variator", Findings of EMNLP 2023, whose adapter reads ``[y; u]``.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from bench.backbones.catalogue import known_backbones, spec_of
from bench.backbones.spec import BackboneSpec
from bench.errors import PluginError
from bench.plugins.plugin import Plugin, PluginConfig

_NAMES = {
    "mux_layer": "score",
    "demux_adapter.w_in": "w1",
    "demux_adapter.w_out": "w2",
}
_KEY = re.compile(r"mux_layer\.(\d+)\.(mux_layer|demux_adapter\.w_in|demux_adapter\.w_out)\.(weight|bias)")


def convert(path: Path | str, backbone: str | None = None) -> Plugin:
    """Read a released checkpoint as a plugin in fp32.

    Parameters
    ----------
    path
        A state dict saved by torch: for each encoder layer ``i``, ``mux_layer.<i>.mux_layer`` (the scores) and
        ``mux_layer.<i>.demux_adapter.w_in`` and ``.w_out``, each with weight and bias.
    backbone
        What it was made for: a built-in name, Hub id or local folder; by default the original T5 of its shape.

    Raises
    ------
    PluginError
        If the file holds anything but tensors, is no such checkpoint, or does not fit the backbone.
    """
    path = Path(path)
    layers = _layers(_tensors(path), path)
    k, width = layers[0]["score.weight"].shape
    d_model, bottleneck = width // k, layers[0]["w1.weight"].shape[0]
    spec = spec_of(backbone) if backbone else _original(d_model, len(layers), path)
    if (spec.d_model, spec.encoder_layers) != (d_model, len(layers)):
        raise PluginError(
            f"{path} has {len(layers)} layers of width {d_model}; backbone '{backbone}' has {spec.encoder_layers} "
            f"encoder layers of width {spec.d_model}"
        )
    plugin = Plugin(
        PluginConfig(
            k=k,
            family=spec.family,
            d_model=d_model,
            n_layers=len(layers),
            d_ff=spec.d_ff,
            activation=spec.activation,
            vocab_size=spec.vocab_size,
            bottleneck=bottleneck,
            mask_padding=False,  # the released code has no mask
            backbone=spec.name,
        )
    )
    state = {f"pairs.{i}.{name}": tensor for i, layer in enumerate(layers) for name, tensor in _split(layer).items()}
    try:
        plugin.load_state_dict(state)
    except RuntimeError as error:
        raise PluginError(f"{path}: its layers differ in shape: {error}") from None
    return plugin


def _tensors(path: Path) -> Mapping[str, Tensor]:
    try:
        state: Any = torch.load(path, map_location="cpu", weights_only=True)
    except FileNotFoundError:
        raise PluginError(f"there is no file {path}") from None
    except Exception as error:  # torch raises what it likes for a torn, foreign or malicious file
        first = " ".join(str(error).split())[:200]
        raise PluginError(f"{path} is refused: it is no file of tensors alone ({first})") from None
    if not isinstance(state, dict) or not all(isinstance(value, Tensor) for value in state.values()):
        raise PluginError(f"{path} is refused: it holds something other than named tensors")
    return state


def _layers(state: Mapping[str, Tensor], path: Path) -> list[dict[str, Tensor]]:
    """Return the tensors of each layer by our names, bottom up."""
    found: dict[int, dict[str, Tensor]] = {}
    for key, tensor in state.items():
        match = _KEY.fullmatch(key)
        if match is None:
            raise PluginError(f"{path} is no released plugin: unknown key '{key}', where mux_layer.<i>... is expected")
        found.setdefault(int(match[1]), {})[f"{_NAMES[match[2]]}.{match[3]}"] = tensor.float()
    names = {f"{name}.{part}" for name in _NAMES.values() for part in ("weight", "bias")}
    if sorted(found) != list(range(len(found))) or not found or any(layer.keys() != names for layer in found.values()):
        raise PluginError(f"{path} is no released plugin: a layer is missing or lacks one of its six tensors")
    layers = [found[i] for i in range(len(found))]
    score, w1 = layers[0]["score.weight"], layers[0]["w1.weight"]
    if score.ndim != 2 or score.shape[1] % score.shape[0] or w1.shape[1:] != (2 * (score.shape[1] // score.shape[0]),):
        raise PluginError(
            f"{path} is no released plugin: scores of shape {tuple(score.shape)} and an adapter of shape "
            f"{tuple(w1.shape)}, where (k, k d) and (bottleneck, 2 d) are expected"
        )
    return layers


def _split(layer: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Store W_1, which reads ``[y; u]``, as its two halves."""
    w1_y, w1_u = layer["w1.weight"].chunk(2, dim=1)
    rest = {name: tensor for name, tensor in layer.items() if not name.startswith("w1.")}
    return rest | {"w1_y.weight": w1_y, "w1_u.weight": w1_u, "w1_u.bias": layer["w1.bias"]}


def _original(d_model: int, n_layers: int, path: Path) -> BackboneSpec:
    """Return the original T5 of a shape, which the released plugins are for."""
    specs = [spec_of(name) for name in known_backbones() if re.fullmatch(r"t5-[a-z0-9]+", name)]
    fitting = [spec for spec in specs if (spec.d_model, spec.encoder_layers) == (d_model, n_layers)]
    if not fitting:
        raise PluginError(
            f"{path} has {n_layers} layers of width {d_model}, as no original T5 has; name its --backbone"
        )
    return min(fitting, key=lambda spec: spec.d_ff)  # T5-large and 3B differ in their FFNs alone; large is released
