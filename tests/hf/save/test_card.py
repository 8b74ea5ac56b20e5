"""The card of a model that is uploaded says what it is quantized with, and how; a user's card stays the user's."""

import re
from types import SimpleNamespace

import pytest
import torch
import transformers.utils.hub as hub
from huggingface_hub import ModelCard
from huggingface_hub.errors import EntryNotFoundError
from tiny_models import save
from transformers import AutoModelForCausalLM

import quanto_hf
from quanto_hf import QuantoConfig
from quanto_hf.hf.save.card import section

MINE = "---\ntags:\n- poems\n---\n\n# My model\n\nIt writes poems.\n"


@pytest.fixture(scope="module")
def llama(tmp_path_factory):
    return save("llama", tmp_path_factory.mktemp("llama"))


@pytest.fixture
def hosted(monkeypatch):
    """A hub that keeps the cards which are uploaded to it, and gives the one that it has."""
    held = SimpleNamespace(card=None)

    def create_commit(repo_id, operations, **kwargs):
        for operation in operations:
            if operation.path_in_repo == "README.md":
                with open(operation.path_or_fileobj, encoding="utf-8") as file:
                    held.card = file.read()

    def load_card(repo_id, **kwargs):
        if held.card is None:
            raise EntryNotFoundError("no card")
        return ModelCard(held.card)

    api = SimpleNamespace(
        create_repo=lambda repo_id, **kwargs: SimpleNamespace(repo_id=repo_id), create_commit=create_commit
    )
    monkeypatch.setattr(hub, "hf_api", lambda: api)
    monkeypatch.setattr("transformers.modeling_utils.hf_api", lambda: api)
    monkeypatch.setattr(ModelCard, "load", load_card)
    return held


def load(folder, **config):
    return AutoModelForCausalLM.from_pretrained(folder, quantization_config=QuantoConfig(**config))


def push(model, how, folder):
    if how == "push_to_hub":
        model.push_to_hub("me/model")
    else:
        model.save_pretrained(folder, push_to_hub=True, repo_id="me/model")


@pytest.mark.parametrize("how", ["push_to_hub", "save_pretrained"])
def test_a_card_that_is_made_has_the_tag_the_line_to_install_and_what_was_quantized_how(how, llama, hosted, tmp_path):
    model = load(llama, weights="int4", overrides={"*.down_proj": {"weights": "int8"}})
    push(model, how, tmp_path)
    card = ModelCard(hosted.card)
    assert card.data.tags == ["quanto_hf"] and card.data.library_name == "transformers"
    assert "pip install quanto-hf" in card.text and "import quanto_hf" in card.text
    assert "from transformers import LlamaForCausalLM" in card.text
    rows = re.findall(r"^\| (.+) \| (\d+) \| ([\d.]+)% \| ([\d.]+) \|$", card.text, re.MULTILINE)
    found = {kind: (int(count), float(bits)) for kind, count, _, bits in rows}
    assert found["int4 g64 asym"] == (12, 4.5) and found["int8"][0] == 2 and found["float: float32"][1] == 32
    assert sum(float(share) for *_, share, _ in rows) == pytest.approx(100, abs=0.3)
    assert card.text.index("## Quantization") < card.text.index("## Model Details")


def test_the_next_upload_brings_the_section_up_to_date(llama, hosted):
    load(llama, weights="int4").push_to_hub("me/model")
    load(llama, weights="int8").push_to_hub("me/model")
    assert hosted.card.count("## Quantization") == 1
    assert "| int8 |" in hosted.card and "int4" not in hosted.card


@pytest.mark.parametrize("how", ["push_to_hub", "save_pretrained"])
def test_the_text_of_a_user_is_not_changed(how, llama, hosted, tmp_path):
    hosted.card = MINE
    push(load(llama), how, tmp_path)
    card = ModelCard(hosted.card)
    assert card.data.tags == ["poems", "quanto_hf"] and card.text == ModelCard(MINE).text


def test_a_model_that_is_not_quantized_any_more_does_not_say_so(llama, hosted):
    load(llama)
    AutoModelForCausalLM.from_pretrained(llama).push_to_hub("me/float")
    assert "quanto" not in hosted.card
    hosted.card = None
    model = load(llama)
    model.dequantize()
    model.push_to_hub("me/float")
    assert "quanto" not in hosted.card


def test_a_model_that_is_quantized_by_quantize_has_the_card_too(llama, hosted):
    model = quanto_hf.quantize(AutoModelForCausalLM.from_pretrained(llama), weights="int8")
    quanto_hf.freeze(model)
    model.push_to_hub("me/model")
    assert ModelCard(hosted.card).data.tags == ["quanto_hf"] and "| int8 |" in hosted.card


def test_save_pretrained_writes_no_card(llama, tmp_path):
    load(llama).save_pretrained(tmp_path)
    assert not (tmp_path / "README.md").exists()


def test_a_model_without_parameters_has_a_section():
    assert "0.00 bits" in section(quanto_hf.report(torch.nn.Identity()))
