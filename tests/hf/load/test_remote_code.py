"""Checkpoints with code of their own, and the arguments that say where a checkpoint is."""

import inspect
import json
import shutil

import pytest
import torch
import transformers
from huggingface_hub.utils import validate_repo_id
from tiny_models import output, qlinears, save

import quanto_hf
from quanto_hf import QuantoConfig, load_and_quantize_model, plan

CODE = """
from transformers import LlamaForCausalLM

class MineForCausalLM(LlamaForCausalLM):
    mine = True
"""


@pytest.fixture(scope="module")
def llama(tmp_path_factory):
    return save("llama", tmp_path_factory.mktemp("llama"))


def with_code(llama, folder, architecture="MineForCausalLM", weights=True, **auto_map):
    """A checkpoint whose class is in a file beside it."""
    shutil.copytree(llama, folder, dirs_exist_ok=True)
    config = json.loads((folder / "config.json").read_text())
    config["auto_map"] = auto_map or {"AutoModelForCausalLM": "modeling_mine.MineForCausalLM"}
    config["architectures"] = [architecture]
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "modeling_mine.py").write_text(CODE)
    if not weights:
        (folder / "model.safetensors").unlink()
    return folder


def test_the_class_of_the_checkpoint_s_own_code_is_loaded(llama, tmp_path):
    folder = with_code(llama, tmp_path / "own")
    model = load_and_quantize_model(folder, QuantoConfig("int8"), trust_remote_code=True)
    assert type(model).__name__ == "MineForCausalLM" and model.mine
    wanted = transformers.AutoModelForCausalLM.from_pretrained(
        folder, trust_remote_code=True, quantization_config=QuantoConfig("int8")
    )
    assert torch.equal(output(model, "llama"), output(wanted, "llama"))
    model.save_pretrained(tmp_path / "saved")
    again = load_and_quantize_model(tmp_path / "saved", trust_remote_code=True)
    assert again.mine and torch.equal(output(again, "llama"), output(model, "llama"))


def test_it_counts_more_than_a_class_of_transformers_with_the_same_name(llama, tmp_path):
    code = CODE.replace("MineForCausalLM(LlamaForCausalLM)", "LlamaForCausalLM(Base)")
    folder = with_code(llama, tmp_path, "LlamaForCausalLM", AutoModelForCausalLM="modeling_mine.LlamaForCausalLM")
    (folder / "modeling_mine.py").write_text(code.replace("import Llama", "import LlamaForCausalLM as Base, Llama"))
    assert load_and_quantize_model(folder, trust_remote_code=True).mine
    assert not hasattr(load_and_quantize_model(folder), "mine")


def test_a_single_class_is_taken_whatever_the_config_names(llama, tmp_path):
    assert load_and_quantize_model(with_code(llama, tmp_path, "Other"), trust_remote_code=True).mine


def test_without_leave_to_run_it_the_error_says_how_to_give_it(llama, tmp_path):
    with pytest.raises(ValueError, match=r"names Mine.*modeling_mine\.Mine.*; pass trust_remote_code=True"):
        load_and_quantize_model(with_code(llama, tmp_path))


@pytest.mark.parametrize("weights", [True, False], ids=["weights", "config alone"])
@pytest.mark.parametrize("auto_class", [None, transformers.AutoModelForCausalLM], ids=["named", "auto"])
def test_a_plan_is_that_of_the_class_in_the_checkpoint_s_own_code(auto_class, weights, llama, tmp_path):
    folder = with_code(llama, tmp_path, weights=weights)
    made = plan(folder, QuantoConfig("int4"), trust_remote_code=True, auto_class=auto_class)
    assert made.model == "MineForCausalLM"
    assert made.nbytes == plan(llama, QuantoConfig("int4")).nbytes


def test_a_plan_that_does_not_fit_tries_others_with_the_same_class(llama, tmp_path):
    made = plan(with_code(llama, tmp_path), QuantoConfig("int8"), "1KiB", trust_remote_code=True)
    assert set(made.others) == {"int4", "int2"}


def test_the_arguments_of_a_plan_are_those_of_from_pretrained():
    parameters = inspect.signature(plan).parameters
    assert {"cache_dir", "revision", "token", "local_files_only", "trust_remote_code", "subfolder"} < set(parameters)


def test_a_subfolder_is_planned_and_loaded(llama, tmp_path):
    shutil.copytree(llama, tmp_path / "part")
    config = QuantoConfig("int4")
    assert plan(tmp_path, config, subfolder="part").nbytes == plan(llama, config).nbytes
    model = load_and_quantize_model(tmp_path, config, subfolder="part")
    assert len(qlinears(model)) == 14
    with pytest.raises(ValueError, match="other is not a model: it has no config"):
        plan(tmp_path, config, subfolder="other")


def hub_cache(llama, cache, revision):
    """A cache of the hub as huggingface_hub lays it out, with one commit under the name of a revision."""
    validate_repo_id("team/model")
    commit = "0" * 39 + "1"
    root = cache / "models--team--model"
    shutil.copytree(llama, root / "snapshots" / commit)
    (root / "refs").mkdir()
    (root / "refs" / revision).write_text(commit)


def test_a_model_in_another_cache_under_another_revision_is_planned_offline(llama, tmp_path, monkeypatch):
    hub_cache(llama, tmp_path, "branch")
    where = {"cache_dir": tmp_path, "revision": "branch", "local_files_only": True}
    made = plan("team/model", QuantoConfig("int4"), **where)
    assert made.nbytes == plan(llama, QuantoConfig("int4")).nbytes
    model = load_and_quantize_model("team/model", QuantoConfig("int4"), **where)
    assert sum(t.numel() * t.element_size() for t in [*model.parameters(), *model.buffers()]) == made.nbytes
    for missing in ({"revision": "main"}, {"cache_dir": tmp_path / "none"}):
        with pytest.raises(ValueError, match="not in the cache of the hub, and local_files_only=True"):
            plan("team/model", **{**where, **missing})


def test_the_token_and_the_revision_reach_the_hub(monkeypatch):
    import huggingface_hub

    asked = []

    def offline(name, **given):
        raise FileNotFoundError

    def sizes(name, **given):
        asked.append((name, given))
        raise OSError("nobody answers")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", offline)
    monkeypatch.setattr(huggingface_hub, "get_safetensors_metadata", sizes)
    with pytest.raises(ValueError, match="nobody answers"):
        plan("team/model", revision="v2", token="mine")
    assert asked == [("team/model", {"revision": "v2", "token": "mine"})]
    assert quanto_hf.plan is plan
