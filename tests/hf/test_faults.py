"""Checkpoints that do not fit: every bad tensor is named in one error, and nothing is loaded."""

import json
import shutil
import warnings

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from tiny_models import TINY, output, qlinears, save, tokens

from quanto_hf import CheckpointError, QuantoConfig, QuantoHfQuantizer
from quanto_hf.hf import load_and_quantize_model

UP, DOWN = "model.layers.0.mlp.up_proj", "model.layers.1.mlp.down_proj"
INT4 = QuantoConfig("int4")


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """A float and a quantized checkpoint of the same model."""
    place = tmp_path_factory.mktemp("faults")
    save("llama", place / "float")
    load(place / "float", INT4).save_pretrained(place / "quantized")
    return place


def load(folder, config=None, cls=transformers.AutoModelForCausalLM):
    return cls.from_pretrained(folder, **({"quantization_config": config} if config else {}))


def broken(source, target, change):
    """A copy of a checkpoint whose tensors have been changed."""
    shutil.copytree(source, target)
    tensors = load_file(target / "model.safetensors")
    change(tensors)
    save_file(tensors, target / "model.safetensors", metadata={"format": "pt"})
    return target


def rewritten(source, target, change):
    """A copy of a checkpoint whose quantization config has been changed."""
    shutil.copytree(source, target)
    config = json.loads((target / "config.json").read_text())
    change(config["quantization_config"])
    (target / "config.json").write_text(json.dumps(config))
    return target


def drop(*names):
    return lambda tensors: [tensors.pop(name) for name in names]


QUANTIZED_FAULTS = {
    "missing-codes": (drop(f"{UP}.weight_packed"), f"missing: {UP}.weight_packed (uint8 [128, 32])"),
    "missing-scale": (drop(f"{DOWN}.weight_scale"), f"missing: {DOWN}.weight_scale (bfloat16 [64, 2])"),
    "missing-zero": (drop(f"{UP}.weight_zero"), f"missing: {UP}.weight_zero (bfloat16 [128, 1])"),
    "missing-norm": (drop("model.norm.weight"), "missing: model.norm.weight (float32 [64])"),
    "missing-embedding": (drop("model.embed_tokens.weight"), "missing: model.embed_tokens.weight"),
    "extra": (lambda t: t.update({f"{UP}.weight_shift": torch.ones(1)}), f"unexpected: {UP}.weight_shift"),
    "extra-elsewhere": (lambda t: t.update(other=torch.ones(1)), "unexpected: other"),
    "wrong-shape": (
        lambda t: t.update({f"{UP}.weight_packed": t[f"{UP}.weight_packed"][:, :-1].clone()}),
        f"wrong shape: {UP}.weight_packed is [128, 31], but the model needs [128, 32]",
    ),
    "wrong-group-size": (
        lambda t: t.update({f"{DOWN}.weight_scale": torch.ones(64, 4, dtype=torch.bfloat16)}),
        f"wrong shape: {DOWN}.weight_scale is [64, 4], but the model needs [64, 2]",
    ),
    "wrong-dtype": (
        lambda t: t.update({f"{UP}.weight_packed": t[f"{UP}.weight_packed"].to(torch.int8)}),
        f"wrong dtype: {UP}.weight_packed is int8, but the model needs uint8",
    ),
    "float-codes": (
        lambda t: t.update({f"{UP}.weight_packed": t[f"{UP}.weight_packed"].float()}),
        f"wrong dtype: {UP}.weight_packed is float32, but the model needs uint8",
    ),
    "integer-scale": (
        lambda t: t.update({f"{UP}.weight_scale": t[f"{UP}.weight_scale"].int()}),
        f"wrong dtype: {UP}.weight_scale is int32, but the model needs bfloat16",
    ),
}


@pytest.mark.parametrize("fault", QUANTIZED_FAULTS)
def test_a_bad_tensor_of_a_quantized_checkpoint_is_named(fault, folders, tmp_path):
    change, text = QUANTIZED_FAULTS[fault]
    with pytest.raises(CheckpointError) as error:
        load(broken(folders / "quantized", tmp_path / "broken", change))
    head, *lines = str(error.value).splitlines()
    assert head == "the checkpoint does not fit the model:"
    assert len(lines) == 1 and lines[0].startswith(f"  {text}")


def test_all_bad_tensors_are_named_in_one_error(folders, tmp_path):
    faults = [
        QUANTIZED_FAULTS[name] for name in ("missing-norm", "missing-scale", "extra", "wrong-shape", "wrong-dtype")
    ]

    def change(tensors):
        for fault, _ in faults[:-1]:
            fault(tensors)
        name = DOWN + ".weight_packed"
        tensors[name] = tensors[name].to(torch.int8)

    with pytest.raises(CheckpointError) as error:
        load(broken(folders / "quantized", tmp_path / "broken", change))
    for text in (*(text for _, text in faults[:-1]), f"wrong dtype: {DOWN}.weight_packed is int8"):
        assert text in str(error.value)
    assert len(str(error.value).splitlines()) == 1 + len(faults)


@pytest.mark.parametrize("config", [INT4, QuantoConfig("int8")], ids=["int4", "int8"])
def test_a_missing_weight_of_a_float_checkpoint_is_named(config, folders, tmp_path):
    folder = broken(folders / "float", tmp_path / "broken", drop(f"{UP}.weight", f"{DOWN}.weight"))
    with pytest.raises(CheckpointError) as error:
        load(folder, config)
    assert str(error.value).splitlines()[1:] == [
        f"  missing: {UP}.weight (float32 [128, 64])",
        f"  missing: {DOWN}.weight (float32 [64, 128])",
    ]


def test_a_weight_of_the_wrong_shape_in_a_float_checkpoint_is_named(folders, tmp_path):
    folder = broken(folders / "float", tmp_path / "broken", lambda t: t.update({f"{UP}.weight": torch.ones(128, 65)}))
    with pytest.raises(CheckpointError, match=rf"wrong shape: {UP}\.weight is \[128, 65\], but the model needs"):
        load(folder, INT4)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float16, torch.bfloat16], ids=str)
def test_a_float_checkpoint_of_another_float_dtype_is_fine(dtype, folders, tmp_path):
    folder = broken(folders / "float", tmp_path / "other", lambda t: t.update({n: v.to(dtype) for n, v in t.items()}))
    model = transformers.AutoModelForCausalLM.from_pretrained(folder, quantization_config=INT4, dtype=torch.float32)
    assert len(qlinears(model)) == TINY["llama"].eligible and torch.isfinite(output(model, "llama")).all()


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_a_weight_that_is_not_finite_names_its_layer(bad, folders, tmp_path, caplog):
    def change(tensors):
        tensors[f"{UP}.weight"][3, 5] = bad

    folder = broken(folders / "float", tmp_path / "broken", change)
    # transformers collects the errors of conversions, logs them in its report, and raises without their text
    transformers.utils.logging.enable_propagation()
    try:
        with pytest.raises(RuntimeError):
            load(folder, INT4)
    finally:
        transformers.utils.logging.disable_propagation()
    assert f"{UP}.weight: the weight has NaN or infinite values" in caplog.text


@pytest.mark.parametrize("which", ["float", "quantized"])
def test_a_truncated_file_is_named(which, folders, tmp_path):
    shutil.copytree(folders / which, tmp_path / "broken")
    file = tmp_path / "broken" / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-1000])
    with pytest.raises(Exception, match=r"(?i)model\.safetensors cannot be read|incomplete metadata|file not fully"):
        load(tmp_path / "broken", INT4 if which == "float" else None)


def test_a_checkpoint_without_schemes_is_refused(folders, tmp_path):
    folder = rewritten(folders / "quantized", tmp_path / "broken", lambda config: config.pop("schemes"))
    with pytest.raises(ValueError, match="has no 'schemes': it was not written by save_pretrained"):
        load(folder)


def test_a_module_that_has_lost_its_entry_is_named(folders, tmp_path):
    def change(config):
        config["schemes"][0]["modules"].remove(UP)

    with pytest.raises(CheckpointError) as error:
        load(rewritten(folders / "quantized", tmp_path / "broken", change))
    assert str(error.value).splitlines()[1:] == [
        f"  missing: {UP}.weight (float32 [128, 64])",
        *(f"  unexpected: {UP}.weight_{part}" for part in ("packed", "scale", "zero")),
    ]


def test_an_entry_for_a_module_that_the_model_does_not_have_is_named(folders, tmp_path):
    def change(config):
        config["schemes"][0]["modules"].append("model.layers.7.mlp.up_proj")

    with pytest.raises(ValueError, match=r"model\.layers\.7\.mlp\.up_proj"):
        load(rewritten(folders / "quantized", tmp_path / "broken", change))


@pytest.mark.parametrize(
    ("key", "value", "text"),
    [
        ("format_version", 99, "install a newer quanto_hf"),
        ("colour", 1, "unknown keys in the quantization config: colour"),
        ("weights", "int3", "weights='int3'"),
        ("schemes", [{"scheme": {"kind": "magic"}, "modules": []}], "'magic' is not"),
    ],
    ids=["version", "key", "weights", "scheme"],
)
def test_a_quantization_config_that_cannot_be_read_is_refused(key, value, text, folders, tmp_path):
    with pytest.raises(ValueError, match=text):
        load(rewritten(folders / "quantized", tmp_path / "broken", lambda config: config.update({key: value})))


@pytest.mark.parametrize("name", ["llama", "llama-tied", "opt", "gpt-neox"])
def test_a_base_model_loads_what_a_language_model_saved_and_the_other_way_round(name, tmp_path):
    save(name, tmp_path / "float")
    whole = TINY[name].cls.from_pretrained(tmp_path / "float", quantization_config=INT4)
    whole.save_pretrained(tmp_path / "whole")
    with torch.no_grad():
        wanted = whole.base_model(tokens()).last_hidden_state
        base = transformers.AutoModel.from_pretrained(tmp_path / "whole")
        assert len(qlinears(base)) == len(qlinears(whole))
        assert torch.equal(base(tokens()).last_hidden_state, wanted)
        base.save_pretrained(tmp_path / "base")
        again = TINY[name].cls.from_pretrained(tmp_path / "base")
        assert len(qlinears(again)) == len(qlinears(whole))
        assert torch.equal(again.base_model(tokens()).last_hidden_state, wanted)


@pytest.mark.parametrize("start", ["float", "quantized"])
def test_a_new_classification_head_on_a_base_checkpoint_stays_float(start, folders, tmp_path):
    config = INT4 if start == "float" else None
    model = transformers.AutoModelForSequenceClassification.from_pretrained(
        folders / start, num_labels=3, **({"quantization_config": config} if config else {})
    )
    assert type(model.score) is torch.nn.Linear and model.score.weight.requires_grad
    assert len(qlinears(model)) == TINY["llama"].eligible
    model.config.pad_token_id = 0
    model.save_pretrained(tmp_path)
    with torch.no_grad():
        wanted = model(tokens()).logits
        reloaded = transformers.AutoModelForSequenceClassification.from_pretrained(tmp_path)
        assert torch.equal(reloaded(tokens()).logits, wanted)


def test_a_new_head_that_was_to_be_quantized_stays_float_with_a_warning(folders):
    with pytest.warns(UserWarning, match="score is not in the checkpoint: it is newly initialised and stays float"):
        model = transformers.AutoModelForSequenceClassification.from_pretrained(
            folders / "float", num_labels=3, quantization_config=QuantoConfig("int4", default_skips=False)
        )
    assert type(model.score) is torch.nn.Linear and torch.isfinite(model.score.weight).all()


def test_a_checkpoint_that_fits_loads_without_a_warning(folders):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        model = load_and_quantize_model(folders / "quantized")
    assert isinstance(model.hf_quantizer, QuantoHfQuantizer)
