"""QuantoConfig: what is allowed, what is said about what is not, and the way through JSON."""

import json

import pytest

from quanto_hf import QuantoConfig
from quanto_hf.fit import FITS
from quanto_hf.io import FORMAT_VERSION
from quanto_hf.qtypes import weight_names
from quanto_hf.schemes import GROUP_SIZES

BAD = {
    "weights": ("int3", ", ".join(weight_names())),
    "activations": ("int4", "choose None, int8, float8"),
    "modules_to_not_convert": ("lm_head", "give a list of names or patterns, or None"),
    "group_size": (48, ", ".join(map(str, (-1, *GROUP_SIZES)))),
    "symmetric": ("yes", "choose None, True or False"),
    "fit": ("best", ", ".join(sorted(FITS))),
    "overrides": (["fc1"], "give a dict of pattern -> values"),
    "default_skips": (None, "choose True or False"),
    "dequantize": ("no", "choose True or False"),
    "quant_method": ("gptq", "it is 'quanto_hf'"),
}


@pytest.mark.parametrize("name", BAD)
def test_a_bad_value_is_named_with_the_allowed_ones(name):
    value, allowed = BAD[name]
    with pytest.raises(ValueError) as error:
        QuantoConfig(**{name: value})
    assert f"{name}={value!r}" in str(error.value) and allowed in str(error.value)


def test_all_bad_values_are_named_at_once():
    with pytest.raises(ValueError) as error:
        QuantoConfig(**{name: value for name, (value, _) in BAD.items()})
    lines = str(error.value).splitlines()
    assert lines[0] == "this QuantoConfig cannot be used:" and len(lines) == 1 + len(BAD)
    assert all(any(f"{name}={value!r}" in line for line in lines) for name, (value, _) in BAD.items())


@pytest.mark.parametrize("name", ["weights", "activations", "group_size", "symmetric", "fit", "overrides"])
@pytest.mark.parametrize("value", [["int8"], {"a": "b"}, 1.5, object], ids=["list", "dict", "float", "class"])
def test_a_value_of_a_strange_type_is_refused_like_any_other(name, value):
    with pytest.raises(ValueError, match=name):
        QuantoConfig(**{name: value})


@pytest.mark.parametrize(
    ("kwargs", "text"),
    [
        ({"weights": "int8", "symmetric": False}, "int8 weights are symmetric"),
        ({"weights": "nf4", "symmetric": False}, "nf4 weights are symmetric"),
        ({"weights": "float8", "group_size": 64}, "group_size=64 does not work for float8_e4m3fn weights; choose -1"),
        (
            {"weights": "int4", "overrides": {"fc1": {"symmetric": False, "weights": "int8"}}},
            r"overrides\['fc1'\]: int8",
        ),
        ({"weights": "float8", "overrides": {"fc1": {"group_size": 64}}}, r"overrides\['fc1'\]: group_size=64"),
    ],
    ids=["int8", "nf4", "float8", "override-type", "override-group"],
)
def test_values_that_do_not_go_together_are_refused(kwargs, text):
    with pytest.raises(ValueError, match=text):
        QuantoConfig(**kwargs)


def test_each_override_is_checked_and_named():
    overrides = {"a": {"weights": "int3"}, "b": {"bits": 4}, "c": "int4", "d": {"group_size": 5, "fit": "best"}}
    with pytest.raises(ValueError) as error:
        QuantoConfig(overrides=overrides)
    for text in (
        "overrides['a']: weights='int3'; choose one of float8",
        "overrides['b']: 'bits' is not known; choose weights, group_size, symmetric, fit",
        "overrides['c']='int4'; give a dict",
        "overrides['d']: group_size=5",
        "overrides['d']: fit='best'",
    ):
        assert text in str(error.value)
    assert ", or None for float" in str(error.value)


@pytest.mark.parametrize("weights", weight_names())
def test_every_weight_type_is_taken_and_survives_json(weights):
    config = QuantoConfig(weights=weights)
    assert QuantoConfig.from_dict(json.loads(json.dumps(config.to_dict()))) == config


def test_a_config_with_everything_survives_json():
    config = QuantoConfig(
        weights="int4", activations="float8", modules_to_not_convert=["fc1"], group_size=32, symmetric=True, fit="hqq",
        overrides={"fc2": {"weights": None}, "fc3": {"weights": "int8"}}, default_skips=False, dequantize=True,
        schemes=[{"scheme": {"kind": "lookup", "qtype": "nf4", "group_size": 64, "symmetric": True}, "modules": []}],
    )  # fmt: skip
    assert QuantoConfig.from_dict(json.loads(json.dumps(config.to_dict()))) == config
    assert QuantoConfig.from_dict(json.loads(config.to_json_string(use_diff=False))) == config


def test_unknown_keys_are_refused_by_name():
    with pytest.raises(
        ValueError, match="unknown keys in the quantization config: bits, colour; known are activations"
    ):
        QuantoConfig.from_dict({"weights": "int8", "colour": 1, "bits": 4})


def test_a_newer_format_version_is_refused_before_its_unknown_keys_are_looked_at():
    with pytest.raises(ValueError, match=f"format_version={FORMAT_VERSION + 1} cannot be read.*install a newer"):
        QuantoConfig.from_dict({"format_version": FORMAT_VERSION + 1, "weights": "int1", "colour": 1})


def test_values_given_beside_a_dict_win_and_others_are_handed_back():
    config, unused = QuantoConfig.from_dict({"weights": "int8"}, return_unused_kwargs=True, weights="int4", other=1)
    assert config.weights == "int4" and unused == {"other": 1}


def test_values_given_beside_a_dict_are_checked_too():
    with pytest.raises(ValueError, match="weights='int3'"):
        QuantoConfig.from_dict({"weights": "int8"}, weights="int3")


def test_two_ways_to_write_the_same_do_not_conflict():
    one = QuantoConfig(weights="float8", activations="float8", modules_to_not_convert=["a", "b"])
    other = QuantoConfig(weights="float8_e4m3fn", activations="float8_e4m3fn", modules_to_not_convert=["b", "a"])
    assert one.conflicts(other) == [] and QuantoConfig().conflicts(QuantoConfig(modules_to_not_convert=[])) == []


def test_a_default_that_is_written_out_does_not_conflict():
    assert QuantoConfig("int4").conflicts(QuantoConfig("int4", group_size=64, symmetric=False)) == []


@pytest.mark.parametrize(
    ("name", "value"),
    [("weights", "int4"), ("activations", "int8"), ("group_size", 32), ("modules_to_not_convert", ["a"]),
     ("overrides", {"a": {"weights": None}}), ("default_skips", False)],
)  # fmt: skip
def test_a_value_that_decides_what_is_stored_conflicts(name, value):
    assert name in QuantoConfig().conflicts(QuantoConfig(**{name: value}))
