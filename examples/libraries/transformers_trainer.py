"""A transformers image classifier with the Trainer: with fusednn, or with --stock without.

pip install fusednn transformers accelerate torchvision
python examples/libraries/transformers_trainer.py
"""

import sys
import tempfile
from typing import Any

import torch
from transformers import Trainer, TrainingArguments, ViTConfig, ViTForImageClassification

import fusednn


class Images(torch.utils.data.Dataset[dict[str, torch.Tensor]]):
    """Put your own here."""

    def __init__(self, number: int, size: int) -> None:
        self.images = torch.randn(number, 3, size, size, generator=torch.Generator().manual_seed(0))

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        return {"pixel_values": self.images[index], "labels": torch.tensor(index % 10)}


def main(fused: bool = True, steps: int = 20, size: int = 64, batch_size: int = 16, **options: Any) -> list[float]:
    """Train, and return the loss of each step; ``options`` of the model."""
    torch.manual_seed(0)
    config = ViTConfig(image_size=size, patch_size=16, num_labels=10, **options)
    model = ViTForImageClassification(config)
    if fused:
        fusednn.replace_layers(model, fuse=True)
    with tempfile.TemporaryDirectory() as folder:
        arguments = TrainingArguments(
            folder,
            max_steps=steps,
            per_device_train_batch_size=batch_size,
            learning_rate=1e-3,
            logging_steps=1,
            report_to=[],
            save_strategy="no",
            disable_tqdm=True,
        )
        trainer = Trainer(model, arguments, train_dataset=Images(4 * batch_size, size))
        if fused:  # the Trainer makes its optimizer when it starts; this one it takes as it is
            trainer.create_optimizer()
            trainer.optimizer = fusednn.optim.replace(trainer.optimizer)
        trainer.train()
        losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
        if fused:
            fusednn.restore_layers(model)  # before tools that look at classes
        trainer.save_model(folder)
    return losses


if __name__ == "__main__":
    print(*main(fused="--stock" not in sys.argv), sep="\n")
