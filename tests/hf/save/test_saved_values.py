"""A config.json whose values have another JSON type: a sentence that names the key, or the same numbers; and files
whose tensors have another dtype, or are not finite."""

import copy
import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from taken_over import taken_over
from torch import nn

import quanto_hf
from quanto_hf import AqlmConfig, CheckpointError, QuantoConfig
from quanto_hf.io.inventory import read_inventory

CONFIGS = {
    "int4": QuantoConfig(
        "int4",
        activations="int8",
        overrides={"*.down_proj": {"weights": "int8", "group_size": 32}},
        modules_to_not_convert=["q_proj"],
    ),
    "aqlm": QuantoConfig("aqlm-1x4"),
    "published": AqlmConfig(num_codebooks=1, nbits_per_codebook=4),
}
VALUES: list[Any] = [None, True, 0, 1, 10**30, 1.0, 1.5, "", "x", "64", [], ["x"], [None], {}, {"a": 1}]
TOKENS = torch.tensor([[1, 2, 3]])


@pytest.fixture(scope="module")
def folders(tmp_path_factory: Any) -> Path:
    """One checkpoint of each config."""
    place: Path = tmp_path_factory.mktemp("saved")
    torch.manual_seed(0)
    sizes = {"vocab_size": 40, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1}
    config = transformers.LlamaConfig(**sizes, num_attention_heads=2, num_key_value_heads=2, pad_token_id=0)
    transformers.LlamaForCausalLM(config).to(torch.bfloat16).save_pretrained(place / "float")
    for name, how in CONFIGS.items():
        made = transformers.AutoModelForCausalLM.from_pretrained(place / "float", quantization_config=how)
        made.save_pretrained(place / name)
    return place


@pytest.fixture(autouse=True)
def served() -> Iterator[None]:
    """quanto_hf serves "aqlm" for one test."""
    with taken_over("aqlm"):
        yield


def load(folder: Path, **options: Any) -> Any:
    return transformers.AutoModelForCausalLM.from_pretrained(folder, **options)


def logits(model: Any) -> torch.Tensor:
    with torch.no_grad():
        found: torch.Tensor = model(TOKENS).logits
    return found


def kind(value: Any) -> str:
    number = {bool: "true or false", int: "integer", float: "float"}
    return number.get(type(value), type(value).__name__)


def places(value: Any, at: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """The ways to all values in a nest."""
    if at:
        yield at
    items = value.items() if isinstance(value, dict) else list(enumerate(value))[:2] if isinstance(value, list) else ()
    for key, item in items:
        yield from places(item, (*at, key))


def other_types(config: dict[str, Any]) -> Iterator[tuple[tuple[Any, ...], dict[str, Any]]]:
    """The config with each value in turn replaced by one of each other JSON type."""
    for at in places(config):
        for new in VALUES:
            changed: Any = copy.deepcopy(config)
            holder = changed
            for key in at[:-1]:
                holder = holder[key]
            if kind(holder[at[-1]]) != kind(new):
                holder[at[-1]] = new
                yield at, changed


@pytest.mark.parametrize("name", CONFIGS)
def test_a_value_of_another_type_is_named_or_changes_nothing(name: str, folders: Path, tmp_path: Path):
    shutil.copytree(folders / name, tmp_path / "copy")
    folder, file = tmp_path / "copy", tmp_path / "copy" / "config.json"
    whole = json.loads(file.read_text())
    wanted, tried = logits(load(folder)), 0
    for at, changed in other_types(whole["quantization_config"]):
        if at == ("activations",) and changed["activations"] is None:
            continue  # a value that it may have: weights only
        file.write_text(json.dumps({**whole, "quantization_config": changed}))
        tried += 1
        for use in (lambda: torch.equal(logits(load(folder)), wanted), lambda: read_inventory(folder)):
            try:
                assert use(), f"{at} changed the numbers: {changed}"
            except ValueError as error:
                assert any(str(key) in str(error) for key in at if isinstance(key, str)), (at, str(error))
    assert tried > 50


@pytest.mark.parametrize("value", [True, 7, 1.5, "x", ["x"]])
def test_a_quantization_config_of_another_type_is_named(value: Any, folders: Path, tmp_path: Path):
    shutil.copytree(folders / "int4", tmp_path / "copy")
    file = tmp_path / "copy" / "config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), "quantization_config": value}))
    # transformers itself fails before it asks anybody
    with pytest.raises(CheckpointError, match="quantization_config"):
        read_inventory(tmp_path / "copy")
    with pytest.raises(CheckpointError, match="quantized already"):
        quanto_hf.convert_checkpoint(tmp_path / "copy", tmp_path / "out", QuantoConfig("int8"))


# ------------------------------------------------------------------------------------------------ dtypes and values


def changed_tensors(source: Path, target: Path, change: Any, pickled: bool = False) -> Path:
    shutil.copytree(source, target)
    state = load_file(target / "model.safetensors")
    change(state)
    if pickled:
        (target / "model.safetensors").unlink()
        torch.save(state, target / "pytorch_model.bin")
    else:
        save_file(state, target / "model.safetensors", metadata={"format": "pt"})
    return target


def to(dtype: torch.dtype, *ends: str, layer: str = "") -> Any:
    def change(state: dict[str, torch.Tensor]) -> None:
        names = [name for name in state if name.endswith(ends) and layer in name]
        assert names
        # the same bits under another name, as a changed header has them
        state.update({name: state[name].clone().view(dtype) for name in names})

    return change


V, UP = "model.layers.0.self_attn.v_proj", "model.layers.0.mlp.up_proj"
OTHER_DTYPES = {
    "scale": ("int4", to(torch.float16, "weight_scale", layer="v_proj"), [f"{V}.weight_scale is float16", "bfloat16"]),
    "zero": ("int4", to(torch.float16, "weight_zero", layer="up_proj"), [f"{UP}.weight_zero is float16", "bfloat16"]),
    "codes": ("int4", to(torch.int8, "weight_packed", layer="up_proj"), [f"{UP}.weight_packed is int8", "uint8"]),
    "codebooks": (
        "aqlm",
        to(torch.float16, "codebooks", layer="up_proj"),
        [f"{UP}.weight_codebooks is float16", f"{UP}.weight_scales is bfloat16"],
    ),
    "all scales": ("aqlm", to(torch.float16, "scales"), [f"{V}.weight_scales is float16", "bfloat16"]),
    "one layer": (
        "aqlm",
        to(torch.float16, "codebooks", "scales", layer="v_proj"),
        [f"{V}.weight_scales is float16", "those of other layers are bfloat16"],
    ),
    "aqlm codes": ("aqlm", to(torch.uint8, "codes", layer="v_proj"), [f"{V}.weight_codes is uint8", "int8"]),
    "published codebooks": ("published", to(torch.float16, "codebooks"), [f"{V}.codebooks is float16", "bfloat16"]),
    "published layer": (
        "published",
        to(torch.float16, "codebooks", "scales", layer="v_proj"),
        [f"{V}.codebooks is float16", "those of other layers are bfloat16"],
    ),
}


@pytest.mark.parametrize("way", ["files", "pickled", "disk", "another dtype"])
@pytest.mark.parametrize("fault", OTHER_DTYPES)
def test_a_tensor_of_another_dtype_is_named(fault: str, way: str, folders: Path, tmp_path: Path):
    name, change, texts = OTHER_DTYPES[fault]
    folder = changed_tensors(folders / name, tmp_path / "copy", change, pickled=way == "pickled")
    options: dict[str, Any] = {
        "disk": {"device_map": {"": "disk"}, "offload_folder": str(tmp_path / "off")},
        "another dtype": {"dtype": torch.float16},
    }.get(way, {})
    with pytest.raises(CheckpointError) as caught:
        load(folder, **options)
    assert all(text in str(caught.value) for text in texts), caught.value


@pytest.mark.parametrize("assign", [False, True])
@pytest.mark.parametrize("fault", [fault for fault, (name, *_) in OTHER_DTYPES.items() if name != "published"])
def test_a_state_dict_with_a_tensor_of_another_dtype_is_refused(fault: str, assign: bool, folders: Path):
    name, change, texts = OTHER_DTYPES[fault]
    model = load(folders / name)
    state = {key: tensor.clone() for key, tensor in model.state_dict().items()}
    change(state)
    with pytest.raises(RuntimeError, match="dtype mismatch for") as caught:
        model.load_state_dict(state, assign=assign)
    assert texts[0].split()[0] in str(caught.value)


def test_codebooks_keep_the_dtype_of_the_file_whatever_the_model_has(folders: Path, tmp_path: Path):
    state = load_file(folders / "aqlm" / "model.safetensors")
    for dtype in (torch.float32, torch.float16):
        made = load(folders / "aqlm", dtype=dtype)
        assert made.dtype is dtype
        for again in (made, _saved(made, tmp_path / str(dtype))):
            found = again.state_dict()
            stored = {name: tensor for name, tensor in state.items() if "_proj.weight_" in name}
            assert stored and all(torch.equal(found[n], t) and found[n].dtype is t.dtype for n, t in stored.items())


def _saved(model: nn.Module, folder: Path) -> Any:
    model.save_pretrained(folder)  # type: ignore[operator]
    return load(folder)


def spoil(end: str, value: float) -> Any:
    def change(state: dict[str, torch.Tensor]) -> None:
        name = next(name for name in sorted(state) if name.endswith(end))
        state[name].view(-1)[1] = value

    return change


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize(
    "name, end",
    [("int4", "_scale"), ("int4", "_zero"), ("aqlm", "_codebooks"), ("aqlm", "_scales"), ("published", "books")],
)
def test_a_scale_that_is_no_number_is_refused_when_it_is_loaded(
    name: str, end: str, value: float, folders: Path, tmp_path: Path
):
    folder = changed_tensors(folders / name, tmp_path / "copy", spoil(end, value))
    with pytest.raises(CheckpointError, match=rf"NaN or infinite values\n  model\.layers\.0\.\S*{end}$"):
        load(folder)
    with pytest.raises(CheckpointError, match="NaN or infinite values"):
        load(folder, device_map={"": "cpu"}, **({} if name == "published" else {"dtype": torch.float32}))


def test_scales_with_a_sum_that_overflows_are_fine(folders: Path, tmp_path: Path):
    huge = lambda state: state[f"{V}.weight_scale"].fill_(3e38)  # noqa: E731
    load(changed_tensors(folders / "int4", tmp_path / "copy", huge))
