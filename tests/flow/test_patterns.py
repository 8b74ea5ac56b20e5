"""Module names are matched by whole segments or globs, and never by a part of a segment."""

import pytest

from quanto_hf.flow.patterns import first_match, matches, unmatched

NAMES = ["model.layers.0.mlp.fc1", "model.layers.0.mlp.fc10", "model.layers.11.mlp.down_proj", "lm_head"]


@pytest.mark.parametrize(
    ("name", "pattern"),
    [
        ("model.layers.0.mlp.fc1", "fc1"),
        ("model.layers.0.mlp.fc1", "mlp"),
        ("model.layers.0.mlp.fc1", "layers.0"),
        ("model.layers.0.mlp.fc1", "model.layers.0.mlp.fc1"),
        ("model.layers.0.mlp.fc1", "*.fc1"),
        ("model.layers.0.mlp.fc1", "layers.?.mlp"),
        ("model.layers.0.mlp.fc1", "layers.[0-3].*"),
        ("model.layers.0.mlp.fc1", "fc1.weight"),
        ("lm_head", "lm_head"),
        ("lm_head", "*"),
        ("block.experts.w1", "expert*"),
    ],
)
def test_a_pattern_matches_whole_segments_and_globs(name, pattern):
    assert matches(name, pattern)


@pytest.mark.parametrize(
    ("name", "pattern"),
    [
        ("model.layers.0.mlp.fc10", "fc1"),
        ("model.layers.0.mlp.gate_up_proj", "gate"),
        ("model.layers.0.mlp.gate_up_proj", "proj"),
        ("model.layers.11.mlp", "layers.1"),
        ("model.layers.1.mlp", "layers.11"),
        ("my_lm_head", "lm_head"),
        ("lm_head_2", "lm_head"),
        ("model.layers.0", "layers"[:-1]),
        ("modelXlayers", "model.layers"),
        ("model.layers.0.mlp", "layers.mlp"),
    ],
)
def test_a_pattern_does_not_match_a_part_of_a_segment(name, pattern):
    assert not matches(name, pattern)


def test_every_run_of_whole_segments_of_a_name_matches_it():
    segments = "model.decoder.layers.7.self_attn.q_proj".split(".")
    runs = [segments[i:j] for i in range(len(segments)) for j in range(i + 1, len(segments) + 1)]
    assert all(matches(".".join(segments), ".".join(run)) for run in runs)
    assert len(runs) == 21


def test_characters_of_regular_expressions_mean_themselves():
    assert matches("a+b.c", "a+b")
    assert not matches("aab", "a+b")


def test_first_match_is_the_first_of_the_patterns_in_their_order():
    assert first_match("model.layers.0.mlp.fc1", ["fc10", "mlp", "fc1"]) == "mlp"
    assert first_match("lm_head", ["fc1", "mlp"]) is None


def test_a_pattern_that_matches_nothing_gives_a_sentence_with_near_misses():
    sentences = unmatched(NAMES, ["fc1", "down_porj", "*.fc1"])
    assert sentences == ["the pattern 'down_porj' matches no module of this model; did you mean 'down_proj'?"]


def test_a_pattern_without_near_misses_gives_a_sentence_without_a_hint():
    assert unmatched(NAMES, ["zzzzzz"]) == ["the pattern 'zzzzzz' matches no module of this model"]
