"""Whole life of a model, for many architectures: quantized on the way in, run, saved, reloaded."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import transformers
from tiny_models import TINY, output, qlinears, relative, save, tokens
from torch import nn
from turns import in_turn

from quanto_hf import QuantoConfig, report

TYPES = ("int8", "int4", "int2", "float8", "nf4", "fp4")
HALF = {"bfloat16": torch.bfloat16, "float16": torch.float16}


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    """Folder of the float checkpoint of an architecture, made once."""
    made = {}

    def folder(name, dtype=torch.float32):
        if (name, dtype) not in made:
            made[name, dtype] = save(name, tmp_path_factory.mktemp(name), dtype)
        return made[name, dtype]

    return folder


def load(folder, name, weights, **kwargs):
    return TINY[name].cls.from_pretrained(folder, quantization_config=QuantoConfig(weights=weights), **kwargs)


@torch.no_grad()
def twin(model, folder, name, **kwargs):
    """The float model with the dequantized weights of a quantized one."""
    plain = TINY[name].cls.from_pretrained(folder, **kwargs)
    for layer_name, layer in qlinears(model).items():
        linear = plain.get_submodule(layer_name)
        assert type(linear) is nn.Linear and linear.weight.dtype == layer.weight.dtype
        linear.weight.copy_(layer.weight)
    return plain


def nbytes(tensors):
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors)


def formula(plain, model):
    """Bytes of parameters: the stored tensors of each quantized weight by its scheme, the float rest as it is."""
    layers = qlinears(model)
    stored = sum(
        layer.scheme.nbytes((layer.out_features, layer.in_features), layer.weight_dtype) for layer in layers.values()
    )
    return stored + nbytes(p for n, p in plain.named_parameters() if n.removesuffix(".weight") not in layers)


def data_bytes(folder):
    """Bytes of tensor data in the safetensors files of a folder."""
    files = list(Path(folder).glob("*.safetensors"))
    headers = sum(8 + int.from_bytes(file.read_bytes()[:8], "little") for file in files)
    return sum(file.stat().st_size for file in files) - headers, len(files)


@pytest.mark.parametrize("name, weights", in_turn(TINY, TYPES, 3))
def test_a_model_is_quantized_runs_saves_and_reloads(name, weights, checkpoint, tmp_path):
    folder = checkpoint(name)
    model = load(folder, name, weights)
    plain = twin(model, folder, name)

    assert len(qlinears(model)) == TINY[name].eligible
    rows = report(model).rows
    assert all((row.name.removesuffix(".weight") in qlinears(model)) == (row.reason == "") for row in rows)

    made, wanted = output(model, name), output(plain, name)
    assert wanted.std() > 0.1 and relative(made, wanted) < 2e-5

    buffers = list(model.buffers())
    assert model.get_memory_footprint() == formula(plain, model) + nbytes(buffers)

    model.save_pretrained(tmp_path)
    persistent = nbytes(t for n, t in model.state_dict().items() if n in dict(model.named_buffers()))
    assert data_bytes(tmp_path) == (formula(plain, model) + persistent, 1)
    assert torch.equal(output(TINY[name].cls.from_pretrained(tmp_path), name), made)


@pytest.mark.parametrize("name", TINY)
def test_nearly_all_bytes_of_linear_layers_are_quantized(name, checkpoint):
    plain = TINY[name].cls.from_pretrained(checkpoint(name))
    heads = {"lm_head", "classifier", "proj_out"}
    linears = {n: m.weight for n, m in plain.named_modules() if isinstance(m, nn.Linear) and n not in heads}
    quantized = qlinears(load(checkpoint(name), name, "int4"))
    assert nbytes(w for n, w in linears.items() if n in quantized) >= 0.95 * nbytes(linears.values())


@pytest.mark.parametrize("name", TINY)
def test_a_model_of_many_shards_reloads_bit_for_bit(name, checkpoint, tmp_path):
    save(name, tmp_path / "float", max_shard_size="40KB")
    model = load(tmp_path / "float", name, "int4")
    made = output(model, name)
    # sharding the float checkpoint does not change what is quantized
    assert torch.equal(output(load(checkpoint(name), name, "int4"), name), made)
    model.save_pretrained(tmp_path / "saved", max_shard_size="20KB")
    assert data_bytes(tmp_path / "float")[1] > 3 < data_bytes(tmp_path / "saved")[1]
    assert torch.equal(output(TINY[name].cls.from_pretrained(tmp_path / "saved"), name), made)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16", "auto"])
@pytest.mark.parametrize("name", TINY)
def test_every_float_dtype_works(name, dtype, checkpoint, tmp_path):
    folder = checkpoint(name, torch.bfloat16)
    model = load(folder, name, "int4", dtype=dtype)
    wanted_dtype = torch.bfloat16 if dtype == "auto" else getattr(torch, dtype)
    layer = next(iter(qlinears(model).values()))
    assert model.dtype == layer.weight.dtype == wanted_dtype
    made = output(model, name)
    assert made.dtype == wanted_dtype and torch.isfinite(made).all()
    # a few layers, each of which rounds to the mantissa of the dtype: 24, 8 and 11 bits
    limit = {torch.float32: 2e-5, torch.bfloat16: 5e-2, torch.float16: 6e-3}[wanted_dtype]
    assert relative(made, output(twin(model, folder, name, dtype=dtype), name)) < limit
    model.save_pretrained(tmp_path)
    reloaded = TINY[name].cls.from_pretrained(tmp_path)
    assert reloaded.dtype == wanted_dtype and torch.equal(output(reloaded, name), made)


@pytest.mark.parametrize("weights", TYPES)
def test_a_reload_in_another_dtype_keeps_the_stored_tensors(weights, checkpoint, tmp_path):
    model = load(checkpoint("llama"), "llama", weights)
    model.save_pretrained(tmp_path)
    for dtype in HALF.values():
        other = transformers.AutoModelForCausalLM.from_pretrained(tmp_path, dtype=dtype)
        state = other.state_dict()
        stored = {n: t for n, t in model.state_dict().items() if ".weight_" in n}
        assert all(state[n].dtype == t.dtype and torch.equal(state[n], t) for n, t in stored.items())
        assert relative(output(other, "llama"), output(model, "llama")) < 5e-2


@pytest.mark.parametrize("inside", HALF.values(), ids=HALF)
@pytest.mark.parametrize("name, weights", in_turn(["llama", "opt"], TYPES, 3))
def test_autocast_works(name, weights, inside, checkpoint):
    model = load(checkpoint(name), name, weights)
    wanted = output(model, name)
    with torch.autocast("cpu", dtype=inside):
        made = output(model, name)
        assert qlinear_dtype(model) == inside
    assert relative(made, wanted) < {torch.bfloat16: 5e-2, torch.float16: 6e-3}[inside]


def qlinear_dtype(model):
    layer = next(iter(qlinears(model).values()))
    return layer(torch.randn(2, layer.in_features)).dtype


@pytest.mark.parametrize("name, weights", in_turn([name for name, tiny in TINY.items() if tiny.generates], TYPES, 3))
def test_generate_gives_the_tokens_of_the_dequantized_model(name, weights, checkpoint):
    model = load(checkpoint(name), name, weights)
    arguments = {"max_new_tokens": 8, "min_new_tokens": 8, "do_sample": False, "input_ids": tokens()}
    made = model.generate(**arguments)
    assert torch.equal(made, twin(model, checkpoint(name), name).generate(**arguments))


@pytest.mark.parametrize("name", ["llama", "llama-tied"])
def test_a_saved_model_answers_the_same_in_a_new_process(name, checkpoint, tmp_path):
    answers = {}
    for weights in ("int8", "int4"):
        model = load(checkpoint(name), name, weights)
        model.save_pretrained(tmp_path / weights)
        answers[weights] = output(model, name)
        tied = model.lm_head.weight is model.model.embed_tokens.weight
        assert tied == (name == "llama-tied")
    torch.save({"inputs": TINY[name].inputs(), "answers": answers}, tmp_path / "answers.pt")
    code = (
        "import torch, transformers, quanto_hf\n"
        "torch.set_num_threads(2)\n"
        "torch.set_grad_enabled(False)\n"
        f"saved = torch.load({str(tmp_path / 'answers.pt')!r})\n"
        "for weights, wanted in saved['answers'].items():\n"
        f"    model = transformers.AutoModelForCausalLM.from_pretrained({str(tmp_path)!r} + '/' + weights)\n"
        "    tied = model.lm_head.weight is model.model.embed_tokens.weight\n"
        "    print(weights, torch.equal(model(**saved['inputs']).logits, wanted), tied)\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=os.environ)
    tied = name == "llama-tied"
    assert done.stdout.splitlines() == [f"int8 True {tied}", f"int4 True {tied}"], done.stderr


def test_a_quantized_layer_is_a_linear_layer_to_other_code(checkpoint):
    model = load(checkpoint("opt"), "opt", "int4")
    for layer in qlinears(model).values():
        assert isinstance(layer, nn.Linear)
        assert layer.weight.shape == (layer.out_features, layer.in_features)
        assert (layer.weight.dtype, layer.weight.device) == (torch.float32, layer.bias.device)
        x = torch.randn(3, layer.in_features)
        torch.testing.assert_close(layer(x), nn.functional.linear(x, layer.weight, layer.bias), rtol=1e-5, atol=1e-5)
