"""``python -m fusednn demo``: one network trained twice on handwritten digits, stock and fused."""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from collections.abc import Callable
from dataclasses import asdict, replace
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch

from .. import kernels
from ..demonstration.digits import TEST_IMAGES
from ..demonstration.picture import draw
from ..demonstration.report import details, introduction, summary
from ..demonstration.training import Scale, compare, problems
from .info import environment
from .kernel_processes import kernel_command

__all__ = ["add_arguments", "run"]

FULL = Scale(steps=300, batch_size=64, test_images=TEST_IMAGES)
VIRTUAL = Scale(steps=20, batch_size=32, test_images=TEST_IMAGES)  # the virtual GPU computes with this processor
# Triton's interpreter runs a kernel's blocks one after the other, in NumPy: a handful of small steps has to do.
INTERPRETED = Scale(steps=4, batch_size=8, test_images=50)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--device", help="cpu, cuda, cuda:1, ... (default: cuda where there is a GPU, else cpu)")
    parser.add_argument("--output", type=Path, default=Path("demo-output"), help="folder to write to (%(default)s)")
    parser.add_argument(
        "--steps",
        type=_at_least(1),
        help=f"training steps ({FULL.steps}; {VIRTUAL.steps} on a virtual GPU, {INTERPRETED.steps} interpreted)",
    )
    parser.add_argument(
        "--kernel-steps",
        type=_at_least(0),
        help="where the CPU trains with PyTorch's operators: steps to run with kernels afterwards (0: none)",
    )
    parser.add_argument("--seed", type=int, default=0, help="of weights and batches (%(default)s)")
    parser.add_argument("--verbose", action="store_true", help="also print what became of each layer, and all losses")
    parser.add_argument("--brief", action="store_true", help="without the introduction")
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

    say: Callable[[str], Any] = (lambda _: None) if arguments.json else print
    if not arguments.brief:
        say(introduction())
    on_cpu = device.type == "cpu"
    scale = FULL if not (on_cpu and kernels.ON_CPU) else INTERPRETED if kernels.INTERPRETING else VIRTUAL
    scale = replace(scale, steps=arguments.steps or scale.steps)
    comparison = compare(device, scale, arguments.seed)
    found = problems(comparison, kernels_expected=kernels.ON_CPU if on_cpu else kernels.AVAILABLE)
    say(summary(comparison))
    if arguments.verbose:
        say(f"\n{details(comparison)}")

    curves, figures = arguments.output / "losses.png", arguments.output / "figures.json"
    arguments.output.mkdir(parents=True, exist_ok=True)
    draw(comparison, curves)
    facts: dict[str, Any] = {
        "environment": environment(),
        "comparison": asdict(comparison),
        "largest_difference": dict(zip(("loss", "step"), comparison.largest_difference, strict=True)),
        "problems": found,
    }
    if on_cpu and not kernels.ON_CPU and arguments.kernel_steps != 0:
        if kernels.AVAILABLE:
            say("\nWith kernels:")
            facts["with_kernels"] = _with_kernels(arguments)
            found += facts["with_kernels"]["problems"]
        else:
            say("\nTriton is not installed, so there are no kernels to run: skipped")
    text = json.dumps(facts, indent=2)
    figures.write_text(text + "\n")
    if arguments.json:
        print(text)
    if not arguments.brief:
        say(f"\nWrote {curves} and {figures}" + ("" if arguments.verbose else ".  --verbose prints more"))
        for problem in found:
            print(f"The networks disagree: {problem}", file=sys.stderr)
    return 1 if found else 0


def _with_kernels(arguments: argparse.Namespace) -> dict[str, Any]:
    """The demo's figures in a process in which CPU tensors take kernels, which prints its own report."""
    output = arguments.output / "with-kernels"
    (figures := output / "figures.json").unlink(missing_ok=True)
    own = ["demo", "--brief", "--device", "cpu", "--seed", str(arguments.seed), "--output", str(output)]
    if arguments.kernel_steps:
        own += ["--steps", str(arguments.kernel_steps)]
    own += [f"--{name}" for name in ("verbose", "json") if getattr(arguments, name)]
    command, variables = kernel_command(*own)
    sys.stdout.flush()
    done = subprocess.run(command, env=variables, stdout=subprocess.DEVNULL if arguments.json else None)
    if not figures.exists():
        raise RuntimeError(f"{' '.join(command)} failed with exit status {done.returncode}")
    found: dict[str, Any] = json.loads(figures.read_text())
    return found


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
    """The device of that name, known to work; by default the GPU, unless kernels run on the CPU."""
    if name is None:
        name = "cuda" if torch.cuda.is_available() and not kernels.ON_CPU else "cpu"
    return torch.empty(1, device=name).device
