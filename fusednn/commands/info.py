"""``python -m fusednn info``: what is installed, which GPU is there, and what runs where."""

from __future__ import annotations

import argparse
import importlib.metadata
import json
import platform

import torch

from .. import __version__, kernels

__all__ = ["add_arguments", "environment", "run"]


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--json", action="store_true", help="print JSON")


def run(arguments: argparse.Namespace) -> int:
    facts = environment()
    if arguments.json:
        print(json.dumps(facts, indent=2))
    else:
        width = max(map(len, facts))
        for name, value in facts.items():
            print(f"{name.ljust(width)}  {value if value is not None else '-'}")
    return 0


def environment() -> dict[str, str | int | None]:
    """Versions, devices, and the paths that tensors take here."""
    cuda = torch.cuda.is_available()
    return {
        "fusednn": __version__,
        "python": platform.python_version(),
        "platform": platform.platform(),
        "torch": torch.__version__,
        "triton": _version("triton"),
        "numpy": _version("numpy"),
        "cuda": torch.version.cuda,
        "hip": torch.version.hip,
        "gpus": torch.cuda.device_count() if cuda else 0,
        "gpu": torch.cuda.get_device_name() if cuda else None,
        "kernel configurations": sum(1 for _ in kernels.shipped()) if kernels.AVAILABLE else 0,
        "CUDA tensors": _cuda_path(cuda),
        "CPU tensors": f"kernels, {kernels.WHERE}" if kernels.ON_CPU else "stock operators",
    }


def _cuda_path(cuda: bool) -> str:
    if not cuda:
        return "no GPU here"
    return "kernels" if kernels.AVAILABLE else "stock operators: Triton is not installed"


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None
