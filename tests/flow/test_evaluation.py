"""Perplexity and divergence of language models."""

import math
from types import SimpleNamespace

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from quanto_hf.flow import evaluate, windows

VOCABULARY = 11


class Bigram(nn.Module):
    """Predicts from the last token only."""

    def __init__(self, table):
        super().__init__()
        self.table = nn.Parameter(table)

    def forward(self, input_ids):
        return SimpleNamespace(logits=self.table[input_ids])


@pytest.fixture
def inputs():
    return torch.randint(0, VOCABULARY, (5, 7))


class Dropping(Bigram):
    """Forgets half of what it knows while it is trained, and counts how often."""

    def __init__(self, table):
        super().__init__(table)
        self.drop = nn.Dropout(0.5)
        self.register_buffer("runs", torch.zeros(()))

    def forward(self, input_ids):
        self.runs += self.drop.training
        return SimpleNamespace(logits=self.drop(self.table)[input_ids])


def test_models_are_measured_in_evaluation_mode_and_are_as_they_were_afterwards(inputs):
    table = torch.randn(VOCABULARY, VOCABULARY)
    model, reference = Dropping(table), Dropping(table * 0.5)
    wanted = evaluate(Bigram(table), inputs, Bigram(table * 0.5))
    assert evaluate(model, inputs, reference) == wanted
    assert model.training and model.drop.training and reference.training and not model.runs and not reference.runs
    # each module on its own: a part may have been frozen
    model.drop.eval()
    evaluate(model, inputs)
    assert model.training and not model.drop.training


def test_windows_do_not_overlap_and_drop_a_shorter_rest():
    assert windows(range(11), 4).tolist() == [[0, 1, 2, 3], [4, 5, 6, 7]]


def test_a_text_shorter_than_one_window_is_refused():
    with pytest.raises(ValueError, match="the text has 3 tokens, but one window takes 4"):
        windows([1, 2, 3], 4)


def test_a_model_that_knows_nothing_has_the_perplexity_of_its_vocabulary(inputs):
    result = evaluate(Bigram(torch.zeros(VOCABULARY, VOCABULARY)), inputs)
    assert result.perplexity == pytest.approx(VOCABULARY)
    assert result.kl is None and result.tokens == 5 * 6


def test_the_perplexity_is_that_of_the_cross_entropy(inputs):
    table = torch.randn(VOCABULARY, VOCABULARY)
    loss = F.cross_entropy(table[inputs[:, :-1]].flatten(0, 1), inputs[:, 1:].flatten())
    assert evaluate(Bigram(table), inputs).perplexity == pytest.approx(math.exp(loss.item()), rel=1e-5)


def test_the_divergence_of_a_model_from_itself_is_zero(inputs):
    model = Bigram(torch.randn(VOCABULARY, VOCABULARY))
    assert evaluate(model, inputs, reference=model).kl == 0


def test_the_divergence_is_that_of_the_reference_to_the_model(inputs):
    wanted, made = torch.randn(2, VOCABULARY, VOCABULARY)
    divergence = F.kl_div(made.log_softmax(-1), wanted.log_softmax(-1), log_target=True, reduction="none").sum(-1)
    expected = divergence[inputs[:, :-1]].mean()
    assert evaluate(Bigram(made), inputs, Bigram(wanted)).kl == pytest.approx(float(expected), rel=1e-5)


@pytest.mark.parametrize("batch_size", [1, 2, 5, 100])
def test_the_batch_size_does_not_change_the_result(inputs, batch_size):
    model, other = Bigram(torch.randn(VOCABULARY, VOCABULARY)), Bigram(torch.randn(VOCABULARY, VOCABULARY))
    whole, parts = evaluate(model, inputs, other, 5), evaluate(model, inputs, other, batch_size)
    assert parts.perplexity == pytest.approx(whole.perplexity, rel=1e-6)
    assert parts.kl == pytest.approx(whole.kl, rel=1e-6)


def test_progress_is_told_after_each_batch(inputs):
    done = []
    evaluate(Bigram(torch.zeros(VOCABULARY, VOCABULARY)), inputs, batch_size=2, progress=done.append)
    assert done == [2, 4, 5]
