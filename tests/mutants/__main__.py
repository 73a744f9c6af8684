"""``PYTHONPATH=tests python -m mutants``: take a sample, run its tests, list the survivors."""

import argparse
import os
import random
import shutil
import subprocess
import sys
import tempfile
from functools import cache
from pathlib import Path

from .mutators import Mutant, mutants_of

ROOT = Path(__file__).parents[2]
FLOORS = ("kernels", "autograd", "layers", "optim")
#: Those of all families, after a family's own.
GENERIC = ("test_gradients.py", "test_memory.py", "test_options.py")
LONGEST = 900  # seconds that a mutant's tests may take: one that hangs is noticed


@cache
def of_file(path: Path) -> list[Mutant]:
    return mutants_of(path.relative_to(ROOT).as_posix(), path.read_text(encoding="utf-8"))


def sample(seed: int, number: int, folders: list[str]) -> list[Mutant]:
    """So many mutants at most, each from a file that is drawn first: long files don't crowd out short ones."""
    chance = random.Random(seed)
    files = sorted(path for folder in folders for path in (ROOT / folder).rglob("*.py") if path.name != "__init__.py")
    drawn = (of_file(chance.choice(files)) for _ in range(number))
    return list(dict.fromkeys(chance.choice(mutants) for mutants in drawn if mutants))


def own_tests(path: str) -> list[str]:
    """The tests of a file's family, and then those of all."""
    family = Path(path).stem
    names = sorted(test.name for test in (ROOT / "tests").glob(f"test_{family}*.py"))
    return [f"tests/{name}" for name in (*names, *(name for name in GENERIC if name not in names))]


def installed(folder: Path) -> Path:
    """A copy of the library as it is installed: the floors inside of the face."""
    shutil.copytree(ROOT / "fusednn", folder / "fusednn", ignore=shutil.ignore_patterns("__pycache__"))
    for floor in FLOORS:
        shutil.copytree(ROOT / floor, folder / "fusednn" / floor, ignore=shutil.ignore_patterns("__pycache__"))
    return folder / "fusednn"


def is_noticed(mutant: Mutant, tests: list[str]) -> bool:
    """Whether a test fails, hangs or can't be collected, in either mode."""
    with tempfile.TemporaryDirectory() as folder:
        library = installed(Path(folder))
        path = library / mutant.path.removeprefix("fusednn/")
        path.write_text(mutant.of(path.read_text(encoding="utf-8")), encoding="utf-8")
        for mode in ("1", "0"):
            environment = {**os.environ, "PYTHONPATH": folder, "TRITON_INTERPRET": mode, "OMP_NUM_THREADS": "1"}
            # Not `python -m pytest`, which would put the folder that it runs in, and so the library, first.
            command = [str(Path(sys.executable).with_name("pytest")), "-x", "-q", "-m", "not thorough and not compiles"]
            try:
                run = subprocess.run(
                    [*command, *tests], cwd=ROOT, env=environment, timeout=LONGEST, capture_output=True, check=False
                )
            except subprocess.TimeoutExpired:
                return True
            if run.returncode not in (0, 5):  # 5: no test has anything to say in this mode
                return True
    return False


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="mutants", description=__doc__)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--number", type=int, default=20)
    parser.add_argument("--list", action="store_true", help="list the sample, and run nothing")
    parser.add_argument("folders", nargs="*", default=list(FLOORS))
    options = parser.parse_args(arguments)
    mutants = sample(options.seed, options.number, options.folders)
    if options.list:
        print(*mutants, sep="\n")
        return 0
    survivors = []
    for mutant in mutants:
        noticed = is_noticed(mutant, own_tests(mutant.path))
        print("noticed " if noticed else "SURVIVES", mutant, flush=True)
        survivors += [] if noticed else [mutant]
    print(f"{len(mutants) - len(survivors)} of {len(mutants)} were noticed; the others, for a person to judge:")
    print(*survivors, sep="\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
