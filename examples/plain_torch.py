"""Train a small torch model with rounded weights, then pack it: it computes the same after as before.

python examples/plain_torch.py [--weights int2] [--steps 200]
"""

import argparse

import torch
from torch import nn

import quanto_hf


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--weights", default="int2")
    parser.add_argument("--steps", type=int, default=200)
    args = parser.parse_args()
    torch.manual_seed(0)
    teacher = nn.Sequential(nn.Linear(64, 128), nn.ReLU(), nn.Linear(128, 8))
    student = nn.Sequential(nn.Linear(64, 128), nn.ReLU(), nn.Linear(128, 8))
    quanto_hf.quantize(student, weights=args.weights)
    optimizer = torch.optim.Adam(student.parameters(), lr=3e-3)
    inputs = torch.randn(1024, 64)
    wanted = teacher(inputs).detach()
    for step in range(args.steps + 1):
        loss = (student(inputs) - wanted).square().mean()
        if step % 50 == 0:
            print(f"step {step}: loss {loss.item():.5f}")
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    before = student(inputs)
    quanto_hf.freeze(student)
    print(f"largest difference after packing: {(student(inputs) - before).abs().max().item():.1e}")
    print(quanto_hf.report(student))


if __name__ == "__main__":
    main()
