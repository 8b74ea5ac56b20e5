"""What config.json says about each quantized module."""

import json

import pytest
from torch import nn

from quanto_hf import quantize
from quanto_hf.io import FORMAT_VERSION, check_version, describe_modules, read_modules

INT8 = {"kind": "affine", "qtype": "int8", "group_size": -1, "symmetric": True}


@pytest.mark.parametrize("version", [FORMAT_VERSION + 1, -1, 0.5, "0", None, True], ids=repr)
def test_a_format_version_that_cannot_be_read_is_refused(version):
    with pytest.raises(ValueError, match=f"this version of quanto_hf reads 0 to {FORMAT_VERSION}; install a newer"):
        check_version(version)


@pytest.mark.parametrize("version", range(FORMAT_VERSION + 1))
def test_this_and_every_older_format_version_can_be_read(version):
    assert check_version(version) is None


def test_modules_of_one_scheme_share_an_entry_and_come_back_through_json():
    model = nn.Sequential(*[nn.Linear(64, 64) for _ in range(4)])
    quantize(model, weights="int4", overrides={"1": {"weights": "int8"}, "3": {"group_size": 16}})
    entries = describe_modules(model)
    assert [entry["modules"] for entry in entries] == [["0", "2"], ["1"], ["3"]]
    schemes = read_modules(json.loads(json.dumps(entries)))
    assert schemes == {name: model[int(name)].scheme for name in "0213"}


def test_a_model_without_quantized_modules_has_no_entries():
    assert describe_modules(nn.Sequential(nn.Linear(2, 2))) == []


@pytest.mark.parametrize(
    ("entries", "text"),
    [
        ([{"scheme": INT8}], "has the keys 'scheme' and 'modules'"),
        ([{"scheme": INT8, "modules": ["a"], "more": 1}], "has the keys 'scheme' and 'modules'"),
        (["a"], "has the keys 'scheme' and 'modules'"),
        ([{"scheme": INT8, "modules": ["a", "a"]}], "names the module 'a' twice"),
        ([{"scheme": {**INT8, "kind": "magic"}, "modules": ["a"]}], "'magic' is not a kind of scheme"),
        ([{"scheme": {"qtype": "int8"}, "modules": ["a"]}], "None is not a kind of scheme"),
        ([{"scheme": {**INT8, "colour": 1}, "modules": ["a"]}], "cannot be read"),
        ([{"scheme": {**INT8, "qtype": "nf4"}, "modules": ["a"]}], "'nf4' is not a type of the affine scheme"),
        ([{"scheme": {**INT8, "group_size": 3}, "modules": ["a"]}], "group_size=3"),
        ([{"scheme": {**INT8, "group_size": "64"}, "modules": ["a"]}], "group_size='64'"),
        ([{"scheme": "int8", "modules": ["a"]}], "has the keys 'scheme' and 'modules'"),
        ([{"scheme": INT8, "modules": "abc"}], "has the keys 'scheme' and 'modules'"),
        ([{"scheme": INT8, "modules": [["a"]]}], "has the keys 'scheme' and 'modules'"),
        ([{"scheme": {**INT8, "kind": ["affine"]}, "modules": ["a"]}], "is not a kind of scheme"),
        ({"scheme": INT8, "modules": ["a"]}, "has the keys 'scheme' and 'modules'"),
    ],
    ids=lambda value: json.dumps(value)[:60] if not isinstance(value, str) else "",
)
def test_a_malformed_entry_is_refused_with_a_sentence(entries, text):
    with pytest.raises(ValueError, match=text):
        read_modules(entries)
