"""Code that calls torch.nn.functional, in modules and out of them: with fusednn, or with --stock without.

python examples/libraries/functions.py
"""

import sys
from contextlib import nullcontext

import torch
import torch.nn.functional as F
from torch import Tensor

import fusednn


def network(images: Tensor, parameters: list[Tensor]) -> Tensor:
    filters, weight, bias = parameters
    x = F.gelu(F.conv2d(images, filters, padding=1))
    return F.linear(F.max_pool2d(x, 2).flatten(1), weight, bias)


def main(fused: bool = True, steps: int = 20, size: int = 16, batch_size: int = 16) -> list[float]:
    """Train, and return the loss of each step."""
    torch.manual_seed(0)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    shapes = [(8, 3, 3, 3), (10, 8 * (size // 2) ** 2), (10,)]
    parameters = [(0.1 * torch.randn(shape)).to(device).requires_grad_() for shape in shapes]
    optimizer = torch.optim.RMSprop(parameters, lr=1e-3)
    losses: list[float] = []
    with fusednn.replace_functions() if fused else nullcontext():  # the names in torch.nn.functional mean ours
        for _ in range(steps):
            images = torch.randn(batch_size, 3, size, size, device=device)  # put your own here
            loss = F.cross_entropy(network(images, parameters), torch.arange(batch_size, device=device) % 10)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            losses.append(loss.item())
    return losses


if __name__ == "__main__":
    print(*main(fused="--stock" not in sys.argv), sep="\n")
