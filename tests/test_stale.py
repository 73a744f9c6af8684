"""What is remembered of calls and could be stale: decisions and plans.

Whatever surrounds a call, or is new about its operands, it does what it would if nothing were remembered of those
before; and so does the next ordinary one.
"""

from __future__ import annotations

import copy
import threading
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from functools import partial
from typing import Any, NamedTuple
from unittest import mock

import pytest
import torch
from support.device import DEVICE, ON_GPU
from support.modes import Functions, Operators
from support.operations import OPERATIONS, Operation
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.autograd import forward_ad
from torch.fx.experimental.proxy_tensor import make_fx
from torch.utils.checkpoint import checkpoint
from torch.utils.flop_counter import FlopCounterMode

import fusednn
from fusednn.autograd import activation, decisions, dispatch, plans
from fusednn.autograd.operators import forget_plans
from fusednn.testing import assert_same_bits, leaf

# Compiled kernels take a tenth of the interpreter's time, and are what launches are remembered of.
pytestmark = pytest.mark.kernels if ON_GPU else pytest.mark.compiled


class Call(NamedTuple):
    """A call of a function or layer of ours."""

    function: Callable[..., Any]
    operands: tuple[Tensor, ...]

    def value(self, *operands: Tensor) -> Tensor:
        torch.manual_seed(0)
        result = self.function(*(operands or self.operands))
        return result[0] if isinstance(result, tuple) else result

    def results(self, around_backward: AbstractContextManager[Any] | None = None, **options: Any) -> list[Any]:
        """Value and gradients."""
        y = self.value()
        parameters = self.function.parameters() if isinstance(self.function, nn.Module) else ()
        leaves = [leaf for leaf in (*self.operands, *parameters) if leaf.requires_grad]
        if not (leaves and y.requires_grad):
            return [y]
        with around_backward or torch.enable_grad():
            return [y, *torch.autograd.grad(y, leaves, torch.ones_like(y), allow_unused=True, **options)]

    def of(self, change: Callable[[Tensor], Tensor]) -> Call:
        """With other operands."""
        return self._replace(operands=tuple(change(operand) for operand in self.operands))


CHAINS: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...]]] = {
    "a chain of a convolution": (
        lambda: nn.Sequential(nn.Conv2d(2, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.MaxPool2d(2)),
        (2, 2, 6, 6),
    ),
    "a chain of a linear layer": (lambda: nn.Sequential(nn.Linear(4, 4), nn.ReLU(), nn.Dropout(0.5)), (3, 4)),
    "a chain of batch norm": (lambda: nn.Sequential(nn.BatchNorm1d(4), nn.GELU()), (3, 4)),
}


class Subject:
    """What is called, the same object each time, a layer in the state that it begins in; with operands that aren't."""

    def __init__(self, name: str) -> None:
        self._function: Any
        if name == "an operator":
            self._function = lambda x: activation._forward(x, "gelu", 0.0, 0.0)
            self._operands = [torch.linspace(-2, 2, 12, device=DEVICE).view(3, 4)]
        elif name in CHAINS:
            build, shape = CHAINS[name]
            self._function = fusednn.replace_layers(build().to(DEVICE), fuse=True)
            self._operands = [torch.randn(shape, device=DEVICE, requires_grad=True)]
        else:
            operation = Operation(name, torch.float32)
            self._function, self._operands = operation.ours, operation.leaves()
        self._state = copy.deepcopy(self._function.state_dict()) if isinstance(self._function, nn.Module) else None

    def call(self) -> Call:
        if self._state is not None:
            self._function.load_state_dict(self._state)
            self._function.train().requires_grad_()
        return Call(self._function, tuple(leaf(operand.clone()) for operand in self._operands))


# --- What may be new --------------------------------------------------------------------------------------------------


class OurOperators(Operators):
    takes_kernels = True


class Subclass(Tensor):
    pass


def inside(context: Callable[[], AbstractContextManager[Any]]) -> Callable[[Call], list[Any]]:
    def way(call: Call) -> list[Any]:
        with context() as entered:
            results = call.results()
        return [*results, getattr(entered, "seen", None)]

    return way


def behind(context: Callable[[], AbstractContextManager[Any]]) -> Callable[[Call], list[Any]]:
    """Around the backward pass alone."""

    def way(call: Call) -> list[Any]:
        entered = context()
        return [*call.results(entered), getattr(entered, "seen", None)]

    return way


@contextmanager
def switched(set_to: Callable[[Any], object], value: Any, before: Any) -> Iterator[None]:
    set_to(value)
    try:
        yield
    finally:
        set_to(before)


@contextmanager
def small_is_stocks() -> Iterator[None]:
    with mock.patch.object(dispatch, "HOST_BOUND", {"cpu", "cuda"}), fusednn.always_kernels(False):
        yield


def profiled(call: Call) -> list[Any]:
    with torch.autograd.profiler.profile() as profiler:
        results = call.results()
    return [*results, [event.name for event in profiler.function_events if event.name.startswith("fusednn::")]]


def counted(call: Call) -> list[Any]:
    with FlopCounterMode(display=False) as counter:
        results = call.results()
    return [*results, counter.get_total_flops()]


def forward_mode(call: Call) -> list[Any]:
    first, *others = (operand.detach() for operand in call.operands)
    with forward_ad.dual_level():
        value = call.value(forward_ad.make_dual(first, torch.ones_like(first)), *others)
        return [each.clone() for each in forward_ad.unpack_dual(value) if each is not None]


def left_a_transform(call: Call) -> list[Any]:
    first, *others = (operand.detach() for operand in call.operands)
    left: list[Tensor] = []
    torch.func.grad(lambda x: (left.append(x), x.sum())[1])(first)  # type: ignore[func-returns-value]
    return [call.value(*left, *others)]


def traced(call: Call) -> list[Any]:
    """The nodes that are recorded, and what they compute."""
    function = call.function if isinstance(call.function, nn.Module) else call.value
    operands = tuple(operand.detach() for operand in call.operands)
    program = torch.jit.trace(function, operands, check_trace=False)
    return [[node.kind() for node in program.graph.nodes()], *_all(program(*operands))]


def recorded(call: Call) -> list[Any]:
    operands = [operand.detach() for operand in call.operands]
    program = make_fx(call.value)(*operands)
    return [[str(node.target) for node in program.graph.nodes if node.op == "call_function"], program(*operands)]


def fake(call: Call) -> list[Any]:
    with FakeTensorMode(allow_non_fake_inputs=True) as mode:
        return call.of(mode.from_tensor).results()


def elsewhere(call: Call) -> list[Any]:
    function = copy.deepcopy(call.function).to("meta") if isinstance(call.function, nn.Module) else call.function
    return Call(function, call.of(partial(_as_leaf, lambda x: x.to("meta"))).operands).results()


def in_a_thread(call: Call) -> list[Any]:
    found: list[Any] = []
    thread = threading.Thread(target=lambda: found.extend(_outcome(Call.results, call)))
    thread.start()
    thread.join()
    return found


def without_gradients(call: Call) -> list[Any]:
    if isinstance(call.function, nn.Module):
        call.function.requires_grad_(False)
    return call.of(Tensor.detach).results()


def in_double(call: Call) -> list[Any]:
    function = copy.deepcopy(call.function).double() if isinstance(call.function, nn.Module) else call.function
    return Call(function, call.of(partial(_as_leaf, lambda x: x.double())).operands).results()


def in_evaluation(call: Call) -> list[Any]:
    if isinstance(call.function, nn.Module):
        call.function.eval()
    return call.results()


def misaligned(x: Tensor) -> Tensor:
    return torch.cat((x.new_zeros(1), x.flatten()))[1:].view(x.shape)


def turned(x: Tensor) -> Tensor:
    return x.transpose(0, -1).contiguous().transpose(0, -1)


def sliced(x: Tensor) -> Tensor:
    return torch.stack((x, x), -1)[..., 0]


def _as_leaf(change: Callable[[Tensor], Tensor], operand: Tensor) -> Tensor:
    if not operand.is_floating_point():
        return operand
    return change(operand.detach()).requires_grad_(operand.requires_grad)


def of(change: Callable[[Tensor], Tensor]) -> Callable[[Call], list[Any]]:
    return lambda call: call.of(partial(_as_leaf, change)).results()


def autocast(dtype: torch.dtype) -> Callable[[], AbstractContextManager[Any]]:
    return lambda: torch.autocast("cuda" if torch.cuda.is_available() else "cpu", dtype=dtype)


WAYS: dict[str, Callable[[Call], list[Any]]] = {
    # modes, tracers and transforms
    "function_mode": inside(Functions),
    "dispatch_mode": inside(Operators),
    "mode_that_takes_kernels": inside(OurOperators),
    "mode_around_backward": behind(OurOperators),
    "function_mode_around_backward": behind(Functions),
    "flop_counter": counted,
    "profiler": profiled,
    "jit_trace": traced,
    "make_fx": recorded,
    "fake_tensors": fake,
    "meta_tensors": elsewhere,
    "vmap": lambda call: [torch.vmap(call.value)(*(operand.detach()[None] for operand in call.operands))],
    "grad_transform": lambda call: [torch.func.grad(lambda *given: call.value(*given).square().sum())(*call.operands)],
    "left_a_transform": left_a_transform,
    "forward_mode": forward_mode,
    # switches
    "no_grad": inside(torch.no_grad),
    "inference_mode": inside(torch.inference_mode),
    "bfloat16_autocast": inside(autocast(torch.bfloat16)),
    "float16_autocast": inside(autocast(torch.float16)),
    "autocast_around_backward": behind(autocast(torch.bfloat16)),
    "default_dtype": inside(lambda: switched(torch.set_default_dtype, torch.float64, torch.float32)),
    "default_device": inside(lambda: torch.device("meta")),
    "deterministic": inside(lambda: switched(torch.use_deterministic_algorithms, True, False)),
    "small_is_stocks": inside(small_is_stocks),
    "another_thread": in_a_thread,
    "second_derivatives": lambda call: call.results(create_graph=True),
    "saved_tensors_hooks": inside(lambda: torch.autograd.graph.saved_tensors_hooks(Tensor.clone, lambda x: x)),
    "checkpoint": lambda call: Call(partial(checkpoint, call.function, use_reentrant=False), call.operands).results(),
    # operands
    "without_gradients": without_gradients,
    "evaluation": in_evaluation,
    "double": in_double,
    "misaligned": of(misaligned),
    "turned": of(turned),
    "sliced": of(sliced),
    "subclass": of(lambda x: x.as_subclass(Subclass)),
    "negated_view": of(lambda x: torch._neg_view(-x)),
    "zeros_without_memory": of(lambda x: torch._efficientzerotensor(x.shape)),
    "parameter": of(nn.Parameter),
}


# --- The check --------------------------------------------------------------------------------------------------------


def _outcome(way: Callable[[Call], list[Any]], call: Call) -> list[Any]:
    """What comes of it, or the error."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            return way(call)
        except Exception as error:
            return [type(error), str(error)]


def _all(result: Any) -> Sequence[Any]:
    return result if isinstance(result, tuple) else (result,)


def assert_alike(found: list[Any], expected: list[Any]) -> None:
    assert [type(each) for each in found] == [type(each) for each in expected], (found, expected)
    for one, other in zip(found, expected, strict=True):
        if not isinstance(other, Tensor):
            assert one == other
            continue
        for name in ("shape", "dtype", "device", "requires_grad", "is_leaf"):
            assert getattr(one, name) == getattr(other, name), name
        assert one.stride() == other.stride()
        assert one.is_inference() == other.is_inference()
        if type(other) in (Tensor, nn.Parameter, Subclass) and not other.is_meta:
            assert_same_bits(*(each.detach().as_subclass(Tensor).resolve_neg() for each in (one, other)))


@pytest.fixture(autouse=True)
def _remembered_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(decisions, "_KEPT_CALL", 1)
    monkeypatch.setattr(plans, "_RECORDED_CALL", 1)


def _forget() -> None:
    decisions.forget_decisions()
    forget_plans()


def ordinary(call: Call) -> list[Any]:
    """With gradients, and of operands without."""
    return [*call.results(), *call.of(Tensor.detach).results()]


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("name", ["an operator", *CHAINS, *OPERATIONS])
def test_a_call_is_what_it_would_be_alone(name: str, way: str) -> None:
    subject = Subject(name)
    expected = _outcome(WAYS[way], subject.call())
    _forget()
    before = [_outcome(ordinary, subject.call()) for _ in range(3)]
    found = _outcome(WAYS[way], subject.call())
    assert_alike(found, expected)
    _forget()
    _outcome(WAYS[way], subject.call())
    for other in (*before[1:], _outcome(ordinary, subject.call())):
        assert_alike(other, before[0])
