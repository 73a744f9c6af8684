"""The two trainings, and whether they are the same."""

from __future__ import annotations

import math
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from statistics import median

import numpy as np
import torch
from torch import Tensor, nn

from .. import kernels, optim
from ..instruments.saved_tensors import saved_tensors
from ..layers import Explanation, ReplacementReport, explain, replace_layers
from .digits import Digits, batches, build_network, load_digits

__all__ = ["LEARNING_RATE", "MOMENTUM", "Comparison", "Scale", "Training", "compare", "problems", "train_in_turns"]

# Not Adam: it divides gradients by their size, and would hide a kernel whose gradient is off by a factor.
LEARNING_RATE = 0.02
MOMENTUM = 0.9

# Where kernels run, the two networks round differently.  Training is chaotic: it amplifies a difference in the last bit
# until, after a hundred steps or so, two equally good networks have visibly different losses.  So the losses are held
# to float32's accuracy while the difference is still rounding, and afterwards only the outcome is compared: on the 360
# images of the test set, two seeds of the stock network easily differ by a point.
EARLY_STEPS = 5
RELATIVE_TOLERANCE = 1e-4
ACCURACY_TOLERANCE = 0.03


@dataclass(frozen=True)
class Scale:
    """How much work a training is, and its test."""

    steps: int
    batch_size: int
    test_images: int


@dataclass(frozen=True)
class Training:
    """What one training gave.  Times are medians, of a step: forward, backward and optimizer."""

    losses: list[float]  # one a step
    accuracy: float  # on the test set, of 1
    cpu_seconds: float  # of all threads of the process, whatever else the machine does
    wall_seconds: float
    kept_bytes: int  # by a forward pass for its backward pass, beside parameters and batch
    peak_bytes: int | None  # GPU memory that a step takes beside what is allocated anyway; None on a CPU


@dataclass(frozen=True)
class Comparison:
    """The same training of the stock network and of the fused one."""

    device: str
    seed: int
    scale: Scale
    parameters: int
    stock: Training
    fused: Training
    replacement: ReplacementReport
    explanation: Explanation  # of the fused network, in training mode

    @property
    def runs_kernels(self) -> bool:
        return any(row.path == "kernel" for row in self.explanation)

    @property
    def largest_difference(self) -> tuple[float, int]:
        """Of the two loss curves, and its step, from 1; NaN is larger than any number."""
        differences = np.abs(np.subtract(self.stock.losses, self.fused.losses))
        step = int(differences.argmax())
        return float(differences[step]), step + 1


@dataclass
class Contestant:
    """A network in training."""

    model: nn.Module
    optimizer: torch.optim.Optimizer
    losses: list[float] = field(default_factory=list)
    cpu_seconds: list[float] = field(default_factory=list)
    wall_seconds: list[float] = field(default_factory=list)
    peak_bytes: int | None = None

    def step(self, images: Tensor, labels: Tensor) -> None:
        allocated = _start_peak(images.device)
        cpu, wall = time.process_time(), time.perf_counter()
        loss = self.model(images, labels)
        self.optimizer.zero_grad()
        loss.backward()
        self.optimizer.step()
        self.losses.append(loss.item())  # waits until the GPU has done all of the step
        self.wall_seconds.append(time.perf_counter() - wall)
        self.cpu_seconds.append(time.process_time() - cpu)
        if allocated is not None:
            self.peak_bytes = torch.cuda.max_memory_allocated(images.device) - allocated

    def kept_bytes(self, images: Tensor, labels: Tensor) -> int:
        with saved_tensors() as census:
            self.model.train()(images, labels)
        return census.bytes_beside(*self.model.parameters(), *self.model.buffers(), images, labels)

    @torch.no_grad()
    def accuracy(self, digits: Digits) -> float:
        correct = self.model.eval()(digits.test_images).argmax(1) == digits.test_labels
        return float(correct.double().mean())

    def training(self, digits: Digits, batch_size: int) -> Training:
        """What the training gave, once it is over."""
        accuracy = self.accuracy(digits)
        kept = self.kept_bytes(digits.images[:batch_size], digits.labels[:batch_size])
        return Training(
            self.losses, accuracy, median(self.cpu_seconds), median(self.wall_seconds), kept, self.peak_bytes
        )


def _start_peak(device: torch.device) -> int | None:
    """Begin to look for the peak of GPU memory; what is allocated now."""
    if device.type != "cuda":
        return None
    torch.cuda.reset_peak_memory_stats(device)
    return torch.cuda.memory_allocated(device)


def compare(device: torch.device, scale: Scale, seed: int) -> Comparison:
    """Train a stock network and its fused twin, in turns: what else the machine does meets both."""
    digits = load_digits(device, scale.test_images)
    stock_model, fused_model = (build_network(seed).to(device) for _ in range(2))
    replacement = replace_layers(fused_model, fuse=True)
    stock = Contestant(stock_model, torch.optim.SGD(stock_model.parameters(), LEARNING_RATE, MOMENTUM))
    fused = Contestant(fused_model, optim.SGD(fused_model.parameters(), LEARNING_RATE, MOMENTUM))
    with _reproducible():
        train_in_turns((stock, fused), digits, scale, seed)
        outcome, fused_outcome = (contestant.training(digits, scale.batch_size) for contestant in (stock, fused))
        explanation = explain(fused_model, digits.images[: scale.batch_size], digits.labels[: scale.batch_size])
    parameters = sum(parameter.numel() for parameter in fused_model.parameters())
    return Comparison(_describe(device), seed, scale, parameters, outcome, fused_outcome, replacement, explanation)


def train_in_turns(contestants: Sequence[Contestant], digits: Digits, scale: Scale, seed: int) -> None:
    """Train all on the same batches, under one progress bar; who goes first changes with each step."""
    from tqdm import tqdm

    for contestant in contestants:
        contestant.model.train()
    progress = tqdm(batches(digits, scale.steps, scale.batch_size, seed), total=scale.steps, unit="step", leave=False)
    for step, (images, labels) in enumerate(progress):
        turn = step % len(contestants)
        for contestant in (*contestants[turn:], *contestants[:turn]):
            contestant.step(images, labels)
        losses = " ".join(f"{contestant.losses[-1]:.4f}" for contestant in contestants)
        progress.set_postfix_str(f"losses {losses}", refresh=False)


@contextmanager
def _reproducible() -> Iterator[None]:
    """Make two trainings comparable: operators that always round alike, and times that other programs disturb little.

    TensorFloat-32 keeps 10 bits of each factor, and would drown what is compared here; cuDNN's fastest algorithms may
    add in any order.  One CPU thread is about as fast as several on a network this small, and many times faster where
    those would wait for cores that others use.
    """
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        with torch.backends.cudnn.flags(enabled=True, deterministic=True, allow_tf32=False):
            yield
    finally:
        torch.set_num_threads(threads)


def _describe(device: torch.device) -> str:
    """The device by its name, and where kernels run for it, if not there."""
    if device.type == "cuda":
        return f"{device} ({torch.cuda.get_device_name(device)})"
    if device.type != "cpu" or not kernels.ON_CPU:
        return f"{device} (one thread)" if device.type == "cpu" else str(device)
    return f"cpu, kernels {'interpreted by Triton' if kernels.INTERPRETING else 'compiled, on a virtual GPU'}"


def problems(comparison: Comparison, *, kernels_expected: bool) -> list[str]:
    """In words, everything that keeps the two trainings from being the same; empty where they agree.

    With ``kernels_expected``, a network none of whose layers took a kernel is a problem: it would agree with itself.
    """
    stock, fused = comparison.stock, comparison.fused
    found = []
    if kernels_expected and not comparison.runs_kernels:
        found.append("no layer took a kernel")
    for step, (a, b) in enumerate(zip(stock.losses[:EARLY_STEPS], fused.losses[:EARLY_STEPS], strict=True), 1):
        if not math.isclose(a, b, rel_tol=RELATIVE_TOLERANCE):  # never close where one is NaN
            found.append(f"in step {step} the stock network's loss is {a:.7g}, fusednn's {b:.7g}")
    if not abs(stock.accuracy - fused.accuracy) <= ACCURACY_TOLERANCE:
        found.append(f"in the end the stock network's accuracy is {stock.accuracy:.1%}, fusednn's {fused.accuracy:.1%}")
    return found
