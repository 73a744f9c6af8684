"""The house rules: who may import what, what has a docstring, and which files share a name.  Read off the sources."""

import ast
import re
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import pytest

import fusednn

pytestmark = pytest.mark.stock  # nothing here depends on where kernels run

ROOT = Path(__file__).parents[1]
FACE = "fusednn"


class Floor(NamedTuple):
    """What a folder of the library may import: other folders of it, and other packages."""

    floors: frozenset[str]
    packages: frozenset[str]


def floor(floors: str, packages: str) -> Floor:
    return Floor(frozenset(floors.split()), frozenset(packages.split()))


FLOORS = {
    "kernels": floor("kernels", "numpy torch triton"),
    "autograd": floor("autograd kernels", "torch"),
    "layers": floor("layers autograd", "torch"),
    "optim": floor("optim kernels", "numpy torch"),
    FACE: floor("fusednn kernels autograd layers optim", "matplotlib numpy sklearn torch tqdm triton"),
}
OUTSIDE = ("bench", "examples", "tests")
#: Private, but for all who write kernels, which tests do too: Triton, or stand-ins for it where it isn't installed.
SHARED = "fusednn.kernels.base._triton"
#: The functions that each module of ``fusednn.commands`` has; that package's docstring describes them.
OF_EACH_COMMAND = {"add_arguments", "run"}

Sources = dict[str, str]  # text by path from the root, with slashes


def read_sources(folders: tuple[str, ...]) -> Sources:
    paths = (path for folder in folders for path in sorted((ROOT / folder).rglob("*.py")))
    return {path.relative_to(ROOT).as_posix(): path.read_text(encoding="utf-8") for path in paths}


# --- Imports ----------------------------------------------------------------------------------------------------------


class Import(NamedTuple):
    """One imported name: ``from ..kernels import prelu`` in ``autograd`` has module ``fusednn.kernels``."""

    module: str
    name: str | None
    relative: bool


def imports(path: str, text: str) -> Iterator[Import]:
    """Everything that a source imports, in functions too; relative imports resolved."""
    folder = path.split("/")[:-1]
    package = folder if folder[0] == FACE else [FACE, *folder]
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.Import):
            yield from (Import(alias.name, None, False) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) - node.level + 1] if node.level else []
            module = ".".join([*base, *filter(None, [node.module])])
            yield from (Import(module, alias.name, node.level > 0) for alias in node.names)


def floor_of(imported: Import) -> str:
    """The folder that an import from within fusednn reaches."""
    parts = [*imported.module.split("."), *filter(None, [imported.name])]
    return parts[1] if len(parts) > 1 and parts[1] in FLOORS else FACE


def library_violations(sources: Sources) -> list[str]:
    """Imports in the library that go up, that aren't relative, or that need a package we don't depend on."""
    violations = []
    for path, text in sources.items():
        here = path.split("/")[0]
        for imported in imports(path, text):
            top = imported.module.split(".")[0]
            if imported.relative:
                if floor_of(imported) not in FLOORS[here].floors:
                    violations.append(f"{path}: {here} imports {floor_of(imported)}")
            elif top in FLOORS:
                violations.append(f"{path}: imports {imported.module}, not relative")
            elif top not in sys.stdlib_module_names | FLOORS[here].packages:
                violations.append(f"{path}: {here} imports {top}")
    return violations


#: Where ``kernels`` is Hugging Face's package of that name.
_OTHERS_KERNELS = "examples/libraries/kernelize.py"


def outside_violations(sources: Sources) -> list[str]:
    """Imports in tests, benchmarks and examples that reach the library by anything but public absolute names."""
    violations = []
    for path, text in sources.items():
        here = path.split("/")[0]
        for imported in imports(path, text):
            top, *rest = imported.module.split(".")
            if imported.relative:
                # Within their own helpers only: never out of tests/ or bench/.
                if not (rest and rest[0] == here):
                    violations.append(f"{path}: a relative import leaves {here}")
            elif top != FACE and top in FLOORS and path != _OTHERS_KERNELS:
                violations.append(f"{path}: imports {top}, whose name is fusednn.{top}")
            elif top == FACE and imported.module != SHARED:
                names = [*rest, *filter(None, [imported.name])]
                private = [name for name in names if name.startswith("_") and not name.endswith("__")]
                violations += [f"{path}: imports the private {imported.module}.{name}" for name in private]
    return violations


def test_nothing_imports_upward() -> None:
    sources = read_sources(tuple(FLOORS))
    assert {path.split("/")[0] for path in sources} == set(FLOORS)
    assert not library_violations(sources)


def test_outside_uses_public_names() -> None:
    assert not outside_violations(read_sources(OUTSIDE))


@pytest.mark.parametrize(
    ("path", "text", "violation"),
    [
        ("kernels/prelu.py", "from ..autograd.prelu import prelu", "kernels imports autograd"),
        ("kernels/prelu.py", "def f():\n    from .. import layers", "kernels imports layers"),
        ("kernels/base/tiles.py", "from ...optim import RMSprop", "kernels imports optim"),
        ("kernels/prelu.py", "from .. import __version__", "kernels imports fusednn"),
        ("kernels/prelu.py", "import scipy.special", "kernels imports scipy"),
        ("autograd/prelu.py", "from ..layers import PReLU", "autograd imports layers"),
        ("autograd/prelu.py", "import triton.language as tl", "autograd imports triton"),
        ("layers/prelu.py", "from ..kernels import prelu", "layers imports kernels"),
        ("layers/prelu.py", "from .. import autograd, kernels", "layers imports kernels"),
        ("optim/rmsprop.py", "from ..autograd import relu", "optim imports autograd"),
        ("autograd/prelu.py", "from fusednn.kernels import prelu", "imports fusednn.kernels, not relative"),
        ("autograd/prelu.py", "import kernels.prelu", "imports kernels.prelu, not relative"),
        ("tests/test_prelu.py", "from kernels import prelu", "imports kernels, whose name is fusednn.kernels"),
        ("bench/bench_prelu.py", "import layers.prelu", "imports layers, whose name is fusednn.layers"),
        ("examples/digits.py", "from ..fusednn import layers", "a relative import leaves examples"),
        ("tests/support/samples.py", "from ...kernels import prelu", "a relative import leaves tests"),
        ("tests/test_info.py", "from fusednn._version import x", "imports the private fusednn._version._version"),
        ("tests/test_prelu.py", "from fusednn.kernels.prelu import _f", "imports the private fusednn.kernels.prelu._f"),
    ],
)
def test_notices_bad_imports(path: str, text: str, violation: str) -> None:
    violations = outside_violations if path.startswith(OUTSIDE) else library_violations
    assert violations({path: text}) == [f"{path}: {violation}"]


def test_accepts_good_imports() -> None:
    good = {
        "kernels/prelu.py": "import math, torch\nfrom .base import tiles\nfrom .base._triton import tl, triton",
        "kernels/base/tiles.py": "from .. import functions\nfrom .launch import launch\nimport numpy as np",
        "fusednn/instruments/meter.py": "from ..kernels import INTERPRETING\nimport triton",
        "autograd/prelu.py": "from ..kernels import prelu as kernels\nfrom .dispatch import takes_kernel",
        "layers/prelu.py": "from torch import nn\nfrom ..autograd.prelu import prelu\nfrom .twin import Twin",
        "fusednn/__init__.py": "from . import autograd, kernels, layers\nfrom ._version import __version__",
        "fusednn/commands/demo.py": "from .. import kernels\nfrom .info import environment",
    }
    assert not library_violations(good)
    outside = {
        "tests/test_prelu.py": "import fusednn\nfrom fusednn import __version__, layers\nfrom support import samples",
        "tests/support/samples.py": "from fusednn.kernels.prelu import prelu_forward\nfrom .standing import leaf",
        "bench/fusednn_bench/cases.py": "from . import results",
    }
    assert not outside_violations(outside)


# --- Length -----------------------------------------------------------------------------------------------------------

#: Lines of a file, at most.
LONGEST = 600


def long_files(sources: Sources) -> list[str]:
    return [path for path, text in sources.items() if len(text.splitlines()) > LONGEST]


def test_no_file_is_too_long() -> None:
    assert not long_files(read_sources((*FLOORS, "bench")))
    assert long_files({"kernels/x.py": "\n" * (LONGEST + 1), "kernels/y.py": "\n" * LONGEST}) == ["kernels/x.py"]


# --- Circles ----------------------------------------------------------------------------------------------------------


def circles(sources: Sources) -> list[str]:
    """Modules that import themselves by way of others, in functions and for types too."""
    modules = {name(path): path for path in sources}
    reached = {
        module: {
            target
            for imported in imports(path, sources[path])
            for target in (imported.module, f"{imported.module}.{imported.name}")
            if target in modules and target != module
        }
        for module, path in modules.items()
    }
    while True:  # what imports nothing that is left is in no circle
        ends = [module for module, targets in reached.items() if not targets & reached.keys()]
        if not ends:
            return sorted(modules[module] for module in reached)
        for module in ends:
            del reached[module]


def name(path: str) -> str:
    """The name by which other sources import a source."""
    parts = path.removesuffix(".py").removesuffix("/__init__").split("/")
    return ".".join(parts if parts[0] == FACE else [FACE, *parts])


def test_no_module_imports_itself() -> None:
    packages = {
        path: text for path, text in read_sources((*FLOORS, "bench")).items() if not path.endswith("__init__.py")
    }
    assert not circles(packages)


def test_notices_circles() -> None:
    around = {
        "bench/a/x.py": "from .y import f",
        "bench/a/y.py": "def f():\n    from . import z",
        "bench/a/z.py": "import os",
    }
    assert not circles(around)
    assert circles({**around, "bench/a/z.py": "from . import x"}) == ["bench/a/x.py", "bench/a/y.py", "bench/a/z.py"]


# --- Stock functions --------------------------------------------------------------------------------------------------

#: Where PyTorch's functions are bound, and exchanged for ours.
BIND = ("autograd/stock.py", "layers/replacement/functions.py")


def late_bindings(sources: Sources) -> list[str]:
    """Where the library would look a function of PyTorch up by name when it is called, and might find ours there.

    That is ``torch.nn.functional`` as a module, and calls in ``torch`` of what has a namesake here.
    """
    ours = set(fusednn.autograd.__all__)
    violations = []
    for path, text in sources.items():
        if path in BIND:
            continue
        for imported in imports(path, text):
            if ".".join(filter(None, imported[:2])) == "torch.nn.functional":
                violations.append(f"{path}: imports torch.nn.functional")
        for node in ast.walk(ast.parse(text)):
            name = ast.unparse(node) if isinstance(node, ast.Attribute) else ""
            if name.startswith(("torch.nn.functional.", "nn.functional.")):
                violations.append(f"{path}: looks up {name}")
            if isinstance(node, ast.Call) and ast.unparse(node.func) in {f"torch.{one}" for one in ours}:
                violations.append(f"{path}: calls {ast.unparse(node.func)}")
    return violations


def test_stock_functions_are_bound_at_import() -> None:
    assert not late_bindings(read_sources(tuple(FLOORS)))


@pytest.mark.parametrize(
    ("text", "violation"),
    [
        ("import torch.nn.functional as F", "imports torch.nn.functional"),
        ("from torch.nn import functional as F", "imports torch.nn.functional"),
        ("def f(x): return torch.nn.functional.relu(x)", "looks up torch.nn.functional.relu"),
        ("def f(x): return torch.softmax(x, 1)", "calls torch.softmax"),
    ],
)
def test_notices_late_bindings(text: str, violation: str) -> None:
    assert late_bindings({"layers/prelu.py": text}) == [f"layers/prelu.py: {violation}"]
    assert not late_bindings(
        {BIND[0]: text, "layers/prelu.py": "from ..autograd import stock as F\nF.relu(torch.ones(2))"}
    )


# --- Device functions -------------------------------------------------------------------------------------------------

#: What the interpreter computes otherwise on another processor, or compiled code less accurately than its name says.
OF_NUMERICS = {
    "cos", "div_rn", "dot", "erf", "exp", "exp2", "fdiv", "log",
    "log2", "rsqrt", "sigmoid", "sin", "softmax", "sqrt", "sqrt_rn",
}  # fmt: skip


def device_function_violations(sources: Sources) -> list[str]:
    """Uses of Triton's elementary functions and of the device library outside ``kernels/base/numerics.py``."""
    violations = []
    for path, text in sources.items():
        for node in ast.walk(ast.parse(text)):
            if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name):
                of_triton = node.value.id == "tl" and node.attr in OF_NUMERICS | {"math"}
                if of_triton or node.value.id == "libdevice":
                    violations.append(f"{path}: uses {node.value.id}.{node.attr}")
    return violations


def test_elementary_functions_come_from_numerics() -> None:
    sources = read_sources(("kernels",))
    own = sources.pop("kernels/base/numerics.py")
    assert {"tl.exp", "libdevice.exp"} <= {one.split()[-1] for one in device_function_violations({"": own})}
    assert not device_function_violations(sources)


def test_what_is_not_specialised_is_read_off_annotations() -> None:
    """A list beside the kernel would be a second place."""
    listing = {path for path, text in read_sources(("kernels",)).items() if "do_not_specialize=[" in text}
    assert listing == {"kernels/base/launch.py"}


# --- Docstrings -------------------------------------------------------------------------------------------------------


def undocumented(sources: Sources) -> list[str]:
    """Functions and classes in a module's ``__all__`` that it defines without a docstring.

    Constants can't have one, and imported names have theirs where they are defined.
    """
    missing = []
    for path, text in sources.items():
        body = ast.parse(text).body
        exempt = OF_EACH_COMMAND if path.startswith("fusednn/commands/") else set()
        public = public_names(body) - exempt
        definitions = [node for node in body if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef)]
        bare = [node.name for node in definitions if node.name in public and not ast.get_docstring(node)]
        missing += [f"{path}: {name} has no docstring" for name in bare]
    return missing


def public_names(body: list[ast.stmt]) -> set[str]:
    """What a module's ``__all__`` lists; nothing where there is none."""
    for node in body:
        target = node.targets[0] if isinstance(node, ast.Assign) else getattr(node, "target", None)
        if isinstance(target, ast.Name) and target.id == "__all__":
            assert isinstance(node, ast.Assign | ast.AnnAssign)
            assert node.value is not None
            return set(ast.literal_eval(node.value))
    return set()


def test_public_names_have_docstrings() -> None:
    sources = read_sources(tuple(FLOORS))
    assert "prelu" in public_names(ast.parse(sources["autograd/__init__.py"]).body)
    assert not undocumented(sources)


def test_notices_missing_docstrings() -> None:
    text = """
__all__ = ["LIMIT", "Bare", "Described", "bare", "imported"]
from .x import imported
LIMIT = 3
class Bare: pass
class Described:
    "Described."
def bare(): "" or "not a docstring"
def _private(): pass
def not_listed(): pass
"""
    expected = ["kernels/x.py: Bare has no docstring", "kernels/x.py: bare has no docstring"]
    assert undocumented({"kernels/x.py": text}) == expected
    assert undocumented({"kernels/x.py": text.replace("__all__ =", "__all__: list[str] =")}) == expected


# --- Defaults ---------------------------------------------------------------------------------------------------------

#: What makes tensors out of nothing, on the default device and in the default dtype unless told otherwise.
FACTORIES = {
    *("as_tensor", "asarray", "empty", "empty_strided", "eye", "full", "linspace", "logspace", "normal", "ones"),
    *("rand", "randn", "scalar_tensor", "sparse_coo_tensor", "tensor", "zeros"),
}
#: And those whose dtype is an integer's unless told otherwise.
INTEGER_FACTORIES = {"arange", "randint", "randperm", "tril_indices", "triu_indices"}


def unspecified_factories(sources: Sources) -> list[str]:
    """Calls of ``torch.zeros`` and its like that leave the device, or a dtype that isn't an integer's, to a default."""
    violations = []
    for path, text in sources.items():
        for node in ast.walk(ast.parse(text)):
            if not (isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute)):
                continue
            name, given = node.func.attr, {keyword.arg for keyword in node.keywords}
            if name not in FACTORIES | INTEGER_FACTORIES or ast.unparse(node.func.value) != "torch":
                continue
            needed = {"device", "dtype"} if name in FACTORIES else {"device"}
            violations += [f"{path}:{node.lineno}: torch.{name} without {option}" for option in sorted(needed - given)]
    return violations


def test_nothing_is_left_to_default_devices_and_dtypes() -> None:
    assert not unspecified_factories(read_sources(tuple(set(FLOORS) - {FACE})))


def test_notices_unspecified_factories() -> None:
    text = "y = torch.zeros(3, device=x.device)\nz = torch.arange(3)\nw = torch.empty_like(x)\nv = tl.zeros((3,))"
    assert unspecified_factories({"optim/x.py": text}) == [
        "optim/x.py:1: torch.zeros without dtype",
        "optim/x.py:2: torch.arange without device",
    ]


# --- Names ------------------------------------------------------------------------------------------------------------


def families(sources: Sources) -> dict[str, set[str]]:
    """The names of families, by floor.

    Kernels: those that configurations are registered for with ``ships``.  Autograd and optim: files that their package
    exports public names from.  Layers: files that define twins.
    """
    found: dict[str, set[str]] = {name: set() for name in FLOORS}
    for path, text in sources.items():
        here, *rest = path.removesuffix(".py").split("/")
        tree = ast.parse(text)
        if here in ("autograd", "optim") and rest == ["__init__"]:
            exported = public_names(tree.body)
            found[here] |= {
                node.module
                for node in tree.body
                if isinstance(node, ast.ImportFrom) and node.module and {alias.name for alias in node.names} & exported
            }
        elif here == "kernels":
            found[here] |= set(shipped_families(tree))
        if here == "layers" and twins(tree):
            found[here].add(rest[-1])
    return found


def shipped_families(tree: ast.Module) -> list[str]:
    """The names that a module registers with ``@ships("name")``."""
    return [
        ast.literal_eval(decorator.args[0])
        for node in tree.body
        if isinstance(node, ast.FunctionDef)
        for decorator in node.decorator_list
        if isinstance(decorator, ast.Call) and isinstance(decorator.func, ast.Name) and decorator.func.id == "ships"
    ]


def twins(tree: ast.Module) -> list[str]:
    """The classes of a module that derive from ``Twin`` and a stock class."""
    classes = [node for node in tree.body if isinstance(node, ast.ClassDef)]
    return [one.name for one in classes if len(one.bases) > 1 and ast.unparse(one.bases[0]) == "Twin"]


def name_violations(sources: Sources) -> list[str]:
    """Families that are called differently on different floors, or by modules of kernels with no part of their name."""
    found = families(sources)
    upper = found["autograd"] | found["optim"]
    violations = [f"kernels/{name}.py has no namesake in autograd or optim" for name in found["kernels"] - upper]
    violations += [f"layers/{name}.py has no namesake in autograd" for name in found["layers"] - found["autograd"]]
    for path, text in sources.items():
        stem = f"_{path.split('/')[-1].removesuffix('.py')}_"  # words between underscores
        violations += [f"{path} ships {name}" for name in shipped_families(ast.parse(text)) if f"_{name}_" not in stem]
    return sorted(violations)


def test_families_have_one_name() -> None:
    sources = read_sources(tuple(FLOORS))
    known = {"activation", "prelu", "rrelu"}
    assert all(known <= families(sources)[name] for name in ("kernels", "autograd", "layers"))
    assert not name_violations(sources)


def test_notices_other_names() -> None:
    sources = {
        "kernels/softmax.py": "@ships('softmax')\ndef configurations(): ...",
        "autograd/__init__.py": "from .softmaxes import softmax\n__all__ = ['softmax']",
        "layers/softmax.py": "class Softmax(Twin, nn.Softmax): ...",
    }
    assert name_violations(sources) == [
        "kernels/softmax.py has no namesake in autograd or optim",
        "layers/softmax.py has no namesake in autograd",
    ]
    sources["autograd/__init__.py"] = "from .softmax import softmax\n__all__ = ['softmax']"
    assert not name_violations(sources)
    sources["kernels/linear_softmax.py"] = "@ships('softmax')\ndef configurations(): ..."
    assert not name_violations(sources)
    sources["kernels/softmax.py"] = "@ships('max')\ndef configurations(): ..."
    assert name_violations(sources) == [
        "kernels/max.py has no namesake in autograd or optim",
        "kernels/softmax.py ships max",
    ]


# --- Reasons ----------------------------------------------------------------------------------------------------------


def patterns(value: ast.AST | None) -> Iterator[str]:
    """Of the strings that an expression may be."""
    if isinstance(value, ast.Constant) and isinstance(value.value, str):
        yield re.escape(value.value)
    elif isinstance(value, ast.JoinedStr):
        yield "".join(re.escape(part.value) if isinstance(part, ast.Constant) else ".+" for part in value.values)
    elif isinstance(value, ast.IfExp):
        yield from (*patterns(value.body), *patterns(value.orelse))
    elif isinstance(value, ast.BoolOp):
        yield from patterns(value.values[-1])


def reasons_in(sources: Sources) -> set[str]:
    """Of all functions that return a reason why not, or None."""
    functions = (node for text in sources.values() for node in ast.walk(ast.parse(text)))
    return {
        pattern
        for function in functions
        if isinstance(function, ast.FunctionDef) and function.returns and ast.unparse(function.returns) == "str | None"
        for node in ast.walk(function)
        if isinstance(node, ast.Return)
        for pattern in patterns(node.value)
    }


def unnamed_reasons(sources: Sources, tests: Sources) -> list[str]:
    text = "\n".join(tests.values())
    return [reason for reason in sorted(reasons_in(sources)) if not re.search(reason, text)]


def test_every_reason_stands_in_a_test() -> None:
    """In its words: one that no test names may be given nowhere, or where it doesn't hold."""
    sources = read_sources(tuple(name for name in FLOORS if name != FACE))
    assert len(reasons_in(sources)) > 150
    assert unnamed_reasons(sources, read_sources(("tests",))) == []


def test_unnamed_reasons_are_found() -> None:
    source = "def f(x) -> str | None:\n    if x:\n        return f'at {x}'\n    return x or 'over' if g else None\n"
    assert unnamed_reasons({"f.py": source}, {"test_f.py": "== 'at 3'"}) == ["over"]
