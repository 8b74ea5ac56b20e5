"""An embedding and a head with one weight are one packed tensor: loaded, saved, offloaded, resized, copied, trained."""

import copy
import pickle
import shutil

import pytest
import torch
import transformers as tf
from safetensors.torch import load_file, save_file
from tiny_models import lively, llama_config, tokens

from quanto_hf import QuantoConfig, convert_checkpoint, dequantize, freeze, plan, quantize, report
from quanto_hf.compat import quantization_map, requantize
from quanto_hf.nn import QEmbedding, QLinear

CLS = tf.LlamaForCausalLM
PAIR = {
    "lm_head.weight_packed": "model.embed_tokens.weight_packed",
    "lm_head.weight_scale": "model.embed_tokens.weight_scale",
}


def config(**values):
    return QuantoConfig("int8", **{"embeddings": "int8", **values})


@torch.no_grad()
def logits(model):
    return model(input_ids=tokens()).logits


def is_one(model):
    """Whether both modules hold the same Parameter objects."""
    head, table = model.lm_head, model.model.embed_tokens
    assert isinstance(head, QLinear) and isinstance(table, QEmbedding)
    return all(head._parameters[name] is table._parameters[name] for name in head.stored_names)


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """The float checkpoint, and the quantized one."""
    made = tmp_path_factory.mktemp("tied")
    lively(CLS(llama_config(tie_word_embeddings=True))).save_pretrained(made / "float")
    CLS.from_pretrained(made / "float", quantization_config=config()).save_pretrained(made / "packed")
    return made


@pytest.fixture
def model(folders):
    return CLS.from_pretrained(folders / "float", quantization_config=config())


def test_a_tied_pair_is_one_packed_tensor_after_loading_saving_and_reloading(folders, model):
    exact, found = logits(CLS.from_pretrained(folders / "float")), logits(model)
    assert is_one(model) and dict(model.all_tied_weights_keys) == PAIR
    assert float((found - exact).norm() / exact.norm()) < 0.02
    # written once, under the name of the embedding, with the guard that stops transformers alone
    names = [name for name in load_file(folders / "packed" / "model.safetensors") if "layers" not in name]
    assert sorted(names) == [
        "model.embed_tokens.weight", "model.embed_tokens.weight_packed", "model.embed_tokens.weight_scale",
        "model.norm.weight",
    ]  # fmt: skip
    again = CLS.from_pretrained(folders / "packed")
    assert is_one(again) and torch.equal(logits(again), found)
    again.tie_weights()
    assert is_one(again) and torch.equal(logits(again), found)
    assert again.config.tie_word_embeddings


def test_bytes_are_as_planned(folders, model):
    again = CLS.from_pretrained(folders / "packed")
    planned = [plan(folders / "float", config()).nbytes, plan(folders / "packed").nbytes, plan(model).nbytes]
    assert planned == [model.get_memory_footprint()] * 3 and again.get_memory_footprint() == planned[0]
    rows = [row.name for row in report(model).rows if "layers" not in row.name]
    assert rows == ["model.embed_tokens.weight", "model.norm.weight"]


def test_float_is_the_default(folders):
    model = CLS.from_pretrained(folders / "float", quantization_config=QuantoConfig("int8"))
    assert model.lm_head.weight is model.model.embed_tokens.weight and type(model.lm_head) is torch.nn.Linear
    reasons = {row.name: row.reason for row in report(model).rows}
    assert "lm_head.weight" not in reasons and "model.embed_tokens.weight" in reasons


def test_dequantized_it_is_one_float_weight(folders, model):
    wanted = logits(model)
    model.dequantize()
    assert model.lm_head.weight is model.model.embed_tokens.weight and torch.allclose(logits(model), wanted, atol=1e-5)
    assert dict(model.all_tied_weights_keys) == {"lm_head.weight": "model.embed_tokens.weight"}
    model.tie_weights()
    for folder in ("float", "packed"):
        given = config(dequantize=True)
        made = CLS.from_pretrained(folders / folder, quantization_config=given)
        assert made.lm_head.weight is made.model.embed_tokens.weight
        assert plan(folders / folder, given).nbytes == made.get_memory_footprint()


@pytest.mark.parametrize("folder", ["float", "packed"])
def test_on_disk_it_is_one_page_of_a_file(folder, folders, model, tmp_path):
    options = {"quantization_config": config()} if folder == "float" else {}
    memory = dict.fromkeys(("model.embed_tokens", "lm_head", "model.norm", "model.rotary_emb"), "cpu")
    maps = [{"": "disk"}, {**memory, "model.layers": "disk"}]
    for number, places in enumerate(maps):
        loaded = CLS.from_pretrained(
            folders / folder, device_map=places, offload_folder=tmp_path / f"{number}", **options
        )
        assert is_one(loaded) and torch.equal(logits(loaded), logits(model))
    loaded.save_pretrained(tmp_path / "saved")
    again = CLS.from_pretrained(tmp_path / "saved")
    assert is_one(again) and torch.equal(logits(again), logits(model))


def test_copies_are_tied(model):
    wanted = logits(model)
    for made in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert is_one(made) and torch.equal(logits(made), wanted)
        assert made.lm_head.weight_packed is not model.lm_head.weight_packed
    assert is_one(copy.deepcopy(model).to(torch.bfloat16))
    fresh = CLS(llama_config(tie_word_embeddings=True))
    requantize(fresh, model.state_dict(), quantization_map(model))
    assert is_one(fresh)


def test_the_verbs_do_the_same_in_place_of_a_loaded_model(folders, model, tmp_path):
    made = quantize(CLS.from_pretrained(folders / "float"), "int8", embeddings="int8")
    assert made.lm_head.weight is made.model.embed_tokens.weight and torch.equal(logits(made), logits(model))
    freeze(made)
    assert is_one(made) and torch.equal(logits(made), logits(model))
    made.save_pretrained(tmp_path)
    assert is_one(CLS.from_pretrained(tmp_path))
    dequantize(made)
    assert made.lm_head.weight is made.model.embed_tokens.weight


def test_training_of_both_ends_in_one_packed_tensor(folders, model, tmp_path):
    prepared = CLS.from_pretrained(folders / "float", quantization_config=config(qat=True))
    assert prepared.lm_head.weight is prepared.model.embed_tokens.weight
    prepared.save_pretrained(tmp_path)
    again = CLS.from_pretrained(tmp_path)
    assert again.lm_head.weight is again.model.embed_tokens.weight
    freeze(again)
    assert is_one(again) and torch.equal(logits(again), logits(model))


@pytest.mark.parametrize("has", ["both", "head", "different"])
def test_a_checkpoint_may_have_either_name_or_both(has, folders, model, tmp_path):
    shutil.copytree(folders / "float", tmp_path, dirs_exist_ok=True)
    weights = load_file(tmp_path / "model.safetensors")
    table = weights["model.embed_tokens.weight"]
    weights["lm_head.weight"] = 2 * table if has == "different" else table.clone()
    if has == "head":
        del weights["model.embed_tokens.weight"]
    save_file(weights, tmp_path / "model.safetensors", metadata={"format": "pt"})
    loaded = CLS.from_pretrained(tmp_path, quantization_config=config())
    if has != "different":
        assert is_one(loaded) and torch.equal(logits(loaded), logits(model))
        return
    # transformers warns, and does not tie them: codes are equal and scales are not
    assert not loaded.all_tied_weights_keys
    assert loaded.lm_head.weight_packed is not loaded.model.embed_tokens.weight_packed
    loaded.save_pretrained(tmp_path / "saved")
    assert torch.equal(logits(CLS.from_pretrained(tmp_path / "saved")), logits(loaded))


def test_a_conversion_on_disk_gives_the_same(folders, model, tmp_path):
    done = convert_checkpoint(folders / "float", tmp_path / "out", config())
    again = CLS.from_pretrained(tmp_path / "out")
    assert not done.not_streamed and is_one(again) and torch.equal(logits(again), logits(model))


def test_other_classes_load_it(folders):
    assert isinstance(tf.LlamaModel.from_pretrained(folders / "packed").embed_tokens, QEmbedding)
    other = tf.LlamaForSequenceClassification.from_pretrained(folders / "packed")
    assert isinstance(other.model.embed_tokens, QEmbedding)


def test_the_head_rounds_its_inputs_as_other_layers_do(folders, tmp_path):
    model = CLS.from_pretrained(folders / "float", quantization_config=config(activations="int8"))
    assert is_one(model) and model.lm_head.activations.name == "int8"
    model.save_pretrained(tmp_path)
    assert torch.equal(logits(CLS.from_pretrained(tmp_path)), logits(model))


@pytest.mark.parametrize("name", ["lm_head", "embed_tokens"])
def test_an_override_that_names_either_side_is_for_both(name, folders):
    model = CLS.from_pretrained(
        folders / "float", quantization_config=QuantoConfig("int8", overrides={name: {"weights": "int4"}})
    )
    assert is_one(model) and f"{model.lm_head.scheme}" == f"{model.model.embed_tokens.scheme}" == "int4 g64 asym"


@pytest.mark.parametrize("other", ["int8", None])
def test_two_ways_for_one_weight_are_an_error(other, folders):
    overrides = {"lm_head": {"weights": "int4"}, "embed_tokens": {"weights": other}}
    with pytest.raises(ValueError, match=r"two ways to store one weight.*'lm_head' is to be int4.*they are tied"):
        CLS.from_pretrained(folders / "float", quantization_config=QuantoConfig("int8", overrides=overrides))


def test_what_keeps_one_side_in_float_keeps_the_other():
    model = CLS(llama_config(tie_word_embeddings=True))
    quantize(model, "int8", embeddings="int8", modules_to_not_convert="embed_tokens")
    assert model.lm_head.weight is model.model.embed_tokens.weight and type(model.lm_head) is torch.nn.Linear
    reason = next(row.reason for row in report(model).rows if row.name == "model.embed_tokens.weight")
    assert "modules not to convert" in reason


def test_a_resized_pair_keeps_the_rows_that_were_there(model, tmp_path):
    before, packed = logits(model), model.lm_head.weight_packed.clone()
    with pytest.warns(
        UserWarning, match=r"embed_tokens \(int8 g64\), lm_head \(int8 g64\) float, and quantizes them again"
    ):
        table = model.resize_token_embeddings(101)
    assert table is model.model.embed_tokens and is_one(model)
    assert torch.equal(model.lm_head.weight_packed[:96], packed) and model.lm_head.out_features == 101
    assert torch.equal(logits(model)[..., :96], before)
    model.save_pretrained(tmp_path)
    again = CLS.from_pretrained(tmp_path)
    assert is_one(again) and torch.equal(logits(again), logits(model))
    with pytest.warns(UserWarning, match="quantizes them again"):
        again.resize_token_embeddings(90)
    assert is_one(again) and again.model.embed_tokens.weight.shape == (90, 64)
    assert again.resize_token_embeddings(None) is again.model.embed_tokens


def adapted(model, **values):
    """A step of training with adapters, and the names of what was trained."""
    peft = pytest.importorskip("peft")
    torch.manual_seed(0)
    made = peft.get_peft_model(model, peft.LoraConfig(target_modules=["q_proj"], **values))
    made(input_ids=tokens(), labels=tokens()).loss.backward()
    trained = [parameter for parameter in made.parameters() if parameter.requires_grad]
    torch.optim.SGD(trained, 0.5).step()
    return made, [name for name, parameter in made.named_parameters() if parameter.grad is not None]


@pytest.mark.parametrize(
    "values",
    [
        {"modules_to_save": ["embed_tokens", "lm_head"]},
        {"modules_to_save": ["embed_tokens"], "ensure_weight_tying": True},
        {"trainable_token_indices": [3, 5]},
    ],
    ids=["both", "tied", "tokens"],
)
def test_adapters_train_what_they_train_of_the_float_model(values, folders, model, tmp_path):
    peft = pytest.importorskip("peft")
    plain = CLS.from_pretrained(folders / "packed")
    plain.dequantize()
    (wanted, names), (found, trained) = adapted(plain, **values), adapted(model, **values)
    assert trained == names and any("embed_tokens" in name for name in names)
    assert torch.allclose(logits(found), logits(wanted), atol=1e-4)
    found.save_pretrained(tmp_path)
    again = peft.PeftModel.from_pretrained(CLS.from_pretrained(folders / "packed"), tmp_path)
    assert torch.allclose(logits(again), logits(found), atol=1e-5)
