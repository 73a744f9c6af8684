"""Synchronised batch norm: two gloo processes against one process on the joined batch."""

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from support.device import ON_GPU
from support.processes import in_two_processes
from torch import Tensor, nn

import fusednn
from fusednn import layers
from fusednn.testing import random_tensor

on_the_cpu = pytest.mark.skipif(ON_GPU, reason="gloo on the CPU")

STEPS = 2


def model(momentum: float | None, activation: str | None) -> nn.Module:
    torch.manual_seed(0)
    norm = layers.BatchNormAct2d(3, momentum=momentum, activation=activation)
    nn.init.uniform_(norm.weight)
    nn.init.uniform_(norm.bias)
    return norm


def batches(step: int) -> tuple[Tensor, Tensor, Tensor]:
    """Input, residual and gradient of the joined batch."""
    x, residual, gradient = (random_tensor((6, 3, 4, 5), torch.float32, "cpu", 10 * step + i) for i in range(3))
    return x + 5, residual, gradient


def train(norm: nn.Module, rows: slice, joined: bool) -> dict[str, Any]:
    """What some rows of the batch get in each step: values and the gradients of input, residual and parameters."""
    outcome: dict[str, Any] = {"y": [], "dx": [], "dresidual": []}
    for step in range(STEPS):
        x, residual, gradient = (tensor[rows].contiguous() for tensor in batches(step))
        x.requires_grad_()
        residual.requires_grad_()
        y = norm(x, residual) if joined else norm(x)
        y.backward(gradient)
        outcome["y"].append(y.detach())
        outcome["dx"].append(x.grad)
        outcome["dresidual"].append(residual.grad)
    outcome["parameters"] = [parameter.grad for parameter in norm.parameters()]
    outcome["buffers"] = list(norm.buffers())
    return outcome


def train_synchronised(rank: int, split: int, momentum: float | None, activation: str | None) -> dict[str, Any]:
    norm = layers.SyncBatchNorm.convert_sync_batchnorm(model(momentum, activation))
    assert type(norm) is layers.SyncBatchNormAct
    rows = slice(split) if rank == 0 else slice(split, None)
    outcome = train(norm, rows, activation is not None)
    # In evaluation each rank is by itself, with what all of them have learnt.
    x = batches(7)[0][rows]
    alone = copy.deepcopy(outcome["buffers"])
    outcome["evaluated"] = norm.eval()(x)
    torch.testing.assert_close(list(norm.buffers()), alone, rtol=0, atol=0)
    return outcome


@on_the_cpu
@pytest.mark.kernels
@pytest.mark.parametrize(
    ("split", "momentum", "activation"),
    [(2, None, "relu"), (3, 0.1, None), (0, 0.1, "silu")],
    ids=["unequal batches", "equal batches", "an empty batch"],
)
def test_two_ranks_equal_one(split: int, momentum: float | None, activation: str | None, tmp_path: Path) -> None:
    first, second = in_two_processes(tmp_path, train_synchronised, split, momentum, activation)
    alone = train(model(momentum, activation), slice(None), activation is not None)
    for key in ("y", "dx", "dresidual"):
        for step in range(STEPS):
            parts = [outcome[key][step] for outcome in (first, second)]
            if alone[key][step] is None:
                assert parts == [None, None]
            else:
                torch.testing.assert_close(torch.cat(parts), alone[key][step], rtol=1e-5, atol=1e-5)
    learnt = model(momentum, activation)
    for buffer, value in zip(learnt.buffers(), first["buffers"], strict=True):
        buffer.copy_(value)
    evaluated = torch.cat([first["evaluated"], second["evaluated"]])
    torch.testing.assert_close(evaluated, learnt.eval()(batches(7)[0]))
    for one, other, whole in zip(first["parameters"], second["parameters"], alone["parameters"], strict=True):
        torch.testing.assert_close(one + other, whole, rtol=1e-5, atol=1e-5)
    for one, other, whole in zip(first["buffers"], second["buffers"], alone["buffers"], strict=True):
        torch.testing.assert_close(one, other, rtol=0, atol=0)
        torch.testing.assert_close(one, whole)


def call_on_the_cpu(rank: int) -> list[str]:
    outcomes = []
    for norm in (nn.SyncBatchNorm(3), layers.SyncBatchNorm(3)):
        try:
            norm(torch.randn(2, 3))
            outcomes.append("passed")
        except ValueError as error:
            outcomes.append(str(error))
        torch.testing.assert_close(norm.eval()(torch.zeros(2, 3)), torch.zeros(2, 3))
    return outcomes


@pytest.mark.stock
def test_cpu_tensors_raise_as_in_stock(tmp_path: Path) -> None:
    for stock, ours in in_two_processes(tmp_path, call_on_the_cpu):
        assert "expected input tensor to be on GPU" in stock
        assert ours == stock


def test_without_a_process_group_it_is_batch_norm(device: str) -> None:
    x = random_tensor((4, 3, 5), torch.float32, device)
    stock, ours = nn.SyncBatchNorm(3).to(device), layers.SyncBatchNorm(3).to(device)
    for training in (True, False):
        torch.testing.assert_close(ours.train(training)(x), stock.train(training)(x))
    torch.testing.assert_close(ours.running_var, stock.running_var)
    for wrong, message in ((torch.ones(3), "expected"), (torch.ones(2, 0, 3), "non-zero")):
        with pytest.raises(ValueError, match=message):
            stock(wrong.to(device))
        with pytest.raises(ValueError, match=message):
            ours(wrong.to(device))


def test_conversion_keeps_everything(device: str) -> None:
    network = nn.Sequential(
        nn.Conv2d(1, 3, 3),
        nn.BatchNorm2d(3, eps=1e-3),
        nn.Sequential(layers.BatchNorm2d(3, momentum=None), layers.BatchNormAct2d(3, activation="silu")),
        nn.BatchNorm2d(3, affine=False, track_running_stats=False),
    ).to(device)
    network[2].eval()
    original = copy.deepcopy(network)
    parameters, keys = dict(network.named_parameters()), list(network.state_dict())
    x = random_tensor((2, 1, 6, 6), torch.float32, device)

    converted = layers.SyncBatchNorm.convert_sync_batchnorm(network)
    assert converted is network
    assert all(network.get_parameter(name) is parameter for name, parameter in parameters.items())
    assert list(network.state_dict()) == keys
    norms = [network[1], *network[2], network[3]]
    assert [type(norm) for norm in norms] == [layers.SyncBatchNorm] * 2 + [
        layers.SyncBatchNormAct,
        layers.SyncBatchNorm,
    ]
    assert [norm.training for norm in norms] == [True, False, False, True]
    assert (norms[0].eps, norms[1].momentum, norms[2].activation) == (1e-3, None, "silu")
    torch.testing.assert_close(network(x), original(x))

    single = layers.SyncBatchNorm.convert_sync_batchnorm(nn.BatchNorm1d(3))
    assert type(single) is layers.SyncBatchNorm


def wrong_channels(rank: int) -> str:
    try:
        layers.SyncBatchNorm(3)(torch.randn(2, 4))
    except (RuntimeError, ValueError) as error:
        return str(error)
    return "passed"


@on_the_cpu
@pytest.mark.kernels
def test_another_number_of_channels_is_refused_on_every_rank(tmp_path: Path) -> None:
    """By stock, that is, which takes no CPU tensors: the kernels would read past the parameters' ends."""
    assert all("on GPU" in message for message in in_two_processes(tmp_path, wrong_channels))


def test_replacement(device: str) -> None:
    norm = nn.SyncBatchNorm(3).to(device)
    fusednn.replace_layers(norm)
    assert type(norm) is layers.SyncBatchNorm
    fusednn.restore_layers(norm)
    assert type(norm) is nn.SyncBatchNorm
