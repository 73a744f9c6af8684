"""Whether a function, or a class of modules, can take another's place and nobody notice: `check_drop_in`."""

from __future__ import annotations

import copy
import inspect
import warnings
from collections import Counter
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves, tree_map

from ..autograd.dispatch import always_kernels
from .accuracy import assert_same_bits
from .bounds import checked_bounds
from .layouts import ARRANGEMENTS
from .outcome import Outcome, assert_outcome, evaluate
from .samples import EXTREMES, FAR, Sample, as_samples
from .standing import poisoned_memory

__all__ = ["CHECKS", "DropIn", "assert_same_signature", "check_drop_in"]

#: What `check_drop_in` looks at, in this order.
CHECKS = (
    "signature",
    "state_dict",
    "values and gradients",
    "layouts",
    "extremes",
    "second derivatives",
    "changes in place",
    "exceptions",
)

_FLOATS = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
_NOT_FINITE = [float("nan"), float("inf"), -float("inf")]


@dataclass
class DropIn:
    """What was checked, how often, what was left out, and why; prints as a table."""

    checked: Counter[str] = field(default_factory=Counter)
    left_out: dict[str, str] = field(default_factory=dict)

    def __str__(self) -> str:
        width = max(map(len, CHECKS))
        lines = [f"{name.ljust(width)}  {self.checked[name]:4} passed" for name in CHECKS if self.checked[name]]
        lines += [f"{name.ljust(width)}  left out: {why}" for name, why in self.left_out.items()]
        return "\n".join(lines)


def check_drop_in(
    ours: Callable[..., Any],
    stock: Callable[..., Any],
    samples: Iterable[Sample | Tensor | tuple[Any, ...]],
    *,
    dtypes: Collection[torch.dtype] = _FLOATS,
    errors: Iterable[Sample | Tensor | tuple[Any, ...]] = (),
    inherent: float = 0.0,
    skip: Collection[str] = (),
) -> DropIn:
    """Hold ``ours`` to ``stock``, in everything that somebody who uses stock may rely on.

    Args:
        ours: a function, or a class of modules.
        stock: what it stands in for: a function or a class of the same arguments, for all dtypes, float64 included.
        samples: calls, whose floating-point tensors are given in each of ``dtypes``, on the device that they are on.
            Random operations need samples that leave nothing to chance.
        dtypes: those that ours takes.  Where stock lacks one, that is left out.
        errors: calls that stock refuses, beside those that are made of the samples.
        inherent: an error that follows from what the operation is specified to do, on top of the accuracy rule's.
        skip: names of `CHECKS`.

    Returns:
        What was checked, and what was left out because stock can't be asked.

    The checks, each over all samples:

    - *signature*: the same parameters; ours may have more that are keyword-only.
    - *state_dict* (modules): loads from stock's, and stock's loads from ours, with the same keys, shapes and dtypes.
    - *values and gradients*, in every dtype: within the accuracy rule (`assert_accurate`); over poisoned memory, so
      that outputs are fully written; the same bits twice; operands unchanged; in the memory format of the input.  In
      Triton's interpreter accesses out of bounds raise.
    - *layouts*: the same with operands and incoming gradients in channels_last, transposed, sliced and expanded memory.
    - *extremes*: zeros of both signs, where functions overflow, infinities and NaN.
    - *second derivatives*: stock's, or none where it has none.
    - *changes in place*: of results and operands after the call, wherever stock's backward pass allows them.
    - *exceptions*: what stock raises for wrong calls, ours raises.

    Raises AssertionError that names every check that failed, with the first complaint of each.
    """
    if unknown := set(skip) - set(CHECKS):
        raise ValueError(f"no checks are called {', '.join(sorted(unknown))}; known: {', '.join(CHECKS)}")
    pair = _Pair(ours, stock, tuple(dtypes))
    calls = list(as_samples(samples))
    if not calls:
        raise ValueError("no samples: nothing would be checked")
    found, complaints = DropIn(), dict[str, str]()
    plans: dict[str, Iterator[tuple[str, Callable[[], None]]]] = {
        "signature": iter([("", partial(assert_same_signature, ours, stock))]),
        "state_dict": _each(calls if pair.modules else [], pair.state_dict),
        "values and gradients": _values(pair, calls, inherent),
        "layouts": _layouts(pair, calls, inherent),
        "extremes": _extremes(pair, calls, inherent),
        "second derivatives": _each(calls, pair.second_derivatives),
        "changes in place": _each(calls, pair.changes),
        "exceptions": _exceptions(pair, calls, list(as_samples(errors))),
    }
    for name, plan in plans.items():
        if name in skip:
            found.left_out[name] = "told so"
            continue
        for where, check in plan:
            try:
                with warnings.catch_warnings(), always_kernels():
                    warnings.simplefilter("ignore")
                    check()
                found.checked[name] += 1
            except _CannotAskError as reason:
                found.left_out.setdefault(name, f"{where}: {reason}".removeprefix(": "))
            except Exception as error:
                words = str(error) if isinstance(error, AssertionError) else f"{type(error).__name__}: {error}"
                complaints.setdefault(name, f"{name}: {where}: {words}")
        if not found.checked[name] and name not in complaints:
            nothing = "these are no modules" if name == "state_dict" else "nothing of the kind in the samples"
            found.left_out.setdefault(name, nothing)
    if complaints:
        raise AssertionError("\n".join(complaints.values()))
    return found


def assert_same_signature(ours: Callable[..., Any], stock: Callable[..., Any]) -> None:
    """The same parameters, of modules also of ``forward``; ours may have more, keyword-only and with defaults.

    Raises AssertionError, or LookupError where stock's is a builtin's, which can't be read.
    """
    pairs = [(ours, stock)]
    if isinstance(ours, type) and isinstance(stock, type):
        pairs.append((getattr(ours, "forward", ours), getattr(stock, "forward", stock)))
    for mine, theirs in pairs:
        try:
            wanted = list(inspect.signature(theirs).parameters.values())
        except ValueError:
            raise _CannotAskError("stock's is a builtin's") from None
        own = list(inspect.signature(mine).parameters.values())
        known = {parameter.name for parameter in wanted}
        kept = [p for p in own if p.name in known or p.kind is not p.KEYWORD_ONLY or p.default is p.empty]
        differ = [(p.name, p.kind, p.default) for p in kept] != [(p.name, p.kind, p.default) for p in wanted]
        if differ:
            raise AssertionError(f"({', '.join(map(str, own))}), stock's ({', '.join(map(str, wanted))})")


class _CannotAskError(LookupError):
    """Stock can't say what is right."""


_Checks = Iterator[tuple[str, Callable[[], None]]]


def _each(samples: Sequence[Sample], check: Callable[[Sample], None]) -> _Checks:
    return ((str(sample), partial(check, sample)) for sample in samples)


def _values(pair: _Pair, samples: Sequence[Sample], inherent: float) -> _Checks:
    for dtype in pair.dtypes:
        for sample in samples:
            yield f"{sample} in {_name(dtype)}", partial(pair.values, sample, dtype, inherent)


def _layouts(pair: _Pair, samples: Sequence[Sample], inherent: float) -> _Checks:
    for sample in samples:
        for name, arrange in ARRANGEMENTS.items():
            if sample.args and isinstance(sample.args[0], Tensor) and sample.args[0].dim() > 1:
                arranged = partial(_arranged, arrange)
                # Of values that repeat all may cancel; what results are sums of is of the order of 1.
                more = torch.finfo(pair.dtypes[0]).eps if name == "expanded" else 0.0
                yield f"{sample}, {name}", partial(pair.values, sample, pair.dtypes[0], inherent + more, arranged)


def _arranged(arrange: Callable[[Tensor], Tensor], tensor: Tensor) -> Tensor:
    return arrange(tensor) if tensor.dim() > 1 and tensor.is_floating_point() else tensor


def _extremes(pair: _Pair, samples: Sequence[Sample], inherent: float) -> _Checks:
    for sample in samples:
        if not (sample.args and isinstance(sample.args[0], Tensor) and sample.args[0].is_floating_point()):
            continue
        for numbers, every in ((EXTREMES, 3), (FAR, 5), (_NOT_FINITE, 7)):
            first = sample.args[0]
            hurt = first.detach().clone(memory_format=torch.contiguous_format)
            places = hurt.view(-1)[::every]
            places.copy_(torch.tensor([numbers[i % len(numbers)] for i in range(len(places))]))
            changed = replace(sample, args=(hurt.requires_grad_(first.requires_grad), *sample.args[1:]))
            # Sums of numbers that are far apart cancel; overflow is what these are for.
            more = torch.finfo(pair.dtypes[0]).eps * max(numbers) if numbers is FAR else 0.0
            yield f"{sample} of {numbers[:3]}...", partial(pair.values, changed, pair.dtypes[0], inherent + more)


def _exceptions(pair: _Pair, samples: Sequence[Sample], errors: Sequence[Sample]) -> _Checks:
    for number, sample in enumerate((*samples[:2], *errors)):
        wrong = {"": sample} if number >= len(samples[:2]) else dict(_wrong_calls(sample))
        for name, call in wrong.items():
            yield f"{sample}, {name}".removesuffix(", "), partial(pair.refuses, call)


def _wrong_calls(sample: Sample) -> Iterator[tuple[str, Sample]]:
    def made(*args: Any, **kwargs: Any) -> Sample:
        return replace(sample, args=args, kwargs={**sample.kwargs, **kwargs})

    yield "without arguments", replace(sample, args=(), kwargs={})
    yield "an argument too many", made(*sample.args, *[None] * 12)
    yield "an unknown keyword", made(*sample.args, no_such_keyword=1)
    if sample.args:
        yield "a string for a tensor", made("x", *sample.args[1:])
        yield "None for a tensor", made(None, *sample.args[1:])
    if sample.args and isinstance(sample.args[0], Tensor):
        yield "a complex tensor", made(sample.args[0].detach().to(torch.complex64), *sample.args[1:])
        yield "a tensor of integers", made(sample.args[0].detach().to(torch.int64), *sample.args[1:])
        yield "a tensor of no dimensions", made(sample.args[0].detach().reshape(-1)[0], *sample.args[1:])


@dataclass(frozen=True)
class _Pair:
    """Ours and stock, functions or classes of modules."""

    ours: Callable[..., Any]
    stock: Callable[..., Any]
    dtypes: tuple[torch.dtype, ...]

    @property
    def modules(self) -> bool:
        return isinstance(self.stock, type) and issubclass(self.stock, nn.Module)

    @property
    def widest(self) -> torch.dtype:
        return max(self.dtypes, key=lambda dtype: (dtype.itemsize, torch.finfo(dtype).bits))

    # --- Calls --------------------------------------------------------------------------------------------------------

    def made(self, sample: Sample, dtype: torch.dtype) -> tuple[Callable[..., Any], Callable[..., Any]]:
        """Ours and stock for a sample: modules with the same parameters and buffers."""
        if not self.modules:
            return self.ours, self.stock
        both: list[nn.Module] = []
        for cls in (self.ours, self.stock):
            torch.manual_seed(0)
            both.append(cls(*sample.init_args, **sample.init_kwargs).to(_device(sample), dtype))
        both[0].load_state_dict(both[1].state_dict())
        return both[0], both[1]

    def evaluate(
        self,
        function: Callable[..., Any],
        sample: Sample,
        dtype: torch.dtype | None = None,
        arrange: Callable[[Tensor], Tensor] = lambda tensor: tensor,
    ) -> Outcome:
        inplace = bool(sample.kwargs.get("inplace", getattr(function, "inplace", False)))
        parameters: list[Tensor] = []
        if isinstance(function, nn.Module):
            function = copy.deepcopy(function).to(dtype)
            parameters = list(function.parameters())
        outcome = evaluate(function, sample.args, sample.kwargs, dtype, parameters, inplace=inplace, arrange=arrange)
        buffers = list(function.buffers()) if isinstance(function, nn.Module) else []
        return outcome._replace(updated=outcome.updated + buffers)

    # --- Checks -------------------------------------------------------------------------------------------------------

    def state_dict(self, sample: Sample) -> None:
        ours, stock = self.made(sample, self.dtypes[0])
        assert isinstance(ours, nn.Module)
        assert isinstance(stock, nn.Module)
        mine, theirs = ours.state_dict(), stock.state_dict()
        if list(mine) != list(theirs):
            raise AssertionError(f"keys {list(mine)}, stock's {list(theirs)}")
        for key, value in theirs.items():
            if (mine[key].shape, mine[key].dtype) != (value.shape, value.dtype):
                raise AssertionError(f"{key}: {mine[key].dtype} {tuple(mine[key].shape)}")
        for module, state in ((ours, theirs), (stock, mine)):
            module.load_state_dict(state)  # strict: raises for keys that are missing or unexpected

    def values(
        self,
        sample: Sample,
        dtype: torch.dtype,
        inherent: float,
        arrange: Callable[[Tensor], Tensor] = lambda tensor: tensor,
    ) -> None:
        sample = _given(sample, dtype, arrange)
        ours, stock = self.made(sample, dtype)
        try:
            theirs = self.evaluate(stock, sample, arrange=arrange)
        except Exception as refusal:
            if _lacks(refusal):
                raise _CannotAskError(str(refusal).splitlines()[0]) from None
            self.refuses(sample)  # ours has to, too
            return
        reference = self.evaluate(stock, sample, torch.float64, arrange)
        before = [tensor.detach().clone() for tensor in _tensors(sample)]
        with poisoned_memory(0xA5):
            mine = self.evaluate(ours, sample, arrange=arrange)
        with poisoned_memory(0x5A), checked_bounds():
            again = self.evaluate(ours, sample, arrange=arrange)
        for what in Outcome._fields:
            for one, other in zip(getattr(mine, what), getattr(again, what), strict=True):
                if one is not None:
                    assert_same_bits(one, other, f"{what}, run twice over different memory")
        for tensor, copied in zip(_tensors(sample), before, strict=True):
            assert_same_bits(tensor.detach(), copied, "operand, after the call")
        assert_outcome(mine, theirs, reference, inherent)
        _assert_format(mine.outputs, theirs.outputs, sample)

    def second_derivatives(self, sample: Sample) -> None:
        sample = _given(sample, self.widest)
        ours, stock = self.made(sample, self.widest)
        try:
            theirs = _twice(stock, sample)
        except RuntimeError as refusal:
            raise _CannotAskError(f"stock has none: {str(refusal).splitlines()[0]}") from None
        tolerance = 1e-6 if self.widest is torch.float64 else 1e-3
        _assert_close(_twice(ours, sample), theirs, tolerance, "second derivative")

    def changes(self, sample: Sample) -> None:
        sample = _given(sample, self.widest)
        ours, stock = self.made(sample, self.widest)
        tolerance = 1e-6 if self.widest is torch.float64 else 1e-3
        allowed = 0
        for index in range(-1, len(sample.args)):
            theirs = _changed(stock, sample, index)
            if theirs is None:
                continue
            allowed += 1
            what = "the result" if index < 0 else f"operand {index}"
            mine = _changed(ours, sample, index)
            if mine is None:
                raise AssertionError(f"{what} can't be changed after the call, as stock's can")
            _assert_close(mine, theirs, tolerance, f"gradient after {what} was changed")
        if not allowed:
            raise _CannotAskError("stock's backward pass allows no changes")

    def refuses(self, sample: Sample) -> None:
        """Ours raises what stock raises, or neither does."""
        raised: list[Exception | None] = []
        for cls in (self.ours, self.stock):
            try:
                function = cls(*sample.init_args, **sample.init_kwargs).to(_device(sample)) if self.modules else cls
                function(*sample.args, **sample.kwargs)
                raised.append(None)
            except Exception as error:
                raised.append(error)
        mine, theirs = raised
        if theirs is None:
            if mine is not None:
                raise AssertionError(f"raises {type(mine).__name__}: {mine}; stock doesn't")
        elif mine is None:
            raise AssertionError(f"stock raises {type(theirs).__name__}: {str(theirs).splitlines()[0]}")
        elif not _of_one_kind(mine, theirs):
            raise AssertionError(f"raises {type(mine).__name__}: {mine}; stock {type(theirs).__name__}: {theirs}")


# --- Samples and outcomes ---------------------------------------------------------------------------------------------


def _tensors(sample: Sample) -> list[Tensor]:
    return [leaf for leaf in tree_leaves((sample.args, dict(sample.kwargs))) if isinstance(leaf, Tensor)]


def _device(sample: Sample) -> torch.device:
    return next((tensor.device for tensor in _tensors(sample)), torch.device("cpu"))


def _given(sample: Sample, dtype: torch.dtype, arrange: Callable[[Tensor], Tensor] = lambda tensor: tensor) -> Sample:
    """The sample in a dtype and a layout; some tensors require gradients."""
    chosen = any(tensor.requires_grad for tensor in _tensors(sample))
    first = next((tensor for tensor in _tensors(sample) if tensor.is_floating_point()), None)

    def give(value: Any) -> Any:
        if not isinstance(value, Tensor):
            return value
        tensor = value.detach()
        tensor = arrange(tensor.to(dtype) if tensor.is_floating_point() else tensor)
        return tensor.requires_grad_(value.requires_grad if chosen else value is first)

    return replace(sample, args=tree_map(give, sample.args), kwargs=tree_map(give, dict(sample.kwargs)))


def _of_one_kind(mine: Exception, theirs: Exception) -> bool:
    """The same, or the one more special; what isn't a tensor is told so by whoever meets it first."""
    kinds: list[Any] = [type(mine), type(theirs), (TypeError, AttributeError)]
    return any(isinstance(mine, kind) and isinstance(theirs, kind) for kind in kinds)


def _lacks(refusal: Exception) -> bool:
    """Whether stock has no such operator in this dtype on this device."""
    return isinstance(refusal, NotImplementedError) or "not implemented for" in str(refusal)


def _assert_format(ours: Sequence[Tensor], stock: Sequence[Tensor], sample: Sample) -> None:
    first = next(iter(_tensors(sample)), None)
    for mine, theirs in zip(ours, stock, strict=True):
        # Stock's results mostly keep the input's memory format.
        legal = {theirs.stride()}
        if first is not None and first.shape == mine.shape:
            legal.add(torch.empty_like(first).stride())
        if mine.numel() > 1 and mine.stride() not in legal:
            raise AssertionError(f"strides {mine.stride()}, not {' or '.join(map(str, sorted(legal)))}")


def _leaves(sample: Sample) -> tuple[list[Tensor], Sample]:
    """The tensors to differentiate with respect to, and a call with copies of them, which may be changed."""
    leaves: list[Tensor] = []

    def give(value: Any) -> Any:
        if not (isinstance(value, Tensor) and value.requires_grad):
            return value
        leaves.append(value.detach().clone().requires_grad_())
        return leaves[-1] * 1

    args, kwargs = tree_map(give, sample.args), tree_map(give, dict(sample.kwargs))
    return leaves, Sample(args, kwargs)


def _differentiable(function: Callable[..., Any], call: Sample) -> list[Tensor]:
    outputs = tree_leaves(function(*call.args, **call.kwargs))
    return [y for y in outputs if isinstance(y, Tensor) and y.requires_grad]


def _seed(tensor: Tensor) -> Tensor:
    return torch.linspace(-1, 2, tensor.numel(), dtype=torch.float64).view(tensor.shape).to(tensor)


def _twice(function: Callable[..., Any], sample: Sample) -> list[Tensor | None]:
    leaves, call = _leaves(sample)
    outputs = _differentiable(function, call)
    if not (outputs and leaves):
        raise _CannotAskError("nothing to differentiate")
    seeds = [_seed(y).requires_grad_() for y in outputs]
    first = torch.autograd.grad(outputs, leaves, seeds, create_graph=True, allow_unused=True)
    reached = [g for g in first if g is not None and g.requires_grad]
    if not reached:
        raise _CannotAskError("the gradient is a constant")
    wanted = [*leaves, *seeds]
    return list(torch.autograd.grad(reached, wanted, [_seed(g) for g in reached], allow_unused=True))


def _changed(function: Callable[..., Any], sample: Sample, index: int) -> list[Tensor | None] | None:
    """Gradients where an argument, or the result (-1), was changed before the backward pass; None where that is
    refused, or there is nothing to change.
    """
    leaves, call = _leaves(sample)
    outputs = _differentiable(function, call)
    target = (outputs[0] if outputs else None) if index < 0 else call.args[index]
    if not (outputs and leaves and isinstance(target, Tensor) and target.is_floating_point()):
        return None
    seeds = [_seed(y) for y in outputs]
    try:
        with torch.no_grad():
            target.add_(1)
        return list(torch.autograd.grad(outputs, leaves, seeds, allow_unused=True))
    except RuntimeError:  # "modified by an inplace operation"
        return None


def _assert_close(ours: Sequence[Tensor | None], stock: Sequence[Tensor | None], tolerance: float, what: str) -> None:
    for mine, theirs in zip(ours, stock, strict=True):
        if mine is None or theirs is None:  # no gradient is one of zeros
            if any(bool(g.any()) for g in (mine, theirs) if g is not None):
                raise AssertionError(f"{what}: one is missing")
        else:
            torch.testing.assert_close(
                mine, theirs, rtol=tolerance, atol=tolerance, msg=lambda message: f"{what}: {message}"
            )


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
