"""Embeddings and convolutions: from_pretrained quantizes them where an override names them, and only there."""

import pytest
import torch
import transformers as tf
from safetensors.torch import load_file
from tiny_models import TINY, Tiny, lively, llama_config, noise, output, relative
from torch import nn

from quanto_hf import QuantoConfig, convert_checkpoint, dequantize, plan, report
from quanto_hf.nn import QConv1d, QConv2d, QEmbedding, QuantizedWeight

WAV2VEC2 = Tiny(
    tf.Wav2Vec2Model,
    lambda: tf.Wav2Vec2Config(
        hidden_size=64, intermediate_size=128, num_hidden_layers=1, num_attention_heads=4, conv_dim=(32, 32),
        conv_kernel=(8, 4), conv_stride=(4, 2), num_feat_extract_layers=2, num_conv_pos_embeddings=16,
        num_conv_pos_embedding_groups=4, vocab_size=32,
    ),
    lambda: {"input_values": noise(2, 400)}, 7,
)  # fmt: skip

# name of the tiny model -> what an override names, and the class that stands there then
NAMED = {
    "llama": ("embed_tokens", QEmbedding),
    "vit": ("patch_embeddings.projection", QConv2d),
    "wav2vec2": ("*.conv_layers.*.conv", QConv1d),
}


@pytest.fixture(scope="module", autouse=True)
def with_wav2vec2():
    TINY["wav2vec2"] = WAV2VEC2
    yield
    del TINY["wav2vec2"]


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    made = tmp_path_factory.mktemp("named")
    for name in NAMED:
        lively(TINY[name].cls(TINY[name].config())).save_pretrained(made / name)
    return made


def load(folder, name, **options):
    config = QuantoConfig("int8", overrides={NAMED[name][0]: {"weights": "int8"}})
    return TINY[name].cls.from_pretrained(folder, quantization_config=config, **options)


def named(model, name):
    return {n: m for n, m in model.named_modules() if type(m) is NAMED[name][1]}


def weights_of(folder):
    return {n: t for file in sorted(folder.glob("*.safetensors")) for n, t in load_file(file).items()}


@pytest.mark.parametrize("name", NAMED)
def test_what_is_named_is_quantized_saved_planned_converted_and_offloaded(name, folders, tmp_path):
    plain = TINY[name].cls.from_pretrained(folders / name)
    model = load(folders / name, name)
    assert named(model, name) and all(layer.is_frozen for layer in named(model, name).values())
    made = output(model, name)
    assert 0 < relative(made, output(plain, name)) < 0.1

    model.save_pretrained(tmp_path / "saved")
    again = TINY[name].cls.from_pretrained(tmp_path / "saved")
    assert len(named(again, name)) == len(named(model, name)) and torch.equal(output(again, name), made)

    config = QuantoConfig("int8", overrides={NAMED[name][0]: {"weights": "int8"}})
    planned = plan(folders / name, config, auto_class=TINY[name].cls)
    assert planned.nbytes == model.get_memory_footprint()
    assert plan(tmp_path / "saved", auto_class=TINY[name].cls).nbytes == model.get_memory_footprint()

    convert_checkpoint(folders / name, tmp_path / "converted", config, auto_class=TINY[name].cls)
    converted, saved = weights_of(tmp_path / "converted"), weights_of(tmp_path / "saved")
    assert converted.keys() == saved.keys()
    assert all(torch.equal(tensor, saved[key]) for key, tensor in converted.items())

    for source, place in ((folders / name, "quantized now"), (tmp_path / "saved", "quantized before")):
        folder = tmp_path / place
        options = {"device_map": {"": "disk"}, "offload_folder": str(folder)}
        disk = load(source, name, **options) if source == folders / name else None
        disk = disk or TINY[name].cls.from_pretrained(source, **options)
        assert torch.equal(output(disk, name), made)

    rows = {row.name: row for row in report(model).rows}
    assert all(rows[f"{layer}.weight"].stored == "int8" for layer in named(model, name))
    dequantize(model)
    assert not any(isinstance(module, QuantizedWeight) for module in model.modules())
    assert relative(output(model, name), made) < 1e-5


@pytest.mark.parametrize("name", NAMED)
def test_what_nobody_names_stays_float(name, folders):
    # neither a pattern for what contains it nor one for everything names it
    config = QuantoConfig("int8", overrides={"*": {"weights": "int8"}})
    model = TINY[name].cls.from_pretrained(folders / name, quantization_config=config)
    assert not named(model, name)


def test_an_embedding_that_is_tied_to_the_head_is_packed_with_it_where_it_is_named(tmp_path):
    lively(tf.LlamaForCausalLM(llama_config(tie_word_embeddings=True))).save_pretrained(tmp_path)
    model = tf.LlamaForCausalLM.from_pretrained(tmp_path, quantization_config=QuantoConfig("int8"))
    assert type(model.model.embed_tokens) is nn.Embedding
    reasons = {row.name: row.reason for row in report(model).rows}
    assert "embeddings='int8'" in reasons["model.embed_tokens.weight"]
    config = QuantoConfig("int8", overrides={"embed_tokens": {"weights": "int8"}})
    model = tf.LlamaForCausalLM.from_pretrained(tmp_path, quantization_config=config)
    assert isinstance(model.model.embed_tokens, QEmbedding)
    assert model.lm_head.weight_packed is model.model.embed_tokens.weight_packed


def test_an_embedding_that_renormalises_is_left_with_its_reason(tmp_path):
    from quanto_hf.flow import Choice, assign

    model = nn.ModuleDict({"embed": nn.Embedding(8, 64, max_norm=1.0)})
    assert "max_norm" in assign(model, Choice("int8"), include=["embed"]).left["embed"]


def test_rounded_activations_do_not_concern_embeddings(folders, tmp_path):
    config = QuantoConfig("int8", "int8", overrides={"embed_tokens": {"weights": "int4"}})
    model = tf.LlamaForCausalLM.from_pretrained(folders / "llama", quantization_config=config)
    assert str(model.model.embed_tokens.scheme).startswith("int4") and model.model.embed_tokens.activations is None
    model.save_pretrained(tmp_path)
    assert torch.equal(output(tf.LlamaForCausalLM.from_pretrained(tmp_path), "llama"), output(model, "llama"))
