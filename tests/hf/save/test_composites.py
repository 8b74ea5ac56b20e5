"""A quantized part of a transformers model that was not quantized itself: the whole is saved and reloaded right."""

import json
import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
import transformers as tf
from tiny_models import PICTURE, SHAPE, TEXT, lively, llama_config, noise, output, qlinears, tokens
from torch import nn

import quanto_hf
from quanto_hf import QuantoConfig, eager, freeze
from quanto_hf.nn import QConv2d


def encoder():
    return lively(tf.BertModel(tf.BertConfig(**TEXT, **SHAPE)))


def decoder():
    return lively(tf.BertLMHeadModel(tf.BertConfig(**TEXT, **SHAPE, is_decoder=True, add_cross_attention=True)))


def vit():
    return lively(tf.ViTModel(tf.ViTConfig(**SHAPE, **PICTURE)))


def speech():
    config = tf.Wav2Vec2Config(
        vocab_size=32, hidden_size=64, num_hidden_layers=2, num_attention_heads=4, intermediate_size=128,
        conv_dim=(16, 16), conv_stride=(5, 2), conv_kernel=(10, 3), num_conv_pos_embeddings=16,
        num_conv_pos_embedding_groups=2, num_feat_extract_layers=2,
    )  # fmt: skip
    return lively(tf.Wav2Vec2Model(config))


def text_inputs():
    return {"input_ids": tokens(), "decoder_input_ids": tokens(2, 6)}


def dual(image, text, **kwargs):
    return tf.VisionTextDualEncoderModel.from_vision_text_pretrained(image, text, **kwargs)


# how it is made of the folders of two float models, these models, the names of its parts, and inputs
COMPOSITES = {
    "encoder-decoder": (
        tf.EncoderDecoderModel.from_encoder_decoder_pretrained, encoder, decoder, ("encoder", "decoder"), text_inputs,
    ),
    "vision-encoder-decoder": (
        tf.VisionEncoderDecoderModel.from_encoder_decoder_pretrained, vit, decoder, ("encoder", "decoder"),
        lambda: {"pixel_values": noise(2, 3, 16, 16), "decoder_input_ids": tokens(2, 6)},
    ),
    "speech-encoder-decoder": (
        tf.SpeechEncoderDecoderModel.from_encoder_decoder_pretrained, speech, decoder, ("encoder", "decoder"),
        lambda: {"input_values": noise(2, 800), "decoder_input_ids": tokens(2, 6)},
    ),
    "vision-text-dual-encoder": (
        dual, vit, encoder, ("vision_model", "text_model"),
        lambda: {"pixel_values": noise(2, 3, 16, 16), "input_ids": tokens()},
    ),
}  # fmt: skip


@pytest.fixture(scope="module")
def parts(tmp_path_factory):
    """The float models, each in its folder, by the function that makes them."""
    made = {}
    for build in (encoder, decoder, vit, speech):
        made[build] = tmp_path_factory.mktemp("part") / build.__name__
        build().save_pretrained(made[build])
    return made


def compose(name, parts, first=None, second=None):
    """A composite; its parts are quantized with these configs as they are loaded."""
    make, one, two, (a, b), _ = COMPOSITES[name]
    prefix_a, prefix_b = (p.removesuffix("_model") for p in (a, b))
    kwargs = {f"{prefix_a}_quantization_config": first, f"{prefix_b}_quantization_config": second}
    return make(parts[one], parts[two], **{k: v for k, v in kwargs.items() if v is not None}).eval()


@torch.no_grad()
def result(model, name):
    found = model(**COMPOSITES[name][4]())
    return found.logits_per_text if name == "vision-text-dual-encoder" else found.logits


def config_of(folder):
    return json.loads((folder / "config.json").read_text())


def visible(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir() if not path.name.startswith(".")}


def check(model, folder, compute, cls=None):
    """Save, reload, and compare bit by bit; returns the reloaded model."""
    wanted = compute(model)
    model.save_pretrained(folder)
    made = (cls or type(model)).from_pretrained(folder).eval()
    assert torch.equal(compute(made), wanted)
    assert {n: m.scheme for n, m in qlinears(made).items()} == {n: m.scheme for n, m in qlinears(model).items()}
    return made


@pytest.mark.parametrize("name", COMPOSITES)
@pytest.mark.parametrize("which", ["first", "second", "both"])
def test_parts_that_were_quantized_as_they_were_loaded_come_back(name, which, parts, tmp_path):
    first = QuantoConfig("int8") if which != "second" else None
    second = QuantoConfig("int4") if which != "first" else None
    model = compose(name, parts, first, second)
    assert qlinears(model) and getattr(model, "hf_quantizer", None) is None
    made = check(model, tmp_path, lambda m: result(m, name))
    config = config_of(tmp_path)
    assert config["quantization_config"]["quant_method"] == "quanto_hf"
    assert (tmp_path / "config.json").read_text().count("quantization_config") == 1
    # nothing of the model itself is changed by saving it
    assert getattr(model, "hf_quantizer", None) is None and not hasattr(model.config, "quantization_config")
    # and what came back is saved as well
    check(made, tmp_path / "again", lambda m: result(m, name))


def test_a_part_that_is_quantized_in_place_comes_back(parts, tmp_path):
    model = compose("encoder-decoder", parts)
    freeze(quanto_hf.quantize(model.encoder.encoder.layer, "nf4"))
    freeze(quanto_hf.quantize(model.decoder, "int4", group_size=32, symmetric=True))
    made = check(model, tmp_path, lambda m: result(m, "encoder-decoder"))
    assert made.config.quantization_config.weights in ("nf4", "int4")


def test_a_part_that_is_still_trained_comes_back_trained(parts, tmp_path):
    model = compose("encoder-decoder", parts)
    quanto_hf.quantize(model.encoder, "int4")
    made = check(model, tmp_path, lambda m: result(m, "encoder-decoder"))
    assert made.hf_quantizer.is_qat_trainable and not any(layer.is_frozen for layer in qlinears(made).values())


def test_requantize_of_a_transformers_model_is_saved_like_quantize(tmp_path):
    model = freeze(quanto_hf.quantize(lively(tf.LlamaForCausalLM(llama_config())), "int4"))
    again = quanto_hf.requantize(
        tf.LlamaForCausalLM(llama_config()), model.state_dict(), quanto_hf.quantization_map(model)
    ).eval()
    assert getattr(again, "hf_quantizer", None) is None
    made = check(again, tmp_path, lambda m: output(m, "llama"))
    assert torch.equal(output(made, "llama"), output(model, "llama"))


def test_the_base_model_inside_of_a_model_with_a_head_comes_back_both_ways(tmp_path):
    model = lively(tf.LlamaForCausalLM(llama_config()))
    freeze(quanto_hf.quantize(model.model, "int8"))
    check(model, tmp_path / "whole", lambda m: output(m, "llama"))
    check(model.model, tmp_path / "base", lambda m: output(m, "llama"))
    assert config_of(tmp_path / "whole")["quantization_config"]["schemes"][0]["modules"][0].startswith("model.layers")
    assert config_of(tmp_path / "base")["quantization_config"]["schemes"][0]["modules"][0].startswith("layers")


class OwnConfig(tf.PreTrainedConfig):
    model_type = "own"


class Own(tf.PreTrainedModel):
    """A model of one's own around two others, with a layer and a convolution of its own."""

    config_class = OwnConfig
    base_model_prefix = ""

    def __init__(self, config):
        super().__init__(config)
        self.text = tf.BertModel(tf.BertConfig(**TEXT, **SHAPE))
        self.image = tf.ViTModel(tf.ViTConfig(**SHAPE, **PICTURE))
        self.look = nn.Conv2d(3, 3, 3, padding=1)
        self.mix = nn.Linear(64, 64)
        self.head = nn.Linear(64, 7)
        self.post_init()

    def forward(self):
        image = self.image(pixel_values=self.look(noise(2, 3, 16, 16))).last_hidden_state[:, 0]
        return self.head(self.mix(self.text(input_ids=tokens()).last_hidden_state[:, 0] + image))


class OwnWithFiles(Own):
    """It writes a file of its own, before or after the model."""

    def save_pretrained(self, save_directory, *args, **kwargs):
        super().save_pretrained(save_directory, *args, **kwargs)
        (save_directory / "notes.txt").write_text("mine")
        if getattr(self, "breaks", False):
            raise KeyboardInterrupt


def own(cls=Own):
    return lively(cls(OwnConfig()))


@torch.no_grad()
def answer(model):
    return model()


@pytest.mark.parametrize("cls", [Own, OwnWithFiles])
def test_a_model_of_ones_own_comes_back_whatever_of_it_is_quantized(cls, tmp_path):
    model = own(cls)
    freeze(quanto_hf.quantize(model.text.encoder, "int4"))
    model.mix, model.look = freeze(quanto_hf.quantize(nn.ModuleList([model.mix, model.look]), "int8"))
    assert isinstance(model.look, QConv2d)
    made = check(model, tmp_path / cls.__name__, answer)
    assert isinstance(made.look, QConv2d) and type(made.head) is nn.Linear


def test_a_class_that_writes_more_files_is_saved_whole_or_not_at_all(tmp_path):
    model = own(OwnWithFiles)
    freeze(quanto_hf.quantize(model.text, "int8"))
    made = check(model, tmp_path, answer)
    before = visible(tmp_path)
    assert "notes.txt" in before
    made.breaks = True
    with torch.no_grad():
        made.head.weight.add_(1)
    with pytest.raises(KeyboardInterrupt):
        made.save_pretrained(tmp_path)
    assert visible(tmp_path) == before


def test_what_two_parts_round_their_inputs_to_is_one_thing_or_an_error_before_anything_is_written(tmp_path):
    model = own()
    freeze(quanto_hf.quantize(model.text, "int8", "int8"))
    check(model, tmp_path / "one", answer)
    freeze(quanto_hf.quantize(model.image, "int4"))
    with pytest.raises(ValueError, match=r"text.*has activations=.*int8.*quantize all parts with the same activations"):
        model.save_pretrained(tmp_path / "two")
    assert not (tmp_path / "two").exists() and not hasattr(model, "hf_quantizer")


def test_a_part_of_another_method_is_refused_before_anything_is_written(tmp_path):
    model = own()
    freeze(quanto_hf.quantize(model.text, "int8"))

    class Other:
        quantization_config = tf.BitsAndBytesConfig(load_in_8bit=True)

    model.image.hf_quantizer = Other()
    with pytest.raises(ValueError, match=r"text\.\S+ is quantized with quanto_hf, and its image .* with bitsandbytes"):
        model.save_pretrained(tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_layers_of_the_eager_mode_are_refused_before_anything_is_written(tmp_path):
    model = own()
    model.mix = eager.quantize_dynamic(nn.Sequential(nn.Linear(64, 64)))[0]
    with pytest.raises(ValueError, match=r"mix is a quanto_hf\.eager\.modules.*which from_pretrained does not make"):
        model.save_pretrained(tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_published_aqlm_layers_in_a_part_are_saved_in_their_format_and_not_beside_others(tmp_path):
    text = quanto_hf.AqlmConfig(num_codebooks=1, nbits_per_codebook=4)
    model = own()
    model.text.save_pretrained(tmp_path / "text")
    model.text = tf.BertModel.from_pretrained(tmp_path / "text", quantization_config=text)
    wanted = answer(model)
    model.save_pretrained(tmp_path / "out")
    assert config_of(tmp_path / "out")["quantization_config"]["quant_method"] == "aqlm"
    made = Own.from_pretrained(tmp_path / "out", quantization_config=text).eval()
    assert torch.equal(answer(made), wanted)
    freeze(quanto_hf.quantize(model.image, "int4"))
    with pytest.raises(
        ValueError, match=r"text\.\S+ is in the format of 'aqlm' checkpoints, and image\.\S+ in that of"
    ):
        model.save_pretrained(tmp_path / "both")
    assert not (tmp_path / "both").exists()


def test_a_state_dict_that_is_given_is_what_is_saved(parts, tmp_path):
    model = compose("encoder-decoder", parts, QuantoConfig("int8"))
    state = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    with torch.no_grad():
        wanted = result(model, "encoder-decoder")
        model.decoder.cls.predictions.bias.add_(1)
    model.save_pretrained(tmp_path, state_dict=state)
    made = tf.EncoderDecoderModel.from_pretrained(tmp_path).eval()
    assert torch.equal(result(made, "encoder-decoder"), wanted)


def test_a_state_dict_that_is_not_of_the_quantized_model_is_refused(tmp_path):
    model = lively(tf.LlamaForCausalLM(llama_config()))
    state = model.state_dict()
    freeze(quanto_hf.quantize(model, "int8"))
    with pytest.raises(
        ValueError, match=r"the state_dict given .* has no model\.layers\.0\.self_attn\.q_proj\.weight_"
    ):
        model.save_pretrained(tmp_path / "out", state_dict=state)
    assert not (tmp_path / "out").exists()


def test_a_dequantized_part_is_saved_in_float_with_no_word_of_its_former_type(parts, tmp_path):
    model = compose("encoder-decoder", parts, QuantoConfig("int8"))
    quanto_hf.dequantize(model)
    check(model, tmp_path, lambda m: result(m, "encoder-decoder"))
    assert "quanto_hf" not in (tmp_path / "config.json").read_text()


def test_a_composite_is_pushed_with_its_config(parts, tmp_path, monkeypatch):
    model, seen = compose("encoder-decoder", parts, QuantoConfig("int8")), []
    monkeypatch.setattr(
        tf.EncoderDecoderModel, "_upload_modified_files",
        lambda self, folder, *args, **kwargs: seen.append(config_of(Path(folder))),
    )  # fmt: skip
    monkeypatch.setattr("transformers.modeling_utils.create_and_tag_model_card", lambda *args, **kwargs: type(
        "Card", (), {"save": lambda self, path: None})())  # fmt: skip
    hub = type("Api", (), {"create_repo": lambda self, name, **kwargs: type("Repo", (), {"repo_id": name})()})
    monkeypatch.setattr("transformers.modeling_utils.hf_api", hub)
    model.save_pretrained(tmp_path / "mine", push_to_hub=True)
    assert seen[0]["quantization_config"]["quant_method"] == "quanto_hf"


def test_several_threads_save_one_composite_and_its_part(parts, tmp_path):
    model = compose("encoder-decoder", parts, QuantoConfig("int8"), QuantoConfig("int4"))
    wanted = result(model, "encoder-decoder")

    def save(number):
        (model.encoder if number % 4 == 3 else model).save_pretrained(tmp_path / str(number))

    with ThreadPoolExecutor(4) as pool:
        list(pool.map(save, range(16)))
    assert not hasattr(model.config, "quantization_config") and getattr(model, "hf_quantizer", None) is None
    assert model.config.encoder.quantization_config["weights"] == "int8"
    for number in (0, 1, 2, 4, 13, 14):
        made = tf.EncoderDecoderModel.from_pretrained(tmp_path / str(number)).eval()
        assert torch.equal(result(made, "encoder-decoder"), wanted)
        assert (tmp_path / str(number) / "config.json").read_text().count("quantization_config") == 1
    part = tf.BertModel.from_pretrained(tmp_path / "15")
    assert qlinears(part).keys() == qlinears(model.encoder).keys()


def test_a_part_whose_config_the_composite_has_replaced_is_saved_as_it_is_now(parts, tmp_path):
    model = compose("encoder-decoder", parts, QuantoConfig("int8", qat=True))
    freeze(model.encoder)
    assert isinstance(model.encoder.config.quantization_config, dict)
    model.encoder.save_pretrained(tmp_path)
    made = tf.BertModel.from_pretrained(tmp_path).eval()
    assert all(layer.is_frozen for layer in qlinears(made).values())
    with torch.no_grad():
        answers = [m(input_ids=tokens()).last_hidden_state for m in (made, model.encoder)]
    assert torch.equal(*answers)


def test_the_text_model_of_a_model_that_sees_is_quantized_and_the_whole_comes_back(tmp_path):
    config = tf.LlavaConfig(
        vision_config=tf.CLIPVisionConfig(hidden_size=64, intermediate_size=128, num_hidden_layers=2, **PICTURE,
                                          num_attention_heads=4),
        text_config=llama_config(), image_token_index=90, image_seq_length=4,
    )  # fmt: skip
    model = lively(tf.LlavaForConditionalGeneration(config))
    freeze(quanto_hf.quantize(model.model.language_model, "int4"))
    ids = tokens(1, 10)
    ids[ids == 90] = 3
    ids[0, 1:5] = 90

    def answer_of(made):
        with torch.no_grad():
            return made(input_ids=ids, pixel_values=noise(1, 3, 16, 16)).logits

    made = check(model, tmp_path, answer_of)
    assert type(made.model.multi_modal_projector.linear_1) is nn.Linear


def test_a_trainer_saves_a_composite_that_comes_back(parts, tmp_path):
    model = compose("encoder-decoder", parts, QuantoConfig("int8"))
    trainer = tf.Trainer(model, tf.TrainingArguments(tmp_path, report_to=[], use_cpu=True))
    trainer.save_model(tmp_path / "out")
    made = tf.EncoderDecoderModel.from_pretrained(tmp_path / "out").eval()
    assert torch.equal(result(made, "encoder-decoder"), result(model, "encoder-decoder"))


def test_a_pickled_part_in_a_new_process_comes_back(tmp_path):
    model = own()
    freeze(quanto_hf.quantize(model.text, "int4"))
    torch.save(model.text, tmp_path / "text.pt")
    done = subprocess.run(
        [sys.executable, "-c", (
            "import sys, torch; from pathlib import Path\n"
            "sys.path.insert(0, sys.argv[2])\n"
            "from test_composites import Own, OwnConfig, answer, own, check\n"
            "model = own(); model.text = torch.load(Path(sys.argv[1]) / 'text.pt', weights_only=False)\n"
            "del model.text.hf_quantizer; check(model, Path(sys.argv[1]) / 'out', answer)\n"
        ), str(tmp_path), str(Path(__file__).parent)],
        capture_output=True, text=True, timeout=300,
        env={**os.environ, "PYTHONPATH": ":".join(sys.path)},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
