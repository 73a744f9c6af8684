"""Which cases `make test` takes: what the functions say of themselves."""

import doctest

import pytest
from support import sample

pytestmark = pytest.mark.stock


def test_examples() -> None:
    result = doctest.testmod(sample)
    assert result.attempted
    assert not result.failed
