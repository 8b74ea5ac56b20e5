"""transformers' Trainer on a quantized model without adapters: it trains what is float."""

import copy
import gc
import pickle
import weakref

import pytest
import torch
import transformers as tf
from torch import nn
from torch.utils.data import Dataset

import quanto_hf
from quanto_hf import QuantoConfig, freeze

TEXTS = ("Return the number of items.", "The cat sleeps.", "Add two numbers.", "It rains in April.") * 4


class Lines(Dataset):
    """Texts with a class that a head can find: whether the text speaks of numbers."""

    def __init__(self):
        tokenizer = tf.AutoTokenizer.from_pretrained(quanto_hf.tiny_lm())
        self.rows = [
            {"input_ids": tokenizer(text, padding="max_length", max_length=12).input_ids, "labels": int("num" in text)}
            for text in TEXTS
        ]

    def __len__(self):
        return len(self.rows)

    def __getitem__(self, index):
        return {name: torch.tensor(value) for name, value in self.rows[index].items()}


def classifier(weights="int8", **kwargs):
    torch.manual_seed(0)
    return tf.AutoModelForSequenceClassification.from_pretrained(
        quanto_hf.tiny_lm(), dtype=torch.float32, num_labels=2, quantization_config=QuantoConfig(weights, **kwargs)
    )


def trainer(model, folder, **kwargs):
    arguments = {
        "report_to": [], "use_cpu": True, "max_steps": 12, "per_device_train_batch_size": 8, "learning_rate": 1e-2,
        "logging_steps": 1, "save_strategy": "no", "disable_tqdm": True, "seed": 0, **kwargs,
    }  # fmt: skip
    return tf.Trainer(model, tf.TrainingArguments(folder, **arguments), train_dataset=Lines())


def only(model, *names):
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(parameter.requires_grad and any(part in name for part in names))
    return model


def packed(model):
    return {name: tensor.clone() for name, tensor in model.state_dict().items() if ".weight_" in name}


def losses(run):
    return [entry["loss"] for entry in run.state.log_history if "loss" in entry]


@pytest.mark.parametrize("weights", ["int8", "int4"])
@pytest.mark.parametrize("what", [("score",), ("norm",), ("score", "norm", "embed")], ids="-".join)
def test_it_trains_the_float_parameters_that_want_it_and_nothing_else(weights, what, tmp_path):
    model = only(classifier(weights), *what)
    before, state = packed(model), copy.deepcopy(model.state_dict())
    run = trainer(model, tmp_path)
    run.train()
    assert sum(losses(run)[-3:]) < 0.8 * sum(losses(run)[:3])
    assert all(torch.equal(model.state_dict()[name], tensor) for name, tensor in before.items())
    changed = {name for name, tensor in model.state_dict().items() if not torch.equal(tensor, state[name])}
    assert changed and changed <= {name for name, p in model.named_parameters() if p.requires_grad}


def test_a_checkpoint_reloads_and_a_resumed_run_ends_where_the_straight_one_does(tmp_path):
    straight = only(classifier(), "score", "norm")
    trainer(straight, tmp_path / "a", save_strategy="steps", save_steps=6).train()
    resumed = only(classifier(), "score", "norm")
    trainer(resumed, tmp_path / "b", save_strategy="steps", save_steps=6).train(
        resume_from_checkpoint=tmp_path / "a" / "checkpoint-6"
    )
    made = tf.AutoModelForSequenceClassification.from_pretrained(tmp_path / "a" / "checkpoint-12")
    for name, tensor in straight.state_dict().items():
        assert torch.equal(made.state_dict()[name], tensor), name
        torch.testing.assert_close(resumed.state_dict()[name], tensor, rtol=1e-5, atol=1e-6, msg=name)


def test_it_is_refused_where_nothing_can_be_trained_at_the_time(tmp_path):
    model = classifier()
    assert model.hf_quantizer.is_qat_trainable
    model.requires_grad_(False)
    with pytest.raises(ValueError, match="You cannot perform fine-tuning on purely quantized models"):
        trainer(model, tmp_path)
    model.score.requires_grad_(True)
    trainer(model, tmp_path, max_steps=1).train()


def test_packed_weights_are_never_trained(tmp_path):
    model = classifier("int4").requires_grad_(False)
    assert not any(p.requires_grad for p in model.parameters())
    for parameter in only(classifier(), "score").parameters():
        assert not parameter.requires_grad or parameter.is_floating_point()
    assert not model.hf_quantizer.is_qat_trainable


@pytest.mark.parametrize("way", ["from_pretrained", "quantize", "reloaded"])
def test_every_way_to_a_quantized_model_can_be_trained(way, tmp_path):
    if way == "quantize":
        model = tf.AutoModelForSequenceClassification.from_pretrained(quanto_hf.tiny_lm(), dtype=torch.float32)
        freeze(quanto_hf.quantize(model, "int8", exclude="score"))
    else:
        model = classifier()
    if way == "reloaded":
        model.save_pretrained(tmp_path / "saved")
        model = tf.AutoModelForSequenceClassification.from_pretrained(tmp_path / "saved")
    trainer(only(model, "score"), tmp_path / "run", max_steps=1).train()


@pytest.mark.parametrize(
    "how", [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))], ids=["copy", "pickle"]
)
def test_a_copy_answers_for_itself(how):
    model = classifier()
    twin = how(model)
    model.requires_grad_(False)
    assert twin.hf_quantizer.owner is twin and model.hf_quantizer.owner is model
    assert twin.hf_quantizer.is_qat_trainable and not model.hf_quantizer.is_qat_trainable


def test_the_quantizer_does_not_keep_the_model():
    model = classifier()
    quantizer, gone = model.hf_quantizer, weakref.ref(model)
    del model
    gc.collect()
    assert gone() is None and quantizer.owner is None and not quantizer.is_qat_trainable
    assert copy.deepcopy(quantizer).owner is None and pickle.loads(pickle.dumps(quantizer)).owner is None


def test_a_model_of_ones_own_around_a_quantized_backbone_trains_its_head(tmp_path):
    class Head(nn.Module):
        def __init__(self):
            super().__init__()
            self.backbone = tf.AutoModel.from_pretrained(
                quanto_hf.tiny_lm(), dtype=torch.float32, quantization_config=QuantoConfig("int4")
            ).requires_grad_(False)
            self.head = nn.Linear(384, 2)

        def forward(self, input_ids, labels):
            logits = self.head(self.backbone(input_ids).last_hidden_state.mean(1))
            return {"loss": nn.functional.cross_entropy(logits, labels), "logits": logits}

    run = trainer(Head(), tmp_path)
    run.train()
    assert sum(losses(run)[-3:]) < 0.8 * sum(losses(run)[:3])
