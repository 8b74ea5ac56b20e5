"""Fused experts: every layout of transformers computes with its packed weights what the float class computes with the
same numbers."""

import copy
import pickle
from types import SimpleNamespace

import pytest
import torch
from torch import nn
from transformers.models.aria.modeling_aria import AriaExperts
from transformers.models.dbrx.modeling_dbrx import DbrxExperts
from transformers.models.gpt_oss.modeling_gpt_oss import GptOssExperts
from transformers.models.inkling.modeling_inkling import InklingSharedExperts
from transformers.models.jetmoe.modeling_jetmoe import JetMoeParallelExperts
from transformers.models.llama4.modeling_llama4 import Llama4TextExperts
from transformers.models.longcat_flash.modeling_longcat_flash import LongcatFlashExperts
from transformers.models.minimax_m3_vl.modeling_minimax_m3_vl import MiniMaxM3VLExperts
from transformers.models.mixtral.modeling_mixtral import MixtralExperts
from transformers.models.muse_spark.modeling_muse_spark import MuseSparkExperts
from transformers.models.nemotron_h.modeling_nemotron_h import NemotronHExperts
from transformers.models.openai_privacy_filter.modeling_openai_privacy_filter import OpenAIPrivacyFilterExperts
from transformers.models.step3p7.modeling_step3p7 import Step3p7Experts

from quanto_hf import dequantize, freeze, quantize
from quanto_hf.nn import QExperts, QLlama4Experts, QTransposedExperts, QUngatedExperts
from quanto_hf.nn.qexperts_own import QInklingSharedExperts, QJetMoeExperts, QOwnExperts, QOwnTransposedExperts

WIDTH, INNER, EXPERTS, TOKENS, K = 64, 48, 5, 7, 2


def config(**values):
    """What the classes read of a config, under all of its names."""
    names = {
        "hidden_size": WIDTH, "intermediate_size": INNER, "moe_intermediate_size": INNER, "num_local_experts": EXPERTS,
        "num_experts": EXPERTS, "hidden_act": "silu", "swiglu_alpha": 1.7, "swiglu_limit": 7.0,
        "_experts_implementation": "eager",
    }  # fmt: skip
    return SimpleNamespace(**{**names, **values})


class Unknown(nn.Module):
    """Experts of a repository of its own, as transformers does not write them."""

    def __init__(self, transposed):
        super().__init__()
        shapes = ((WIDTH, 2 * INNER), (INNER, WIDTH)) if transposed else ((2 * INNER, WIDTH), (WIDTH, INNER))
        self.gate_up_proj, self.down_proj = (nn.Parameter(torch.empty(EXPERTS, *shape)) for shape in shapes)
        self.transposed = transposed

    def forward(self, tokens, chosen):
        out = []
        for token, expert in zip(tokens, chosen.tolist(), strict=True):
            up, down = self.gate_up_proj[expert], self.down_proj[expert]
            up, down = (up, down) if self.transposed else (up.T, down.T)
            out.append((token @ up)[:INNER].square() @ down)
        return torch.stack(out)


def routed(tokens=TOKENS, experts=EXPERTS, k=K):
    generator = torch.Generator().manual_seed(tokens)
    x = torch.randn(tokens, WIDTH, generator=generator)
    ids = torch.rand(tokens, experts, generator=generator).argsort(dim=1)[:, :k]
    return x, ids, torch.rand(tokens, k, generator=generator)


def sorted_tokens():
    x, ids, _ = routed(k=1)
    # each expert sees all tokens; those that it does not take are zero
    return ((x * (ids == torch.arange(EXPERTS)[:, None, None])).reshape(-1, WIDTH),)


def one_batch():
    x, ids, weights = routed()
    return x.view(1, TOKENS, WIDTH), ids, weights


def gammas():
    x, _, _ = routed()
    return x.view(1, TOKENS, WIDTH), torch.rand(1, TOKENS, EXPERTS, generator=torch.Generator().manual_seed(3))


DBRX = {"ffn_hidden_size": INNER, "moe_num_experts": EXPERTS, "ffn_act_fn": {"name": "silu"}}
# how the float module is made, what it is called with, and which class stands for it
LAYOUTS = {
    "standard": (lambda: MixtralExperts(config()), routed, QExperts),
    "own gate": (lambda: MiniMaxM3VLExperts(config()), routed, QExperts),
    "interleaved, transposed, with bias": (lambda: GptOssExperts(config()), routed, QTransposedExperts),
    "transposed, with bias": (lambda: OpenAIPrivacyFilterExperts(config()), routed, QTransposedExperts),
    "transposed": (lambda: AriaExperts(config(moe_num_experts=EXPERTS)), routed, QTransposedExperts),
    "no gate": (
        lambda: NemotronHExperts(config(n_routed_experts=EXPERTS, moe_latent_size=None, mlp_hidden_act="relu2")),
        routed,
        QUngatedExperts,
    ),
    "norm after the experts": (
        lambda: MuseSparkExperts(config(moe_hidden_size=WIDTH, post_norm_eps=1e-6)), routed, QExperts,
    ),
    "identity experts": (
        lambda: LongcatFlashExperts(config(expert_ffn_hidden_size=INNER, n_routed_experts=EXPERTS, zero_expert_num=3)),
        lambda: routed(experts=EXPERTS + 3, k=4),
        QExperts,
    ),
    "not flagged": (lambda: Step3p7Experts(config(), 0.5), routed, QExperts),
    "all tokens for each": (lambda: Llama4TextExperts(config()), sorted_tokens, QLlama4Experts),
    "one product": (
        lambda: JetMoeParallelExperts(EXPERTS, WIDTH, INNER), lambda: (routed()[0], [2, 0, 3, 1, 1]), QJetMoeExperts,
    ),
    "shared": (lambda: InklingSharedExperts(config(n_shared_experts=EXPERTS)), gammas, QInklingSharedExperts),
    "two dimensions": (lambda: DbrxExperts(config(**DBRX)), one_batch, None),
    "unknown": (lambda: Unknown(False), lambda: (routed()[0], routed()[1][:, 0]), QOwnExperts),
    "unknown, transposed": (lambda: Unknown(True), lambda: (routed()[0], routed()[1][:, 0]), QOwnTransposedExperts),
}  # fmt: skip


def made(layout):
    torch.manual_seed(0)
    module = nn.Sequential(LAYOUTS[layout][0]())
    for parameter in module.parameters():
        nn.init.normal_(parameter, 0, WIDTH**-0.5)
    return module.eval()


def frozen(layout, weights):
    model = made(layout)
    quantize(model, weights)
    return freeze(model)


def call(model, *inputs):
    return model[0](*inputs)


def off(found, wanted):
    return float(((found - wanted).norm() / wanted.norm()).detach())


@pytest.mark.parametrize("weights", ["int8", "int4", "nf4"])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_the_answer_is_that_of_the_float_class_with_the_same_numbers(layout, weights):
    inputs, kind = LAYOUTS[layout][1](), LAYOUTS[layout][2]
    model = frozen(layout, weights)
    assert kind is None or isinstance(model[0], kind)
    assert all(not p.is_floating_point() or p.dim() < 3 or p.shape[-1] < WIDTH for p in model.parameters())
    found = call(model, *inputs)
    wanted = call(dequantize(copy.deepcopy(model)), *inputs)
    assert found.shape == wanted.shape and found.dtype == wanted.dtype and off(found, wanted) < 1e-5
    assert 0 < off(found, call(made(layout), *inputs)) < (0.05 if weights == "int8" else 0.5)


ROUTED = [name for name, entry in LAYOUTS.items() if entry[1] is routed]


@pytest.mark.parametrize("layout", ROUTED)
def test_bfloat16_empty_batches_one_token_and_repeated_experts(layout):
    model = frozen(layout, "int8").to(torch.bfloat16)
    plain = dequantize(copy.deepcopy(model))
    x, ids, weights = routed()
    for rows in (slice(0, 0), slice(0, 1), slice(None)):
        inputs = x[rows].bfloat16(), ids[rows], weights[rows].bfloat16()
        found = call(model, *inputs)
        assert found.dtype == torch.bfloat16 and found.shape == (len(inputs[0]), WIDTH)
        assert not len(found) or off(found.float(), call(plain, *inputs).float()) < 0.02
    twice = torch.full_like(ids, 3)
    assert off(call(model, x.bfloat16(), twice, weights.bfloat16()), call(plain, x.bfloat16(), twice, weights)) < 0.03


def test_an_expert_on_another_device_adds_nothing():
    model, (x, ids, weights) = frozen("standard", "int4"), routed()
    away = ids.clone()
    away[::2, 1] = EXPERTS
    kept = torch.where(away == EXPERTS, torch.zeros(()), weights)
    wanted = call(model, x, ids, kept)
    torch.testing.assert_close(call(model, x, away, weights), wanted)
    torch.testing.assert_close(torch.compile(model[0], fullgraph=True)(x, away, weights), wanted)
    everywhere = torch.full_like(ids, EXPERTS)
    assert not call(model, x, everywhere, weights).any()


@pytest.mark.parametrize("layout", ROUTED)
def test_gradients_reach_the_inputs_and_the_routing_weights(layout):
    model = frozen(layout, "int8")
    plain = dequantize(copy.deepcopy(model))
    grads = []
    for one in (model, plain):
        x, ids, weights = routed()
        x, weights = x.requires_grad_(), weights.requires_grad_()
        call(one, x, ids, weights).square().sum().backward()
        grads.append((x.grad, weights.grad))
    for found, wanted in zip(*grads, strict=True):
        assert off(found, wanted) < 1e-4
    assert all(model[0].get_parameter(name).grad is None for name in model[0].stored_names)


@pytest.mark.parametrize("layout", ROUTED)
def test_prepared_experts_train_and_give_what_the_frozen_ones_give(layout):
    model = made(layout)
    quantize(model, "int8")
    inputs = routed()
    prepared = call(model, *inputs)
    prepared.square().sum().backward()
    slots = model[0].slot_names
    assert all(getattr(model[0], name).grad.abs().sum() > 0 for name in slots)
    assert off(call(freeze(model), *inputs), prepared.detach()) < 1e-5


@pytest.mark.parametrize("layout", ["standard", "interleaved, transposed, with bias", "no gate"])
def test_compiled_and_copied_and_pickled_experts_answer_the_same(layout):
    model, inputs = frozen(layout, "int4"), routed()
    wanted = call(model, *inputs)
    assert torch.equal(call(copy.deepcopy(model), *inputs), wanted)
    assert torch.equal(call(pickle.loads(pickle.dumps(model)), *inputs), wanted)
    torch.testing.assert_close(torch.compile(model[0], fullgraph=True)(*inputs), wanted)
    torch._dynamo.reset()


def test_autocast_converts_the_inputs_of_the_products():
    model, (x, ids, weights) = frozen("standard", "int8"), routed()
    with torch.autocast("cpu", torch.bfloat16):
        found = call(model, x, ids, weights)
    assert found.dtype == torch.float32 and 1e-5 < off(found, call(model, x, ids, weights)) < 0.02


@pytest.mark.parametrize("implementation", ["eager", "batched_mm", "grouped_mm"])
def test_the_implementation_that_the_model_asks_for_does_not_matter(implementation):
    model, inputs = frozen("standard", "int8"), routed()
    wanted = call(model, *inputs)
    model[0].config._experts_implementation = implementation
    assert torch.equal(call(model, *inputs), wanted)


def test_one_expert_of_a_packed_stack_is_dequantized_alone():
    model = frozen("standard", "int4")
    module, whole = model[0], model[0].gate_up_proj.dequantize()
    asked = []
    part = module.dequantized_part
    module.dequantized_part = lambda name, begin, end: asked.append((begin, end)) or part(name, begin, end)
    view = module.gate_up_proj
    view.dequantize = None
    assert torch.equal(view[3], whole[3]) and torch.equal(view[-1], whole[-1])
    assert torch.equal(view[torch.tensor(2)], whole[2]) and asked == [(3, 4), (EXPERTS - 1, EXPERTS), (2, 3)]
    with pytest.raises(IndexError):
        module.gate_up_proj[EXPERTS]


def test_a_layer_with_one_float_slot_computes_with_both():
    model = made("standard")
    quantize(model, "int8", overrides={"*.down_proj": {"weights": None}})
    freeze(model)
    assert isinstance(model[0].down_proj, nn.Parameter)
    assert off(call(model, *routed()), call(dequantize(copy.deepcopy(model)), *routed())) < 1e-5


def test_the_text_of_a_module_names_its_stacks():
    text = "gate_up_proj=(5, 96, 64), weights=int4 g64 asym, down_proj=(5, 64, 48), weights=int4 g64 asym"
    assert text in repr(frozen("standard", "int4")[0])
