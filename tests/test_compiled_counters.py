"""How compiled kernels use memory, and how many instructions, for a size of each family: no worse than committed."""

import pytest
from support.baseline import RENEW, applies, committed, complaint
from support.compiled import ARCHITECTURE

pytestmark = pytest.mark.compiled

if ARCHITECTURE:
    import executed  # beside the benchmarks, which `support.baseline` makes importable

    CASES = [*executed.CASES, *executed.STEPS]
else:
    CASES = []


@pytest.mark.parametrize("case", CASES)
def test_no_worse(case: str) -> None:
    if not applies("torch", "triton") or ARCHITECTURE != 80:
        pytest.skip("the baseline is another compiler's")
    for name, found in executed.passes(case):
        assert not (worse := complaint("executed", name, *found.figures)), worse


def test_every_case_has_an_entry() -> None:
    assert set(committed()["executed"]) == set(executed.names()), RENEW
