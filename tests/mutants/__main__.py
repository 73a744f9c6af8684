"""``PYTHONPATH=tests python -m mutants``: take a sample, run its tests, list the survivors."""

import argparse
import ast
import json
import random
import re
import shutil
import signal
import subprocess
import sys
import tempfile
from collections import Counter
from collections.abc import Collection, Iterable, Iterator
from contextlib import ExitStack, closing
from functools import cache
from pathlib import Path

from fusednn import optim
from fusednn.catalogue import ROWS

from .mutators import Mutant, mutants_of
from .planted import PLANTED
from .worker import MODES, PASSED, Selection, Worker

ROOT = Path(__file__).parents[2]
FLOORS = ("kernels", "autograd", "layers", "optim")
#: Those of all families, which notice most.
GENERIC = tuple(
    f"test_{theme}.py"
    for theme in (
        *("gradients", "memory", "in_place", "options", "paths", "aliases", "testing", "refusals", "mixed_dtypes"),
        *("defaults", "pytorch_cases", "reasons", "conversions", "face", "catalogue"),
    )
)
#: And those of what isn't a family's, by a part of its path.
THEMES = {
    "base/random": ("test_seeds.py", "test_dropout*.py", "test_rrelu.py"),
    "autograd/handles": ("test_recompute.py",),
    "autograd/stock_recipes": ("test_recompute.py",),
    "layers/dropout_schedule": ("test_dropout_layers.py",),
    "layers/fusion/": ("test_fuse*.py", "test_neighbourhoods.py", "test_paths.py", "test_chain_reasons.py"),
    "layers/libraries/": ("test_libraries.py",),
    "layers/replacement/": tuple(
        f"test_{theme}.py" for theme in ("replace", "conversions", "classes", "works_with", "fold", "fuse_refusals")
    ),
    "optim": ("test_optimizer*.py", "test_reasons.py"),
}
#: Folders of which the tests of all operations see little.
BESIDE_OPERATIONS = ("layers/fusion/", "layers/libraries/", "layers/replacement/")
ENDED_BY_LIMIT = (-signal.SIGXCPU, -signal.SIGKILL)
LIMIT = 120  # seconds of processor time in each mode
MANY = 5  # families that use a file: of more, tests of all are those to run


@cache
def of_file(path: Path) -> list[Mutant]:
    return mutants_of(path.relative_to(ROOT).as_posix(), path.read_text(encoding="utf-8"))


def sample(seed: int, number: int, folders: Iterable[str], lines: Collection[str] | None = None) -> list[Mutant]:
    """So many mutants at most, each from a file that is drawn first: long files don't crowd out short ones.  ``lines``,
    as ``path:line``, are all that may be changed.
    """
    chance = random.Random(seed)
    files = sorted(path for folder in folders for path in (ROOT / folder).rglob("*.py") if path.name != "__init__.py")
    known = {
        path: [one for one in of_file(path) if lines is None or f"{one.path}:{one.line}" in lines] for path in files
    }
    drawn = (chance.choice(files) for _ in range(number)) if (files := [path for path in files if known[path]]) else ()
    return list(dict.fromkeys(chance.choice(known[path]) for path in drawn))


def changed_lines(since: str) -> set[str]:
    """Those that differ from a commit's, as ``path:line``."""
    command = ["git", "diff", "--unified=0", "--no-prefix", since, "--", *FLOORS]
    difference = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout
    lines, path = set(), ""
    for line in difference.splitlines():
        if line.startswith("+++ "):
            path = line.removeprefix("+++ ")
        elif hunk := re.match(r"@@ -\S+ \+(\d+)(?:,(\d+))? @@", line):
            first, number = int(hunk[1]), int(hunk[2] or 1)
            lines.update(f"{path}:{first + index}" for index in range(number))
    return lines


def imported(path: Path) -> set[Path]:
    """The library's files that a file imports, and those that these do."""
    found, left = set(), [path]
    while left:
        new = _imported_by(left.pop()) - found
        found |= new
        left += new
    return found


@cache
def _imported_by(path: Path) -> frozenset[Path]:
    found = []
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.ImportFrom) and node.level:
            module = path.parents[node.level - 1].joinpath(*(node.module or "").split("."))
            found += [module.with_suffix(".py"), *(module / f"{name.name}.py" for name in node.names)]
    return frozenset(one for one in found if one.exists())


@cache
def families(path: str, line: int = 0) -> tuple[str, ...]:
    """Those of the catalogue that use a file, and what the line is of; where these are many, those whose kernels import
    it; none where these are, too.
    """
    own: dict[str, list[Path]] = {}
    for family in {row.family for row in ROWS}:
        own[family] = [ROOT / floor / f"{family}.py" for floor in FLOORS]
        own[family] = [one for one in own[family] if one.exists()]
    file, names = ROOT / path, reached({*names_around(path, line)})
    users = [family for family, files in own.items() if any(file == one or file in imported(one) for one in files)]
    if names:
        users = [one for one in users if file in own[one] or names & words(one)]
    if len(users) > MANY:
        users = [family for family, files in own.items() if any(file in _imported_by(one) for one in files)]
    users.sort(key=lambda family: (not Path(path).stem.startswith(family), family))
    return tuple(users) if len(users) <= MANY else ()


@cache
def words(family: str) -> frozenset[str]:
    """Every name in a family's files, and in those that are called like it."""
    files = [path for floor in FLOORS for path in (ROOT / floor).rglob(f"{family}.py")]
    return frozenset(name for path in files for name in re.findall(r"\w+", path.read_text(encoding="utf-8")))


@cache
def _shared_definitions() -> dict[str, frozenset[str]]:
    """What is defined in files that are no family's, and the names in it."""
    own = {row.family for row in ROWS}
    found: dict[str, frozenset[str]] = {}
    for path in (path for floor in FLOORS for path in (ROOT / floor).rglob("*.py") if path.stem not in own):
        source = path.read_text(encoding="utf-8")
        for node in ast.parse(source).body:
            if isinstance(node, (ast.FunctionDef, ast.ClassDef)):
                text = ast.get_source_segment(source, node) or ""
                found[node.name] = found.get(node.name, frozenset()) | frozenset(re.findall(r"\w+", text))
    return found


def reached(names: set[str]) -> set[str]:
    """Names, and those of what is shared by families and uses them, or what does."""
    found = set(names)
    while more := {name for name, used in _shared_definitions().items() if used & found} - found:
        found |= more
    return found


def commit() -> str:
    """That of the sources, shortened."""
    command = ["git", "rev-parse", "--short", "HEAD"]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout.strip()


@cache
def naming(name: str) -> tuple[str, ...]:
    """The tests that name a function or a class; none where these are many."""
    files = sorted((ROOT / "tests").glob("test_*.py"))
    found = [one.name for one in files if re.search(rf"\b{name}\b", one.read_text(encoding="utf-8"))]
    return tuple(found) if len(found) <= MANY else ()


def names_around(path: str, line: int) -> Iterator[str]:
    """That of the function or class of the module that a line is of."""
    for node in ast.parse((ROOT / path).read_text(encoding="utf-8")).body:
        if isinstance(node, (ast.FunctionDef, ast.ClassDef)) and node.lineno <= line <= (node.end_lineno or 0):
            yield node.name


def layers_naming(path: str, line: int) -> Iterator[str]:
    """The files of layers that import a file and name what the line is of: fusion computes many a layer in another."""
    names = {*names_around(path, line)}
    for one in sorted((ROOT / "layers").rglob("*.py")) if path.startswith("layers/") and names else ():
        if ROOT / path in _imported_by(one) and names & {*re.findall(r"\w+", one.read_text(encoding="utf-8"))}:
            yield one.relative_to(ROOT).as_posix()


def own_tests(path: str, line: int = 0) -> Selection:
    """The tests of a file's families and theme, those that name what a line is of, and their cases of those of all."""
    users, places = families(path, line), [path, *layers_naming(path, line)]
    themes = [
        pattern for part, patterns in THEMES.items() if any(part in one for one in places) for pattern in patterns
    ]
    patterns = [f"test_{Path(path).stem}*.py", *(f"test_{family}*.py" for family in users), *themes]
    found = [test.name for pattern in patterns for test in sorted((ROOT / "tests").glob(pattern))]
    tests = dict.fromkeys((*found, *(test for name in names_around(path, line) for test in naming(name))))
    names = {name for row in ROWS if row.family in users for name in (row.name, *row.layers)}
    if path.startswith("optim/"):
        names.update(optim.__all__)
    of_all = [] if path.startswith(BESIDE_OPERATIONS) else [name for name in GENERIC if name not in tests]
    return Selection(
        [f"tests/{name}" for name in tests],
        [f"tests/{name}" for name in of_all],
        sorted(name.lower() for name in names),
    )


def installed(folder: Path) -> Path:
    """A copy of the library as it is installed: the floors inside of the face."""
    shutil.copytree(ROOT / "fusednn", folder / "fusednn", ignore=shutil.ignore_patterns("__pycache__"))
    for floor in FLOORS:
        shutil.copytree(ROOT / floor, folder / "fusednn" / floor, ignore=shutil.ignore_patterns("__pycache__"))
    return folder / "fusednn"


def verdict(mutant: Mutant, selection: Selection, workers: Iterable[Worker], limit: int = LIMIT) -> dict[str, str]:
    """``noticed`` by a test that fails or can't be collected; ``undecided`` where they didn't end in time."""
    ended = True
    with tempfile.TemporaryDirectory() as folder:
        library = installed(Path(folder))
        path = library / mutant.path
        path.write_text(mutant.of(path.read_text(encoding="utf-8")), encoding="utf-8")
        for worker in workers:
            if worker.mode == "stock" and mutant.path.startswith("kernels/"):
                continue  # no kernel runs
            outcome = worker.run(Path(folder), selection, limit)
            if outcome.status in ENDED_BY_LIMIT and not outcome.failed:
                ended = False
            elif outcome.status not in PASSED:
                return {"mutant": str(mutant), "verdict": "noticed", "by": outcome.failed}
    return {"mutant": str(mutant), "verdict": "survives" if ended else "undecided", "by": ""}


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="mutants", description=__doc__)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--number", type=int, default=20)
    parser.add_argument("--since", help="change nothing but lines that differ from this commit's")
    parser.add_argument("--planted", action="store_true", help="instead of a sample the faults of `planted`")
    parser.add_argument("--limit", type=int, default=LIMIT, help="seconds of processor time for a mutant in each mode")
    parser.add_argument("--modes", nargs="+", default=list(MODES), choices=MODES, help="of the suite, in this order")
    parser.add_argument("--list", action="store_true", help="list the sample, and run nothing")
    parser.add_argument("--output", type=Path, help="a file for the verdicts, as JSON")
    parser.add_argument("folders", nargs="*", default=list(FLOORS))
    options = parser.parse_args(arguments)
    lines = changed_lines(options.since) if options.since else None
    mutants = sample(options.seed, options.number, options.folders, lines)
    if options.planted:
        mutants = [fault.mutant(ROOT) for fault in PLANTED]
    if options.list or not mutants:
        print(*mutants, sep="\n")
        return 0
    verdicts = []
    with ExitStack() as stack:
        workers = [stack.enter_context(closing(Worker(mode))) for mode in options.modes]
        for mutant in mutants:
            verdicts.append(verdict(mutant, own_tests(mutant.path, mutant.line), workers, options.limit))
            print(f"{verdicts[-1]['verdict']:9}", mutant, verdicts[-1]["by"], flush=True)
            if options.output:
                drawn = {} if options.planted else {"seed": options.seed}
                written = {"commit": commit(), **drawn, "mutants": verdicts}
                options.output.write_text(json.dumps(written, indent=1) + "\n")
    counted = Counter(one["verdict"] for one in verdicts)
    print(f"{counted['noticed']} of {len(mutants)} were noticed; the others are for a person to judge")
    return 0


if __name__ == "__main__":
    sys.exit(main())
