"""A quantized model is saved whole or not at all: whenever it is interrupted, what was in the folder is not lost."""

import gc
import json
import shutil
import threading
import weakref

import pytest
import torch
import transformers
from offload_processes import context, load, logits, save_and_die
from safetensors.torch import load_file, save_file
from tiny_models import build
from transformers import LlamaForCausalLM

import quanto_hf
from quanto_hf import AqlmConfig, CheckpointError
from quanto_hf.io import finish_save, read_headers
from quanto_hf.io.whole_save import LOCK, WORK

PROCESSES = context()


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """Two models with tensors of the same names and shapes, saved quantized in several files, and one in one file."""
    made = tmp_path_factory.mktemp("saving")
    for name, factor in (("former", 1.0), ("new", 1.5)):
        model = build("llama").to(torch.bfloat16)
        with torch.no_grad():
            for layer in model.model.layers:
                layer.mlp.down_proj.weight.mul_(factor)
        model.save_pretrained(made / f"{name}-float")
        quantized = load(made / f"{name}-float")
        quantized.save_pretrained(made / name, max_shard_size="30KB")
        quantized.save_pretrained(made / f"{name}-alone")
    return made


def answers(folder):
    return logits(load(folder, weights=None))


def visible(folder):
    return sorted(path.name for path in folder.iterdir())


# what is in the folder, the size of the new files, and the first step at which the process is killed
CASES = {
    "the-same-files": ("former", "30KB", 1),
    "one-file": ("former", "1GB", 2),
    "files": ("former-alone", "30KB", 3),
}


@pytest.mark.parametrize("case", CASES)
def test_wherever_a_save_over_another_model_is_killed_one_of_the_two_is_there(case, place, tmp_path):
    what, size, step = CASES[case]
    former, new = answers(place / "former"), answers(place / "new")
    assert not torch.equal(former, new)
    seen, ended = [], False
    while not ended:
        out = tmp_path / f"out{step}"
        shutil.copytree(place / what, out)
        process = PROCESSES.Process(target=save_and_die, args=(place / "new", out, size, step))
        process.start()
        process.join(60)
        assert process.exitcode in (-9, 0)
        ended = process.exitcode == 0
        try:
            found = answers(out)
        except CheckpointError as error:
            assert "Nothing is lost" in str(error) and "finish_save" in str(error)
            seen.append("refused")
            if seen.count("refused") % 2:
                assert finish_save(out) and not finish_save(out)
                assert torch.equal(answers(out), new)
        else:
            assert torch.equal(found, former) or torch.equal(found, new)
            seen.append("former" if torch.equal(found, former) else "new")
        # whatever was left, the next save makes it right
        load(place / "new", weights=None).save_pretrained(out, max_shard_size=size)
        assert torch.equal(answers(out), new)
        assert not [name for name in visible(out) if name.startswith(".")]
        step += 3
    # first the former model, then a few steps in which files of both are there, then the new one
    assert seen == sorted(seen, key=["former", "refused", "new"].index)
    assert {*seen} == {"former", "refused", "new"}


def contents(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir() if path.name != LOCK}


def test_a_save_that_fails_leaves_the_former_model_and_nothing_else(place, tmp_path, monkeypatch):
    out = tmp_path / "out"
    shutil.copytree(place / "former", out)
    before, model = contents(out), load(place / "new", weights=None)
    import transformers.modeling_utils as modeling

    saved = modeling.safe_save_file

    def full(tensors, filename, metadata):
        if "00003" in filename:
            raise OSError(28, "No space left on device")
        saved(tensors, filename, metadata=metadata)

    with monkeypatch.context() as patch:
        patch.setattr(modeling, "safe_save_file", full)
        with pytest.raises(OSError, match="No space left"):
            model.save_pretrained(out, max_shard_size="20KB")
    assert contents(out) == before
    model.save_pretrained(out)
    assert torch.equal(answers(out), answers(place / "new"))


def test_one_file_is_not_loaded_in_place_of_several_new_ones(place, tmp_path):
    shutil.copytree(place / "former-alone", tmp_path / "out")
    (tmp_path / "out" / "tokenizer.json").write_text("{}")
    (tmp_path / "out" / "adapter_model.safetensors").write_text("another's")
    load(place / "new", weights=None).save_pretrained(tmp_path / "out", max_shard_size="30KB")
    assert not (tmp_path / "out" / "model.safetensors").exists()
    assert {"tokenizer.json", "adapter_model.safetensors"} < set(visible(tmp_path / "out"))
    assert torch.equal(answers(tmp_path / "out"), answers(place / "new"))


def test_the_variant_of_a_model_is_saved_beside_it(place, tmp_path):
    shutil.copytree(place / "former-alone", tmp_path / "out")
    load(place / "new", weights=None).save_pretrained(tmp_path / "out", variant="new")
    assert {"model.safetensors", "model.new.safetensors"} < set(visible(tmp_path / "out"))
    assert torch.equal(answers(tmp_path / "out"), answers(place / "former"))
    assert torch.equal(logits(load(tmp_path / "out", weights=None, variant="new")), answers(place / "new"))


def test_what_a_killed_save_has_left_goes_with_the_next_one(place, tmp_path):
    shutil.copytree(place / "former", tmp_path / "out")
    (tmp_path / "out" / f"{WORK}abc" / "files").mkdir(parents=True)
    (tmp_path / "out" / f"{WORK}abc" / "files" / "model.safetensors").write_bytes(b"half of it")
    assert torch.equal(answers(tmp_path / "out"), answers(place / "former")) and not finish_save(tmp_path / "out")
    load(place / "new", weights=None).save_pretrained(tmp_path / "out")
    assert not [name for name in visible(tmp_path / "out") if name.startswith(".")]


@pytest.mark.parametrize("name", [f"{WORK}abc", "../else", "", 5, None], ids=repr)
def test_an_interrupted_save_whose_files_are_gone_is_said(name, place, tmp_path):
    shutil.copytree(place / "former", tmp_path / "out")
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    config["quantization_config"] = {"quant_method": "quanto_hf", "interrupted_save": name}
    (tmp_path / "out" / "config.json").write_text(json.dumps(config))
    before = contents(tmp_path / "out")
    with pytest.raises(CheckpointError, match=r"is gone; remove .*config\.json"):
        finish_save(tmp_path / "out")
    with pytest.raises(CheckpointError, match="holds files of two models"):
        load(tmp_path / "out", weights=None)
    with pytest.raises(CheckpointError, match="is gone"):
        load(place / "new", weights=None).save_pretrained(tmp_path / "out")
    assert contents(tmp_path / "out") == before


def test_two_that_save_into_one_folder_wait_for_each_other(place, tmp_path):
    models = [load(place / name, weights=None) for name in ("former", "new")]
    right = [logits(model) for model in models]
    threads = [threading.Thread(target=m.save_pretrained, args=(tmp_path / "out",)) for m in models for _ in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert any(torch.equal(answers(tmp_path / "out"), one) for one in right)
    assert not [name for name in visible(tmp_path / "out") if name.startswith(".")]


def test_models_that_are_not_quantized_are_saved_by_transformers(place, tmp_path, monkeypatch):
    load(place / "former", weights=None)  # from here on the class has the other method
    monkeypatch.setattr("quanto_hf.hf.save.saving.save_whole", lambda *args: 1 / 0)
    LlamaForCausalLM.from_pretrained(place / "former-float").save_pretrained(tmp_path)
    model = load(place / "former", weights=None)
    with pytest.raises(ZeroDivisionError):
        model.save_pretrained(tmp_path)
    model.save_pretrained(tmp_path / "other", is_main_process=False)
    model.dequantize()
    model.save_pretrained(tmp_path)
    assert "quantization_config" not in json.loads((tmp_path / "config.json").read_text())


def test_the_method_keeps_no_model_in_memory_and_is_wrapped_once(place, tmp_path):
    model = load(place / "former", weights=None)
    method = LlamaForCausalLM.save_pretrained
    gone = weakref.ref(model)
    gc.disable()
    try:
        del model
        assert gone() is None
    finally:
        gc.enable()
    assert load(place / "new", weights=None).save_pretrained(tmp_path) is None
    assert LlamaForCausalLM.save_pretrained is method and method.__doc__ == method.__wrapped__.__doc__


def test_saving_to_a_file_is_refused_as_by_transformers(place, tmp_path):
    (tmp_path / "file").write_text("mine")
    load(place / "former", weights=None).save_pretrained(tmp_path / "file")
    assert (tmp_path / "file").read_text() == "mine"


def test_the_folder_that_is_uploaded_is_named_as_the_one_that_is_given(place, tmp_path, monkeypatch):
    seen = {}

    def save(model, folder, *args, **kwargs):
        seen.update(kwargs, folder=folder)

    class Model(LlamaForCausalLM):
        save_pretrained = save

    model = Model.from_pretrained(place / "former")
    model.save_pretrained(tmp_path / "my-model", push_to_hub=True, private=True)
    assert seen["repo_id"] == "my-model" and seen["private"] and seen["folder"] != tmp_path / "my-model"


@pytest.fixture(scope="module")
def aqlm(place, tmp_path_factory):
    """Two models in the published AQLM format, and the folder of the first."""
    config = AqlmConfig(num_codebooks=1, nbits_per_codebook=2)
    models = [
        LlamaForCausalLM.from_pretrained(place / f"{n}-float", quantization_config=config) for n in ("former", "new")
    ]
    folder = tmp_path_factory.mktemp("aqlm")
    models[0].save_pretrained(folder, max_shard_size="30KB")
    return models, folder


def load_aqlm(folder):
    return LlamaForCausalLM.from_pretrained(
        folder, quantization_config=AqlmConfig(num_codebooks=1, nbits_per_codebook=2)
    )


def test_a_model_in_the_aqlm_format_is_saved_whole_too(aqlm, tmp_path, monkeypatch):
    (former, new), folder = aqlm
    out = tmp_path / "out"
    shutil.copytree(folder, out)
    before = contents(out)
    import transformers.modeling_utils as modeling

    saved = modeling.safe_save_file

    def full(tensors, filename, metadata):
        if "00002" in filename:
            raise OSError(28, "No space left on device")
        saved(tensors, filename, metadata=metadata)

    with monkeypatch.context() as patch:
        patch.setattr(modeling, "safe_save_file", full)
        with pytest.raises(OSError, match="No space left"):
            new.save_pretrained(out, max_shard_size="30KB")
    assert contents(out) == before
    new.save_pretrained(out, max_shard_size="30KB")
    assert torch.equal(logits(load_aqlm(out)), logits(new)) and not torch.equal(logits(new), logits(former))
    floats = [tensor for tensor in load_aqlm(out).state_dict().values() if tensor.is_floating_point()]
    assert all(tensor.data_ptr() % 64 == 0 for tensor in floats if tensor.nbytes % 64 == 0)
    # the published format is not ours: nothing is added to it
    assert all(spec.shape != (0,) for spec in read_headers(out.glob("*.safetensors")).values())


def test_an_aqlm_save_that_is_killed_while_files_are_renamed_is_refused_by_everybody(aqlm, tmp_path, monkeypatch):
    (_, new), folder = aqlm
    out = tmp_path / "out"
    shutil.copytree(folder, out)
    with monkeypatch.context() as patch:
        patch.setattr("quanto_hf.io.whole_save._put_in_place", lambda *args: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            new.save_pretrained(out, max_shard_size="30KB")
    with pytest.raises(CheckpointError, match="holds files of two models"):
        load_aqlm(out)
    with pytest.raises(TypeError, match="num_codebooks"):
        transformers.AqlmConfig.from_dict(json.loads((out / "config.json").read_text())["quantization_config"])
    assert finish_save(out) and torch.equal(logits(load_aqlm(out)), logits(new))


def test_the_index_and_every_file_have_a_guard_beside_each_packed_weight(place):
    weight_map = json.loads((place / "former" / "model.safetensors.index.json").read_text())["weight_map"]
    for file in set(weight_map.values()):
        headers = read_headers([place / "former" / file])
        assert {name for name, where in weight_map.items() if where == file} == set(headers)
        packed = [name.removesuffix("_packed") for name in headers if name.endswith("_packed")]
        assert [name for name in headers if headers[name].shape == (0,)] == packed
    assert len([name for name in weight_map if name.endswith("proj.weight")]) == 14


def test_a_file_that_something_else_has_written_gets_its_guards(place, tmp_path, monkeypatch):
    import transformers.modeling_utils as modeling

    model = load(place / "former", weights=None)
    with monkeypatch.context() as patch:
        patch.setattr(modeling, "safe_save_file", save_file)
        model.save_pretrained(tmp_path / "out", max_shard_size="30KB")
    assert read_headers((tmp_path / "out").glob("*.safetensors")) == read_headers(
        (place / "former").glob("*.safetensors")
    )
    assert torch.equal(answers(tmp_path / "out"), answers(place / "former"))


def test_a_state_dict_with_guards_is_loaded_into_quantized_layers_and_into_no_others(place):
    state = load_file(place / "former-alone" / "model.safetensors")
    model = load(place / "new", weights=None)
    model.load_state_dict(state)
    assert torch.equal(logits(model), answers(place / "former"))
    plain = LlamaForCausalLM.from_pretrained(place / "former-float")
    again = quanto_hf.requantize(plain, state, quanto_hf.quantization_map(model))
    assert torch.equal(logits(again), answers(place / "former"))
    with pytest.raises(RuntimeError, match="size mismatch"):
        LlamaForCausalLM.from_pretrained(place / "former-float").load_state_dict(state)
