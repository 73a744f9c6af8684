"""The second half of ``python -m fusednn check``: what it covers, and that it notices what is wrong."""

import json
from unittest import mock

import pytest
import torch
from torch import Tensor

from fusednn import autograd, kernels, layers, optim
from fusednn.__main__ import main
from fusednn.commands import self_test
from fusednn.layers.twin import TWINS
from fusednn.optim.twin import TWINS as OPTIMIZER_TWINS

#: Needs several processes: its layer is tested without them, and its kernels are batch norm's.
NEEDS_PROCESSES = {"sync_batch_norm"}
QUICK = ("conv_batch_norm", "drop_connect", "linear_cross_entropy")


@pytest.mark.stock
@pytest.mark.parametrize("stock_class", TWINS, ids=lambda cls: cls.__name__)
def test_every_twin_has_a_sample(stock_class: type) -> None:
    sample = self_test.layer_sample(stock_class)
    assert type(sample.ours) is TWINS[stock_class]
    y = sample.ours.double()(*sample.operands)
    assert y.numel()
    if sample.draw is None:
        torch.testing.assert_close(y, sample.stock.double()(*sample.operands))


def test_every_family_of_kernels_is_covered() -> None:
    names = {name for name in kernels.__all__ if any(True for _ in kernels.shipped(name))}
    assert "activation" in names
    assert names <= set(self_test.families())


def test_every_optimizer_is_covered() -> None:
    exported = [getattr(optim, name) for name in optim.__all__]
    twins = {one for one in exported if isinstance(one, type) and issubclass(one, optim.FusedOptimizer)}
    assert set(OPTIMIZER_TWINS.values()) == twins - {optim.FusedOptimizer}


@pytest.mark.kernels
@pytest.mark.parametrize(
    "family",
    [pytest.param(one, marks=() if one in QUICK else pytest.mark.thorough) for one in self_test.families()],
)
def test_everything_passes(family: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["check", "--no-compile", "--family", family, "--json"]) == 0
    results = json.loads(capsys.readouterr().out)["tested"]
    assert {result["family"] for result in results} == {family}
    assert {result["dtype"] for result in results} == {"float16", "bfloat16", "float32", "float64"}
    assert not any(result["problems"] for result in results)


def a_little_wrong(layer: layers.PReLU, x: Tensor) -> Tensor:
    return autograd.prelu(x, layer.weight) * 1.1


@pytest.mark.kernels
@pytest.mark.parametrize(
    ("forward", "problem"),
    [(a_little_wrong, "PReLU float32: error of "), (torch.nn.PReLU.forward, "PReLU float32: took no kernel")],
)
def test_notices_what_is_wrong(forward: object, problem: str, capsys: pytest.CaptureFixture[str]) -> None:
    with mock.patch.object(layers.PReLU, "forward", forward):
        assert main(["check", "--no-compile", "--family", "prelu"]) == 1
    text = capsys.readouterr().out
    assert problem in text
    assert "\n0 of 4 pass\n" in text
