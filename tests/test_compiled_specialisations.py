"""Every specialisation of the kernels' integers that Triton makes: an argument of 1 is a constant, no tensor."""

import itertools
from collections.abc import Callable, Iterator

import pytest
import torch
import torch.nn.functional as F
import triton
from support.compiled import ARCHITECTURE
from support.launches import launches, specialised_integers
from support.maxout import linear_operands, stock_linear
from support.planting import planted
from torch import Tensor
from triton._C.libtriton import ir
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource, make_backend

from fusednn import autograd, kernels
from fusednn.instruments.compile_check import DEVICES
from fusednn.kernels import linear_maxout
from fusednn.kernels.base import long_lines
from fusednn.kernels.base.launch import Configuration
from fusednn.testing import check_against_stock, random_tensor

pytestmark = pytest.mark.compiled


# --- Parsed: every integer of every kernel at 1, whether users can have it or not -------------------------------------


def representatives() -> dict[str, list[Configuration]]:
    """Of each kernel the configurations that differ in what chooses between branches, not in dtypes and sizes alone."""
    found: dict[tuple[str, str], Configuration] = {}
    for configuration in kernels.shipped():
        if specialised_integers(configuration):
            chosen = [each for each in configuration.constants if isinstance(each[1], bool | None) or each[0] == "AXIS"]
            found.setdefault((configuration.kernel.__name__, repr(chosen)), configuration)
    by_kernel: dict[str, list[Configuration]] = {}
    for (name, _), configuration in found.items():
        by_kernel.setdefault(name, []).append(configuration)
    return by_kernel


def ones(names: list[str], *, pairs: bool) -> Iterator[tuple[str, ...]]:
    """Alone, in pairs, all."""
    for number in sorted({1, 2, len(names)} if pairs else {1, len(names)}):
        yield from itertools.combinations(names, number)


def parse(configuration: Configuration, constants_of_1: tuple[str, ...]) -> None:
    """What the compiler does before optimising: here it meets Python's integers."""
    kernel, target = configuration.kernel, GPUTarget("cuda", 80, 32)
    backend = make_backend(target)
    types = {name: kind for name, kind in configuration.signature if name not in constants_of_1}
    constants = {**dict(configuration.constants), **dict.fromkeys(constants_of_1, 1)}
    source = ASTSource(kernel, {name: types.get(name, "constexpr") for name in kernel.arg_names}, constants, {})
    options = backend.parse_options(configuration.options(DEVICES["sm_80"]))
    context = ir.context()
    ir.load_dialects(context)
    backend.load_dialects(context)
    source.make_ir(target, options, backend.get_codegen_implementation(options), backend.get_module_map(), context)


@pytest.mark.parametrize("name", representatives() if ARCHITECTURE else ())
def test_integers_of_1(name: str) -> None:
    for n, configuration in enumerate(representatives()[name]):
        for constants_of_1 in ones(specialised_integers(configuration), pairs=n == 0):
            parse(configuration, constants_of_1)


def test_notices_what_a_constant_lacks() -> None:
    kernel = linear_maxout.linear_maxout_forward_kernel
    (configuration, *_) = representatives()[kernel.__name__]
    with planted(kernel, "tl.cast(units, tl.int64)", "units.to(tl.int64)"):
        parse(configuration, ())
        with pytest.raises(triton.CompilationError, match="to"):
            parse(configuration, ("units",))


# --- Run: every kind of integer that users can have -------------------------------------------------------------------


def kind(value: int) -> str:
    """What Triton makes of an integer."""
    return "1" if value == 1 else "16" if value % 16 == 0 else "other"


#: A size of each kind.
SIZES = {"1": 1, "16": 32, "other": 5}


def check(ours: Callable[..., Tensor], stock: Callable[..., Tensor], *operands: Tensor) -> None:
    y = stock(*operands)
    check_against_stock(ours, stock, operands, random_tensor(tuple(y.shape), y.dtype, "cpu", seed=9))


def gates(_: pytest.MonkeyPatch) -> None:
    """Of two tensors, and of rows whose halves have few columns or many."""
    check(autograd.gated, lambda gate, other: F.silu(gate) * other, *random_tensor((2, 3, 7), torch.float32, "cpu"))
    for columns in (1, 5, 8, 16):
        check(autograd.gated_halves, F.glu, random_tensor((3, 2 * columns), torch.float32, "cpu"))


def products(monkeypatch: pytest.MonkeyPatch) -> None:
    """Gradients are the kernels' where there are many rows."""
    for units in SIZES.values():
        check(autograd.maxout_linear, stock_linear, *linear_operands((7,), units, 32, 2, torch.float32, "cpu"))
    monkeypatch.setattr(linear_maxout, "_ENOUGH_PROGRAMS", 1)
    check(autograd.maxout_linear, stock_linear, *linear_operands((7,), 16, 32, 2, torch.float16, "cpu"))


def convolutions(_: pytest.MonkeyPatch) -> None:
    for filters in SIZES.values():
        x, weight = (
            random_tensor(shape, torch.bfloat16, "cpu").contiguous(memory_format=torch.channels_last)
            for shape in ((1, 16, 6, 6), (filters, 16, 3, 3))
        )
        y = autograd.conv_act_pool2d(x, weight, pool_size=2)
        expected = F.max_pool2d(F.relu(F.conv2d(x.float(), weight.float())), 2)
        torch.testing.assert_close(y.float(), expected, rtol=1e-2, atol=1e-2)


def long_lines_of_classes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(long_lines, "_SHARED_FROM", 8000)
    target = torch.tensor([7999, 0])
    for classes in (8000, 8001):
        logits = random_tensor((2, classes), torch.float32, "cpu")
        check(lambda x: autograd.cross_entropy(x, target), lambda x: F.cross_entropy(x, target), logits)


#: The columns of a half, and how far apart rows are: twice as far; both 1 where there are no halves.
HALVES = {("1", "1"), ("1", "other"), ("other", "other"), ("other", "16"), ("16", "16")}
#: Calls, and the kinds of each kernel's integers in them.  Users meet no others: products and convolutions of features
#: and channels that are no multiples of 16 are cuBLAS's and cuDNN's, and classes are many.
RUNS: dict[Callable[[pytest.MonkeyPatch], None], dict[str, set[tuple[str, ...]]]] = {
    gates: {"gated_kernel": HALVES},
    products: {  # units, features
        "linear_maxout_forward_kernel": {(units, "16") for units in SIZES},
        "linear_maxout_data_gradient_kernel": {("16", "16")},
        "linear_maxout_weight_gradient_kernel": {("16", "16")},
    },
    convolutions: {"conv_pool_kernel": {(filters, "16", "16") for filters in SIZES}},  # filters, channels, depth
    long_lines_of_classes: {"long_cross_entropy_kernel": {("16",), ("other",)}},
}


@pytest.mark.parametrize("call", RUNS, ids=lambda call: call.__name__)
def test_every_kind_of_integer_runs(
    call: Callable[[pytest.MonkeyPatch], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    with launches() as launched:
        call(monkeypatch)
    found: dict[str, set[tuple[str, ...]]] = {name: set() for name in RUNS[call]}
    for each in launched:
        if integers := specialised_integers(each.configuration):
            found[each.configuration.kernel.__name__].add(tuple(kind(each.values[name]) for name in integers))
    assert found == RUNS[call]


def test_no_kernel_is_missing() -> None:
    assert {name for kernel_names in RUNS.values() for name in kernel_names} == set(representatives())
