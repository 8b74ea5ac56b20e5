"""One warning names what stays float though nobody asked for it, and what it says to write packs it."""

import ast
import re
import warnings

import pytest
import torch
import transformers as tf
from torch import nn

from quanto_hf import QuantoConfig, plan, report
from quanto_hf.hf.load import left_in_float

WIDE = {"hidden_size": 512, "num_hidden_layers": 1, "intermediate_size": 1024, "num_attention_heads": 4}


class Mixed(tf.PreTrainedModel):
    """Linear layers, convolutions, an embedding, a recurrent layer and one with a weight norm."""

    config_class = tf.PreTrainedConfig

    def __init__(self, config):
        super().__init__(config)
        size = getattr(config, "size", 512)
        self.embed = nn.Embedding(4 * size, size)
        self.linear = nn.Linear(size, 8 * size)
        self.first, self.block = nn.Conv1d(size, size, 3), nn.Sequential(nn.Conv1d(size, size, 5))
        self.recurrent, self.tiny = nn.LSTM(size, size), nn.Conv2d(3, 3, 1)
        self.normed = nn.utils.parametrizations.weight_norm(nn.Linear(size, size))
        self.post_init()


def told(make, tmp_path, **options):
    """The texts of the warnings of a load, and the model."""
    make.save_pretrained(tmp_path)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        model = type(make).from_pretrained(tmp_path, quantization_config=QuantoConfig("int8", **options))
    return [str(w.message) for w in caught if "quanto_hf" in str(w.message) or "stay in float" in str(w.message)], model


def test_every_kind_is_summed_up_with_what_packs_it_or_why_nothing_does(tmp_path, monkeypatch):
    monkeypatch.setattr(left_in_float, "LARGE_TABLE", 1 << 20)
    (text,), model = told(Mixed(tf.PreTrainedConfig()), tmp_path)
    head, *lines = text.split("\n  ")
    assert head == (
        f"{1 - report(model).packed.share:.0%} of the weights of Mixed stay in float: 22.0 MB in 7 parameters, "
        "the largest block.0.weight"
    )
    assert len(lines) == 4 and {lines[0].partition(",")[0], lines[1].partition(",")[0]} == {"LSTM", "Conv1d"}
    told_of = {line.partition(", ")[0]: line.partition(", ")[2] for line in lines}
    assert told_of["LSTM"].startswith("8.4 MB: LSTM gives all its weights to one function")
    assert told_of["Conv1d"].startswith("8.4 MB: QuantoConfig(overrides=")
    assert lines[2].startswith("embeddings and heads, 4.2 MB: ")
    assert lines[3] == "1.0 MB of other kinds: see quanto_hf.report(model)"


def test_the_overrides_that_it_names_pack_these_layers(tmp_path):
    (text,), _ = told(Mixed(tf.PreTrainedConfig()), tmp_path / "a")
    overrides = ast.literal_eval(re.search(r"Conv1d.*overrides=(\{.*\})\)", text)[1])
    (text,), model = told(Mixed(tf.PreTrainedConfig()), tmp_path / "b", overrides=overrides)
    assert "Conv1d" not in text
    rows = {row.name: row.stored for row in report(model).rows}
    assert rows["first.weight"] == rows["block.0.weight"] == "int8"


def test_what_was_asked_for_is_no_news(tmp_path):
    names = ["embed", "first", "block", "recurrent"]
    options = {"modules_to_not_convert": names, "overrides": {"normed": {"weights": None}}}
    texts, _ = told(Mixed(tf.PreTrainedConfig()), tmp_path, **options)
    assert texts == []


def llama(vocabulary):
    return tf.LlamaForCausalLM(tf.LlamaConfig(**WIDE, vocab_size=vocabulary, tie_word_embeddings=True))


def test_a_small_share_of_embeddings_is_left_to_the_report_and_a_large_one_is_told(tmp_path, monkeypatch):
    texts, _ = told(llama(8000), tmp_path / "default")
    assert texts == []
    monkeypatch.setattr(left_in_float, "LARGE_TABLE", 1 << 20)
    texts, _ = told(llama(512), tmp_path / "a")
    assert texts == []
    (text,), model = told(llama(8000), tmp_path / "b")
    # the tied head is counted once
    share = 1 - report(model).packed.share
    assert text.startswith(
        f"{share:.0%} of the weights of LlamaForCausalLM stay in float: 16.4 MB in 1 parameter model."
    )


def test_many_small_ones_count_together(tmp_path, monkeypatch):
    (text,), _ = told(Mixed(tf.PreTrainedConfig(size=32)), tmp_path / "a")
    assert "Conv1d" in text and "embeddings" not in text
    monkeypatch.setattr(left_in_float, "SHARE", 1.0)
    assert told(Mixed(tf.PreTrainedConfig(size=32)), tmp_path / "b")[0] == []


def test_report_and_plan_have_the_share_on_top(tmp_path):
    _, model = told(llama(512), tmp_path)
    found = report(model).packed
    packed = sum(row.numel for row in report(model).rows if row.stored == "int8")
    assert found == (packed, packed + 512 * 512) and str(report(model)).startswith(str(found))
    planned = plan(tmp_path, QuantoConfig("int8"))
    assert planned.report.packed == found and planned.to_dict()["packed"]["weights"] == packed
    assert str(found) in str(planned).splitlines()[0]


def test_reasons_of_kinds_that_nothing_packs(tmp_path):
    _, model = told(Mixed(tf.PreTrainedConfig(size=32)), tmp_path)
    reasons = {row.name: row.reason for row in report(model).rows}
    assert reasons["recurrent.weight_ih_l0"].startswith("LSTM gives all its weights")
    assert "remove_parametrizations" in reasons["normed.parametrizations.weight.original1"]
    assert reasons["first.weight"] == "Conv1d is quantized only where a pattern names it"
    with torch.device("meta"):
        assert report(nn.Linear(4, 4)).rows[0].reason == "it has not been quantized"


@pytest.mark.parametrize("name", ["MixtralTopKRouter", "SomeGate"])
def test_a_router_that_is_no_linear_layer_is_one(name):
    router = type(name, (nn.Module,), {})()
    router.weight = nn.Parameter(torch.zeros(4, 4))
    assert report(router).rows[0].reason.startswith("routers and gates stay float")
