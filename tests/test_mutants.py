"""Mutation testing's own tests: what it changes, what it leaves alone, and that a fault is noticed."""

import ast
import json
import subprocess
import textwrap
from contextlib import closing
from pathlib import Path

import pytest
from mutants.__main__ import FLOORS, ROOT, changed_lines, of_file, own_tests, sample, verdict
from mutants.mutators import mutants_of
from mutants.planted import PLANTED
from mutants.worker import MODES, QUICK, Selection, Worker

pytestmark = pytest.mark.stock  # nothing here depends on where kernels run

RESULTS = sorted((ROOT / "tests" / "mutants" / "results").glob("*.json"))


@pytest.mark.parametrize(
    ("source", "kind", "changed"),
    [
        ("y = a < b", "comparison", "y = a <= b"),
        ("y = a is None", "comparison", "y = a is not None"),
        ("y = a - b", "operator", "y = (a + b)"),
        ("y = a * (b + c)", "operator", "y = (a / (b + c))"),
        ("y = -a", "sign", "y = (a)"),
        ("y = not a", "negation", "y = (a)"),
        ("y = a and b", "condition", "y = (a or b)"),
        ("y = 3", "constant", "y = 4"),
        ("y = True", "constant", "y = False"),
        ("tl.load(p, mask=m, other=0)", "a mask is missing", "tl.load(p)"),
        ("tl.load(p, mask=m, other=0)", "another value outside", "tl.load(p, mask=m, other=(0) + 1)"),
        ("tl.maximum(a, propagate_nan=n)", "NaN isn't propagated", "tl.maximum(a)"),
        ("takes_kernel(x, refusal=r)", "a refusal is missing", "takes_kernel(x)"),
        ("f(a, b, c=d)", "swapped arguments", "f(b, a, c=d)"),
        ("y = g.contiguous()", "no contiguous", "y = g"),
        ("y = dense(x)", "no dense", "y = x"),
        ("y = x.detach()", "no detach", "y = x"),
        ("ctx.mark_dirty(x)", "a mark is missing", "pass"),
        ("raise ValueError(x)", "an error is missing", "pass"),
    ],
)
def test_what_is_changed(source: str, kind: str, changed: str) -> None:
    assert changed in [mutant.of(source) for mutant in mutants_of("file.py", source) if mutant.kind == kind]


def test_what_is_left_alone() -> None:
    source = '''
        """1 < 2"""
        @decorated(1)
        def f(x: "a < b" = None) -> list[1]:
            """3 - 4"""
            return "é", x
            raise ValueError(f"{x[-1]}")
            zip(x, strict=True)
    '''
    assert [mutant.kind for mutant in mutants_of("file.py", textwrap.dedent(source))] == ["an error is missing"]


def test_refusals() -> None:
    source = 'def refusal(x):\n    # é\n    return "too large" if x else None\ndef other():\n    return "no"\n'
    (mutant,) = mutants_of("file.py", source)
    assert (mutant.line, mutant.after) == (5, "return None")


def test_samples() -> None:
    """Each is another program, and the same seed gives the same."""
    mutants = sample(7, 60, list(FLOORS))
    assert mutants == sample(7, 60, list(FLOORS))
    for mutant in mutants:
        original = (ROOT / mutant.path).read_text(encoding="utf-8")
        assert ast.dump(ast.parse(mutant.of(original))) != ast.dump(ast.parse(original)), mutant
    assert len({mutant.kind for mutant in mutants}) > 5


def test_planted_faults() -> None:
    """Each stands for a line of today, and is Python."""
    assert len({fault.name for fault in PLANTED}) == len(PLANTED)
    for fault in PLANTED:
        source = (ROOT / fault.path).read_text(encoding="utf-8")
        ast.parse(fault.mutant(ROOT).of(source))


def test_every_survivor_of_the_committed_samples_is_judged() -> None:
    mutants = [one for path in RESULTS for one in json.loads(path.read_text(encoding="utf-8"))["mutants"]]
    assert mutants
    for mutant in mutants:
        assert mutant["by"] if mutant["verdict"] == "noticed" else mutant["judged"], mutant


def test_every_reason_stands_in_a_test() -> None:
    """Those why a call goes to stock, a layer stays what it is, neighbours aren't fused, and tensors are kept."""
    tests = "".join(path.read_text(encoding="utf-8") for path in (ROOT / "tests").rglob("*.py"))
    sources = [path for floor in FLOORS for path in (ROOT / floor).rglob("*.py")]
    texts = [
        one.before.removeprefix("return ") for path in sources for one in of_file(path) if one.after == "return None"
    ]
    reasons = {ast.literal_eval(text) for text in texts if text.startswith('"')}
    assert len(reasons) > 100
    assert not [reason for reason in reasons if reason not in tests]


def line_of(path: str, name: str) -> int:
    """One of a function's."""
    return (ROOT / path).read_text(encoding="utf-8").partition(f"def {name}(")[0].count("\n") + 2


def test_tests_of_a_family() -> None:
    assert own_tests("kernels/dropout.py").tests[:2] == ["tests/test_dropout.py", "tests/test_dropout_layers.py"]
    window = own_tests("kernels/pool_window.py")  # of pools, and of what pools behind it
    assert {"tests/test_pool.py", "tests/test_conv.py", "tests/test_conv_batch_norm.py"} <= {*window.tests}
    assert {"maxpool2d", "conv_act_pool2d"} <= {*window.names}
    assert "tests/test_optimizer.py" in own_tests("optim/state.py").tests
    path = "autograd/dispatch.py"
    assert "tests/test_modes.py" in own_tests(path, line_of(path, "record_kernels")).tests
    path = "layers/batch_norm.py"
    assert "tests/test_fuse_prelu.py" in own_tests(path, line_of(path, "forward_chain")).tests
    path = "kernels/base/numerics.py"  # everybody's, but for some
    assert "tests/test_activation.py" in own_tests(path, line_of(path, "erf")).tests
    assert not own_tests(path, line_of(path, "widen")).names
    tiles = own_tests("kernels/base/tiles.py")  # everybody's
    assert "tests/test_gradients.py" in tiles.of_all
    assert not tiles.names


def test_lines_that_a_change_touches() -> None:
    mutants = sample(7, 3, list(FLOORS))
    lines = {f"{one.path}:{one.line}" for one in mutants}
    assert {f"{one.path}:{one.line}" for one in sample(0, 50, list(FLOORS), lines)} == lines
    assert sample(0, 50, list(FLOORS), set()) == []


def test_lines_that_differ_from_a_commits(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    def git(*arguments: str) -> None:
        identity = ("-c", "user.name=n", "-c", "user.email=e")
        subprocess.run(["git", *identity, *arguments], cwd=tmp_path, check=True, capture_output=True)

    for floor in FLOORS:
        (tmp_path / floor).mkdir()
        (tmp_path / floor / "file.py").write_text("a = 1\nb = 2\nc = 3\n")
    git("init")
    git("add", ".")
    git("commit", "-m", "m")
    (tmp_path / "optim" / "file.py").write_text("a = 1\nb = 3\nd = 4\n")
    (tmp_path / "layers" / "file.py").write_text("a = 1\nc = 3\n")
    monkeypatch.setattr("mutants.__main__.ROOT", tmp_path)
    assert changed_lines("HEAD") == {"optim/file.py:2", "optim/file.py:3"}


def test_modes_are_those_of_make_test() -> None:
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    for variables, markers in MODES.values():
        assert any(f"{name}={value} $(call pytest,.venv," in makefile for name, value in variables.items())
        assert QUICK in markers
    assert f"QUICK := {QUICK}\n" in makefile


@pytest.mark.thorough
@pytest.mark.stock
def test_a_fault_is_noticed() -> None:
    """By a test of the mutated copy, not of the library that is installed; what takes too long isn't counted."""
    path = "autograd/dispatch.py"
    mutants = mutants_of(path, (ROOT / path).read_text(encoding="utf-8"))
    harmless = next(one for one in mutants if one.kind == "a refusal is missing")
    tests = Selection(["tests/test_dispatch.py::test_choices_are_not_observed_after_the_block"])
    with closing(Worker("stock")) as worker:
        found = [
            verdict(mutant, tests, [worker], limit)["verdict"]
            for mutant, limit in ((harmless._replace(after="return ("), 60), (harmless, 60), (harmless, 0))
        ]
    assert found == ["noticed", "survives", "undecided"]
