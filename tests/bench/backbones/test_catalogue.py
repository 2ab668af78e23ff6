"""The bundled shapes against published parameter counts; the Hub against a server of our own, and a silent one."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

from bench.backbones.catalogue import known_backbones, resolve_config, spec_of
from bench.errors import BackboneError
from bench.measure.closed_form import backbone_parameters

# T5 with its head (1.1 and FLAN untied), BERT with its pooler.
PUBLISHED_PARAMETERS = {
    "t5-small": 60_506_624,
    "t5-base": 222_903_552,
    "t5-large": 737_668_096,
    "t5-3b": 2_851_598_336,
    "t5-11b": 11_307_321_344,
    "t5-v1_1-small": 76_961_152,
    "t5-v1_1-base": 247_577_856,
    "t5-v1_1-large": 783_150_080,
    "t5-v1_1-xl": 2_849_757_184,
    "t5-v1_1-xxl": 11_135_332_352,
    "flan-t5-small": 76_961_152,
    "flan-t5-base": 247_577_856,
    "flan-t5-large": 783_150_080,
    "flan-t5-xl": 2_849_757_184,
    "flan-t5-xxl": 11_135_332_352,
    "bert-base-uncased": 109_482_240,
    "bert-base-cased": 108_310_272,
    "bert-large-uncased": 335_141_888,
    "bert-large-cased": 333_579_264,
    "minilm-l6": 22_713_216,
    "minilm-l12": 33_360_000,
    "gte-small": 33_360_000,
    "gte-base": 109_482_240,
    "gte-large": 335_141_888,
}
TINY = {"model_type": "bert", "hidden_size": 8, "intermediate_size": 16, "num_attention_heads": 2,
        "num_hidden_layers": 3, "vocab_size": 50}  # fmt: skip


def test_bundled_shapes_have_the_published_number_of_parameters() -> None:
    assert {name: backbone_parameters(spec_of(name), labels=0) for name in known_backbones()} == PUBLISHED_PARAMETERS


def test_alias_and_hub_id_are_the_same_checkpoint() -> None:
    for alias, hub in known_backbones().items():
        assert resolve_config(alias) == resolve_config(hub)
        assert resolve_config(alias)[0] == hub


def test_transformers_reads_every_bundled_config_alike() -> None:
    from transformers import AutoConfig

    for alias in known_backbones():
        config, spec = AutoConfig.for_model(**resolve_config(alias)[1]), spec_of(alias)
        assert (config.hidden_size, config.num_attention_heads) == (spec.d_model, spec.n_heads)
        if spec.family == "t5":
            read = (config.d_ff, config.d_kv, config.num_layers, config.num_decoder_layers)
            assert read == (spec.d_ff, spec.d_head, spec.encoder_layers, spec.decoder_layers)
            assert (config.is_gated_act, config.dense_act_fn) == (spec.gated, spec.activation)
        else:
            assert (config.intermediate_size, config.num_hidden_layers) == (spec.d_ff, spec.encoder_layers)


def test_a_callers_change_does_not_reach_the_bundle() -> None:
    resolve_config("t5-small")[1]["d_model"] = 1
    assert spec_of("t5-small").d_model == 512


def test_local_folder(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps(TINY))
    assert resolve_config(str(tmp_path)) == (str(tmp_path), TINY)
    assert spec_of(str(tmp_path)).encoder_layers == 3


@pytest.mark.parametrize(
    ("content", "message"),
    [(None, "without config.json"), ("{", "cannot be read"), ("[]", "no JSON object"), ("{}", "model_type 'None'")],
)
def test_local_folder_that_is_no_checkpoint(tmp_path: Path, content: str | None, message: str) -> None:
    if content is not None:
        (tmp_path / "config.json").write_text(content)
    with pytest.raises(BackboneError, match=message):
        spec_of(str(tmp_path))


def _ask(name: str, cache: Path, **environment: str) -> str:
    """Resolve ``name`` in a fresh process, since huggingface_hub reads its settings once."""
    code = (
        "import sys; from bench.backbones import catalogue; from bench.errors import BackboneError\n"
        "catalogue.TIMEOUT_SECONDS = 1.0\n"
        "try: print(catalogue.spec_of(sys.argv[1]).encoder_layers)\n"
        "except BackboneError as error: print(error)"
    )
    kept = {key: value for key, value in os.environ.items() if not key.lower().endswith("_proxy")}
    done = subprocess.run(
        [sys.executable, "-c", code, name],
        env={**kept, "HF_HUB_CACHE": str(cache), "HF_HUB_OFFLINE": "0", **environment},
        capture_output=True,
        text=True,
        check=True,
        timeout=60,
    )
    return done.stdout.strip()


class _Hub(BaseHTTPRequestHandler):
    """Just enough of the Hub to serve one config."""

    body = json.dumps(TINY).encode()

    def do_HEAD(self) -> None:
        found = self.path == "/someone/tiny/resolve/main/config.json"
        self.send_response(200 if found else 404)
        if found:
            self.send_header("ETag", '"0123456789abcdef"')
            self.send_header("X-Repo-Commit", "a" * 40)
        else:
            self.send_header("X-Error-Code", "RepoNotFound")
        self.send_header("Content-Length", str(len(self.body)) if found else "0")
        self.end_headers()

    def do_GET(self) -> None:
        self.do_HEAD()
        self.wfile.write(self.body)

    def log_message(self, *_: object) -> None:
        """Say nothing."""


@pytest.fixture
def hub() -> Iterator[str]:
    with ThreadingHTTPServer(("127.0.0.1", 0), _Hub) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_port}"
        server.shutdown()


def test_hub_is_asked_once_and_then_the_cache(tmp_path: Path, hub: str) -> None:
    assert _ask("someone/tiny", tmp_path, HF_ENDPOINT=hub) == "3"
    assert _ask("someone/tiny", tmp_path, HF_ENDPOINT="http://127.0.0.1:9", HF_HUB_OFFLINE="1") == "3"


def test_hub_says_no(tmp_path: Path, hub: str) -> None:
    message = _ask("google/t5-bass", tmp_path, HF_ENDPOINT=hub)
    assert message.startswith("there is no backbone 'google/t5-bass' on the Hub")
    assert "Did you mean 'google-t5/t5-base'?" in message


def test_not_even_a_possible_name(tmp_path: Path) -> None:
    assert "neither a folder nor a possible Hub id" in _ask("no/such/folder", tmp_path)


def test_a_silent_hub_is_given_up_within_seconds(tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as silent:
        start = time.monotonic()
        message = _ask("t5-bass", tmp_path, HF_ENDPOINT=f"http://127.0.0.1:{silent.getsockname()[1]}")
        seconds = time.monotonic() - start
    assert "the Hub cannot be reached" in message
    assert "Did you mean 't5-base'?" in message
    assert "local folder" in message
    assert 1 <= seconds < 10


@pytest.mark.parametrize("environment", [{"HF_ENDPOINT": "http://127.0.0.1:9"}, {"HF_HUB_OFFLINE": "1"}])
def test_no_network_fails_at_once(tmp_path: Path, environment: dict[str, str]) -> None:
    start = time.monotonic()
    assert "the Hub cannot be reached" in _ask("someone/else", tmp_path, **environment)
    assert time.monotonic() - start < 10
