"""Real data, and an ordinary network for it."""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

__all__ = ["TEST_IMAGES", "Classifier", "Digits", "batches", "build_network", "load_digits"]

TEST_IMAGES = 360


class Digits(NamedTuple):
    """scikit-learn's 8x8 digits, normalised: images (N, 1, 8, 8) float32, labels (N,) int64."""

    images: Tensor
    labels: Tensor
    test_images: Tensor
    test_labels: Tensor


def load_digits(device: torch.device, test_images: int = TEST_IMAGES) -> Digits:
    """1437 digits to train on and up to 360 to test on, always the same; the former have mean 0 and deviation 1."""
    from sklearn.datasets import load_digits as load
    from sklearn.model_selection import train_test_split

    images, labels = load(return_X_y=True)
    train, test, train_labels, test_labels = train_test_split(
        images.astype(np.float32).reshape(-1, 1, 8, 8), labels, test_size=TEST_IMAGES, stratify=labels, random_state=0
    )
    mean, deviation = train.mean(), train.std()
    test, test_labels = test[:test_images], test_labels[:test_images]
    arrays = (train - mean) / deviation, train_labels, (test - mean) / deviation, test_labels
    return Digits(*(torch.from_numpy(array).to(device) for array in arrays))


def batches(digits: Digits, steps: int, batch_size: int, seed: int) -> Iterator[tuple[Tensor, Tensor]]:
    """A batch for each step, the images in a new order each time round; what doesn't fill a batch is left out."""
    generator = torch.Generator().manual_seed(seed)
    count = len(digits.labels) // batch_size
    for step in range(steps):
        if step % count == 0:
            order = torch.randperm(len(digits.labels), generator=generator).to(digits.labels.device)
        rows = order[step % count * batch_size :][:batch_size]
        yield digits.images[rows], digits.labels[rows]


class Classifier(nn.Module):
    """An ordinary small CNN with its loss, nothing but ``torch.nn``: logits of images, or given labels their loss.

    Without dropout: given the same seed a kernel draws other masks than PyTorch's operator.  They are as random, but
    losses could no longer be compared number by number.
    """

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.Sequential(
            nn.Conv2d(1, 16, 3, padding=1, bias=False),
            nn.BatchNorm2d(16),
            nn.ReLU(),
            nn.Conv2d(16, 32, 3, padding=1, bias=False),
            nn.BatchNorm2d(32),
            nn.ReLU(),
            nn.MaxPool2d(2),
            nn.Conv2d(32, 64, 3, padding=1, bias=False),
            nn.BatchNorm2d(64),
            nn.PReLU(64),
            nn.MaxPool2d(2),
            nn.Flatten(),
            nn.Linear(256, 64),
            nn.GELU(),
            nn.Linear(64, 10),
        )
        self.loss = nn.CrossEntropyLoss()

    def forward(self, images: Tensor, labels: Tensor | None = None) -> Tensor:
        logits: Tensor = self.layers(images)
        if labels is None:
            return logits
        loss: Tensor = self.loss(logits, labels)
        return loss


def build_network(seed: int) -> Classifier:
    """The same weights for the same seed."""
    torch.manual_seed(seed)
    return Classifier()
