"""Which modules the rule of routers leaves float, over the families of transformers that have experts."""

import re

import pytest
import torch
import transformers as tf
from tiny_models import SHAPE, TEXT, lively, qlinears, tokens
from torch import nn

from quanto_hf import QuantoConfig, report
from quanto_hf.flow.routers import REASON, routers

SMALL = {**TEXT, **SHAPE, "num_key_value_heads": 2, "head_dim": 16, "moe_intermediate_size": 32}
MOE = {**SMALL, "num_experts": 4, "num_local_experts": 4, "num_experts_per_tok": 2}
DEEPSEEK = {
    **SMALL, "n_routed_experts": 4, "num_experts_per_tok": 2, "n_group": 1, "topk_group": 1, "first_k_dense_replace": 0,
    "q_lora_rank": 16, "kv_lora_rank": 16, "qk_nope_head_dim": 16, "qk_rope_head_dim": 16, "v_head_dim": 16,
}  # fmt: skip
T5 = {
    "vocab_size": 96, "d_model": 64, "d_kv": 16, "d_ff": 128, "num_layers": 2, "num_decoder_layers": 2, "num_heads": 4,
    "num_experts": 4, "num_sparse_encoder_layers": 1, "num_sparse_decoder_layers": 1, "decoder_start_token_id": 0,
}  # fmt: skip

# model class -> its config, and the layers that stay float as routers, without the numbers of layers; a router that is
# a raw parameter stays float without this rule
FAMILIES = {
    "AfmoeForCausalLM": (MOE | {"num_dense_layers": 0}, {"mlp.router.gate"}),
    "DbrxForCausalLM": (
        {
            "vocab_size": 96, "d_model": 64, "n_heads": 4, "n_layers": 2, "max_seq_len": 64,
            "attn_config": {"kv_n_heads": 2, "rope_theta": 1e4, "clip_qkv": None},
            "ffn_config": {"ffn_hidden_size": 128, "moe_num_experts": 4, "moe_top_k": 2, "hidden_size": 64},
        },
        {"ffn.router.layer"},
    ),
    "JetMoeForCausalLM": (
        MOE | {"kv_channels": 16, "num_key_value_heads": 2},
        {"mlp.router.layer", "self_attention.experts.router.layer"},
    ),
    "HunYuanMoEV1ForCausalLM": (MOE | {"moe_topk": 2}, {"mlp.gate.wg"}),
    "SwitchTransformersForConditionalGeneration": (T5, {"mlp.router.classifier"}),
    "Qwen2MoeForCausalLM": (MOE | {"shared_expert_intermediate_size": 32}, {"mlp.shared_expert_gate"}),
    "Qwen3NextForCausalLM": (MOE | {"shared_expert_intermediate_size": 32}, {"mlp.shared_expert_gate"}),
    "LongcatFlashForCausalLM": (
        DEEPSEEK | {"num_layers": 2, "zero_expert_num": 2, "moe_topk": 2, "ffn_hidden_size": 128,
                    "expert_ffn_hidden_size": 32},
        {"mlp.router.classifier"},
    ),
    "xLSTMForCausalLM": (
        {"vocab_size": 96, "hidden_size": 64, "num_heads": 4, "num_blocks": 2},
        {"mlstm_layer.igate_preact", "mlstm_layer.fgate_preact"},
    ),
    "MixtralForCausalLM": (MOE, set()),
    "Qwen3MoeForCausalLM": (MOE, set()),
    "OlmoeForCausalLM": (MOE, set()),
    "GraniteMoeForCausalLM": (MOE, set()),
    "DeepseekV3ForCausalLM": (DEEPSEEK, set()),
    "LlamaForCausalLM": (SMALL, set()),
    "MiniMaxForCausalLM": (MOE, set()),
}  # fmt: skip


def empty(name):
    cls = getattr(tf, name)
    with torch.device("meta"):
        return cls(cls.config_class(**FAMILIES[name][0]))


@pytest.mark.parametrize("name", FAMILIES)
def test_the_rule_finds_the_routers_of_a_family_and_nothing_else(name):
    model = empty(name)
    found = routers(model, model.config)
    ends = {re.sub(r"^.*\.\d+\.", "", n) for n in found}
    assert ends == FAMILIES[name][1]
    assert not any("_proj" in n for n in found)


@pytest.mark.parametrize("name", ["AfmoeForCausalLM", "JetMoeForCausalLM", "Qwen2MoeForCausalLM"])
def test_they_stay_float_on_loading_and_can_be_asked_for(name, tmp_path):
    cls, (values, ends) = getattr(tf, name), FAMILIES[name]
    lively(cls(cls.config_class(**values))).save_pretrained(tmp_path / "float")

    def load(**kwargs):
        return cls.from_pretrained(tmp_path / "float", quantization_config=QuantoConfig("int8", **kwargs))

    model = load()
    reasons = {row.name: row.reason for row in report(model).rows}
    # a router that is a raw parameter stays float anyway
    linear = {f"{n}.weight" for n, module in model.named_modules() if isinstance(module, nn.Linear)}
    left = [n for n, reason in reasons.items() if reason == REASON and n in linear]
    assert {re.sub(r"^.*\.\d+\.", "", n).removesuffix(".weight") for n in left} == ends
    asked = load(overrides={n.removesuffix(".weight"): {"weights": "int8"} for n in left})
    assert {n.removesuffix(".weight") for n in left} == set(qlinears(asked)) - set(qlinears(model))
    every = load(default_skips=False)
    assert set(qlinears(asked)) < set(qlinears(every)) | {"lm_head"}
    # what was saved keeps its schemes
    for made, folder in ((model, "a"), (asked, "b")):
        made.save_pretrained(tmp_path / folder)
        again = cls.from_pretrained(tmp_path / folder)
        assert set(qlinears(again)) == set(qlinears(made))
        assert torch.equal(again(tokens()).logits, made(tokens()).logits)
