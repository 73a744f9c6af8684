"""Where and from what a result comes: device, driver, versions, settings, sources."""

from __future__ import annotations

import hashlib
import os
import platform
import re
import subprocess
from collections.abc import Callable, Iterable
from contextlib import suppress
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

__all__ = ["ROOT", "SOURCE_FOLDERS", "describe_environment", "describe_settings", "describe_sources", "digest_of"]

ROOT = Path(__file__).resolve().parents[2]
SOURCE_FOLDERS = ("fusednn", "kernels", "autograd", "layers", "optim", "bench")


def describe_environment() -> dict[str, Any]:
    """Device, driver and versions; what there is none of is None."""
    try:
        from triton import __version__ as triton_version
    except ImportError:
        triton_version = None
    environment: dict[str, Any] = {
        "device": platform.processor() or platform.machine(),
        "driver": None,
        "torch": torch.__version__,
        "triton": triton_version,
        "python": platform.python_version(),
        "cuda": torch.version.cuda,
        "hip": torch.version.hip,
        "system": f"{platform.system()} {platform.machine()}",
        "peers": peer_versions(),
    }
    if torch.cuda.is_available():
        properties = torch.cuda.get_device_properties(0)
        environment |= {
            "device": properties.name,
            "driver": _driver(),
            "compute_capability": f"{properties.major}.{properties.minor}",
            "multiprocessors": properties.multi_processor_count,
            "l2_bytes": properties.L2_cache_size,
            "memory_bytes": properties.total_memory,
        }
    return environment


def peer_versions() -> dict[str, str]:
    """Other libraries that may take part: those that are installed."""
    versions = {}
    for name in ("liger-kernel", "flag-gems", "apex", "quack-kernels"):
        with suppress(PackageNotFoundError):
            versions[name] = version(name)
    return versions


def _driver() -> str | None:
    listed = _output("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader")
    if listed:
        return listed.splitlines()[0].strip()
    try:
        version = re.search(r"\b\d+\.\d+(\.\d+)?\b", Path("/proc/driver/nvidia/version").read_text())
    except OSError:
        return None
    return version and version.group()


def describe_settings() -> dict[str, Any]:
    """The switches of PyTorch that change what either side computes or which algorithm it takes."""
    settings: dict[str, Callable[[], Any]] = {
        "float32_matmul_precision": torch.get_float32_matmul_precision,
        "cudnn_allow_tf32": lambda: torch.backends.cudnn.allow_tf32,
        "cudnn_benchmark": lambda: torch.backends.cudnn.benchmark,
        "matmul_fp32_precision": lambda: torch.backends.cuda.matmul.fp32_precision,
        "convolution_fp32_precision": lambda: torch.backends.cudnn.conv.fp32_precision,
        "reduced_precision_reduction": lambda: str(torch.backends.cuda.matmul.allow_bf16_reduced_precision_reduction),
        "autocast": lambda: torch.is_autocast_enabled("cuda"),
        "deterministic_algorithms": torch.are_deterministic_algorithms_enabled,
    }
    return {name: _or_none(read) for name, read in settings.items()}


def _or_none(read: Callable[[], Any]) -> Any:
    try:
        return read()
    except RuntimeError:  # PyTorch refuses to say where its two ways of setting TF32 were mixed
        return None


def describe_sources() -> dict[str, Any]:
    """The commit, whether the checkout differs from it, and a digest of the sources that ran.

    Copies without a repository take the commit from the environment variable ``FUSEDNN_COMMIT``; whether they differ
    from it is then unknown (None), but the digest tells.
    """
    commit = _output("git", "-c", "safe.directory=*", "-C", str(ROOT), "rev-parse", "HEAD")
    if commit:
        changes = _output(
            "git", "-c", "safe.directory=*", "-C", str(ROOT), "status", "--porcelain", "--", ".", ":!bench/results"
        )
        return {"commit": commit, "dirty": changes != "", "sha256": source_digest()}
    return {"commit": os.environ.get("FUSEDNN_COMMIT") or None, "dirty": None, "sha256": source_digest()}


def source_digest(root: Path = ROOT) -> str:
    """SHA-256 over names and contents of the library's and the benchmarks' Python files."""
    return digest_of(
        (path.relative_to(root).as_posix(), path.read_bytes())
        for folder in SOURCE_FOLDERS
        for path in sorted((root / folder).rglob("*.py"))
    )


def digest_of(sources: Iterable[tuple[str, bytes]]) -> str:
    """SHA-256 over names and contents."""
    digest = hashlib.sha256()
    for name, text in sources:
        digest.update(name.encode() + b"\0" + text + b"\0")
    return digest.hexdigest()


def _output(*command: str) -> str | None:
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=20, check=False)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout.strip() if done.returncode == 0 else None
