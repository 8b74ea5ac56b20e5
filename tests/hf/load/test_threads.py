"""Loads, plans and conversions in several threads at once: nothing of the process is changed meanwhile, and afterwards
everything is as it was."""

import json
import logging
import subprocess
import sys
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
import transformers
from tiny_models import llama_config
from torch import nn
from transformers.quantizers import auto

import quanto_hf
from quanto_hf import AqlmConfig, QuantoConfig
from quanto_hf.hf.memory import places

THREADS, LOADS = 4, 30


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Of a float checkpoint: by dtype, and whether its head is tied."""
    made = {}

    def get(dtype=torch.float32, tied=False):
        if (dtype, tied) not in made:
            path = tmp_path_factory.mktemp("llama")
            torch.manual_seed(0)
            model = transformers.LlamaForCausalLM(llama_config(num_hidden_layers=1, tie_word_embeddings=tied))
            model.to(dtype).save_pretrained(path)
            made[dtype, tied] = path
        return made[dtype, tied]

    return get


def load(folder, config=None, **kwargs):
    given = {} if config is None else {"quantization_config": config}
    return transformers.AutoModelForCausalLM.from_pretrained(folder, **given, **kwargs)


def together(call, times=LOADS):
    """What a call gives when threads make it at once."""
    with ThreadPoolExecutor(THREADS) as pool:
        return list(pool.map(lambda _: call(), range(times)))


def same(model, wanted):
    mine, theirs = dict(model.named_parameters()), dict(wanted.named_parameters())
    assert mine.keys() == theirs.keys()
    assert all(p.device.type == "cpu" and p.dtype == theirs[n].dtype for n, p in mine.items())
    return all(torch.equal(p, theirs[n]) for n, p in mine.items())


@pytest.fixture(autouse=True)
def the_process_is_as_before():
    yield
    layer = nn.Linear(2, 2)
    assert (layer.weight.device.type, layer.weight.dtype) == ("cpu", torch.float32)
    assert transformers.PreTrainedModel.tie_weights.__qualname__ == "PreTrainedModel.tie_weights"


@pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("saved", [False, True], ids=["float", "saved"])
def test_every_load_in_threads_gives_the_model_of_one_thread(saved, dtype, tied, folder, tmp_path):
    source, config = folder(dtype, tied), QuantoConfig("int8")
    wanted = load(source, config)
    if saved:
        wanted.save_pretrained(tmp_path)
        source, config = tmp_path, None
    models = together(lambda: load(source, config))
    assert [same(model, wanted) for model in models] == [True] * LOADS
    assert not any("tie_weights" in vars(model) for model in models)


def test_a_layer_that_another_thread_makes_while_a_model_is_loaded_is_on_the_cpu(folder):
    done, places = threading.Event(), set()

    def make():
        while not done.is_set():
            places.add(nn.Linear(2, 2).weight.device.type)

    maker = threading.Thread(target=make)
    maker.start()
    try:
        for _ in range(5):
            load(folder(), QuantoConfig("int4"))
    finally:
        done.set()
        maker.join()
    assert places == {"cpu"}


@pytest.mark.parametrize("config", [QuantoConfig("int4"), AqlmConfig(num_codebooks=1, nbits_per_codebook=4)], ids=str)
def test_a_plan_in_one_thread_takes_no_model_from_a_load_in_another(config, folder, tmp_path):
    # the plan stops from_pretrained by a quantizer of its own
    model = load(folder(), config)
    model.save_pretrained(tmp_path)
    # an AQLM checkpoint is loaded by us where our config is given
    given = config if isinstance(config, AqlmConfig) else None
    nbytes = quanto_hf.plan(tmp_path).nbytes

    def either():
        threading.current_thread().plans = not getattr(threading.current_thread(), "plans", False)
        if threading.current_thread().plans:
            return quanto_hf.plan(tmp_path).nbytes == nbytes
        return same(load(tmp_path, given), model)

    assert all(together(either))


def test_conversions_and_loads_at_once_are_those_of_one_thread(folder, tmp_path):
    wanted = load(folder(), QuantoConfig("int4"))

    def convert(index):
        quanto_hf.convert_checkpoint(folder(), tmp_path / f"{index}", QuantoConfig("int4"))
        return load(tmp_path / f"{index}")

    with ThreadPoolExecutor(THREADS) as pool:
        converted = [pool.submit(convert, index) for index in range(6)]
        loaded = [pool.submit(load, folder(), QuantoConfig("int4")) for _ in range(6)]
        assert all(same(future.result(), wanted) for future in [*converted, *loaded])


def test_the_table_of_quantizers_does_not_change_while_a_plan_is_made(folder, monkeypatch):
    quanto_hf.plan(folder())
    before, seen = dict(auto.AUTO_QUANTIZER_MAPPING), []
    preprocess = quanto_hf.QuantoHfQuantizer.preprocess_model

    def look(self, *args, **kwargs):
        seen.append(dict(auto.AUTO_QUANTIZER_MAPPING))
        return preprocess(self, *args, **kwargs)

    monkeypatch.setattr(quanto_hf.QuantoHfQuantizer, "preprocess_model", look)
    quanto_hf.plan(folder())
    assert seen == [before] and before == auto.AUTO_QUANTIZER_MAPPING


def test_a_load_that_fails_keeps_no_other_thread_waiting(folder, tmp_path):
    (tmp_path / "config.json").write_text((folder() / "config.json").read_text())
    errors = []

    class Broken(transformers.LlamaForCausalLM):
        def __init__(self, config):
            raise RuntimeError("no such model")

    def fail():
        try:
            Broken.from_pretrained(folder(), quantization_config=QuantoConfig("int8"))
        except RuntimeError as error:
            # with its traceback, and so the frames of the call
            errors.append(error)
        finished.wait(60)

    finished = threading.Event()
    thread = threading.Thread(target=fail)
    thread.start()
    try:
        while not errors:
            assert thread.is_alive()
        with ThreadPoolExecutor(1) as pool:
            assert pool.submit(load, folder(), QuantoConfig("int8")).result(timeout=30) is not None
    finally:
        finished.set()
        thread.join()


def test_a_model_that_loads_another_one_while_it_is_built_does_not_wait_for_itself(folder):
    inner = []

    class Outer(transformers.LlamaForCausalLM):
        def __init__(self, config):
            with torch.device("cpu"):
                inner.append(load(folder(), QuantoConfig("int8")))
            super().__init__(config)

    with ThreadPoolExecutor(2) as pool:
        calls = [pool.submit(Outer.from_pretrained, folder(), quantization_config=QuantoConfig("int8"))] * 2
        assert all(len(quanto_hf.quantization_map(call.result(timeout=60))) == 7 for call in calls)


def test_a_plan_silences_its_own_thread_only(caplog):
    logger = logging.getLogger("accelerate.utils.modeling")
    level, inside, outside = logger.level, threading.Event(), threading.Event()

    def plan():
        with places.quiet_maps():
            inside.set()
            outside.wait(10)
            logger.warning("of the plan")

    thread = threading.Thread(target=plan)
    thread.start()
    inside.wait(10)
    logger.warning("of another thread")
    outside.set()
    thread.join()
    assert logger.level == level
    assert [record.message for record in caplog.records] == ["of another thread"]


COLD = """
import sys, threading
import quanto_hf
from concurrent.futures import ThreadPoolExecutor
folder, saved = sys.argv[1:]
barrier = threading.Barrier(4)
def load(path, **given):
    barrier.wait()
    from transformers import LlamaForCausalLM
    return LlamaForCausalLM.from_pretrained(path, **given)
def plan():
    barrier.wait()
    return quanto_hf.plan(folder)
def cls():
    barrier.wait()
    return quanto_hf.QuantoHfQuantizer
with ThreadPoolExecutor(4) as pool:
    calls = [pool.submit(load, folder, quantization_config=quanto_hf.QuantoConfig("int4")), pool.submit(load, saved),
             pool.submit(plan), pool.submit(cls)]
    models = [call.result() for call in calls]
print(len(quanto_hf.quantization_map(models[0])), len(quanto_hf.quantization_map(models[1])))
from transformers.quantizers.auto import AUTO_QUANTIZER_MAPPING as mapping
assert mapping["quanto_hf"] is quanto_hf.QuantoHfQuantizer
"""


def test_threads_that_import_transformers_at_once_all_find_the_method(folder, tmp_path):
    load(folder(), QuantoConfig("int4")).save_pretrained(tmp_path)
    command = [sys.executable, "-c", COLD, str(folder()), str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=180)
    assert done.returncode == 0, done.stderr
    assert done.stdout.split() == ["7", "7"]


def test_an_import_of_the_quantizers_moves_no_finder_that_another_thread_is_about_to_ask():
    # removing one would make a thread that goes through the list leave out the next one
    code = (
        "import sys, quanto_hf\n"
        "from quanto_hf_autoload import FINDER\n"
        "finders, before = iter(sys.meta_path), list(sys.meta_path)\n"
        "while next(finders) is not FINDER: pass\n"
        "import transformers.quantizers.auto\n"
        "assert list(finders) == before[before.index(FINDER) + 1 :]\n"
        "assert [finder for finder in sys.meta_path if finder in before] == before"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr


def test_stress_in_short(tmp_path):
    """benchmarks/stress.py runs for ten minutes; this is one of its runs in small."""
    program = Path(__file__).parents[3] / "benchmarks" / "stress.py"
    command = [sys.executable, str(program), "--seconds", "4", "--dtypes", "float32", "--types", "int8", "int4", "nf4"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.splitlines()[-1].endswith("0 wrong")


def test_the_config_that_asks_for_an_empty_aqlm_model_is_never_saved(folder, tmp_path):
    config = AqlmConfig(num_codebooks=1, nbits_per_codebook=4)
    quanto_hf.convert_checkpoint(folder(), tmp_path, config)
    saved = json.loads((tmp_path / "config.json").read_text())
    assert saved["quantization_config"]["quant_method"] == "aqlm" and config.quant_method == "aqlm"
