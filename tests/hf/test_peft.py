"""Adapters of the ``peft`` package on quantized models: trained, saved, loaded, off, and merged after dequantizing.

Row B5 of AQLM, and the same for the types of our own format.
"""

import copy
import importlib
import importlib.machinery
import importlib.util
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
import transformers as tf
from aqlm_models import LAYOUTS, Layout, logits, write
from taken_over import taken_over
from tiny_models import relative, save, tokens
from torch import nn

import quanto_hf
from quanto_hf import QLinear, QuantoConfig

peft = pytest.importorskip("peft")
lora = importlib.import_module("peft.tuners.lora")

# published AQLM layouts that "aqlm" loads, and types of our own format
PUBLISHED = {str(layout): layout for layout in (LAYOUTS[0], LAYOUTS[2], LAYOUTS[4])}
OURS = ("int8", "int4", "nf4", "aqlm-1x4")
every_kind = pytest.mark.parametrize("kind", [*PUBLISHED, *OURS])


@pytest.fixture(scope="module", autouse=True)
def served():
    """quanto_hf serves "aqlm" for these tests."""
    with taken_over("aqlm"):
        yield


@dataclass
class Checkpoints:
    """Folders that are made once."""

    place: Path

    def load(self, kind: str, dtype: torch.dtype = torch.float32, **config):
        """A quantized model in evaluation mode."""
        layout: Layout | None = PUBLISHED.get(kind)
        folder = self.place / (kind if layout else "float")
        if not folder.exists():
            write(folder, layout) if layout else save("llama", folder, torch.bfloat16)
        given = {} if layout else {"quantization_config": QuantoConfig(kind, **config)}
        return tf.AutoModelForCausalLM.from_pretrained(folder, dtype=dtype, **given)


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory):
    return Checkpoints(tmp_path_factory.mktemp("peft"))


def adapted(model, **config):
    """With an adapter on every linear layer but the head."""
    config = peft.LoraConfig(target_modules="all-linear", r=4, task_type="CAUSAL_LM", **config)
    return peft.get_peft_model(model, config)


def adapters(model):
    return {name: module for name, module in model.named_modules() if isinstance(module, lora.LoraLayer)}


def train(model, steps=4):
    """Losses before each step."""
    model.train()
    optimizer, losses = torch.optim.Adam([p for p in model.parameters() if p.requires_grad], 1e-2), []
    for _ in range(steps):
        loss = model(input_ids=tokens(), labels=tokens()).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    model.eval()
    return losses


def stored(model):
    """All that is no adapter."""
    return {name: tensor.clone() for name, tensor in model.state_dict().items() if "lora_" not in name}


def same(a, b):
    return a.keys() == b.keys() and all(torch.equal(a[n], b[n]) and a[n].dtype == b[n].dtype for n in a)


@every_kind
def test_b5_an_adapter_is_trained_saved_loaded_and_switched_off(kind, checkpoints, tmp_path):
    model = checkpoints.load(kind)
    plain = logits(model)
    tuned = adapted(model)
    # peft finds our layers as the linear layers that they are, and leaves the head alone
    found = adapters(tuned)
    assert len(found) == 14 and not any("lm_head" in name for name in found)
    assert all(type(module) is lora.Linear and isinstance(module.base_layer, QLinear) for module in found.values())
    assert all("lora_" in name for name, parameter in tuned.named_parameters() if parameter.requires_grad)
    assert torch.equal(logits(tuned), plain)

    before = stored(tuned)
    losses = train(tuned)
    assert losses[3] < losses[2] < losses[1] < losses[0] and losses[3] < 0.9 * losses[0]
    assert same(stored(tuned), before)
    after = logits(tuned)
    assert relative(after, plain) > 0.05
    with tuned.disable_adapter():
        assert torch.equal(logits(tuned), plain)

    tuned.save_pretrained(tmp_path)
    assert (tmp_path / "adapter_model.safetensors").stat().st_size < 100_000
    again = peft.PeftModel.from_pretrained(checkpoints.load(kind), tmp_path)
    assert torch.equal(logits(again), after)
    assert torch.equal(logits(tuned.unload()), plain)


MERGES = {
    "merge_and_unload": lambda model: model.merge_and_unload(),
    "safe": lambda model: model.merge_and_unload(safe_merge=True),
    "merge_adapter": lambda model: model.merge_adapter(),
}


@every_kind
def test_merging_is_refused_nothing_is_changed_and_what_the_error_says_works(kind, checkpoints):
    tuned = adapted(checkpoints.load(kind))
    train(tuned, 2)
    before, after = stored(tuned), logits(tuned)
    for merge in MERGES.values():
        with pytest.raises(RuntimeError, match=r"dequantize the model first.*adapters can be merged then"):
            merge(tuned)
        assert same(stored(tuned), before) and torch.equal(logits(tuned), after)
    other = copy.deepcopy(tuned)
    quanto_hf.dequantize(tuned)
    other.dequantize()
    for model in (tuned, other):
        merged = model.merge_and_unload()
        assert not any(isinstance(module, (QLinear, lora.LoraLayer)) for module in merged.modules())
        assert type(merged.model.layers[1].mlp.down_proj) is nn.Linear
        assert relative(logits(merged), after) <= 1e-5


@pytest.mark.parametrize("merge", MERGES.values(), ids=MERGES)
def test_a_merge_that_stops_at_a_quantized_layer_loses_nothing_of_the_float_ones(merge, checkpoints):
    tuned = adapted(checkpoints.load("int4", modules_to_not_convert=["layers.0"]))
    train(tuned, 2)
    after = logits(tuned)
    with pytest.raises(RuntimeError, match="dequantize the model first"):
        merge(tuned)
    # layer 0, which is float, has been merged by then
    assert relative(logits(tuned), after) <= 1e-5
    tuned.dequantize()
    assert relative(logits(tuned.merge_and_unload()), after) <= 1e-5


@pytest.mark.parametrize("kind", ["2x8g8", "int4"])
@pytest.mark.parametrize("config", [{"use_dora": True}, {"use_rslora": True}], ids=["dora", "rslora"])
def test_variants_train_in_bfloat16_with_gradient_checkpointing(kind, config, checkpoints):
    tuned = adapted(checkpoints.load(kind, torch.bfloat16), **config)
    tuned.base_model.model.gradient_checkpointing_enable()
    tuned.enable_input_require_grads()
    losses = train(tuned, 3)
    assert losses[2] < losses[1] < losses[0]


@pytest.mark.parametrize("start", ["pissa", "olora"])
def test_starts_that_take_the_adapter_out_of_the_weight_are_refused(start, checkpoints):
    model = checkpoints.load("int8")
    before = stored(model)
    with pytest.raises(RuntimeError, match="dequantize the model first"):
        adapted(model, init_lora_weights=start)
    assert same({name.replace("base_layer.", ""): tensor for name, tensor in stored(model).items()}, before)


@pytest.mark.parametrize("kind", ["2x8g8", "int4"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_preparing_for_kbit_training_changes_no_number_of_a_quantized_weight(kind, dtype, checkpoints):
    """peft converts the 16-bit scales of a method that it does not know to float32, which holds all their values."""
    model = checkpoints.load(kind, dtype)
    weights = [layer.dequantized().clone() for layer in model.modules() if isinstance(layer, QLinear)]
    model = peft.prepare_model_for_kbit_training(model)
    made = [layer.dequantized() for layer in model.modules() if isinstance(layer, QLinear)]
    assert len(made) == 14 and all(map(torch.equal, made, weights))
    assert not any(parameter.requires_grad for parameter in model.parameters())
    losses = train(adapted(model), 3)
    assert losses[2] < losses[1] < losses[0]


def test_the_methods_of_transformers_for_adapters_work(checkpoints, tmp_path):
    model = checkpoints.load("int8")
    plain = logits(model)
    model.add_adapter(peft.LoraConfig(target_modules="all-linear", r=4))
    losses = train(model, 3)
    assert losses[2] < losses[1] < losses[0]
    after = logits(model)
    model.disable_adapters()
    assert torch.equal(logits(model), plain)
    model.enable_adapters()
    model.save_pretrained(tmp_path)
    assert {path.name for path in tmp_path.iterdir()} >= {"adapter_config.json", "adapter_model.safetensors"}
    again = checkpoints.load("int8")
    again.load_adapter(str(tmp_path))
    assert torch.equal(logits(again), after)


def test_the_trainer_trains_an_adapter_on_a_quantized_model(checkpoints, tmp_path):
    tuned = adapted(checkpoints.load("2x8g8"))
    before = stored(tuned)
    rows = [{"input_ids": row, "labels": row} for row in tokens(8)]
    arguments = tf.TrainingArguments(
        str(tmp_path), max_steps=3, learning_rate=1e-2, logging_steps=1, report_to=[], save_strategy="no",
        use_cpu=True, disable_tqdm=True,
    )  # fmt: skip
    trainer = tf.Trainer(tuned, arguments, train_dataset=rows)
    trainer.train()
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    assert len(losses) == 3 and losses[2] < losses[0]
    assert same(stored(tuned), before)


# ----------------------------------------------------------------------------------------------- the aqlm package


class Stranger(nn.Module):
    """Stands for the class of the aqlm package where that is not installed."""


@pytest.fixture(params=["stands in", "installed"])
def package(request, monkeypatch):
    """peft believes that the aqlm package is installed, or it is."""
    if request.param == "installed":
        pytest.importorskip("aqlm", reason="the aqlm package is not installed")
        return
    for name in ("peft.tuners.lora.aqlm", "peft.utils.quantization_utils"):
        monkeypatch.setattr(importlib.import_module(name), "is_aqlm_available", lambda: True)
    monkeypatch.setattr(importlib.import_module("peft.tuners.lora.aqlm"), "QuantizedLinear", Stranger, raising=False)
    if importlib.util.find_spec("aqlm") is None:
        made = importlib.util.module_from_spec(importlib.machinery.ModuleSpec("aqlm", None))
        made.QuantizedLinear = Stranger
        monkeypatch.setitem(sys.modules, "aqlm", made)


@pytest.mark.filterwarnings("ignore")
def test_b5_where_peft_knows_the_aqlm_package_our_layers_are_still_linear_ones(package, checkpoints):
    """peft looks for the class of that package first."""
    dispatch = importlib.import_module("peft.tuners.lora.aqlm")
    assert dispatch.is_aqlm_available()
    model = checkpoints.load("2x8g8")
    tuned = adapted(model)
    assert {type(module) for module in adapters(tuned).values()} == {lora.Linear}
    losses = train(tuned, 3)
    assert losses[2] < losses[1] < losses[0]
    with pytest.raises(RuntimeError, match="dequantize the model first"):
        tuned.merge_and_unload()
