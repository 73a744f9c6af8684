"""The layers against ``torch.nn``'s, on PyTorch's own ModuleInfo samples."""

import copy
import io
import pickle
from collections.abc import Callable, Iterator

import pytest
import torch
from support.accuracy import assert_accurate, assert_same_bits
from support.device import FLOAT_DTYPES, KERNELS_RUN
from support.pytorch_samples import MODULES, OPERATORS, module_samples
from support.samples import LAYERS
from torch import Tensor, nn
from torch.testing._internal.common_modules import ModuleInput
from torch.testing._internal.opinfo.core import SampleInput
from torch.utils._pytree import tree_map

import fusednn

every_module = pytest.mark.parametrize("stock_class", MODULES, ids=lambda cls: cls.__name__)
every_dtype = pytest.mark.parametrize("dtype", FLOAT_DTYPES, ids=lambda dtype: str(dtype).removeprefix("torch."))


def test_every_activation_has_a_layer() -> None:
    names = {
        *("CELU", "ELU", "GELU", "Hardsigmoid", "Hardswish", "Hardtanh", "LeakyReLU", "LogSigmoid", "Mish", "PReLU"),
        *("RReLU", "ReLU", "ReLU6", "SELU", "SiLU", "Sigmoid", "Softplus", "Softsign", "Tanh", "Threshold"),
    }
    assert {cls.__name__ for cls in MODULES} == names


def pairs(
    stock_class: type[nn.Module], device: str, dtype: torch.dtype, *, training: bool
) -> Iterator[tuple[nn.Module, nn.Module, ModuleInput]]:
    """Stock and ours for every sample, built alike."""
    for sample in module_samples(stock_class, device, dtype, training=training):
        arguments, options = sample.constructor_input.args, sample.constructor_input.kwargs
        modules = []
        for cls in (stock_class, LAYERS[stock_class]):
            torch.manual_seed(1)
            modules.append(cls(*arguments, **options).to(device, dtype).train(training))
        yield modules[0], modules[1], sample


def _inherent_error(name: str, dtype: torch.dtype) -> float:
    """What no implementation to the same specification avoids, on top of the accuracy rule."""
    name = name.lower().removeprefix("nn.functional.")
    if name in ("celu", "hardsigmoid") and dtype is torch.float64:
        return 1e-6  # stock rounds constants to float32 even in float64
    if name in ("celu", "elu", "selu") and dtype is torch.float32:
        return 4 * torch.finfo(dtype).eps  # gradients are read off an output of at most 1.76, rounded
    return 0.0


def run(module: nn.Module, sample: ModuleInput, dtype: torch.dtype | None = None) -> tuple[Tensor, list[Tensor]]:
    """Value, and the gradients of the input and of every parameter."""
    module = copy.deepcopy(module).to(dtype)
    (x,) = sample.forward_input.args
    x = x.detach().to(dtype).requires_grad_()
    y = module(x * 1 if getattr(module, "inplace", False) else x)
    gradient = torch.linspace(-1, 2, y.numel(), dtype=torch.float64).view(y.shape).to(y)
    return y.detach(), list(torch.autograd.grad(y, [x, *module.parameters()], gradient))


@every_module
@every_dtype
@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
@pytest.mark.smoke
def test_module_info_samples(stock_class: type[nn.Module], dtype: torch.dtype, training: bool, device: str) -> None:
    if stock_class is nn.RReLU and training and dtype is torch.float16 and not KERNELS_RUN:
        pytest.skip("stock has no random RReLU in float16 on a CPU")
    count = 0
    for stock, ours, sample in pairs(stock_class, device, dtype, training=training):
        y, gradients = run(ours, sample)
        if stock_class is nn.RReLU:
            stock.eval()  # the bounds are equal, and stock's training has no float16 on a CPU
        y_stock, gradients_stock = run(stock, sample)
        y_reference, gradients_reference = run(stock, sample, torch.float64)
        inherent = _inherent_error(stock_class.__name__, dtype)
        assert_accurate(y, y_stock, y_reference, "value", inherent=inherent)
        for triple in zip(gradients, gradients_stock, gradients_reference, strict=True):
            assert_accurate(*triple, "gradient", inherent=inherent)
        count += 1
    assert count


@every_module
def test_repr_state_dict_copies_and_pickles(stock_class: type[nn.Module], device: str) -> None:
    for stock, ours, sample in pairs(stock_class, device, torch.float32, training=True):
        assert repr(ours) == repr(stock)
        assert isinstance(ours, stock_class)
        assert list(ours.state_dict()) == list(stock.state_dict())
        ours.load_state_dict(stock.state_dict())
        stock.load_state_dict(ours.state_dict())
        saved = io.BytesIO()
        torch.save(ours, saved)
        saved.seek(0)
        (x,) = sample.forward_input.args
        for duplicate in (
            copy.deepcopy(ours),
            pickle.loads(pickle.dumps(ours)),
            torch.load(saved, weights_only=False),
        ):
            assert type(duplicate) is type(ours)
            assert vars(duplicate).keys() == vars(ours).keys()
            torch.testing.assert_close(duplicate(x.detach().clone()), ours(x.detach().clone()), equal_nan=True)


@every_module
def test_constructor_is_stocks(stock_class: type[nn.Module]) -> None:
    assert LAYERS[stock_class].__init__ is stock_class.__init__


@every_module
def test_scripting_and_tracing_give_stock_operators(stock_class: type[nn.Module], device: str) -> None:
    _, ours, sample = next(pairs(stock_class, device, torch.float32, training=False))
    ours.eval()
    (x,) = sample.forward_input.args
    x = x.detach()
    expected = ours(x.clone())
    for compiled in (torch.jit.script(ours), torch.jit.trace(ours, x.clone(), check_trace=False)):
        saved = io.BytesIO()
        torch.jit.save(compiled, saved)
        saved.seek(0)
        torch.testing.assert_close(torch.jit.load(saved)(x.clone()), expected)


@pytest.mark.parametrize("info", OPERATORS, ids=lambda info: info.full_name)
@every_dtype
def test_op_info_samples(info: object, dtype: torch.dtype, device: str) -> None:
    """The functions, on every sample of PyTorch's operator tests: also integers, complex numbers and odd shapes."""
    ours = getattr(fusednn.autograd, info.name.removeprefix("nn.functional."))
    others = {torch.int64, torch.complex64} if dtype is torch.float32 else set()
    for kind in info.dtypes & ({dtype} | others):
        for sample in info.sample_inputs(device, kind, requires_grad=kind.is_floating_point):
            if sample.kwargs.get("training"):
                # Random slopes are other numbers than stock's: equal bounds leave one right answer.
                sample.kwargs["lower"] = sample.kwargs["upper"]
            mine, theirs = (_results(function, sample) for function in (ours, info.op))
            if not kind.is_floating_point:
                assert_same_bits(mine[0], theirs[0])
                continue
            reference = _results(info.op, sample, torch.float64)
            for triple in zip(mine, theirs, reference, strict=True):
                assert_accurate(*triple, inherent=_inherent_error(info.name, dtype))


def _results(function: Callable[..., Tensor], sample: SampleInput, dtype: torch.dtype | None = None) -> list[Tensor]:
    """Value and gradients, computed in ``dtype``."""
    operands = []

    def convert(value: object) -> object:
        if isinstance(value, Tensor):
            operands.append(value.detach().to(dtype).requires_grad_(value.requires_grad))
            return operands[-1]
        return value

    x, arguments, options = tree_map(convert, (sample.input, sample.args, sample.kwargs))
    y = function(x * 1 if options.get("inplace") else x, *arguments, **options)
    wanted = [operand for operand in operands if operand.requires_grad]
    return [y.detach(), *(torch.autograd.grad(y.sum(), wanted) if wanted else ())]


@pytest.mark.parametrize(
    "info", [info for info in OPERATORS if info.error_inputs_func is not None], ids=lambda info: info.full_name
)
def test_op_info_errors(info: object, device: str) -> None:
    ours = getattr(fusednn.autograd, info.name.removeprefix("nn.functional."))
    for error in info.error_inputs(torch.device(device)):
        sample = error.sample_input
        with pytest.raises(error.error_type, match=error.error_regex):
            ours(sample.input, *sample.args, **sample.kwargs)


WRONG_CALLS = [
    (nn.Hardtanh, (), (torch.ones(3, dtype=torch.complex64),)),
    (nn.ReLU, (), ("text",)),
    (nn.ReLU, (), (torch.ones(3, dtype=torch.bool),)),
    (nn.ELU, (), (torch.ones(3, dtype=torch.int64),)),
    (nn.CELU, (0.0,), (torch.ones(3),)),
    (nn.GELU, ("sigmoid",), (torch.ones(3),)),
    (nn.GELU, (), (torch.ones(3, dtype=torch.int64),)),
    (nn.LogSigmoid, (), (torch.ones(3, dtype=torch.int64),)),
    (nn.Mish, (), (None,)),
    (nn.PReLU, (4,), (torch.ones(2, 3),)),
    (nn.PReLU, (4,), (torch.ones(4),)),
    (nn.PReLU, (), (torch.ones(2, 3, dtype=torch.float64),)),
    (nn.RReLU, (0.5, 0.1), (torch.ones(2, 3),)),
    (nn.SiLU, (), (torch.ones(3, dtype=torch.int64),)),
    (nn.Softplus, (), (torch.ones(3, dtype=torch.int64),)),
    (nn.Sigmoid, (), (3.0,)),
    (nn.Tanh, (), ([1.0],)),
    (nn.Threshold, ("a", 0.0), (torch.ones(3),)),
    (nn.LeakyReLU, (None,), (torch.ones(3),)),
]


@pytest.mark.parametrize(
    ("cls", "constructor", "inputs"), WRONG_CALLS, ids=lambda value: getattr(value, "__name__", "")
)
def test_errors_are_stocks(cls: type[nn.Module], constructor: tuple, inputs: tuple) -> None:
    def outcome(layer: type[nn.Module]) -> object:
        try:
            return layer(*constructor)(*inputs)
        except Exception as error:  # the exception is what is compared
            return type(error)

    theirs, mine = outcome(cls), outcome(LAYERS[cls])
    if isinstance(theirs, Tensor):
        torch.testing.assert_close(mine, theirs)
    else:
        assert mine is theirs
