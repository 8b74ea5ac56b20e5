"""Tiny models in the published AQLM format, written as its authors' conversion does, with their dense twins."""

import json
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from tiny_models import TINY, build
from torch import nn

from quanto_hf.ops import AqlmWeight, code_dtype


@dataclass(frozen=True)
class Layout:
    """How blocks are stored."""

    num_codebooks: int
    nbits: int
    out_group: int = 1
    in_group: int = 8

    def __str__(self) -> str:
        rows = f"x{self.out_group}" if self.out_group > 1 else ""
        return f"{self.num_codebooks}x{self.nbits}g{self.in_group}{rows}"

    def config(self) -> dict[str, Any]:
        """The keys of config.json."""
        return {
            "in_group_size": self.in_group,
            "out_group_size": self.out_group,
            "num_codebooks": self.num_codebooks,
            "nbits_per_codebook": self.nbits,
        }

    def tensors(self, rows: int, columns: int, seed: int = 0) -> dict[str, torch.Tensor]:
        """Random tensors of a weight of about unit gain, in float32."""
        generator = torch.Generator().manual_seed(seed)
        half = 1 << (self.nbits - 1)
        shape = (rows // self.out_group, columns // self.in_group, self.num_codebooks)
        codes = torch.randint(-half, half, shape, generator=generator).to(code_dtype(self.nbits))
        # drawn once and repeated: 2**16 entries cost time
        books = torch.randn(
            (self.num_codebooks, min(1 << self.nbits, 4096), self.out_group, self.in_group), generator=generator
        )
        books = books.repeat(1, (1 << self.nbits) // books.shape[1], 1, 1) * (self.num_codebooks * columns) ** -0.5
        scales = torch.rand((shape[0], 1, 1, 1), generator=generator) + 0.5
        return {"codes": codes, "codebooks": books, "scales": scales}


LAYOUTS = [
    Layout(1, 16), Layout(1, 16, 1, 16), Layout(2, 8), Layout(1, 8), Layout(8, 8, 8), Layout(2, 8, 2),
    Layout(1, 12, 1, 4), Layout(3, 5, 2, 16),
]  # fmt: skip


def write(
    folder: Path, layout: Layout, dtype: torch.dtype = torch.float16, name: str = "llama", head: bool = False
) -> nn.Module:
    """Write a checkpoint: every linear layer has codes, and the list of what has none names parameters.

    Args:
        folder: is made.
        layout: of the codes.
        dtype: of all floats.
        name: of the architecture.
        head: whether the head has codes too.

    Returns:
        The model with the reconstructed weights in plain layers, float32.
    """
    model = build(name)
    for parameter in model.parameters():
        # not model.to(dtype), which would round the frequencies of rotary embeddings
        parameter.data = parameter.data.to(dtype).float()
    state = {key: tensor.to(dtype) for key, tensor in model.state_dict().items()}
    for i, (key, layer) in enumerate(linears(model, head)):
        made = layout.tensors(layer.out_features, layer.in_features, i)
        made = {part: tensor.to(dtype) if part != "codes" else tensor for part, tensor in made.items()}
        weight = AqlmWeight(*made.values()).dense(torch.float32)
        layer.weight.data = weight
        del state[f"{key}.weight"]
        state.update({f"{key}.{part}": tensor for part, tensor in made.items()})
    kept = [key for key in state if key.rpartition(".")[2] not in ("codes", "codebooks", "scales")]
    config = TINY[name].config().to_dict()
    config["architectures"] = [type(model).__name__]
    config["torch_dtype"] = str(dtype).removeprefix("torch.")
    config["quantization_config"] = {
        "quant_method": "aqlm",
        **layout.config(),
        "linear_weights_not_to_quantize": sorted(kept if head else {*kept, "lm_head.weight"}),
    }
    config.pop("dtype", None)
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(config))
    save_file(
        {key: tensor.contiguous() for key, tensor in state.items()}, folder / "model.safetensors", {"format": "pt"}
    )
    return model.eval()


def linears(model: nn.Module, head: bool = False) -> Iterable[tuple[str, nn.Linear]]:
    """The linear layers that get codes."""
    return [(n, m) for n, m in model.named_modules() if type(m) is nn.Linear and (head or not n.endswith("lm_head"))]


def logits(model: nn.Module, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    """Of some tokens, in float32."""
    with torch.no_grad():
        return model(input_ids=TINY["llama"].inputs()["input_ids"]).logits.float()
