"""The bundled language model: it writes, and its perplexity says how good each number type is."""

import pytest
import torch
import transformers
from tiny_models import qlinears

import quanto_hf
from quanto_hf import QuantoConfig
from quanto_hf.flow import evaluate, windows

# How much the perplexity may rise over that of the float model.
RISE = {"int8": 0.003, "float8": 0.01, "int4": 0.03, "nf4": 0.04, "fp4": 0.04, "int2": 0.25}


def load(weights=None):
    config = {} if weights is None else {"quantization_config": QuantoConfig(weights=weights)}
    return transformers.AutoModelForCausalLM.from_pretrained(quanto_hf.tiny_lm(), dtype=torch.float32, **config)


@pytest.fixture(scope="module")
def exact():
    return load()


@pytest.fixture(scope="module")
def tokenizer():
    return transformers.AutoTokenizer.from_pretrained(quanto_hf.tiny_lm())


class Remembering(torch.nn.Module):
    """A model that answers the same input once."""

    def __init__(self, model):
        super().__init__()
        self.model, self.known = model, {}

    def forward(self, input_ids, **how):
        key = input_ids.numpy().tobytes()
        if key not in self.known:
            self.known[key] = self.model(input_ids=input_ids, **how)
        return self.known[key]


@pytest.fixture(scope="module")
def results(exact, tokenizer):
    """Evaluation of the float model and of each number type, made once."""
    inputs = windows(tokenizer(quanto_hf.heldout_text())["input_ids"], 256)[:40]
    reference = Remembering(exact)
    made = {"float": evaluate(reference, inputs)}
    for weights in RISE:
        made[weights] = evaluate(load(weights), inputs, reference=reference)
    return made


def test_the_model_predicts_text_that_it_has_not_seen(results):
    # far below the perplexity of a model that only knows how frequent each token is
    assert results["float"].perplexity < 100


@pytest.mark.parametrize("weights", RISE)
def test_the_perplexity_stays_close_to_that_of_the_float_model(weights, results):
    rise = results[weights].perplexity / results["float"].perplexity - 1
    print(f"{weights}: perplexity {100 * rise:+.2f} %, KL {results[weights].kl:.5f}")
    assert rise < RISE[weights]


def test_more_bits_are_closer_to_the_float_model(results):
    assert 0 < results["int8"].kl < results["int4"].kl < results["int2"].kl
    assert results["int8"].kl < results["float8"].kl < min(results[four].kl for four in ("int4", "nf4", "fp4"))


@pytest.mark.parametrize("weights", [None, "int8", "int4"], ids=str)
def test_the_model_writes_a_line(weights, exact, tokenizer):
    model = exact if weights is None else load(weights)
    prompt = tokenizer(quanto_hf.heldout_text()[:200], return_tensors="pt")
    # as many new tokens as fit on a line, and none that ends the text
    made = model.generate(**prompt, max_new_tokens=20, min_new_tokens=20, do_sample=False)
    text = tokenizer.decode(made[0, prompt["input_ids"].shape[1] :], skip_special_tokens=True)
    assert len(text.split()) >= 5 and len(set(text.split())) >= 3


def test_every_linear_layer_of_the_blocks_is_quantized(exact):
    expected = sum(type(module) is torch.nn.Linear for module in exact.model.modules())
    assert len(qlinears(load("int4"))) == expected > 0


def test_the_held_out_text_fills_the_windows(tokenizer):
    assert len(tokenizer(quanto_hf.heldout_text())["input_ids"]) >= 40 * 256
