"""What is said about the memory of the fit is what it takes."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch.profiler import ProfilerActivity, profile

from quanto_hf.fit.aqlm import Layout, loops, quantize_aqlm
from quanto_hf.fit.aqlm.memory import fit_bytes

# (out_features, in_features), layout, dtype, calibrated
SMALL = {
    "2x4": ((128, 512), Layout(2, 4), torch.bfloat16, False),
    "float32": ((128, 512), Layout(2, 4), torch.float32, False),
    "1x4": ((128, 1024), Layout(1, 4), torch.bfloat16, False),
    "rows": ((128, 512), Layout(3, 3, 2, 16), torch.bfloat16, False),
    "large-books": ((64, 256), Layout(1, 11), torch.float32, False),
    "calibrated": ((128, 256), Layout(2, 4), torch.bfloat16, True),
    "calibrated-flat": ((16, 512), Layout(2, 4, 2), torch.float32, True),
}


def measured_peak(work):
    """Most bytes that torch had allocated at a time."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiled:
        work()
    events = [event for event in profiled.profiler.kineto_results.events() if event.name() == "[memory]"]
    held = peak = 0
    for event in sorted(events, key=lambda event: event.start_ns()):
        held += event.nbytes()
        peak = max(peak, held)
    return peak


@pytest.mark.parametrize("native", [True, False], ids=["native", "torch"])
@pytest.mark.parametrize("shape, layout, dtype, calibrated", SMALL.values(), ids=SMALL)
def test_the_peak_is_within_a_fifth_of_what_is_said(shape, layout, dtype, calibrated, native, monkeypatch):
    if native and not loops.runs_native(torch.device("cpu")):
        pytest.skip("there is no native library")
    if not native:
        monkeypatch.setattr(loops, "runs_native", lambda device: False)
    weight, hessian = torch.randn(shape).to(dtype), torch.eye(shape[1]) if calibrated else None
    sizes = {"num_codebooks": layout.num_codebooks, "nbits": layout.nbits}
    groups = {"out_group": layout.out_group, "in_group": layout.in_group}
    peak = measured_peak(lambda: quantize_aqlm(weight, **sizes, **groups, hessian=hessian, iterations=1))
    assert fit_bytes(shape, layout, dtype, calibrated=calibrated, native=native) == pytest.approx(peak, rel=0.2)


CHILD = """
import json, torch
from quanto_hf.fit.aqlm import quantize_aqlm

torch.set_num_threads(2)

def status(name):
    with open("/proc/self/status") as lines:
        return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(name))

# what is checked and started at first is no part of it
quantize_aqlm(torch.randn(64, 64), num_codebooks=2, nbits=3, hessian=torch.eye(64))
for shape, sizes, calibrated in json.loads(input()):
    weight, hessian = torch.randn(shape).bfloat16(), torch.eye(shape[1]) if calibrated else None
    before = status("VmRSS")
    with open("/proc/self/clear_refs", "w") as file:
        file.write("5")  # the peak starts anew
    quantize_aqlm(weight, **sizes, hessian=hessian, iterations=1)
    print(status("VmHWM") - before)
"""
LARGE = [
    ((512, 2048), {"num_codebooks": 2, "nbits": 3}, False),
    ((1024, 1024), {"num_codebooks": 1, "nbits": 4}, False),
    ((1024, 1024), {"num_codebooks": 2, "nbits": 3, "out_group": 2}, False),
    ((512, 1024), {"num_codebooks": 2, "nbits": 3}, True),
]


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="the peak is read from /proc")
@pytest.mark.skipif(not loops.runs_native(torch.device("cpu")), reason="there is no native library")
def test_a_process_takes_that_much_more():
    # tensors go back to the system at once; else glibc keeps up to a half more for sizes of below 32 MB
    environment = {**os.environ, "MALLOC_MMAP_THRESHOLD_": "65536"}
    done = subprocess.run(
        [sys.executable, "-c", CHILD], input=json.dumps(LARGE), capture_output=True, text=True, env=environment,
        timeout=300,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    for peak, (shape, sizes, calibrated) in zip(map(int, done.stdout.split()), LARGE, strict=True):
        layout = Layout(**sizes)
        said = fit_bytes(tuple(shape), layout, torch.bfloat16, calibrated=calibrated, native=True)
        print(f"{shape} {layout}: {peak / 1e6:.1f} MB, said {said / 1e6:.1f}")
        assert said == pytest.approx(peak, rel=0.2)


def test_native_loops_and_float32_take_less_and_a_moment_takes_more():
    shape, layout = (4096, 4096), Layout(2, 8)
    native = fit_bytes(shape, layout, torch.bfloat16, native=True)
    assert fit_bytes(shape, layout, torch.float32, native=True) == native - 4 * 4096**2
    assert fit_bytes(shape, layout, torch.bfloat16) > 1.3 * native
    assert fit_bytes(shape, layout, torch.bfloat16, native=True, calibrated=True) > native + 8 * 4096**2
