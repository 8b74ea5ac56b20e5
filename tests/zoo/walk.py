"""Families in processes of their own, which are forked from one that has imported what all need: a crash or an endless
loop of one ends that one."""

import json
import os
import resource
import signal
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

MEMORY = 12 << 30


def walk(
    names: Sequence[str], task: Callable[[str], dict[str, Any]], jobs: int, limit: float
) -> Iterator[tuple[str, dict[str, Any]]]:
    """The result of each family, in the order in which they end. What a process does not come to has ``crash``, and
    how long it took is ``seconds``.

    Args:
        names: of the families.
        task: gives what JSON can have. This process must have started no thread.
        jobs: processes at a time.
        limit: seconds of a processor for one family; ten times as many by the clock.
    """
    # ends the processes of the families as well
    before = signal.signal(signal.SIGTERM, lambda number, frame: sys.exit(128 + number))
    waiting, running = list(reversed(names)), {}
    with tempfile.TemporaryDirectory() as place:
        try:
            while waiting or running:
                while waiting and len(running) < jobs:
                    name = waiting.pop()
                    if (child := os.fork()) == 0:
                        _become(task, name, Path(place), int(limit))
                    running[child] = (name, time.monotonic())
                child, status = os.waitpid(-1, os.WNOHANG)
                if child in running:
                    name, began = running.pop(child)
                    yield name, _result(Path(place), name, status, time.monotonic() - began)
                    continue
                for other, (_, began) in running.items():
                    if time.monotonic() - began > 10 * limit:
                        os.kill(other, signal.SIGKILL)
                time.sleep(0.02)
        finally:
            signal.signal(signal.SIGTERM, before)
            for child in running:
                os.kill(child, signal.SIGKILL)


def _become(task: Callable[[str], dict[str, Any]], name: str, place: Path, limit: int) -> None:
    """Do the task, write what comes of it, and end."""
    out = os.open(place / f"{name}.log", os.O_WRONLY | os.O_CREAT, 0o600)
    os.dup2(out, 1)
    os.dup2(out, 2)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    resource.setrlimit(resource.RLIMIT_CPU, (limit, limit))
    resource.setrlimit(resource.RLIMIT_DATA, (MEMORY, MEMORY))
    tempfile.tempdir = str(place)
    try:
        result = task(name)
    except BaseException as error:
        result = {"family": name, "crash": f"{type(error).__name__}: {error}", "trace": traceback.format_exc()[-3000:]}
    (place / f"{name}.json").write_text(json.dumps(result))
    sys.stdout.flush()
    os._exit(0)


def _result(place: Path, name: str, status: int, seconds: float) -> dict[str, Any]:
    file = place / f"{name}.json"
    if file.exists():
        return {**json.loads(file.read_text()), "seconds": round(seconds, 1)}
    log = (place / f"{name}.log").read_text(errors="replace")[-2000:]
    code = os.waitstatus_to_exitcode(status)
    return {"family": name, "crash": f"the process ended with {code}", "trace": log, "seconds": round(seconds, 1)}
