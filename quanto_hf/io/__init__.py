"""What is written to config.json and to checkpoints, and the checks of what is read.

Imports: ``schemes``, ``nn``, safetensors. Never: transformers. The format itself is in docs/format.md.
"""

from quanto_hf.io.checkpoint import CheckpointError, check_tensors, read_headers
from quanto_hf.io.format import FORMAT_VERSION, check_version, describe_modules, read_modules
from quanto_hf.io.mapped import MappedFiles
from quanto_hf.io.offload_folder import OffloadFolder, file_digest
from quanto_hf.io.whole_save import INTERRUPTED, finish_save, refuse_interrupted, save_whole

__all__ = [
    "FORMAT_VERSION",
    "INTERRUPTED",
    "CheckpointError",
    "MappedFiles",
    "OffloadFolder",
    "check_tensors",
    "check_version",
    "describe_modules",
    "file_digest",
    "finish_save",
    "read_headers",
    "read_modules",
    "refuse_interrupted",
    "save_whole",
]
