"""Stored tensors under FSDP: each process holds its rows, and the numbers are those of the whole model."""

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import nn

import quanto_hf


def _run(rank: int, rendezvous: str, weights: str) -> None:
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{rendezvous}", rank=rank, world_size=2)
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(64, 48), nn.ReLU(), nn.Linear(48, 40))
    quanto_hf.freeze(quanto_hf.quantize(net, weights=weights))
    x = torch.randn(3, 64)
    wanted, nbytes = net(x).detach(), sum(p.nbytes for p in net.parameters())
    mesh = init_device_mesh("cpu", (2,))
    for layer in (net[0], net[2], net):
        fully_shard(layer, mesh=mesh)
    for _ in range(2):
        made = net(x)
        made.sum().backward()
        assert torch.equal(made, wanted) and net[0].bias.grad is not None
    held = [p.to_local() for p in net.parameters()]
    assert sum(t.nbytes for t in held) <= 0.6 * nbytes
    assert net[0].weight_packed.dtype in (torch.int8, torch.uint8)
    dist.destroy_process_group()


@pytest.mark.parametrize("weights", ["int8", "int4"])
def test_two_processes_hold_half_of_the_packed_weights_each(weights, tmp_path):
    mp.spawn(_run, (str(tmp_path / "rendezvous"), weights), nprocs=2)
