"""``python -m fusednn demo``: one network trained twice on handwritten digits, stock and with its layers replaced.

Both trainings start from the same weights and see the same batches and dropout masks, so their losses have to agree:
exactly where both call the same operators (CPU), within float32's rounding where one of them runs kernels.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from importlib.util import find_spec
from pathlib import Path
from statistics import median
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

from .. import kernels
from ..layers import Explanation, ReplacementReport, explain, replace_layers
from ..layers.table import format_table
from .info import environment
from .interpreter import interpreting_processes

__all__ = ["Comparison", "Training", "add_arguments", "compare", "problems", "run"]

LEARNING_RATE = 0.02

# Where kernels run, the two networks round differently.  Training is chaotic: it amplifies a difference in the last bit
# until, after a hundred steps or so, two equally good networks have visibly different losses.  So the losses are held
# to float32's accuracy while the difference is still rounding, and afterwards only the outcome is compared: on the 360
# images of the test set, two seeds of the stock network easily differ by a point.
EARLY_STEPS = 5
RELATIVE_TOLERANCE = 1e-4
ACCURACY_TOLERANCE = 0.03

STOCK_COLOUR = "#f8c48a"
FUSED_COLOUR = "#1f3a5f"


@dataclass(frozen=True)
class Scale:
    """How much work a training is, and its test."""

    steps: int
    batch_size: int
    test_images: int


FULL = Scale(steps=300, batch_size=64, test_images=360)
# Triton's interpreter runs a kernel's blocks one after the other, in NumPy: a handful of small steps has to do.
INTERPRETED = Scale(steps=12, batch_size=16, test_images=50)


@dataclass(frozen=True)
class Training:
    """What one training gave."""

    losses: list[float]  # one a step
    accuracy: float  # on the test set, of 1
    median_step_seconds: float  # forward, backward and optimizer
    peak_bytes: int | None  # see `MemoryMeter`; None where it can't be measured


@dataclass(frozen=True)
class Comparison:
    """The same training of the stock network and of the network with replaced layers."""

    device: str
    seed: int
    scale: Scale
    parameters: int
    stock: Training
    fused: Training
    peak_bytes_are: str
    replacement: ReplacementReport
    explanation: Explanation  # of the replaced network, in training mode

    @property
    def kernel_rows(self) -> Explanation:
        return Explanation(tuple(row for row in self.explanation if row.path == "kernel"))

    @property
    def largest_difference(self) -> tuple[float, int]:
        """Of the two loss curves, and its step, from 1; NaN is larger than any number."""
        differences = np.abs(np.subtract(self.stock.losses, self.fused.losses))
        step = int(differences.argmax())
        return float(differences[step]), step + 1


# --- Command line ---------------------------------------------------------------------------------------------------


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--device", help="cpu, cuda, cuda:1, ... (default: cuda where there is a GPU, else cpu)")
    parser.add_argument("--output", type=Path, default=Path("demo-output"), help="folder to write to (%(default)s)")
    parser.add_argument(
        "--steps", type=_at_least(1), help=f"training steps ({FULL.steps}; {INTERPRETED.steps} in Triton's interpreter)"
    )
    parser.add_argument(
        "--interpreter-steps",
        type=_at_least(0),
        default=4,
        help="steps to run with kernels, in Triton's interpreter, after training on a CPU (%(default)s; 0: none)",
    )
    parser.add_argument("--seed", type=int, default=0, help="of weights, batches and dropout (%(default)s)")
    parser.add_argument("--json", action="store_true", help="print JSON: what is also written to figures.json")


def run(arguments: argparse.Namespace) -> int:
    """Train, compare, report.  Returns 0 where the networks agree, 1 where they don't, 2 where the demo can't run."""
    if missing := _missing_packages():
        print(f'fusednn demo needs {", ".join(missing)}: pip install "fusednn[demo]"', file=sys.stderr)
        return 2
    try:
        device = _device(arguments.device)
    except (AssertionError, RuntimeError) as error:  # what PyTorch raises without CUDA, or without that device
        print(f"fusednn demo can't use device {arguments.device}: {error}", file=sys.stderr)
        return 2

    say = _say_nothing if arguments.json else print
    interpreting = kernels.INTERPRETING and device.type == "cpu"
    scale = INTERPRETED if interpreting else FULL
    scale = replace(scale, steps=arguments.steps or scale.steps)
    say(f"A CNN on scikit-learn's handwritten digits, twice {scale.steps} steps of {scale.batch_size} images")
    if interpreting:
        say("So few because TRITON_INTERPRET is set: kernels run in Triton's interpreter, which is slow")
    comparison = compare(device, scale, arguments.seed)
    found = problems(comparison, kernels_expected=kernels.AVAILABLE and (interpreting or device.type == "cuda"))
    say(_report(comparison))

    interpreted = None
    if device.type == "cpu" and not interpreting and arguments.interpreter_steps:
        if kernels.AVAILABLE:
            say(f"\nNow with kernels, in Triton's interpreter: {arguments.interpreter_steps} steps of both networks")
            interpreted = compare_in_interpreter(arguments.interpreter_steps, arguments.seed)
            more = problems(interpreted, kernels_expected=True)
            say(f"{_interpreter_report(interpreted)}\nThe losses {'disagree' if more else 'agree'}")
            found += more
        else:
            say("\nTriton is not installed, so there are no kernels to run in its interpreter: skipped")

    curves, figures = arguments.output / "losses.png", arguments.output / "figures.json"
    facts = {
        "environment": environment(),
        "comparison": asdict(comparison),
        "largest_difference": dict(zip(("loss", "step"), comparison.largest_difference, strict=True)),
        "interpreter": interpreted and asdict(interpreted),
        "problems": found,
    }
    text = json.dumps(facts, indent=2)
    arguments.output.mkdir(parents=True, exist_ok=True)
    draw(comparison, curves)
    figures.write_text(text + "\n")
    say(f"\nWrote {curves} and {figures}")
    if arguments.json:
        print(text)
    for problem in found:
        print(f"The networks disagree: {problem}", file=sys.stderr)
    return 1 if found else 0


def _say_nothing(_: str) -> None:
    """In place of ``print``, where JSON is all that is to be printed."""


def _at_least(minimum: int) -> Callable[[str], int]:
    """A type for argparse."""

    def number(text: str) -> int:
        if (value := int(text)) < minimum:
            raise argparse.ArgumentTypeError(f"must be at least {minimum}")
        return value

    return number


def _missing_packages() -> list[str]:
    """What the extra ``demo`` would install and isn't there, by name on PyPI."""
    needed = {"sklearn": "scikit-learn", "matplotlib": "matplotlib", "tqdm": "tqdm"}
    return [package for module, package in needed.items() if find_spec(module) is None]


def _device(name: str | None) -> torch.device:
    """The device of that name, known to work; by default the GPU, unless kernels are interpreted, which is for CPUs."""
    if name is None:
        name = "cuda" if torch.cuda.is_available() and not kernels.INTERPRETING else "cpu"
    return torch.empty(1, device=name).device


# --- The experiment -------------------------------------------------------------------------------------------------


class Digits(NamedTuple):
    """scikit-learn's 8x8 digits, normalised: images (N, 1, 8, 8) float32, labels (N,) int64."""

    images: Tensor
    labels: Tensor
    test_images: Tensor
    test_labels: Tensor


def load_digits(device: torch.device, test_images: int = FULL.test_images) -> Digits:
    """1437 digits to train on and up to 360 to test on, always the same; the former have mean 0 and deviation 1."""
    from sklearn.datasets import load_digits as load
    from sklearn.model_selection import train_test_split

    images, labels = load(return_X_y=True)
    train, test, train_labels, test_labels = train_test_split(
        images.astype(np.float32).reshape(-1, 1, 8, 8),
        labels,
        test_size=FULL.test_images,
        stratify=labels,
        random_state=0,
    )
    mean, deviation = train.mean(), train.std()
    test, test_labels = test[:test_images], test_labels[:test_images]
    arrays = (train - mean) / deviation, train_labels, (test - mean) / deviation, test_labels
    return Digits(*(torch.from_numpy(array).to(device) for array in arrays))


class Classifier(nn.Module):
    """An ordinary small CNN with its loss, nothing but ``torch.nn``: logits of images, or given labels their loss."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.Sequential(
            nn.Conv2d(1, 16, 3, padding=1, bias=False),
            nn.BatchNorm2d(16),
            nn.ReLU(),
            nn.Conv2d(16, 32, 3, padding=1, bias=False),
            nn.BatchNorm2d(32),
            nn.PReLU(32),
            nn.MaxPool2d(2),
            nn.Conv2d(32, 64, 3, padding=1, bias=False),
            nn.BatchNorm2d(64),
            nn.PReLU(64),
            nn.MaxPool2d(2),
            nn.Flatten(),
            nn.Dropout(0.25),
            nn.Linear(256, 64),
            nn.ReLU(),
            nn.Dropout(0.25),
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


def compare(device: torch.device, scale: Scale, seed: int) -> Comparison:
    """Train the stock network, then its twin; nothing but the layers differs."""
    digits = load_digits(device, scale.test_images)
    with _reproducible():
        # The first steps of a process start threads and load libraries, at the cost of whoever comes first.
        train(build_network(seed).to(device), digits, replace(scale, steps=3), seed, "warm-up")
        stock = train(build_network(seed).to(device), digits, scale, seed, "stock")

        model = build_network(seed).to(device)
        # Given the same seed, a dropout kernel draws other masks than PyTorch's: equally random, but the curves could
        # no longer be compared number by number.
        replacement = replace_layers(model, exclude=nn.Dropout)
        explanation = explain(model, digits.images[: scale.batch_size], digits.labels[: scale.batch_size])
        fused = train(model, digits, scale, seed, "fusednn")
    return Comparison(
        device=_describe(device),
        seed=seed,
        scale=scale,
        parameters=sum(parameter.numel() for parameter in model.parameters()),
        stock=stock,
        fused=fused,
        peak_bytes_are=memory_meter(device).meaning,
        replacement=replacement,
        explanation=explanation,
    )


def _describe(device: torch.device) -> str:
    """The device by its name, and what it is."""
    if device.type == "cuda":
        return f"{device} ({torch.cuda.get_device_name(device)})"
    return f"{device} (one thread)" if device.type == "cpu" else str(device)


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


def train(model: nn.Module, digits: Digits, scale: Scale, seed: int, name: str) -> Training:
    """Train ``model`` with SGD and test it, under a progress bar called ``name``."""
    from tqdm import tqdm

    meter = memory_meter(digits.images.device)
    torch.manual_seed(seed)
    meter.reset()
    # Not Adam: it divides gradients by their size, and would hide a kernel whose gradient is off by a factor.
    optimizer = torch.optim.SGD(model.parameters(), lr=LEARNING_RATE, momentum=0.9)
    losses, seconds = [], []
    model.train()
    progress = tqdm(_batches(digits, scale, seed), total=scale.steps, desc=name.ljust(7), unit="step")
    for images, labels in progress:
        start = time.perf_counter()
        loss = model(images, labels)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())  # waits until the GPU has done all of the step
        seconds.append(time.perf_counter() - start)
        progress.set_postfix(loss=f"{losses[-1]:.4f}", refresh=False)
    peak = meter.read()
    return Training(losses, _accuracy(model, digits), median(seconds), peak)


def _batches(digits: Digits, scale: Scale, seed: int) -> Iterator[tuple[Tensor, Tensor]]:
    """A batch for each step, the images in a new order each time round; what doesn't fill a batch is left out."""
    generator = torch.Generator().manual_seed(seed)
    count = len(digits.labels) // scale.batch_size
    for step in range(scale.steps):
        if step % count == 0:
            order = torch.randperm(len(digits.labels), generator=generator).to(digits.labels.device)
        rows = order[step % count * scale.batch_size :][: scale.batch_size]
        yield digits.images[rows], digits.labels[rows]


@torch.no_grad()
def _accuracy(model: nn.Module, digits: Digits) -> float:
    model.eval()
    correct = model(digits.test_images).argmax(1) == digits.test_labels
    return float(correct.double().mean())


def problems(comparison: Comparison, *, kernels_expected: bool) -> list[str]:
    """In words, everything that keeps the two trainings from being the same; empty where they agree.

    With ``kernels_expected``, a network none of whose layers took a kernel is a problem: it would agree with itself.
    """
    stock, fused = comparison.stock, comparison.fused
    found = []
    if kernels_expected and not len(comparison.kernel_rows):
        found.append("no layer took a kernel")
    for step, (a, b) in enumerate(zip(stock.losses[:EARLY_STEPS], fused.losses[:EARLY_STEPS], strict=True), 1):
        if not math.isclose(a, b, rel_tol=RELATIVE_TOLERANCE):  # never close where one is NaN
            found.append(f"in step {step} the stock network's loss is {a:.7g}, fusednn's {b:.7g}")
    if not abs(stock.accuracy - fused.accuracy) <= ACCURACY_TOLERANCE:
        found.append(f"in the end the stock network's accuracy is {stock.accuracy:.1%}, fusednn's {fused.accuracy:.1%}")
    return found


# --- In Triton's interpreter ----------------------------------------------------------------------------------------


def compare_in_interpreter(steps: int, seed: int) -> Comparison:
    """`compare` on the CPU, with kernels in Triton's interpreter."""
    with interpreting_processes() as process:
        return process.submit(compare, torch.device("cpu"), replace(INTERPRETED, steps=steps), seed).result()


# --- Memory ---------------------------------------------------------------------------------------------------------


class MemoryMeter(NamedTuple):
    """Peak memory: what it is the peak of, how to start anew, and how to read it, in bytes."""

    meaning: str
    reset: Callable[[], object]
    read: Callable[[], int | None]


def memory_meter(device: torch.device) -> MemoryMeter:
    """The best measure of peak memory that there is for ``device`` and this operating system."""
    if device.type == "cuda":
        return MemoryMeter(
            "GPU memory allocated by PyTorch during the training",
            lambda: torch.cuda.reset_peak_memory_stats(device),
            lambda: torch.cuda.max_memory_allocated(device),
        )
    try:
        _reset_peak_resident()
        _read_peak_resident()
    except (OSError, ValueError):
        pass
    else:
        meaning = "resident memory of the whole process, Python and libraries included, during the training"
        return MemoryMeter(meaning, _reset_peak_resident, _read_peak_resident)
    try:
        import resource
    except ImportError:  # Windows
        return MemoryMeter("not measured on this system", lambda: None, lambda: None)
    unit = 1 if sys.platform == "darwin" else 1024
    return MemoryMeter(
        "resident memory of the process since it started: the second can't be below the first",
        lambda: None,
        lambda: resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit,
    )


def _reset_peak_resident() -> None:
    """Lower Linux's high-water mark of this process to what is resident now (``man 5 proc_pid_clear_refs``)."""
    Path("/proc/self/clear_refs").write_text("5")


def _read_peak_resident() -> int:
    """The high-water mark, in bytes.  Raises ValueError where the kernel doesn't report it."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("VmHWM:"):
            return int(line.split()[1]) * 1024
    raise ValueError("no VmHWM in /proc/self/status")


# --- The report -----------------------------------------------------------------------------------------------------


def _report(comparison: Comparison) -> str:
    """Everything there is to say of the two trainings."""
    return "\n".join(
        [
            f"Device: {comparison.device}",
            f"Path: {_path(comparison)}",
            "\nfusednn.replace_layers(model, exclude=nn.Dropout)  # a dropout kernel would draw other masks",
            f"{comparison.replacement}",
            f"\nfusednn.explain(model, images, labels)\n{comparison.explanation}",
            f"\n{_results(comparison)}",
            f"\n{_difference(comparison)}",
        ]
    )


def _interpreter_report(comparison: Comparison) -> str:
    """The layers that took kernels, and the losses of both networks beside each other."""
    rows = [
        (str(step), f"{a:.7f}", f"{b:.7f}", f"{abs(a - b) / abs(a):.1e}")
        for step, (a, b) in enumerate(zip(comparison.stock.losses, comparison.fused.losses, strict=True), 1)
    ]
    losses = format_table(("step", "stock loss", "fusednn loss", "relative difference"), rows)
    return f"{comparison.kernel_rows}\n\n{losses}"


def _path(comparison: Comparison) -> str:
    count = len({row.name for row in comparison.kernel_rows})
    if not count:
        return "PyTorch's own operators for every layer (why is in the table)"
    where = "in Triton's interpreter" if kernels.INTERPRETING else "on the GPU"
    return f"Triton kernels {where} for {count} layers, PyTorch's own operators for the others"


def _results(comparison: Comparison) -> str:
    """A table of the figures."""

    def row(name: str, figure: Callable[[Training], str]) -> tuple[str, str, str]:
        return name, figure(comparison.stock), figure(comparison.fused)

    def memory(training: Training) -> str:
        return "-" if training.peak_bytes is None else f"{training.peak_bytes / 2**20:.1f} MiB"

    table = format_table(
        ("", "stock", "fusednn"),
        [
            row("parameters", lambda _: str(comparison.parameters)),
            row("final loss", lambda training: f"{training.losses[-1]:.6f}"),
            row("test accuracy", lambda training: f"{training.accuracy:.1%}"),
            row("median time per step", lambda training: f"{training.median_step_seconds * 1e3:.2f} ms"),
            row("peak memory *", memory),
        ],
    )
    return f"{table}\n* {comparison.peak_bytes_are}"


def _difference(comparison: Comparison) -> str:
    """The largest difference between the two curves, in a sentence."""
    difference, step = comparison.largest_difference
    if difference == 0:
        return "The loss curves are identical, bit for bit"
    return f"The loss curves differ by at most {difference:.2g}, in step {step}"


def draw(comparison: Comparison, path: Path) -> None:
    """Write both loss curves to a PNG, a broad pale one under a thin dark one: both show where they coincide."""
    from matplotlib.figure import Figure  # without pyplot: no window system, no global state
    from matplotlib.ticker import LogLocator, NullLocator

    steps = range(1, len(comparison.stock.losses) + 1)
    figure = Figure(figsize=(8, 4.8), dpi=150, layout="constrained")
    axes = figure.subplots()
    axes.plot(steps, comparison.stock.losses, color=STOCK_COLOUR, linewidth=4.5, label="stock: torch.nn")
    axes.plot(steps, comparison.fused.losses, color=FUSED_COLOUR, linewidth=1.1, label="after fusednn.replace_layers")
    axes.set_yscale("log")
    axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axes.yaxis.set_minor_locator(NullLocator())
    axes.yaxis.set_major_formatter("{x:g}")
    axes.set_xlabel("training step")
    axes.set_ylabel("cross-entropy loss (log scale)")
    axes.set_title("A CNN on handwritten digits, trained twice", loc="left", fontweight="bold", pad=22)
    subtitle = f"{_difference(comparison)}  ·  {comparison.device}"
    axes.text(0, 1.02, subtitle, transform=axes.transAxes, fontsize=9, color="#555555")
    axes.grid(axis="y", color="#e6e6e6", linewidth=0.8)
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False)
    figure.savefig(path)
