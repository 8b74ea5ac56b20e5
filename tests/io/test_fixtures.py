"""Checkpoints of each format version, written once: every later version reads them to the same numbers."""

import json
import shutil

import pytest
import torch
from fixtures.make_format_v1 import FOLDER as V1
from fixtures.make_format_v1 import SCHEMES, digest, float_weights
from fixtures.make_format_v2 import FOLDER as V2
from fixtures.make_format_v2 import SCHEMES as SCHEMES_2
from safetensors.torch import load_file, save_file
from tiny_models import qlinears, relative
from transformers import AutoModelForCausalLM

from quanto_hf.io import FORMAT_VERSION

every_scheme = pytest.mark.parametrize("name", SCHEMES)
every_scheme_of_2 = pytest.mark.parametrize("name", SCHEMES_2)


def load(folder):
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)


def expected(name, fixtures=V1):
    return json.loads((fixtures / name / "expected.json").read_text(encoding="utf-8"))


@torch.no_grad()
def check(model, name, fixtures=V1):
    wanted = expected(name, fixtures)
    state = model.state_dict()
    held = {key: value for key, value in wanted["tensors"].items() if value != EMPTY}
    assert {key: digest(state[key]) for key in held} == held
    weights = float_weights(model)
    assert {key: digest(weight) for key, weight in weights.items()} == wanted["weights"]
    for key, layer in qlinears(model).items():
        assert relative(layer.weight, weights[key]) < 1e-6, f"{key} as this machine's kernels dequantize it"
    made = model(torch.tensor([wanted["prompt"]])).logits[0, -1]
    assert relative(made, torch.tensor(wanted["logits"])) < 1e-5


@every_scheme
def test_a_checkpoint_of_version_1_loads_to_the_numbers_it_was_written_with(name):
    check(load(V1 / name), name)


@every_scheme_of_2
def test_a_checkpoint_of_version_2_loads_to_the_numbers_it_was_written_with(name):
    check(load(V2 / name), name, V2)


@every_scheme_of_2
def test_version_2_is_version_1_with_a_guard_for_each_packed_weight(name, tmp_path):
    one, two = ({key: expected(name, folder)[key] for key in ("tensors", "weights")} for folder in (V1, V2))
    guards = {key.removesuffix("_packed"): EMPTY for key in one["tensors"] if key.endswith("_packed")}
    assert two == {**one, "tensors": {**one["tensors"], **guards}} and len(guards) == 7
    # and this is what a model of version 1 becomes when it is saved again, byte by byte
    load(V1 / name).save_pretrained(tmp_path)
    assert (tmp_path / "model.safetensors").read_bytes() == (V2 / name / "model.safetensors").read_bytes()


@every_scheme
def test_saving_it_again_writes_the_same_tensors(name, tmp_path):
    load(V1 / name).save_pretrained(tmp_path)
    written = load_file(tmp_path / "model.safetensors")
    found = {key: digest(tensor) for key, tensor in sorted(written.items()) if tensor.numel()}
    assert found == expected(name)["tensors"]


# of a tensor without bytes
EMPTY = digest(torch.empty(0))


def with_version(name, version, folder):
    shutil.copytree(V1 / name, folder)
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    assert config["quantization_config"]["format_version"] == 1
    config["quantization_config"]["format_version"] = version
    (folder / "config.json").write_text(json.dumps(config), encoding="utf-8")
    file = folder / "model.safetensors"
    save_file(load_file(file), file, {"format": "pt", "quanto_hf_format": str(version)})
    return folder


def test_version_0_has_the_same_bytes_and_is_saved_again_as_this_version(tmp_path):
    model = load(with_version("int4_g64_asym", 0, tmp_path / "old"))
    check(model, "int4_g64_asym")
    model.save_pretrained(tmp_path / "new")
    config = json.loads((tmp_path / "new" / "config.json").read_text(encoding="utf-8"))
    assert config["quantization_config"]["format_version"] == FORMAT_VERSION


def test_a_later_version_is_refused(tmp_path):
    folder = with_version("int8", FORMAT_VERSION + 1, tmp_path / "later")
    with pytest.raises(ValueError, match=f"format_version={FORMAT_VERSION + 1} cannot be read.*install a newer"):
        load(folder)


def test_the_widths_make_short_groups_short_blocks_and_bits_that_no_code_fills():
    tensors = load_file(V1 / "int2_g64_asym" / "model.safetensors")
    name = "model.layers.0.mlp.{}.weight_{}"
    assert tensors[name.format("down_proj", "packed")].shape == (27, 64 + 4)  # 270 = 256 + 14 codes
    assert tensors[name.format("down_proj", "scale")].shape == (27, 5)  # 4 groups of 64, one of 14
    last = tensors[name.format("up_proj", "packed")]
    assert last.shape == (270, 7)  # 27 codes: planes of 7, 7, 7 and 6
    assert (last[:, 6:] >> 6 == 0).all()


def test_the_files_stay_small():
    sizes = {name: sum(file.stat().st_size for file in (V1 / name).iterdir()) for name in SCHEMES}
    assert max(sizes.values()) < 40_000 and sum(sizes.values()) < 300_000
    assert {path.name for path in V1.iterdir()} == set(SCHEMES)
