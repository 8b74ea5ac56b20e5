"""Mixtures of experts from files: with a tensor for each expert, as most are published, and with fused ones."""

import json
import os
import subprocess
import sys

import pytest
import torch
import transformers as tf
from safetensors import safe_open

import quanto_hf
from quanto_hf import QuantoConfig, plan, report
from quanto_hf.hf.load.loading import quantize_into
from quanto_hf.hf.load.pieces import Pieces
from quanto_hf.io import CheckpointError
from quanto_hf.io.inventory import read_inventory
from quanto_hf.nn import QExperts, QLinear, qmodule_for
from quanto_hf.nn.qexperts import StackedExperts
from quanto_hf.schemes import Affine, make_scheme

TEXT = {"vocab_size": 96, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}
SHAPE = {
    "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "max_position_embeddings": 64,
}  # fmt: skip
CONFIGS = {
    "mixtral": lambda: tf.MixtralConfig(**TEXT, **SHAPE, num_local_experts=4),
    "qwen3_moe": lambda: tf.Qwen3MoeConfig(
        **TEXT, **SHAPE, head_dim=16, num_experts=6, num_experts_per_tok=3, moe_intermediate_size=32
    ),
    "gpt_oss": lambda: tf.GptOssConfig(**TEXT, **SHAPE, head_dim=16, num_local_experts=4, num_experts_per_tok=2),
}
IDS = torch.randint(3, 96, (2, 12), generator=torch.Generator().manual_seed(0))


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    made = {}
    for name, config in CONFIGS.items():
        torch.manual_seed(0)
        model = tf.AutoModelForCausalLM.from_config(config())
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.data.normal_(0, parameter.shape[-1] ** -0.5)
        made[name] = tmp_path_factory.mktemp(name)
        model.save_pretrained(made[name] / "published")
        model.save_pretrained(made[name] / "fused", save_original_format=False)
    return made


def load(folder, **options):
    return tf.AutoModelForCausalLM.from_pretrained(folder, **options).eval()


@torch.no_grad()
def answer(model, ids=IDS):
    return model(ids).logits


def names_in(folder):
    with safe_open(folder / "model.safetensors", "pt") as file:
        return sorted(file.keys())


def experts_of(model):
    return [module for module in model.modules() if isinstance(module, StackedExperts)]


@pytest.mark.parametrize("name", CONFIGS)
def test_both_kinds_of_files_give_the_same_packed_experts(folders, name):
    models = [load(folders[name] / files, quantization_config=QuantoConfig("int4")) for files in ("published", "fused")]
    one, other = (model.state_dict() for model in models)
    assert one.keys() == other.keys() and all(torch.equal(one[key], other[key]) for key in one)
    left = [
        row.name for row in report(models[0]).rows if row.reason and "experts" in row.name and "bias" not in row.name
    ]
    assert len(experts_of(models[0])) == 2 and not left
    plain = load(folders[name] / "published", quantization_config=QuantoConfig("int4", dequantize=True))
    assert float((answer(models[0]) - answer(plain)).norm() / answer(plain).norm()) < 1e-5
    for files in ("published", "fused"):
        assert plan(folders[name] / files, QuantoConfig("int4")).nbytes == models[0].get_memory_footprint()


@pytest.mark.parametrize("split", [False, True])
@pytest.mark.parametrize("name", ["mixtral", "qwen3_moe"])
def test_saved_fused_or_split_they_load_again_with_the_same_bits(folders, tmp_path, name, split):
    config = QuantoConfig("int8", overrides={"*.down_proj": {"weights": "int4"}}, split_experts=split)
    model = load(folders[name] / "published", quantization_config=config)
    model.save_pretrained(tmp_path / "saved")
    apart = [key for key in names_in(tmp_path / "saved") if ".experts.0." in key]
    assert len(apart) == (2 * (3 + 3 + 4) if split else 0)
    again = load(tmp_path / "saved")
    one, other = model.state_dict(), again.state_dict()
    assert one.keys() == other.keys() and all(torch.equal(one[key], other[key]) for key in one)
    again.save_pretrained(tmp_path / "twice")
    files = [(tmp_path / place / "model.safetensors").read_bytes() for place in ("saved", "twice")]
    assert files[0] == files[1]
    again.config.quantization_config.split_experts = not split
    again.save_pretrained(tmp_path / "other")
    assert bool([key for key in names_in(tmp_path / "other") if ".experts.0." in key]) is not split
    assert torch.equal(answer(load(tmp_path / "other")), answer(model))
    assert plan(tmp_path / "saved").nbytes == model.get_memory_footprint()


def test_experts_without_names_for_each_are_not_split(folders, tmp_path):
    model = load(folders["gpt_oss"] / "published", quantization_config=QuantoConfig("int8", split_experts=True))
    with pytest.raises(
        ValueError, match=r"split_experts=True: .*GptOssForCausalLM one tensor holds down_proj or gate_up"
    ):
        model.save_pretrained(tmp_path / "saved")
    assert not (tmp_path / "saved").exists()


@pytest.mark.parametrize("split", [False, True])
def test_inspect_reads_both_kinds(folders, tmp_path, split):
    model = load(folders["mixtral"] / "published", quantization_config=QuantoConfig("int4", split_experts=split))
    model.save_pretrained(tmp_path)
    rows = read_inventory(tmp_path).rows
    stored = {row.name: row for row in rows if "experts" in row.name}
    assert len(stored) == (2 * 4 * 3 if split else 2 * 2)
    assert {row.stored for row in stored.values()} == {"int4 g64 asym"}
    assert sum(row.nbytes for row in rows) == sum(tensor.nbytes for tensor in model.state_dict().values())


def test_a_float_model_made_of_a_packed_one_is_saved_like_the_original(folders, tmp_path):
    model = load(folders["mixtral"] / "published", quantization_config=QuantoConfig("int8"))
    wanted = answer(model)
    quanto_hf.dequantize(model).save_pretrained(tmp_path)
    assert names_in(tmp_path) == names_in(folders["mixtral"] / "published")
    torch.testing.assert_close(answer(load(tmp_path)), wanted)


def test_experts_that_were_quantized_in_memory_are_saved_and_load_again(folders, tmp_path):
    model = load(folders["mixtral"] / "published")
    del model._weight_conversions  # as of one that no file was read for
    quanto_hf.freeze(quanto_hf.quantize(model, "int8"))
    model.save_pretrained(tmp_path)
    assert experts_of(again := load(tmp_path)) and torch.equal(answer(again), answer(model))


def test_generate_answers_the_same_with_every_cache_and_implementation(folders):
    model = load(folders["qwen3_moe"] / "published", quantization_config=QuantoConfig("int4"))
    wanted = model.generate(IDS, max_new_tokens=5, do_sample=False)
    assert torch.equal(model.generate(IDS, max_new_tokens=5, do_sample=False, cache_implementation="static"), wanted)
    for implementation in ("eager", "batched_mm", "grouped_mm"):
        other = load(
            folders["qwen3_moe"] / "published",
            quantization_config=QuantoConfig("int4"),
            experts_implementation=implementation,
        )
        assert torch.equal(other.generate(IDS, max_new_tokens=5, do_sample=False), wanted)


@pytest.mark.parametrize("files", ["published", "fused"])
def test_experts_on_disk_answer_the_same(folders, tmp_path, files):
    wanted = answer(load(folders["mixtral"] / files, quantization_config=QuantoConfig("int4")))
    options = {"device_map": {"": "disk"}, "offload_folder": str(tmp_path / "off")}
    disk = load(folders["mixtral"] / files, quantization_config=QuantoConfig("int4"), **options)
    assert torch.equal(answer(disk), wanted)
    load(folders["mixtral"] / files, quantization_config=QuantoConfig("int4", split_experts=True)).save_pretrained(
        tmp_path / "split"
    )
    options["offload_folder"] = str(tmp_path / "off2")
    assert torch.equal(answer(load(tmp_path / "split", **options)), wanted)


def test_experts_are_read_and_quantized_one_after_the_other(folders, monkeypatch):
    shapes = []
    quantize = Affine.quantize
    monkeypatch.setattr(
        Affine,
        "quantize",
        lambda self, matrix, *rest: shapes.append(tuple(matrix.shape)) or quantize(self, matrix, *rest),
    )
    for files in ("published", "fused"):
        shapes.clear()
        load(folders["mixtral"] / files, quantization_config=QuantoConfig("int4"))
        stacks = [shape for shape in shapes if len(shape) == 3]
        assert sorted(stacks) == 8 * [(1, 64, 96)] + 8 * [(1, 192, 64)]


def test_a_checkpoint_that_lacks_an_expert_is_an_error(folders, tmp_path):
    from safetensors.torch import load_file, save_file

    tensors = load_file(folders["mixtral"] / "published" / "model.safetensors")
    (tmp_path / "config.json").write_bytes((folders["mixtral"] / "published" / "config.json").read_bytes())
    lost = "model.layers.1.block_sparse_moe.experts.2.w3.weight"
    save_file({k: v for k, v in tensors.items() if k != lost}, tmp_path / "model.safetensors", {"format": "pt"})
    text = r"model\.layers\.1\.mlp\.experts\.gate_up_proj is made of 4 tensors .*w3.weight, and the checkpoint has 3"
    with pytest.raises(CheckpointError, match=text):
        load(tmp_path, quantization_config=QuantoConfig("int8"))


def test_pieces_of_a_wrong_shape_are_named():
    module = tf.models.mixtral.modeling_mixtral.MixtralExperts(CONFIGS["mixtral"]())
    layer = qmodule_for(module).from_module(module, make_scheme("int8"))
    assert isinstance(layer, QExperts)
    for pieces, text in (
        ([torch.ones(1, 192, 64)] * 3, r"a\.gate_up_proj has shape pieces for 3 of 4 in the checkpoint"),
        ([torch.ones(1, 192, 64)] * 5, r"a\.gate_up_proj has shape those of pieces"),
        (
            [torch.ones(1, 191, 64)],
            r"the last one \(1, 191, 64\) in the checkpoint, but the model needs \(4, 192, 64\)",
        ),
    ):
        with pytest.raises(ValueError, match=text):
            quantize_into(layer, Pieces(pieces), "a.gate_up_proj")


PEAK = """
import json, sys, threading, time, torch, transformers
import quanto_hf
transformers.logging.disable_progress_bar()
def anonymous():
    return next(int(line.split()[1]) * 1024 for line in open("/proc/self/status") if line.startswith("RssAnon"))
peak, done = 0, False
def watch():
    global peak
    while not done:
        peak = max(peak, anonymous())
        time.sleep(0.001)
torch.ones(64, 64, dtype=torch.bfloat16) @ torch.ones(64, 64, dtype=torch.bfloat16)
found, cls = [], transformers.MixtralForCausalLM
for folder in sys.argv[1:]:
    before = peak = anonymous()
    done, thread = False, threading.Thread(target=watch)
    thread.start()
    config = quanto_hf.QuantoConfig("int4")
    model = cls.from_pretrained(folder, dtype=torch.bfloat16, quantization_config=config)
    done = True
    thread.join()
    found.append(peak - before - model.get_memory_footprint())
    del model
print(json.dumps(found))
"""


@pytest.mark.skipif(not os.path.exists("/proc/self/status"), reason="needs /proc")
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_loading_takes_the_packed_model_and_two_experts(tmp_path, dtype):
    # 6 MB an expert, 96 MB a layer, so that a layer of floats would be seen
    config = tf.MixtralConfig(
        vocab_size=96, hidden_size=512, intermediate_size=2048, num_hidden_layers=1, num_attention_heads=4,
        num_key_value_heads=2, num_local_experts=16,
    )  # fmt: skip
    model = tf.MixtralForCausalLM(config).to(dtype)
    model.save_pretrained(tmp_path / "published")
    model.save_pretrained(tmp_path / "fused", save_original_format=False)
    # a fused tensor of another dtype is converted by the loader, whole
    files = ["published", "fused"] if dtype == torch.bfloat16 else ["published"]
    command = [sys.executable, "-W", "ignore", "-c", PEAK, *(str(tmp_path / name) for name in files)]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    expert = 3 * 512 * 2048 * dtype.itemsize
    for over in json.loads(done.stdout.splitlines()[-1]):
        assert over < 2 * expert + (24 << 20)


def test_adapters_train_beside_packed_experts_and_none_on_them(folders):
    peft = pytest.importorskip("peft")
    model = load(folders["mixtral"] / "published", quantization_config=QuantoConfig("int4"))
    config = peft.LoraConfig(target_modules=["q_proj"], target_parameters=["mlp.experts.gate_up_proj"], r=4)
    with pytest.warns(
        UserWarning, match=r"gate_up_proj of the experts are packed \(int4 g64 asym\) and get no adapter"
    ):
        adapted = peft.get_peft_model(model, config)
    adapted(IDS, labels=IDS).loss.backward()
    trained = [name for name, parameter in adapted.named_parameters() if parameter.grad is not None]
    assert len(trained) == 4 and all("q_proj.lora" in name for name in trained)
    floats = QuantoConfig("int4", modules_to_not_convert=["experts"])
    adapted = peft.get_peft_model(load(folders["mixtral"] / "published", quantization_config=floats), config)
    assert any("experts.lora" in name for name, _ in adapted.named_parameters())


def test_a_router_stays_float_and_the_rest_is_packed(folders):
    model = load(folders["qwen3_moe"] / "published", quantization_config=QuantoConfig("int8"))
    assert not any(isinstance(layer.mlp.gate, QLinear) for layer in model.model.layers)
    floats = [
        name for name, p in model.named_parameters() if p.is_floating_point() and p.dim() > 1 and "scale" not in name
    ]
    assert sorted(name.rpartition(".")[0].rpartition(".")[2] for name in floats) == [
        "embed_tokens",
        "gate",
        "gate",
        "lm_head",
    ]
