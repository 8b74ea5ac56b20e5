"""Families of transformers, tiny: each is quantized while it loads, runs, has the bytes of its plan, is saved and
reloaded with the same bits. A sample in each run; all of them with ``pytest -m zoo``, which takes half an hour."""

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from zoo.families import names
from zoo.life import wrong
from zoo.sample import SAMPLE
from zoo.walk import walk

ROOT = Path(__file__).parents[2]


# families of which nothing is packed unasked
FLOAT = ("encodec", "ibert", "resnet")


def lives(file, *arguments):
    """What ``python -m tests.zoo tiny`` finds, by family."""
    command = [sys.executable, "-m", "tests.zoo", "tiny", "--out", str(file), *arguments]
    path = os.pathsep.join([str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])])
    done = subprocess.run(command, cwd=ROOT, env={**os.environ, "PYTHONPATH": path}, capture_output=True, text=True)
    assert done.returncode in (0, 1), done.stderr[-3000:]
    return {(found := json.loads(line))["family"]: found for line in file.read_text().splitlines()}


@pytest.fixture(scope="module")
def sample(tmp_path_factory):
    return lives(tmp_path_factory.mktemp("zoo") / "sample.jsonl", "--sample")


def test_every_family_of_the_sample_is_one():
    assert set(SAMPLE) <= set(names()) and len(SAMPLE) == 60 and len(names()) > 500


@pytest.mark.parametrize("name", SAMPLE)
def test_a_family_is_quantized_runs_saves_and_reloads(name, sample):
    found = sample[name]
    assert not wrong(found), wrong(found)
    assert found["runs"] and found["kinds"], found["float"]
    assert all(kind["packed"] or name in FLOAT for kind in found["kinds"].values())


@pytest.mark.zoo
def test_all_families(tmp_path):
    found = lives(tmp_path / "all.jsonl")
    assert set(found) == set(names())
    assert {name: wrong(each) for name, each in found.items() if wrong(each)} == {}
    assert sum(bool(each["kinds"]) for each in found.values()) > 500


def ends(name):
    """What a process can come to."""
    if name == "loop":
        while True:
            pass
    if name == "signal":
        os.kill(os.getpid(), signal.SIGKILL)
    if name == "error":
        raise ValueError("nothing")
    return {"family": name}


def test_a_family_that_crashes_or_loops_ends_alone():
    found = dict(walk(["loop", "signal", "error", "fine"], ends, 2, 1))
    assert found["fine"]["family"] == "fine" and "crash" not in found["fine"]
    assert found["error"]["crash"] == "ValueError: nothing" and "in ends" in found["error"]["trace"]
    assert (
        found["loop"]["crash"].startswith("the process ended with -")
        and found["signal"]["crash"] == "the process ended with -9"
    )
