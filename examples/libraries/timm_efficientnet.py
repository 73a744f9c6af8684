"""A timm EfficientNet, trained with timm's loss and optimizer factory: with fusednn, or with --stock without.

pip install fusednn timm
python examples/libraries/timm_efficientnet.py
"""

import sys

import timm
import timm.loss
import timm.optim
import torch

import fusednn


def main(fused: bool = True, steps: int = 20, size: int = 64, batch_size: int = 16) -> list[float]:
    """Train, and return the loss of each step."""
    torch.manual_seed(0)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    model = timm.create_model("efficientnet_lite0", num_classes=10, drop_rate=0.0).to(device)
    loss_fn = timm.loss.LabelSmoothingCrossEntropy(0.1)
    optimizer = timm.optim.create_optimizer_v2(model, "adamw", lr=1e-3, weight_decay=0.05)
    if fused:
        print(fusednn.replace_layers(model, fuse=True))  # BatchNormAct2d joins the convolution before it
        fusednn.replace_layers(loss_fn)
        optimizer = fusednn.optim.replace(optimizer)
    losses: list[float] = []
    for _ in range(steps):
        images = torch.randn(batch_size, 3, size, size, device=device)  # put your own here
        loss = loss_fn(model(images), torch.arange(batch_size, device=device) % 10)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses


if __name__ == "__main__":
    print(*main(fused="--stock" not in sys.argv), sep="\n")
