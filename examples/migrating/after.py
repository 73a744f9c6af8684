"""A training script as people write them: mixed precision on a GPU, a schedule, clipped gradients, a checkpoint.

pip install "fusednn[demo]"
python examples/migrating/before.py
python examples/migrating/after.py     # the same with fusednn
"""

from pathlib import Path

import torch
from sklearn.datasets import load_digits
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

import fusednn


def load_data() -> TensorDataset:
    images, labels = load_digits(return_X_y=True)
    return TensorDataset(torch.tensor(images, dtype=torch.float32).reshape(-1, 1, 8, 8) / 16, torch.tensor(labels))


def build_model() -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(1, 16, 3, padding=1, bias=False),
        nn.BatchNorm2d(16),
        nn.ReLU(inplace=True),
        nn.MaxPool2d(2),
        nn.Flatten(),
        nn.Linear(256, 64),
        nn.GELU(),
        nn.Linear(64, 10),
    )


def main(steps: int = 100, batch_size: int = 64, checkpoint: Path | None = None) -> list[float]:
    """Train, and return the loss of each step."""
    torch.manual_seed(0)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    model = build_model().to(device)
    fusednn.replace_layers(model)
    optimizer = fusednn.optim.AdamW(model.parameters(), lr=3e-3)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, max_lr=3e-3, total_steps=steps)
    scaler = torch.amp.GradScaler(device, enabled=device == "cuda")
    batches = DataLoader(load_data(), batch_size, shuffle=True, drop_last=True)
    losses: list[float] = []
    while len(losses) < steps:
        for images, labels in batches:
            with torch.autocast(device, dtype=torch.float16, enabled=device == "cuda"):
                loss = fusednn.autograd.cross_entropy(model(images.to(device)), labels.to(device), label_smoothing=0.1)
            optimizer.zero_grad()
            scaler.scale(loss).backward()
            scaler.unscale_(optimizer)
            nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            scaler.step(optimizer)
            scaler.update()
            schedule.step()
            losses.append(loss.item())
            if len(losses) == steps:
                break
    if checkpoint is not None:
        torch.save({"model": model.state_dict(), "optimizer": optimizer.state_dict()}, checkpoint)
    return losses


if __name__ == "__main__":
    history = main()
    print(f"loss {history[0]:.4f} in the first step, {history[-1]:.4f} in the last")
