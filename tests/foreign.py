"""Programs that use transformers and never import quanto_hf, with the package and without it."""

import json
import os
import subprocess
import sys
from importlib.metadata import entry_points
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]

# what a program in an environment without the package begins with
ABSENT = "import sys\nsys.modules['quanto_hf'] = sys.modules['quanto_hf_autoload'] = None\n"


def environment(**values: str) -> dict[str, str]:
    """Of a new process, which finds the package where this one does."""
    path = os.pathsep.join(filter(None, (str(ROOT), os.environ.get("PYTHONPATH"))))
    return {**os.environ, "HF_HUB_OFFLINE": "1", "PYTHONPATH": path, "TOKENIZERS_PARALLELISM": "false", **values}


def check_installed() -> None:
    """Say what to do where the package is an older one, so that torch does not know it."""
    names = [entry.value for entry in entry_points(group="torch.backends")]
    assert "quanto_hf_autoload:autoload" in names, "install the package again: pip install -e ."


def run(code: str, *arguments: object, cwd: Any = "/", **values: str) -> str:
    """Standard output of a new interpreter that must end well."""
    done = subprocess.run(
        [sys.executable, "-c", code, *map(str, arguments)],
        capture_output=True, text=True, timeout=280, cwd=cwd, env=environment(**values),
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout


def run_json(code: str, *arguments: object, **values: str) -> Any:
    """What the last line of its output says."""
    return json.loads(run(code, *arguments, **values).strip().splitlines()[-1])
