"""The authors' checkpoints become plugins that compute what the released formula does; other pickles are refused."""

from __future__ import annotations

import os
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from click.testing import CliRunner
from torch import Tensor

from bench.cli import main
from bench.errors import PluginError
from bench.plugins.convert import convert
from bench.plugins.plugin import Plugin
from tests.checkpoints import encode_hidden, tiny_checkpoint, tiny_model, tokens


def released(d: int, layers: int, k: int = 4, bottleneck: int = 64, std: float = 0.05) -> dict[str, Tensor]:
    """Return a state dict as the authors' code saves it."""
    generator = torch.Generator().manual_seed(0)

    def random(*shape: int) -> Tensor:
        return (torch.randn(*shape, generator=generator) * std).half()

    state = {}
    for i in range(layers):
        for name, rows, columns in (
            ("mux_layer", k, k * d),
            ("demux_adapter.w_in", bottleneck, 2 * d),
            ("demux_adapter.w_out", d, bottleneck),
        ):
            state[f"mux_layer.{i}.{name}.weight"] = random(rows, columns)
            state[f"mux_layer.{i}.{name}.bias"] = random(rows)
    return state


def released_ffn(state: dict[str, Tensor], i: int, u: Tensor, ffn: Callable[[Tensor], Tensor]) -> Tensor:
    """Return what the released layer makes of u, (batch, n, d), around a frozen FFN, by its own tensors."""
    batch, n, d = u.shape
    own = {name.removeprefix(f"mux_layer.{i}."): t.float() for name, t in state.items() if f"mux_layer.{i}." in name}
    k = own["mux_layer.bias"].shape[0]
    scores = F.linear(u.reshape(batch, n // k, k * d), own["mux_layer.weight"], own["mux_layer.bias"])
    merged = (scores.softmax(-1)[..., None] * u.reshape(batch, n // k, k, d)).sum(2)
    y = ffn(merged).repeat_interleave(k, dim=1)
    both = torch.cat([y, u], dim=-1)
    inner = torch.tanh(F.linear(both, own["demux_adapter.w_in.weight"], own["demux_adapter.w_in.bias"]))
    return y + F.linear(inner, own["demux_adapter.w_out.weight"], own["demux_adapter.w_out.bias"])


@torch.no_grad()
def test_it_computes_the_released_formula(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny_model("t5")
    d, blocks = model.config.d_model, model.encoder.block
    state = released(d, len(blocks), bottleneck=8, std=0.3)
    torch.save(state, tmp_path / "plugin.pkl")
    plugin = convert(tmp_path / "plugin.pkl", str(tiny_checkpoint(tmp_path / "t5", "t5")))
    ids = tokens(2, 12)
    dense = encode_hidden(model, input_ids=ids)
    with plugin.attached(model):
        converted = encode_hidden(model, input_ids=ids)
    for i, block in enumerate(blocks):
        original = block.layer[-1].DenseReluDense.forward
        monkeypatch.setattr(
            block.layer[-1].DenseReluDense,
            "forward",
            lambda u, i=i, original=original: released_ffn(state, i, u, original),
        )
    torch.testing.assert_close(converted, encode_hidden(model, input_ids=ids), rtol=0, atol=1e-5)
    assert (converted - dense).abs().mean() > 0.05, "the plugin is no small change here"


@pytest.mark.parametrize(
    ("backbone", "d", "layers", "parameters"), [("t5-base", 768, 12, 1_926_960), ("t5-large", 1024, 24, None)]
)
def test_the_command_converts_the_released_sizes(
    tmp_path: Path, backbone: str, d: int, layers: int, parameters: int | None
) -> None:
    state = released(d, layers)
    torch.save(state, tmp_path / f"plugin-{backbone}-mux_4.pkl")
    command = CliRunner().invoke(main, ["convert", f"{tmp_path}/plugin-{backbone}-mux_4.pkl", f"{tmp_path}/out"])
    assert command.exit_code == 0, command.stderr
    plugin = Plugin.from_pretrained(tmp_path / "out")
    assert (plugin.config.k, plugin.config.backbone, plugin.config.mask_padding) == (4, backbone, False)
    assert plugin.num_parameters() == (parameters or sum(tensor.numel() for tensor in state.values()))
    assert torch.equal(plugin.pairs[1].score.weight, state["mux_layer.1.mux_layer.weight"].float())
    assert f"k = 4 for {backbone}" in command.stdout and str(tmp_path / "out") in command.stdout


class Evil:
    """Makes a folder when it is unpickled."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> Any:
        return os.mkdir, (str(self.path),)


@pytest.mark.parametrize("how", ["pickle", "torch"])
def test_a_pickle_that_does_something_is_refused_and_does_nothing(tmp_path: Path, how: str) -> None:
    path, trace = tmp_path / "evil.pkl", tmp_path / "trace"
    state = released(16, 2) | {"mux_layer.2.mux_layer.weight": Evil(trace)}
    with path.open("wb") as file:
        (pickle.dump if how == "pickle" else torch.save)(state, file)
    with pytest.raises(PluginError, match=r"evil\.pkl is refused"):
        convert(path)
    command = CliRunner().invoke(main, ["convert", str(path), str(tmp_path / "out")])
    assert command.exit_code == 2 and "is refused" in command.stderr and "Traceback" not in command.stderr
    assert not trace.exists() and not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda s: {**s, "encoder.weight": torch.zeros(1)}, "unknown key 'encoder.weight'"),
        (lambda s: {k: v for k, v in s.items() if ".1." not in k}, "a layer is missing"),
        (lambda s: {k: v for k, v in s.items() if k != "mux_layer.1.mux_layer.bias"}, "lacks one of its six"),
        (lambda s: {**s, "mux_layer.2.mux_layer.bias": torch.zeros(3)}, "differ in shape"),
        (lambda s: {**s, "mux_layer.0.demux_adapter.w_in.weight": torch.zeros(64, 9)}, "(64, 9)"),
        (lambda s: {}, "a layer is missing"),
        (lambda s: [*s.values()], "other than named tensors"),
    ],
)
def test_what_is_no_released_plugin_says_why(tmp_path: Path, change: Callable[[Any], Any], said: str) -> None:
    torch.save(change(released(768, 12)), tmp_path / "x.pkl")
    with pytest.raises(PluginError) as raised:
        convert(tmp_path / "x.pkl")
    assert said in str(raised.value) and "x.pkl" in str(raised.value)


def test_the_wrong_backbone_and_an_unknown_shape_are_said(tmp_path: Path) -> None:
    torch.save(released(768, 12), tmp_path / "x.pkl")
    with pytest.raises(PluginError, match="12 layers of width 768; backbone 't5-large' has 24 encoder layers of width"):
        convert(tmp_path / "x.pkl", "t5-large")
    torch.save(released(48, 3), tmp_path / "y.pkl")
    with pytest.raises(PluginError, match="as no original T5 has; name its --backbone"):
        convert(tmp_path / "y.pkl")
    with pytest.raises(PluginError, match="there is no file"):
        convert(tmp_path / "z.pkl")


def test_loading_a_pickle_as_a_plugin_names_the_command(tmp_path: Path) -> None:
    torch.save(released(16, 2), tmp_path / "x.pkl")
    with pytest.raises(PluginError, match=r"bench convert .*x\.pkl"):
        Plugin.from_pretrained(tmp_path / "x.pkl")
