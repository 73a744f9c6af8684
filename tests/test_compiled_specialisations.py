"""Every specialisation of the kernels' integers that Triton makes: an argument of 1 is a constant, no tensor."""

import itertools
from collections.abc import Iterator

import pytest
import triton
from support.compiled import ARCHITECTURE
from support.planting import planted
from triton._C.libtriton import ir
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource, make_backend

from fusednn import kernels
from fusednn.instruments.compile_check import DEVICES
from fusednn.kernels import linear_maxout

pytestmark = pytest.mark.compiled


def specialised_integers(configuration: kernels.Configuration) -> list[str]:
    signature = dict(configuration.signature)
    return [
        each.name
        for each in configuration.kernel.params
        if signature.get(each.name, "*")[0] in "iu" and not each.do_not_specialize
    ]


def representatives() -> dict[str, list[kernels.Configuration]]:
    """Of each kernel the configurations that differ in what chooses between branches, not in dtypes and sizes alone."""
    found: dict[tuple[str, str], kernels.Configuration] = {}
    for configuration in kernels.shipped():
        if specialised_integers(configuration):
            chosen = [each for each in configuration.constants if isinstance(each[1], bool | None) or each[0] == "AXIS"]
            found.setdefault((configuration.kernel.__name__, repr(chosen)), configuration)
    by_kernel: dict[str, list[kernels.Configuration]] = {}
    for (name, _), configuration in found.items():
        by_kernel.setdefault(name, []).append(configuration)
    return by_kernel


def ones(names: list[str], *, pairs: bool) -> Iterator[tuple[str, ...]]:
    """Alone, in pairs, all."""
    for number in sorted({1, 2, len(names)} if pairs else {1, len(names)}):
        yield from itertools.combinations(names, number)


def parse(configuration: kernels.Configuration, constants_of_1: tuple[str, ...]) -> None:
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
