"""Train the tiny Llama language model used by the tests and by the command line demo.

The text is prose from docstrings: of the Python standard library and of the permissively licensed packages in PACKAGES
that are found in the `--source-dir` folders. Source files are parsed with `ast`, never imported, so the packages only
need to lie there (`pip install --no-deps --target SOURCE_DIR ...`). Three steps share a work folder; each is skipped if
its result is already there, and the training continues from its last checkpoint:

    python examples/train_tiny_lm.py --work-dir /tmp/tiny-lm --source-dir SOURCE_DIR --out-dir quanto_hf/assets/tiny-lm

The learning rate is constant after a short warmup, then falls linearly to zero over the last `--decay-steps` steps.
Creating the file WORK_DIR/decay-now starts that last phase at once.
"""

import argparse
import ast
import hashlib
import importlib.metadata
import inspect
import json
import math
import os
import re
import sysconfig
import time
from collections import deque
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor
from pathlib import Path

import numpy as np
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

SEED = 2024
SEQ_LEN = 256
MICRO_BATCH = 4
VOCAB_SIZE = 2048
HELDOUT_BYTES = 150_000
HELDOUT_ONE_IN = 60  # one source file in so many is a candidate for the held-out text
MAX_PACKAGE_BYTES = 6_000_000  # of extracted text, so that no single package dominates
DOCUMENT_CHARS = 2000  # docstrings of one file are joined into documents of about this size

# Distributions under BSD, MIT, Apache 2.0, PSF or HPND licences; what is not installed is left out.
PACKAGES = """
    numpy scipy pandas scikit-learn sympy mpmath matplotlib networkx statsmodels scikit-image astropy django
    sqlalchemy xarray dask distributed nltk sphinx twisted torch transformers huggingface_hub tokenizers accelerate
    peft datasets evaluate diffusers tensorflow-cpu tensorflow-probability tensorflow-datasets keras jax flax optax
    chex dm-haiku jraph numpyro pyro-ppl gpytorch botorch lightning pytorch-lightning torchvision torchaudio
    torchmetrics timm kornia monai captum albumentations gymnasium stable-baselines3 allennlp dgl qiskit cirq-core
    pennylane optuna xgboost lightgbm pymc arviz numba polars bokeh plotly panel param holoviews seaborn zarr h5py
    tables sunpy biopython nibabel nilearn mne scikit-bio dipy trimesh pyvista imbalanced-learn mlflow ray langchain
    langchain-core langchain-community llama-index-core openai anthropic google-cloud-aiplatform google-cloud-compute
    google-cloud-dlp google-cloud-container google-cloud-bigquery google-cloud-storage aws-cdk-lib azure-mgmt-network
    azure-mgmt-compute azure-mgmt-web azure-ai-ml azure-storage-blob pulumi-aws kubernetes textblob spacy pyomo cvxpy
    simpy control python-docx openpyxl wagtail djangorestframework pillow setuptools pip poetry-core moto botocore
    boto3 apache-beam apache-airflow-core nova neutron keystone cinder oslo.config openstacksdk mypy flask werkzeug
    tornado aiohttp fastapi starlette pydantic click rich jinja2 celery kombu pytest nbconvert ipython jupyter_client
    notebook traitlets ipywidgets requests urllib3 cryptography shapely geopandas pyproj rasterio scrapy pyglet kivy
    panda3d arcade mayavi vtk traits
""".split()


# ---------------------------------------------------------------------------------------------------------------- text
def paragraphs(docstring: str) -> Iterator[str]:
    """Yield the prose paragraphs of a docstring, each unwrapped to one line."""
    for block in re.split(r"\n\s*\n", inspect.cleandoc(docstring)):
        if not block.isascii() or re.search(r">>>|^\s*\.\. |^\s*[@$%#|]|^In \[|\)$\s*\(|://", block, re.MULTILINE):
            continue
        lines = block.splitlines()
        while len(lines) > 1 and re.fullmatch(r"\s*([-=~^*])\1{2,}\s*", lines[1]):  # a heading with its underline
            lines = lines[2:]
        text = " ".join(" ".join(lines).split())
        text = re.sub(r":[\w:+-]+:`[~!]?([^`<>]+?)(\s*<[^`>]*>)?`", r"`\1`", text).replace("``", "`")
        text = text.removesuffix("::") + ("." if text.endswith("::") else "")
        words = re.findall(r"(?<![\w.`])[A-Za-z][a-z]*(?:['-][a-z]+)?(?=[\s,.;:!?)\"]|$)", text)
        plain = sum(map(len, words)) + text.count(" ")
        if len(words) >= 5 and plain >= 0.78 * len(text) and not re.search(r"(\W)\1{3}|\S{45}", text):
            yield text


def docstrings_of(path: Path) -> list[list[str]]:
    """Return the docstrings of one source file, as lists of paragraphs."""
    try:
        tree = ast.parse(path.read_bytes())
    except (SyntaxError, ValueError, OSError, RecursionError, MemoryError):
        return []
    kinds = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)
    found = (ast.get_docstring(node, clean=False) for node in ast.walk(tree) if isinstance(node, kinds))
    return [kept for doc in found if doc and (kept := list(paragraphs(doc)))]


def collect_package(job: tuple[str, list[tuple[str, Path]]]) -> tuple[str, list[tuple[str, list[list[str]]]]]:
    """Extract one package, files in the order of a hash of their path, up to MAX_PACKAGE_BYTES."""
    name, files = job
    taken, size = [], 0
    for relative, path in sorted(files, key=lambda item: file_hash(item[0])):
        if docs := docstrings_of(path):
            taken.append((relative, docs))
            size += sum(len(text) + 2 for doc in docs for text in doc)
            if size > MAX_PACKAGE_BYTES:
                break
    return name, taken


def file_hash(relative: str) -> int:
    return int.from_bytes(hashlib.sha256(relative.encode()).digest()[:8], "big")


def find_sources(source_dirs: list[Path]) -> tuple[list[tuple[str, list[tuple[str, Path]]]], list[dict[str, str]]]:
    """List the source files per package: (relative path, path), with name, version and licence of each package."""
    skipped = re.compile(r"(^|/)(tests?|testing|_?vendor(ed)?|_?externals?|site-packages|lib2to3)/|/test_|_pb2")
    stdlib = Path(sysconfig.get_paths()["stdlib"])
    files = [(path.relative_to(stdlib).as_posix(), path) for path in sorted(stdlib.rglob("*.py"))]
    jobs = [("python", [item for item in files if not skipped.search(item[0])])]
    about = [{"name": "python", "version": sysconfig.get_python_version(), "licence": "PSF-2.0"}]
    wanted = {re.sub(r"[-_.]+", "-", name).lower() for name in PACKAGES}
    for dist in importlib.metadata.distributions(path=[str(folder) for folder in source_dirs]):
        name = re.sub(r"[-_.]+", "-", dist.metadata["Name"]).lower()
        if name in wanted:
            wanted.remove(name)
            found = [(file.as_posix(), Path(file.locate())) for file in dist.files or [] if file.suffix == ".py"]
            jobs.append((name, [item for item in found if not skipped.search(item[0])]))
            classifiers = [line for line in dist.metadata.get_all("Classifier") or [] if line.startswith("License ::")]
            licence = dist.metadata.get("License-Expression") or "; ".join(
                line.split(" :: ")[-1] for line in classifiers
            )
            licence = licence or (dist.metadata.get("License") or "?").strip().splitlines()[0][:60]
            about.append({"name": name, "version": dist.version, "licence": licence})
    return sorted(jobs), sorted(about, key=lambda row: row["name"])


def collect(source_dirs: list[Path], work_dir: Path) -> None:
    """Write train.jsonl (one document per line), heldout.txt and sources.json to the work folder."""
    jobs, about = find_sources(source_dirs)
    seen: set[str] = set()
    heldout_files, documents, sizes = [], [], {}
    with ProcessPoolExecutor() as pool:
        for name, taken in pool.map(collect_package, jobs):
            for relative, docs in taken:
                if file_hash(relative) % HELDOUT_ONE_IN == 0:
                    heldout_files.append((relative, docs))
                    continue
                parts, length = [], 0
                for text in (text for doc in docs for text in doc):
                    key = re.sub(r"[\W\d_]+", "", text).lower()  # equal but for case, digits and punctuation
                    if key not in seen:
                        seen.add(key)
                        parts.append(text)
                        length += len(text) + 2
                        sizes[name] = sizes.get(name, 0) + len(text) + 2
                    if length > DOCUMENT_CHARS:
                        documents.append("\n\n".join(parts))
                        parts, length = [], 0
                if parts:
                    documents.append("\n\n".join(parts))
            print(f"{name}: {len(taken)} files", flush=True)
    heldout, size = [], 0
    for _, docs in sorted(heldout_files, key=lambda item: file_hash("order" + item[0])):
        for text in (text for doc in docs for text in doc):
            key = re.sub(r"[\W\d_]+", "", text).lower()
            if key not in seen and size + len(text) + 2 <= HELDOUT_BYTES:
                seen.add(key)
                heldout.append(text)
                size += len(text) + 2
    with open(work_dir / "train.jsonl", "w") as file:
        file.writelines(json.dumps(text) + "\n" for text in documents)
    (work_dir / "heldout.txt").write_text("\n\n".join(heldout) + "\n")
    (work_dir / "sources.json").write_text(
        json.dumps([row | {"bytes": sizes[row["name"]]} for row in about if row["name"] in sizes], indent=1)
    )
    print(f"{sum(map(len, documents)) / 1e6:.1f} MB for training, {size / 1e3:.0f} kB held out", flush=True)


# ----------------------------------------------------------------------------------------------------------- tokenizer
def train_tokenizer(work_dir: Path) -> None:
    """Train a byte-level BPE tokenizer and write the encoded training text to tokens.npy."""
    with open(work_dir / "train.jsonl") as file:
        documents = [json.loads(line) for line in file]
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    special = ["<s>", "</s>"]
    trainer = trainers.BpeTrainer(vocab_size=VOCAB_SIZE, special_tokens=special, initial_alphabet=alphabet)
    bpe.train_from_iterator(documents[::3], trainer)
    bpe.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 0)])
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=bpe, bos_token="<s>", eos_token="</s>", pad_token="</s>", model_max_length=2 * SEQ_LEN
    )
    tokenizer.save_pretrained(work_dir / "tokenizer")
    np.random.default_rng(SEED).shuffle(documents)
    ids = [
        [*encoding.ids, 1]
        for start in range(0, len(documents), 4096)
        for encoding in bpe.encode_batch(documents[start : start + 4096])
    ]
    tokens = np.concatenate([np.array(row, np.uint16) for row in ids])
    np.save(work_dir / "tokens.npy", tokens)
    print(f"{len(tokens) / 1e6:.2f} M tokens, {sum(map(len, documents)) / len(tokens):.2f} bytes per token", flush=True)


# ------------------------------------------------------------------------------------------------------------ training
def make_model() -> LlamaForCausalLM:
    config = LlamaConfig(
        vocab_size=VOCAB_SIZE,
        hidden_size=384,
        intermediate_size=1024,
        num_hidden_layers=2,
        num_attention_heads=6,
        num_key_value_heads=2,
        head_dim=64,
        max_position_embeddings=2 * SEQ_LEN,
        tie_word_embeddings=True,
        bos_token_id=0,
        eos_token_id=1,
        pad_token_id=1,
        initializer_range=0.03,
    )
    torch.manual_seed(SEED)
    return LlamaForCausalLM(config)


def learning_rate_factor(step: int, decay_start: int, decay_steps: int, warmup: int = 100) -> float:
    return min((step + 1) / warmup, 1.0, max(0.0, (decay_start + decay_steps - step) / decay_steps))


@torch.no_grad()
def heldout_loss(model: LlamaForCausalLM, ids: list[int]) -> float:
    """Mean loss in nats per predicted token, over non-overlapping windows of SEQ_LEN tokens (the rest is dropped)."""
    windows = torch.tensor(ids[: len(ids) // SEQ_LEN * SEQ_LEN]).view(-1, SEQ_LEN)
    total = 0.0
    for batch in windows.split(16):
        logits = model(input_ids=batch).logits[:, :-1].float()
        total += torch.nn.functional.cross_entropy(logits.flatten(0, 1), batch[:, 1:].flatten(), reduction="sum").item()
    return total / (windows.shape[0] * (SEQ_LEN - 1))


def export(
    model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast, work_dir: Path, out_dir: Path
) -> LlamaForCausalLM:
    """Save the model in bfloat16, its tokenizer and the held-out text; each file is replaced at once."""
    temporary = work_dir / "export"
    exported = LlamaForCausalLM(model.config).to(torch.bfloat16)
    exported.load_state_dict(model.state_dict())
    exported.save_pretrained(temporary)
    tokenizer.save_pretrained(temporary)
    settings = json.loads((temporary / "tokenizer_config.json").read_text())
    settings = {key: value for key, value in settings.items() if "local" not in key}
    settings["tokenizer_class"] = "PreTrainedTokenizerFast"  # the name that all versions of transformers know
    (temporary / "tokenizer_config.json").write_text(json.dumps(settings, indent=2) + "\n")
    (temporary / "heldout.txt").write_bytes((work_dir / "heldout.txt").read_bytes())
    out_dir.mkdir(parents=True, exist_ok=True)
    for path in sorted(temporary.iterdir()):
        part = out_dir / f"{path.name}.part"
        part.write_bytes(path.read_bytes())
        os.replace(part, out_dir / path.name)
    return exported.eval()


def report(model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast, text: str) -> str:
    """Return held-out loss, perplexity, bits per byte and some greedy continuations."""
    ids = tokenizer.encode(text, add_special_tokens=False, verbose=False)
    loss = heldout_loss(model.float(), ids)
    bits = loss / math.log(2) * len(ids) / len(text.encode())
    rows = [f"held-out loss {loss:.4f}  perplexity {math.exp(loss):.3f}  bits per byte {bits:.4f}"]
    for prompt in ("Return the", "This function", "If the", "A class that"):
        inputs = tokenizer(prompt, return_tensors="pt")
        output = model.generate(**inputs, max_new_tokens=40, do_sample=False)
        rows.append("  " + repr(tokenizer.decode(output[0], skip_special_tokens=True)))
    return "\n".join(rows)


class Worker:
    """A replica of the model that shares its weights, with gradients of its own."""

    def __init__(self, model: LlamaForCausalLM, micro_batches: int):
        self.model = LlamaForCausalLM(model.config)
        self.model.set_attn_implementation("eager")  # compiled, it is faster here than the fused one
        for mine, shared in zip(self.model.parameters(), model.parameters(), strict=True):
            mine.data = shared.data
        self.loss = torch.compile(self.batch_loss, dynamic=False)
        self.micro_batches = micro_batches

    def batch_loss(self, inputs: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        with torch.autocast("cpu", torch.bfloat16, cache_enabled=False):
            logits = self.model(input_ids=inputs, use_cache=False).logits
        loss = torch.nn.functional.cross_entropy(logits.float().flatten(0, 1), targets.flatten())
        return loss / self.micro_batches

    def run(self, tasks: deque[torch.Tensor]) -> float:
        """Take micro-batches until none is left; return the sum of their shares of the loss."""
        total = 0.0
        while True:
            try:
                batch = tasks.popleft()
            except IndexError:
                return total
            loss = self.loss(batch[:, :-1].contiguous(), batch[:, 1:].contiguous())
            loss.backward()
            total += loss.item()

    def give_gradients(self, model: LlamaForCausalLM) -> None:
        for mine, shared in zip(self.model.parameters(), model.parameters(), strict=True):
            if mine.grad is not None:
                shared.grad = mine.grad if shared.grad is None else shared.grad.add_(mine.grad)
                mine.grad = None


def train(args: argparse.Namespace) -> None:
    tokenizer = PreTrainedTokenizerFast.from_pretrained(args.work_dir / "tokenizer")
    tokens = np.load(args.work_dir / "tokens.npy", mmap_mode="r")
    heldout = (args.work_dir / "heldout.txt").read_text()
    model = make_model()
    matrices = [p for name, p in model.named_parameters() if p.ndim == 2 and "embed" not in name]
    others = [p for name, p in model.named_parameters() if p.ndim != 2 or "embed" in name]
    optimizers = [torch.optim.AdamW(others, lr=args.lr, betas=(0.9, 0.95), weight_decay=0.0)]
    for part in (matrices[::2], matrices[1::2]):  # two, to be stepped by two threads
        optimizers.append(torch.optim.AdamW(part, lr=args.lr, betas=(0.9, 0.95), weight_decay=0.1))
    step, decay_start = 0, args.steps - args.decay_steps
    checkpoint = args.work_dir / "checkpoint.pt"
    if checkpoint.exists():
        state = torch.load(checkpoint)
        model.load_state_dict(state["model"])
        for optimizer, saved in zip(optimizers, state["optimizers"], strict=True):
            optimizer.load_state_dict(saved)
        step, decay_start = state["step"], min(decay_start, state["decay_start"])
    n_params = sum(p.numel() for p in model.parameters())
    print(f"{n_params} parameters, {len(tokens) / 1e6:.1f} M tokens of text, from step {step}", flush=True)

    # Each thread has a replica with gradients of its own and takes the next micro-batch when it is done with one: on a
    # busy machine much faster than threads within the operators, which wait for the slowest one at every operator.
    workers = [Worker(model, args.batch // MICRO_BATCH) for _ in range(args.threads)]
    example = torch.zeros(MICRO_BATCH, SEQ_LEN + 1, dtype=torch.int64)
    for worker in workers:  # compilation, one at a time
        worker.run(deque([example]))
        worker.model.zero_grad()
    pool = ThreadPoolExecutor(args.threads, initializer=torch.set_num_threads, initargs=(1,))

    def save() -> None:
        state = {"model": model.state_dict(), "optimizers": [optimizer.state_dict() for optimizer in optimizers]}
        torch.save(state | {"step": step, "decay_start": decay_start}, checkpoint.with_suffix(".part"))
        os.replace(checkpoint.with_suffix(".part"), checkpoint)
        exported = export(model, tokenizer, args.work_dir, args.out_dir)
        seen = step * args.batch * SEQ_LEN
        print(f"step {step}: {seen / 1e6:.1f} M tokens, {seen / n_params:.1f} per parameter", flush=True)
        print(report(exported, tokenizer, heldout), flush=True)

    saved_at = logged_at = time.monotonic()
    losses: list[float] = []
    while step < decay_start + args.decay_steps:
        if decay_start > step and (args.work_dir / "decay-now").exists():
            decay_start = step
        factor = learning_rate_factor(step, decay_start, args.decay_steps)
        for optimizer in optimizers:
            for group in optimizer.param_groups:
                group["lr"] = args.lr * factor
        starts = np.random.default_rng((SEED, step)).integers(0, len(tokens) - SEQ_LEN, args.batch)
        batch = torch.from_numpy(np.stack([tokens[start : start + SEQ_LEN + 1] for start in starts]).astype(np.int64))
        tasks = deque(batch.split(MICRO_BATCH))
        loss = sum(pool.map(Worker.run, workers, [tasks] * len(workers)))
        for worker in workers:
            worker.give_gradients(model)
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        list(pool.map(lambda optimizer: optimizer.step(), optimizers))
        model.zero_grad()
        losses.append(loss)
        step += 1
        if step % 50 == 0 or step == 10:
            speed = len(losses) * args.batch * SEQ_LEN / (time.monotonic() - logged_at)
            print(f"step {step} loss {np.mean(losses):.4f} lr x{factor:.3f} {speed:.0f} tokens/s", flush=True)
            losses, logged_at = [], time.monotonic()
        if time.monotonic() - saved_at > args.save_seconds:
            save()
            saved_at = time.monotonic()
    save()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work-dir", type=Path, required=True, help="for text, tokens and checkpoints")
    parser.add_argument("--out-dir", type=Path, required=True, help="where the model goes")
    parser.add_argument(
        "--source-dir", type=Path, action="append", default=[], help="a folder with packages; repeatable"
    )
    parser.add_argument("--steps", type=int, default=2600)
    parser.add_argument("--decay-steps", type=int, default=600)
    parser.add_argument("--batch", type=int, default=32, help=f"sequences of {SEQ_LEN} tokens per step")
    parser.add_argument("--lr", type=float, default=0.0025)
    parser.add_argument("--threads", type=int, default=os.cpu_count())
    parser.add_argument("--save-seconds", type=float, default=600.0)
    args = parser.parse_args()
    torch.set_num_threads(1)
    args.work_dir.mkdir(parents=True, exist_ok=True)
    if not (args.work_dir / "sources.json").exists():
        collect(args.source_dir, args.work_dir)
    if not (args.work_dir / "tokens.npy").exists():
        train_tokenizer(args.work_dir)
    train(args)


if __name__ == "__main__":
    main()
