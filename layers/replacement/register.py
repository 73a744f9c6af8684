"""The door for layers that aren't ``torch.nn``'s: other libraries' classes, and users', get twins by being registered.

A twin of such a class differs from it in ``forward`` alone, as those of ``torch.nn`` do.  It is made when the first
layer of the class is replaced: a class that is registered by its qualified name needn't be importable before.
"""

from __future__ import annotations

import ast
import copyreg
import dis
import hashlib
import inspect
import textwrap
from collections.abc import Callable, Iterable, Sequence
from fnmatch import fnmatchcase
from types import FunctionType
from typing import Any, NamedTuple, cast

from torch import Tensor, nn

from ...autograd.activation import apply_kernel, resolve_activation, taken
from ...autograd.block_end import by_kernels
from ..fusion.activations import ACTIVATIONS
from ..fusion.block_ends import drops, join_drop_paths, join_scales
from ..fusion.members import know
from ..fusion.norms import Norm, join
from ..twin import ALL_TWINS, OTHER_TWINS, TWINS, Twin, stock_class

__all__ = [
    "fingerprint",
    "is_registered",
    "refusal_of",
    "register_activation",
    "register_drop_path",
    "register_norm",
    "register_scale",
    "register_twin",
    "twin_of",
]


class Registration(NamedTuple):
    """How layers of a class that isn't ``torch.nn``'s are computed."""

    forward: Callable[..., Any]
    refuses: Callable[[Any], str | None] | None
    fingerprints: tuple[str, ...]  # of the versions of the class that it was written for; any, where there are none
    joins: Callable[[type[nn.Module]], None] = lambda _: None  # lets layers of the class be parts of chains


_registered: dict[type[nn.Module] | str, Registration] = {}


def register_twin(
    their_class: type[nn.Module] | str,
    forward: Callable[..., Any],
    *,
    refuses: Callable[[Any], str | None] | None = None,
    fingerprints: str | Iterable[str] = (),
) -> None:
    """Let `replace_layers` swap layers of a class for a twin, whose ``forward`` is this one.

    >>> def forward(layer, x):
    ...     return fusednn.autograd.batch_norm_act(x, layer.mean, layer.variance, activation="relu")
    >>> fusednn.register_twin(Norm, forward)                         # a class
    >>> fusednn.register_twin("their.package.norms.Norm", forward)   # or its qualified name: nothing is imported

    The twin is a subclass of the class, with its attributes, constructor, repr and ``state_dict``.  It is swapped for
    layers of exactly this class, and put back by `restore_layers`; a pickle names the class, not the twin.  ``forward``
    is called as the class's own, and may call that: ``Norm.forward(layer, x)``.  It serves whatever that served.

    Args:
        their_class: the class, or its name: the module that defines it, a dot, and what it is called there.  A name may
            have shell wildcards, where a library has the same class many times.
        forward: a function of the layer and its inputs.
        refuses: gives the reason why a layer, with the options that it has, must stay as it is, or None.
        fingerprints: of the versions of the class that ``forward`` computes the same as (`fingerprint`).  Where a class
            has another, its layers are left, and the report says so.  By default no version is refused.

    Raises ValueError for classes of ``torch.nn`` that have a twin, TypeError for what is neither a class of layers nor
    such a name.  The last registration of a class counts, until its twin is made.
    """
    _register(their_class, Registration(forward, refuses, _all(fingerprints)))


def register_norm(their_class: str, forward: Callable[..., Any], norm: Norm, *, fingerprints: str) -> None:
    """As `register_twin`, for batch norms of images that chains may be made of."""
    _register(their_class, Registration(forward, None, _all(fingerprints), lambda cls: join(cls, norm)))


def register_scale(their_class: str, scale_of: Callable[[Any], Tensor], *, fingerprints: str | Iterable[str]) -> None:
    """As `register_twin`, for layers that multiply by ``scale_of(layer)``, as of `fusednn.autograd.block_end`."""

    def forward(layer: Any, x: Tensor) -> Tensor:
        y: Tensor | None = None
        if isinstance(x, Tensor) and not getattr(layer, "inplace", False):
            y = by_kernels(x, None, scale_of(layer), 0.0, False, "row")
        return stock_class(type(layer)).forward(layer, x) if y is None else y

    _register(their_class, Registration(forward, None, _all(fingerprints), lambda cls: join_scales(cls, scale_of)))


def register_drop_path(
    their_class: str,
    options_of: Callable[[Any], tuple[Any, str]],
    *,
    refuses: Callable[[Any], str | None] | None = None,
    fingerprints: str | Iterable[str],
) -> None:
    """As `register_twin`, for layers that drop samples; ``options_of(layer)`` are their probability and mode."""

    def forward(layer: Any, x: Tensor) -> Tensor:
        p, mode = options_of(layer)
        y: Tensor | None = None
        if isinstance(x, Tensor) and drops(p, mode, layer.training):
            y = by_kernels(x, None, None, p, True, mode)
        return stock_class(type(layer)).forward(layer, x) if y is None else y

    registration = Registration(forward, refuses, _all(fingerprints), lambda cls: join_drop_paths(cls, options_of))
    _register(their_class, registration)


def register_activation(
    their_class: type[nn.Module] | str,
    activation: str,
    parameters: Sequence[str] = (),
    *,
    inplace: str | None = None,
    refuses: Callable[[Any], str | None] | None = None,
    fingerprints: str | Iterable[str] = (),
) -> None:
    """Let `replace_layers` swap layers of a class that computes one of `fusednn.autograd`'s activations.

    >>> fusednn.register_activation(LeakyUnit, "leaky_relu", ["slope"])    # layer.slope is its negative slope
    >>> fusednn.register_activation("their.package.Gelu", "gelu_tanh")

    They are then fused with the layers before them, too, as those of ``torch.nn`` are (``fuse=True``).  Where no kernel
    takes the input, the class's own ``forward`` runs.

    Args:
        their_class, refuses, fingerprints: as of `register_twin`.
        activation: its name, as of `fusednn.autograd.batch_norm_act`.
        parameters: the names of the attributes that hold its parameters, in PyTorch's order; its defaults, where they
            are missing.
        inplace: the name of the attribute that says whether the layer writes over its input, if it may.

    Raises ValueError for other activations, more parameters than the activation has, and as `register_twin`.
    """
    resolve_activation(activation, (0.0,) * len(parameters))

    def read(layer: Any) -> tuple[str, tuple[float, ...]]:
        return activation, tuple(getattr(layer, name) for name in parameters)

    def forward(layer: Any, *args: Any, **kwargs: Any) -> Tensor:
        in_place = False if inplace is None else getattr(layer, inplace)
        if len(args) == 1 and isinstance(args[0], Tensor) and not kwargs and type(in_place) is bool:
            resolved = taken(activation, args[0], *read(layer)[1], inplace=in_place)
            if resolved is not None:
                return apply_kernel(args[0], resolved, in_place)
        result: Tensor = stock_class(type(layer)).forward(layer, *args, **kwargs)
        return result

    def joins(cls: type[nn.Module]) -> None:
        ACTIVATIONS[cls] = read
        know((cls,))

    _register(their_class, Registration(forward, refuses, _all(fingerprints), joins))


def _all(fingerprints: str | Iterable[str]) -> tuple[str, ...]:
    return (fingerprints,) if isinstance(fingerprints, str) else tuple(fingerprints)


def _register(their_class: type[nn.Module] | str, registration: Registration) -> None:
    names = isinstance(their_class, str) and "." in their_class
    if not names and not (isinstance(their_class, type) and issubclass(their_class, nn.Module)):
        raise TypeError(f"expected a class of layers, or its qualified name, but got {their_class!r}")
    if their_class in TWINS:
        raise ValueError(f"{their_class} has a twin already, which can't be registered anew")
    _registered[their_class] = registration


# --- Twins that are registered ----------------------------------------------------------------------------------------


class RegisteredTwin(Twin):
    """What the twins of registered classes are besides: pickled, and copied, as their class, of which they are made."""

    def __init_subclass__(cls, **kwargs: object) -> None:
        super().__init_subclass__(**kwargs)
        if cls.__bases__[0] is RegisteredTwin:
            OTHER_TWINS[cls.__bases__[1]] = cls

    def __reduce_ex__(self, protocol: Any) -> Any:
        reduced = cast("tuple[Any, ...]", super().__reduce_ex__(protocol))
        function, arguments, *rest = reduced
        if function is copyreg.__newobj__ and arguments[0] in OTHER_TWINS.values():  # type: ignore[attr-defined]
            return _new, (arguments[0].__bases__[1],), *rest  # pickle wouldn't find the twin by its name
        return reduced


def _new(stock: type[nn.Module]) -> nn.Module:
    """A layer without its state: of the twin, unless that isn't registered here, or not for this version."""
    cls = twin_of(stock) or stock
    layer: nn.Module = cls.__new__(cls)
    return layer


def twin_of(cls: type[nn.Module]) -> type[nn.Module] | None:
    """The twin of a class: ``torch.nn``'s or one that is registered; None where there is none."""
    if cls in ALL_TWINS:
        return ALL_TWINS[cls]
    registration = _registration(cls)
    if registration is None or _version_refusal(cls, registration):
        return None
    names = {"__module__": cls.__module__, "__qualname__": cls.__qualname__, "__doc__": cls.__doc__}
    twin: type[nn.Module] = type(cls.__name__, (RegisteredTwin, cls), {**names, "forward": registration.forward})
    registration.joins(cls)
    return twin


def refusal_of(layer: nn.Module, cls: type[nn.Module]) -> str | None:
    """Why a layer of a registered class must stay as it is, or None."""
    registration = _registration(cls)
    if registration is None:
        return None
    refused = _version_refusal(cls, registration)
    return refused or (None if registration.refuses is None else registration.refuses(layer))


def is_registered(cls: type[nn.Module]) -> bool:
    """Whether a class is one that `register_twin` or `register_activation` was told of."""
    return _registration(cls) is not None


def _registration(cls: type[nn.Module]) -> Registration | None:
    name = f"{cls.__module__}.{cls.__qualname__}"
    return _registered.get(cls) or _registered.get(name) or _by_wildcards(name)


def _by_wildcards(name: str) -> Registration | None:
    return next((_registered[key] for key in _registered if isinstance(key, str) and fnmatchcase(name, key)), None)


def _version_refusal(cls: type[nn.Module], registration: Registration) -> str | None:
    known = registration.fingerprints
    if not known or (found := fingerprint(cls)) in known:
        return None
    return f"another version of {cls.__module__.partition('.')[0]} than its twin was written for (fingerprint {found})"


# --- Versions ---------------------------------------------------------------------------------------------------------


def fingerprint(cls: type[nn.Module]) -> str:
    """What tells versions of a class apart: a digest of its ``forward``, and of what that calls of the same library.

    Comments, docstrings, annotations, layout and the class's name don't count.  Where there are no sources, it is
    "unknown".
    """
    found: dict[str, str] = {}
    try:
        _collect(cls, cls.forward, found)
    except (OSError, TypeError, SyntaxError):
        return "unknown"
    text = "\n".join(f"{name.removeprefix(cls.__qualname__)}: {source}" for name, source in sorted(found.items()))
    return hashlib.sha256(text.encode()).hexdigest()[:12]


def _collect(cls: type[nn.Module], function: Any, found: dict[str, str]) -> None:
    """Add the sources of a function, of those that it calls by name, and of the class's methods that it names."""
    function = inspect.unwrap(function)
    if function.__qualname__ in found:
        return
    found[function.__qualname__] = _source(function)
    package = cls.__module__.partition(".")[0]
    for instruction in dis.get_instructions(function):
        name = str(instruction.argval)
        if instruction.opname == "LOAD_GLOBAL":
            used = function.__globals__.get(name)
        elif instruction.opname in ("LOAD_ATTR", "LOAD_METHOD"):
            used = inspect.getattr_static(cls, name, None)
        else:
            continue
        if isinstance(used, FunctionType) and used.__module__.partition(".")[0] == package:
            _collect(cls, used, found)


def _source(function: FunctionType) -> str:
    """A function as it is parsed, without docstring, annotations and decorators."""
    (tree,) = ast.parse(textwrap.dedent(inspect.getsource(function))).body
    assert isinstance(tree, ast.FunctionDef)
    tree.decorator_list, tree.returns = [], None
    if ast.get_docstring(tree) is not None:
        tree.body = tree.body[1:] or [ast.Pass()]
    for argument in ast.walk(tree.args):
        if isinstance(argument, ast.arg):
            argument.annotation = None
    return ast.unparse(tree)
