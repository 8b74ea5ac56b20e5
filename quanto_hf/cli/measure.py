"""A causal language model measured: loading, perplexity, divergence, speed, a line of text."""

import re
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from torch import nn
from transformers import AutoModelForCausalLM, AutoTokenizer

from quanto_hf import QuantoConfig, heldout_text
from quanto_hf.flow import windows

LENGTH = 256
# logits of the reference are kept up to this size, so that each type does not run the float model again
KEPT_BYTES = 512 << 20


def load(model: str, weights: str | QuantoConfig | None = None) -> Any:
    """A causal language model, float or quantized as it was saved, or quantized now to a number type."""
    config = QuantoConfig(weights=weights) if isinstance(weights, str) else weights
    # not quantization_config=None, with which transformers forgets the config of a saved quantized model
    quantized = {} if config is None else {"quantization_config": config}
    return AutoModelForCausalLM.from_pretrained(model, **quantized)


def tokenizer(model: str) -> Any:
    """The tokenizer of a model."""
    return AutoTokenizer.from_pretrained(model)


def read_text(file: Path | None) -> str:
    """The text of a file, or the bundled one.

    Raises:
        ValueError: the file cannot be read as text.
    """
    if file is None:
        return str(heldout_text())
    try:
        return file.read_text(encoding="utf-8")
    except OSError as error:
        raise ValueError(f"the text {file} cannot be read: {error.strerror}") from None
    except UnicodeDecodeError:
        raise ValueError(f"the text {file} is not UTF-8") from None


def cut(text: str, tokens: Any, config: Any, length: int, most: int | None) -> torch.Tensor:
    """Windows of token ids, shape (windows, length).

    Raises:
        ValueError: the text is too short, or a window is longer than the model reads.
    """
    longest = getattr(config.get_text_config(), "max_position_embeddings", None)
    if longest is not None and length > longest:
        raise ValueError(f"length={length} is more than the {longest} tokens that the model reads")
    found = windows(tokens(text, add_special_tokens=False).input_ids, length)
    return found[:most]


class Remembered(nn.Module):
    """A model that keeps its logits, for the same windows asked again."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model
        self.kept: dict[bytes, torch.Tensor] = {}

    def forward(self, input_ids: torch.Tensor) -> Any:
        """As of the model."""
        key = input_ids.cpu().numpy().tobytes()
        if key in self.kept:
            return SimpleNamespace(logits=self.kept[key])
        logits = self.model(input_ids=input_ids).logits
        if sum(t.nbytes for t in self.kept.values()) + logits.nbytes <= KEPT_BYTES:
            self.kept[key] = logits
        return SimpleNamespace(logits=logits)


@torch.no_grad()
def generate(model: Any, tokens: Any, prompt: str, count: int = 20) -> tuple[str, float]:
    """What a model goes on with, greedily, and its tokens per second after a warm-up.

    The speed is the better one of 2 runs; a model that needs over a second runs once.
    """
    inputs = tokens(prompt, return_tensors="pt")
    fixed = {"do_sample": False, "pad_token_id": tokens.pad_token_id or tokens.eos_token_id or 0}
    model.generate(**inputs, max_new_tokens=4, min_new_tokens=4, **fixed)
    best = 0.0
    for _ in range(2):
        start = time.perf_counter()
        made = model.generate(**inputs, max_new_tokens=count, min_new_tokens=count, **fixed)
        taken = time.perf_counter() - start
        best = max(best, count / taken)
        if taken > 1:
            break
    return re.sub(r"\s+", " ", tokens.decode(made[0], skip_special_tokens=True)).strip(), best


def disk_bytes(folder: str | Path) -> int:
    """Bytes of the weight files of a model folder."""
    files = [file for ending in ("*.safetensors", "*.bin") for file in Path(folder).glob(ending)]
    return sum(file.stat().st_size for file in files)
