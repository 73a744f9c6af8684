"""The activation layers beside ``torch.nn``'s: constructors, representation, copies, scripting, errors."""

import copy
import io
import pickle

import pytest
import torch
from support.device import FLOAT_DTYPES
from support.pytorch_samples import MODULES, module_pairs
from support.samples import LAYERS
from torch import Tensor, nn

every_module = pytest.mark.parametrize("stock_class", MODULES, ids=lambda cls: cls.__name__)
every_dtype = pytest.mark.parametrize("dtype", FLOAT_DTYPES, ids=lambda dtype: str(dtype).removeprefix("torch."))


def test_every_activation_has_a_layer() -> None:
    names = {
        *("CELU", "ELU", "GELU", "Hardsigmoid", "Hardswish", "Hardtanh", "LeakyReLU", "LogSigmoid", "Mish", "PReLU"),
        *("RReLU", "ReLU", "ReLU6", "SELU", "SiLU", "Sigmoid", "Softplus", "Softsign", "Tanh", "Threshold"),
    }
    assert {cls.__name__ for cls in MODULES} == names


@every_module
def test_repr_state_dict_copies_and_pickles(stock_class: type[nn.Module], device: str) -> None:
    for stock, ours, sample in module_pairs(stock_class, device, torch.float32, training=True):
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
    _, ours, sample = next(module_pairs(stock_class, device, torch.float32, training=False))
    ours.eval()
    (x,) = sample.forward_input.args
    x = x.detach()
    expected = ours(x.clone())
    for compiled in (torch.jit.script(ours), torch.jit.trace(ours, x.clone(), check_trace=False)):
        saved = io.BytesIO()
        torch.jit.save(compiled, saved)
        saved.seek(0)
        torch.testing.assert_close(torch.jit.load(saved)(x.clone()), expected)


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


@pytest.mark.whole
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
