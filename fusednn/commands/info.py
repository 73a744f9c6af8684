"""``python -m fusednn info``: what is installed, which GPU is there, and what runs where; what a bug report needs."""

from __future__ import annotations

import argparse
import importlib.metadata
import json
import os
import platform
import shutil
from pathlib import Path

import torch

from .. import __version__, kernels
from ..kernels.base.device import device_refusal

__all__ = ["add_arguments", "environment", "run"]


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--json", action="store_true", help="print JSON")
    parser.add_argument("--full", action="store_true", help="also what torch.utils.collect_env collects; takes seconds")


def run(arguments: argparse.Namespace) -> int:
    facts = environment()
    if arguments.json:
        print(json.dumps(facts, indent=2))
    else:
        width = max(map(len, facts))
        for name, value in facts.items():
            print(f"{name.ljust(width)}  {value if value is not None else '-'}")
    if arguments.full and not arguments.json:
        from torch.utils.collect_env import get_pretty_env_info

        print(f"\n{get_pretty_env_info()}")
    return 0


def environment() -> dict[str, str | int | None]:
    """Versions, devices, and the paths that tensors take here."""
    cuda = torch.cuda.is_available()
    return {
        "fusednn": __version__,
        "installed in": str(Path(__file__).parents[1]),
        "python": platform.python_version(),
        "platform": platform.platform(),
        "torch": torch.__version__,
        "triton": _version("triton"),
        "numpy": _version("numpy"),
        "libraries": _listed({name: _version(name) for name in _LIBRARIES}),
        "cuda": torch.version.cuda,
        "hip": torch.version.hip,
        "C compiler": os.environ.get("CC") or shutil.which("gcc") or shutil.which("clang"),
        "gpus": torch.cuda.device_count() if cuda else 0,
        "gpu": torch.cuda.get_device_name() if cuda else None,
        "compute capability": ".".join(map(str, torch.cuda.get_device_capability())) if cuda else None,
        "variables": _listed({name: os.environ[name] for name in sorted(os.environ) if name.startswith(_VARIABLES)}),
        "kernel configurations": sum(1 for _ in kernels.shipped()) if kernels.AVAILABLE else 0,
        "CUDA tensors": _cuda_path(cuda),
        "CPU tensors": f"kernels, {kernels.WHERE}" if kernels.ON_CPU else "stock operators",
    }


#: Libraries whose layers are known by name, or that wrap models.
_LIBRARIES = ("torchvision", "timm", "transformers", "accelerate", "lightning")
#: What environment variables begin with that change what runs.
_VARIABLES = ("CUDA_", "FUSEDNN_", "HIP_", "OMP_NUM_THREADS", "PYTORCH_", "ROCR_", "TORCH", "TRITON_")


def _listed(values: dict[str, str | None]) -> str | None:
    return ", ".join(f"{name}={value}" for name, value in values.items() if value is not None) or None


def _cuda_path(cuda: bool) -> str:
    if not cuda:
        return "no GPU here"
    if not kernels.AVAILABLE:
        return "stock operators: Triton is not installed"
    refusals = [device_refusal(index) for index in range(torch.cuda.device_count())]
    if not any(refusals):
        return "kernels"
    if len(set(refusals)) == 1:
        return f"stock operators: {refusals[0]}"
    return "; ".join(f"GPU {i}: {f'stock operators: {r}' if r else 'kernels'}" for i, r in enumerate(refusals))


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None
