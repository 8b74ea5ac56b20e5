"""Families with GPT-2's Conv1D: quantized while they load, saved, reloaded, adapted, and plain ones come back."""

import importlib

import pytest
import torch
import transformers as tf
from tiny_models import TEXT, lively, noise, relative, tokens
from transformers.pytorch_utils import Conv1D

from quanto_hf import AqlmConfig, QuantoConfig, report
from quanto_hf.nn import QConv1D

SIZES = {"n_embd": 64, "n_layer": 2, "n_head": 4, "n_positions": 64}


def gpt2():
    return tf.GPT2LMHeadModel(tf.GPT2Config(**TEXT, **SIZES))


def openai():
    return tf.OpenAIGPTLMHeadModel(tf.OpenAIGPTConfig(**TEXT, **SIZES))


def imagegpt():
    return tf.ImageGPTForCausalImageModeling(tf.ImageGPTConfig(vocab_size=97, **SIZES))


def decision():
    config = tf.DecisionTransformerConfig(
        state_dim=5, act_dim=3, hidden_size=64, max_ep_len=64, n_layer=2, n_head=4, n_positions=64
    )
    return tf.DecisionTransformerModel(config)


def clvp():
    shape = {"hidden_size": 64, "num_hidden_layers": 1, "num_attention_heads": 4}
    encoder = {**shape, "vocab_size": 97, "intermediate_size": 128, "projection_dim": 64}
    decoder = {**shape, "vocab_size": 97, "n_inner": 128, "max_position_embeddings": 64, "max_text_tokens": 64,
               "num_mel_attn_blocks": 1, "feature_size": 16}  # fmt: skip
    return tf.ClvpModelForConditionalGeneration(
        tf.ClvpConfig(text_config=encoder, speech_config=encoder, decoder_config=decoder, projection_dim=64)
    )


def decide(model):
    times = torch.arange(6)[None]
    state, action, reward = noise(1, 6, 5), noise(1, 6, 3), noise(1, 6, 1)
    return model(states=state, actions=action, returns_to_go=reward, timesteps=times).last_hidden_state


def speak(model):
    return model.speech_decoder_model(tokens()).logits


def text(model):
    return model(tokens()).logits


# how to build one, how to run it, and how many layers it has
FAMILIES = {
    "gpt2": (gpt2, text, 8), "openai-gpt": (openai, text, 8), "imagegpt": (imagegpt, text, 8),
    "decision_transformer": (decision, decide, 8), "clvp": (clvp, speak, None),
}  # fmt: skip


def packed(model):
    return [module for module in model.modules() if isinstance(module, QConv1D)]


@pytest.mark.parametrize("name", FAMILIES)
@torch.no_grad()
def test_a_family_is_packed_saved_reloaded_and_given_back(name, tmp_path):
    build, run, count = FAMILIES[name]
    plain = lively(build())
    plain.save_pretrained(tmp_path / "float")
    model = type(plain).from_pretrained(tmp_path / "float", quantization_config=QuantoConfig("int8")).eval()
    assert len(packed(model)) == (count or sum(isinstance(m, Conv1D) for m in plain.modules())) > 0
    assert not any(type(module) is Conv1D for module in model.modules())
    made = run(model)
    assert relative(made, run(plain)) < 0.05
    model.save_pretrained(tmp_path / "saved")
    again = type(plain).from_pretrained(tmp_path / "saved").eval()
    assert torch.equal(run(again), made) and len(packed(again)) == len(packed(model))
    again.dequantize()
    assert not packed(again) and relative(run(again), made) < 1e-4
    # what the float model would have saved, with the rounded numbers
    for key, tensor in plain.state_dict().items():
        assert again.state_dict()[key].shape == tensor.shape


def test_the_float_weight_is_transposed_layer_by_layer(tmp_path):
    gpt2().save_pretrained(tmp_path)
    model = tf.GPT2LMHeadModel.from_pretrained(tmp_path, quantization_config=QuantoConfig("int4"))
    rows = {row.name: row for row in report(model).rows}
    row = rows["transformer.h.0.attn.c_attn.weight"]
    assert (row.stored, row.shape) == ("int4 g64 asym", (64, 192)) and row.error is not None
    layer = model.transformer.h[0].attn.c_attn
    assert layer.weight_packed.shape == (192, 32) and layer.weight_packed.is_contiguous()


def test_it_generates_and_trains(tmp_path):
    lively(gpt2()).save_pretrained(tmp_path)
    model = tf.GPT2LMHeadModel.from_pretrained(tmp_path, quantization_config=QuantoConfig("int8"))
    made = model.generate(tokens(1, 4), max_new_tokens=6, do_sample=False)
    plain = tf.GPT2LMHeadModel.from_pretrained(tmp_path, quantization_config=QuantoConfig("int8", dequantize=True))
    assert torch.equal(made, plain.generate(tokens(1, 4), max_new_tokens=6, do_sample=False))
    model = tf.GPT2LMHeadModel.from_pretrained(tmp_path, quantization_config=QuantoConfig("int8", qat=True))
    model(tokens(), labels=tokens()).loss.backward()
    assert model.transformer.h[0].mlp.c_fc.weight.grad.abs().sum() > 0


@pytest.mark.filterwarnings("ignore:fan_in_fan_out")
def test_an_adapter_of_peft_trains_on_it(tmp_path):
    peft = pytest.importorskip("peft")
    lora = importlib.import_module("peft.tuners.lora")
    lively(gpt2()).save_pretrained(tmp_path / "float")

    def load():
        return tf.GPT2LMHeadModel.from_pretrained(tmp_path / "float", quantization_config=QuantoConfig("int4"))

    config = peft.LoraConfig(target_modules=["c_attn", "c_fc"], r=4, fan_in_fan_out=True, task_type="CAUSAL_LM")
    model = peft.get_peft_model(load(), config)
    layers = [module for module in model.modules() if isinstance(module, lora.LoraLayer)]
    assert len(layers) == 4 and all(isinstance(layer.base_layer, QConv1D) for layer in layers)
    optimizer = torch.optim.Adam([p for p in model.parameters() if p.requires_grad], 1e-2)
    losses = []
    for _ in range(4):
        loss = model(tokens(), labels=tokens()).loss
        loss.backward()
        losses.append(loss.item())
        optimizer.step()
        optimizer.zero_grad()
    assert losses[-1] < losses[0]
    model.eval()
    with torch.no_grad():
        made = model(tokens()).logits
        model.save_pretrained(tmp_path / "adapter")
        again = peft.PeftModel.from_pretrained(load(), tmp_path / "adapter").eval()
        assert torch.equal(again(tokens()).logits, made)
        with model.disable_adapter():
            assert torch.equal(model(tokens()).logits, load()(tokens()).logits)
        model.base_model.model.dequantize()
        assert relative(model.merge_and_unload()(tokens()).logits, made) < 1e-4


def test_the_published_format_of_aqlm_has_none(tmp_path):
    gpt2().save_pretrained(tmp_path)
    config = AqlmConfig(num_codebooks=1, nbits_per_codebook=8)
    with pytest.warns(UserWarning, match="no linear layer of GPT2LMHeadModel is quantized|stay in float"):
        model = tf.GPT2LMHeadModel.from_pretrained(tmp_path, quantization_config=config)
    rows = {row.name: row for row in report(model).rows}
    assert rows["transformer.h.0.attn.c_attn.weight"].reason == "the format has no Conv1D"
