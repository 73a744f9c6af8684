"""Our functions in the place of ``torch.nn.functional``'s: set by hand, as people patch models, and by the library."""

import contextlib
import copy
import warnings
from collections.abc import Iterator
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from support.pytorch_samples import OPERATORS, SAMPLED, module_samples
from torch import Tensor, nn

import fusednn
from fusednn import autograd
from fusednn.autograd.dispatch import Choice, observe_choices

#: The functions that have a namesake in ``torch.nn.functional``.
NAMES = [name for name in autograd.__all__ if hasattr(F, name)]
_INFOS = {info.name.removeprefix("nn.functional."): info for info in reversed(OPERATORS)}


def arguments_of(name: str, device: str) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Arguments of a call that leaves one right result."""
    if "dropout" in name:
        dims = {"dropout1d": 1, "dropout3d": 3}.get(name, 2)
        return (torch.randn((2, 3, *[4] * dims), device=device), 0.0, True), {}
    if name == "rrelu":
        return (torch.randn(5, device=device), 0.25, 0.25, True), {}
    sample = next(iter(_INFOS[name].sample_inputs(torch.device(device), torch.float32)))
    return (sample.input, *sample.args), sample.kwargs


class Tagged(Tensor):
    """A tensor subclass, which kernels don't take."""


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("kind", [Tensor, Tagged], ids=["plain", "subclass"])
def test_functions_patched_by_name(name: str, kind: type[Tensor], device: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each function in its namesake's place: what no kernel takes reaches PyTorch's, not ours again."""
    (first, *others), options = arguments_of(name, device)
    first = first.as_subclass(kind)
    expected = getattr(F, name)(first, *others, **options)
    for other in NAMES:
        monkeypatch.setattr(F, other, getattr(autograd, other))
    result = getattr(F, name)(first, *others, **options)
    assert type(result) is type(expected)
    torch.testing.assert_close(result, expected)


# --- replace_functions ------------------------------------------------------------------------------------------------


@pytest.fixture
def stock() -> Iterator[dict[str, Any]]:
    """What ``torch.nn.functional`` holds, and has to hold again."""
    held = {name: getattr(F, name) for name in NAMES}
    yield held
    assert {name: getattr(F, name) for name in NAMES} == held


def test_replaces_and_restores_every_function(stock: dict[str, Any]) -> None:
    report = fusednn.replace_functions()
    try:
        assert {name: getattr(F, name) for name in NAMES} == {name: getattr(autograd, name) for name in NAMES}
        assert [row.name for row in report.changed] == NAMES
        assert not fusednn.replace_functions().changed
        assert f"{len(NAMES)} of {len(NAMES)} functions changed" in str(report)
    finally:
        restored = fusednn.restore_functions()
    assert [row.name for row in restored.changed] == NAMES
    assert not fusednn.restore_functions().changed


def test_replaces_for_a_while(stock: dict[str, Any]) -> None:
    with fusednn.replace_functions():
        with fusednn.replace_functions() as inner:
            assert not inner.changed
        assert F.relu is autograd.relu
    with pytest.raises(KeyError), fusednn.replace_functions():
        raise KeyError


def test_other_peoples_functions_stay(stock: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    def other(input: Tensor) -> Tensor:
        return input

    monkeypatch.setattr(F, "relu", other)
    with fusednn.replace_functions() as report:
        assert F.relu is other
        monkeypatch.setattr(F, "gelu", other)
    assert F.gelu is other
    reasons = {row.name: row.reason for row in report.rows if not row.changed}
    assert list(reasons) == ["relu"]
    assert reasons["relu"].startswith("something else is in its place: <function")
    monkeypatch.undo()
    F.gelu = stock["gelu"]


@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
@pytest.mark.parametrize("stock_class", SAMPLED, ids=lambda cls: cls.__name__)
def test_stock_layers_compute_the_same_with_our_functions(
    stock_class: type[nn.Module], training: bool, device: str
) -> None:
    sample = next(iter(module_samples(stock_class, device, torch.float32, training=training)))
    arguments, options = sample.constructor_input.args, sample.constructor_input.kwargs
    module = stock_class(*arguments, **options).to(device).train(training)
    if "Dropout" in stock_class.__name__:
        module.p = 0.0  # nothing is left to chance
    results = []
    for replace in (contextlib.nullcontext, fusednn.replace_functions):
        with replace(), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            copied = copy.deepcopy(module)
            results.append(copied(*(copy.deepcopy(arg.detach()) for arg in sample.forward_input.args)))
    torch.testing.assert_close(results[1], results[0], equal_nan=True)


def test_models_compute_the_same_with_our_functions(device: str) -> None:
    """PyTorch's own compositions, which call functions of each other."""
    encoder = nn.TransformerEncoderLayer(8, 2, 16, dropout=0.0, activation="gelu", batch_first=True).to(device)
    x = torch.randn(2, 3, 8, device=device, requires_grad=True)
    results = []
    for replace in (contextlib.nullcontext, fusednn.replace_functions):
        with replace():
            y = encoder(x)
            attention, weights = encoder.self_attn(x, x, x, need_weights=True)
            loss = (
                F.cross_entropy(y[:, 0], torch.tensor([1, 2], device=device)) + attention.sum() + weights.square().sum()
            )
            results.append((y, weights, *torch.autograd.grad(loss, [x, *encoder.parameters()], materialize_grads=True)))
    torch.testing.assert_close(results[1], results[0], rtol=1e-4, atol=1e-5)


@pytest.mark.kernels
def test_code_that_calls_functions_takes_kernels(device: str) -> None:
    choices: list[Choice] = []
    with fusednn.replace_functions(), observe_choices(choices.append):
        F.silu(torch.ones(3, device=device))
        nn.ReLU()(torch.ones(3, device=device))
    assert [(choice.operation, choice.path) for choice in choices] == [("silu", "kernel"), ("relu", "kernel")]
