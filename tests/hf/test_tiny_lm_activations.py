"""The bundled language model with rounded activations: how much its perplexity may rise.

Calibrated with docstrings of torch.nn, none of which is in the held-out text.
"""

import inspect

import pytest
import torch
import transformers

import quanto_hf
from quanto_hf import QuantoConfig
from quanto_hf.flow import evaluate, windows


def load(**config):
    kwargs = {"quantization_config": QuantoConfig(weights="int8", **config)} if config else {}
    return transformers.AutoModelForCausalLM.from_pretrained(quanto_hf.tiny_lm(), dtype=torch.float32, **kwargs)


@pytest.fixture(scope="module")
def tokenizer():
    return transformers.AutoTokenizer.from_pretrained(quanto_hf.tiny_lm())


@pytest.fixture(scope="module")
def inputs(tokenizer):
    return windows(tokenizer(quanto_hf.heldout_text(), verbose=False).input_ids, 256)[:24]


@pytest.fixture(scope="module")
def data(tokenizer):
    """16 windows to calibrate with."""
    layers = [cls for _, cls in sorted(vars(torch.nn).items()) if inspect.isclass(cls)]
    text = "\n\n".join(inspect.getdoc(cls) or "" for cls in layers)
    return windows(tokenizer(text, verbose=False).input_ids, 256)[:16]


@pytest.fixture(scope="module")
def exact(inputs):
    return evaluate(load(), inputs).perplexity


def rise(model, inputs, exact):
    found = evaluate(model, inputs).perplexity / exact - 1
    print(f"perplexity {100 * found:+.2f} %")
    return found


@pytest.mark.parametrize(("activations", "most"), [("int8", 0.01), ("float8", 0.005)])
def test_a_scale_per_token_costs_next_to_nothing(activations, most, inputs, exact):
    assert rise(load(activations=activations), inputs, exact) < most


def test_static_int8_with_smoothing_costs_less_than_two_percent(data, inputs, exact):
    model = load()
    assert len(quanto_hf.smooth(model, data)) == 6
    quanto_hf.quantize(model, "int8", activations="int8", static_activations=True)
    quanto_hf.calibrate(quanto_hf.freeze(model), list(data.split(8)), progress=False)
    assert rise(model, inputs, exact) < 0.02


def test_the_mse_observer_costs_less_than_one_percent_without_smoothing(data, inputs, exact):
    model = load(activations="int8", static_activations=True)
    quanto_hf.calibrate(model, list(data.split(8)), "mse", progress=False)
    assert rise(model, inputs, exact) < 0.01
