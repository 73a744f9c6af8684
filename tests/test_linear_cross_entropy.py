"""The output layer and its loss in one: in chunks, by kernels and by PyTorch's own operators alike."""

import copy
import itertools
import pickle
import weakref
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from support.device import KERNELS_RUN, ON_GPU
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import FlopCounterMode

import fusednn
from fusednn import autograd, layers
from fusednn.autograd.chunked_cross_entropy import chunk_rows
from fusednn.autograd.linear_cross_entropy import composed
from fusednn.layers.twin import stock_class
from fusednn.testing import assert_accurate, leaf, random_tensor

ROWS, FEATURES, CLASSES = 13, 4, 9
REDUCTIONS = ("none", "mean", "sum")


def reference(x: Tensor, linear_weight: Tensor, target: Tensor, **options: Any) -> Tensor:
    """All logits at once, by stock operators."""
    defaults = {"linear_bias": None, "weight": None, "reduction": "mean", "ignore_index": None}
    return composed(x, linear_weight, target, **{**defaults, "label_smoothing": 0.0, "options": None, **options})


def operands_of(
    dtype: torch.dtype, device: str, *, outputs: tuple[int, ...] = (), bias: bool = True, batched: bool = True
) -> list[Tensor]:
    """Input, weight and bias of the layer."""
    shapes = [(ROWS, FEATURES) if batched else (FEATURES,), (CLASSES, *outputs, FEATURES), (CLASSES, *outputs)]
    return [random_tensor(shape, dtype, device, seed) for seed, shape in enumerate(shapes[: 3 if bias else 2])]


def results(function: Callable[..., Tensor], operands: list[Tensor], target: Tensor, **options: Any) -> list[Tensor]:
    """Value and gradients, for a gradient of the loss that isn't 1."""
    x, linear_weight, *bias = (operand.detach().requires_grad_() for operand in operands)
    loss = function(x, linear_weight, target, linear_bias=bias[0] if bias else None, **options)
    gradient = torch.linspace(0.5, 3, loss.numel(), device=loss.device).view(loss.shape).to(loss.dtype)
    return [loss.detach(), *torch.autograd.grad(loss, [x, linear_weight, *bias], gradient)]


@pytest.mark.parametrize("outputs", [(), (3,), (2, 2)], ids=str)
@pytest.mark.parametrize("probabilities", [False, True])
@pytest.mark.smoke
def test_results(outputs: tuple[int, ...], probabilities: bool, device: str) -> None:
    for reduction, bias, batched in itertools.product(REDUCTIONS, (True, False), (True, False)):
        if (outputs or reduction == "sum") and not batched:
            continue
        dtype = torch.float32 if bias else torch.float64
        operands = operands_of(dtype, device, outputs=outputs, bias=bias, batched=batched)
        rows = (ROWS,) if batched else ()
        options = {"reduction": reduction, "weight": torch.linspace(0.2, 1, CLASSES, dtype=dtype, device=device)}
        if probabilities:
            options["label_smoothing"] = 0.2
            target = random_tensor((*rows, CLASSES, *outputs), dtype, device, seed=7).sigmoid()
        else:
            target = torch.randint(CLASSES, (*rows, *outputs), device=device)
            if batched:
                target[2] = options["ignore_index"] = 5
        ours, stock = (
            results(function, operands, target, **options)
            for function in (autograd.linear_cross_entropy, getattr(F, "linear_cross_entropy", reference))
        )
        exact = [operand.double() for operand in operands]
        options["weight"] = options["weight"].double()
        target = target.double() if probabilities else target
        for triple in zip(ours, stock, results(reference, exact, target, **options), strict=True):
            # Sums over rows and classes are added in another order: some roundings of the largest terms.
            assert_accurate(*triple, inherent=4 * torch.finfo(dtype).eps * triple[2].abs().max())


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_sixteen_bits(dtype: torch.dtype, device: str) -> None:
    operands, target = operands_of(dtype, device), torch.arange(ROWS, device=device) % CLASSES
    for reduction in REDUCTIONS:
        ours = results(autograd.linear_cross_entropy, operands, target, reduction=reduction)
        stock = results(reference, operands, target, reduction=reduction)
        exact = results(reference, [operand.double() for operand in operands], target, reduction=reduction)
        for triple in zip(ours, stock, exact, strict=True):
            assert_accurate(*triple)


def test_float16_gradients_use_the_upstream_gradients_range(device: str) -> None:
    """A scaler's gradient keeps small ones from vanishing: it has to reach the logits, not their rounded gradients."""
    x, matrix = (random_tensor((50, 8), torch.float16, device, seed) * 2.0**-14 for seed in (0, 1))
    target, scale = torch.arange(50, device=device), 2.0**14
    results = []
    for kind in (torch.float16, torch.float64):
        operands = [operand.to(kind).requires_grad_() for operand in (x, matrix)]
        loss = autograd.linear_cross_entropy(*operands, target)
        results.append(torch.autograd.grad(loss, operands[0], torch.full_like(loss, scale))[0])
    scaled, exact = results
    assert exact.abs().max() / scale < 2e-5  # few bits of float16 are left there
    torch.testing.assert_close(scaled.double(), exact, rtol=0.01, atol=1e-4 * float(exact.abs().max()))


def test_chunks_follow_from_the_shapes() -> None:
    assert chunk_rows(8192, 4096, 131072) == 1024
    assert chunk_rows(10, 4096, 131072) == 10
    assert chunk_rows(10**6, 64, 10) == 10**6  # these logits are smaller than the input
    assert chunk_rows(1000, 8, 50000) == 8
    for rows, features, outputs in itertools.product((1, 50, 3000), (1, 16, 2000), (2, 1000, 100_000)):
        assert chunk_rows(rows, features, outputs) * outputs <= max(rows, outputs) * features or features < 1


class PeakMemory(TorchDispatchMode):
    """Bytes of the tensors that are alive at once, of those made inside the ``with`` block."""

    takes_kernels = True

    def __init__(self) -> None:
        super().__init__()
        self.alive = self.peak = 0
        self._known: set[int] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func.namespace == "fusednn":
            # Our operators are Python: step into them.
            with self:
                return func.redispatch(torch._C.DispatchKeySet(torch._C.DispatchKey.CPU), *args, **kwargs)
        known = {value.untyped_storage()._cdata for value in tree_leaves((args, kwargs)) if isinstance(value, Tensor)}
        result = func(*args, **kwargs)
        for value in tree_leaves(result):
            if isinstance(value, Tensor) and value.untyped_storage()._cdata not in known | self._known:
                self._track(value.untyped_storage())
        return result

    def _track(self, storage: torch.UntypedStorage) -> None:
        key, size = storage._cdata, storage.nbytes()
        self._known.add(key)
        self.alive += size
        self.peak = max(self.peak, self.alive)
        weakref.finalize(storage, self._free, key, size)

    def _free(self, key: int, size: int) -> None:
        self._known.discard(key)
        self.alive -= size


FEW_FEATURES = 6


def peak_memory(rows: int, classes: int, reduction: str, device: str) -> int:
    x = random_tensor((rows, FEW_FEATURES), torch.float32, device).requires_grad_()
    linear_weight = random_tensor((classes, FEW_FEATURES), torch.float32, device).requires_grad_()
    target = torch.randint(classes, (rows,), device=device)

    def step() -> None:
        autograd.linear_cross_entropy(x, linear_weight, target, reduction=reduction).sum().backward()

    if ON_GPU:
        step()
        x.grad = linear_weight.grad = None
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        step()
        return torch.cuda.max_memory_allocated() - before
    with PeakMemory() as memory:
        step()
    return memory.peak


@pytest.mark.parametrize("reduction", ["mean", pytest.param("none", marks=pytest.mark.thorough)])
def test_peak_memory_is_independent_of_batch_times_classes(reduction: str, device: str) -> None:
    """It grows with the operands alone: what either adds doesn't depend on the other."""
    rows, classes = (8192, 4096) if ON_GPU else (96, 96)
    peaks = {
        (n, c): peak_memory(n * rows, c * classes, reduction, device) for n, c in itertools.product((1, 4), repeat=2)
    }
    operands = 4 * FEW_FEATURES * 4 * (rows + classes)
    logits = 4 * 16 * rows * classes
    assert peaks[4, 4] <= 6 * operands < logits / 4
    mixed = peaks[4, 4] - peaks[4, 1] - peaks[1, 4] + peaks[1, 1]
    assert abs(mixed) <= logits / 16


def test_the_peak_of_all_logits_is_noticed() -> None:
    """The meter's own test."""
    x, matrix = torch.ones(64, 16), torch.ones(128, 16)
    with PeakMemory() as memory:
        F.cross_entropy(x @ matrix.t(), torch.zeros(64, dtype=torch.int64))
    assert memory.peak >= 4 * 64 * 128


@pytest.mark.parametrize("needed", list(itertools.product((True, False), repeat=3)), ids=str)
def test_gradients_only_where_required(needed: tuple[bool, bool, bool], device: str) -> None:
    for reduction in ("mean", "none"):
        operands = operands_of(torch.float32, device)
        for operand, needs in zip(operands, needed, strict=True):
            operand.requires_grad_(needs)
        target = torch.arange(ROWS, device=device) % CLASSES
        x, linear_weight, linear_bias = operands
        loss = autograd.linear_cross_entropy(x, linear_weight, target, linear_bias=linear_bias, reduction=reduction)
        assert loss.requires_grad == any(needed)
        if any(needed):
            loss.sum().backward()
        assert tuple(operand.grad is not None for operand in operands) == needed


def test_no_gradients_are_computed_where_none_are_wanted(device: str) -> None:
    """One product, that of the logits."""
    x, linear_weight, _ = (leaf(operand) for operand in operands_of(torch.float32, device))
    target = torch.arange(ROWS, device=device) % CLASSES
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        autograd.linear_cross_entropy(x, linear_weight, target)
    assert counter.get_total_flops() == 2 * ROWS * FEATURES * CLASSES


def test_accumulation_and_repeated_backward(device: str) -> None:
    layer = layers.LinearCrossEntropyLoss(FEATURES, CLASSES, bias=True).to(device)
    x, target = random_tensor((ROWS, FEATURES), torch.float32, device), torch.arange(ROWS, device=device) % CLASSES
    loss = layer(x, target)
    loss.backward(retain_graph=True)
    once = [parameter.grad.clone() for parameter in layer.parameters()]
    loss.backward()
    (layer(x, target) / 2).backward()
    for parameter, gradient in zip(layer.parameters(), once, strict=True):
        torch.testing.assert_close(parameter.grad, 2.5 * gradient)


def test_derivatives_in_float64(device: str) -> None:
    operands = [random_tensor(shape, torch.float64, device) for shape in ((3, 2), (4, 2), (4,))]
    operands = [leaf(operand) for operand in operands]
    target = torch.tensor([3, 0, 1], device=device)
    for reduction in REDUCTIONS:

        def loss(x: Tensor, linear_weight: Tensor, linear_bias: Tensor, reduction: str = reduction) -> Tensor:
            return autograd.linear_cross_entropy(x, linear_weight, target, linear_bias=linear_bias, reduction=reduction)

        assert torch.autograd.gradcheck(loss, operands)
    assert torch.autograd.gradgradcheck(loss, operands)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_autocast(dtype: torch.dtype, device: str) -> None:
    operands, target = operands_of(torch.float32, device), torch.arange(ROWS, device=device) % CLASSES
    with torch.autocast(device, dtype=dtype):
        ours, stock = (results(f, operands, target) for f in (autograd.linear_cross_entropy, reference))
    for mine, theirs in zip(ours, stock, strict=True):
        assert mine.dtype == theirs.dtype == torch.float32
        torch.testing.assert_close(mine, theirs, rtol=2e-2, atol=2e-2)


@pytest.mark.skipif(ON_GPU, reason="on a GPU it is a device assertion, which ends the process")
def test_targets_out_of_bounds(device: str) -> None:
    operands, target = operands_of(torch.float32, device, bias=False), torch.full((ROWS,), CLASSES, device=device)
    for reduction in REDUCTIONS:
        with pytest.raises(IndexError):
            autograd.linear_cross_entropy(*operands, target, reduction=reduction)


WRONG = [
    ((2, 3, 4), (5, 4), None, {}),
    ((3, 4), (4,), None, {}),
    ((3, 4), (5, 3), None, {}),
    ((3, 4), (5, 4), (4,), {}),
    ((4,), (5, 2, 4), None, {}),
    ((3, 4), (5, 4), None, {"reduction": "average"}),
    ((3, 4), (5, 4), None, {"weight": torch.ones(3)}),
    ((3, 4), (5, 4), None, {"probabilities": True, "ignore_index": 2}),
]


@pytest.mark.parametrize(("x", "matrix", "bias", "options"), WRONG, ids=str)
def test_errors(x: tuple, matrix: tuple, bias: tuple | None, options: dict[str, Any], device: str) -> None:
    """Ours, stock's, and those of the stand-in for older PyTorch are of one type."""
    options = {key: value.to(device) if isinstance(value, Tensor) else value for key, value in options.items()}
    target = torch.zeros(x[:-1], dtype=torch.int64, device=device)
    if options.pop("probabilities", False):
        target = torch.ones(3, 5, device=device)
    kinds = set()
    for function in (autograd.linear_cross_entropy, reference, getattr(F, "linear_cross_entropy", reference)):
        operands = [torch.ones(shape, device=device) if shape else None for shape in (x, matrix, bias)]
        try:
            function(*operands[:2], target, linear_bias=operands[2], **options)
        except Exception as error:  # its type is what is compared
            kinds.add(type(error))
        else:
            kinds.add(None)
    assert len(kinds) == 1
    assert None not in kinds


def test_layer(device: str) -> None:
    options = {"out_features": (2,), "bias": True, "weight": torch.ones(CLASSES), "label_smoothing": 0.1}
    layer = layers.LinearCrossEntropyLoss(FEATURES, CLASSES, **options).to(device)
    assert list(layer.state_dict()) == ["weight", "linear.weight", "linear.bias"]
    stock = stock_class(type(layer))(FEATURES, CLASSES, **options).to(device)
    if hasattr(nn, "LinearCrossEntropyLoss"):
        assert type(stock) is nn.LinearCrossEntropyLoss
        assert repr(layer) == repr(stock)
    stock.load_state_dict(layer.state_dict())
    x, target = random_tensor((5, FEATURES), torch.float32, device), torch.randint(CLASSES, (5, 2), device=device)
    expected = layer(x, target)
    for duplicate in (copy.deepcopy(layer), pickle.loads(pickle.dumps(layer))):
        torch.testing.assert_close(duplicate(x, target), expected)
    fusednn.replace_layers(stock)
    assert type(stock) is layers.LinearCrossEntropyLoss
    torch.testing.assert_close(stock(x, target), expected)
    (row,) = (row for row in fusednn.explain(stock, x, target) if row.operation != "-")
    assert (row.operation, row.path) == ("linear_cross_entropy", "kernel" if KERNELS_RUN else "stock")


@pytest.mark.skipif(not hasattr(nn, "LinearCrossEntropyOptions"), reason="needs torch 2.13")
def test_options_ask_for_pytorchs_own_chunks(device: str) -> None:
    operands, target = operands_of(torch.float32, device, bias=False), torch.arange(ROWS, device=device) % CLASSES
    options = nn.LinearCrossEntropyOptions()
    ours, stock = (
        results(f, operands, target, options=options) for f in (autograd.linear_cross_entropy, F.linear_cross_entropy)
    )
    for mine, theirs in zip(ours, stock, strict=True):
        torch.testing.assert_close(mine, theirs)


@pytest.mark.kernels
def test_compiles_without_graph_breaks(device: str) -> None:
    torch._dynamo.reset()
    operands, target = operands_of(torch.float32, device), torch.arange(ROWS, device=device) % CLASSES
    for reduction in ("mean", "none"):
        compiled = torch.compile(
            lambda *a, r=reduction, **k: autograd.linear_cross_entropy(*a, reduction=r, **k),
            fullgraph=True,
            backend="aot_eager",
        )
        ours = results(compiled, operands, target)
        eager = results(autograd.linear_cross_entropy, operands, target, reduction=reduction)
        for mine, theirs in zip(ours, eager, strict=True):
            torch.testing.assert_close(mine, theirs)


@pytest.mark.kernels
def test_opcheck(device: str) -> None:
    operator = torch.ops.fusednn.linear_cross_entropy.default
    x, linear_weight, linear_bias = operands_of(torch.float32, device, outputs=(2,))
    target = torch.randint(CLASSES, (ROWS, 2), device=device)
    for reduction, needed in (("mean", (True, True, True)), ("none", (False, False, False))):
        arguments = (x, linear_weight, linear_bias, target, None, None, reduction, -100, 0.0, torch.float32, *needed)
        torch.library.opcheck(operator, arguments)
