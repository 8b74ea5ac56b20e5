"""Quantization-aware training and calibration of transformers models, from from_pretrained to a reloaded checkpoint."""

import subprocess
import sys

import pytest
import torch
import transformers
from tiny_models import TINY, lively, llama_config, output, qlinears, save, tokens

import quanto_hf
from quanto_hf import Calibration, QuantoConfig, calibrate, freeze, quantize
from quanto_hf.nn import State

WAYS = {
    "weight-only": {},
    "x-int8": {"activations": "int8"},
    "x-int8-static": {"activations": "int8", "static_activations": True},
    "learned": {"activations": "int8", "static_activations": True, "learn_scales": True},
}
every_way = pytest.mark.parametrize("way", WAYS.values(), ids=WAYS)
LAYERS = ("model.embed_tokens", "model.layers.0", "model.layers.1", "model.norm", "model.rotary_emb", "lm_head")


@pytest.fixture(scope="module")
def llama(tmp_path_factory):
    return save("llama", tmp_path_factory.mktemp("llama"))


def load(folder, config=None, **kwargs):
    config = {} if config is None else {"quantization_config": config}
    return transformers.AutoModelForCausalLM.from_pretrained(folder, **config, **kwargs)


def prepared(folder, weights="int4", **way):
    model = load(folder, QuantoConfig(weights, qat=True, **way))
    return calibrate(model, [tokens()], progress=False) if way.get("static_activations") else model


def train(model, steps=3, lr=1e-3):
    optimizer, losses = torch.optim.Adam([p for p in model.parameters() if p.requires_grad], lr), []
    model.train()
    for _ in range(steps):
        loss = model(input_ids=tokens(), labels=tokens()).loss
        losses.append(loss.item())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    model.eval()
    return losses


def reloaded(model, folder):
    model.save_pretrained(folder)
    return load(folder)


# ------------------------------------------------------------------------------------------------------ training


@every_way
def test_trained_frozen_saved_and_reloaded_it_answers_the_same(way, llama, tmp_path):
    model = prepared(llama, **way)
    assert model.hf_quantizer.is_trainable and model.hf_quantizer.is_qat_trainable
    before = {n: p.detach().clone() for n, p in model.named_parameters()}
    losses = train(model)
    assert losses[-1] < losses[0]
    assert all(not torch.equal(p, before[n]) for n, p in model.named_parameters())
    wanted = output(model, "llama")
    # in the middle of training
    middle = reloaded(model, tmp_path / "middle")
    assert {layer.weight_state for layer in qlinears(middle).values()} == {State.PREPARED}
    assert middle.hf_quantizer.is_qat_trainable and torch.equal(output(middle, "llama"), wanted)
    trained = {n for n, p in model.named_parameters() if p.requires_grad}
    assert {n for n, p in middle.named_parameters() if p.requires_grad} == trained
    assert train(middle, 2)[-1] < losses[-1]
    freeze(model)
    assert torch.equal(output(model, "llama"), wanted)
    final = reloaded(model, tmp_path / "final")
    assert {layer.weight_state for layer in qlinears(final).values()} == {State.FROZEN}
    assert torch.equal(output(final, "llama"), wanted) and not final.hf_quantizer.quantization_config.qat
    stored = [p for layer in qlinears(final).values() for p in layer.parameters()]
    assert stored and not any(p.requires_grad for p in stored)


def test_the_first_loss_is_that_of_the_model_quantized_without_training(llama):
    trained = train(prepared(llama, activations="int8"), 1)[0]
    plain = load(llama, QuantoConfig("int4", activations="int8"))
    with torch.no_grad():
        assert float(plain(input_ids=tokens(), labels=tokens()).loss) == trained


@pytest.mark.parametrize("mode", ["checkpointing", "checkpointing-reentrant", "autocast"])
def test_modes_of_training(mode, llama):
    one, two = (prepared(llama, **WAYS["learned"]).train() for _ in range(2))
    if mode != "autocast":
        two.gradient_checkpointing_enable({"use_reentrant": "reentrant" in mode})
        two.enable_input_require_grads()
    with torch.autocast("cpu", dtype=torch.bfloat16, enabled=mode == "autocast"):
        loss = two(input_ids=tokens(), labels=tokens()).loss
    loss.backward()
    one(input_ids=tokens(), labels=tokens()).loss.backward()
    for (name, a), b in zip(one.named_parameters(), two.parameters(), strict=True):
        assert b.grad.dtype == b.dtype
        if mode == "autocast":
            assert b.grad.isfinite().all(), name
        else:
            torch.testing.assert_close(b.grad, a.grad, msg=name)


def test_the_trainer_trains_saves_and_resumes(tmp_path):
    data = [{"input_ids": row, "labels": row} for row in torch.randint(3, 2000, (8, 16))]

    def trainer(folder, steps):
        model = load(quanto_hf.tiny_lm(), QuantoConfig("int4", qat=True), dtype=torch.float32)
        arguments = transformers.TrainingArguments(
            str(folder), max_steps=steps, save_steps=2, per_device_train_batch_size=4, learning_rate=1e-4, use_cpu=True,
            report_to=[], disable_tqdm=True, logging_steps=1, seed=0, lr_scheduler_type="constant",
        )  # fmt: skip
        return transformers.Trainer(model, arguments, train_dataset=data)

    whole = trainer(tmp_path / "whole", 4)
    whole.train()
    losses = [entry["loss"] for entry in whole.state.log_history if "loss" in entry]
    assert len(losses) == 4 and losses[-1] < losses[0]
    resumed = trainer(tmp_path / "whole", 4)
    resumed.train(resume_from_checkpoint=str(tmp_path / "whole" / "checkpoint-2"))
    for (name, a), b in zip(whole.model.named_parameters(), resumed.model.parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-6, msg=name)
    batch = data[0]["input_ids"][None]
    saved = load(tmp_path / "whole" / "checkpoint-4").eval()
    with torch.no_grad():
        assert torch.equal(saved(batch).logits, whole.model.eval()(batch).logits)


# ------------------------------------------------------------------------------------------------------ calibration


def test_a_calibrated_model_is_bit_equal_in_a_new_process(llama, tmp_path):
    model = load(llama, QuantoConfig("int8", activations="int8"))
    dynamic = output(model, "llama")
    with Calibration(model):
        model.generate(tokens(), max_new_tokens=3, do_sample=False)
    wanted = output(model, "llama")
    assert not torch.equal(wanted, dynamic)
    model.save_pretrained(tmp_path)
    code = f"""
import torch, quanto_hf, transformers
model = transformers.AutoModelForCausalLM.from_pretrained({str(tmp_path)!r})
with torch.no_grad():
    torch.save(model(torch.tensor({tokens().tolist()})).logits, {str(tmp_path / "logits")!r})
"""
    subprocess.run([sys.executable, "-c", code], check=True)
    assert torch.equal(torch.load(tmp_path / "logits", weights_only=True), wanted)


def test_an_uncalibrated_static_model_is_saved_and_still_refuses_to_run(llama, tmp_path):
    model = reloaded(load(llama, QuantoConfig("int8", activations="int8", static_activations=True)), tmp_path)
    with pytest.raises(RuntimeError, match="was never calibrated"):
        output(model, "llama")
    assert output(calibrate(model, [{"input_ids": tokens()}], progress=False), "llama").isfinite().all()


@pytest.mark.parametrize("way", ["cpu", "disk"])
def test_accelerate_offload_before_and_after_calibration(way, llama, tmp_path):
    import accelerate

    def offload(model):
        if way == "cpu":
            return accelerate.cpu_offload(model, execution_device="cpu")
        return accelerate.disk_offload(model, tmp_path / str(len(list(tmp_path.iterdir()))), execution_device="cpu")

    config = QuantoConfig("int8", activations="int8")
    resident = calibrate(load(llama, config), [tokens()], progress=False)
    wanted = output(resident, "llama")
    assert torch.equal(output(offload(resident), "llama"), wanted)
    late = calibrate(offload(load(llama, config)), [tokens()], progress=False)
    assert torch.equal(output(late, "llama"), wanted)


def test_a_device_map_with_disk_before_and_after_calibration(llama, tmp_path):
    config = QuantoConfig("int8", activations="int8")
    places = {name: "disk" if name in ("model.layers.1", "lm_head") else "cpu" for name in LAYERS}
    resident = calibrate(load(llama, config), [tokens()], progress=False)
    wanted = output(resident, "llama")
    resident.save_pretrained(tmp_path / "saved")
    early = load(tmp_path / "saved", device_map=places, offload_folder=tmp_path / "one")
    assert torch.equal(output(early, "llama"), wanted)
    late = load(llama, config, device_map=places, offload_folder=tmp_path / "two")
    assert torch.equal(output(calibrate(late, [tokens()], progress=False), "llama"), wanted)
    assert torch.equal(output(reloaded(late, tmp_path / "again"), "llama"), wanted)


def partly_calibrated(model):
    with Calibration(model.model.layers[0]):
        model(tokens())


MIXED = {
    "partly-calibrated": (partly_calibrated, "with static scales of inputs.*calibrate the whole model"),
    "partly-frozen": (lambda model: freeze(model.model.layers[0]), r"prepared.* frozen; quanto_hf.freeze\(model\)"),
    "partly-learned": (lambda model: qlinears(model)["model.layers.0.mlp.up_proj"].learn_scales(), "learned scales"),
}


@pytest.mark.parametrize("change, text", MIXED.values(), ids=MIXED)
def test_what_could_not_be_loaded_is_not_saved(change, text, llama, tmp_path):
    model = load(llama, QuantoConfig("int8", activations="int8", qat=True))
    change(model)
    with pytest.raises(ValueError, match=f"a checkpoint has one kind of layers, but .*{text}"):
        model.save_pretrained(tmp_path)
    assert not any(file.suffix == ".safetensors" for file in tmp_path.iterdir())


# ------------------------------------------------------------------------------ a config for a quantized checkpoint


@pytest.fixture(scope="module")
def frozen(llama, tmp_path_factory):
    """A quantized checkpoint that was never calibrated."""
    folder = tmp_path_factory.mktemp("frozen")
    load(llama, QuantoConfig("int4", activations="int8")).save_pretrained(folder)
    return folder


@pytest.mark.parametrize("learn_scales", [False, True])
def test_training_of_packed_weights_is_refused(learn_scales, frozen):
    config = QuantoConfig("int4", activations="int8", qat=True, learn_scales=learn_scales)
    with pytest.raises(ValueError, match=r"packed ones, which are frozen.*dequantize=True\).*quanto_hf.quantize"):
        load(frozen, config)


def test_what_the_refusal_advises_works(frozen):
    model = quantize(load(frozen, QuantoConfig(dequantize=True)), "int4", "int8")
    assert {layer.weight_state for layer in qlinears(model).values()} == {State.PREPARED}
    losses = train(model)
    assert losses[-1] < losses[0]


@pytest.mark.parametrize("places", ["memory", "disk"])
def test_a_quantized_checkpoint_can_be_calibrated_with_static_scales(places, frozen, tmp_path):
    way, static = {"activations": "int8"}, QuantoConfig("int4", activations="int8", static_activations=True)
    options = {}
    if places == "disk":
        device_map = {name: "disk" if name == "model.layers.1" else "cpu" for name in LAYERS}
        options = {"device_map": device_map, "offload_folder": tmp_path / "offload"}
    model = load(frozen, static, **options)
    assert model.hf_quantizer.quantization_config.static_activations
    with pytest.raises(RuntimeError, match="was never calibrated"):
        output(model, "llama")
    calibrate(model, [tokens()], progress=False)
    # as if the same had been asked for without the flag, which calibration sets
    wanted = output(calibrate(load(frozen, QuantoConfig("int4", **way)), [tokens()], progress=False), "llama")
    assert torch.equal(output(model, "llama"), wanted)
    again = reloaded(model, tmp_path / "again")
    assert torch.equal(output(again, "llama"), wanted)
    # a config that says what is saved changes nothing
    assert torch.equal(output(load(tmp_path / "again", static), "llama"), wanted)


def test_learning_of_scales_begins_in_the_middle_of_training(llama, tmp_path):
    model = prepared(llama)
    train(model)
    wanted = output(model, "llama")
    model.save_pretrained(tmp_path / "middle")
    config = QuantoConfig("int4", qat=True, learn_scales=True)
    learning = load(tmp_path / "middle", config)
    assert all(layer.learns for layer in qlinears(learning).values())
    # the scales that the fit finds are where it begins
    assert torch.equal(output(learning, "llama"), wanted)
    names = [name for name, p in learning.named_parameters() if name.endswith("learned_scale") and p.requires_grad]
    before = {name: learning.get_parameter(name).detach().clone() for name in names}
    train(learning)
    assert names and all(not torch.equal(learning.get_parameter(name), before[name]) for name in names)
    wanted = output(learning, "llama")
    assert torch.equal(output(reloaded(learning, tmp_path / "again"), "llama"), wanted)
    assert torch.equal(output(load(tmp_path / "again", config), "llama"), wanted)


def test_both_begin_at_once(llama, tmp_path):
    prepared(llama, activations="int8").save_pretrained(tmp_path)
    way = {"activations": "int8", "static_activations": True, "learn_scales": True}
    model = calibrate(load(tmp_path, QuantoConfig("int4", qat=True, **way)), [tokens()], progress=False)
    assert torch.equal(output(model, "llama"), output(prepared(llama, **way), "llama"))


def test_one_graph_of_a_static_model_under_torch_compile():
    torch._dynamo.reset()
    model = lively(transformers.LlamaForCausalLM(llama_config(num_hidden_layers=1)))
    calibrate(freeze(quantize(model, "int8", "int8")), [tokens()], progress=False)
    wanted = output(model, "llama")
    with torch.no_grad():
        compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
        made = compiled(**TINY["llama"].inputs(), use_cache=False).logits
    torch.testing.assert_close(made, wanted, rtol=1e-3, atol=1e-3)


def test_the_verbs_work_on_a_loaded_model(llama, tmp_path):
    model = quantize(load(llama), "int8", "int8", static_activations=True, learn_scales=True)
    calibrate(model, [tokens()], progress=False)
    train(model, 1)
    wanted = output(model, "llama")
    assert torch.equal(output(reloaded(freeze(model), tmp_path), "llama"), wanted)
