"""What was saved loads: names are tried before anything is written, whatever rules transformers renames by."""

import pytest
import torch
from safetensors import safe_open
from tiny_models import TINY, lively, output, save
from transformers import LlamaForCausalLM
from transformers.core_model_loading import WeightRenaming
from transformers.models.inkling2.configuration_inkling2 import Inkling2TextConfig
from transformers.models.inkling2.modeling_inkling2 import Inkling2ForCausalLM

from quanto_hf import CheckpointError, QuantoConfig

IDS = torch.tensor([[5, 6, 7, 8]])


def inkling():
    return Inkling2TextConfig(
        vocab_size=96, unpadded_vocab_size=96, hidden_size=64, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, head_dim=16, swa_num_attention_heads=4, swa_num_key_value_heads=2, swa_head_dim=16,
        layer_types=["hybrid_sliding", "hybrid"], moe_intermediate_size=32, n_routed_experts=4, num_experts_per_tok=2,
        d_rel=4, rel_extent=16, n_layers_per_attn_res_block=1, eos_token_id=2, pad_token_id=0,
    )  # fmt: skip


def names_in(folder):
    with safe_open(folder / "model.safetensors", framework="pt") as file:
        return set(file.keys())


def test_a_renaming_that_does_not_fit_packed_names_is_left_out(tmp_path):
    # "sconv.weight_proj" gets ".weight" appended on loading, and loses it on saving: of a packed name it cannot
    Inkling2ForCausalLM(inkling()).save_pretrained(tmp_path / "float")
    model = Inkling2ForCausalLM.from_pretrained(tmp_path / "float", quantization_config=QuantoConfig("int8"))
    model.save_pretrained(tmp_path / "int8")
    again = Inkling2ForCausalLM.from_pretrained(tmp_path / "int8")
    with torch.no_grad():
        assert torch.equal(again(IDS).logits, model(IDS).logits)
    again.save_pretrained(tmp_path / "again", max_shard_size="50KB")
    thrice = Inkling2ForCausalLM.from_pretrained(tmp_path / "again")
    assert all(map(torch.equal, thrice.state_dict().values(), model.state_dict().values()))


@pytest.fixture
def model(tmp_path):
    folder = save("llama", tmp_path / "float")
    return LlamaForCausalLM.from_pretrained(folder, quantization_config=QuantoConfig("int8"))


def test_names_of_the_original_checkpoint_are_kept_where_they_load(tmp_path):
    folder = save("vit", tmp_path / "float")
    cls = TINY["vit"].cls
    model = cls.from_pretrained(folder, quantization_config=QuantoConfig("int8"))
    model.save_pretrained(tmp_path / "int8")
    floats = {name for name in names_in(folder) if name.endswith("weight")}
    assert {name for name in names_in(tmp_path / "int8") if name.endswith(".weight")} == floats
    assert torch.equal(output(cls.from_pretrained(tmp_path / "int8"), "vit"), output(model, "vit"))


def test_names_that_do_not_load_either_way_are_refused_before_anything_is_written(model, tmp_path, monkeypatch):
    lost = WeightRenaming(r"up_proj.weight_packed", r"up_proj.weight_packed.gone")
    monkeypatch.setattr("quanto_hf.hf.save.saved_names.get_model_conversion_mapping", lambda model: [lost])
    # as if this were the name in the model of a name in the file
    monkeypatch.setattr(
        "quanto_hf.hf.load.names.rename_source_key",
        lambda key, renamings, *rest: (key.replace("up_proj", "lost") if renamings else key.replace("up", "l"), None),
    )
    with pytest.raises(CheckpointError, match=r"(?s)LlamaForCausalLM is not saved.*up_proj\.weight_packed"):
        model.save_pretrained(tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_user_who_asks_for_the_names_of_the_model_gets_them(model, tmp_path):
    model.save_pretrained(tmp_path / "out", save_original_format=False)
    with torch.no_grad():
        assert torch.equal(LlamaForCausalLM.from_pretrained(tmp_path / "out")(IDS).logits, model(IDS).logits)


def test_a_model_that_was_not_loaded_is_saved_too(tmp_path):
    import quanto_hf

    model = quanto_hf.quantize(lively(TINY["llama"].cls(TINY["llama"].config())), weights="int8")
    quanto_hf.freeze(model)
    model.save_pretrained(tmp_path)
    assert torch.equal(output(LlamaForCausalLM.from_pretrained(tmp_path), "llama"), output(model, "llama"))
