"""Where every addition has to arrive: quantize, from_pretrained, save, reload in a new process, plan, report, inspect
and disk offload. As a program it is the part in the new process, which knows of the addition by importing its file."""

import copy
import importlib
import json
import os
import subprocess
import sys
from contextlib import contextmanager
from pathlib import Path

import torch
import transformers as tf
from tiny_models import qlinears, save, tokens
from torch import nn
from typer.testing import CliRunner

from quanto_hf import QuantoConfig, freeze, plan, qtypes, quantize, report
from quanto_hf.cli.app import app
from quanto_hf.fit import FITS
from quanto_hf.io.inventory import read_inventory
from quanto_hf.qtypes import QTYPES
from quanto_hf.schemes import SCHEMES

TESTS = Path(__file__).parent.parent
REGISTRIES = (QTYPES, qtypes._ALIASES, SCHEMES, FITS)


@contextmanager
def added(add):
    """What was added is known inside, and to no other test."""
    before = [dict(registry) for registry in REGISTRIES]
    try:
        yield add()
    finally:
        for registry, entries in zip(REGISTRIES, before, strict=True):
            registry.clear()
            registry.update(entries)


@torch.no_grad()
def answer(model):
    """The logits for fixed tokens."""
    return model(tokens()).logits


def relative(made, wanted):
    return float((made.double() - wanted.double()).norm() / wanted.double().norm())


def plain_model(config, most, bits):
    """A plain torch model: prepared, trained for a step, frozen, reported.

    Args:
        config: arguments of ``quantize``.
        most: error of a weight that is allowed.
        bits: per weight, as the report has them.
    """
    model = nn.Sequential(nn.Linear(128, 96), nn.ReLU(), nn.Linear(96, 64))
    exact, x = copy.deepcopy(model), torch.randn(5, 128)
    quantize(model, **config)
    prepared = model(x)
    prepared.square().mean().backward()
    assert model[0].weight.grad is not None
    freeze(model)
    assert torch.equal(model(x), prepared)
    rows = [row for row in report(model, exact).rows if not row.reason]
    assert [row.name for row in rows] == ["0.weight", "2.weight"]
    assert all(0 < row.error <= most for row in rows) and abs(rows[0].bits - bits) < 1e-6


def transformers_model(recipe, config, folder, stored):
    """A model of transformers, quantized on loading, and the rest in a new process.

    Args:
        recipe: the name of the module of the addition, which has ``add()``.
        config: arguments of a QuantoConfig.
        folder: an empty one.
        stored: how its weights are stored, in words.
    """
    source = save("llama", folder / "float")
    model = tf.LlamaForCausalLM.from_pretrained(source, quantization_config=QuantoConfig(**config))
    assert {str(layer.scheme) for layer in qlinears(model).values()} == {stored}
    (folder / "wanted").mkdir()
    torch.save(answer(model), folder / "wanted" / "logits.pt")
    model.save_pretrained(folder / "saved")
    expected = {
        "planned": plan(str(source), QuantoConfig(**config)).nbytes,
        "footprint": model.get_memory_footprint(),
        "report": sum(row.nbytes for row in report(model).rows),
        "stored": stored,
    }
    assert expected["planned"] == expected["footprint"]
    paths = [str(TESTS), *filter(None, [os.environ.get("PYTHONPATH")])]
    done = subprocess.run(
        [sys.executable, __file__, recipe, str(folder), json.dumps(expected)],
        capture_output=True, text=True, env={**os.environ, "PYTHONPATH": os.pathsep.join(paths)},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr


def in_a_new_process(folder, expected):
    """The saved model, as one who knows the addition finds it."""
    saved, wanted = folder / "saved", torch.load(folder / "wanted" / "logits.pt")
    model = tf.LlamaForCausalLM.from_pretrained(saved)
    assert {str(layer.scheme) for layer in qlinears(model).values()} == {expected["stored"]}
    assert torch.equal(answer(model), wanted)
    table = report(model)
    assert sum(row.nbytes for row in table.rows) == expected["report"] and expected["stored"] in str(table)
    assert plan(str(saved)).nbytes == expected["footprint"] == model.get_memory_footprint()
    assert plan(model).nbytes == expected["footprint"]
    inventory = read_inventory(saved)
    (item,) = [item for item in inventory.grouped() if item.stored == expected["stored"]]
    layers = qlinears(model)
    assert item.count == len(layers)
    assert item.parameters == sum(layer.in_features * layer.out_features for layer in layers.values())
    offload = {"device_map": {"": "disk"}, "offload_folder": str(folder / "offload")}
    assert torch.equal(answer(tf.LlamaForCausalLM.from_pretrained(saved, **offload)), wanted)
    # quantized on the way to the disk
    asked = json.loads((saved / "config.json").read_text())["quantization_config"]
    listed = CliRunner().invoke(app, ["kernels", "--weights", asked["weights"], "--features", "96x160"])
    assert listed.exit_code == 0 and expected["stored"] in listed.stdout, listed.output
    again = QuantoConfig(asked["weights"], group_size=asked["group_size"], fit=asked["fit"])
    offload["offload_folder"] = str(folder / "offload-2")
    made = tf.LlamaForCausalLM.from_pretrained(folder / "float", quantization_config=again, **offload)
    assert torch.equal(answer(made), wanted)


if __name__ == "__main__":
    torch.set_num_threads(2)
    importlib.import_module(sys.argv[1]).add()
    in_a_new_process(Path(sys.argv[2]), json.loads(sys.argv[3]))
