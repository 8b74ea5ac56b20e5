"""Finished layers in a folder: whole, unchanged and made from the same, or made again."""

import pytest
import torch

from quanto_hf.flow.layer_store import LayerStore, digest

TENSORS = {"codes": torch.arange(6, dtype=torch.int8).view(2, 3), "scales": torch.ones(2, 1)}


@pytest.fixture
def store(tmp_path):
    store = LayerStore(tmp_path / "new")
    store.write("a.b", "made of this", TENSORS)
    return store


def test_what_was_written_is_read(store):
    found = store.read("a.b", "made of this")
    assert all(torch.equal(found[name], tensor) for name, tensor in TENSORS.items())
    assert [path.name for path in store.folder.iterdir()] == [store.path("a.b").name]


def test_what_is_not_there_is_none_without_a_word(store, recwarn):
    assert store.read("a.c", "made of this") is None
    assert not recwarn.list


def test_another_identity_does_not_count(store):
    with pytest.warns(UserWarning, match="made from another weight"):
        assert store.read("a.b", "made of that") is None


@pytest.mark.parametrize("damage", ["flip", "cut", "empty", "folder"])
def test_damaged_files_do_not_count(store, damage):
    path = store.path("a.b")
    data = path.read_bytes()
    path.unlink()
    if damage == "folder":
        path.mkdir()
    else:
        last = data[:-1] + bytes([data[-1] ^ 1])
        path.write_bytes({"flip": last, "cut": data[:-3], "empty": b""}[damage])
    with pytest.warns(UserWarning, match="is made again"):
        assert store.read("a.b", "made of this") is None


def test_a_name_that_files_cannot_have_is_kept_apart(tmp_path):
    store = LayerStore(tmp_path)
    assert store.path("a/b") != store.path("a_b") and store.path("a/b").parent == tmp_path
    assert len(store.path("x" * 1000).name) < 200


def test_an_error_leaves_nothing_behind(store, monkeypatch):
    def fails(*args):
        raise OSError("full")

    monkeypatch.setattr("quanto_hf.io.safe_files.os.replace", fails)
    with pytest.raises(OSError, match="full"):
        store.write("c", "x", TENSORS)
    assert [path.name for path in store.folder.iterdir()] == [store.path("a.b").name]


def test_a_digest_knows_values_shapes_dtypes_and_settings():
    base = torch.zeros(2, 3)
    others = [digest([t], s) for t, s in [
        (base, 1), (base, 2), (base.view(3, 2), 1), (base.int(), 1), (base + 1, 1), (torch.zeros(0), 1),
    ]]  # fmt: skip
    assert len(set(others)) == len(others)
    assert digest([base.T.contiguous().T], 1) == others[0]
