"""The compile check: every shipped configuration, for GPUs that aren't here."""

import zlib
from collections.abc import Iterable
from typing import Any

import pytest
import torch
from support.baseline import applies, complaint

from fusednn import kernels

pytestmark = pytest.mark.compiles

CONFIGURATIONS = list(kernels.shipped()) if kernels.AVAILABLE else []


# float16 is bfloat16 with other conversions, float64 hardly anyone's choice for speed.
THOROUGH = {c.label for c in CONFIGURATIONS if c.rare or c.label.endswith(("fp16", "fp64"))}


def one_in(number: int, configurations: Iterable[kernels.Configuration]) -> list[kernels.Configuration]:
    """A sample by names: a configuration more doesn't change which others are in it."""
    return [each for each in configurations if zlib.crc32(each.label.encode()) % number == 0]


def check(configuration: kernels.Configuration, target: str, *, may_spill: bool = False) -> Any:
    from fusednn.instruments.compile_check import compile_configuration

    result = compile_configuration(configuration, target)
    problems = [problem for problem in result.problems if not (may_spill and problem.startswith("spills"))]
    assert not problems, f"{configuration.label} on {target}: {'; '.join(problems)}"
    return result.machine_code


@pytest.mark.parametrize(
    "configuration",
    [pytest.param(c, marks=[pytest.mark.thorough] * (c.label in THOROUGH), id=c.label) for c in CONFIGURATIONS],
)
def test_compiles(configuration: kernels.Configuration) -> None:
    """For sm_90, whose machine code is read: no more registers and spills than committed, with the same compiler."""
    code = check(configuration, "sm_90")
    if not configuration.rare and applies("triton"):
        assert not (worse := complaint("compiled", configuration.label, code.registers, code.spills)), worse


# `make check` compiles every configuration for every target, which takes the better part of an hour on two cores.
@pytest.mark.thorough
@pytest.mark.parametrize("target", ["sm_80", "sm_86", "sm_89", "sm_100", "sm_120", "gfx942"])
@pytest.mark.parametrize("configuration", one_in(14, (c for c in CONFIGURATIONS if not c.rare)), ids=lambda c: c.label)
def test_compiles_for_other_targets(configuration: kernels.Configuration, target: str) -> None:
    from fusednn.instruments.compile_check import is_for

    if is_for(configuration, target):
        check(configuration, target, may_spill=True)  # a few do, by some bytes: `python -m fusednn check` lists them


@pytest.mark.thorough
@pytest.mark.parametrize(
    ("target", "label"),
    [
        ("sm_90", "softmax forward along x32768 bf16 aligned to 1"),
        ("sm_86", "log_softmax forward along x32768 fp32 aligned to 1"),
        ("sm_80", "prelu backward by_column x64 fp16"),
        ("sm_86", "pool backward 3x3 contiguous + bias covered relu fp32 aligned to 2"),
    ],
)
def test_what_came_near_doesnt_spill(target: str, label: str) -> None:
    """These did, when a thread had more elements, or less aligned ones."""
    (configuration,) = (candidate for candidate in kernels.shipped(variants=True) if candidate.label == label)
    check(configuration, target)


@pytest.mark.thorough
@pytest.mark.parametrize("target", ["sm_80", "sm_86", "sm_120", "gfx942"])
@pytest.mark.parametrize("configuration", [c for c in CONFIGURATIONS if c.tensor_cores], ids=lambda c: c.label)
def test_products_fit_registers_and_shared_memory(configuration: kernels.Configuration, target: str) -> None:
    """Where operands take registers, too, and where shared memory is small."""
    from fusednn.instruments.compile_check import is_for

    if is_for(configuration, target):
        check(configuration, target, may_spill=configuration.rare)


#: One configuration of each kernel: the first in bfloat16, where it has one.
OF_EACH_KERNEL = {c.kernel: c for c in (*reversed(CONFIGURATIONS), *(c for c in CONFIGURATIONS if "bf16" in c.label))}


@pytest.mark.parametrize("configuration", OF_EACH_KERNEL.values(), ids=lambda c: c.label)
def test_any_arguments_fit(configuration: kernels.Configuration) -> None:
    """Integers of 1, of more than 32 bits, and what isn't aligned: Triton makes a kernel of its own for each."""
    from fusednn.instruments.compile_check import arguments_of, translate

    for arguments in arguments_of(configuration):
        try:
            translate(configuration, "sm_90", arguments)
        except Exception as error:
            pytest.fail(f"{configuration.label} with {arguments}: {error}")


@pytest.mark.thorough
@pytest.mark.parametrize("configuration", OF_EACH_KERNEL.values(), ids=lambda c: c.label)
def test_any_arguments_compile(configuration: kernels.Configuration) -> None:
    from fusednn.instruments.compile_check import arguments_of, compile_for

    for arguments in arguments_of(configuration):
        compile_for(configuration, "sm_90", arguments)


#: One of each kernel that is told how its extents are aligned.
ALIGNED = [c for c in OF_EACH_KERNEL.values() if c.aligned]


@pytest.mark.parametrize("configuration", ALIGNED, ids=lambda c: c.label)
def test_compiles_for_any_extents(configuration: kernels.Configuration) -> None:
    *_, unaligned = configuration.variants
    check(unaligned, "sm_90")


@pytest.mark.thorough
@pytest.mark.parametrize(
    "configuration",
    one_in(5, (v for c in CONFIGURATIONS if c.label not in THOROUGH for v in c.variants)),
    ids=lambda c: c.label,
)
def test_compiles_for_extents_like_these(configuration: kernels.Configuration) -> None:
    check(configuration, "sm_90", may_spill=True)


@pytest.mark.parametrize(
    ("label", "extent", "bits"),
    [
        ("softmax forward along x1024 bf16", 1000, 128),
        ("cross_entropy backward indices along 2x1024 fp32", 100, 128),
        ("prelu backward by_row x256 bf16", 14 * 14, 64),
        ("pool backward 2x2 contiguous bf16", 28, 64),
        ("maxout forward by row x64 fp32", 10, 64),
    ],
)
def test_accesses_are_as_wide_as_extents_allow(label: str, extent: int, bits: int) -> None:
    (configuration,) = (candidate for candidate in CONFIGURATIONS if candidate.label == label)
    arguments = [extent if name in configuration.aligned else torch.empty(0) for name in configuration.names]
    alignment = configuration.keywords_for(arguments)["ALIGN"]
    variant = next(each for each in configuration.variants if dict(each.constants)["ALIGN"] == alignment)
    assert check(variant, "sm_90").access_bits == bits


def test_labels_are_unique() -> None:
    labels = [configuration.label for configuration in kernels.shipped(variants=True)]
    assert len(set(labels)) == len(labels)


@pytest.mark.parametrize("label", ["relu forward + mask bf16", "relu backward fp32", "hardsigmoid backward fp16"])
def test_masks_are_packed_in_registers(label: str) -> None:
    """No shuffles and no shared memory: the layout that `tiles` relies on is the compiler's choice."""
    from fusednn.instruments.compile_check import compile_configuration

    (configuration,) = (candidate for candidate in CONFIGURATIONS if candidate.label == label)
    code = compile_configuration(configuration, "sm_90").machine_code
    assert code is not None
    assert code.count("SHFL") == 0
    assert code.shared_bytes == 0
