"""Offloaded weights stay quantized, are used where they lie, and give the same numbers as in memory."""

import copy
import json
import pickle
import shutil
import threading
from functools import partial
from pathlib import Path

import accelerate
import pytest
import torch
import transformers
from accelerate.hooks import AlignDevicesHook
from safetensors import safe_open
from safetensors.torch import save_file
from tiny_models import llama_config, tokens
from transformers.conversion_mapping import get_checkpoint_conversion_mapping, register_checkpoint_conversion_mapping
from transformers.core_model_loading import Chunk, Concatenate, WeightConverter

from quanto_hf import Calibration, QLinear, QuantoConfig
from quanto_hf.hf.offload import hooks as offload
from quanto_hf.hf.offload.prefetch_hook import PrefetchHook, prefetch
from quanto_hf.io.lanes import PlainLane
from quanto_hf.schemes import Affine

LAYERS = 3
MAPS = {
    "disk-only": {"": "disk"},
    "cpu-and-disk": {
        "model.embed_tokens": "cpu",
        "model.layers.0": "cpu",
        "model.layers.1": "disk",
        "model.layers.2": "disk",
        "model.norm": "cpu",
        "model.rotary_emb": "cpu",
        "lm_head": "disk",
    },
    "auto": "auto",
}
WEIGHTS = ("int8", "int4", "float8")
every_map = pytest.mark.parametrize("device_map", MAPS.values(), ids=MAPS)
every_weight = pytest.mark.parametrize("weights", WEIGHTS)
both_ways = pytest.mark.parametrize("way", ["on-the-fly", "pre-quantized"])


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """A float checkpoint in two shards, and the same model saved quantized, by number type."""
    place = tmp_path_factory.mktemp("offload")
    torch.manual_seed(0)
    model = transformers.LlamaForCausalLM(llama_config(num_hidden_layers=LAYERS)).to(torch.bfloat16)
    model.save_pretrained(place / "float", max_shard_size="200KB")
    for weights in WEIGHTS:
        quantized = load(place / "float", weights)
        quantized.save_pretrained(place / weights)
    return place


def load(folder, weights=None, cls=transformers.LlamaForCausalLM, **options):
    config = QuantoConfig(weights) if isinstance(weights, str) else weights
    return cls.from_pretrained(folder, dtype=torch.bfloat16, quantization_config=config, **options)


def offloaded(folders, weights, way, device_map, tmp_path, **options):
    options = {"device_map": device_map, "offload_folder": str(tmp_path / "off"), **options}
    if device_map == "auto":
        half = load(folders / weights).get_memory_footprint() // 2
        options["max_memory"] = {"cpu": half, "disk": "1GB"}
    if way == "on-the-fly":
        return load(folders / "float", weights, **options)
    return load(folders / weights, **options)


def logits(model):
    with torch.no_grad():
        return model(tokens()).logits


def content(folder: Path) -> tuple[dict, bytes]:
    """The header of a saved model, whose metadata come in any order, and everything behind it."""
    data = (folder / "model.safetensors").read_bytes()
    end = 8 + int.from_bytes(data[:8], "little")
    return json.loads(data[8:end]), data[end:]


def files(folder: Path) -> list[Path]:
    return sorted(p for p in folder.rglob("*.safetensors")) if folder.exists() else []


@every_map
@every_weight
@both_ways
def test_the_logits_are_those_of_the_model_in_memory(folders, weights, way, device_map, tmp_path):
    model = offloaded(folders, weights, way, device_map, tmp_path)
    assert "disk" in model.hf_device_map.values()
    assert torch.equal(logits(model), logits(load(folders / weights)))
    out = model.generate(tokens(), max_new_tokens=4, do_sample=False)
    assert torch.equal(out, load(folders / weights).generate(tokens(), max_new_tokens=4, do_sample=False))


@every_map
@every_weight
@both_ways
def test_only_packed_weights_are_ever_written(folders, weights, way, device_map, tmp_path):
    model = offloaded(folders, weights, way, device_map, tmp_path)
    written = files(tmp_path / "off")
    if way == "pre-quantized":
        assert not written
        return
    assert len(written) == 1
    with safe_open(written[0], "pt") as file:
        names = set(file.keys())
        sizes = sum(file.get_tensor(name).nbytes for name in names)
    on_disk = {
        f"{name}.{leaf}": tensor.nbytes
        for name, module in model.named_modules()
        if isinstance(module, QLinear) and offload_device(model, name) == "disk"
        for leaf, tensor in module.named_parameters()
    }
    assert names == set(on_disk) and sizes == sum(on_disk.values())


def offload_device(model, name):
    longest = max((key for key in model.hf_device_map if name.startswith(key)), key=len)
    return model.hf_device_map[longest]


@every_map
@both_ways
def test_on_the_cpu_weights_are_pages_of_files_and_no_hook_is_left(folders, way, device_map, tmp_path):
    model = offloaded(folders, "int4", way, device_map, tmp_path)
    assert not any(hasattr(module, "_hf_hook") for module in model.modules())
    assert not any(tensor.is_meta for tensor in (*model.parameters(), *model.buffers()))
    mapped = [line.split() for line in Path("/proc/self/maps").read_text().splitlines() if ".safetensors" in line]
    spans = [tuple(int(end, 16) for end in fields[0].split("-")) for fields in mapped]
    for name, parameter in model.named_parameters():
        if offload_device(model, name) == "disk":
            assert any(low <= parameter.data_ptr() < high for low, high in spans), name


@both_ways
def test_saving_an_offloaded_model_gives_the_same_bytes(folders, way, tmp_path):
    offloaded(folders, "int4", way, MAPS["cpu-and-disk"], tmp_path).save_pretrained(tmp_path / "saved")
    assert content(tmp_path / "saved") == content(folders / "int4")
    assert torch.equal(logits(load(tmp_path / "saved")), logits(load(folders / "int4")))


def test_the_second_load_reads_what_the_first_one_wrote(folders, tmp_path):
    first = offloaded(folders, "int4", "on-the-fly", MAPS["cpu-and-disk"], tmp_path)
    before = {file: file.stat().st_mtime_ns for file in files(tmp_path / "off")}
    again = offloaded(folders, "int4", "on-the-fly", MAPS["cpu-and-disk"], tmp_path)
    assert before == {file: file.stat().st_mtime_ns for file in files(tmp_path / "off")}
    assert torch.equal(logits(first), logits(again))


def test_other_weights_get_a_place_of_their_own(folders, tmp_path):
    int4 = offloaded(folders, "int4", "on-the-fly", {"": "disk"}, tmp_path)
    int8 = offloaded(folders, "int8", "on-the-fly", {"": "disk"}, tmp_path)
    assert len(files(tmp_path / "off")) == 2
    assert torch.equal(logits(int4), logits(load(folders / "int4")))
    assert torch.equal(logits(int8), logits(load(folders / "int8")))


def test_a_checkpoint_in_another_dtype_is_converted_at_each_use(folders, tmp_path):
    # float32 in the file, bfloat16 in the model: the head and the norms cannot be used in place
    single = load(folders / "float").float()
    single.save_pretrained(tmp_path / "float32")
    resident = load(tmp_path / "float32", "int4")
    model = load(tmp_path / "float32", "int4", device_map={"": "disk"}, offload_folder=str(tmp_path / "off"))
    assert torch.equal(logits(model), logits(resident))
    assert model.lm_head.weight.is_meta and not model.model.layers[0].mlp.up_proj.weight_packed.is_meta
    assert len(files(tmp_path / "off")) == 1


def test_tied_weights_are_one_parameter_on_disk_too(folders, tmp_path):
    tied = transformers.LlamaForCausalLM(llama_config(tie_word_embeddings=True)).to(torch.bfloat16)
    tied.save_pretrained(tmp_path / "tied")
    model = load(tmp_path / "tied", "int4", device_map={"": "disk"}, offload_folder=str(tmp_path / "off"))
    assert model.lm_head.weight is model.model.embed_tokens.weight
    assert torch.equal(logits(model), logits(load(tmp_path / "tied", "int4")))


def test_a_model_with_weights_on_disk_refuses_to_move(folders, tmp_path):
    model = offloaded(folders, "int4", "on-the-fly", {"": "disk"}, tmp_path)
    for move in (lambda: model.to("cuda"), lambda: model.to(device="cuda:0"), model.cuda):
        with pytest.raises(RuntimeError, match=r"left on disk.*another device_map"):
            move()
    assert model.to("cpu") is model and model.to(torch.device("cpu")) is model
    other = copy.deepcopy(model)
    assert other.to("cpu") is other and torch.equal(logits(other), logits(model))


def test_an_offload_folder_has_to_be_given_for_weights_that_are_quantized_now(folders):
    with pytest.raises(ValueError, match="no offload_folder says where; give offload_folder=") as error:
        load(folders / "float", "int4", device_map={"": "disk"})
    assert "21 weights on disk that are quantized" in str(error.value)


def test_several_threads_and_an_exception_in_the_middle(folders, tmp_path):
    model = offloaded(folders, "int4", "on-the-fly", {"": "disk"}, tmp_path)
    expected, wrong = logits(load(folders / "int4")), []

    def work():
        for _ in range(5):
            if not torch.equal(logits(model), expected):
                wrong.append(1)

    threads = [threading.Thread(target=work) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong
    with pytest.raises(IndexError):
        model(torch.tensor([[10**6]]))
    assert torch.equal(logits(model), expected)


# ------------------------------------------------------------------------------------------------ merged weights


class Phi(transformers.Phi3ForCausalLM):
    """A model whose checkpoints have the two halves of gate_up_proj apart, and the two of the attention's and the
    other's output in one tensor."""


@pytest.fixture(scope="module")
def merged(tmp_path_factory):
    """A checkpoint as the model has it, and one that the loader has to merge and to split."""
    place = tmp_path_factory.mktemp("merged")
    sizes = {"vocab_size": 96, "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "pad_token_id": 0}
    config = transformers.Phi3Config(**sizes, num_attention_heads=4, num_key_value_heads=4)
    torch.manual_seed(0)
    model = transformers.Phi3ForCausalLM(config).to(torch.bfloat16)
    model.save_pretrained(place / "as-it-is")
    state = dict(model.state_dict())
    for layer in ("model.layers.0.", "model.layers.1."):
        halves = state.pop(f"{layer}mlp.gate_up_proj.weight").chunk(2)
        state[f"{layer}mlp.w1.weight"], state[f"{layer}mlp.w3.weight"] = (half.contiguous() for half in halves)
        norms = [state.pop(f"{layer}{name}_layernorm.weight") for name in ("input", "post_attention")]
        state[f"{layer}norms.weight"] = torch.cat(norms)
    (place / "apart").mkdir()
    save_file(state, place / "apart" / "model.safetensors", metadata={"format": "pt"})
    config.save_pretrained(place / "apart")
    halves = WeightConverter([r"mlp\.w1\.weight", r"mlp\.w3\.weight"], "mlp.gate_up_proj.weight", [Concatenate(dim=0)])
    norms = WeightConverter("norms.weight", ["input_layernorm.weight", "post_attention_layernorm.weight"], [Chunk()])
    register_checkpoint_conversion_mapping("Phi", [halves, norms], overwrite=True)
    return place


def load_merged(merged, **options):
    return Phi.from_pretrained(
        merged / "apart", dtype=torch.bfloat16, quantization_config=QuantoConfig("int4"), **options
    )


@pytest.mark.parametrize("device_map", [None, {"": "disk"}], ids=["in-memory", "disk"])
def test_a_merged_weight_is_quantized_piece_by_piece(merged, tmp_path, device_map, monkeypatch):
    seen = []
    quantize = Affine.quantize

    def noted(self, weight, fit=None):
        seen.append(tuple(weight.shape))
        return quantize(self, weight, fit)

    monkeypatch.setattr(Affine, "quantize", noted)
    made = load_merged(merged, device_map=device_map, offload_folder=str(tmp_path / "off"))
    assert seen.count((128, 64)) >= 4 and (256, 64) not in seen
    expected = load(merged / "as-it-is", "int4", cls=transformers.Phi3ForCausalLM)
    assert torch.equal(logits(made), logits(expected))
    error = expected.model.layers[0].mlp.gate_up_proj.weight_error
    assert made.model.layers[0].mlp.gate_up_proj.weight_error == pytest.approx(error, rel=0.05)


def test_what_is_merged_or_split_is_in_the_checked_entry_with_the_rest(merged, tmp_path):
    off = tmp_path / "off"
    made = load_merged(merged, device_map={"": "disk"}, offload_folder=str(off))
    (file,) = files(off)
    assert file.parent.name.startswith("quanto_hf-")
    with safe_open(file, "pt") as entry:
        names = set(entry.keys())
    assert {f"model.layers.{i}.mlp.gate_up_proj.weight_packed" for i in (0, 1)} < names
    assert {
        f"model.layers.{i}.{which}_layernorm.weight" for i in (0, 1) for which in ("input", "post_attention")
    } < names
    wanted = logits(load(merged / "as-it-is", "int4", cls=transformers.Phi3ForCausalLM))
    assert torch.equal(logits(made), wanted)
    before = file.stat().st_mtime_ns
    assert torch.equal(logits(load_merged(merged, device_map={"": "disk"}, offload_folder=str(off))), wanted)
    assert file.stat().st_mtime_ns == before
    data = bytearray(file.read_bytes())
    data[-100] ^= 1
    file.write_bytes(data)
    with pytest.warns(UserWarning, match="is written again: .*has been changed"):
        again = load_merged(merged, device_map={"": "disk"}, offload_folder=str(off))
    assert torch.equal(logits(again), wanted)
    again.save_pretrained(tmp_path / "saved", save_original_format=False)
    assert torch.equal(logits(load(tmp_path / "saved", cls=Phi)), wanted)


class Values:
    """An object without a repr of its own."""

    def __init__(self, tensor):
        self.tensor = tensor


class Half(Chunk):
    """An operation that holds an object, as several of transformers' do."""

    def __init__(self, inner):
        super().__init__()
        self.inner = inner


def test_an_operation_that_holds_an_object_finds_its_entry_again(merged, tmp_path):
    off, halves = tmp_path / "off", Concatenate(dim=0)
    conversions = get_checkpoint_conversion_mapping("Phi")
    try:
        one, other = torch.zeros(5000), torch.zeros(5000).index_fill(0, torch.tensor([2500]), 7)
        for inner, entries in ((Values(one), 1), (Values(one.clone()), 1), (Values(other), 2), (other, 3), (one, 4)):
            register_checkpoint_conversion_mapping(
                "Phi",
                [
                    WeightConverter([r"mlp\.w1\.weight", r"mlp\.w3\.weight"], "mlp.gate_up_proj.weight", [halves]),
                    WeightConverter(
                        "norms.weight", ["input_layernorm.weight", "post_attention_layernorm.weight"], [Half(inner)]
                    ),
                ],
                overwrite=True,
            )
            load_merged(merged, device_map={"": "disk"}, offload_folder=str(off))
            assert len([path for path in off.iterdir() if path.name.startswith("quanto_hf-")]) == entries
    finally:
        register_checkpoint_conversion_mapping("Phi", conversions, overwrite=True)


def test_a_converter_whose_first_tensor_stays_float_quantizes_the_others(tmp_path):
    class Fused(transformers.LlamaForCausalLM):
        """A model whose checkpoints have queries, keys and values in one tensor."""

    torch.manual_seed(0)
    config = llama_config(num_key_value_heads=4)
    model = transformers.LlamaForCausalLM(config).to(torch.bfloat16)
    model.save_pretrained(tmp_path / "apart")
    state = dict(model.state_dict())
    three = ("q_proj", "k_proj", "v_proj")
    for layer in ("model.layers.0.self_attn.", "model.layers.1.self_attn."):
        state[f"{layer}qkv.weight"] = torch.cat([state.pop(f"{layer}{name}.weight") for name in three])
    (tmp_path / "fused").mkdir()
    save_file(state, tmp_path / "fused" / "model.safetensors", metadata={"format": "pt"})
    config.save_pretrained(tmp_path / "fused")
    split = WeightConverter("self_attn.qkv.weight", [f"self_attn.{name}.weight" for name in three], [Chunk()])
    register_checkpoint_conversion_mapping("Fused", [split], overwrite=True)
    options = {"quantization_config": QuantoConfig("int4", modules_to_not_convert=["*q_proj"]), "dtype": torch.bfloat16}
    wanted = logits(transformers.LlamaForCausalLM.from_pretrained(tmp_path / "apart", **options))
    assert torch.equal(logits(Fused.from_pretrained(tmp_path / "fused", **options)), wanted)
    options |= {"device_map": {"": "disk"}, "offload_folder": str(tmp_path / "off")}
    made = Fused.from_pretrained(tmp_path / "fused", **options)
    assert type(made.model.layers[0].self_attn.q_proj) is torch.nn.Linear
    assert torch.equal(logits(made), wanted)
    assert len(files(tmp_path / "off")) == 1


def test_merged_experts_that_stay_float_are_in_the_checked_entry_too(tmp_path):
    config = transformers.MixtralConfig(
        vocab_size=96, hidden_size=64, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, num_local_experts=3, num_experts_per_tok=2,
    )  # fmt: skip
    torch.manual_seed(0)
    transformers.MixtralForCausalLM(config).to(torch.bfloat16).save_pretrained(tmp_path / "float")
    with safe_open(tmp_path / "float" / "model.safetensors", "pt") as saved:
        assert any(".experts.0.w1" in name for name in saved.keys())
    config = QuantoConfig("int4", modules_to_not_convert=["experts"])
    resident = load(tmp_path / "float", config, cls=transformers.MixtralForCausalLM)
    options = {"cls": transformers.MixtralForCausalLM, "offload_folder": str(tmp_path / "off")}
    made = load(tmp_path / "float", config, device_map={"": "disk"}, **options)
    assert torch.equal(logits(made), logits(resident))
    (file,) = files(tmp_path / "off")
    with safe_open(file, "pt") as entry:
        assert any(name.endswith("mlp.experts.gate_up_proj") for name in entry.keys())


def test_float_leftovers_do_not_keep_the_checkpoint_mapped(folders, tmp_path):
    shutil.copytree(folders / "float", tmp_path / "float")  # nothing else has this one mapped
    model = load(tmp_path / "float", "int4")
    assert str(tmp_path / "float") not in Path("/proc/self/maps").read_text()
    assert model.lm_head.weight.any()


# ------------------------------------------------------------------------------- other devices, accelerate's own verbs


@pytest.fixture
def streamed(folders, tmp_path, monkeypatch):
    """A model whose weights are brought to its device at each use; the device is the CPU, but everything is copied."""
    lanes = []

    class Lane(PlainLane):
        def __init__(self, device):
            super().__init__(device)
            self.copied = 0
            lanes.append(self)

        def finish(self, ticket):
            copies = super().finish(ticket)
            self.copied += sum(tensor.nbytes for tensor in copies.values())
            return copies

    def not_in_place(model, hooks):
        prefetch(model, hooks, Lane)

    monkeypatch.setattr(offload, "is_on_cpu", lambda hooks: False)
    monkeypatch.setattr(offload, "prefetch", not_in_place)
    model = offloaded(folders, "int4", "on-the-fly", MAPS["cpu-and-disk"], tmp_path)
    return model, lanes


@pytest.mark.parametrize(("device", "on_cpu"), [("cpu", True), (None, True), (0, False), (1, False), ("cuda:0", False)])
def test_the_first_gpu_is_not_taken_for_the_cpu(device, on_cpu):
    assert offload.is_on_cpu({"a": AlignDevicesHook("cpu"), "b": AlignDevicesHook(device)}) is on_cpu


def test_streamed_weights_give_the_same_numbers_and_go_again(folders, streamed):
    model, _ = streamed
    expected = logits(load(folders / "int4"))
    for _ in range(3):
        assert torch.equal(logits(model), expected)
    on_disk = [name for name, p in model.named_parameters() if offload_device(model, name) == "disk"]
    assert on_disk and all(model.get_parameter(name).is_meta for name in on_disk)
    assert isinstance(model.lm_head._hf_hook, PrefetchHook)


def test_a_forward_pass_moves_the_packed_bytes_of_the_offloaded_modules_and_no_more(folders, streamed):
    model, (lane,) = streamed
    resident = dict(load(folders / "int4").named_parameters())
    wanted = sum(resident[n].nbytes for n in resident if offload_device(model, n) == "disk")
    before = lane.copied
    logits(model)
    assert lane.copied - before == wanted


@pytest.mark.parametrize("offload_buffers", [False, True], ids=["buffers-stay", "buffers-go"])
@pytest.mark.parametrize("way", ["on-the-fly", "pre-quantized"])
def test_static_scales_of_streamed_layers_lie_where_they_run(way, offload_buffers, folders, tmp_path, monkeypatch):
    # on meta, where the weights are until they are used, they would count as calibrated, and be no numbers
    monkeypatch.setattr(offload, "is_on_cpu", lambda hooks: False)
    monkeypatch.setattr(offload, "prefetch", lambda model, hooks: prefetch(model, hooks, PlainLane))
    load_it = partial(transformers.LlamaForCausalLM.from_pretrained, dtype=torch.bfloat16)
    source, given = folders / "float", QuantoConfig("int8", activations="int8", static_activations=True)
    if way == "pre-quantized":
        source = tmp_path / "saved"
        load_it(folders / "float", quantization_config=QuantoConfig("int8", "int8")).save_pretrained(source)
    options = {"device_map": MAPS["cpu-and-disk"], "offload_folder": tmp_path / "o", "offload_buffers": offload_buffers}
    model, resident = (load_it(source, quantization_config=given, **more) for more in (options, {}))
    layer = model.model.layers[1].mlp.up_proj
    assert layer.weight_packed.is_meta and not layer.is_calibrated
    scales = [module.input_scale for module in model.modules() if isinstance(module, QLinear)]
    assert {scale.device.type for scale in scales} == {"cpu"}
    with pytest.raises(RuntimeError, match="never calibrated"):
        logits(model)
    for each in (model, resident):
        with Calibration(each):
            logits(each)
    assert torch.equal(logits(model), logits(resident))


def test_streamed_weights_go_after_an_exception_too(folders, streamed, monkeypatch):
    model, _ = streamed
    layer = model.model.layers[1].mlp
    monkeypatch.setattr(type(layer.down_proj.scheme), "bind", lambda *args: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        logits(model)
    assert model.model.layers[0].mlp.down_proj.weight_packed.device.type == "cpu"
    monkeypatch.undo()
    with pytest.raises(ValueError, match="takes inputs of shape"):
        layer.down_proj(torch.zeros(1, 3, dtype=torch.bfloat16))
    assert layer.down_proj.weight_packed.is_meta
    assert torch.equal(logits(model), logits(load(folders / "int4")))


def test_streamed_weights_are_saved_as_they_are(folders, streamed, tmp_path):
    streamed[0].save_pretrained(tmp_path / "saved")
    assert content(tmp_path / "saved") == content(folders / "int4")


def test_several_threads_share_streamed_weights(folders, streamed):
    model, _ = streamed
    expected, wrong = logits(load(folders / "int4")), []

    def work():
        for _ in range(5):
            if not torch.equal(logits(model), expected):
                wrong.append(1)

    threads = [threading.Thread(target=work) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


VERBS = {
    "cpu_offload": lambda model, place: accelerate.cpu_offload(model, "cpu"),
    "disk_offload": lambda model, place: accelerate.disk_offload(model, str(place), "cpu"),
    "dispatch_model": lambda model, place: accelerate.dispatch_model(
        model, MAPS["cpu-and-disk"], offload_dir=str(place)
    ),
    "attach_align_device_hook": lambda model, place: accelerate.hooks.attach_align_device_hook(
        model, "cpu", offload=True
    ),
}


@pytest.mark.parametrize("verb", VERBS.values(), ids=VERBS)
@every_weight
def test_accelerates_own_verbs_work_on_a_quantized_model(folders, verb, weights, tmp_path):
    model = load(folders / "float", weights)
    expected = logits(model)
    verb(model, tmp_path / "off")
    assert any(isinstance(getattr(module, "_hf_hook", None), AlignDevicesHook) for module in model.modules())
    assert model.model.layers[1].mlp.up_proj.weight_packed.is_meta
    assert torch.equal(logits(model), expected)
    stored = [file for file in (tmp_path / "off").rglob("*weight_packed*")]
    assert all(file.stat().st_size < 64 * 128 * 2 for file in stored)


# ---------------------------------------------------------------------------------------------------------- copies


def copies_itself(model):
    """A copy that answers the same when what was in the layers of the model is overwritten."""
    wanted, twin = logits(model), copy.deepcopy(model)
    theirs = {id(module) for module in model.modules()}
    for module in twin.modules():
        forward = vars(module).get("_old_forward")
        held = [*getattr(forward, "args", ()), getattr(forward, "__self__", None)]
        assert not {id(value) for value in held} & theirs
    with torch.no_grad():
        for tensor in model.parameters():
            if not tensor.is_meta and tensor.is_floating_point():
                tensor.zero_()
    assert torch.equal(logits(twin), wanted) and torch.equal(logits(twin), wanted)
    return twin


@pytest.mark.parametrize("way", ["on-the-fly", "saved"])
@pytest.mark.parametrize("case", MAPS)
def test_a_model_that_is_offloaded_to_disk_can_be_copied_and_pickled(case, way, folders, tmp_path):
    model = offloaded(folders, "int4", way, MAPS[case], tmp_path)
    wanted = logits(model)
    assert torch.equal(logits(pickle.loads(pickle.dumps(model))), wanted)
    copies_itself(model)


def test_a_model_whose_offloaded_weights_are_converted_at_each_use_can_be_copied(folders, tmp_path):
    options = {"device_map": MAPS["cpu-and-disk"], "offload_folder": str(tmp_path / "off"), "dtype": torch.float32}
    model = transformers.LlamaForCausalLM.from_pretrained(folders / "int4", **options)
    assert any(p.is_meta for p in model.parameters())
    copies_itself(model)


def test_a_model_whose_weights_are_brought_to_the_device_can_be_copied(streamed):
    model, lanes = streamed
    twin = copies_itself(model)
    hooks = [
        module._hf_hook for module in twin.modules() if isinstance(getattr(module, "_hf_hook", None), PrefetchHook)
    ]
    assert hooks and all(hook.prefetcher.lane is not lanes[0] for hook in hooks)
