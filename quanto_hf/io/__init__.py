"""What is written to config.json and to checkpoints, and the checks of what is read.

Imports: ``schemes``, ``nn``, safetensors. Never: transformers. Formats of saved models are in
:mod:`quanto_hf.io.formats`; our own is told in docs/format.md.
"""

from quanto_hf.io.checkpoint import CheckpointError, check_tensors, read_headers
from quanto_hf.io.formats.quanto import (
    FORMAT_VERSION,
    VERSION_KEY,
    check_version,
    describe_modules,
    find_guards,
    guards_for,
    read_modules,
    without_guards,
)
from quanto_hf.io.mapped import MappedFiles, aligned
from quanto_hf.io.offload_folder import OffloadFolder
from quanto_hf.io.safe_files import file_digest
from quanto_hf.io.shard_writer import write_model_file
from quanto_hf.io.whole_save import INTERRUPTED, finish_save, refuse_interrupted, save_whole

__all__ = [
    "FORMAT_VERSION",
    "INTERRUPTED",
    "VERSION_KEY",
    "CheckpointError",
    "MappedFiles",
    "OffloadFolder",
    "aligned",
    "check_tensors",
    "check_version",
    "describe_modules",
    "file_digest",
    "find_guards",
    "finish_save",
    "guards_for",
    "read_headers",
    "read_modules",
    "refuse_interrupted",
    "save_whole",
    "without_guards",
    "write_model_file",
]
