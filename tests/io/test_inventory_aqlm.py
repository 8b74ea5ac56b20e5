"""What ``inspect`` reads of models with AQLM weights, in the published format and in our own."""

import pytest
import torch
import transformers as tf
from aqlm_models import Layout, write
from safetensors.torch import load_file, save_file
from tiny_models import save

from quanto_hf import CheckpointError, QuantoConfig
from quanto_hf.io.inventory import read_inventory


def test_b10_the_published_format_is_counted_with_codebooks_and_scales(tmp_path):
    write(tmp_path, Layout(2, 8))
    found = read_inventory(tmp_path)
    assert (found.method, found.format_version) == ("aqlm", None)
    row = next(row for row in found.rows if row.name == "model.layers.0.self_attn.q_proj.weight")
    assert (row.stored, row.parameters) == ("aqlm 2x8 g8", 64 * 64)
    assert row.bits == 2 * 8 / 8 + 2 * 256 * 8 * 16 / 64**2 + 16 / 64
    assert "at most 32.0" in found.notes[0]


def test_b10_our_format_is_counted_the_same(tmp_path):
    folder = save("llama", tmp_path / "float")
    model = tf.AutoModelForCausalLM.from_pretrained(folder, quantization_config=QuantoConfig("aqlm-1x2"))
    model.save_pretrained(tmp_path / "made")
    found = read_inventory(tmp_path / "made")
    assert found.format_version == 2 and found.total().nbytes == sum(t.nbytes for t in model.state_dict().values())
    assert sum(row.stored == "aqlm 1x2 g8" for row in found.rows) == 14


def test_b12_what_is_missing_or_wrong_is_named(tmp_path):
    write(tmp_path, Layout(2, 8))
    state = load_file(tmp_path / "model.safetensors")
    del state["model.layers.0.mlp.up_proj.scales"]
    state["model.layers.1.mlp.up_proj.codes"] = state["model.layers.1.mlp.up_proj.codes"].to(torch.int32)
    save_file(state, tmp_path / "model.safetensors")
    with pytest.raises(CheckpointError) as caught:
        read_inventory(tmp_path)
    assert "missing: model.layers.0.mlp.up_proj.scales" in str(caught.value)
    assert "wrong: model.layers.1.mlp.up_proj.codes is int32" in str(caught.value)
