"""Every kind of adapter that the installed ``peft`` has, on quantized models: forward, gradients, reload.

The twin of a quantized model has the same numbers in plain float layers. What an adapter computes on both, and the
gradients that its parameters get, must be the same but for the order of sums.
"""

import dataclasses
import os

import pytest
import torch
import transformers as tf
from tiny_models import build, relative, tokens
from turns import in_turn

from quanto_hf import QLinear, QuantoConfig

peft = pytest.importorskip("peft")
mapping = pytest.importorskip("peft.mapping")

# GLoRA takes nothing but exact nn.Linear modules
REFUSED_BY_PEFT = {"GLORA"}
# PEFT 0.21 saves the classifier of X-LoRA and does not load it: the twin is another model after a reload, too
NOT_RELOADED_BY_PEFT = {"XLORA"}
KINDS = mapping.PEFT_TYPE_TO_CONFIG_MAPPING
MIXED = pytest.importorskip("peft.tuners.mixed.model").COMPATIBLE_TUNER_TYPES
# Sizes that fit a model of width 64, where the defaults of a method do not; "target_modules" None: it finds its own
VALUES = {
    "ADALORA": {"total_step": 10},
    "ADAMSS": {"num_subspaces": 2, "subspace_rank": 2},
    "ADAPTION_PROMPT": {"target_modules": None, "adapter_len": 4, "adapter_layers": 2},
    "CPT": {"cpt_token_ids": [3, 4, 5, 6], "cpt_mask": [1] * 4, "cpt_tokens_type_mask": [1, 2, 3, 4]},
    "BOFT": {"boft_block_size": 8},
    "C3A": {"block_size": 16},
    "FOURIERFT": {"n_frequency": 50},
    "IA3": {"feedforward_modules": []},
    "MULTITASK_PROMPT_TUNING": {"num_tasks": 2},
    "LN_TUNING": {"target_modules": ["input_layernorm"]},
    "OFT": {"oft_block_size": 8, "r": 0},
    "ROAD": {"group_size": 16},
    "SHADOW": {"target_modules": None},
    "TRAINABLE_TOKENS": {"target_modules": ["embed_tokens"], "token_indices": [3, 4]},
    "VBLORA": {"vector_length": 16, "num_vectors": 8},
    "WAVEFT": {"n_frequency": 50},
}
PROMPTS = {"num_virtual_tokens": 4}
# what a forward pass needs besides token ids
INPUTS = {kind: {"task_ids": torch.zeros(2, dtype=torch.long)} for kind in ("MULTITASK_PROMPT_TUNING", "POLY")}


def config(kind: str, adapters: dict[str, str]):
    """A config of this kind for a tiny Llama."""
    cls = KINDS[kind]
    known = {field.name for field in dataclasses.fields(cls)}
    values = {"task_type": "CAUSAL_LM", "target_modules": ["q_proj", "v_proj"], "r": 4, **PROMPTS}
    values = {name: value for name, value in values.items() if name in known}
    if "target_modules" not in known or "num_virtual_tokens" in known:
        values.pop("target_modules", None)
    given = {**values, **VALUES.get(kind, {})}
    if kind == "XLORA":
        given = {"task_type": "CAUSAL_LM", "hidden_size": 64, "adapters": adapters}
    return cls(**{name: value for name, value in given.items() if value is not None})


@pytest.fixture(autouse=True)
def environment():
    """BOFT tries to compile for CUDA, and where that fails it leaves CC=gcc and CXX=gcc to every later test."""
    before = dict(os.environ)
    yield
    os.environ.clear()
    os.environ.update(before)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("llama")
    build("llama").save_pretrained(path)
    return path


@pytest.fixture(scope="module")
def adapters(folder, tmp_path_factory):
    """Two saved LoRA adapters, which X-LoRA mixes: name -> folder."""
    found = {}
    for name in ("0", "1"):
        torch.manual_seed(int(name))
        given = peft.LoraConfig(target_modules=["q_proj", "v_proj"], r=4, init_lora_weights=False)
        model = peft.get_peft_model(tf.AutoModelForCausalLM.from_pretrained(folder), given)
        found[name] = str(tmp_path_factory.mktemp("adapter"))
        model.save_pretrained(found[name])
    return found


def load(folder, weights: str, dequantize: bool = False):
    """A tiny Llama, quantized, or with the same numbers in plain layers."""
    given = QuantoConfig(weights, dequantize=dequantize)
    model = tf.AutoModelForCausalLM.from_pretrained(folder, quantization_config=given)
    # X-LoRA wants it so
    model.config.use_cache = False
    return model


def adapted(model, kind: str, adapters: dict[str, str], mixed: bool = False):
    """The model with an adapter whose parameters are drawn anew: most begin as 0, which would hide mistakes."""
    torch.manual_seed(0)
    model = peft.get_peft_model(model, config(kind, adapters), mixed=mixed)
    draw = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(0.02 * torch.randn(parameter.shape, generator=draw))
    return model.eval()


def again(adapter, folder, weights: str, dequantize: bool = False):
    """The model of a saved adapter."""
    torch.manual_seed(4)
    return peft.PeftModel.from_pretrained(load(folder, weights, dequantize), adapter).eval()


@torch.no_grad()
def answer(model, kind: str):
    """Logits without labels, which some adapters of PEFT take for training."""
    torch.manual_seed(2)
    return model(input_ids=tokens(), **INPUTS.get(kind, {})).logits


def forward_and_gradients(model, kind: str):
    """Logits, and name -> gradient of each parameter that is trained."""
    torch.manual_seed(2)
    model.zero_grad()
    out = model(input_ids=tokens(), labels=tokens(), **INPUTS.get(kind, {}))
    out.loss.backward()
    return out.logits.detach(), {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize(
    "kind, weights", in_turn([kind.value for kind in KINDS if kind not in REFUSED_BY_PEFT], ["int8", "int4"], 1)
)
def test_every_adapter_computes_and_learns_what_it_does_on_the_dequantized_model(
    kind, weights, folder, adapters, tmp_path
):
    plain, twin = load(folder, weights), load(folder, weights, dequantize=True)
    layers = [module for module in plain.modules() if isinstance(module, QLinear)]
    packed = [layer.weight_packed.clone() for layer in layers]
    model, twin = adapted(plain, kind, adapters), adapted(twin, kind, adapters)
    made, gradients = forward_and_gradients(model, kind)
    wanted, other = forward_and_gradients(twin, kind)
    assert relative(made, wanted) <= 1e-5
    assert gradients and gradients.keys() == other.keys()
    for name, gradient in gradients.items():
        assert relative(gradient, other[name]) <= 1e-3 or other[name].norm() < 1e-6, name
    assert len(layers) == 14 and all(map(torch.equal, packed, (layer.weight_packed for layer in layers)))

    model.save_pretrained(tmp_path)
    assert torch.equal(answer(again(tmp_path, folder, weights), kind), answer(model, kind)) == (
        kind not in NOT_RELOADED_BY_PEFT
    )
    if kind in NOT_RELOADED_BY_PEFT:
        reloaded = [answer(again(tmp_path, folder, weights, dequantize), kind) for dequantize in (False, True)]
        assert relative(*reloaded) <= 1e-5


@pytest.mark.parametrize("kind", sorted(REFUSED_BY_PEFT))
def test_what_peft_refuses_for_every_subclass_of_linear_is_an_error_of_peft(kind, folder):
    with pytest.raises(ValueError, match=r"not a plain torch\.nn\.Linear"):
        peft.get_peft_model(load(folder, "int4"), config(kind, {}))


@pytest.mark.parametrize("kind", [kind.value for kind in MIXED])
def test_every_adapter_that_may_be_mixed_is_right_in_a_mixed_model(kind, folder):
    model = adapted(load(folder, "int4"), kind, {}, mixed=True)
    twin = adapted(load(folder, "int4", dequantize=True), kind, {}, mixed=True)
    for each in (model, twin):
        torch.manual_seed(3)
        each.add_adapter("second", peft.LoraConfig(target_modules=["k_proj"], r=2, init_lora_weights=False))
        each.set_adapter(["default", "second"])
    made, _ = forward_and_gradients(model, kind)
    wanted, _ = forward_and_gradients(twin, kind)
    assert relative(made, wanted) <= 1e-5


@pytest.mark.parametrize("weights", ["int8", "int4", "int2", "nf4", "float8"])
def test_parameters_are_counted_as_those_of_the_float_model(weights, folder):
    counts = [peft.get_peft_model(load(folder, weights, twin), config("LORA", {})) for twin in (False, True)]
    made, wanted = (model.get_nb_trainable_parameters() for model in counts)
    assert made == wanted
