"""What a model is called with: found from the signature of its forward pass, and from what it says is missing."""

import inspect
import re
import time
import traceback
from collections.abc import Callable, Iterator
from typing import Any

import torch
from transformers import PreTrainedModel

from .shrink import parts

TEXT, BATCH = 16, 2
# seconds of one processor after which no more arguments are tried
PATIENCE = 4.0


def find(config: Any, *keys: str, default: Any = None) -> Any:
    """The first of these values that a config or a part of it has."""
    for key in keys:
        for part in parts(config):
            if (value := getattr(part, key, None)) is not None:
                return value
    return default


class Maker:
    """Makes inputs for one model. A kind of input may have several shapes, since configs do not say which.

    Args:
        config: of the model.
    """

    def __init__(self, config: Any) -> None:
        self.config = config
        self.draw = torch.Generator().manual_seed(1)

    def noise(self, *shape: int) -> torch.Tensor:
        """Normal values."""
        return torch.randn(shape, generator=self.draw)

    def tokens(self, batch: int = BATCH, length: int = TEXT) -> torch.Tensor:
        """Ids without special ones, which are below 200 (:mod:`.shrink`)."""
        size = find(self.config, "vocab_size", default=320)
        size = size if isinstance(size, int) else 320
        low = 200 if size > 220 else min(3, size - 1)
        return torch.randint(low, min(size, 300), (batch, length), generator=self.draw)

    def side(self) -> tuple[int, int]:
        """Height and width of a picture."""
        size = find(self.config, "image_size", "img_size", "input_size", default=64)
        if isinstance(size, dict):
            size = (size.get("height", 64), size.get("width", 64))
        if isinstance(size, list | tuple):
            return int(size[0]), int(size[-1])
        return int(size), int(size)

    def pictures(self) -> list[torch.Tensor]:
        """Four dimensions, or five for a video."""
        channels = find(self.config, "num_channels", "in_channels", "in_chans", "num_input_channels", default=3)
        channels = channels if isinstance(channels, int) else 3
        frames = find(self.config, "num_frames", "frames_per_clip", default=4)
        height, width = self.side()
        sizes = list(dict.fromkeys([(height, width), (64, 64), (224, 224), (256, 256)]))
        found = [self.noise(1, channels, h, w) for h, w in sizes]
        # two pictures to compare
        found.append(self.noise(1, 2, channels, *sizes[0]))
        return [*found, *(self.noise(1, int(frames), channels, h, w) for h, w in sizes[:1])]

    def features(self) -> list[torch.Tensor]:
        """Spectrograms: bins before frames, or after them."""
        bins = find(
            self.config, "num_mel_bins", "feature_size", "input_feat_per_channel", "feat_dim", "mel_dim", "input_dim",
            "input_feat_size", "n_mels", "spectrogram_bins", default=80,
        )  # fmt: skip
        bins = bins if isinstance(bins, int) else 80
        positions = find(self.config, "max_source_positions", default=100)
        long = 2 * positions if isinstance(positions, int) and positions < 2000 else 200
        return [
            self.noise(1, bins, long), self.noise(1, 96, bins), self.noise(1, bins, 96), self.noise(1, 1, 1024, bins),
            self.noise(1, 1, 96, bins), self.noise(1, long, bins), self.noise(1, bins, 3000),
        ]  # fmt: skip

    def waves(self) -> list[torch.Tensor]:
        """Samples, with and without channels."""
        bins = find(self.config, "num_mel_bins", default=80)
        return [
            self.noise(1, 8000), self.noise(1, 1, 8000), self.noise(1, 48000), self.noise(1, 1024, bins),
            self.noise(1, 2, 8000), self.noise(1, 1, 1920 * 4),
        ]  # fmt: skip

    def boxes(self, wide: bool) -> torch.Tensor:
        """Corners of the words of a page."""
        corners = torch.randint(0, 20, (BATCH, TEXT, 4), generator=self.draw)
        corners[..., 2:] += 20
        return corners if wide else corners / 64

    def series(self) -> list[torch.Tensor]:
        """The past of time series, with and without channels."""
        length = find(self.config, "context_length", default=32)
        channels = find(self.config, "num_input_channels", default=1)
        return [self.noise(BATCH, length, channels), self.noise(BATCH, length)]

    def codes(self) -> torch.Tensor:
        """Ids of each codebook of sound."""
        books = find(self.config, "n_codebooks", "num_codebooks", "num_quantizers", default=8)
        return torch.randint(0, 16, (1, books, 12), generator=self.draw)

    def vectors(self, *widths: str) -> torch.Tensor:
        """What a layer gets, as wide as the first of these values of the config says."""
        return self.noise(BATCH, TEXT, find(self.config, *widths))

    def alternatives(self, name: str) -> list[torch.Tensor]:
        """Values that an argument may take; empty where nothing is known about it."""
        if name in ("pixel_values", "images", "pixel_values_images", "image", "pixel_values_videos"):
            found = self.pictures()
            return found[::-1] if name.endswith("videos") else found
        simple: dict[str, Callable[[], list[torch.Tensor]]] = {
            "input_features": self.features,
            "input_values": self.waves,
            "flattened_patches": lambda: [self.noise(1, 64, 2 + 3 * find(self.config, "patch_size", default=16) ** 2)],
            "state": lambda: [self.noise(1, find(self.config, "max_state_dim", default=32))],
            "audio_values": self.waves,
            "spectrogram": self.features,
            "past_values": self.series,
            "bbox": lambda: [self.boxes(True)],
            "pixel_mask": lambda: [torch.ones(1, *self.side(), dtype=torch.int64)],
            "attention_mask": lambda: [torch.ones(BATCH, TEXT, dtype=torch.int64)],
            "audio_codes": lambda: [self.codes()],
            "encoder_hidden_states": lambda: [self.vectors("encoder_hidden_size", "hidden_size")],
            "hidden_states": lambda: [self.vectors("hidden_size", "d_model")],
            "inputs_embeds": lambda: [self.vectors("hidden_size", "d_model")],
        }  # fmt: skip
        if name in simple:
            return simple[name]()
        if name.endswith("input_ids") or name in ("input_ids", "question_input_ids", "input_ids_text"):
            return [self.tokens(), self.tokens(1)]
        return []


MAIN = (
    "input_ids", "pixel_values", "input_features", "input_values", "pixel_values_videos", "decoder_input_ids",
    "audio_codes", "inputs_embeds", "hidden_states", "spectrogram",
)  # fmt: skip


def candidates(model: Any, changes: dict[str, Any]) -> Iterator[dict[str, Any]]:
    """Arguments for a model, the likely ones first.

    Args:
        model: with the config and the forward pass.
        changes: name -> tensor of arguments that the family has of its own.
    """
    taken = inspect.signature(model.forward).parameters
    if changes:
        yield dict(changes)
    yield from illustrated(model)
    main = model.main_input_name
    order = [name for name in dict.fromkeys([main, *MAIN]) if name in taken or name == main]
    for first in order:
        for value in Maker(model.config).alternatives(first):
            # what goes with the same shape of batch
            yield {first: value}
            for other in order:
                if other != first and other != "inputs_embeds":
                    for more in Maker(model.config).alternatives(other):
                        if more.shape[0] == value.shape[0]:
                            yield {first: value, other: more}


def illustrated(model: Any) -> Iterator[dict[str, Any]]:
    """Text with a picture: as many placeholders as the picture becomes vectors."""
    marker = find(model.config, "image_token_id", "image_token_index")
    taken = inspect.signature(model.forward).parameters
    if not {"input_ids", "pixel_values"} <= set(taken) or not hasattr(model, "get_image_features") or marker is None:
        return
    maker = Maker(model.config)
    width = model.get_input_embeddings().weight.shape[-1]
    for picture in maker.pictures():
        try:
            with torch.no_grad():
                made = model.get_image_features(pixel_values=picture)
            made = getattr(made, "pooler_output", made)
            count = sum(x.numel() for x in made) // width if isinstance(made, list | tuple) else made.numel() // width
        except Exception:
            continue
        text = maker.tokens(1)
        ids = torch.cat([text[:, :4], torch.full((1, count), marker), text[:, 4:]], 1)
        yield {"input_ids": ids, "pixel_values": picture, "attention_mask": torch.ones_like(ids)}


def missing(error: Exception, given: dict[str, Any], model: Any) -> list[str]:
    """Names of arguments that a forward pass misses, as far as its error says which."""
    taken = inspect.signature(model.forward).parameters
    words = re.findall(r"[a-z_]+", str(error))
    return [word for word in dict.fromkeys(words) if word in taken and word not in given]


def call(model: Any, calls: "Calls") -> list[torch.Tensor]:
    """The numbers that the model gives, and those parts of it that it does not call itself, with the same random
    numbers each time."""
    made = []
    for name, inputs in calls.items():
        torch.manual_seed(0)
        with torch.no_grad():
            made += floats(model.get_submodule(name)(**inputs))
    return made


# name of a part, "" for the model itself -> arguments
Calls = dict[str, dict[str, Any]]


def working(model: Any, changes: dict[str, Any]) -> tuple[Calls, str]:
    """Arguments with which a model gives finite numbers, the same for those of its models that do not run then (the
    vision tower of one that was given text), and why the model itself does not run."""
    ran: set[str] = set()
    hooks = [
        module.register_forward_pre_hook(lambda module, args, name=name: ran.add(name))
        for name, module in model.named_modules()
        if name and isinstance(module, PreTrainedModel)
    ]
    deadline = time.process_time() + PATIENCE
    inputs, said = _working(model, changes, deadline)
    if inputs is not None:
        ran.clear()
        call(model, {"": inputs})
    for hook in hooks:
        hook.remove()
    calls: Calls = {} if inputs is None else {"": inputs}
    names = [name for name, module in model.named_modules() if name and isinstance(module, PreTrainedModel)]
    if inputs is None:
        ran.clear()
    covered: list[str] = []
    for name in names:
        # what holds a part that runs is not called for it again, nor what is in a part that is called here
        if any(f"{done}.".startswith(f"{name}.") for done in ran) or any(
            name.startswith(f"{done}.") for done in covered
        ):
            continue
        found, _ = _working(model.get_submodule(name), {}, deadline + PATIENCE)
        if found is not None:
            calls[name] = found
            covered.append(name)
    return calls, said


def _working(model: Any, changes: dict[str, Any], deadline: float) -> tuple[dict[str, Any] | None, str]:
    taken = inspect.signature(model.forward).parameters
    said = ""
    for tried, inputs in enumerate(candidates(model, changes)):
        if tried > 40 or time.process_time() > deadline:
            break
        for _ in range(3):
            try:
                made = call(model, {"": inputs})
            except Exception as error:
                said = f"{type(error).__name__}: {error}" if tried == 0 else said
                # models of which no part, or another one, has a cache
                if "use_cache" in taken and "use_cache" not in inputs and "cache" in traceback.format_exc().lower():
                    inputs = {**inputs, "use_cache": False}
                    continue
                more = missing(error, inputs, model)
                maker, batch = Maker(model.config), next(iter(inputs.values())).shape[0]
                found = {n: next((v for v in maker.alternatives(n) if v.shape[0] == batch), None) for n in more}
                values = {name: value for name, value in found.items() if value is not None}
                if not values:
                    break
                inputs = {**inputs, **values}
                continue
            if made and all(bool(x.isfinite().any()) for x in made):
                return inputs, ""
            said = said or "the float model gives no finite numbers"
            break
    return None, said


def floats(result: Any) -> list[torch.Tensor]:
    """The floating-point tensors of a result, without caches."""
    if isinstance(result, torch.Tensor):
        return [result] if result.is_floating_point() and result.numel() else []
    if isinstance(result, dict):
        return [x for key, value in result.items() if "past" not in key and "cache" not in key for x in floats(value)]
    if isinstance(result, list | tuple):
        return [x for value in result for x in floats(value)]
    return []
