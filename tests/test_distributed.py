"""Data-parallel training of whole and of sharded parameters, in two processes on the CPU: replaced beside stock."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from support.device import KERNELS_RUN, ON_GPU
from support.processes import in_two_processes
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel

import fusednn
from fusednn import layers, optim
from fusednn.autograd.dispatch import Choice, observe_choices
from fusednn.testing import random_tensor

pytestmark = pytest.mark.skipif(ON_GPU, reason="gloo on the CPU")

ROOT = Path(__file__).resolve().parents[1]
STEPS = 2


def network() -> nn.Sequential:
    torch.manual_seed(1)
    return nn.Sequential(
        nn.Conv2d(1, 4, 3, padding=1, bias=False),
        nn.BatchNorm2d(4),
        nn.PReLU(4),
        nn.MaxPool2d(2),
        nn.Flatten(),
        nn.Linear(16, 7),
        nn.ReLU(),
        nn.Linear(7, 5),
    )


def batch(step: int) -> tuple[Tensor, Tensor]:
    """Of both processes together."""
    return random_tensor((8, 1, 4, 4), torch.float32, "cpu", step), torch.arange(8) * (step + 1) % 5


def train(model: nn.Module, loss_function: nn.Module, optimizer: torch.optim.Optimizer, rows: slice) -> list[float]:
    history = []
    for step in range(STEPS):
        images, labels = (tensor[rows] for tensor in batch(step))
        loss = loss_function(model(images), labels)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        history.append(loss.item())
    return history


def parts(replaced: bool, recompute: bool = False) -> tuple[nn.Sequential, nn.Module]:
    model, loss_function = network(), nn.CrossEntropyLoss()
    if replaced:
        fusednn.replace_layers(model, recompute=recompute)
        fusednn.replace_layers(loss_function)
    return model, loss_function


def shard(model: nn.Sequential) -> nn.Sequential:
    mesh = init_device_mesh("cpu", (2,))
    for layer in model:
        if list(layer.parameters()):
            fully_shard(layer, mesh=mesh)
    fully_shard(model, mesh=mesh)
    return model


def train_in_parallel(rank: int) -> dict[str, list[list[float]]]:
    """Losses of this process by kind of parallelism: stock's, ours, and ours with results that are made again."""
    rows = slice(4) if rank == 0 else slice(4, None)
    outcome: dict[str, list[list[float]]] = {"DDP": [], "FSDP": [], "synchronised": []}
    choices: set[Choice] = set()
    for replaced, recompute in ((False, False), (True, False), (True, True)):
        adam = optim.Adam if replaced else torch.optim.Adam
        for kind, wrap in (("DDP", DistributedDataParallel), ("FSDP", shard)):
            model, loss_function = parts(replaced, recompute)
            model = wrap(model)
            with observe_choices(choices.add):
                outcome[kind].append(train(model, loss_function, adam(model.parameters(), lr=0.01), rows))
    on_kernels = {choice.operation for choice in choices if choice.kernel}
    assert on_kernels == ({"batch_norm", "prelu", "max_pool2d", "relu", "cross_entropy"} if KERNELS_RUN else set())
    if KERNELS_RUN:
        # Stock has no synchronised batch norm for CPU tensors, and DDP therefore refuses its twins on CPUs, too.
        model, loss_function = parts(replaced=True)
        model = shard(layers.SyncBatchNorm.convert_sync_batchnorm(model))
        outcome["synchronised"].append(train(model, loss_function, optim.Adam(model.parameters(), lr=0.01), rows))
    return outcome


def test_training_in_two_processes(tmp_path: Path) -> None:
    both = in_two_processes(tmp_path, train_in_parallel)
    for outcome in both:
        for kind in ("DDP", "FSDP"):
            stock, ours, again = outcome[kind]
            assert ours == pytest.approx(stock, rel=1e-4), kind
            assert again == ours, kind
    if KERNELS_RUN:
        model, loss_function = parts(replaced=False)
        alone = train(model, loss_function, torch.optim.Adam(model.parameters(), lr=0.01), slice(None))
        (first,), (second,) = (outcome["synchronised"] for outcome in both)
        assert [(a + b) / 2 for a, b in zip(first, second, strict=True)] == pytest.approx(alone, rel=1e-4)


def run_example(*arguments: str) -> list[float]:
    """The losses that the example prints under torchrun."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    command += [str(ROOT / "examples" / "train_distributed.py"), *arguments]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    outcome = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=120)
    # FSDP2 leaves gloo's threads running: one that frees a tensor while the interpreter ends aborts a process whose
    # work is done, with stock layers as well (caches of DTensor's keep the process group alive).
    late_abort = "--fsdp" in arguments and "terminate called without an active exception" in outcome.stderr
    assert outcome.returncode == 0 or late_abort, outcome.stderr
    return [float(line.rpartition(" ")[2]) for line in outcome.stdout.splitlines() if line.startswith("step")]


SMALL = ["--steps", "3", "--batch-size", "4"]


@pytest.mark.stock
@pytest.mark.thorough
def test_example() -> None:
    pytest.importorskip("sklearn")
    losses = run_example(*SMALL)
    assert len(losses) == 3
    assert all(0 < loss < 5 for loss in losses)


@pytest.mark.kernels
@pytest.mark.thorough
@pytest.mark.parametrize("options", [[], ["--fsdp"]], ids=["DDP", "FSDP"])
def test_example_gives_stocks_losses(options: list[str]) -> None:
    pytest.importorskip("sklearn")
    losses = run_example(*SMALL, *options)
    assert len(losses) == 3
    assert losses == pytest.approx(run_example(*SMALL, *options, "--stock"), rel=1e-4)
