"""Two processes on the CPU that talk through gloo."""

import os
import socket
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as mp


def in_two_processes(folder: Path, work: Callable[..., Any], *arguments: Any) -> list[Any]:
    """``work(rank, *arguments)`` of each; ``folder`` holds what they return."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    mp.spawn(_rank_of_two, (port, str(folder), work, *arguments), nprocs=2)
    return [torch.load(folder / f"{rank}.pt", weights_only=False) for rank in range(2)]


def _rank_of_two(rank: int, port: int, folder: str, work: Callable[..., Any], *arguments: Any) -> None:
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
    dist.init_process_group("gloo", rank=rank, world_size=2)
    torch.save(work(rank, *arguments), Path(folder) / f"{rank}.pt")
    dist.destroy_process_group()
