"""The planned cache is the one that a forward pass fills."""

from types import SimpleNamespace

import pytest
import torch
import transformers as tf
from tiny_models import TINY, build, llama_config, tokens
from torch import nn

from quanto_hf.hf.memory.kv_cache import kv_cache

SHAPE = {
    "vocab_size": 96, "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 4, "num_attention_heads": 4,
    "num_key_value_heads": 2, "max_position_embeddings": 64,
}  # fmt: skip
MLA = {
    **SHAPE, "num_key_value_heads": 4, "num_hidden_layers": 2, "first_k_dense_replace": 1, "n_routed_experts": 4,
    "num_experts_per_tok": 2, "n_group": 1, "topk_group": 1, "n_shared_experts": 1, "moe_intermediate_size": 32,
    "kv_lora_rank": 16, "q_lora_rank": 24, "qk_rope_head_dim": 8, "qk_nope_head_dim": 16, "v_head_dim": 16,
}  # fmt: skip

MODELS = {
    "llama-grouped-query": lambda: tf.LlamaForCausalLM(llama_config()),
    "llama-wide-heads": lambda: tf.LlamaForCausalLM(llama_config(head_dim=32)),
    "gpt-neox": lambda: build("gpt-neox"),
    "opt": lambda: build("opt"),
    "mistral-windows": lambda: tf.MistralForCausalLM(tf.MistralConfig(**SHAPE, sliding_window=8)),
    "mistral-window-not-full": lambda: tf.MistralForCausalLM(tf.MistralConfig(**SHAPE, sliding_window=40)),
    "gemma2-every-other-window": lambda: tf.Gemma2ForCausalLM(tf.Gemma2Config(**SHAPE, head_dim=16, sliding_window=8)),
    "falcon-multi-query": lambda: tf.FalconForCausalLM(
        tf.FalconConfig(vocab_size=96, hidden_size=64, num_hidden_layers=2, num_attention_heads=4)
    ),
    "deepseek-v2-mla": lambda: tf.DeepseekV2ForCausalLM(tf.DeepseekV2Config(**MLA)),
    "deepseek-v3-mla": lambda: tf.DeepseekV3ForCausalLM(tf.DeepseekV3Config(**MLA)),
}


@pytest.mark.parametrize("name", MODELS)
@torch.no_grad()
def test_the_bytes_of_every_layer_are_those_of_a_filled_cache(name):
    model = MODELS[name]().eval()
    filled = model(tokens(2, 12), use_cache=True).past_key_values.layers
    planned = kv_cache(model, torch.float32, context=12, batch=2)
    assert list(planned.layers) == [layer.keys.nbytes + layer.values.nbytes for layer in filled]
    assert planned.nbytes == sum(planned.layers)
    assert "float32" in planned.assumed


@pytest.mark.parametrize("name", ["t5", "whisper"])
@torch.no_grad()
def test_an_encoder_decoder_keeps_the_encoder_as_well(name):
    model, inputs = build(name), TINY[name].inputs()
    # as long as the encoder's input of T5; whisper's has a fixed length
    inputs["decoder_input_ids"] = tokens(2, 12)
    cache = model(**inputs, use_cache=True).past_key_values
    both = zip(cache.self_attention_cache.layers, cache.cross_attention_cache.layers, strict=True)
    filled = [sum(t.nbytes for layer in pair for t in (layer.keys, layer.values)) for pair in both]
    assert list(kv_cache(model, torch.float32, 12, 2).layers) == filled


def test_context_batch_and_dtype_scale_it():
    model = MODELS["llama-grouped-query"]()
    one = kv_cache(model, torch.bfloat16, 1).nbytes
    assert one == 2 * 2 * 16 * 2 * 2
    assert kv_cache(model, torch.bfloat16, 100, 3).nbytes == 300 * one
    assert kv_cache(model, torch.float32, 100).nbytes == 200 * one
    assert kv_cache(model, torch.float32, 0).nbytes == 0


def test_what_is_assumed_is_said():
    said = {name: kv_cache(MODELS[name](), torch.bfloat16, 100).assumed for name in MODELS}
    assert said["llama-grouped-query"] == "2 layers, bfloat16, 2 key-value heads of 16"
    assert "windows of 8 tokens" in said["mistral-windows"]
    assert "latents of 16 + 8 values (MLA)" in said["deepseek-v3-mla"]
    assert "does not generate" in kv_cache(build("bert"), torch.bfloat16, 100).assumed
    assert kv_cache(torch.nn.Linear(2, 2), torch.bfloat16, 100).nbytes == 0


def test_a_model_that_generates_without_layers_that_cache_has_none():
    # speech models with CTC call it generating when they look for the best path
    class Spells(nn.Module):
        config = SimpleNamespace(get_text_config=lambda decoder: SimpleNamespace(vocab_size=8))

        def can_generate(self):
            return True

    found = kv_cache(Spells(), torch.float32, 16)
    assert found.nbytes == 0 and "nothing is cached" in found.assumed


def test_states_instead_of_keys_and_values_are_not_counted():
    # without attention there are no heads in the config
    config = tf.RwkvConfig(vocab_size=96, hidden_size=64, num_hidden_layers=2, attention_hidden_size=64)
    found = kv_cache(tf.RwkvForCausalLM(config), torch.float32, 16)
    assert found.nbytes == 0 and "no attention" in found.assumed
