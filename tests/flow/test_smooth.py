"""smooth: which pairs are found by watching, that float outputs stay equal, and that int8 activations gain."""

import copy

import pytest
import tiny_models
import torch
import torch.nn.functional as F
import transformers as tf
from torch import nn

from quanto_hf import compare, freeze, quantize, smooth
from quanto_hf.flow.channels import watching

X = torch.randn(6, 10, 32, generator=torch.Generator().manual_seed(7))


class Made(nn.Module):
    """A norm, two linear layers, and a function between them: ``body(self, x)``."""

    def __init__(self, body, norm=None, width=32):
        super().__init__()
        self.norm, self.body = norm or nn.LayerNorm(32), body
        self.a, self.b, self.c = nn.Linear(32, width), nn.Linear(width, 16), nn.Linear(32, width)
        self.scale = nn.Parameter(torch.randn(width))

    def forward(self, x):
        return self.body(self, x)


def folded(model, x=X, **kwargs):
    """(source, layers) of each fold, after a check that the outputs are equal and the parameters the same objects."""
    wanted, held = model(x), [id(p) for p in model.parameters()]
    found = smooth(model, x, **kwargs)
    assert torch.equal(model(x), wanted) and [id(p) for p in model.parameters()] == held
    return [(fold.source, *fold.layers) for fold in found]


@pytest.mark.parametrize(
    "between",
    [
        lambda m, h: h,
        lambda m, h: h.relu(),
        lambda m, h: F.relu(h, inplace=True),
        lambda m, h: F.leaky_relu(h, 0.2),
        lambda m, h: -h.abs(),
        lambda m, h: h * 3 / 7,
        lambda m, h: m.scale * h,
        lambda m, h: h.mul_(m.scale).div_(X[..., :1].abs() + 1),
        lambda m, h: h * h.new_ones(1, 10, 1) * F.silu(m.c(X)),
        lambda m, h: F.dropout(h.double().float(), 0.5, m.training),
        lambda m, h: h.view(60, 32).unsqueeze(1).squeeze(1).contiguous(),
        lambda m, h: h.transpose(0, 1).permute(1, 0, 2).reshape(6, 5, 2, 32),
        lambda m, h: h[:, 2:7, :][:, -1],
        lambda m, h: h[torch.tensor([4, 2, 2])].expand(2, 3, 10, 32),
    ],
)  # fmt: skip
def test_what_keeps_channels_apart_is_folded_through(between):
    model = Made(lambda m, x: m.b(between(m, m.a(m.norm(x))))).eval()
    found = folded(model)
    assert ("norm", "a") in found and ("a", "b") in found


@pytest.mark.parametrize(
    ("between", "why"),
    [
        (lambda m, h: F.gelu(h), "an input of gelu"),
        (lambda m, h: h + 1, "an input of add"),
        (lambda m, h: h * h, "an input of mul"),
        (lambda m, h: 1 / h.abs().add(1), "an input of add"),
        (lambda m, h: m.scale / (h.square() + 1), "an input of pow"),
        (lambda m, h: torch.ones_like(h).mul_(h), "an input of mul_"),
        (lambda m, h: torch.div(h, 0.1, rounding_mode="floor"), "an input of div"),
        (lambda m, h: h.flip(-1), "an input of flip"),
        (lambda m, h: h.roll(1, -1), "an input of roll"),
        (lambda m, h: h.view(6, 10, 8, 4).transpose(2, 3).reshape(6, 10, 32), "an input of view"),
        (lambda m, h: torch.cat([h[..., 16:], h[..., :16]], -1), "an input of slice"),
        (lambda m, h: h[..., torch.arange(31, -1, -1)], "an input of index"),
        (lambda m, h: h.clamp(-1, 1), "an input of clamp"),
        (lambda m, h: h.masked_fill(h > 0, 1.0), "an input of"),
        (lambda m, h: h.to(torch.int32).float(), "an input of _to_copy"),
        (lambda m, h: h @ torch.eye(32), "an input of"),
        (lambda m, h: F.linear(h, m.c.weight), "an input of"),
        (lambda m, h: m.norm(h), "an input of a LayerNorm"),
        (lambda m, h: h * h.mean().item(), "an input of mean"),
    ],
)  # fmt: skip
def test_what_mixes_or_bends_channels_is_not(between, why):
    model = Made(lambda m, x: m.b(between(m, m.a(x)))).eval()
    wanted, before = model(X), copy.deepcopy(model.state_dict())
    with torch.no_grad(), watching(model) as watch:
        watch.finish(model(X))
    assert why in watch.flows[model.a].reason
    found = smooth(model, X)
    assert "a" not in [fold.source for fold in found]
    assert torch.equal(model(X), wanted)
    if not len(found):
        assert all(torch.equal(before[name], tensor) for name, tensor in model.state_dict().items())
    assert list(found.left)[:1] == ["a"] and found.left["a"].startswith("between it and the last norm")
    assert "b" in found.left or ("norm", "b") == (found[0].source, *found[0].layers)


@pytest.mark.parametrize(
    ("body", "why"),
    [
        (lambda m, x: m.b(m.norm(x)) + m.norm(x)[..., :16], "also an input of slice"),
        (lambda m, x: (lambda h: m.b(h) + h[..., :1] * 0)(m.norm(x)), "also an input of slice"),
        (lambda m, x: {"out": m.b(h := m.norm(x)), "hidden": (h,)}, "an output of the model"),
        (lambda m, x: m.b(m.norm(x)) + m.b(x), "another input as well"),
    ],
)
def test_every_reader_must_be_a_linear_layer_and_read_nothing_else(body, why):
    model = Made(body).eval()
    found = smooth(model, X)
    assert not len(found) and why in found.left["b"] and found.left["b"].startswith("norm cannot be scaled: ")
    assert found.left["a"] == found.left["c"] == "it was not called"


class One(nn.Module):
    """The RMS norm of Gemma: the factor is 1 + weight."""

    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(0.1 * torch.randn(32))

    def forward(self, x):
        x = x.float() * torch.rsqrt(x.float().square().mean(-1, keepdim=True) + 1e-6)
        return (x * (1 + self.weight.float())).to(self.weight.dtype)


@pytest.mark.parametrize("norm", [nn.LayerNorm(32), nn.LayerNorm(32, bias=False), nn.RMSNorm(32)], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
def test_norms_in_all_dtypes_give_the_same_bits(norm, dtype):
    model = Made(lambda m, x: m.b(m.a(m.norm(x)).relu()) + m.c(m.norm(x))[..., :16], copy.deepcopy(norm)).to(dtype)
    assert folded(model.eval(), X.to(dtype)) == [("norm", "a", "c"), ("a", "b")]


def test_a_norm_with_one_plus_its_weight_is_scaled_where_that_is_exact():
    model = Made(lambda m, x: m.b(m.norm(x)), One()).eval()
    wanted, factor = model(X), 1 + model.norm.weight.detach()
    (fold,) = smooth(model, X)
    assert tiny_models.relative(model(X).detach(), wanted.detach()) < 1e-6
    torch.testing.assert_close((1 + model.norm.weight) * fold.scale, factor)
    # in bfloat16 1 + w has 8 bits: w near -1 loses what remains of it
    half = Made(lambda m, x: m.b(m.norm(x)), One()).bfloat16().eval()
    half.b.weight.data.mul_(2**-6)
    before = copy.deepcopy(half.state_dict())
    found = smooth(half, X.bfloat16())
    assert not len(found) and "does not scale exactly" in found.left["b"]
    assert all(torch.equal(before[name], tensor) for name, tensor in half.state_dict().items())


class Bent(nn.Module):
    """It looks like a norm, and is none."""

    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(32))

    def forward(self, x):
        return torch.tanh(x * self.weight)


def test_what_only_looks_like_a_norm_is_found_out():
    found = smooth(Made(lambda m, x: m.b(m.norm(x)), Bent()).eval(), X)
    assert not len(found) and found.left["b"] == "the output of a Bent does not scale exactly with its weight"


def test_weights_that_are_shared_stay():
    model = Made(lambda m, x: m.b(m.a(m.norm(x)).relu())).eval()
    model.c.weight = model.a.weight
    model.tied = nn.Embedding(16, 32)
    model.b.weight = model.tied.weight
    found = smooth(model, X)
    assert set(found.left) == {"a", "b", "c"} and "shared" in found.left["a"] and "shared" in found.left["b"]


def test_the_scales_are_those_of_the_paper_rounded_to_powers_of_two():
    model = Made(lambda m, x: m.b(m.norm(x)) + m.c(m.norm(x))[..., :16], width=32).eval()
    x, inputs = torch.cat([X, 30 * X]), model.norm(torch.cat([X, 30 * X])).detach()
    peak = inputs.abs().flatten(0, -2).amax(0)
    weight = torch.cat([model.b.weight, model.c.weight]).detach().abs().amax(0)
    for alpha in (0, 0.5, 0.8, 1):
        (fold,) = smooth(copy.deepcopy(model), [x[:5], x[5:]], alpha=alpha)
        ratio = fold.scale / (peak**alpha / weight ** (1 - alpha))
        assert (fold.scale.log2() == fold.scale.log2().round()).all()
        assert ratio.min() > 2**-0.5001 and ratio.max() < 2**0.5001


def test_exact_scales_are_those_of_the_paper_and_outputs_stay_equal_to_a_rounding():
    model = Made(lambda m, x: m.b(m.a(m.norm(x)).relu())).eval()
    inputs, weight = model.norm(X).detach(), model.a.weight.detach().clone()
    wanted = model(X).detach()
    folds = smooth(model, X, powers_of_two=False)
    assert [(fold.source, *fold.layers) for fold in folds] == [("norm", "a"), ("a", "b")]
    peak = inputs.abs().flatten(0, -2).amax(0)
    torch.testing.assert_close(folds[0].scale, (peak / weight.abs().amax(0)).sqrt())
    torch.testing.assert_close(model.a.weight.detach(), weight * folds[0].scale / folds[1].scale[:, None])
    assert 0 < tiny_models.relative(model(X).detach(), wanted) < 1e-6


def test_channels_without_input_or_weight_keep_their_scale():
    model = Made(lambda m, x: m.b(m.norm(x))).eval()
    with torch.no_grad():
        model.norm.weight[3] = model.norm.bias[3] = 0
        model.b.weight[:, 4] = 0
    (fold,) = smooth(model, X)
    assert fold.scale[3] == fold.scale[4] == 1 and all(p.isfinite().all() for p in model.parameters())


def with_outliers(model):
    """Some channels of each norm a hundred times the others, as large language models have them."""
    with torch.no_grad():
        for module in model.modules():
            if type(module).__name__ in ("LayerNorm", "LlamaRMSNorm"):
                module.weight[::17] *= 100
    return model


def test_int8_activations_gain_where_there_are_outliers():
    model = with_outliers(tiny_models.build("llama"))
    inputs = tiny_models.TINY["llama"].inputs()
    mean = {}
    for smoothed in (False, True):
        other = copy.deepcopy(model)
        if smoothed:
            smooth(other, inputs)
        quantized = freeze(quantize(copy.deepcopy(other), weights="int8", activations="int8"))
        rows = [row for row in compare(other, quantized, inputs, layers="q_proj").rows]
        mean[smoothed] = sum(row.own.sqnr for row in rows) / len(rows)
    assert mean[True] > mean[False] + 6


# linear layers whose input is smoothed, and those whose input is not
FOUND = {
    "llama": (12, {"o_proj"}),
    "llama-tied": (12, {"o_proj"}),
    "opt": (10, {"out_proj"}),
    "gpt-neox": (4, {"dense", "dense_4h_to_h"}),
    "vit": (9, {"o_proj", "fc2"}),
    "bert": (0, {"query", "key", "value", "dense"}),
    "t5": (22, {"k", "v", "o"}),
}


@pytest.mark.parametrize("name", FOUND)
def test_transformers_models_give_the_same_bits(name):
    model = tiny_models.build(name)
    wanted = tiny_models.output(model, name)
    found = smooth(model, tiny_models.TINY[name].inputs())
    count, left = FOUND[name]
    assert sum(len(fold.layers) for fold in found) == count
    assert {layer.rpartition(".")[2] for layer in found.left} == left
    assert torch.equal(tiny_models.output(model, name), wanted)


def test_bert_says_that_its_norms_feed_the_residual_stream():
    found = smooth(tiny_models.build("bert"), tiny_models.TINY["bert"].inputs())
    assert "its output is also an input of add" in found.left["encoder.layer.1.attention.self.query"]
    assert "LayerNorm cannot be scaled: its output is an output of the model" in found.left["pooler.dense"]


@pytest.mark.parametrize(
    ("model", "config", "sources"),
    [
        (tf.GemmaForCausalLM, tf.GemmaConfig, ["input_layernorm", "post_attention_layernorm", "up_proj"]),
        (tf.Qwen3ForCausalLM, tf.Qwen3Config, ["input_layernorm", "post_attention_layernorm", "up_proj"]),
        (tf.MixtralForCausalLM, tf.MixtralConfig, ["input_layernorm"]),
    ],
)
def test_more_language_models(model, config, sources):
    extra = {"num_local_experts": 4} if config is tf.MixtralConfig else {}
    made = config(**tiny_models.TEXT, **tiny_models.SHAPE, num_key_value_heads=2, head_dim=16, **extra)
    net = tiny_models.lively(model(made))
    inputs = {"input_ids": tiny_models.tokens()}
    wanted = net(**inputs).logits.detach()
    found = smooth(net, inputs)
    assert [fold.source.rpartition(".")[2] for fold in found] == 2 * sources
    assert tiny_models.relative(net(**inputs).logits.detach(), wanted) < 1e-5


def test_a_fold_that_changes_the_outputs_is_undone_and_the_others_stay(monkeypatch):
    class Sly(nn.LayerNorm):
        """In a whole model it does something else than alone."""

        def forward(self, x):
            return super().forward(x) + (self.weight[0] if x.shape[0] == 6 and x.shape[1] == 10 else 0)

    model = Made(lambda m, x: m.b(m.a(m.norm(x)).relu()), Sly(32)).eval()
    wanted, weight = model(X), model.norm.weight.detach().clone()
    with torch.no_grad():
        # the scale of a channel that is not 1 is seen by all
        model.a.weight[:, 0] *= 64
    wanted = model(X)
    found = smooth(model, X)
    assert [fold.source for fold in found] == ["a"] and torch.equal(model.norm.weight, weight)
    assert found.left["a"].startswith("the outputs of the model changed by ")
    assert torch.equal(model(X), wanted)


def test_a_weight_that_would_leave_float16_is_left():
    model = Made(lambda m, x: m.b(m.norm(x))).half().eval()
    with torch.no_grad():
        # two channels of 2,000 that cancel out: with alpha=1 their weights are to be 40 times 2,048
        model.norm.weight[:2], model.norm.bias[:2] = 0, 2000
        model.b.weight[:, 0], model.b.weight[:, 1] = 40, -40
    before = copy.deepcopy(model.state_dict())
    assert model(X.half()).isfinite().all()
    found = smooth(model, X.half(), alpha=1)
    assert not len(found) and found.left["b"] == "a weight would leave the range of float16"
    assert all(torch.equal(before[name], tensor) for name, tensor in model.state_dict().items())


def test_training_mode_gradients_hooks_and_buffers_are_left_as_they_were():
    model = Made(lambda m, x: F.dropout(m.b(m.norm(x)), 0.5, m.training)).train()
    smooth(model, X)
    assert model.training and all(p.requires_grad for p in model.parameters())
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())


def test_excluded_layers_are_scaled_along_but_nothing_is_done_for_them():
    model = Made(lambda m, x: m.b(m.norm(x)) + m.c(m.norm(x))[..., :16]).eval()
    assert folded(copy.deepcopy(model), exclude="c") == [("norm", "b", "c")]
    found = smooth(model, X, exclude=["b", "c"])
    assert not len(found) and found.left == {"a": "it was not called"}


def test_what_cannot_be_smoothed():
    def made():
        return Made(lambda m, x: m.b(m.norm(x))).eval()

    with pytest.raises(ValueError, match=r"alpha=1\.5 is not between 0 and 1"):
        smooth(made(), X, alpha=1.5)
    for model in (quantize(made()), freeze(quantize(made()))):
        with pytest.raises(ValueError, match="smooth the float model first, then quantize it"):
            smooth(model, X)
    with pytest.raises(ValueError, match="offloaded or on meta"):
        smooth(made().to("meta"), X)
    with pytest.raises(ValueError, match="there is no data"):
        smooth(made(), [])
    with pytest.raises(ValueError, match="there is no data"):
        smooth(made(), X[:0])
    model = made()
    model.norm.weight.data[2] = float("nan")
    assert "not finite" in smooth(model, X).left["b"]


def test_a_failure_on_the_way_leaves_the_model_as_it_was():
    model = Made(lambda m, x: m.b(m.norm(x))).eval()
    calls, before = [], copy.deepcopy(model.state_dict())

    def fail(*_):
        calls.append(1)
        if len(calls) == 2:
            raise RuntimeError("out of memory")

    model.register_forward_hook(fail)
    with pytest.raises(RuntimeError, match="out of memory"):
        smooth(model, X)
    assert all(torch.equal(before[name], tensor) for name, tensor in model.state_dict().items())


def test_the_text_has_a_line_for_each_fold_and_each_layer_that_is_left():
    text = str(smooth(tiny_models.build("llama"), tiny_models.TINY["llama"].inputs()))
    assert len(text.splitlines()) == 6 + 2
    assert text.startswith(
        "model.layers.0.input_layernorm -> model.layers.0.self_attn.q_proj, model.layers.0.self_attn.k"
    )
    assert "o_proj: not smoothed: between it" in text
