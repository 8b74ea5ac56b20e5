"""Which modules of a transformers model stay float by default, and how a user's list adds to them."""

import pytest
import torch
import transformers
from tiny_models import TINY, llama_config, qlinears, save

from quanto_hf import QuantoConfig, report
from quanto_hf.hf.config.skips import default_skips, task_heads
from quanto_hf.hf.load.assigning import new_assignment


def empty(name, **values):
    with torch.device("meta"):
        return TINY[name].cls(TINY[name].config())


def linear_skips(model, *args):
    linears = {n for n, m in model.named_modules() if type(m) is torch.nn.Linear}
    return {n: reason for n, reason in default_skips(model, *args).items() if n in linears}


@pytest.mark.parametrize(
    ("name", "skips"),
    [
        ("llama", {"lm_head": "the output head stays float by default"}),
        ("llama-tied", {"lm_head": "the output head stays float by default"}),
        ("gpt-neox", {"lm_head": "the output head stays float by default"}),
        ("bert", {}),
        ("vit", {"classifier": "task heads stay float by default"}),
        ("clip", {}),
    ],
)
def test_output_heads_task_heads_and_tied_weights_stay_float(name, skips):
    assert linear_skips(empty(name), torch.float32) == skips


def test_without_default_skips_only_tied_weights_stay_float():
    config = QuantoConfig(default_skips=False)
    assert linear_skips(empty("llama"), torch.float32, False) == {}
    assert new_assignment(empty("llama"), config, torch.float32).left == {}
    left = new_assignment(empty("llama-tied"), config, torch.float32).left
    assert left == {"lm_head": "its weight is tied to model.embed_tokens.weight"}


def test_what_the_model_keeps_in_float32_stays_float():
    half = linear_skips(empty("t5"), torch.float16)
    assert {n.rpartition(".")[2] for n, reason in half.items() if reason == "the model keeps it in float32"} == {"wo"}
    assert not any("float32" in reason for reason in linear_skips(empty("t5"), torch.float32).values())


@pytest.fixture(scope="module")
def llama(tmp_path_factory):
    return save("llama", tmp_path_factory.mktemp("llama"))


def load(folder, **kwargs):
    return transformers.AutoModelForCausalLM.from_pretrained(folder, quantization_config=QuantoConfig(**kwargs))


def test_a_list_of_the_user_adds_to_the_default(llama):
    model = load(llama, modules_to_not_convert=["down_proj"])
    left = {
        row.name: row.reason for row in report(model).rows if row.name.endswith(("head.weight", "down_proj.weight"))
    }
    assert left == {
        "model.layers.0.mlp.down_proj.weight": "it matches 'down_proj' of the modules not to convert",
        "model.layers.1.mlp.down_proj.weight": "it matches 'down_proj' of the modules not to convert",
        "lm_head.weight": "the output head stays float by default",
    }


def test_the_default_can_be_switched_off(llama):
    assert "lm_head" in qlinears(load(llama, default_skips=False))
    assert "lm_head" not in qlinears(load(llama))


def test_a_part_of_a_segment_is_no_match_and_a_pattern_without_match_warns(llama):
    # "gate" is not "gate_proj"
    with pytest.warns(UserWarning, match="the pattern 'gate_pro' matches no module of this model; did you mean"):
        model = load(llama, modules_to_not_convert=["gate_pro"])
    assert len(qlinears(model)) == TINY["llama"].eligible


def test_the_resolved_list_is_shown_and_saved(llama, tmp_path):
    model = load(llama, modules_to_not_convert=["layers.0"])
    names = sorted(qlinears(model))
    assert all(name.startswith("model.layers.1.") for name in names) and len(names) == 7
    model.save_pretrained(tmp_path)
    saved = transformers.AutoConfig.from_pretrained(tmp_path).quantization_config
    assert sorted(name for entry in saved["schemes"] for name in entry["modules"]) == names
    assert saved["modules_to_not_convert"] == ["layers.0"]


def test_a_linear_layer_outside_of_the_base_model_is_a_task_head():
    with torch.device("meta"):
        model = transformers.LlamaForSequenceClassification(llama_config(num_labels=3))
    assert linear_skips(model, torch.float32) == {"score": "task heads stay float by default"}


class Composite(torch.nn.Module):
    """The parts of a model outside of its base model, as task_heads reads them."""

    def __init__(self, **parts):
        super().__init__()
        self.base_model = torch.nn.Linear(8, 8)
        for name, part in parts.items():
            self.add_module(name, part)


def heads(**parts):
    model = Composite(**parts)
    ends = task_heads(model)
    return [n for n, module in model.named_modules() if module in ends and isinstance(module, torch.nn.Linear)]


def linear():
    return torch.nn.Linear(8, 8)


def part(**children):
    made = torch.nn.Module()
    for name, child in children.items():
        made.add_module(name, child)
    return made


def block():
    return part(q=linear(), k=linear(), v=linear(), o=linear())


def mlp(layers=3):
    return part(layers=torch.nn.ModuleList(linear() for _ in range(layers)))


def test_a_head_is_a_layer_or_a_small_part_as_a_whole():
    assert heads(score=linear()) == ["score"]
    assert heads(classifier=part(dense=linear(), out_proj=linear())) == ["classifier.dense", "classifier.out_proj"]
    assert heads(box=mlp()) == ["box.layers.0", "box.layers.1", "box.layers.2"]


def test_each_entry_of_a_list_of_heads_is_one():
    found = heads(boxes=torch.nn.ModuleList(mlp() for _ in range(6)))
    assert len(found) == 18


def test_of_a_network_only_the_last_layer_is_a_head():
    blocks = torch.nn.ModuleList([block(), block()])
    assert heads(decoder=part(embed=linear(), blocks=blocks, pred=linear())) == ["decoder.pred"]
    assert heads(neck=part(blocks=blocks)) == []
    # fewer layers, but none of them the last one
    assert heads(neck=part(blocks=blocks[:1])) == []


@pytest.mark.parametrize("name", ["ViTMAEForPreTraining", "VideoMAEForPreTraining"])
def test_the_decoder_of_a_masked_autoencoder_is_quantized_but_for_its_last_layer(name):
    cls = getattr(transformers, name)
    shape = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 64}
    decoder = {f"decoder_{key}": value for key, value in shape.items()}
    with torch.device("meta"):
        model = cls(cls.config_class(**shape, **decoder, image_size=16, patch_size=8))
    left = [n for n, reason in linear_skips(model, torch.float32).items() if "head" in reason]
    outside = [n for n, m in model.named_modules() if type(m) is torch.nn.Linear and n.startswith("decoder")]
    assert len(outside) > 6 and [n for n in left if n in outside] == outside[-1:]


def test_a_network_that_is_not_in_the_checkpoint_is_initialised_anew_and_said_in_one_sentence(tmp_path):
    shape = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 64}
    decoder = {f"decoder_{key}": value for key, value in shape.items()}
    config = transformers.ViTMAEConfig(**shape, **decoder, image_size=16, patch_size=8)
    transformers.ViTMAEModel(config).save_pretrained(tmp_path)
    with pytest.warns(UserWarning, match="not in the checkpoint") as caught:
        model = transformers.ViTMAEForPreTraining.from_pretrained(tmp_path, quantization_config=QuantoConfig("int8"))
    assert len([w for w in caught if "not in the checkpoint" in str(w.message)]) == 1
    assert not any(name.startswith("decoder") for name in qlinears(model)) and qlinears(model)
    assert all(torch.isfinite(p).all() for p in model.decoder.parameters())
    reasons = {row.name: row.reason for row in report(model).rows}
    assert reasons["decoder.decoder_embed.weight"] == "it is not in the checkpoint"
