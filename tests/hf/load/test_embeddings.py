"""``QuantoConfig(embeddings=...)`` over kinds of models: what is packed, that numbers are those of the packed weights,
saved, reloaded and planned; and that up to four modules hold one tensor."""

import warnings

import pytest
import torch
import transformers as tf
from tiny_models import SHAPE, TEXT, TINY, Tiny, lively, llama_config, tokens
from torch import nn

from quanto_hf import QuantoConfig, plan, quantize, report
from quanto_hf.nn import QEmbedding, QuantizedWeight

SEQ2SEQ = {
    **TEXT, "d_model": 64, "encoder_layers": 1, "decoder_layers": 1, "encoder_attention_heads": 4,
    "decoder_attention_heads": 4, "encoder_ffn_dim": 128, "decoder_ffn_dim": 128, "max_position_embeddings": 64,
    "decoder_start_token_id": 2, "scale_embedding": True,
}  # fmt: skip
HEADS = {**SHAPE, "num_key_value_heads": 2, "head_dim": 16}


def _text():
    return {"input_ids": tokens()}


def _both():
    return {"input_ids": tokens(), "decoder_input_ids": tokens(2, 6)}


def _gemma3n():
    return tf.Gemma3nTextConfig(
        **TEXT, **{**HEADS, "num_hidden_layers": 3}, vocab_size_per_layer_input=96, hidden_size_per_layer_input=16,
        laurel_rank=8, num_kv_shared_layers=1, activation_sparsity_pattern=[0.0] * 3,
        layer_types=["sliding_attention", "full_attention", "full_attention"],
    )  # fmt: skip


MODELS = {
    "gpt2": Tiny(
        tf.GPT2LMHeadModel,
        lambda: tf.GPT2Config(**TEXT, n_embd=64, n_layer=1, n_head=4, n_positions=64),
        _text, 0,
    ),
    "bert": Tiny(tf.BertForMaskedLM, lambda: tf.BertConfig(**TEXT, **SHAPE), _text, 0),
    "electra": Tiny(tf.ElectraForPreTraining, lambda: tf.ElectraConfig(**TEXT, **SHAPE, embedding_size=64), _text, 0),
    "t5": TINY["t5"],
    "bart": Tiny(tf.BartForConditionalGeneration, lambda: tf.BartConfig(**SEQ2SEQ), _both, 0),
    "mbart": Tiny(tf.MBartForConditionalGeneration, lambda: tf.MBartConfig(**SEQ2SEQ), _both, 0),
    "m2m100": Tiny(tf.M2M100ForConditionalGeneration, lambda: tf.M2M100Config(**SEQ2SEQ), _both, 0),
    "opt": TINY["opt"],
    "gemma3": Tiny(tf.Gemma3ForCausalLM, lambda: tf.Gemma3TextConfig(**TEXT, **HEADS), _text, 0),
    "gemma3n": Tiny(tf.Gemma3nForCausalLM, _gemma3n, _text, 0),
    "clip": TINY["clip"],
}  # fmt: skip

# name -> embeddings that are packed, and modules besides the first that hold one weight with it
PACKED = {
    "gpt2": (["wte", "wpe"], ["lm_head"]),
    "bert": (["word_embeddings", "position_embeddings", "token_type_embeddings"], ["cls.predictions.decoder"]),
    "electra": (["word_embeddings", "position_embeddings", "token_type_embeddings"], []),
    "t5": (["shared", "embed_tokens", "embed_tokens"], ["encoder.embed_tokens", "decoder.embed_tokens", "lm_head"]),
    "bart": (
        ["shared", "embed_tokens", "embed_positions", "embed_tokens", "embed_positions"],
        ["model.encoder.embed_tokens", "model.decoder.embed_tokens", "lm_head"],
    ),
    "mbart": (
        ["shared", "embed_tokens", "embed_positions", "embed_tokens", "embed_positions"],
        ["model.encoder.embed_tokens", "model.decoder.embed_tokens", "lm_head"],
    ),
    "m2m100": (
        ["shared", "embed_tokens", "embed_tokens"],
        ["model.encoder.embed_tokens", "model.decoder.embed_tokens", "lm_head"],
    ),
    "opt": (["embed_tokens", "embed_positions"], ["lm_head"]),
    "gemma3": (["embed_tokens"], ["lm_head"]),
    "gemma3n": (["embed_tokens", "embed_tokens_per_layer"], ["lm_head"]),
    "clip": (["token_embedding", "position_embedding", "position_embedding"], []),
}


@torch.no_grad()
def output(model, name):
    torch.manual_seed(0)
    return model(**MODELS[name].inputs())[0]


def tables(model):
    return {name: module for name, module in model.named_modules() if isinstance(module, QEmbedding)}


def held(module):
    return [id(module._parameters[name]) for name in module.stored_names]


def groups(model):
    """Names of the modules of each weight that is shared."""
    found = {}
    for name, module in model.named_modules():
        if isinstance(module, QuantizedWeight):
            found.setdefault(tuple(held(module)), []).append(name)
    return [names for names in found.values() if len(names) > 1]


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    made = tmp_path_factory.mktemp("embeddings")
    for name, tiny in MODELS.items():
        lively(tiny.cls(tiny.config())).save_pretrained(made / name)
    return made


def load(folder, name, **options):
    with warnings.catch_warnings():
        # GPT-2 is mostly float
        warnings.simplefilter("ignore")
        return MODELS[name].cls.from_pretrained(folder, **options).eval()


@pytest.mark.parametrize("name", MODELS)
def test_embeddings_are_packed_tied_saved_and_planned(name, folders, tmp_path):
    config = QuantoConfig("int8", embeddings="int8")
    model, exact = load(folders / name, name, quantization_config=config), load(folders / name, name)
    names, tied = PACKED[name]
    assert [found.rpartition(".")[2] for found in tables(model)] == names
    assert [set(group[1:]) for group in groups(model)] == ([set(tied)] if tied else [])
    found, wanted = output(model, name), output(exact, name)
    assert float((found - wanted).norm() / wanted.norm()) < 0.05
    # the same as the dequantized weights give in plain modules
    plain = load(folders / name, name, quantization_config=config)
    plain.dequantize()
    assert not tables(plain) and torch.allclose(output(plain, name), found, atol=2e-4)
    model.save_pretrained(tmp_path)
    again = load(tmp_path, name)
    assert torch.equal(output(again, name), found) and groups(again) == groups(model)
    assert plan(folders / name, config).nbytes == model.get_memory_footprint() == again.get_memory_footprint()
    again.tie_weights()
    assert groups(again) == groups(model)


def test_float_is_the_default(folders):
    for name in ("bert", "t5", "gemma3"):
        assert not tables(load(folders / name, name, quantization_config=QuantoConfig("int8")))


def test_an_untied_head_gets_the_type_of_the_embeddings(tmp_path):
    lively(tf.LlamaForCausalLM(llama_config())).save_pretrained(tmp_path)
    config = QuantoConfig("int4", embeddings="int8")
    model = tf.LlamaForCausalLM.from_pretrained(tmp_path, quantization_config=config)
    stored = {row.name: row.stored for row in report(model).rows}
    assert stored["model.embed_tokens.weight"] == stored["lm_head.weight"] == "int8 g64"
    assert stored["model.layers.0.mlp.up_proj.weight"] == "int4 g64 asym" and not groups(model)


def test_an_override_that_names_a_head_quantizes_it(tmp_path):
    lively(tf.LlamaForCausalLM(llama_config())).save_pretrained(tmp_path)
    config = QuantoConfig("int4", overrides={"lm_head": {"weights": "int8"}})
    model = tf.LlamaForCausalLM.from_pretrained(tmp_path, quantization_config=config)
    stored = {row.name: row.stored for row in report(model).rows}
    assert stored["lm_head.weight"] == "int8" and stored["model.embed_tokens.weight"] == "float32"


def test_overrides_of_what_they_are_in_do_not_change_embeddings(folders):
    overrides = {"model": {"weights": "int2"}, "embed_positions": {"weights": "nf4"}, "encoder": {"weights": None}}
    config = QuantoConfig("int8", embeddings="int8", overrides=overrides)
    model = load(folders / "opt", "opt", quantization_config=config)
    stored = {row.name: row.stored for row in report(model).rows}
    assert stored["model.decoder.embed_tokens.weight"] == "int8 g64"
    assert stored["model.decoder.embed_positions.weight"].startswith("nf4")
    assert stored["model.decoder.layers.0.fc1.weight"].startswith("int2")


def test_biases_of_attention_and_computed_tables_stay_float(folders, tmp_path):
    config = QuantoConfig("int8", embeddings="int8")
    rows = {row.name: row.reason for row in report(load(folders / "t5", "t5", quantization_config=config)).rows}
    bias = next(reason for name, reason in rows.items() if "relative_attention_bias" in name)
    assert bias == "it has one number for each head of attention"
    lively(tf.MarianMTModel(tf.MarianConfig(**SEQ2SEQ))).save_pretrained(tmp_path)
    model = tf.MarianMTModel.from_pretrained(tmp_path, quantization_config=config)
    rows = {row.name: row.reason for row in report(model).rows}
    assert rows["model.encoder.embed_positions.weight"] == "the model computes it"


def test_a_forward_pass_of_ones_own_is_kept():
    class Scaled(nn.Embedding):
        def __init__(self, rows, columns, scale):
            super().__init__(rows, columns)
            self.register_buffer("scale", torch.tensor(scale), persistent=False)

        def forward(self, tokens):
            return super().forward(tokens) * self.scale.to(self.weight.dtype)

        def extra_repr(self):
            return "mine"

    class Reads(nn.Embedding):
        def forward(self, tokens):
            return super().forward(tokens) + self.weight.mean()

    class Looks(nn.Embedding):
        def forward(self, tokens):
            return self.weight[tokens]

    model = nn.ModuleList([Scaled(8, 64, 3.0), Reads(8, 64), Looks(8, 64)])
    exact = nn.Embedding(8, 64, _weight=model[0].weight.detach().clone())
    quantize(model, "int8", embeddings="int8")
    assert isinstance(model[0], QEmbedding) and isinstance(model[0], Scaled)
    model[0].freeze()
    ids = torch.tensor([[1, 7], [0, 3]])
    assert torch.allclose(model[0](ids), 3 * exact(ids), atol=0.1) and "weights=int8" in repr(model[0])
    assert torch.equal(model[0](ids), 3 * model[0].weight[ids])
    reasons = {row.name: row.reason for row in report(model).rows}
    assert reasons["1.weight"] == "the forward of Reads reads its weight itself"
    assert reasons["2.weight"] == "Looks has a forward of its own, which does not call super().forward"
    plain = model[0].to_float()
    assert type(plain) is Scaled and torch.equal(plain(ids), model[0](ids))


def test_only_rows_that_are_asked_for_are_dequantized(folders, monkeypatch):
    model = load(folders / "gemma3n", "gemma3n", quantization_config=QuantoConfig("int8", embeddings="int8"))

    def dequantized(self, name=None):
        raise AssertionError("a whole table is dequantized")

    monkeypatch.setattr(QEmbedding, "dequantized", dequantized)
    assert output(model, "gemma3n").isfinite().all()


def test_a_bad_type_is_named():
    with pytest.raises(ValueError, match="embeddings='int9'; choose one of"):
        QuantoConfig("int8", embeddings="int9")
