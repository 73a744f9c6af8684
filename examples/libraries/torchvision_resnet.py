"""A torchvision ResNet, trained: with fusednn, or with --stock without.

pip install fusednn torchvision
python examples/libraries/torchvision_resnet.py
"""

import sys

import torch
import torchvision
from torch.utils.data import DataLoader, TensorDataset

import fusednn


def main(fused: bool = True, steps: int = 20, size: int = 64, batch_size: int = 16) -> list[float]:
    """Train, and return the loss of each step."""
    torch.manual_seed(0)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    images = torch.randn(batch_size * 4, 3, size, size)  # put your own here
    batches = DataLoader(TensorDataset(images, torch.arange(len(images)) % 10), batch_size, shuffle=True)
    model = torchvision.models.resnet18(num_classes=10).to(device, memory_format=torch.channels_last)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9, weight_decay=1e-4)
    loss_fn = torch.nn.CrossEntropyLoss(label_smoothing=0.1)
    if fused:
        fusednn.replace_layers(model, fuse=True)
        fusednn.replace_layers(loss_fn)
        optimizer = fusednn.optim.SGD(model.parameters(), lr=0.05, momentum=0.9, weight_decay=1e-4)
    losses: list[float] = []
    while len(losses) < steps:
        for batch, labels in batches:
            loss = loss_fn(model(batch.to(device, memory_format=torch.channels_last)), labels.to(device))
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            losses.append(loss.item())
    return losses[:steps]


if __name__ == "__main__":
    print(*main(fused="--stock" not in sys.argv), sep="\n")
