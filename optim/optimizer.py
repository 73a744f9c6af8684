"""What makes a ``torch.optim`` class fused: `FusedOptimizer`, the mixin of every optimizer here.

A step decides for each parameter group whether the kernels take it.  Those groups are updated by one launch for each
combination of dtypes; the others go to the stock class's own ``step``, which also raises the stock error.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from typing import Any, ClassVar, NamedTuple

import torch
from torch import Tensor
from torch._compile import _disable_dynamo  # unlike torch.compiler.disable, doesn't import the compiler

from ..kernels import AVAILABLE, WHERE
from ..kernels.base.multi_tensor import Table
from .known import KnownGroup, KnownState
from .launches import Launch, batches, clipped_squares
from .options import OPTIONS, check_options, clip_norm_squares, has_master, plain_options, prepare_options, wants
from .recipe import Group, Recipe, gradient_dtype, with_gradients
from .refusals import NO_GRADIENTS, numbers_refusal, tensors_refusal, traits
from .state import restore_exactly
from .twin import register, stock_class

__all__ = ["FusedOptimizer", "GroupPath", "explain"]

#: Warns, or raises, where a graph is captured without ``capturable``.  Older versions of PyTorch know CUDA's only.
_check_capture: Callable[[torch.optim.Optimizer], None] = getattr(
    torch.optim.Optimizer, "_accelerator_graph_capture_health_check", None
) or getattr(torch.optim.Optimizer, "_cuda_graph_capture_health_check")  # noqa: B009


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


class Remembered(NamedTuple):
    """A step that can be repeated: its groups, its launches by the index of their group."""

    groups: list[KnownGroup]
    state: KnownState
    launches: list[tuple[int, Launch]]
    unscales: bool


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
            register(cls)

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
        if not self._repeat_step():
            self._plan_step()
        return loss

    def _repeat_step(self) -> bool:
        """Launch what the step before launched, where only gradients and numbers have changed since.  Tells whether."""
        remembered: Remembered | None = self.__dict__.get("_remembered")
        if remembered is None or len(remembered.groups) != len(self.param_groups):
            return False
        recipes = list(map(self._recipe, self.param_groups))
        follows = (
            remembered.unscales == self._unscales()
            and all(map(KnownGroup.is_same, remembered.groups, self.param_groups, recipes))
            and remembered.state.is_same(self.state)
            and all(launch.follows() for _, launch in remembered.launches)
        )
        if follows:
            with torch.no_grad():
                self._launch(remembered.launches, None)
        return follows

    def _plan_step(self) -> None:
        self.__dict__.pop("_remembered", None)
        refusals = [self._refusal(group) for group in self.param_groups]
        taken = [i for i, refusal in enumerate(refusals) if refusal is None]
        squares = None
        if any(refusal not in (None, NO_GRADIENTS) for refusal in refusals):
            # The norm is that of all gradients: where stock operators have to compute it, it serves all groups.
            with torch.no_grad():
                squares = clip_norm_squares(self.param_groups)
        for group, refusal in zip(self.param_groups, refusals, strict=True):
            if refusal is not None:
                self._stock_step(group, squares)
        with torch.no_grad():
            launches = [(index, launch) for index in taken for launch in self._launches(index)]
            self._launch(launches, squares)
        if set(refusals) <= {None, NO_GRADIENTS} and all(launch.is_repeatable for _, launch in launches):
            groups = [KnownGroup(group, self._recipe(group)) for group in self.param_groups]
            self.__dict__["_remembered"] = Remembered(groups, KnownState(self.state), launches, self._unscales())

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
        return bool(group.get("fused")) and any(parameter.device.type == "cpu" for parameter in with_gradients(group))

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

    def _launch(self, launches: Sequence[tuple[int, Launch]], squares: Tensor | None) -> None:
        """Update by kernels what each launch is for, of the group with that index."""
        scale, found_inf = (getattr(self, name, None) for name in ("grad_scale", "found_inf"))
        for index, launch in launches:
            group = self.param_groups[index]
            launch.prepare(group, self._recipe(group), scale, found_inf)
        if squares is None:
            squares = clipped_squares([launch for _, launch in launches])
        for _, launch in launches:
            launch.run(squares)

    def _unscales(self) -> bool:
        """Whether a GradScaler leaves unscaling to the step."""
        return getattr(self, "grad_scale", None) is not None

    def _launches(self, index: int) -> Iterator[Launch]:
        """What a group's update launches."""
        group = self.param_groups[index]
        recipe = self._recipe(group)
        parameters = with_gradients(group)
        fresh = self._prepare_state(group, recipe, parameters)
        tables: dict[Any, Table] = self.__dict__.setdefault("_tables", {})
        for key, batch in batches(recipe, parameters, self.state, fresh).items():
            place = (index, *key)
            if place not in tables:
                tables[place] = Table(batch.parameters[0].device)
            yield Launch(group, recipe, batch, tables[place], unscales=self._unscales())

    def _prepare_state(self, group: Group, recipe: Recipe, parameters: Sequence[Any]) -> list[bool]:
        """Make the state that isn't there yet; which parameters are in their first step."""
        fresh = [not self.state.get(parameter) for parameter in parameters]
        if any(fresh):
            self._make_state(group)
        if recipe.row.made_lazily:
            (key,) = recipe.row.states
            for i, parameter in enumerate(parameters):
                if self.state[parameter].get(key) is None:
                    fresh[i] = True
                    self.state[parameter][key] = torch.zeros_like(
                        parameter,
                        dtype=torch.float32 if has_master(group, parameter) else gradient_dtype(recipe, parameter),
                        memory_format=torch.preserve_format,
                    )
        if self._has_options(group):
            prepare_options(group, parameters, self.state)
        return fresh

    # --- Kernel or stock ---------------------------------------------------------------------------------------------

    def _refusal(self, group: Group) -> str | None:
        """Why the kernels don't take a group, or None."""
        if not AVAILABLE:
            return "Triton is not installed"
        if group.get("differentiable", False) is not False:  # to stock, anything else is an error, or True
            return "differentiable"
        parameters = with_gradients(group)
        if not parameters:
            return NO_GRADIENTS
        recipe = self._recipe(group)
        own = [self.state.get(parameter, {}) for parameter in parameters]
        today = traits(group, recipe, parameters, own)
        accepted: dict[int, Any] = self.__dict__.setdefault("_accepted", {})
        if accepted.get(id(group)) != today:
            if refusal := tensors_refusal(group, recipe, parameters, own):
                return refusal
            accepted[id(group)] = today
        return numbers_refusal(group, recipe, parameters[0].device)

    @property
    def _step_supports_amp_scaling(self) -> bool:
        """Whether a GradScaler leaves unscaling, and skipping the step, to us: as with stock where ``fused=True``.

        The float16 gradients of master weights are taken in any case: a GradScaler refuses to unscale them.
        """
        fused: bool = self.__dict__.get("_step_supports_amp_scaling", False)
        groups = [group for group in self.param_groups if with_gradients(group)]
        if not fused:
            halves = [(group, p) for group in groups for p in with_gradients(group) if p.grad.dtype is torch.float16]
            if not halves or not all(has_master(group, p) for group, p in halves):
                return False
        for group in groups:
            if self._refusal(group) is not None:
                if not fused or self._bypasses_fused(group) or self._has_options(group):
                    return False
            elif group.get("dampening") and any(
                self.state.get(p, {}).get("momentum_buffer") is None for p in with_gradients(group)
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
                restore_exactly(self.state, parameter, final["state"].get(index, {}))

        handles = [
            self.register_load_state_dict_pre_hook(keep),
            self.register_load_state_dict_post_hook(restore, prepend=True),
        ]
        try:
            super().load_state_dict(state_dict)
        finally:
            for handle in handles:
                handle.remove()

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
