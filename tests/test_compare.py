"""`fusednn.compare`: right copies are called right, faults are found and named, and nothing of the caller's changes."""

import json
import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest import mock

import pytest
import torch
from torch import Tensor, nn

import fusednn
from fusednn import layers
from fusednn.__main__ import main
from fusednn.kernels import AVAILABLE

LOSS = nn.functional.cross_entropy


def network(device: str) -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(2, 3, 3, padding=1),
        nn.BatchNorm2d(3),
        nn.ReLU(),
        nn.Flatten(),
        nn.Linear(48, 6),
        nn.GELU(),
        nn.Dropout(0.5),
        nn.Linear(6, 4),
    ).to(device)


def batches(device: str) -> Any:
    return lambda: (torch.randn(3, 2, 4, 4, device=device), torch.tensor([0, 1, 2], device=device))


def compared(device: str, **options: Any) -> fusednn.Comparison:
    return fusednn.compare(network(device), batches(device), LOSS, **{"steps": 2, "timed_steps": 0, **options})


def test_a_right_model_is_called_right(device: str) -> None:
    found = compared(device)
    assert found.right
    assert found.proof.reference == "PyTorch's operators in float64"
    names = {finding.what for finding in found.proof.findings}
    assert {"result", "loss", "gradient of 0.weight", "7.bias after 2 steps"} <= names
    assert {finding.contestant for finding in found.proof.findings} == {"replaced", "fused"}
    assert not found.proof.blame
    stock, fused = found.memory["stock"], found.memory["fused"]
    assert stock.by_layer["1"] >= 3 * 3 * 16 * 4  # batch norm keeps its input
    if AVAILABLE:  # whether or not kernels run here
        assert fused.kept < stock.kept
        assert found.traffic["fused"].launches < found.traffic["stock"].launches
    text = str(found)
    assert "right" in text
    assert "WRONG" not in text
    assert "bias=False" in text  # what the user could change


def test_nothing_of_the_callers_changes(device: str) -> None:
    model = network(device).eval()
    model[0].train()
    weights = {name: value.clone() for name, value in model.state_dict().items()}
    classes = [type(module) for module in model.modules()]
    modes = [module.training for module in model.modules()]
    model[0].weight.grad = torch.ones_like(model[0].weight)
    generator = torch.get_rng_state()
    fusednn.compare(model, batches(device), LOSS, steps=1, timed_steps=0)
    assert torch.equal(torch.get_rng_state(), generator)
    assert [type(module) for module in model.modules()] == classes
    assert [module.training for module in model.modules()] == modes
    assert all(torch.equal(value, weights[name]) for name, value in model.state_dict().items())
    assert torch.equal(model[0].weight.grad, torch.ones_like(model[0].weight))


@pytest.fixture
def gelu() -> Any:
    """GELU's twin, to be made wrong."""
    right = layers.GELU.forward

    def plant(fault: Any) -> Any:
        return mock.patch.object(layers.GELU, "forward", lambda self, x: fault(right(self, x)))

    return plant


def test_a_wrong_rounding_is_found_and_named(gelu: Any, device: str) -> None:
    with gelu(lambda y: y + (y.bfloat16() - y).detach()):
        found = compared(device)
    assert found.right is False
    assert "GELU" in found.proof.blame["replaced"]
    assert found.proof.blame["replaced"].startswith("result of 5 ")
    assert "WRONG" in str(found)
    assert not found.proof.worst("replaced").right  # type: ignore[union-attr]


class _Keeps(torch.autograd.Function):
    """Keeps a tensor that its gradient doesn't need."""

    @staticmethod
    def forward(ctx: Any, y: Tensor) -> Tensor:
        ctx.save_for_backward(torch.zeros(10_000, device=y.device))
        return y.clone()

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> Tensor:
        return g


def test_a_tensor_that_is_kept_for_nothing_is_found_and_named(gelu: Any, device: str) -> None:
    with gelu(_Keeps.apply):
        found = compared(device)
    memory = found.memory["replaced"]
    assert max(memory.by_layer, key=memory.by_layer.__getitem__) == "5"
    assert memory.by_layer["5"] >= 40_000
    assert found.memory["stock"].by_layer.get("5", 0) < 40_000


@pytest.mark.stock
def test_a_pause_of_the_host_is_found_and_named(gelu: Any, device: str) -> None:
    def pause(y: Tensor) -> Tensor:
        time.sleep(0.2)
        return y

    with gelu(pause):
        found = compared(device, timed_steps=2, steps=1)
    times = found.times["replaced"]
    assert max(times.layers, key=times.layers.__getitem__) == "5"
    assert times.layers["5"] >= 200
    assert "5 +" in str(found)
    assert len(times.host["backward"]) == len(times.ratios) == 2


def test_models_that_return_their_loss_and_take_keywords(device: str) -> None:
    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(4, 4)
            self.act = nn.Tanh()

        def forward(self, x: Tensor, labels: Tensor) -> Any:
            y = self.act(self.layer(x))
            return SimpleNamespace(loss=(y - labels).square().mean(), to_tuple=lambda: (y,))

    def make_batch(step: int) -> dict[str, Tensor]:
        return {"x": torch.randn(2, 4, device=device), "labels": torch.full((2, 4), float(step), device=device)}

    found = fusednn.compare(Model().to(device), make_batch, steps=1, timed_steps=0, optimizer=torch.optim.Adam)
    assert found.right
    assert {"result", "loss"} <= {finding.what for finding in found.proof.findings}


class Doubling(nn.Module):
    """Changes its input."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        return torch.relu(self.layer(x.mul_(2)))


@pytest.mark.parametrize("loss", [None, LOSS])
def test_one_batch_for_all_steps(device: str, loss: Callable[..., Tensor] | None) -> None:
    """Each step gets a copy: what a model does to it isn't seen by the next."""
    x, target = torch.randn(2, 4, device=device), torch.tensor([0, 2], device=device)
    model, kept = Doubling().to(device), x.clone()
    found = fusednn.compare(model, (x, target) if loss else x, loss, steps=3, timed_steps=0)
    assert found.right
    assert torch.equal(x, kept)
    made = fusednn.compare(
        model, lambda: (kept.clone(), target) if loss else kept.clone(), loss, steps=3, timed_steps=0
    )
    assert repr(found.proof) == repr(made.proof)


def test_a_loss_asks_for_a_target(device: str) -> None:
    with pytest.raises(TypeError, match="a batch is a tuple"):
        fusednn.compare(Doubling().to(device), torch.randn(2, 4, device=device), LOSS, timed_steps=0)


def test_a_model_that_does_not_run_in_float64_is_compared_with_stock(device: str) -> None:
    class Single(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.act = nn.SiLU()
            self.weight = nn.Parameter(torch.ones(4))

        def forward(self, x: Tensor) -> Tensor:
            assert self.weight.dtype is torch.float32
            return self.act(x * self.weight)

    found = fusednn.compare(Single().to(device), lambda: torch.randn(2, 4, device=device), steps=1, timed_steps=0)
    assert found.right
    assert "doesn't run in float64" in found.proof.reference


def test_a_random_model_is_compared_with_nothing(device: str) -> None:
    class Noisy(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(4, 4)

        def forward(self, x: Tensor) -> Tensor:
            return nn.functional.dropout(self.layer(x))

    found = fusednn.compare(Noisy().to(device), lambda: torch.randn(2, 4, device=device), steps=1, timed_steps=0)
    assert found.right is None
    assert "random" in str(found)


def test_without_gradients_a_loss_is_asked_for(device: str) -> None:
    with pytest.raises(ValueError, match="give compare"):
        fusednn.compare(nn.Flatten(), lambda: torch.zeros(2, 2, device=device))


@pytest.mark.stock
def test_command(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "mine.py").write_text(
        "import torch\nfrom torch import nn\n"
        "def pair():\n    return nn.Sequential(nn.Linear(4, 4), nn.ReLU()), lambda: torch.randn(2, 4)\n"
    )
    monkeypatch.chdir(tmp_path)
    assert main(["compare", "mine:pair", "--timed-steps", "3", "--json", "--draw", "bars.png"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["right"] is True
    assert set(found["memory"]) == {"stock", "replaced", "fused"}
    assert len(found["times_ms"]["fused"]["wall"]["step"]) == 3
    assert (tmp_path / "bars.png").stat().st_size > 1000
    assert main(["compare", "mine:nothing"]) == 2
    assert main(["compare", "mine"]) == 2
    assert "module:function" in capsys.readouterr().err
