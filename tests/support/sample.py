"""Which cases of a parametrised test `make test` runs.

Of a grid of cases (activations times dtypes times layouts), as many as it takes for each word of their names to occur
once, in the place where it stands, which is known as each-choice coverage.  Lists without a word in common stay whole,
and those of a test with the marker ``whole``.  The other cases have the marker ``grid``.

Where ``--part`` asks for a part of the tests, the name of each decides which part it is of.
"""

import re
import zlib
from collections.abc import Iterable, Sequence

import pytest


def words(case: str) -> frozenset[tuple[int, str]]:
    """The words of a case's name, with their places.  One that stands alone is another than the same beside others: the
    plain case isn't that with options.  A tuple is one word, and a minus is its number's.

    >>> sorted(words("relu backward-float32"))
    [(0, 'backward'), (0, 'relu'), (1, 'float32'), (1, 'only float32')]
    >>> sorted(words("(3, 4)--1"))
    [(0, '(3, 4)'), (0, 'only (3, 4)'), (1, '-1'), (1, 'only -1')]
    """
    found = set()
    for place, part in enumerate(re.split("(?<!-)-", case)):
        own = [part] if part.startswith("(") else part.split()
        found |= {(place, word) for word in own}
        if len(own) == 1:
            found.add((place, f"only {own[0]}"))
    return frozenset(found)


def each_choice(test: str, cases: Sequence[str]) -> set[str]:
    """A few of a test's cases that have all words of all of them; always the same few.

    >>> len(each_choice("test_values", ["relu-float32", "relu-float16", "gelu-float32", "gelu-float16"]))
    2
    """
    # The order differs from test to test, so that not all meet the same pairs of words.
    pool = {case: words(case) for case in sorted(cases, key=lambda case: zlib.crc32(f"{test}[{case}]".encode()))}
    missing = frozenset[tuple[int, str]]().union(*pool.values())
    chosen = set()
    while missing:
        best = max(pool, key=lambda case: len(pool[case] & missing))
        missing -= pool[best]
        chosen.add(best)
    return chosen


def beyond_each_choice(items: Iterable[pytest.Item]) -> list[pytest.Item]:
    """The cases of each test that have no word of their own to add."""
    tests: dict[str, dict[str, pytest.Item]] = {}
    for item in items:
        test, bracket, case = item.nodeid.partition("[")
        if bracket:
            tests.setdefault(test, {})[case.removesuffix("]")] = item
    return [
        item
        for test, cases in tests.items()
        for chosen in [each_choice(test, list(cases))]
        for case, item in cases.items()
        if case not in chosen
    ]


def part_of(text: str) -> tuple[int, int]:
    """What is written K/N: the K-th of N parts, from 1."""
    place, number = map(int, text.split("/"))
    if not 1 <= place <= number:
        raise ValueError(text)
    return place, number


def is_of_part(test: str, part: tuple[int, int]) -> bool:
    """Whether a test is of the part.  Each is of one, and parts are about as long.

    >>> [place for place in (1, 2, 3) if is_of_part("tests/test_conv.py::test_layouts[NHWC]", (place, 3))]
    [2]
    """
    place, number = part
    return zlib.crc32(test.encode()) % number == place - 1
