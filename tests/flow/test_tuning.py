"""Fine-tuning with fixed codes lowers the loss, block by block and end to end, and touches nothing else."""

import copy

import pytest
import torch
from torch import nn
from transformers import AutoModelForCausalLM, AutoTokenizer

import quanto_hf
from quanto_hf.flow import evaluate, freeze, quantize, tune_blocks, tune_codebooks, tune_end_to_end, windows


@pytest.fixture(scope="module")
def language_model():
    tokens = AutoTokenizer.from_pretrained(quanto_hf.tiny_lm())(quanto_hf.heldout_text(), verbose=False).input_ids
    inputs = windows(tokens, 64)
    model = AutoModelForCausalLM.from_pretrained(quanto_hf.tiny_lm(), dtype=torch.float32).eval()
    return model, [{"input_ids": part} for part in inputs[100:116].split(8)], inputs[:12]


@pytest.fixture(scope="module")
def made(language_model):
    # a coarse one, which leaves much to gain
    return freeze(quantize(copy.deepcopy(language_model[0]), "aqlm-1x6", include="*.mlp.*"))


@pytest.fixture(scope="module")
def divergence(language_model, made):
    """Of the model that is to be tuned, on other text."""
    teacher, _, other = language_model
    return evaluate(made, other, teacher).kl


def codes(model):
    return [tensor.clone() for name, tensor in model.state_dict().items() if name.endswith("codes")]


def test_end_to_end_lowers_the_divergence_on_other_text(language_model, made, divergence):
    teacher, data, other = language_model
    model = copy.deepcopy(made)
    before, after = tune_end_to_end(model, teacher, data, epochs=3, rate=1e-2)
    assert after < 0.97 * before
    assert evaluate(model, other, teacher).kl < divergence
    assert all(torch.equal(a, b) for a, b in zip(codes(model), codes(made), strict=True))


def test_block_by_block_lowers_the_error_of_every_block(language_model, made, divergence):
    teacher, data, other = language_model
    model = copy.deepcopy(made)
    found = tune_blocks(model, teacher, data, ["model.layers.0", "model.layers.1"], epochs=4, rate=1e-2)
    assert list(found) == ["model.layers.0", "model.layers.1"]
    assert all(after < 0.97 * before for before, after in found.values())
    assert evaluate(model, other, teacher).kl < divergence


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_only_codebooks_and_scales_change(dtype):
    exact = nn.Sequential(nn.Linear(32, 16), nn.LayerNorm(16), nn.Linear(16, 8)).to(dtype)
    model = freeze(quantize(copy.deepcopy(exact), "aqlm-2x3"))
    x = torch.randn(200, 32).to(dtype)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    loss = lambda module, batch: (module(batch).float() - exact(batch).float().detach()).square().mean()  # noqa: E731
    first, last = tune_codebooks(model, [x], loss, epochs=40)
    assert last < first
    changed = {name for name, tensor in model.state_dict().items() if not torch.equal(tensor, before[name])}
    assert changed == {f"{i}.weight_{name}" for i in (0, 2) for name in ("codebooks", "scales")}
    assert all(tensor.dtype == before[name].dtype for name, tensor in model.state_dict().items())
    assert model[1].weight.requires_grad and not model[0].weight_codebooks.requires_grad
    assert "forward" not in vars(model[0])
    # the layers compute with what was trained, and nothing of it is remembered
    with torch.no_grad():
        assert float(loss(model, x)) == pytest.approx(last, rel=1e-3)


def test_what_does_not_help_is_taken_back():
    model = freeze(quantize(nn.Sequential(nn.Linear(16, 8)), "aqlm-1x3"))
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    x, wanted = torch.randn(50, 16), None
    wanted = model(x).detach()
    loss = lambda module, batch: (module(batch) - wanted).square().mean()  # noqa: E731
    first, last = tune_codebooks(model, [x], loss, rate=10.0)
    assert last == first
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())


def test_an_error_leaves_the_model_as_it_was():
    model = freeze(quantize(nn.Sequential(nn.Linear(16, 8), nn.LayerNorm(8)), "aqlm-1x3"))
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}

    def fails(module, batch):
        if torch.is_grad_enabled():
            raise RuntimeError("no")
        return module(batch).sum()

    with pytest.raises(RuntimeError, match="no"):
        tune_codebooks(model, [torch.randn(2, 16)], fails)
    assert "forward" not in vars(model[0]) and model[1].weight.requires_grad
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())


def test_a_forward_that_another_library_put_there_comes_back():
    model = freeze(quantize(nn.Sequential(nn.Linear(32, 16)), "aqlm-1x3"))
    hooked = model[0].forward
    model[0].forward = lambda *args: hooked(*args)
    there, x = model[0].__dict__["forward"], torch.randn(20, 32)
    tune_codebooks(model, [x], lambda module, batch: module(batch).square().mean(), epochs=1)
    assert model[0].__dict__["forward"] is there


def test_mistakes_are_named():
    with pytest.raises(ValueError, match="no frozen AQLM layer"):
        tune_codebooks(nn.Linear(8, 8), [1], lambda m, b: None)
    model = freeze(quantize(nn.Sequential(nn.Linear(16, 8)), "aqlm-1x3"))
    with pytest.raises(ValueError, match="no batch"):
        tune_codebooks(model, [], lambda m, b: None)
