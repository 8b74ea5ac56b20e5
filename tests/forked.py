"""Programs that need a process of their own, but no import of torch of their own, which takes 3 s: one process imports
what they share, and becomes each of them by a fork."""

import json
import os
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import NamedTuple

PARENT = """
import importlib, json, os, sys, traceback

modules, cases, folder = json.load(sys.stdin)
for module in modules:
    try:
        importlib.import_module(module)
    except ImportError:
        pass  # a package of an extra: a program that needs it says so

def become(program, environment, arguments):
    os.environ.clear()
    os.environ.update(environment)
    sys.argv[1:] = arguments
    try:
        exec(compile(program, "<string>", "exec"), {"__name__": "__main__"})
    except SystemExit as end:
        return end.code if isinstance(end.code, int) else int(end.code is not None)
    except BaseException:
        traceback.print_exc()
        return 1
    return 0

codes = []
for number, case in enumerate(cases):
    if (child := os.fork()) == 0:
        for stream, name in ((1, "out"), (2, "err")):
            os.dup2(os.open(f"{folder}/{number}.{name}", os.O_WRONLY | os.O_CREAT, 0o600), stream)
        code = become(*case)
        sys.stdout.flush(), sys.stderr.flush()
        os._exit(code)
    codes.append(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))
print(json.dumps(codes))
"""


# what loading, running and training a model of transformers imports besides, as far as it is not part of transformers:
# that would register quanto_hf
MODELS = (
    "torch", "transformers", "torch.distributed.tensor", "torch._dynamo", "accelerate", "scipy.optimize",
    "sklearn.metrics",
)  # fmt: skip


class Program(NamedTuple):
    """What ``python -c`` gets. What ``modules`` read when they are imported must be in the environment of all."""

    code: str
    environment: Mapping[str, str] = {}
    arguments: Sequence[str] = ()


def run_all(
    programs: Sequence[Program],
    modules: Sequence[str] = ("torch", "transformers"),
    flags: Sequence[str] = (),
    environment: Mapping[str, str] | None = None,
) -> list[subprocess.CompletedProcess[str]]:
    """What became of each program, one after the other.

    Args:
        programs: they see ``modules`` imported. These must have started no thread, as torch and transformers do not.
        modules: dotted names.
        flags: of the interpreter, such as ``-W``.
        environment: of all programs, to which a program's own is added; None is that of this process.
    """
    common = dict(os.environ if environment is None else environment)
    common["PYTHONPATH"] = os.pathsep.join(filter(None, sys.path))
    with TemporaryDirectory() as folder:
        done = subprocess.run(
            [sys.executable, *flags, "-c", PARENT],
            input=json.dumps(
                [modules, [(p.code, {**common, **p.environment}, list(p.arguments)) for p in programs], folder]
            ),
            capture_output=True,
            text=True,
            env=common,
            timeout=600,
        )
        assert done.returncode == 0, done.stderr[-2000:]
        texts = [[Path(folder, f"{i}.{name}").read_text() for name in ("out", "err")] for i in range(len(programs))]
        codes = json.loads(done.stdout)
    return [subprocess.CompletedProcess(p.code, c, *t) for p, c, t in zip(programs, codes, texts, strict=True)]
