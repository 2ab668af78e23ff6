"""Checkpoints of both families loaded as task models; what is torn, missing or unsupported says so."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from bench.backbones.catalogue import spec_of
from bench.backbones.load import load_task_model, load_tokenizer
from bench.backbones.model import TaskModel, TextToTextModel
from bench.backbones.sites import EncoderView, digest
from bench.errors import BackboneError
from bench.tasks.catalogue import TASKS
from bench.tasks.data import Example
from bench.tasks.encoding import encode
from bench.tasks.features import collate
from bench.training.stage import model_inputs
from tests.checkpoints import FAMILIES, Family, tiny_checkpoint, tiny_model
from tests.tiny import WORDS

WEIGHTS = "model.safetensors"


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("checkpoints")
    return {family: tiny_checkpoint(folder / family, family) for family in FAMILIES}


@pytest.fixture(params=FAMILIES)
def checkpoint(request: Any, made: dict[str, Path], tmp_path: Path) -> Path:
    return Path(shutil.copytree(made[request.param], tmp_path / request.param))


def load(folder: Path, task: str = "sst2", seed: int = 0) -> TaskModel:
    name = str(folder)
    return load_task_model(name, spec_of(name), TASKS[task], load_tokenizer(name), seed).eval()


def edit(folder: Path, **fields: Any) -> None:
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | fields))


def test_weights_of_the_body_are_those_of_the_checkpoint(checkpoint: Path) -> None:
    model = load(checkpoint).state_dict()
    stored = load_file(checkpoint / WEIGHTS)
    body = {name: tensor for name, tensor in stored.items() if not name.startswith("classifier.")}
    assert len(body) > 20
    for name, tensor in body.items():
        assert torch.equal(model[f"model.{name}"], tensor)
        assert model[f"model.{name}"].dtype == torch.float32


def test_half_precision_weights_are_loaded_in_fp32(checkpoint: Path) -> None:
    tensors = {name: tensor.half() for name, tensor in load_file(checkpoint / WEIGHTS).items()}
    save_file(tensors, checkpoint / WEIGHTS, metadata={"format": "pt"})
    edit(checkpoint, dtype="float16")
    assert {p.dtype for p in load(checkpoint).parameters()} == {torch.float32}


@pytest.mark.parametrize(
    ("task", "head"), [("sst2", 2), ("mnli", 3), ("squad", 2)], ids=["two classes", "three classes", "spans"]
)
def test_head_of_an_encoder_fits_the_task_and_the_seed(made: dict[str, Path], task: str, head: int) -> None:
    first, again, other = (load(made["bert"], task, seed).state_dict() for seed in (1, 1, 2))
    (name,) = [n for n in first if n.endswith((".classifier.weight", "qa_outputs.weight"))]
    assert first[name].shape == (head, 32)
    assert all(torch.equal(first[n], again[n]) for n in first)
    new = {n for n in first if not torch.equal(first[n], other[n])}
    # the two-class head is in the checkpoint; one of another shape is drawn anew
    assert new == (set() if task == "sst2" else {name})


@pytest.mark.parametrize(("task", "shape"), [("sst2", (3, 2)), ("mnli", (3, 3))])
def test_logits_have_one_column_a_class(checkpoint: Path, task: str, shape: tuple[int, int]) -> None:
    model, tokenizer = load(checkpoint, task), load_tokenizer(str(checkpoint))
    pair = None if TASKS[task].text_pair is None else "this was good"
    examples = [Example(str(i), " ".join(WORDS[: i + 2]), pair, 0) for i in range(3)]
    batch = collate(encode(examples, TASKS[task], tokenizer, EncoderView(model).family), tokenizer.pad_token_id)  # type: ignore[arg-type]
    with torch.no_grad():
        logits = model(**model_inputs(batch)).logits
    assert logits.shape == shape and logits.isfinite().all()


@pytest.mark.parametrize("keep", [0, 100, -8])
def test_torn_weights_are_refused(checkpoint: Path, keep: int) -> None:
    path = checkpoint / WEIGHTS
    path.write_bytes(path.read_bytes()[:keep])
    with pytest.raises(BackboneError, match=f"{checkpoint.name}.*torn"):
        load(checkpoint)


def test_a_folder_without_weights_is_refused(checkpoint: Path) -> None:
    (checkpoint / WEIGHTS).unlink()
    with pytest.raises(BackboneError, match="holds no weights"):
        load(checkpoint)


BODY = {
    "bert": "bert.encoder.layer.1.output.dense.weight",
    "t5": "encoder.block.1.layer.1.DenseReluDense.wo.weight",
}


def test_a_checkpoint_that_lacks_a_weight_of_its_body_is_refused(checkpoint: Path) -> None:
    name = BODY[checkpoint.name]
    tensors = load_file(checkpoint / WEIGHTS)
    del tensors[name]
    save_file(tensors, checkpoint / WEIGHTS, metadata={"format": "pt"})
    with pytest.raises(BackboneError, match=f"lacks 1 weights of its own config, .*such as {name}"):
        load(checkpoint)


def test_a_deeper_config_than_the_weights_is_refused(checkpoint: Path) -> None:
    edit(checkpoint, **({"num_hidden_layers": 3} if checkpoint.name == "bert" else {"num_layers": 3}))
    with pytest.raises(BackboneError, match=r"lacks .* weights of its own config"):
        load(checkpoint)


def test_another_width_than_the_weights_is_refused(checkpoint: Path) -> None:
    edit(checkpoint, **({"intermediate_size": 48} if checkpoint.name == "bert" else {"d_ff": 48}))
    with pytest.raises(BackboneError, match=r"in another shape, such as .*(intermediate|DenseReluDense)"):
        load(checkpoint)


@pytest.mark.parametrize("projection", ["relu", "gated-gelu"])
def test_an_untied_language_model_head_must_be_in_the_checkpoint(tmp_path: Path, projection: str) -> None:
    folder = tiny_checkpoint(tmp_path / "t5", "t5", feed_forward_proj=projection)
    edit(folder, tie_word_embeddings=False)
    tensors = load_file(folder / WEIGHTS)
    head = torch.randn_like(tensors["shared.weight"])
    save_file({**tensors, "lm_head.weight": head}, folder / WEIGHTS, metadata={"format": "pt"})
    loaded = load(folder).state_dict()
    assert torch.equal(loaded["model.lm_head.weight"], head)
    assert torch.equal(loaded["model.encoder.embed_tokens.weight"], tensors["shared.weight"])
    save_file(tensors, folder / WEIGHTS, metadata={"format": "pt"})
    with pytest.raises(BackboneError, match=r"lm_head\.weight"):
        load(folder)


def test_a_tied_head_need_not_be_stored(made: dict[str, Path]) -> None:
    assert "lm_head.weight" not in load_file(made["t5"] / WEIGHTS)
    model = load(made["t5"])
    assert model.model.lm_head.weight.data_ptr() == model.model.shared.weight.data_ptr()
    assert torch.equal(model.model.encoder.embed_tokens.weight, model.model.shared.weight)


def test_heads_and_pooler_of_an_encoder_may_be_missing(made: dict[str, Path], tmp_path: Path) -> None:
    folder = Path(shutil.copytree(made["bert"], tmp_path / "bare"))
    tensors = {n: t for n, t in load_file(folder / WEIGHTS).items() if "pooler" not in n and "classifier" not in n}
    save_file(tensors, folder / WEIGHTS, metadata={"format": "pt"})
    first, again, other = (load(folder, seed=seed) for seed in (0, 0, 1))
    assert digest(first) == digest(again) != digest(other)


@pytest.mark.parametrize("model_type", ["gpt2", "roberta", None])
def test_an_unsupported_family_names_the_supported(checkpoint: Path, model_type: str | None) -> None:
    edit(checkpoint, model_type=model_type)
    with pytest.raises(BackboneError, match=rf"model_type '{model_type}', which is not supported; supported: bert, t5"):
        spec_of(str(checkpoint))


def test_a_config_without_a_needed_field_names_it(checkpoint: Path) -> None:
    path, field = checkpoint / "config.json", {"bert": "num_hidden_layers", "t5": "d_kv"}[checkpoint.name]
    config = json.loads(path.read_text())
    del config[field]
    path.write_text(json.dumps(config))
    with pytest.raises(BackboneError, match=f"has no field '{field}'"):
        spec_of(str(checkpoint))


@pytest.mark.parametrize("content", [b"", b'{"version": "1.0", "mod'])
def test_a_torn_tokenizer_is_refused(checkpoint: Path, content: bytes) -> None:
    (checkpoint / "tokenizer.json").write_bytes(content)
    with pytest.raises(BackboneError, match=f"tokenizer in .*{checkpoint.name} cannot be read"):
        load_tokenizer(str(checkpoint))


def test_a_checkpoint_without_a_tokenizer_is_refused(checkpoint: Path) -> None:
    for path in checkpoint.glob("tokenizer*"):
        path.unlink()
    with pytest.raises(BackboneError, match=f"{checkpoint.name} holds no tokenizer"):
        load_tokenizer(str(checkpoint))


@pytest.mark.parametrize("family", FAMILIES)
def test_spec_is_the_shape_of_the_model(family: Family, made: dict[str, Path]) -> None:
    spec, view = spec_of(str(made[family])), EncoderView(tiny_model(family))
    assert (spec.family, spec.d_model, spec.encoder_layers) == (view.family, view.d_model, len(view.layers))
    assert (spec.d_ff, spec.n_heads, spec.d_head) == (64, 4, 8)
    assert spec.decoder_layers == (0 if family == "bert" else 2)


@torch.no_grad()
def test_a_number_from_a_text_to_text_backbone_is_the_expectation_over_its_words(made: dict[str, Path]) -> None:
    plain = load(made["t5"])
    words = plain.label_ids.tolist()
    model = TextToTextModel(plain.model, plain.sentinel, words, [1.0, 5.0]).eval()
    ids = torch.arange(5, 17).reshape(2, 6)
    odds = plain(input_ids=ids).logits.exp()
    expected = (odds[:, 0] * 1.0 + odds[:, 1] * 5.0) / odds.sum(1)
    torch.testing.assert_close(model(input_ids=ids).logits, expected.unsqueeze(1))
