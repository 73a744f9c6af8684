"""What is done in a quarter of an hour on a GPU: parts keep their time, whatever happens in one of them."""

# ruff: noqa: E402
import json
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest

BENCH = Path(__file__).parents[1] / "bench"
sys.path.insert(0, str(BENCH))

import counters
import gpu_run
import thresholds
from fusednn_bench.parts import NO_TESTS, QUESTIONS, Command, Machine, Part, parts
from fusednn_bench.schedule import GRACE_SECONDS, Outcome, run_part, run_parts

from fusednn.kernels import linear_maxout
from fusednn.kernels.base import figures

FAULTS = {
    "hangs": "import signal, time; signal.signal(signal.SIGINT, signal.SIG_IGN); time.sleep(60)",
    "crashes": "import os; os.abort()",
    "fails": "print('E   one failed'); raise SystemExit(1)",
}
FAMILIES = ("activation", "pool")


def command(name: str, code: str = "print('done')") -> Command:
    return Command(name, (sys.executable, "-c", code))


def run(part: Part, folder: Path, seconds: float = 30.0) -> list[Outcome]:
    return run_part(part, part.commands, folder, {}, seconds)


def test_the_first_call_reaches_the_benchmarks_and_two_reach_the_end() -> None:
    planned = parts(Path("folder"), Machine(16), FAMILIES)
    assert [part.name for part in planned[:3]] == ["smoke", "gpu-tests", "headline"]
    assert sum(part.seconds for part in planned[:3]) < gpu_run.SECONDS - 60
    assert sum(part.seconds for part in planned) < 2.5 * gpu_run.SECONDS
    assert all(part.seconds > GRACE_SECONDS and part.commands for part in planned)
    names = [one.name for part in planned for one in part.commands]
    assert len(names) == len(set(names))  # logs are called after them


def test_kernels_of_coming_parts_are_compiled_ahead_of_them() -> None:
    planned = {part.name: part for part in parts(Path("folder"), Machine(16), FAMILIES)}
    ahead = {one.name.removeprefix("ahead-") for one in planned["gpu-tests"].commands if one.name.startswith("ahead-")}
    assert ahead >= {one.name.removeprefix("thresholds-") for one in planned["thresholds"].commands} | {"host"}
    assert ahead >= {one.name.removeprefix("counters-") for one in planned["counters"].commands}


def test_every_test_file_is_run_and_marked_ones_for_the_gpu_first() -> None:
    planned = {part.name: part for part in parts(Path("folder"), Machine(16), FAMILIES)}
    files = {path.name for path in Path(__file__).parent.glob("test_*.py")}
    assert {Path(one.line[3]).name for one in planned["tests"].commands} == files
    of_gpu = [one for one in planned["gpu-tests"].commands if one.line[2] == "pytest"]
    assert {Path(one.line[3]).name for one in of_gpu} >= {"test_gpu.py", "test_batch_norm.py"}
    assert all(one.line[4:6] == ("-m", "gpu") for one in of_gpu)


@pytest.mark.parametrize(("code", "words"), [("print(1)", "passed"), ("raise SystemExit(5)", "passed")])
def test_outcomes(code: str, words: str, tmp_path: Path) -> None:
    (outcome,) = run(Part("part", "", (command("one", code),), 30), tmp_path)
    assert outcome.words == words
    assert outcome.passed


@pytest.mark.stock  # the script, which is the same in every mode
@pytest.mark.parametrize(
    ("fault", "words"), [("hangs", "out of time"), ("crashes", "killed by signal 6"), ("fails", "exit 1")]
)
def test_a_fault_leaves_its_neighbours_alone(fault: str, words: str, tmp_path: Path) -> None:
    commands = (command("faulty", FAULTS[fault]), *(command(f"right-{i}") for i in range(3)))
    started = time.monotonic()
    outcomes = run(replace(Part("part", "", commands, 30, jobs=1), limit=3.0), tmp_path)
    assert time.monotonic() - started < 20
    assert {outcome.command: outcome.words for outcome in outcomes} == {
        "faulty": words,
        **{f"right-{i}": "passed" for i in range(3)},
    }


@pytest.mark.stock  # the script, which is the same in every mode
def test_a_part_ends_in_time_and_what_its_commands_began_with_it(tmp_path: Path) -> None:
    child = (
        f"import subprocess, sys, time; subprocess.Popen([sys.executable, '-c', {FAULTS['hangs']!r}]); time.sleep(9)"
    )
    begun = (command("parent", child.replace("time.sleep(9)", "time.sleep(60)")), command("waits"))
    started = time.monotonic()
    outcomes = run(Part("part", "", begun, 30), tmp_path, GRACE_SECONDS + 2)
    assert time.monotonic() - started < GRACE_SECONDS + 8
    assert [(outcome.command, outcome.code) for outcome in outcomes] == [("parent", None)]  # the other wasn't begun
    listing = subprocess.run(["ps", "-eo", "args"], capture_output=True, text=True, check=False).stdout
    assert FAULTS["hangs"] not in [line.rpartition("-c ")[2] for line in listing.splitlines()]


def test_a_missing_tool_is_an_outcome(tmp_path: Path) -> None:
    (outcome,) = run(Part("part", "", (Command("tool", ("/nowhere/ncu",)),), 30), tmp_path)
    assert (outcome.code, outcome.passed) == (127, False)
    assert "nowhere" in (tmp_path / "tool.log").read_text()


def test_a_second_call_goes_on_with_what_is_new_before_what_was_late(tmp_path: Path) -> None:
    done = [Outcome("part", "passed", 0, 1.0), Outcome("part", "failed", 1, 1.0), Outcome("part", "late", None, 9.0)]
    ran = tmp_path / "ran"
    note = f"print(file=open({str(ran)!r}, 'a'), *__import__('sys').argv[1:])"
    commands = tuple(
        Command(name, (sys.executable, "-c", note, name)) for name in ("late", "passed", "failed", "new", "newer")
    )
    outcomes = run_parts([Part("part", "", commands, 60)], tmp_path, {}, 60, done)
    assert ran.read_text().split() == ["new", "newer", "late"]
    assert {one.command: one.code for one in outcomes} == {"passed": 0, "failed": 1, "late": 0, "new": 0, "newer": 0}


PARTS = [part.name for part in parts(Path("folder"), Machine(2), FAMILIES)]


@pytest.mark.stock  # the script, which is the same in every mode
@pytest.mark.parametrize("fault", [pytest.param("hangs", marks=pytest.mark.thorough), "crashes", "fails"])
def test_a_fault_in_each_part_leaves_all_other_results(
    fault: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Planted before every part's own commands, which are replaced by one that takes no time."""
    folder = tmp_path / fault
    planned = []
    for part in parts(folder, Machine(2), FAMILIES):
        right = command(f"{part.name}-right", f"open({str(folder / part.name)!r}, 'w').write('kept')")
        planned.append(
            replace(part, commands=(command(f"{part.name}-faulty", FAULTS[fault]), right), jobs=1, limit=3.0)
        )
    code = gpu_run.call(planned, folder, None, Machine(2), {}, 120)
    assert code == 1
    summary = json.loads((folder / gpu_run.SUMMARY).read_text())
    codes = {one["command"]: one["code"] for one in summary["outcomes"]}
    expected = {"hangs": None, "crashes": -6, "fails": 1}[fault]
    assert codes == {**{f"{name}-right": 0 for name in PARTS}, **{f"{name}-faulty": expected for name in PARTS}}
    assert all((folder / name).read_text() == "kept" for name in PARTS)
    assert set(summary["failed"]) == {f"{name}-faulty" for name in PARTS}
    assert "smoke-faulty" in capsys.readouterr().out


def test_a_report_that_takes_too_long_costs_itself(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    planned = [
        Part("part", "", (command("one", f"open({str(tmp_path / 'benchmarks.json')!r}, 'w').write('{{}}')"),), 30)
    ]
    monkeypatch.setattr(gpu_run, "_FOR_REPORTS", 0.05)
    assert gpu_run.call(planned, tmp_path, None, Machine(2), {}, 60) == 0
    assert "no time was left for report.md" in capsys.readouterr().out
    assert gpu_run.read_outcomes(tmp_path)[0].passed


def test_without_a_gpu_nothing_is_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gpu_run, "_has_gpu", lambda environment: False)
    assert gpu_run.main([str(tmp_path / "run")]) == 2
    assert not (tmp_path / "run").exists()


def test_counters_are_read_from_nsight_computes_lines() -> None:
    listing = """==PROF== Connected
"ID","Kernel Name","Metric Name","Metric Unit","Metric Value"
"0","relu","dram__bytes_read.sum","Mbyte","1.5"
"0","relu","dram__bytes_write.sum","Kbyte","500"
"0","relu","gpu__time_duration.sum","ns","2,500"
"0","relu","smsp__issue_active.avg.pct_of_peak_sustained_active","%","41.5"
"1","pool","l1tex__data_bank_conflicts_pipe_lsu_mem_shared.sum","","7"
"""
    (relu, first), (pool, second) = counters.parse(listing)
    assert (relu, pool) == ("relu", "pool")
    assert first == {"dram_bytes": 2e6, "duration_us": 2.5, "issue_percent": 41.5, "bank_conflicts": 0.0}
    assert second["bank_conflicts"] == 7


def test_launches_are_those_of_the_case_whose_mark_they_follow() -> None:
    launches = [(name, {}) for name in (f"at::{counters.MARK}(long)", "relu", "sum", counters.MARK, "pool")]
    assert [[name for name, _ in own] for own in counters.by_case(launches)] == [["relu", "sum"], ["pool"]]


def test_thresholds_follow_from_figures_with_sources() -> None:
    """One file has them; what benchmarks predict with is the same machine."""
    assert [figures.most_convolution_depth(window) for window in (1, 2, 3)] == [416, 416, 96]
    assert {name: figures.most_maxout_features(name) for name in figures.MATRIX_RATES} == {
        **dict.fromkeys(("bf16", "fp16", "tf32"), 512),
        "fp32": 256,
    }
    assert figures.most_maxout_features_backward() == 64
    machine = json.loads((BENCH / "machine.json").read_text())
    assert figures.COPY_RATE.number == machine["copy_bytes_per_second"]
    assert figures.MATRIX_RATES["bf16"].number == machine["matrix_operations_per_second"]
    tables = (figures.MATRIX_RATES, figures.RELATIVE_RATES)
    every = (figures.COPY_RATE, figures.DRIVER_LAUNCH, *(figure for table in tables for figure in table.values()))
    assert all(figure.source and figure.unit for figure in every)


@pytest.mark.parametrize("figure", ["COPY_RATE", "MATRIX_RATES", "RELATIVE_RATES"])
def test_a_corrected_figure_moves_the_thresholds(figure: str, monkeypatch: pytest.MonkeyPatch) -> None:
    before = figures.most_convolution_depth(2), figures.most_maxout_features("bf16")
    value = getattr(figures, figure)

    def halved(one: figures.Figure) -> figures.Figure:
        return one._replace(number=one.number / 2)

    theirs = {"convolution in cuDNN": 1.0, "maxout in one kernel": 0.5}
    changed = halved(value) if figure == "COPY_RATE" else {key: halved(one) for key, one in value.items()}
    if figure == "RELATIVE_RATES":
        changed = {key: one._replace(number=theirs.get(key, one.number)) for key, one in value.items()}
    monkeypatch.setattr(figures, figure, changed)
    after = figures.most_convolution_depth(2), figures.most_maxout_features("bf16")
    larger = figure == "COPY_RATE"
    assert all((new > old) == larger and new != old for new, old in zip(after, before, strict=True))


@pytest.mark.parametrize("question", ["small", "clusters"])
def test_sizes_lie_about_what_the_hosts_figures_say(question: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(thresholds, "TIMED", True)
    found: dict[str, dict[int, bool]] = {}
    for case in thresholds.questions()[question].cases:
        found.setdefault(case.operation.name, {})[case.numel * case.dtype.itemsize] = thresholds.takes_kernel(case)
    assert len(found) >= 3
    for name, takes in found.items():
        most = figures.most_small_bytes(thresholds._FIRST_LAYER.get(name, name), differentiable=True)
        assert min(takes) < most / 15 < 7 * most < max(takes)
        # What is several layers in one is our kernel's at any size.
        assert takes == {size: question == "clusters" or size > most for size in takes}


@pytest.mark.interpreter
def test_thresholds_give_both_answers() -> None:
    asked = thresholds.questions()
    assert set(asked) == set(QUESTIONS)
    question = asked["maxout"]
    records = list(thresholds.contest(question.cases[0], question.predicate))
    launches = {
        name: sum(record["kernel_launches"] for record in records if record["contestant"] == name)
        for name in ("one kernel", "apart")
    }
    operations = {
        name: sum(record["aten_operations"] for record in records if record["contestant"] == name)
        for name in ("one kernel", "apart")
    }
    assert launches != operations
    assert operations["one kernel"] < operations["apart"]  # whose product is PyTorch's
    assert {record["contestant"] for record in records if record["taken"]} == {"one kernel"}


@pytest.mark.interpreter
def test_a_way_that_isnt_taken_is_said_to_be_the_other(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(linear_maxout, "_MOST_FEATURES", dict.fromkeys(figures.MATRIX_RATES, 16))
    question = thresholds.questions()["maxout"]
    records = thresholds.contest(question.cases[0], question.predicate)
    assert {record["contestant"] for record in records if record["taken"]} == {"apart"}


@pytest.mark.thorough
@pytest.mark.stock
def test_rehearsal(tmp_path: Path) -> None:
    """The first command of every part, as on a GPU, beside planted faults; then again, from what came back."""
    first, second = tmp_path / "first", tmp_path / "second"
    machine = Machine(2, rehearsal=True, scale=0.1, most=1)
    failing = tmp_path / "test_fails.py"
    failing.write_text("def test_fails() -> None:\n    raise AssertionError\n")
    planned = [with_faults(part, failing) for part in parts(first, machine, gpu_run._families())]
    started = time.monotonic()
    gpu_run.call(planned, first, None, machine, gpu_run._environment(machine, None), 600)
    assert time.monotonic() - started < sum(part.seconds for part in planned) + 60
    summary = json.loads((first / gpu_run.SUMMARY).read_text())
    codes = {(one["part"], one["command"]): one["code"] for one in summary["outcomes"]}
    for part in planned:
        right, *faulty = (codes[part.name, one.name] for one in part.commands)
        assert faulty == [-6, 1, None], part.name
        # Out of time, on a busy machine, but never wrong.
        assert right in (None, 0, NO_TESTS), summary["failed"][part.commands[0].name]

    line = [sys.executable, str(BENCH / "gpu_run.py"), "--rehearse", "--scale=0.1", "--most=1", str(second)]
    done = subprocess.run([*line, "--after", str(first)], capture_output=True, text=True, check=False)
    assert done.returncode in (0, 1), done.stderr
    for folder in (first, second):
        assert len(list(folder.iterdir())) <= 8
        assert (folder / gpu_run.REPORT).read_text().startswith("# Failed")
    again = json.loads((second / gpu_run.SUMMARY).read_text())
    assert again["rehearsal"]
    codes_again = {(one["part"], one["command"]): one["code"] for one in again["outcomes"]}
    assert all(codes_again[key] == code for key, code in codes.items() if code is not None)  # not run again
    assert {code for (_, name), code in codes_again.items() if "planted" not in name} <= {0, NO_TESTS, None}


def with_faults(part: Part, failing: Path) -> Part:
    """With its own first command before them, side by side, as far as that lets itself."""
    tests = Command(f"planted-{part.name}-test", (sys.executable, "-m", "pytest", "-q", str(failing)))
    faults = [command(f"planted-{part.name}-{fault}", FAULTS[fault]) for fault in ("crashes", "hangs")]
    return replace(part, seconds=35, jobs=2, commands=(*part.commands, faults[0], tests, faults[1]))
