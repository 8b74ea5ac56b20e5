"""Tokens per second of a whole model, beside plain bfloat16 and other quantizers, each in a process of its own.

    python benchmarks/generate.py [--folder DIR] [--peers] [--only NAME ...] [--threads N]

Makes a random Llama of 1.1 B parameters (2.2 GB of bfloat16; with llama.cpp 5 GB while its files are written) in a
temporary folder, or in DIR, where a later run finds it again. What each process measures, best of three after a
warm-up:

- b1, b8: greedy decoding through ``generate``, 64 tokens after a prompt of 32, for 1 and 8 prompts. Counts the steps
  after the first token, so not the prompt. Ends early after ``--limit`` seconds.
- prefill: one forward pass of 512 tokens that gives the last token's logits.
- load: ``from_pretrained``, quantization included, from files that have been read just before. llama.cpp loads one
  that was quantized beforehand.
- footprint: storages of all tensors alive after loading.
- rel L2: distance of the 32 prompt tokens' logits from those of bfloat16, over their norm. Random weights are harder
  on a quantizer than trained ones; here it only shows that a backend computes the same model.
- others: cores that other processes used meanwhile. Much above 0.1 the row is worth nothing: llama.cpp's threads, for
  one, wait for each other at every layer.

The ratio is to bfloat16 of the same run. llama.cpp quantizes the output head too (its own choice), nobody else does.
``compiled`` decodes with a static cache and a forward pass that torch.compile made one graph of; the prompt is not
compiled. It needs a C++ compiler at run time, as torch.compile does for every model.
``--peers`` adds optimum-quanto, torchao, bitsandbytes, hqq and llama.cpp (packages llama-cpp-python and gguf), where
they are installed. A backend that does not run gets a row with the reason. ``--prefix`` is put before the command of
each process, such as "taskset -c 0".
"""

import argparse
import gc
import json
import math
import os
import shlex
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from importlib import import_module
from pathlib import Path
from typing import Any

import numpy as np

VOCAB, PROMPT, NEW, LONG, MANY = 32000, 32, 64, 512, 8


def ours(**kwargs: str) -> Callable[[], Any]:
    return lambda: import_module("quanto_hf").QuantoConfig(**kwargs)


def theirs(name: str, *args: Any, **kwargs: Any) -> Callable[[], Any]:
    return lambda: getattr(import_module("transformers"), name)(*args, **kwargs)


def torchao(name: str) -> Callable[[], Any]:
    return lambda: theirs("TorchAoConfig", getattr(import_module("torchao.quantization"), name)())()


BACKENDS: dict[str, Callable[[], Any]] = {
    "bf16": lambda: None,
    "int8": ours(weights="int8"),
    "int4": ours(weights="int4"),
    "int2": ours(weights="int2"),
    "float8": ours(weights="float8"),
    "nf4": ours(weights="nf4"),
    "int8 + int8 activations": ours(weights="int8", activations="int8"),
    "bf16 compiled": lambda: None,
    "int8 compiled": ours(weights="int8"),
    "int4 compiled": ours(weights="int4"),
}
PEERS: dict[str, Callable[[], Any]] = {
    "optimum-quanto int8": theirs("QuantoConfig", "int8"),
    "optimum-quanto int4": theirs("QuantoConfig", "int4"),
    "torchao int8": torchao("Int8WeightOnlyConfig"),
    "torchao int8 dynamic": torchao("Int8DynamicActivationInt8WeightConfig"),
    "bitsandbytes nf4": theirs("BitsAndBytesConfig", load_in_4bit=True, bnb_4bit_quant_type="nf4"),
    "hqq int4": lambda: None,
    "llama.cpp q4_0": lambda: None,
    "llama.cpp q8_0": lambda: None,
}


def make_model(folder: Path) -> None:
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    sizes = {"vocab_size": VOCAB, "hidden_size": 2048, "intermediate_size": 5632, "num_hidden_layers": 22}
    config = LlamaConfig(**sizes, num_attention_heads=32, num_key_value_heads=8)
    torch.manual_seed(0)
    torch.set_default_dtype(torch.bfloat16)
    LlamaForCausalLM(config).save_pretrained(folder, max_shard_size="400MB")


def make_gguf(model: Path, path: Path) -> None:
    """The same weights as a bfloat16 GGUF file without a tokenizer."""
    import torch
    from gguf import MODEL_ARCH, GGMLQuantizationType, GGUFWriter, get_tensor_name_map
    from safetensors import safe_open
    from transformers import AutoConfig

    config = AutoConfig.from_pretrained(model)
    writer = GGUFWriter(path, "llama")
    writer.add_tokenizer_model("no_vocab")
    writer.add_vocab_size(config.vocab_size)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_rope_dimension_count(config.head_dim)
    writer.add_rope_freq_base(config.rope_parameters["rope_theta"])
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    names = get_tensor_name_map(MODEL_ARCH.LLAMA, config.num_hidden_layers)
    for shard in sorted(model.glob("*.safetensors")):
        with safe_open(shard, "pt") as file:
            for name in file.keys():
                tensor = file.get_tensor(name)
                target = names.get_name(name, try_suffixes=(".weight",))
                if name.endswith(("q_proj.weight", "k_proj.weight")):
                    # the two halves that a rotation pairs are neighbours in llama.cpp
                    tensor = tensor.unflatten(0, (-1, 2, config.head_dim // 2)).transpose(1, 2).flatten(0, 2)
                if tensor.ndim == 1:
                    writer.add_tensor(target, tensor.float().numpy())
                else:
                    raw = tensor.contiguous().view(torch.uint8).numpy()
                    writer.add_tensor(target, raw, raw_dtype=GGMLQuantizationType.BF16)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def prepare(folder: Path, gguf: bool, threads: int) -> None:
    """Make the files that are missing."""
    if not (folder / "float" / "model.safetensors.index.json").exists():
        make_model(folder / "float")
    missing = [kind for kind in ("q4_0", "q8_0") if gguf and not (folder / f"{kind}.gguf").exists()]
    if missing:
        import llama_cpp

        source, part = folder / "bf16.gguf", folder / "part.gguf"
        make_gguf(folder / "float", source)
        for kind in missing:
            params = llama_cpp.llama_model_quantize_default_params()
            params.nthread, params.ftype = threads, getattr(llama_cpp, f"LLAMA_FTYPE_MOSTLY_{kind.upper()}")
            if llama_cpp.llama_model_quantize(str(source).encode(), str(part).encode(), params):
                raise RuntimeError(f"llama.cpp does not quantize to {kind}")
            part.rename(folder / f"{kind}.gguf")
        source.unlink()


class Transformers:
    """A model that transformers runs; token ids come and logits go as arrays, rows first."""

    def __init__(self, name: str, folder: Path, threads: int) -> None:
        import torch
        import transformers

        torch.set_num_threads(threads)
        torch.set_grad_enabled(False)
        self.torch = torch
        self.options: dict[str, Any] = {}
        if name.endswith("compiled"):
            compiled = transformers.CompileConfig(fullgraph=True, mode="default")
            compiled._compile_all_devices = True  # else generate compiles on GPUs only
            self.options = {"cache_implementation": "static", "compile_config": compiled}
        cls, config = transformers.LlamaForCausalLM, {**BACKENDS, **PEERS}[name]()
        for file in (folder / "float").glob("*.safetensors"):
            file.read_bytes()
        start = time.perf_counter()
        self.model = cls.from_pretrained(folder / "float", dtype=torch.bfloat16, quantization_config=config)
        if name.startswith("hqq"):
            self.quantize_hqq()
        self.load = time.perf_counter() - start
        gc.collect()
        # a wrapper subclass has no memory of its own, but the tensors inside it, which are found as well
        tensors = [t for t in gc.get_objects() if issubclass(type(t), torch.Tensor)]
        storages = [t.untyped_storage() for t in tensors if not hasattr(t, "__tensor_flatten__")]
        self.footprint = sum({s.data_ptr(): s.nbytes() for s in storages if s.data_ptr()}.values())

    def quantize_hqq(self) -> None:
        """transformers 5 refuses HqqConfig. Without hqq's solver, which takes minutes."""
        from hqq.core.quantize import BaseQuantizeConfig
        from hqq.models.hf.base import AutoHQQHFModel

        config = BaseQuantizeConfig(nbits=4, group_size=64)
        config["weight_quant_params"]["optimize"] = False
        AutoHQQHFModel.quantize_model(self.model, config, compute_dtype=self.model.dtype, device="cpu")

    def logits(self, ids: np.ndarray) -> np.ndarray:
        return self.model(self.torch.from_numpy(ids)).logits[0].float().numpy()

    def prefill(self, ids: np.ndarray) -> None:
        self.model(self.torch.from_numpy(ids), logits_to_keep=1)

    def decode(self, ids: np.ndarray, new: int, limit: float) -> list[float]:
        """The times at which each token was there."""
        times: list[float] = []

        def stop(ids: Any, scores: Any, **_: Any) -> Any:
            times.append(time.perf_counter())
            return self.torch.full((len(ids),), len(times) > 2 and times[-1] - times[0] > limit)

        prompt = self.torch.from_numpy(ids)
        greedy = {"do_sample": False, "max_new_tokens": new, "eos_token_id": -1, "pad_token_id": 0}
        mask = self.torch.ones_like(prompt)
        self.model.generate(prompt, attention_mask=mask, stopping_criteria=[stop], **greedy, **self.options)
        return times


class LlamaCpp:
    """The same for a GGUF file."""

    def __init__(self, name: str, folder: Path, threads: int) -> None:
        import llama_cpp

        self.api = llama_cpp
        start = time.perf_counter()
        path = folder / f"{name.split()[-1]}.gguf"
        model = llama_cpp.llama_model_load_from_file(str(path).encode(), llama_cpp.llama_model_default_params())
        params = llama_cpp.llama_context_default_params()
        params.n_threads = params.n_threads_batch = threads
        params.n_ctx, params.n_batch, params.n_ubatch, params.n_seq_max = LONG * MANY, LONG, LONG, MANY
        self.context = llama_cpp.llama_init_from_model(model, params)
        self.load = time.perf_counter() - start
        self.footprint = llama_cpp.llama_model_size(model)
        self.batch = llama_cpp.llama_batch_init(LONG, 0, 1)

    def forward(self, ids: np.ndarray, position: int, outputs: int = 1) -> np.ndarray:
        """The logits of the last tokens of each row; a position of 0 begins anew."""
        api, batch, (rows, columns) = self.api, self.batch, ids.shape
        if position == 0:
            api.llama_memory_clear(api.llama_get_memory(self.context), False)
        batch.n_tokens = rows * columns
        for i, token in enumerate(ids.ravel().tolist()):
            row, column = divmod(i, columns)
            batch.token[i], batch.pos[i], batch.n_seq_id[i] = token, position + column, 1
            batch.seq_id[i][0], batch.logits[i] = row, column >= columns - outputs
        if api.llama_decode(self.context, batch):
            raise RuntimeError("llama_decode failed")
        kept = [i for i in range(batch.n_tokens) if batch.logits[i]]
        pointers = [api.llama_get_logits_ith(self.context, i) for i in kept]
        return np.stack([np.ctypeslib.as_array(p, (VOCAB,)) for p in pointers])

    def logits(self, ids: np.ndarray) -> np.ndarray:
        return self.forward(ids, 0, ids.shape[1])

    def prefill(self, ids: np.ndarray) -> None:
        self.forward(ids, 0)

    def decode(self, ids: np.ndarray, new: int, limit: float) -> list[float]:
        times: list[float] = []
        position = 0
        while len(times) < new and not (len(times) > 2 and times[-1] - times[0] > limit):
            logits = self.forward(ids, position)
            position += ids.shape[1]
            ids = logits.argmax(1)[:, None]
            times.append(time.perf_counter())
        return times


def others() -> float:
    """Seconds of all cores that something else than this process and its children has used (Linux only)."""
    user, nice, system, _, _, *rest = (int(field) for field in Path("/proc/stat").read_text().split()[1:9])
    return (user + nice + system + sum(rest)) / os.sysconf("SC_CLK_TCK") - sum(os.times()[:4])


def measure(name: str, folder: Path, threads: int, limit: float) -> dict[str, float]:
    backend = (LlamaCpp if name.startswith("llama.cpp") else Transformers)(name, folder, threads)
    ids = np.random.default_rng(0).integers(3, VOCAB, (MANY, LONG))

    def decode(rows: int) -> float:
        times = backend.decode(ids[:rows, :PROMPT], NEW, limit)
        return rows * (len(times) - 1) / (times[-1] - times[0])

    def prefill() -> float:
        start = time.perf_counter()
        backend.prefill(ids[:1])
        return LONG / (time.perf_counter() - start)

    def best(call: Callable[[], float]) -> float:
        """Of three, or fewer where they take longer than the limit."""
        start, rates = time.perf_counter(), [call()]
        while len(rates) < 3 and time.perf_counter() - start < limit:
            rates.append(call())
        return max(rates)

    logits = backend.logits(ids[:1, :PROMPT])
    if name == "bf16":
        np.save(folder / "logits.npy", logits)
    result = {"load": backend.load, "footprint": backend.footprint / 1e9}
    if (folder / "logits.npy").exists():
        reference = np.load(folder / "logits.npy")
        result["error"] = float(np.linalg.norm(logits - reference) / np.linalg.norm(reference))
    start, before = time.perf_counter(), others()
    for key, rows in (("b1", 1), ("b8", MANY)):
        # a static cache has the length of what is asked for, and another length is compiled again
        backend.decode(ids[:rows, :PROMPT], NEW if name.endswith("compiled") else 3, math.inf)
        result[key] = best(lambda rows=rows: decode(rows))
    prefill()
    result["prefill"] = best(prefill)
    result["others"] = (others() - before) / (time.perf_counter() - start)
    return result


def run(command: list[str]) -> tuple[str, str]:
    """Last line of the output, or why there is none."""
    result = subprocess.run(command, capture_output=True, text=True)
    if result.returncode:
        return "", f"exit code {result.returncode}, {(result.stderr.strip().splitlines() or [''])[-1][:200]}"
    return (result.stdout.strip().splitlines() or [""])[-1], ""


def show(results: dict[str, dict[str, float] | str]) -> None:
    from rich.console import Console
    from rich.table import Table

    table = Table("backend", title="tokens per second, each with its ratio to bf16")
    for column in ("load s", "GB", "rel L2", "b1", "", "b8", "", "prefill", "", "others"):
        table.add_column(column, justify="right")
    base = results.get("bf16")
    for name, result in results.items():
        cells = ["-"] * 10
        if isinstance(result, dict):
            cells = [f"{result['load']:.1f}", f"{result['footprint']:.2f}", f"{result.get('error', math.nan):.3f}"]
            for key in ("b1", "b8", "prefill"):
                ratio = result[key] / base[key] if isinstance(base, dict) else math.nan
                cells += [f"{result[key]:.1f}", f"{ratio:.2f}"]
            cells.append(f"{result['others']:.2f}")
        table.add_row(name, *cells)
    console = Console(width=110)
    console.print(table)
    for name, result in results.items():
        if isinstance(result, str):
            console.print(f"{name}: {result}", markup=False, highlight=False)


def main() -> None:
    names = [*BACKENDS, *PEERS]
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, help="keep the files here, or find them here")
    parser.add_argument("--peers", action="store_true")
    parser.add_argument("--only", nargs="+", choices=names, metavar="NAME", help=", ".join(names))
    parser.add_argument("--threads", type=int, default=os.cpu_count())
    parser.add_argument("--limit", type=float, default=20, help="seconds for one measurement")
    parser.add_argument("--prefix", default="")
    parser.add_argument("--worker", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.worker in ("float", "gguf"):
        return prepare(args.folder, args.worker == "gguf", args.threads)
    if args.worker:
        return print(json.dumps(measure(args.worker, args.folder, args.threads, args.limit)))
    chosen = args.only or [*BACKENDS, *(PEERS if args.peers else ())]
    with tempfile.TemporaryDirectory() as temporary:
        folder = args.folder or Path(temporary)
        command = [*shlex.split(args.prefix), sys.executable, "-W", "ignore", __file__, "--folder", str(folder)]
        command += ["--threads", str(args.threads), "--limit", str(args.limit), "--worker"]
        error = run([*command, "float"])[1]
        if error:
            raise SystemExit(f"the model could not be made: {error}")
        without_gguf = run([*command, "gguf"])[1] if any(name.startswith("llama.cpp") for name in chosen) else ""
        results: dict[str, dict[str, float] | str] = {}
        for name in chosen:
            error = without_gguf if name.startswith("llama.cpp") else ""
            output, error = ("", error) if error else run([*command, name])
            results[name] = error or json.loads(output)
            print(f"{name}: {results[name]}", file=sys.stderr, flush=True)
    show(results)


if __name__ == "__main__":
    main()
