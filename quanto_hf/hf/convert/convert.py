"""Quantize a checkpoint on disk, one output file at a time: the model never is in memory as a whole."""

import json
import os
import tempfile
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from huggingface_hub import split_torch_state_dict_into_shards
from huggingface_hub.serialization._base import parse_size_to_int
from transformers import GenerationConfig

from quanto_hf.flow import Report, report
from quanto_hf.hf.config.quanto import QuantoConfig
from quanto_hf.hf.config.refusals import refuse_no_config
from quanto_hf.hf.convert.outfolder import LAST, WEIGHTS, OutFolder, fingerprint
from quanto_hf.hf.convert.sources import side_files
from quanto_hf.hf.convert.streaming import NotStreamable, Reader, find_sources, freeze_empty, output_tensors
from quanto_hf.hf.load.gguf import SUFFIX, float_folder, named_gguf
from quanto_hf.hf.memory.skeleton import Skeleton, build_skeleton
from quanto_hf.hf.save.own_files import with_guards
from quanto_hf.io import FORMAT_VERSION, CheckpointError, write_model_file
from quanto_hf.io.decoders import decodable, decoder_of
from quanto_hf.io.inventory import INDEX
from quanto_hf.io.safe_files import TEMPORARY
from quanto_hf.ops.scratch import free

PATTERN = "model{suffix}.safetensors"


@dataclass(frozen=True)
class Conversion:
    """What :func:`convert_checkpoint` did.

    Args:
        written: weight files that this call wrote.
        kept: weight files that a former call had finished.
        not_streamed: why the whole model was loaded; empty if it was converted one output file at a time.
        nbytes_before: bytes of the weight files of the source.
        nbytes_after: bytes of the weight files of the output.
        report: one row per parameter.
        cls: name of the class that loads the output.
    """

    written: int
    kept: int
    not_streamed: str
    nbytes_before: int
    nbytes_after: int
    report: Report
    cls: str = ""


def convert_checkpoint(
    source: str | os.PathLike[str],
    out: str | os.PathLike[str],
    config: QuantoConfig | None = None,
    *,
    dtype: str = "auto",
    max_shard_size: int | str = "2GB",
    auto_class: Any = None,
    progress: Callable[[int, int], Any] | None = None,
) -> Conversion:
    """Quantize a float checkpoint, or one that can be decoded (MXFP4, FP8 blocks), into a folder that
    ``from_pretrained`` loads.

    The tensors are those of ``from_pretrained(source, quantization_config=config)`` followed by ``save_pretrained``,
    but the memory is that of one output file. A call that was interrupted is resumed by the same call: finished
    files are checked and kept. Until everything is there the folder has no config.json, so nothing loads it.

    A checkpoint that is not in safetensors files, or whose tensors are split on loading or saving, is loaded as a
    whole. So is a GGUF file, whose float model is written to a folder beside ``out`` first, with its tokenizer.

    Args:
        source: a local folder, or a GGUF file.
        out: a new or empty folder, or the one of a former same call.
        config: how; None is ``QuantoConfig()``.
        dtype: of the float parts: "auto", "float32", "bfloat16" or "float16".
        max_shard_size: of an output file, in bytes or as "2GB".
        auto_class: the class whose ``from_pretrained`` is called; None is the class that the checkpoint names.
        progress: called with (tensors done, tensors in all).

    Raises:
        CheckpointError: the source is quantized already or damaged, or ``out`` holds something else.
        ValueError: a value is not allowed.
        TypeError: the config is not one.
        OSError: ``out`` cannot be written.

    Example:
        >>> import quanto_hf, tempfile
        >>> out = tempfile.mkdtemp()
        >>> convert_checkpoint(quanto_hf.tiny_lm(), out, QuantoConfig(weights="int4")).written
        1
    """
    refuse_no_config(config, "config")
    config, size = config or QuantoConfig(), _shard_bytes(max_shard_size)
    _check_config(config)
    file = named_gguf(source)
    if file is None:
        return _convert(Path(source), out, config, dtype, size, auto_class, progress)
    with float_folder(file, Path(out), dtype, auto_class) as folder:
        done = _convert(folder, out, config, dtype, size, auto_class, progress, file)
    return replace(done, nbytes_before=file.stat().st_size)


def _convert(
    folder: Path,
    out: str | os.PathLike[str],
    config: QuantoConfig,
    dtype: str,
    size: int,
    auto_class: Any,
    progress: Callable[[int, int], Any] | None,
    origin: Path | None = None,
) -> Conversion:
    """Args:
    folder: the float model.
    origin: the file that the folder was made of, by which a second call knows it.
    """
    _check_source(folder)
    if Path(out).resolve() == folder.resolve():
        raise CheckpointError(f"the output folder {out} is the model itself; give another")
    sides = side_files(folder)
    skeleton = build_skeleton(str(folder), config, dtype, auto_class)
    settings = {
        "model": fingerprint([origin] if origin else [folder / "config.json", *map(Path, skeleton.files)]),
        "config": config.to_dict(),
        "dtype": str(skeleton.dtype),
        "max_shard_size": size,
        "class": type(skeleton.model).__name__,
        "format_version": FORMAT_VERSION,
    }
    target = OutFolder(out, settings, set(sides))
    target.claim()
    if not target.is_complete():
        target.reopen()
        for name, path in sides.items():
            target.copy(path, name)
    try:
        return _stream(skeleton, target, size, progress)
    except NotStreamable as reason:
        return _load_and_save(skeleton, target, config, size, str(reason))


def _stream(skeleton: Skeleton, target: OutFolder, size: int, progress: Callable[[int, int], Any] | None) -> Conversion:
    """Write the output files that are not there yet, then what makes the folder loadable."""
    sources = find_sources(skeleton)
    freeze_empty(skeleton)
    model, outputs = skeleton.model, output_tensors(skeleton)
    empty = {name: tensor for name, (_, tensor) in outputs.items()}
    split = split_torch_state_dict_into_shards(empty, filename_pattern=PATTERN, max_shard_size=size)
    _, metadata = skeleton.quantizer.get_state_dict_and_metadata(model)
    written = done = 0
    with Reader(skeleton, sources) as reader:
        for file, names in split.filename_to_tensors.items():
            kept = target.is_kept(file)
            tensors = {}
            for name in names:
                if not kept:
                    tensors[name] = reader.tensor(outputs[name][0], outputs[name][1].dtype)
                done += 1
                if progress is not None:
                    progress(done, len(outputs))
            if not kept:
                with target.writing(file) as temporary:
                    write_model_file(tensors, temporary, {**metadata, "format": "pt"})
                written += 1
    free()
    if not target.is_complete():
        if split.is_sharded:
            index = {
                "metadata": {"total_parameters": model.num_parameters(), **split.metadata},
                "weight_map": with_guards(target.path, split.tensor_to_filename),
            }
            target.write_text(INDEX, json.dumps(index, indent=2, sort_keys=True) + "\n")
        _write_configs(skeleton, target)
    return _result(skeleton, target, written, "")


def _write_configs(skeleton: Skeleton, target: OutFolder) -> None:
    """generation_config.json, and config.json last."""
    model, source = skeleton.model, Path(skeleton.model.config.name_or_path)
    with tempfile.TemporaryDirectory() as scratch:
        if (source / "generation_config.json").exists():
            target.copy(source / "generation_config.json", "generation_config.json")
        elif model.can_generate():
            # older models keep these values in config.json, from where the config class drops them
            generation = GenerationConfig.from_pretrained(source, "config.json", _from_model_config=True)
            generation.save_pretrained(scratch)
            target.copy(Path(scratch, "generation_config.json"), "generation_config.json")
        model.config.save_pretrained(scratch)
        target.copy(Path(scratch, "config.json"), "config.json")


def _load_and_save(skeleton: Skeleton, target: OutFolder, config: QuantoConfig, size: int, reason: str) -> Conversion:
    """The same with the whole model in memory; nothing of it is kept if it is interrupted."""
    if target.is_complete():
        freeze_empty(skeleton)
        return _result(skeleton, target, 0, reason)
    cls, path = type(skeleton.model), skeleton.model.config.name_or_path
    model = cls.from_pretrained(path, quantization_config=config, dtype=skeleton.dtype)
    folder = target.path / f"{TEMPORARY}whole"
    model.save_pretrained(folder, max_shard_size=size)
    names = sorted(os.listdir(folder), key=lambda name: (*LAST, name).index(name) if name in LAST else -1)
    for name in names:
        with target.writing(name) as temporary:
            os.replace(folder / name, temporary)
    folder.rmdir()
    written = len([name for name in names if WEIGHTS.fullmatch(name)])
    return _result(replace(skeleton, model=model), target, written, reason)


def _result(skeleton: Skeleton, target: OutFolder, written: int, reason: str) -> Conversion:
    after = [target.path / name for name in target.digests]
    return Conversion(
        written=written,
        kept=len(after) - written,
        not_streamed=reason,
        nbytes_before=sum(os.path.getsize(file) for file in skeleton.files),
        nbytes_after=sum(os.path.getsize(file) for file in after),
        report=report(skeleton.model),
        cls=type(skeleton.model).__name__,
    )


def _shard_bytes(size: int | str) -> int:
    try:
        found = parse_size_to_int(size) if isinstance(size, str) else size
    except ValueError:
        found = 0
    if found <= 0:
        raise ValueError(
            f"max_shard_size={size!r} is not a size; give a number of bytes, or one such as '2GB' or '500MB'"
        )
    return found


def _check_config(config: QuantoConfig) -> None:
    if config.dequantize:
        raise ValueError("dequantize=True leaves nothing to save quantized; leave it out")
    if config.qat:
        raise ValueError("qat=True leaves the weights float, for training; leave it out")
    if config.static_activations:
        raise ValueError(
            "static_activations=True needs data, and a conversion has none; leave it out, and calibrate the result"
        )


def _check_source(folder: Path) -> None:
    try:
        saved = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    except FileNotFoundError:
        files = sorted(str(file) for file in folder.glob(f"*{SUFFIX}")) if folder.is_dir() else []
        advice = f"; give one of its GGUF files, such as {files[0]}" if files else ""
        raise CheckpointError(f"{folder} is not a model: it has no config.json{advice}") from None
    except ValueError as error:
        raise CheckpointError(f"{folder / 'config.json'} cannot be read: {error}") from None
    quantized = saved.get("quantization_config") or (saved.get("text_config") or {}).get("quantization_config")
    if quantized and (not isinstance(quantized, dict) or decoder_of(quantized) is None):
        method = quantized.get("quant_method") if isinstance(quantized, dict) else None
        raise CheckpointError(
            f"{folder} is quantized already, with {method or 'an unknown method'}; give the original float model "
            f"(those in {decodable()} are decoded)"
        )
