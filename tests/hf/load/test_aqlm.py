"""Models in the published AQLM format: loaded, run, trained around and saved, all without the ``aqlm`` package.

The rows B1, B2 ... are those of the feature list; B3 and the gradients of B5 are in tests/ops/test_aqlm.py.
"""

import importlib
import importlib.util
import json
import sys

import pytest
import torch
import transformers as tf
from aqlm_models import LAYOUTS, Layout, linears, logits, write
from forked import Program, run_all
from safetensors.torch import load_file, save_file
from tiny_models import build, relative, save, tokens
from torch import nn
from transformers.quantizers import auto

import quanto_hf
from quanto_hf import AqlmConfig, CheckpointError, QuantoConfig, plan, replace_with_aqlm_linear, report
from quanto_hf.nn import QuantizedLinear

every_layout = pytest.mark.parametrize("layout", LAYOUTS, ids=str)


@pytest.fixture(autouse=True)
def taken_over(monkeypatch):
    """quanto_hf serves "aqlm" for one test."""
    monkeypatch.setattr(importlib.import_module("quanto_hf.hf.load.register"), "_overrides", set())
    for mapping in (auto.AUTO_QUANTIZER_MAPPING, auto.AUTO_QUANTIZATION_CONFIG_MAPPING):
        monkeypatch.setitem(mapping, "aqlm", mapping["aqlm"])
    quanto_hf.install(override="aqlm")


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory):
    """Folder and dense twin of each layout, made once."""
    made = {}

    def get(layout=LAYOUTS[2], name="llama", **how):
        if (layout, name) not in made:
            folder = tmp_path_factory.mktemp(f"{layout}-{name}")
            made[layout, name] = folder, write(folder, layout, name=name, **how)
        return made[layout, name]

    return get


def load(folder, dtype=torch.float32, auto_class=tf.AutoModelForCausalLM, **kwargs):
    return auto_class.from_pretrained(folder, dtype=dtype, **kwargs)


def layers(model):
    return {name: module for name, module in model.named_modules() if isinstance(module, QuantizedLinear)}


# ----------------------------------------------------------------------------------------------------- B1: replacing


@pytest.mark.parametrize("head", ["lm_head.weight", "lm_head"])
@pytest.mark.parametrize("given", ["argument", "config"])
def test_b1_a_layer_stays_float_by_the_name_of_its_parameter_and_by_its_own(head, given):
    with torch.device("meta"):
        model = build("llama").to("meta")
    names, config = [linear for linear, _ in linears(model)], {"num_codebooks": 2, "nbits_per_codebook": 8}
    if given == "config":
        made, replaced = replace_with_aqlm_linear(model, AqlmConfig(**config, linear_weights_not_to_quantize=[head]))
    else:
        made, replaced = replace_with_aqlm_linear(model, AqlmConfig(**config), [head])
    assert made is model and replaced is True
    assert type(model.lm_head) is nn.Linear
    assert list(layers(model)) == names
    for layer in layers(model).values():
        assert layer.source_cls is nn.Linear and isinstance(layer, nn.Linear)
        assert {p.device.type for p in layer.parameters()} == {"meta"}
        assert not any(p.requires_grad for p in layer.parameters())


def test_b1_names_refer_to_the_whole_model_also_where_a_part_of_it_is_given():
    model = build("llama")
    config = tf.AqlmConfig(num_codebooks=2, nbits_per_codebook=8)
    kept = ["model.layers.0.mlp.down_proj.weight", "model.layers.1.self_attn.q_proj.bias"]
    replace_with_aqlm_linear(model.model, config, kept, current_key_name=["model"])
    plain = [name for name, module in model.model.named_modules() if type(module) is nn.Linear]
    # a bias that is float does not keep its layer float
    assert plain == ["layers.0.mlp.down_proj"]


@pytest.mark.parametrize("before", [False, True])
def test_b1_nothing_to_replace_is_said(before):
    model = nn.Sequential(nn.LayerNorm(8))
    with pytest.warns(UserWarning, match="no linear layer"):
        assert replace_with_aqlm_linear(model, AqlmConfig(), has_been_replaced=before) == (model, before)


OWN_CONFIG = """
import sys, torch, quanto_hf, transformers
from quanto_hf import AqlmConfig, QuantoConfig
load = transformers.AutoModelForCausalLM.from_pretrained
config = dict(num_codebooks=1, nbits_per_codebook=4)
made = load(quanto_hf.tiny_lm(), quantization_config=AqlmConfig(**config))
made.save_pretrained(sys.argv[1])
again = load(sys.argv[1], quantization_config=AqlmConfig(**config))
ids = torch.arange(8)[None]
assert torch.equal(made(ids).logits, again(ids).logits)
assert type(again.config.quantization_config) is AqlmConfig
for wrong in (AqlmConfig(), QuantoConfig("int4"), AqlmConfig(**config, linear_weights_not_to_quantize=["lm_head"])):
    try:
        load(sys.argv[1], quantization_config=wrong)
    except Exception as error:
        print(type(error).__name__, error)
"""
SHOW = "import transformers.quantizers.auto as a; print(a.AUTO_QUANTIZER_MAPPING['aqlm'].__module__)"
TAKE_OVER = f"import quanto_hf; {SHOW}; quanto_hf.install(override='aqlm'); {SHOW}"


@pytest.fixture(scope="module")
def done(tmp_path_factory):
    """What became of two programs, each in a process of its own."""
    folder = str(tmp_path_factory.mktemp("own"))
    programs = {"take over": Program(TAKE_OVER), "own config": Program(OWN_CONFIG, {}, [folder])}
    return dict(zip(programs, run_all(list(programs.values())), strict=True))


def test_b1_transformers_keeps_its_own_method_until_it_is_taken_over(done):
    done = done["take over"]
    assert done.returncode == 0, done.stderr
    assert done.stdout.split() == ["transformers.quantizers.quantizer_aqlm", "quanto_hf.hf.load.aqlm"]


def test_b1_our_config_means_us_without_taking_the_method_over(done):
    done = done["own config"]
    assert done.returncode == 0, done.stderr
    first, second, third = done.stdout.splitlines()
    assert first.startswith(
        "ValueError the checkpoint is quantized already, with nbits_per_codebook=4 (you gave 16). Load it without"
    )
    assert second.startswith(
        "ValueError the checkpoint is quantized already, with aqlm; load it without a QuantoConfig"
    )
    assert (
        "linear_weights_not_to_quantize=['model.embed_tokens.weight', " in third and "(you gave ['lm_head'])" in third
    )


def test_b1_our_config_plans_a_float_model_without_being_taken_over(tmp_path, monkeypatch):
    from transformers.quantizers.quantizer_aqlm import AqlmHfQuantizer

    monkeypatch.setitem(auto.AUTO_QUANTIZER_MAPPING, "aqlm", AqlmHfQuantizer)
    config = AqlmConfig(num_codebooks=1, nbits_per_codebook=4)
    found = plan(quanto_hf.tiny_lm(), config)
    assert found.nbytes < plan(quanto_hf.tiny_lm(), QuantoConfig("int2")).nbytes
    model = tf.AutoModelForCausalLM.from_pretrained(quanto_hf.tiny_lm(), quantization_config=config)
    assert plan(model, config).nbytes == found.nbytes
    with pytest.raises(ValueError, match="quantized already, with another method"):
        plan(model, QuantoConfig("int4"))


# ------------------------------------------------------------------------------------------------------- B2: loading


@every_layout
@pytest.mark.parametrize("dtype, bound", [(torch.float32, 1e-5), (torch.bfloat16, 1e-2)], ids=["fp32", "bf16"])
def test_b2_every_published_layout_gives_the_logits_of_its_dense_twin(layout, dtype, bound, checkpoints, monkeypatch):
    monkeypatch.setitem(sys.modules, "aqlm", None)  # importing it is an error, as where it is not installed
    folder, dense = checkpoints(layout)
    model = load(folder, dtype)
    assert len(layers(model)) == 14 and type(model.lm_head) is nn.Linear
    assert relative(logits(model), logits(dense)) <= bound


def test_b2_biases_and_a_head_with_codes_are_loaded(checkpoints):
    folder, dense = checkpoints(Layout(2, 8), "gpt-neox", head=True)
    model = load(folder)
    assert isinstance(model.get_output_embeddings(), QuantizedLinear)
    assert all(layer.bias is not None for name, layer in layers(model).items() if "attention" in name)
    assert relative(logits(model), logits(dense)) <= 1e-5


def test_b2_the_dtype_of_the_files_is_kept_where_the_model_has_another(checkpoints):
    folder, _ = checkpoints()
    saved = load_file(folder / "model.safetensors")
    for dtype in ("auto", torch.float32, torch.bfloat16):
        model = load(folder, dtype)
        assert model.dtype == (torch.float16 if dtype == "auto" else dtype)
        state = model.state_dict()
        assert all(
            torch.equal(state[name], t) and state[name].dtype == t.dtype for name, t in saved.items() if "proj" in name
        )


def test_b2_a_model_without_the_head_loads_the_same_checkpoint(checkpoints):
    folder, dense = checkpoints()
    model = load(folder, auto_class=tf.AutoModel)
    assert len(layers(model)) == 14
    with torch.no_grad():
        made, wanted = (m(input_ids=tokens()).last_hidden_state for m in (model, dense.model))
    assert relative(made, wanted) <= 1e-5


# -------------------------------------------------------------------------------------------------- B4: codes stay


@pytest.mark.parametrize("layout", LAYOUTS[:5], ids=str)
def test_b4_a_forward_pass_changes_no_byte_and_saving_gives_the_same_file(layout, checkpoints, tmp_path):
    folder, _ = checkpoints(layout)
    model = load(folder, "auto")
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    first = logits(model)
    with torch.no_grad():
        model(input_ids=tokens(1, 1))
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    model.save_pretrained(tmp_path)
    saved, original = load_file(tmp_path / "model.safetensors"), load_file(folder / "model.safetensors")
    assert saved.keys() == original.keys()
    assert all(torch.equal(saved[name], t) and saved[name].dtype == t.dtype for name, t in original.items())
    config, given = (json.loads((f / "config.json").read_text())["quantization_config"] for f in (tmp_path, folder))
    assert config == given
    assert torch.equal(logits(load(tmp_path, "auto")), first)


# --------------------------------------------------------------------------------------------------------- B5: LoRA


class Adapter(nn.Module):
    """A linear layer with a low-rank addition, as PEFT makes it: it knows a layer by its features and its weight."""

    def __init__(self, base: nn.Linear):
        super().__init__()
        self.base = base
        self.down = nn.Parameter(torch.randn(4, base.in_features, dtype=base.weight.dtype) * 0.1)
        self.up = nn.Parameter(torch.zeros(base.out_features, 4, dtype=base.weight.dtype))

    def forward(self, x):
        return self.base(x) + x @ self.down.T @ self.up.T


@pytest.mark.parametrize("layout", [LAYOUTS[0], LAYOUTS[2], LAYOUTS[4]], ids=str)
def test_b5_adapters_in_every_layer_are_trained_and_the_loss_falls(layout, checkpoints):
    model = load(checkpoints(layout)[0]).requires_grad_(False).train()
    codes = {name: tensor.clone() for name, tensor in model.state_dict().items() if "proj." in name}
    for name, layer in layers(model).items():
        model.set_submodule(name, Adapter(layer))
    adapters = [p for p in model.parameters() if p.requires_grad]
    optimizer, losses = torch.optim.Adam(adapters, 1e-2), []
    for _ in range(3):
        loss = model(input_ids=tokens(), labels=tokens()).loss
        optimizer.zero_grad()
        loss.backward()
        assert all(p.grad is not None and torch.isfinite(p.grad).all() for p in adapters)
        optimizer.step()
        losses.append(loss.item())
    assert losses[2] < losses[1] < losses[0]
    state = {name.replace("base.", ""): tensor for name, tensor in model.state_dict().items()}
    assert all(torch.equal(state[name], tensor) for name, tensor in codes.items())


# -------------------------------------------------------------------------------------------------------- B7: memory


def test_b7_a_loaded_layer_holds_what_its_scheme_says_and_no_float_weight_after_use(checkpoints):
    model = load(checkpoints()[0])
    logits(model)
    for layer in layers(model).values():
        held = sum(t.nbytes for t in layer.tensors().values())
        assert held == layer.scheme.nbytes((layer.out_features, layer.in_features), torch.float16)
        kept = [value for value in vars(layer).values() if isinstance(value, torch.Tensor)]
        assert kept == [] and list(layer.state_dict()) == ["codes", "codebooks", "scales"]


def test_b7_offloaded_layers_are_used_where_they_lie_and_a_plan_knows_their_bytes(checkpoints, tmp_path):
    folder, _ = checkpoints()
    places = {"model.embed_tokens": "cpu", "model.rotary_emb": "cpu", "model.norm": "cpu", "lm_head": "cpu",
              "model.layers.0": "cpu", "model.layers.1": "disk"}  # fmt: skip
    model = load(folder, "auto", device_map=places, offload_folder=tmp_path)
    assert relative(logits(model), logits(load(folder, "auto"))) == 0.0
    found = plan(folder, device_map=places)
    assert found.quantized and found.weights == "aqlm-2x8"
    disk = next(device for device in found.devices if device.device == "disk")
    held = sum(t.nbytes for t in model.model.layers[1].state_dict().values())
    assert disk.weights == held
    assert auto.AUTO_QUANTIZER_MAPPING["aqlm"].__name__ == "AqlmQuantizer"


# -------------------------------------------------------------------------------------------------- B10: honest size


def test_b10_bits_per_weight_count_codebooks_and_scales_in_report_plan_and_config(checkpoints):
    folder, _ = checkpoints(Layout(2, 8))
    model = load(folder, "auto")
    row = next(row for row in report(model).rows if row.name == "model.layers.0.self_attn.q_proj.weight")
    # 64 x 64: 2 codes of 8 bits for 8 weights, 2 codebooks of 256 x 8 halves, a half for each row of 64
    assert row.bits == 2 * 8 / 8 + 2 * 256 * 8 * 16 / 64**2 + 16 / 64
    assert row.stored == "aqlm 2x8 g8"
    assert "codebooks of 14 AQLM layers take more than 0.5 bits per weight, at most 32.0" in str(report(model))
    assert any("at most 32.0" in note for note in plan(folder).notes)


@pytest.mark.parametrize("size, warned", [((4096, 4096), False), ((1024, 1024), True)], ids=["as-published", "small"])
def test_b10_codebooks_that_cost_more_than_half_a_bit_are_warned_of(size, warned, recwarn):
    from quanto_hf.flow import Assignment, Choice, warn_of_notes

    with torch.device("meta"):
        model = nn.Sequential(nn.Linear(*size, dtype=torch.float16))
    warn_of_notes(model, Assignment({"0": Choice("aqlm-1x16")}))
    said = [str(warning.message) for warning in recwarn]
    assert len(said) == warned
    assert not warned or "at most 8.0 (0: 10.02 bits in all)" in said[0]


# --------------------------------------------------------------------------------------------------- B11: compiled


def test_b11_one_graph_for_all_lengths_gives_what_runs_without_it(checkpoints):
    model = load(checkpoints()[0])
    layer = model.model.layers[0].mlp.down_proj
    compiled = torch.compile(layer, fullgraph=True, dynamic=True, backend="aot_eager")
    for rows in (1, 3, 17):
        x = torch.randn(2, rows, layer.in_features)
        with torch.no_grad():
            assert torch.equal(compiled(x), layer(x))
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    with torch.no_grad():
        assert relative(compiled(input_ids=tokens()).logits, logits(model)) <= 1e-6


# ------------------------------------------------------------------------------------------------------ B12: errors


def test_b12_the_config_is_that_of_transformers():
    mine, theirs = AqlmConfig().to_dict(), tf.AqlmConfig().to_dict()
    assert mine == {**theirs, "quant_method": "aqlm"}
    for name in ("in_group_size", "out_group_size", "num_codebooks", "nbits_per_codebook"):
        for cls in (AqlmConfig, tf.AqlmConfig):
            with pytest.raises(TypeError, match=f"{name} must be an int"):
                cls(**{name: "8"})
    for cls in (AqlmConfig, tf.AqlmConfig):
        with pytest.raises(ValueError, match="linear_weights_not_to_quantize must be a list of strings"):
            cls(linear_weights_not_to_quantize="lm_head")
    with pytest.raises(ValueError, match="nbits=0"):
        AqlmConfig(nbits_per_codebook=0)


def test_b12_a_layer_that_cannot_be_cut_into_blocks_is_named_and_nothing_is_changed():
    model = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 12), nn.Linear(12, 8))
    with pytest.raises(ValueError) as caught:
        replace_with_aqlm_linear(model, AqlmConfig(out_group_size=8))
    assert "1: out_features=12 is not a multiple of the 8" in str(caught.value)
    assert "2: in_features=12 is not a multiple of the 8" in str(caught.value)
    assert [type(module) for module in model] == [nn.Linear] * 3


DAMAGE = {
    "dtype": lambda t: t.to(torch.int16),
    "shape": lambda t: t[:, :-1].contiguous(),
    "missing": lambda t: None,
}


@pytest.mark.parametrize("damage", DAMAGE.values(), ids=DAMAGE)
def test_b12_a_wrong_tensor_is_named_before_anything_is_loaded(damage, checkpoints, tmp_path):
    folder, _ = checkpoints()
    state, name = load_file(folder / "model.safetensors"), "model.layers.1.mlp.up_proj.codes"
    state[name] = damage(state[name])
    save_file({key: t for key, t in state.items() if t is not None}, tmp_path / "model.safetensors", {"format": "pt"})
    (tmp_path / "config.json").write_text((folder / "config.json").read_text())
    with pytest.raises(CheckpointError) as caught:
        load(tmp_path)
    assert name in str(caught.value) and str(caught.value).count("model.layers") == 1


def test_b12_a_quantized_checkpoint_is_not_quantized_again(checkpoints):
    with pytest.raises(ValueError, match="quantized already, with aqlm"):
        load(checkpoints()[0], quantization_config=QuantoConfig("int4"))


# ------------------------------------------------------------------------------------------- making, with the scheme


@pytest.mark.parametrize("weights, group", [("aqlm-2x8", None), ("aqlm-1x4", 16)])
def test_a_config_names_a_layout(weights, group):
    config = QuantoConfig(weights=weights, group_size=group)
    scheme = config.choice().scheme()
    assert f"aqlm-{scheme.num_codebooks}x{scheme.nbits}" == weights and scheme.in_group == (group or 8)
    assert QuantoConfig.from_dict(config.to_dict()) == config
    assert config.conflicts(QuantoConfig(weights=weights, group_size=group)) == []
    assert config.conflicts(QuantoConfig(weights="int4")) == ["weights"] + ["group_size"] * (group is not None)


BAD = {
    "name": ({"weights": "aqlm-2"}, ["'aqlm-2'", "aqlm-2x8", "aqlm-KxB"]),
    "bits": ({"weights": "aqlm-1x40"}, ["nbits=40", "1 to 24"]),
    "group": ({"weights": "aqlm-2x8", "group_size": 0}, ["in_group=0", "above 0"]),
    "zero": ({"weights": "aqlm-2x8", "symmetric": False}, ["no zero"]),
    "fit": ({"weights": "aqlm-2x8", "fit": "hqq"}, ["fit='hqq'", "leave it out"]),
    "qat": ({"weights": "aqlm-2x8", "qat": True}, ["qat=True"]),
}


@pytest.mark.parametrize("values, said", BAD.values(), ids=BAD)
def test_values_that_an_aqlm_layout_cannot_have_are_refused(values, said):
    with pytest.raises(ValueError) as caught:
        QuantoConfig(**values)
    assert all(text in str(caught.value) for text in said), caught.value


@pytest.fixture(scope="module")
def floats(tmp_path_factory):
    """A float checkpoint."""
    return save("llama", tmp_path_factory.mktemp("floats"), torch.bfloat16)


def test_a_float_model_gets_the_published_format_and_reloads_to_the_same_logits(floats, tmp_path):
    model = load(floats, "auto", quantization_config=AqlmConfig(num_codebooks=2, nbits_per_codebook=4))
    model.save_pretrained(tmp_path)
    saved = json.loads((tmp_path / "config.json").read_text())["quantization_config"]
    state = load_file(tmp_path / "model.safetensors")
    parts = ("codes", "codebooks", "scales")
    assert sorted(saved["linear_weights_not_to_quantize"]) == [n for n in sorted(state) if not n.endswith(parts)]
    assert {t.dtype for n, t in state.items() if n.endswith("codebooks")} == {torch.bfloat16}
    again = load(tmp_path, "auto")
    assert len(layers(again)) == 14 and torch.equal(logits(again), logits(model))


def test_a_float_model_gets_our_format_where_layers_can_differ(floats, tmp_path):
    config = QuantoConfig("aqlm-2x4", overrides={"*.down_proj": {"weights": "int4"}, "*.q_proj": {"group_size": 16}})
    model = load(floats, "auto", quantization_config=config)
    first = model.model.layers[0]
    assert (str(first.mlp.down_proj.scheme), str(first.self_attn.q_proj.scheme)) == ("int4 g64 asym", "aqlm 2x4 g16")
    assert list(first.mlp.up_proj.state_dict()) == ["weight_codes", "weight_codebooks", "weight_scales"]
    assert 0.1 < first.mlp.up_proj.weight_error < 0.9
    model.save_pretrained(tmp_path)
    again = load(tmp_path, "auto")
    assert torch.equal(logits(again), logits(model))
    found = plan(tmp_path)
    assert found.nbytes == sum(t.nbytes for t in again.state_dict().values()) + rotary(again)
    assert plan(floats, config).nbytes == found.nbytes


def rotary(model):
    """Bytes of buffers that no checkpoint has."""
    return sum(t.nbytes for name, t in model.named_buffers() if name not in model.state_dict())


def test_a_layer_that_cannot_be_cut_stays_float_and_the_report_says_why(floats):
    model = load(floats, "auto", quantization_config=QuantoConfig("aqlm-1x2", group_size=128))
    reasons = {row.name: row.reason for row in report(model).rows}
    assert "in_features=64 is not a multiple of the 128" in reasons["model.layers.0.self_attn.q_proj.weight"]
    assert reasons["model.layers.0.mlp.down_proj.weight"] == ""


def test_weights_that_go_to_disk_are_made_there(floats, tmp_path):
    places = {"model.embed_tokens": "cpu", "model.rotary_emb": "cpu", "model.norm": "cpu", "lm_head": "cpu",
              "model.layers.0": "cpu", "model.layers.1": "disk"}  # fmt: skip
    for config in (QuantoConfig("aqlm-1x4"), AqlmConfig(nbits_per_codebook=4)):
        model = load(floats, "auto", quantization_config=config, device_map=places, offload_folder=tmp_path)
        assert torch.equal(logits(model), logits(load(floats, "auto", quantization_config=config)))


# ------------------------------------------------------------------------------------------------ the aqlm package

needs_aqlm = pytest.mark.skipif(importlib.util.find_spec("aqlm") is None, reason="the aqlm package is not installed")


@needs_aqlm
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("layout", [LAYOUTS[0], LAYOUTS[1], LAYOUTS[3]], ids=str)
def test_b4_what_is_saved_loads_in_the_aqlm_package(layout, checkpoints, tmp_path, monkeypatch):
    from transformers.quantizers.quantizer_aqlm import AqlmHfQuantizer

    model = load(checkpoints(layout)[0])
    expected = logits(model)
    model.save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    # transformers 5 understands names of modules only: "lm_head.weight" gives random weights
    config["quantization_config"]["linear_weights_not_to_quantize"] = ["lm_head"]
    (tmp_path / "config.json").write_text(json.dumps(config))
    monkeypatch.setitem(auto.AUTO_QUANTIZER_MAPPING, "aqlm", AqlmHfQuantizer)
    monkeypatch.setitem(auto.AUTO_QUANTIZATION_CONFIG_MAPPING, "aqlm", tf.AqlmConfig)
    import numba

    numba.set_num_threads(1)
    theirs = load(tmp_path)
    assert type(theirs.model.layers[0].mlp.up_proj).__module__ == "aqlm.inference"
    assert relative(logits(theirs), expected) <= 1e-5
