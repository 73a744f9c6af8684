"""The instrument that counts what replacing leaves to PyTorch, and the table of other libraries' models."""

import importlib.util
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from support.torchvision import mend_torchvision
from torch import Tensor, nn

import fusednn
from fusednn.instruments.operators_left import operators_left

ROOT = Path(__file__).parents[1]


class Network(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm, self.act = nn.BatchNorm1d(4), nn.Threshold(0.1, float("inf"))
        self.odd = nn.Hardtanh()

    def forward(self, x: Tensor) -> Tensor:
        y = self.act(self.norm(x))
        if y.shape[0] > 1:  # what its graph wouldn't tell
            y = torch.tanh(y) + torch.tanh(x)
        return self.odd(y).softmax(1)  # a method, which no name leads to


def made() -> tuple[nn.Module, Tensor]:
    network = Network()
    network.odd.max_val = torch.tensor(1.0)  # which no kernel takes
    return network, torch.randn(3, 4)


def test_counts_are_those_of_stock() -> None:
    """Every operator of a model that isn't replaced, with its module."""
    network, x = made()
    found = {(row.module, row.operator.strip("_"), row.calls) for row in operators_left(network, x)}
    norm = next(operator for module, operator, _ in found if module == "norm")
    assert "batch_norm" in norm
    found.discard(("norm", norm, 1))
    assert found == {("act", "threshold", 1), ("odd", "hardtanh", 1), ("", "tanh", 2), ("", "softmax", 1)}


@pytest.mark.kernels
def test_what_is_left_and_why(device: str) -> None:
    network, x = (one.to(device) for one in made())
    fusednn.replace_layers(network, fuse=True)
    before = {name: buffer.clone() for name, buffer in network.named_buffers()}
    found = {(row.module, row.operator.strip("_")): row.reason for row in operators_left(network, x)}
    assert found == {
        ("odd", "hardtanh"): "a parameter is not a Python number",
        ("", "softmax"): "its code calls PyTorch's function",
    }
    assert not torch.equal(before["norm.running_mean"], network.norm.running_mean)  # it ran
    with fusednn.replace_functions():
        assert {row.operator.strip("_") for row in operators_left(network, x)} == {"hardtanh", "softmax"}


@pytest.mark.stock  # another process, which is the same in every mode
def test_the_command(tmp_path: Path) -> None:
    (tmp_path / "mine.py").write_text(
        "import torch\n"
        "def make():\n"
        "    return torch.nn.Sequential(torch.nn.Softmax(1), torch.nn.Tanh()), torch.ones(2, 3)\n"
    )

    def run(model: str) -> Any:
        command = [sys.executable, "-m", "fusednn", "explain-model", model]
        return subprocess.run(command, cwd=tmp_path, env=dict(os.environ), capture_output=True, text=True, check=False)

    done = run("mine:make")
    assert "0 of 2 operators that there are kernels for are left to PyTorch" in done.stdout, done
    assert run("mine:other").returncode == 2


@pytest.mark.kernels
@pytest.mark.interpreter
@pytest.mark.thorough
def test_the_table_of_models_is_current() -> None:
    mend_torchvision()
    for package in ("timm", "torchvision", "transformers"):
        pytest.importorskip(package)
    spec = importlib.util.spec_from_file_location("libraries", ROOT / "docs" / "libraries.py")
    libraries: Any = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(libraries)
    page = libraries.PAGE.read_text()
    assert libraries.updated(page) == page, "run: PYTHONPATH=.build/models:tests python docs/libraries.py"
    left = [
        line.split(" | ")[3:5] for line in page.splitlines() if line.startswith(("| timm", "| torchvision", "| trans"))
    ]
    assert all(with_functions == "0" for _, with_functions in left[-len(libraries.MODELS) :])
