"""Writes the difference of the two scripts in examples/migrating into docs/migrating.md.  ``[--check]``"""

import difflib
import sys
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


def main() -> int:
    text = DOCUMENT.read_text()
    if "--check" in sys.argv[1:]:
        return int(updated(text) != text)
    DOCUMENT.write_text(updated(text))
    return 0


if __name__ == "__main__":
    sys.exit(main())
