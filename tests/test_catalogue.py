"""The catalogue: every function and layer has its row, and every row all that an operation needs."""

import inspect
from collections import Counter
from importlib import import_module
from pathlib import Path

import pytest
import torch
from support.baseline import BENCH
from torch import nn

from fusednn import autograd, kernels, layers
from fusednn.autograd.dispatch import observe_choices
from fusednn.catalogue import ROWS, row_of
from fusednn.layers.twin import TWINS

ROOT = Path(__file__).parents[1]
MEASURED = [name for path in sorted(BENCH.glob("bench_*.py")) for name in import_module(path.stem).OPERATIONS]

#: Is called by several processes, between which it communicates: `test_sync_batch_norm` does.
NEEDS_PROCESSES = ("sync_batch_norm",)

CALLED = [name for name in dict.fromkeys(row.name for row in ROWS) if name not in NEEDS_PROCESSES]


def test_every_function_has_a_row() -> None:
    assert {row.name for row in ROWS} == set(autograd.__all__)


def test_every_layer_has_one_row() -> None:
    exported = {name: getattr(layers, name) for name in layers.__all__}
    classes = [name for name, one in exported.items() if isinstance(one, type) and issubclass(one, nn.Module)]
    assert Counter(name for row in ROWS for name in row.layers) == Counter(classes)


#: Layers make a bias, and pool; functions are given one, or a size.  The paper's epsilon is smaller than a norm's.
OTHER_DEFAULTS = {"bias", "pool_size"}


def test_defaults_of_layers_are_their_functions() -> None:
    """Of layers that stock lacks; the others' are stock's."""
    compared = 0
    for row in ROWS:
        function = inspect.signature(getattr(autograd, row.name)).parameters
        for layer in (getattr(layers, name) for name in row.layers if getattr(layers, name) not in TWINS.values()):
            for name, parameter in inspect.signature(layer).parameters.items():
                if (
                    name not in function
                    or name in OTHER_DEFAULTS
                    or (layer, name) == (layers.GlobalContrastNorm, "eps")
                ):
                    continue
                if inspect.Parameter.empty not in (parameter.default, function[name].default):
                    assert parameter.default == function[name].default, (layer, name)
                    compared += 1
    assert compared > 50


def test_every_family_of_kernels_has_a_row() -> None:
    shipping = {name for name in kernels.__all__ if any(True for _ in kernels.shipped(name))}
    assert "activation" in shipping
    assert shipping - {"optimizer"} <= {row.family for row in ROWS}


def test_no_kernel_is_shipped_twice() -> None:
    """As where the rare ones are those that are common, and the rare ones missing."""
    labels = Counter(configuration.label for configuration in kernels.shipped())
    assert not [label for label, number in labels.items() if number > 1]


@pytest.mark.parametrize("name", autograd.__all__)
def test_nothing_of_an_operation_is_missing(name: str) -> None:
    """Its files, by the name of its family: function and test; a benchmark; and who calls it, a layer or the user."""
    family = row_of(name).family
    for file in (f"autograd/{family}.py", f"tests/test_{family}.py"):
        assert (ROOT / file).exists(), file
    assert any(one == name or one.startswith(f"{name}_") for one in MEASURED), "no benchmark"


@pytest.mark.parametrize("name", CALLED)
def test_a_rows_call_is_stocks(name: str, device: str) -> None:
    """What is random, `test_self_test` compares, given the mask that was drawn."""
    row = row_of(name)
    operands = [make.to(device) for make in row.operands(torch.randn(row.shape, dtype=torch.float64))]
    choices = []
    with observe_choices(choices.append):
        y = row.ours(*operands)
    assert choices
    if row.family != "dropout" and row.drawn is None:
        torch.testing.assert_close(y, row.stock(*operands), rtol=1e-6, atol=1e-6)


def test_budgets_are_what_their_words_say() -> None:
    relu, loss, pooling = row_of("relu"), row_of("mse_loss"), row_of("max_pool2d")
    eight = torch.Size((2, 4))
    assert relu.budget(eight, torch.float16) == (33, 33)
    assert relu.budget(eight, torch.float64) == (129, 129)
    assert loss.budget(eight, torch.float32) == (64, 96)
    assert loss.budget(eight, torch.float32, alternative=1) == (96, 128)
    assert pooling.budget(eight, torch.float32) == (40.5, 40.5)
    with pytest.raises(ValueError, match="a weight"):
        row_of("drop_connect_linear").budget(eight, torch.float32)
