"""convert_checkpoint gives the tensors of from_pretrained and save_pretrained."""

import json
import os

import pytest
import torch
import transformers as tf
from safetensors.torch import load_file, save_file
from tiny_models import TINY, lively, llama_config, output, save

from quanto_hf import CheckpointError, QuantoConfig
from quanto_hf.hf.convert.convert import convert_checkpoint

RECORD = "quanto_hf_convert.json"


def tensors(folder) -> dict[str, dict[str, torch.Tensor]]:
    return {file.name: load_file(file) for file in sorted(folder.glob("*.safetensors"))}


def assert_same_folder(out, wanted):
    """Same files, same tensors in each, same bytes of everything else."""
    names = {name for name in os.listdir(out) if name != RECORD}
    assert names == set(os.listdir(wanted))
    made, right = tensors(out), tensors(wanted)
    for file in right:
        assert list(made[file]) == list(right[file])
        for name, tensor in right[file].items():
            assert made[file][name].dtype == tensor.dtype, name
            assert torch.equal(made[file][name], tensor), name
    for name in names - set(right):
        assert (out / name).read_bytes() == (wanted / name).read_bytes(), name


def usual(source, out, cls, config, size, **kwargs):
    model = cls.from_pretrained(source, quantization_config=config, **kwargs)
    model.save_pretrained(out, max_shard_size=size)


@pytest.mark.parametrize("name", list(TINY))
def test_equal_to_the_usual_way(name, tmp_path):
    source = save(name, tmp_path / "float", torch.bfloat16, max_shard_size="100KB")
    config = QuantoConfig(weights="int4", overrides={"*0*": {"weights": "int8"}})
    done = convert_checkpoint(source, tmp_path / "out", config, max_shard_size="40KB")
    usual(source, tmp_path / "usual", TINY[name].cls, config, "40KB")
    assert not done.not_streamed and done.written == len(tensors(tmp_path / "usual")) > 1
    assert_same_folder(tmp_path / "out", tmp_path / "usual")
    loaded = TINY[name].cls.from_pretrained(tmp_path / "out")
    assert torch.equal(output(loaded, name), output(TINY[name].cls.from_pretrained(tmp_path / "usual"), name))


@pytest.mark.parametrize(
    "values",
    [
        {"weights": "int2", "group_size": 32, "symmetric": True},
        {"weights": "float8", "activations": "int8"},
        {"weights": "nf4", "fit": "absmax", "modules_to_not_convert": ["mlp"]},
        {"weights": "int8", "default_skips": False},
    ],
    ids=str,
)
@pytest.mark.parametrize("dtype", ["float16", "auto"])
def test_settings(values, dtype, tmp_path):
    source = save("llama", tmp_path / "float")
    config = QuantoConfig(**values)
    convert_checkpoint(source, tmp_path / "out", config, dtype=dtype)
    usual(source, tmp_path / "usual", tf.LlamaForCausalLM, config, "2GB", dtype=dtype)
    assert_same_folder(tmp_path / "out", tmp_path / "usual")


@pytest.mark.parametrize("equal", [True, False])
def test_a_tied_model_that_was_saved_with_both_weights(equal, tmp_path):
    source = save("llama-tied", tmp_path / "float")
    file = source / "model.safetensors"
    held = load_file(file)
    held["lm_head.weight"] = held["model.embed_tokens.weight"] * (1 if equal else 2)
    save_file(held, file, {"format": "pt"})
    config = QuantoConfig(weights="int4")
    convert_checkpoint(source, tmp_path / "out", config)
    usual(source, tmp_path / "usual", tf.LlamaForCausalLM, config, "2GB")
    assert ("lm_head.weight" in load_file(tmp_path / "out" / "model.safetensors")) != equal
    assert_same_folder(tmp_path / "out", tmp_path / "usual")


def test_two_runs_give_the_same_bytes(tmp_path):
    source = save("llama", tmp_path / "float")
    for out in ("one", "two"):
        convert_checkpoint(source, tmp_path / out, QuantoConfig(weights="int4"), max_shard_size="40KB")
    for name in os.listdir(tmp_path / "one"):
        assert (tmp_path / "one" / name).read_bytes() == (tmp_path / "two" / name).read_bytes(), name


MIXTRAL = tf.MixtralConfig(
    vocab_size=96, hidden_size=64, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4,
    num_key_value_heads=2, num_local_experts=2, num_experts_per_tok=1,
)  # fmt: skip


@pytest.mark.parametrize("why", ["bin", "missing", "moe"])
def test_what_cannot_be_streamed_goes_the_usual_way_and_says_so(why, tmp_path):
    source, cls = tmp_path / "float", tf.LlamaForCausalLM
    if why == "moe":
        cls = tf.MixtralForCausalLM
        lively(cls(MIXTRAL)).save_pretrained(source)
    else:
        save("llama", source)
        held = load_file(source / "model.safetensors")
        if why == "bin":
            torch.save(held, source / "pytorch_model.bin")
            (source / "model.safetensors").unlink()
        else:
            del held["model.norm.weight"]
            save_file(held, source / "model.safetensors", {"format": "pt"})
    said = {"bin": "safetensors", "missing": "lacks model.norm.weight", "moe": "split on saving"}[why]
    # experts that stay float are saved one by one
    config = QuantoConfig(weights="int4", modules_to_not_convert=["experts"] if why == "moe" else None)
    done = convert_checkpoint(source, tmp_path / "out", config, max_shard_size="40KB")
    assert said in done.not_streamed and done.written > 1
    again = convert_checkpoint(source, tmp_path / "out", config, max_shard_size="40KB")
    assert (again.written, again.kept) == (0, done.written)
    if why != "missing":
        usual(source, tmp_path / "usual", cls, config, "40KB")
        assert_same_folder(tmp_path / "out", tmp_path / "usual")


@pytest.mark.parametrize("weights", ["int4", "int8"])
def test_experts_that_are_merged_on_loading_are_streamed(weights, tmp_path):
    cls, config = tf.MixtralForCausalLM, QuantoConfig(weights)
    lively(cls(MIXTRAL)).save_pretrained(tmp_path / "float")
    assert any(".experts.1." in name for name in load_file(tmp_path / "float" / "model.safetensors"))
    done = convert_checkpoint(tmp_path / "float", tmp_path / "out", config, max_shard_size="40KB")
    assert not done.not_streamed and done.written > 1
    usual(tmp_path / "float", tmp_path / "usual", cls, config, "40KB")
    assert_same_folder(tmp_path / "out", tmp_path / "usual")


class Stopped(BaseException):
    """The process ends here."""


def stop_after(count):
    def progress(done, total):
        if done >= count:
            raise Stopped

    return progress


def test_an_interrupted_output_does_not_load_and_is_resumed_to_the_same_bytes(tmp_path):
    source = save("llama", tmp_path / "float")
    convert_checkpoint(source, tmp_path / "whole", max_shard_size="40KB")
    out = tmp_path / "out"
    for count in (1, 9, 20):
        with pytest.raises(Stopped):
            convert_checkpoint(source, out, max_shard_size="40KB", progress=stop_after(count))
        assert not (out / "config.json").exists()
        with pytest.raises((OSError, ValueError)):
            tf.AutoModelForCausalLM.from_pretrained(out)
    times = {file.name: file.stat().st_mtime_ns for file in out.glob("*.safetensors")}
    done = convert_checkpoint(source, out, max_shard_size="40KB")
    assert done.kept == len(times) > 0 and done.written > 0
    assert all((out / name).stat().st_mtime_ns == time for name, time in times.items())
    assert set(os.listdir(out)) == set(os.listdir(tmp_path / "whole"))
    for name in os.listdir(out):
        assert (out / name).read_bytes() == (tmp_path / "whole" / name).read_bytes(), name


def test_a_finished_file_that_was_damaged_is_written_again(tmp_path):
    source = save("llama", tmp_path / "float")
    first = convert_checkpoint(source, tmp_path / "out", max_shard_size="40KB")
    file = sorted((tmp_path / "out").glob("*.safetensors"))[0]
    good = file.read_bytes()
    file.write_bytes(good[:-1] + bytes([good[-1] ^ 1]))
    done = convert_checkpoint(source, tmp_path / "out", max_shard_size="40KB")
    assert (done.written, done.kept) == (1, first.written - 1)
    assert file.read_bytes() == good and (tmp_path / "out" / "config.json").exists()


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"config": QuantoConfig(weights="int4")}, "was begun with config="),
        ({"dtype": "float16"}, "was begun with dtype='torch.float32' \\(now 'torch.float16'\\)"),
        ({"max_shard_size": "1MB"}, "was begun with max_shard_size="),
    ],
    ids=["config", "dtype", "size"],
)
def test_another_setting_is_refused(change, said, tmp_path):
    source = save("llama", tmp_path / "float")
    convert_checkpoint(source, tmp_path / "out")
    before = {file.name: file.read_bytes() for file in (tmp_path / "out").iterdir()}
    with pytest.raises(CheckpointError, match=said):
        convert_checkpoint(source, tmp_path / "out", **change)
    assert {file.name: file.read_bytes() for file in (tmp_path / "out").iterdir()} == before


def test_another_model_of_the_same_shape_is_refused(tmp_path):
    source = save("llama", tmp_path / "float")
    convert_checkpoint(source, tmp_path / "out")
    model = tf.LlamaForCausalLM(llama_config())
    model.save_pretrained(tmp_path / "other")
    with pytest.raises(CheckpointError, match="was begun from another model"):
        convert_checkpoint(tmp_path / "other", tmp_path / "out")


def test_other_files_in_the_output_are_refused_before_anything_is_written(tmp_path):
    source = save("llama", tmp_path / "float")
    out = tmp_path / "out"
    out.mkdir()
    (out / "notes.txt").write_text("mine")
    with pytest.raises(CheckpointError, match=r"notes\.txt"):
        convert_checkpoint(source, out)
    assert os.listdir(out) == ["notes.txt"]
    with pytest.raises(CheckpointError, match="is the model itself"):
        convert_checkpoint(source, source)
    with pytest.raises(CheckpointError, match="is a file"):
        convert_checkpoint(source, out / "notes.txt")
    (out / "notes.txt").unlink()
    convert_checkpoint(source, out)
    (out / "notes.txt").write_text("mine")
    with pytest.raises(CheckpointError, match=r"notes\.txt"):
        convert_checkpoint(source, out)


def test_a_source_that_cannot_be(tmp_path):
    source = save("llama", tmp_path / "float")
    convert_checkpoint(source, tmp_path / "out")
    with pytest.raises(CheckpointError, match="is quantized already, with quanto_hf"):
        convert_checkpoint(tmp_path / "out", tmp_path / "more")
    with pytest.raises(CheckpointError, match=r"has no config\.json"):
        convert_checkpoint(tmp_path, tmp_path / "more")
    for flag in ({"qat": True}, {"activations": "int8", "static_activations": True}):
        with pytest.raises(ValueError, match=f"{list(flag)[-1]}=True .*leave it out"):
            convert_checkpoint(source, tmp_path / "more", QuantoConfig("int8", **flag))
    with pytest.raises(ValueError, match="dequantize=True"):
        convert_checkpoint(source, tmp_path / "more", QuantoConfig(dequantize=True))
    for size in ("much", "0GB", -1):
        with pytest.raises(ValueError, match="max_shard_size"):
            convert_checkpoint(source, tmp_path / "more", max_shard_size=size)
    config = json.loads((source / "config.json").read_text())
    (source / "config.json").write_text(json.dumps({**config, "hidden_size": 128}))
    with pytest.raises(ValueError, match="wrong shape"):
        convert_checkpoint(source, tmp_path / "more")
    assert not (tmp_path / "more").exists()


def test_infinite_weights_are_named_and_nothing_loads(tmp_path):
    source = save("llama", tmp_path / "float")
    held = load_file(source / "model.safetensors")
    held["model.layers.1.mlp.up_proj.weight"][3, 3] = float("inf")
    save_file(held, source / "model.safetensors", {"format": "pt"})
    with pytest.raises(ValueError, match=r"layers\.1\.mlp\.up_proj"):
        convert_checkpoint(source, tmp_path / "out")
    assert not (tmp_path / "out" / "config.json").exists()


def test_tokenizer_files_come_along(tmp_path):
    import quanto_hf

    convert_checkpoint(quanto_hf.tiny_lm(), tmp_path / "out")
    assert tf.AutoTokenizer.from_pretrained(tmp_path / "out")("Return the").input_ids
    assert (tmp_path / "out" / "generation_config.json").exists()
