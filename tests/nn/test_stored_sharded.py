"""Stored tensors under FSDP: each process holds its rows, and the numbers are those of the whole model."""

import os
import subprocess
import sys

PROGRAM = """
import sys
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
import quanto_hf

rank, rendezvous = int(sys.argv[1]), sys.argv[2]
torch.set_num_threads(1)
dist.init_process_group("gloo", init_method=f"file://{rendezvous}", rank=rank, world_size=2)
mesh = init_device_mesh("cpu", (2,))
for weights in ("int8", "int4"):
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(64, 48), nn.ReLU(), nn.Linear(48, 40))
    quanto_hf.freeze(quanto_hf.quantize(net, weights=weights))
    x = torch.randn(3, 64)
    wanted, nbytes = net(x).detach(), sum(p.nbytes for p in net.parameters())
    for layer in (net[0], net[2], net):
        fully_shard(layer, mesh=mesh)
    for _ in range(2):
        made = net(x)
        made.sum().backward()
        assert torch.equal(made, wanted) and net[0].bias.grad is not None
    assert sum(p.to_local().nbytes for p in net.parameters()) <= 0.6 * nbytes
    assert net[0].weight_packed.dtype in (torch.int8, torch.uint8)
    print(weights, "right", flush=True)
"""


def test_two_processes_hold_half_of_the_packed_weights_each(tmp_path):
    command = [sys.executable, "-c", PROGRAM]
    started = [
        subprocess.Popen(
            [*command, str(rank), str(tmp_path / "rendezvous")],
            env={**os.environ, "GLOO_SOCKET_IFNAME": "lo"},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in (0, 1)
    ]
    # by what they say, not by how they end: gloo may abort a process whose peer has left
    said = [process.communicate(timeout=180) for process in started]
    assert [out.split("\n") for out, _ in said] == [["int8 right", "int4 right", ""]] * 2, said
