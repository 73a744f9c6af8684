"""The compile check: every shipped configuration, for GPUs that aren't here."""

import pytest

from fusednn import kernels

pytestmark = pytest.mark.compiles

# The machine code that is read is sm_90's; that the others compile is checked where there is time.
TARGETS = ("sm_90", *(pytest.param(target, marks=pytest.mark.thorough) for target in ("sm_80", "sm_100", "gfx942")))
CONFIGURATIONS = list(kernels.shipped()) if kernels.AVAILABLE else []


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize(
    "configuration",
    [pytest.param(c, marks=[pytest.mark.thorough] * c.rare, id=c.label) for c in CONFIGURATIONS],
)
def test_compiles(configuration: kernels.Configuration, target: str) -> None:
    from fusednn.kernels.instruments.compile_check import compile_configuration

    result = compile_configuration(configuration, target)
    assert not result.problems, f"{configuration.label} on {target}: {'; '.join(result.problems)}"


def test_labels_are_unique() -> None:
    labels = [configuration.label for configuration in CONFIGURATIONS]
    assert len(set(labels)) == len(labels)


@pytest.mark.parametrize("label", ["relu forward + mask bf16", "relu backward fp32", "hardsigmoid backward fp16"])
def test_masks_are_packed_in_registers(label: str) -> None:
    """No shuffles and no shared memory: the layout that `tiles` relies on is the compiler's choice."""
    from fusednn.kernels.instruments.compile_check import compile_configuration

    (configuration,) = (candidate for candidate in CONFIGURATIONS if candidate.label == label)
    code = compile_configuration(configuration, "sm_90").machine_code
    assert code is not None
    assert code.count("SHFL") == 0
    assert code.shared_bytes == 0
