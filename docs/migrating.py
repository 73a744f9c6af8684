"""Writes the difference of examples/migrating's scripts into docs/migrating.md.  ``python docs/migrating.py``."""

import difflib
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
DOCUMENT = ROOT / "docs" / "migrating.md"
BEGIN, END = "```diff\n", "```\n"


def difference() -> str:
    """Of the script before and after, as ``diff --unified=1`` prints it."""
    names = [f"examples/migrating/{name}.py" for name in ("before", "after")]
    before, after = ((ROOT / name).read_text().splitlines(keepends=True) for name in names)
    return "".join(difflib.unified_diff(before, after, *names, n=1))


def updated(text: str) -> str:
    """The document with the difference as it should be."""
    before, _, rest = text.partition(BEGIN)
    _, _, after = rest.partition(END)
    return f"{before}{BEGIN}{difference()}{END}{after}"


if __name__ == "__main__":
    DOCUMENT.write_text(updated(DOCUMENT.read_text()))
