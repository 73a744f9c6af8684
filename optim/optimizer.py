"""What makes a ``torch.optim`` class fused: `FusedOptimizer`, the mixin of every optimizer here.

A step decides for each parameter group whether the kernels take it.  Those groups are updated by one launch for each
combination of dtypes; the others go to the stock class's own ``step``, which also raises the stock error.
"""

from __future__ import annotations

import functools
import inspect
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from dataclasses import dataclass, field
from itertools import pairwise
from math import inf
from typing import Any, ClassVar, NamedTuple

import torch
from torch import Tensor
from torch._compile import _disable_dynamo  # unlike torch.compiler.disable, doesn't import the compiler

from ..kernels import AVAILABLE, WHERE
from ..kernels.launch import memory_refusal
from ..kernels.multi_tensor import Table
from ..kernels.optimizer import ALGORITHMS, Counters, Operands, Penalty, Settings, Update
from .options import OPTIONS, check_options, clip_norm_squares, has_master, plain_options, prepare_options, wants

__all__ = ["TWINS", "FusedOptimizer", "GroupPath", "Recipe", "explain", "stock_class"]

#: The twin of each ``torch.optim`` class that has one.
TWINS: dict[type[torch.optim.Optimizer], type[FusedOptimizer]] = {}

Group = dict[str, Any]
_PLAIN_TYPES = {Tensor, torch.nn.Parameter}
_NO_GRADIENTS = "no gradients"
#: Averages that stock takes with ``lerp_``, which refuses gradients of another dtype.
_LERPED = {"exp_avg", "grad_avg"}
#: Warns, or raises, where a graph is captured without ``capturable``.  Older versions of PyTorch know CUDA's only.
_check_capture: Callable[[torch.optim.Optimizer], None] = getattr(
    torch.optim.Optimizer, "_accelerator_graph_capture_health_check", None
) or getattr(torch.optim.Optimizer, "_cuda_graph_capture_health_check")  # noqa: B009


class Recipe(NamedTuple):
    """A group's update: an algorithm of the kernels, and its numbers.  Any of them may be a one-element tensor."""

    algorithm: str
    a: Any = 0.0
    b: Any = 0.0
    c: Any = 0.0
    eps: Any = 0.0
    weight_decay: Any = 0.0
    decoupled_weight_decay: Any = 0.0


class GroupPath(NamedTuple):
    """The path that the next step of a parameter group takes."""

    group: int
    kernel: bool
    reason: str

    @property
    def path(self) -> str:
        return "kernel" if self.kernel else "stock"


def explain(optimizer: FusedOptimizer) -> list[GroupPath]:
    """Which path the next ``optimizer.step()`` takes for each parameter group, given today's gradients, and why."""
    refusals = [optimizer._refusal(group) for group in optimizer.param_groups]
    return [GroupPath(i, reason is None, reason or f"kernel {WHERE}") for i, reason in enumerate(refusals)]


class FusedOptimizer(torch.optim.Optimizer):
    """Mixin of every optimizer here, first among its bases: ``class Adam(FusedOptimizer, torch.optim.Adam)``.

    Keywords of ours, which a parameter group may also have of its own:

    Args:
        clip_norm: largest 2-norm of all gradients together; they are scaled down to it, by the factor that
            ``torch.nn.utils.clip_grad_norm_`` uses.  The gradients themselves stay as they are.
        clip_value: largest absolute value of a gradient's element, after the clipping by norm.
        l1, l2: strengths of the penalties l1 |w| + l2 w^2 / 2 (elastic net), applied after each update as its proximal
            step: w = sign(w) max(|w| - lr l1, 0) / (1 + lr l2).
        group_lasso: strength of the penalty on the norms of the rows w_i (all elements with one index of the first
            dimension) of parameters that have several dimensions, applied likewise, after ``l1`` and ``l2``:
            w_i = max(1 - lr group_lasso sqrt(n) / |w_i|, 0) w_i for rows of n elements.
        averaging: keep an average of the weights after each step: ``"mean"`` for that of all steps (Polyak), or the
            decay of an exponential one, in [0, 1).  `averaged_parameters` swaps it in.
        master_weights: keep a float32 copy of float16 and bfloat16 parameters, and float32 state, in the state.

    Raises ValueError where one of them is out of its range, or the step is to be ``differentiable``: wherever it is
    given, to the constructor, with a group, in a state that is loaded, and by the step where a group was changed.

    Sources: Parikh and Boyd, "Proximal Algorithms" (2014); Yuan and Lin, "Model selection and estimation in regression
    with grouped variables" (2006); Polyak and Juditsky, "Acceleration of Stochastic Approximation by Averaging"
    (1992); Micikevicius et al., "Mixed Precision Training" (ICLR 2018).
    """

    #: Keywords of ours, and the values that ask for nothing.
    options: ClassVar[Mapping[str, Any]] = OPTIONS
    _lists: ClassVar[int]

    def __init_subclass__(cls, **kwargs: object) -> None:
        super().__init_subclass__(**kwargs)
        if cls.__bases__[0] is FusedOptimizer:
            stock = cls.__bases__[1]
            TWINS[stock] = cls
            setattr(cls, "__init__", _constructor(stock, cls.options))  # noqa: B010

    # --- For the algorithms ------------------------------------------------------------------------------------------

    def _recipe(self, group: Group) -> Recipe:
        raise NotImplementedError

    def _around_stock(self, group: Group) -> AbstractContextManager[None]:
        """What turns the stock update of a group into this optimizer's, where they differ."""
        return nullcontext()

    # --- A step ------------------------------------------------------------------------------------------------------

    @_disable_dynamo
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Update the parameters; ``closure``, if given, first evaluates the loss anew, which is returned."""
        if "_swapped" in self.__dict__:
            raise RuntimeError("the averaged parameters are swapped in: leave averaged_parameters() before a step")
        for group in self.param_groups:
            self._check_group(group)
        if all("capturable" in group for group in self.param_groups):
            _check_capture(self)
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        refusals = [self._refusal(group) for group in self.param_groups]
        taken = [i for i, refusal in enumerate(refusals) if refusal is None]
        squares = None
        if any(refusal not in (None, _NO_GRADIENTS) for refusal in refusals):
            # The norm is that of all gradients: where stock operators have to compute it, it serves all groups.
            with torch.no_grad():
                squares = clip_norm_squares(self.param_groups)
        for group, refusal in zip(self.param_groups, refusals, strict=True):
            if refusal is not None:
                self._stock_step(group, squares)
        with torch.no_grad():
            self._kernel_step(taken, squares)
        return loss

    def _stock_step(self, group: Group, squares: Tensor | None) -> None:
        """The stock class's own step, for one group."""
        step: Any = stock_class(type(self)).step
        if getattr(step, "hooked", False):
            step = step.__wrapped__  # the hooks of this step have been called
        groups, fused = self.param_groups, group.get("fused")
        with ExitStack() as stack:
            if self._has_options(group):
                stack.enter_context(torch.no_grad())
                stack.enter_context(plain_options(group, self.state, squares))
            stack.enter_context(self._around_stock(group))
            try:
                self.param_groups = [group]
                if self._bypasses_fused(group):
                    self._make_state(group)  # with the checks that `fused` asks for
                    group["fused"] = False
                step(self)
            finally:
                self.param_groups = groups
                if "fused" in group:
                    group["fused"] = fused

    def _bypasses_fused(self, group: Group) -> bool:
        """Whether stock's fused CPU kernels would be called, which are wrong for some 16-bit types and strides."""
        return bool(group.get("fused")) and any(parameter.device.type == "cpu" for parameter in _with_gradients(group))

    @classmethod
    def _has_options(cls, group: Mapping[str, Any]) -> bool:
        return any(group.get(name, nothing) != nothing for name, nothing in cls.options.items())

    def _make_state(self, group: Group) -> None:
        """Let stock make the state that its step would make, with the checks that it then does."""
        lists: list[list[Any]] = [[] for _ in range(self._list_count())]
        with torch.device("cpu"):  # counters are the host's, whatever the default device is
            self._init_group(group, *lists)  # type: ignore[attr-defined]

    @classmethod
    def _list_count(cls) -> int:
        """How many lists stock's ``_init_group`` fills: parameters, gradients, and its state."""
        if "_lists" not in cls.__dict__:
            cls._lists = len(inspect.signature(stock_class(cls)._init_group).parameters) - 2  # type: ignore[attr-defined]
        return cls._lists

    def _kernel_step(self, indices: Sequence[int], squares: Tensor | None) -> None:
        """Update groups by kernels."""
        launches = [launch for index in indices for launch in self._launches(index)]
        if squares is None:
            squares = self._squares(launches)
        for launch in launches:
            clips = wants(launch.group, "clip_norm") is not None and squares is not None
            there = squares.to(launch.device, non_blocking=True) if clips else None  # type: ignore[union-attr]
            launch.update.run(launch.lr, launch.on_device, launch.averages, there)
            torch.autograd.graph.increment_version(launch.wrapped)

    def _squares(self, launches: Sequence[_Launch]) -> Tensor | None:
        """Sums that add up to that of the squares of all gradients to be clipped by their norm."""
        partial = []
        for launch in launches:
            if wants(launch.group, "clip_norm") is not None:
                sums = launch.update.squares()
                partial.append(_sum_over_mesh(sums, launch.wrapped[0]) if launch.wrapped else sums)
        if len(partial) < 2:
            return partial[0] if partial else None
        return torch.cat([sums.to(partial[0].device, non_blocking=True) for sums in partial])

    def _launches(self, index: int) -> Iterator[_Launch]:
        """What a group's update launches: a launch for each combination of device and dtypes."""
        group = self.param_groups[index]
        parameters = _with_gradients(group)
        recipe = self._recipe(group)
        states = ALGORITHMS[recipe.algorithm].states
        fresh = [not self.state.get(parameter) for parameter in parameters]
        if any(fresh):
            self._make_state(group)
        if states == ("momentum_buffer",):  # stock leaves it to the update to make it
            for i, parameter in enumerate(parameters):
                if self.state[parameter].get("momentum_buffer") is None:
                    fresh[i] = True
                    self.state[parameter]["momentum_buffer"] = torch.zeros_like(
                        parameter,
                        dtype=torch.float32 if has_master(group, parameter) else _gradient_dtype(recipe, parameter),
                        memory_format=torch.preserve_format,
                    )
        if self._has_options(group):
            prepare_options(group, parameters, self.state)
        combinations: dict[Any, _Batch] = {}
        for parameter, is_fresh in zip(parameters, fresh, strict=True):
            own = self.state.get(parameter, {})  # SGD may need none, and shall make none
            gradient = parameter.grad
            state = own[states[0]] if states else parameter
            key = (parameter.device, parameter.dtype, gradient.dtype, state.dtype, _layout(parameter))
            combinations.setdefault(key, _Batch()).add(parameter, gradient, own, is_fresh)
        for key, batch in combinations.items():
            tables: dict[Any, Table] = self.__dict__.setdefault("_tables", {})
            place = (index, *key)
            if place not in tables:
                tables[place] = Table(batch.parameters[0].device)
            yield self._launch(group, recipe, batch, tables[place])

    def _launch(self, group: Group, recipe: Recipe, batch: _Batch, table: Table) -> _Launch:
        parameters, own = batch.parameters, batch.own
        device = parameters[0].device
        scale, found_inf = (getattr(self, name, None) for name in ("grad_scale", "found_inf"))
        found_inf = None if found_inf is None else found_inf.to(device, non_blocking=True)
        averaged = wants(group, "averaging") is not None
        distributed = _is_distributed(parameters[0])

        def memory(tensors: list[Any]) -> list[Tensor]:
            return [_local(tensor) for tensor in tensors] if distributed else tensors

        operands = Operands(
            memory(parameters),
            memory(batch.gradients),
            [memory([state[key] for state in own]) for key in ALGORITHMS[recipe.algorithm].states],
            memory([state["master"] for state in own]) if has_master(group, parameters[0]) else None,
            memory([state["average"] for state in own]) if averaged else None,
            unscales=scale is not None,
        )
        numbers, on_device = _split_numbers(
            lr=group["lr"],
            sign=-1.0 if group["maximize"] else 1.0,
            clip_norm=wants(group, "clip_norm"),
            clip_value=wants(group, "clip_value"),
            l1=wants(group, "l1"),
            l2=wants(group, "l2"),
            group_lasso=wants(group, "group_lasso"),
            average_decay=-1.0 if wants(group, "averaging") == "mean" else wants(group, "averaging"),
            scale=scale,
            found_inf=found_inf,
            **{name: value for name, value in recipe._asdict().items() if name != "algorithm"},
        )
        lr = numbers.pop("lr", 1.0)
        if "step" in own[0]:
            counters = _advance(own, device, recipe, found_inf)
        else:
            counters = Counters([1.0 if is_fresh else 2.0 for is_fresh in batch.fresh])
        penalty = Penalty.NONE
        if wants(group, "l1") or wants(group, "l2"):
            penalty = Penalty.ELEMENTS
        if wants(group, "group_lasso"):
            penalty = Penalty.GROUPS
        update = Update(recipe.algorithm, operands, Settings(**numbers), counters, penalty, table)
        averages = None
        if averaged:
            counts = [state["averages"] for state in own]
            torch._foreach_add_(counts, _one(found_inf, counts[0]))
            averages = torch.stack(counts).double()
        written = [*parameters, *_tensors(own), *(batch.gradients if operands.unscales else ())] if distributed else []
        wrapped = [tensor for tensor in written if _is_distributed(tensor)]
        return _Launch(group, device, update, lr, on_device, averages, wrapped)

    # --- Kernel or stock ---------------------------------------------------------------------------------------------

    def _refusal(self, group: Group) -> str | None:
        """Why the kernels don't take a group, or None."""
        if not AVAILABLE:
            return "Triton is not installed"
        if group.get("differentiable", False) is not False:  # to stock, anything else is an error, or True
            return "differentiable"
        parameters = _with_gradients(group)
        if not parameters:
            return _NO_GRADIENTS
        recipe = self._recipe(group)
        own = [self.state.get(parameter, {}) for parameter in parameters]
        traits = (recipe.algorithm, group.get("capturable"), [tuple(state) for state in own], *_traits(parameters, own))
        accepted: dict[int, Any] = self.__dict__.setdefault("_accepted", {})
        if accepted.get(id(group)) != traits:
            for parameter in parameters:
                refusal = _tensor_refusal(parameter) or _tensor_refusal(parameter.grad)
                if refusal := refusal or self._state_refusal(group, recipe, parameter):
                    return refusal
            if _overlap(parameters):
                return "parameters share memory"
            accepted[id(group)] = traits
        if group.get("capturable") and parameters[0].device.type == "cpu":
            return "capturable is for GPUs"
        numbers = {"lr": group["lr"], **recipe._asdict()}
        del numbers["algorithm"]
        refusals = (_number_refusal(value, parameters[0].device) for value in numbers.values())
        return next(filter(None, refusals), None)

    def _state_refusal(self, group: Group, recipe: Recipe, parameter: Tensor) -> str | None:
        """Why the kernels don't take a parameter's gradient and state beside it, or None."""
        if any(stride == 0 and size > 1 for size, stride in zip(parameter.shape, parameter.stride(), strict=True)):
            return "a parameter's memory overlaps itself"
        if wants(group, "group_lasso") and not _has_whole_rows(parameter):
            return "a group of the group lasso is spread over processes"
        own = self.state.get(parameter, {})
        states = ALGORITHMS[recipe.algorithm].states
        counted = () if issubclass(type(self), torch.optim.SGD) else ("step",)
        if own and not all(key in own for key in (*states, *counted)) and states != ("momentum_buffer",):
            return "state is missing"
        step = own.get("step")
        if step is not None and not isinstance(step, Tensor):
            return "the step is not a tensor"
        if step is not None and step.device.type != "cpu" and step.device != parameter.device:
            return "the step is on another device"
        if group.get("capturable") and step is not None and step.device != parameter.device:
            return "the step is not on the parameter's device"
        tensors = [own[key] for key in states if own.get(key) is not None]
        if len({tensor.dtype for tensor in tensors}) > 1:
            return "states differ in dtype"
        state_dtype = tensors[0].dtype if tensors else parameter.dtype
        lerped = _LERPED & set(states) and not has_master(group, parameter)
        if lerped and _gradient_dtype(recipe, parameter) != state_dtype:
            return "the gradient differs in dtype from its average"
        for tensor in (parameter.grad, *tensors, *(own[key] for key in ("master", "average") if key in own)):
            if tensor.shape != parameter.shape or tensor.device != parameter.device:
                return "gradient or state is not like its parameter"
            if (refusal := _tensor_refusal(tensor)) or _layout(tensor) != _layout(parameter):
                return refusal or "gradient or state is distributed otherwise than its parameter"
        return None

    @property
    def _step_supports_amp_scaling(self) -> bool:
        """Whether a GradScaler leaves unscaling, and skipping the step, to us: as with stock where ``fused=True``.

        The float16 gradients of master weights are taken in any case: a GradScaler refuses to unscale them.
        """
        fused: bool = self.__dict__.get("_step_supports_amp_scaling", False)
        groups = [group for group in self.param_groups if _with_gradients(group)]
        if not fused:
            halves = [(group, p) for group in groups for p in _with_gradients(group) if p.grad.dtype is torch.float16]
            if not halves or not all(has_master(group, p) for group, p in halves):
                return False
        for group in groups:
            if self._refusal(group) is not None:
                if not fused or self._bypasses_fused(group) or self._has_options(group):
                    return False
            elif group.get("dampening") and any(
                self.state.get(p, {}).get("momentum_buffer") is None for p in _with_gradients(group)
            ):
                return False  # whether the next step is the first, which isn't dampened, only the device would know
        return True

    @_step_supports_amp_scaling.setter
    def _step_supports_amp_scaling(self, value: bool) -> None:
        self.__dict__["_step_supports_amp_scaling"] = value

    # --- State -------------------------------------------------------------------------------------------------------

    @classmethod
    def _check_group(cls, group: Mapping[str, Any]) -> None:
        """Raise ValueError where a group's options of ours have no meaning."""
        check_options(group)
        if group.get("differentiable") and cls._has_options(group):
            raise ValueError("a differentiable step has none of: " + ", ".join(cls.options))

    def _set_options(self, given: Mapping[str, Any]) -> None:
        """Make options of ours defaults, of groups too that have none of their own.

        Those that ask for nothing leave no trace in ``defaults``.
        """
        for name, value in given.items():
            known = name in self.defaults
            followers = [
                group
                for group in self.param_groups
                if name not in group or (known and group[name] == self.defaults[name])
            ]
            for options in (self.defaults, *followers):
                if value == self.options[name]:
                    options.pop(name, None)
                else:
                    options[name] = value

    def _with_options(self, group: Mapping[str, Any]) -> dict[str, Any]:
        """A group with the defaults of options that it hasn't."""
        return {**{name: self.defaults[name] for name in self.options if name in self.defaults}, **group}

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """As stock's, which see.  Raises ValueError where an option is out of its range."""
        if isinstance(param_group, dict):
            self._check_group({**self.defaults, **param_group})
        super().add_param_group(param_group)

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        for group in self.param_groups:
            group.update(self._with_options(group))

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load a state, ours or stock's.  Unlike stock's, float32 state beside master weights stays float32.

        Raises ValueError, before anything is changed, where an option of a group is out of its range.
        """
        final: dict[str, Any] = {}

        def keep(_: Any, loaded: dict[str, Any]) -> None:
            for group in loaded["param_groups"]:
                self._check_group(self._with_options(group))
            final.update(loaded)

        def restore(_: Any) -> None:
            saved = (index for group in final["param_groups"] for index in group["params"])
            ours = (parameter for group in self.param_groups for parameter in group["params"])
            for index, parameter in zip(saved, ours, strict=True):
                self._restore_exactly(parameter, final["state"].get(index, {}))

        handles = [
            self.register_load_state_dict_pre_hook(keep),
            self.register_load_state_dict_post_hook(restore, prepend=True),
        ]
        try:
            super().load_state_dict(state_dict)
        finally:
            for handle in handles:
                handle.remove()

    def _restore_exactly(self, parameter: Tensor, saved: Mapping[str, Any]) -> None:
        """Undo the rounding of float32 state to its 16-bit parameter's type, where it belongs to ours."""
        exact = {"average", "averages", "master"}
        if "master" in saved:
            exact = set(saved) - {"step"}
        for key in exact & set(saved):
            if isinstance(saved[key], Tensor):
                self.state[parameter][key] = saved[key].to(parameter.device)

    @contextmanager
    def averaged_parameters(self) -> Iterator[None]:
        """Swap the average of the weights into the parameters, for the duration of a ``with`` block.

        Parameters that have no average yet stay as they are.  Raises RuntimeError where the averages are swapped in
        already, or where no group asked for ``averaging``.
        """
        if "_swapped" in self.__dict__:
            raise RuntimeError("the averaged parameters are swapped in already")
        if not any(wants(group, "averaging") is not None for group in self.param_groups):
            raise RuntimeError("no average is kept: construct the optimizer with averaging")
        saved = [
            (parameter, parameter.detach().clone())
            for group in self.param_groups
            for parameter in group["params"]
            if "average" in self.state.get(parameter, {})
        ]
        self.__dict__["_swapped"] = True
        try:
            with torch.no_grad():
                for parameter, _ in saved:
                    parameter.copy_(self.state[parameter]["average"])
            yield
        finally:
            with torch.no_grad():
                for parameter, weights in saved:
                    parameter.copy_(weights)
            del self.__dict__["_swapped"]


@dataclass
class _Batch:
    """Parameters that one launch updates, with their gradients and state; ``fresh`` ones are in their first step."""

    parameters: list[Any] = field(default_factory=list)
    gradients: list[Any] = field(default_factory=list)
    own: list[dict[str, Any]] = field(default_factory=list)
    fresh: list[bool] = field(default_factory=list)

    def add(self, parameter: Any, gradient: Any, own: dict[str, Any], fresh: bool) -> None:
        self.parameters.append(parameter)
        self.gradients.append(gradient)
        self.own.append(own)
        self.fresh.append(fresh)


@dataclass
class _Launch:
    """An update that is ready to be launched."""

    group: Group
    device: torch.device
    update: Update
    lr: float
    on_device: dict[str, Tensor]
    averages: Tensor | None
    wrapped: list[Tensor] = field(default_factory=list)  # distributed tensors, whose local ones are updated


def stock_class(twin: type[FusedOptimizer]) -> type[torch.optim.Optimizer]:
    """The ``torch.optim`` class that a twin, or a subclass of one, replaces."""
    return next(stock for stock, ours in TWINS.items() if issubclass(twin, ours) and ours in twin.__mro__)


def _constructor(stock: type[torch.optim.Optimizer], options: Mapping[str, Any]) -> Callable[..., None]:
    """The stock constructor, with our options as further keywords."""

    @functools.wraps(stock.__init__)
    def __init__(self: FusedOptimizer, *arguments: Any, **keywords: Any) -> None:  # noqa: N807
        given = {name: keywords.pop(name) for name in options if name in keywords}
        check_options(given)
        stock.__init__(self, *arguments, **keywords)
        self._set_options(given)
        for group in self.param_groups:
            self._check_group(group)

    signature = inspect.signature(stock.__init__)
    ours = [inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, default=value) for name, value in options.items()]
    __init__.__signature__ = signature.replace(parameters=[*signature.parameters.values(), *ours])  # type: ignore[attr-defined]
    return __init__


def _split_numbers(**values: Any) -> tuple[dict[str, float], dict[str, Tensor]]:
    """Settings by name: numbers that the host knows, and those that only the device knows.  None is left out."""
    numbers, on_device = {}, {}
    for name, value in values.items():
        if isinstance(value, Tensor) and (value.device.type != "cpu" or name in ("scale", "found_inf")):
            on_device[name] = value
        elif value is not None:
            numbers[name] = float(value)
    return numbers, on_device


def _one(found_inf: Tensor | None, like: Tensor) -> Any:
    """What a counter advances by: nothing after an overflow."""
    return 1.0 if found_inf is None else (found_inf.reshape(()) == 0).to(like.dtype)


def _advance(own: Sequence[dict[str, Any]], device: torch.device, recipe: Recipe, found_inf: Tensor | None) -> Counters:
    """Advance the counters in the state, and give them to the kernel: where they are, without a synchronisation."""
    keys = [key for key in ("step", "mu_product") if key in own[0]]
    on_host = found_inf is None and all(state[key].device.type == "cpu" for state in own for key in keys)
    if not on_host:
        for state in own:
            for key in keys:
                state[key] = state[key].to(device, non_blocking=True)
    steps = [state["step"] for state in own]
    products = [state[key] for state in own for key in keys[1:]]
    if on_host:
        one = torch.tensor(1.0, dtype=steps[0].dtype, device="cpu")
        torch._foreach_add_(steps, one, alpha=1.0)  # as stock does: 1 is wrapped once
        counts = [step.item() for step in steps]
        if products:
            beta1, decay = float(recipe.a), float(recipe.c)
            mus = {count: beta1 * (1.0 - 0.5 * 0.96 ** (count * decay)) for count in set(counts)}
            torch._foreach_mul_(products, [mus[count] for count in counts])
        return Counters(counts, [product.item() for product in products] or None)
    torch._foreach_add_(steps, _one(found_inf, steps[0]))
    step = torch.stack(steps).double()
    if not products:
        return Counters(step)
    mu = recipe.a * (1 - 0.5 * torch.pow(0.96, step * recipe.c))
    if found_inf is not None:
        mu = torch.where(found_inf == 0, mu, 1.0)
    torch._foreach_mul_(products, list(mu.to(products[0].dtype).unbind()))
    return Counters(step, torch.stack(products).double())


def _is_distributed(tensor: Tensor) -> bool:
    """Whether ``tensor`` is a DTensor.  Nothing is one before its module has been imported."""
    module = sys.modules.get("torch.distributed.tensor")
    return type(tensor) not in _PLAIN_TYPES and module is not None and isinstance(tensor, module.DTensor)


def _local(tensor: Any) -> Tensor:
    """The memory that this process has of a tensor: without gradients to record, ``to_local`` makes no copy."""
    local: Tensor = tensor.to_local() if _is_distributed(tensor) else tensor
    return local


def _gradient_dtype(recipe: Recipe, parameter: Any) -> torch.dtype:
    """Of the gradient as stock's update sees it: weight decay adds the parameter."""
    dtype: torch.dtype = parameter.grad.dtype
    return torch.promote_types(dtype, parameter.dtype) if recipe.weight_decay != 0 else dtype


def _has_whole_rows(tensor: Any) -> bool:
    """Whether a row, all elements with one index of the first dimension, is in one process."""
    placements = tensor.placements if _is_distributed(tensor) else ()
    return all(placement.is_shard(0) or placement.is_replicate() for placement in placements)


def _layout(tensor: Any) -> Any:
    return (tensor.device_mesh, tensor.placements) if _is_distributed(tensor) else None


def _with_gradients(group: Group) -> list[Any]:
    return [parameter for parameter in group["params"] if parameter.grad is not None]


def _traits(parameters: Sequence[Any], own: Sequence[Mapping[str, Any]]) -> Iterator[Any]:
    """All that the choice of path depends on of parameters, their gradients and state: the same traits, the same path.

    Tensors that aren't plain are unlike any other.  This runs in every step over every tensor, hence list by list.
    """
    values = [value for state in own for value in state.values()]
    tensors = [*parameters, *(parameter.grad for parameter in parameters)]
    tensors += [value for value in values if isinstance(value, Tensor)]
    plain = _PLAIN_TYPES.issuperset(map(type, tensors))
    if not plain or any(tensor.layout is not torch.strided for tensor in tensors):
        yield object()
        return
    yield [type(value) for value in values]
    yield [tensor.dtype for tensor in tensors]
    yield [tensor.device for tensor in tensors]
    yield [tensor.shape for tensor in tensors]
    yield [tensor.stride() for tensor in tensors]
    yield [tensor.is_neg() or tensor.is_inference() for tensor in tensors]
    yield [parameter.data_ptr() for parameter in parameters]


def _overlap(parameters: Sequence[Any]) -> bool:
    """Whether the memory of two parameters, from the first element to the last, has bytes in common."""
    extents = []
    for tensor in map(_local, parameters):
        if tensor.numel():
            last = sum((size - 1) * stride for size, stride in zip(tensor.shape, tensor.stride(), strict=True))
            extents.append((str(tensor.device), tensor.data_ptr(), tensor.data_ptr() + (last + 1) * tensor.itemsize))
    extents.sort()
    return any(here == there and end > start for (here, _, end), (there, start, _) in pairwise(extents))


def _tensors(own: Sequence[dict[str, Any]]) -> list[Tensor]:
    return [value for state in own for value in state.values() if isinstance(value, Tensor)]


def _sum_over_mesh(sums: Tensor, like: Any) -> Tensor:
    """Partial sums of one process's shards, added up over those of all processes."""
    module = sys.modules["torch.distributed.tensor"]
    placements = [module.Replicate() if placement.is_replicate() else module.Partial() for placement in like.placements]
    total = module.DTensor.from_local(sums.sum().reshape(1), like.device_mesh, placements, run_check=False)
    everywhere: Tensor = total.full_tensor()
    return everywhere


def _number_refusal(value: Any, device: torch.device) -> str | None:
    """Why the kernels don't take a hyperparameter, or None: of what isn't plainly a number stock is asked."""
    if type(value) in (float, int):
        return None if -inf < value < inf else "a hyperparameter is not finite"
    if type(value) is not Tensor:
        return f"a hyperparameter is a {type(value).__name__}"
    if value.dim() or value.dtype not in (torch.float32, torch.float64) or value.requires_grad:
        return "a hyperparameter is not a plain tensor of one number"
    return None if value.device.type == "cpu" or value.device == device else "a hyperparameter is on another device"


def _tensor_refusal(tensor: Any) -> str | None:
    """Why no kernel works on the memory of this tensor, or None."""
    if _is_distributed(tensor):
        if any(placement.is_partial() for placement in tensor.placements):
            return "a distributed tensor is a partial sum"
        with torch.no_grad():
            tensor = tensor.to_local()
    if type(tensor) not in _PLAIN_TYPES:
        return f"{type(tensor).__name__} is not a plain tensor"
    if refusal := memory_refusal(tensor):
        return refusal
    if tensor.is_neg() or tensor.is_inference():
        return "a negated view" if tensor.is_neg() else "a tensor made in inference mode"
    return None
