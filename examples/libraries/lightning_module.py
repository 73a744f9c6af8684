"""A Lightning module: with fusednn, or with --stock without.

pip install fusednn pytorch-lightning
python examples/libraries/lightning_module.py
"""

import sys
from typing import Any

import pytorch_lightning as lightning
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

import fusednn


class Classifier(lightning.LightningModule):
    def __init__(self, fused: bool) -> None:
        super().__init__()
        self.fused, self.losses = fused, list[float]()
        self.network = nn.Sequential(
            nn.Conv2d(3, 16, 3, padding=1, bias=False),
            nn.BatchNorm2d(16),
            nn.ReLU(),
            nn.MaxPool2d(2),
            nn.Flatten(),
            nn.LazyLinear(10),
        )
        self.loss = nn.CrossEntropyLoss()

    def forward(self, images: Tensor) -> Tensor:
        logits: Tensor = self.network(images)
        return logits

    def training_step(self, batch: Any, _: int) -> Tensor:
        images, labels = batch
        loss: Tensor = self.loss(self(images), labels)
        self.losses.append(loss.item())
        return loss

    def configure_optimizers(self) -> torch.optim.Optimizer:
        cls = fusednn.optim.AdamW if self.fused else torch.optim.AdamW
        return cls(self.parameters(), lr=1e-3)


def main(fused: bool = True, steps: int = 20, size: int = 32, batch_size: int = 16) -> list[float]:
    """Train, and return the loss of each step."""
    lightning.seed_everything(0, verbose=False)
    images = torch.randn(batch_size * steps, 3, size, size)  # put your own here
    data = DataLoader(TensorDataset(images, torch.arange(len(images)) % 10), batch_size)
    model = Classifier(fused)
    model(images[:2])  # makes the lazy layer
    if fused:
        fusednn.replace_layers(model, fuse=True)  # in place, before the Trainer moves the module
    trainer = lightning.Trainer(
        max_epochs=1,
        accelerator="auto",
        devices=1,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    trainer.fit(model, data)
    return model.losses


if __name__ == "__main__":
    print(*main(fused="--stock" not in sys.argv), sep="\n")
