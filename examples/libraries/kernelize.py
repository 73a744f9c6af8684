"""Hugging Face's kernels: ``kernelize`` gives layers fusednn's forward, from a repository on disk; or --stock without.

pip install fusednn kernels
python examples/libraries/kernelize.py
"""

import sys
from pathlib import Path

import torch
from torch import nn

from kernels import LocalLayerRepository, Mode, kernelize, use_kernel_forward_from_hub, use_kernel_mapping

REPOSITORY = Path(__file__).parent / "kernel_repository"


@use_kernel_forward_from_hub("BatchNorm2d")
class BatchNorm2d(nn.BatchNorm2d):
    """Under a name that kernels are mapped to."""


@use_kernel_forward_from_hub("SiLU")
class SiLU(nn.SiLU):
    """Likewise; those of transformers are."""


def main(fused: bool = True, steps: int = 20, size: int = 16, batch_size: int = 16) -> list[float]:
    """Train, and return the loss of each step."""
    torch.manual_seed(0)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    model = nn.Sequential(nn.Conv2d(3, 8, 3), BatchNorm2d(8), SiLU(), nn.Flatten(), nn.Linear(8 * (size - 2) ** 2, 10))
    model = model.to(device).train()
    if fused:
        names = ("BatchNorm2d", "SiLU")
        mapping = {name: {device: LocalLayerRepository(REPOSITORY, layer_name=name)} for name in names}
        with use_kernel_mapping(mapping):
            model = kernelize(model, mode=Mode.TRAINING, device=device)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    losses: list[float] = []
    for _ in range(steps):
        images = torch.randn(batch_size, 3, size, size, device=device)  # put your own here
        loss = nn.functional.cross_entropy(model(images), torch.arange(batch_size, device=device) % 10)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses


if __name__ == "__main__":
    print(*main(fused="--stock" not in sys.argv), sep="\n")
