"""Result files: what is written, what is refused, and what reports make of them."""

# ruff: noqa: E402
from __future__ import annotations

import copy
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

BENCH = Path(__file__).resolve().parents[1] / "bench"
sys.path.insert(0, str(BENCH))  # the benchmarks are no package: they are not installed

import report
from fusednn_bench import documents, environment, exceptions, plots, provenance, render, results, schema, tables
from fusednn_bench.goals import Goal, judge, load_goals
from fusednn_bench.memory import NETWORKS

pytestmark = pytest.mark.stock  # nothing here depends on where kernels run
GPU = {"device": "Some GPU 9000", "driver": "1.2", "torch": "2", "triton": "3", "python": "3", "cuda": "13"}

RECOMPUTE = "fusednn-recompute"


def _case(contestant: str, direction: str, operation: str = "relu", **extra: Any) -> dict[str, Any]:
    return {
        "family": "activation",
        "operation": operation,
        "contestant": contestant,
        "direction": direction,
        "dtype": "bf16",
        "size": "large",
        "shape": [64, 64],
        "budget_bytes": 4000.0,
        **extra,
    }


def _timed(contestant: str, direction: str, median: float, **extra: Any) -> dict[str, Any]:
    """A case with 21 samples about a median."""
    samples = {f"{field}_us": [m * (0.9 + 0.01 * i) for i in range(21)] for field, m in extra.pop("also", {}).items()}
    record = _case(contestant, direction, device_us=[median * (0.9 + 0.01 * i) for i in range(21)], **samples)
    facts = {"calls_per_sample": 1, "sets": 4, "peak_bytes": 1_000_000, "kept_bytes": 500, "error_epsilons": 0.5}
    return results.with_spreads({**record, "operations": 0, **facts, **extra})


def _new(kind: str, **settings: Any) -> dict[str, Any]:
    source = {"commit": "0123456789abcdef" * 2 + "01234567", "dirty": False, "sha256": "ab" * 32}
    result = results.new_result(kind, GPU, source, settings)
    result["complete"] = True
    return result


@pytest.fixture(autouse=True)
def _no_repository(monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest) -> None:
    """The results of these tests name commits that don't exist; tests of provenance have a repository of their own."""
    if "repository" not in request.fixturenames:
        monkeypatch.setattr(report, "source_problems", lambda result: [])


@pytest.fixture
def result() -> dict[str, Any]:
    timed = _new("timed", selection="quick")
    timed["copy"] = {"bytes": 8000, "samples_us": [2.0, 2.0, 3.0]}  # 4000 bytes a microsecond
    timed["matrix_product"] = {"operations": 8000, "dtype": "bf16", "samples_us": [2.0]}
    small = {"size": "lenet"}
    timed["cases"] = [
        _timed("fusednn", "forward", 1.0),
        _timed("eager", "forward", 0.9, kept_bytes=1000),
        _timed("fusednn", "backward", 1.25),
        _timed("eager", "backward", 2.0),
        _timed("fusednn", "forward_backward", 2.0),
        _timed("fusednn", "forward_backward", 1.0, **small, also={"host": 20.0, "wall": 30.0}),
        _timed("eager", "forward_backward", 1.0, **small, also={"host": 20.0, "wall": 20.0}),
    ]
    return timed


@pytest.fixture
def counted() -> dict[str, Any]:
    counts = {"bytes": 4000, "launches": 1, "kernel_launches": 1, "aten_operations": 0, "elements": 1000}
    result = _new("counted")
    result["cases"] = [
        _case(contestant, direction, **counts, **({"saved_bytes": 10} if direction == "forward" else {}))
        for contestant in ("fusednn", "eager")
        for direction in ("forward", "backward")
    ]
    return result


@pytest.fixture
def predicted() -> dict[str, Any]:
    machine = {
        "name": "A machine",
        "source": "Its maker.",
        "copy_bytes_per_second": 4e12,
        "matrix_operations_per_second": 8e14,
    }
    result = _new("predicted", machine=machine)
    work = {"bytes": 8e6, "operations": 800, "predicted_us": 2.0}
    result["cases"] = [
        _case("fusednn", "forward", **work, operations_bound=False),
        _case("eager", "forward", **work | {"bytes": 16e6, "predicted_us": 4.0}, operations_bound=False),
    ]
    return result


@pytest.fixture
def compiled() -> dict[str, Any]:
    resources = {"threads": 128, "registers": 40, "spills": 0, "shared_bytes": 0, "occupancy": 0.75}
    result = _new("compiled")
    kernel = {"family": "activation", "kernel": "a_kernel", "configuration": "relu", "target": "sm_90"}
    result["cases"] = [{**kernel, **resources, "access_bits": 128, "tensor_cores": False}]
    return result


@pytest.fixture
def instructions() -> dict[str, Any]:
    result = _new("instructions", machine={"name": "A machine"})
    figures = {"programs": 8, "threads": 128, "registers": 40, "spills": 0, "bytes": 4000, "elements": 1000}
    executed = {
        "kernel": "a_kernel",
        "instructions": 5.0,
        "instructions_by_pipe": {"ALU": 3.0, "others": 2.0},
        "once": 9,
        "each": 0,
    }
    ratios = {"issue_over_bytes": 0.5, "busiest_pipe": "ALU", "busiest_over_bytes": 0.8}
    there = {"trips": 0, "programs_at_once": 4.0, "bytes_in_flight": 4096, "configuration": "relu forward"}
    result["cases"] = [
        _case("fusednn", direction, **figures, **executed, **ratios, **there) for direction in ("forward", "backward")
    ]
    return result


@pytest.fixture
def memory() -> dict[str, Any]:
    kept = {"eager": 1000, "compile": 900, "checkpoint": 100, "fusednn": 800, "fusednn-recompute": 500, "depth 0": 600}
    result = _new("memory")
    result["cases"] = [{**NETWORKS[0].record(name), "kept_bytes": size} for name, size in kept.items()]
    for case in result["cases"]:
        if case["contestant"] not in ("compile", "checkpoint"):
            size = case["kept_bytes"]
            case["kept_bytes_by_maker"] = {"MkldnnConvolution": size - 100, "statistics": 100}
            case["bytes"] = 10000 if case["contestant"] == "fusednn" else 11500
            case["peak_bytes"] = 2 * size
    return result


# --- Files ------------------------------------------------------------------------------------------------------------


def test_result_survives_writing_and_is_never_overwritten(result: dict[str, Any], tmp_path: Path) -> None:
    first, second = (results.reserve_file(result, tmp_path / "new") for _ in range(2))
    assert first.name.startswith("some-gpu-9000-2")
    assert first != second
    results.save_result(result, first)
    assert results.load_result(first) == result


def test_a_file_is_replaced_whole_or_not_at_all(result: dict[str, Any], tmp_path: Path) -> None:
    file = tmp_path / "result.json"
    results.save_result(result, file)
    broken = {**result, "settings": {"limit": float("nan")}}
    with pytest.raises(ValueError, match="JSON compliant"):
        results.save_result(broken, file)
    assert results.load_result(file) == result
    assert list(tmp_path.iterdir()) == [file]


def test_a_record_is_a_line(counted: dict[str, Any], tmp_path: Path) -> None:
    results.save_result(counted, tmp_path / "counted.json")
    lines = (tmp_path / "counted.json").read_text().splitlines()
    assert sum('"operation": "relu"' in line for line in lines) == 4


def _set(result: Any, path: tuple[Any, ...], value: Any) -> Any:
    broken = copy.deepcopy(result)
    *parents, last = path
    place = broken
    for key in parents:
        place = place[key]
    if value is ...:
        del place[last]
    else:
        place[last] = value
    return broken


def _refused(broken: Any, message: str, folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = folder / "broken.json"
    file.write_text(json.dumps(broken))
    with pytest.raises(results.InvalidResultError, match=message):
        results.load_result(file)
    capsys.readouterr()
    assert report.main([str(file)]) == 1
    assert "broken.json: " in capsys.readouterr().err


@pytest.mark.parametrize(
    ("path", "value", "message"),
    [
        (("schema_version",), 99, "schema version 99"),
        (("source", "commit"), None, "no commit"),
        (("source", "commit"), "main", "no commit"),
        (("source", "sha256"), "ab", "no digest"),
        (("source", "dirty"), "perhaps", "whether the sources were changed"),
        (("source",), [], "no commit"),
        (("environment", "device"), "", "no device"),
        (("environment", "torch"), ..., "no version of torch"),
        (("date",), "yesterday", "no date"),
        (("settings",), None, "no settings"),
        (("left_out",), None, "no list of what was left out"),
        (("kind",), "guessed", "unknown kind"),
        (("cases",), [], "no cases"),
        (("cases",), {"a": 1}, "no cases"),
        (("cases", 3), "a case", "case 3: not an object"),
        (("cases", 1, "device_us"), [], "case 1: no samples"),
        (("cases", 1, "device_us", 7), 0.0, "case 1: no samples"),
        (("cases", 1, "device_us", 7), -1.0, "case 1: no samples"),
        (("cases", 1, "device_us", 7), float("nan"), "NaN is no number"),
        (("cases", 1, "device_us", 7), float("inf"), "Infinity is no number"),
        (("cases", 1, "device_us", 7), "fast", "case 1: no samples"),
        (("cases", 1, "device_us", 7), ..., "case 1: samples of the device time are missing"),
        (("cases", 1, "device_us"), [0.9] * 5, "case 1: 5 samples of the device time, fewer than 20"),
        (("cases", 1, "device_us", 10), 0.5, "case 1: median of the device time, 0.9, doesn't follow"),
        (("cases", 1, "device_spread_us", "median"), 0.1, "case 1: median of the device time, 0.1, doesn't follow"),
        (("cases", 1, "device_spread_us", "p90"), 0.1, "case 1: p90"),
        (("cases", 1, "device_spread_us"), ..., "case 1: samples of the device time are missing"),
        (("cases", 6, "wall_us"), [20.0] * 21, "case 6: p10 of the wall time"),
        (("cases", 2, "dtype"), None, "case 2: no dtype"),
        (("cases", 2, "budget_bytes"), 0, "case 2: no budget"),
        (("cases", 2, "peak_bytes"), -1, "case 2: peak bytes -1 is no number from 0"),
        (("cases", 2, "anything"), -1.5, "case 2: anything is -1.5"),
        (("cases", 2, "error_epsilons"), ..., "case 2: error epsilons None"),
        (("cases", 2, "direction"), "forward", "case 2: the same as case 0"),
        (("copy",), None, "no copy"),
        (("copy", "samples_us"), [], "no samples of the copy"),
        (("matrix_product",), ..., "no matrix product"),
        (("matrix_product", "operations"), 0, "no matrix product"),
    ],
)
def test_falsified_times_are_refused(
    result: dict[str, Any],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    path: tuple[Any, ...],
    value: Any,
    message: str,
) -> None:
    assert schema.problems(result) == []
    _refused(_set(result, path, value), message, tmp_path, capsys)


def test_falsified_counts_and_predictions_are_refused(
    counted: dict[str, Any],
    predicted: dict[str, Any],
    compiled: dict[str, Any],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    for valid, path, value, message in (
        (counted, ("cases", 0, "launches"), 0, "launches 0 is no number above 0"),
        (counted, ("cases", 0, "launches"), 2, "launches are not those of kernels and operators"),
        (counted, ("cases", 0, "bytes"), None, "bytes None is no number"),
        (
            predicted,
            ("cases", 0, "predicted_us"),
            1.0,
            "predicted 1.0 us don't follow from bytes, operations and instructions",
        ),
        (predicted, ("cases", 0, "bytes"), 4e6, "don't follow"),
        (predicted, ("settings", "machine"), None, "no machine"),
        (predicted, ("settings", "machine", "copy_bytes_per_second"), -1, "no machine"),
        (compiled, ("cases", 0, "registers"), 0, "registers 0 is no number above 0"),
        (compiled, ("cases", 0, "target"), None, "no target"),
    ):
        assert schema.problems(valid) == []
        _refused(_set(valid, path, value), message, tmp_path, capsys)


def test_files_that_are_no_results_are_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for name, text in (("empty", ""), ("list", "[]"), ("text", "no JSON"), ("deep", "[" * 100_000)):
        (tmp_path / f"{name}.json").write_text(text)
        assert report.main([str(tmp_path / f"{name}.json")]) == 1
        assert f"{name}.json" in capsys.readouterr().err
    assert report.main([str(tmp_path / "absent.json")]) == 1
    assert report.main([]) == 2


# --- Sources ----------------------------------------------------------------------------------------------------------


def _git(folder: Path, *arguments: str) -> str:
    identity = ("-c", "user.name=A", "-c", "user.email=a@example.org", "-c", "commit.gpgsign=false")
    command = ["git", *identity, "-C", str(folder), *arguments]
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout.strip()


@pytest.fixture
def repository(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """One with a commit, in which the reports of this test look for commits."""
    root = tmp_path / "repository"
    for folder, text in (("kernels", "1"), ("bench/fusednn_bench", "2"), ("bench", "3"), ("bench-not", "4")):
        (root / folder).mkdir(parents=True, exist_ok=True)
        (root / folder / "a.py").write_text(text)
    _git(root, "init", "-q")
    _git(root, "add", ".")
    _git(root, "commit", "-qm", "first")
    monkeypatch.setattr(report, "source_problems", lambda result: provenance.source_problems(result, root))
    return root


def test_sources_have_to_be_those_of_the_commit(
    result: dict[str, Any], repository: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "result.json"
    result["source"] |= {"commit": _git(repository, "rev-parse", "HEAD"), "sha256": "ab" * 32}
    results.save_result(result, file)
    assert report.main([str(file)]) == 1
    assert "aren't those of commit" in capsys.readouterr().err

    result["source"]["sha256"] = environment.source_digest(repository)
    results.save_result(result, file)
    assert report.main([str(file)]) == 0

    result["source"]["commit"] = "0" * 40
    results.save_result(result, file)
    assert report.main([str(file), "--uncommitted"]) == 1
    assert f"commit {'0' * 40} isn't in this repository" in capsys.readouterr().err


def test_changed_sources_need_to_be_asked_for(result: dict[str, Any], repository: Path, tmp_path: Path) -> None:
    (repository / "kernels" / "a.py").write_text("changed")
    commit, digest = _git(repository, "rev-parse", "HEAD"), environment.source_digest(repository)
    result["source"] = {"commit": commit, "sha256": digest, "dirty": True}
    results.save_result(result, tmp_path / "result.json")
    assert report.main([str(tmp_path / "result.json")]) == 1
    output = tmp_path / "report.md"
    assert report.main([str(tmp_path / "result.json"), "--uncommitted", "-o", str(output)]) == 0
    assert "**changed since**" in output.read_text()


def test_without_a_repository_or_in_a_shallow_one_the_file_is_believed(
    result: dict[str, Any], repository: Path, tmp_path: Path
) -> None:
    assert provenance.source_problems(result, tmp_path) == []
    (repository / "kernels" / "a.py").write_text("2")
    _git(repository, "commit", "-qam", "second")
    shallow = tmp_path / "shallow"
    _git(tmp_path, "clone", "-q", "--depth=1", repository.as_uri(), str(shallow))
    result["source"]["commit"] = _git(repository, "rev-parse", "HEAD^")
    assert provenance.source_problems(result, shallow) == []
    assert provenance.source_problems(result, repository) != []


def test_sources_are_described(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "kernels").mkdir()
    (tmp_path / "kernels" / "a.py").write_text("1")
    first = environment.source_digest(tmp_path)
    (tmp_path / "kernels" / "a.py").write_text("2")
    assert environment.source_digest(tmp_path) != first
    monkeypatch.setattr(environment, "ROOT", tmp_path)
    monkeypatch.setenv("FUSEDNN_COMMIT", "f" * 40)
    described = environment.describe_sources()
    assert (described["commit"], described["dirty"]) == ("f" * 40, None)


def test_settings_say_what_both_sides_run_with() -> None:
    settings = environment.describe_settings()
    assert {"autocast", "cudnn_benchmark", "cudnn_allow_tf32", "float32_matmul_precision"} <= set(settings)


# --- Goals ------------------------------------------------------------------------------------------------------------


def test_goals_are_judged_from_medians(result: dict[str, Any], counted: dict[str, Any]) -> None:
    verdicts = list(judge([result, counted], load_goals()))
    outcomes = {(v.goal.measure, v.goal.against, v.goal.direction): v for v in verdicts if v.operation}
    ahead = outcomes["speedup", "eager", "forward"]
    assert (ahead.value, ahead.outcome) == (pytest.approx(0.9), "missed")  # 0.95 wanted
    back = outcomes["speedup", "eager", "backward"]
    assert (back.value, back.outcome) == (pytest.approx(1.6), "met")
    rate = outcomes["percent_of_copy", None, "forward"]
    assert (rate.value, rate.outcome) == (pytest.approx(100.0), "met")
    assert outcomes["percent_of_copy", None, "backward"].outcome == "missed"  # 80 %
    assert outcomes["speedup", "compile", "forward_backward"].outcome == "unmeasured"  # no such contestant
    wall = outcomes["wall_slowdown", "eager", "forward_backward"]
    assert (wall.value, wall.outcome) == (pytest.approx(1.5), "missed")
    assert {v.goal for v in verdicts} == set(load_goals())  # those of other families are unmeasured


def test_a_goal_may_be_of_memory(result: dict[str, Any]) -> None:
    goal = Goal("memory", ("relu",), "forward", ("large",), "memory", "eager", at_most=0.6)
    (verdict,) = judge([result], [goal])
    assert (verdict.value, verdict.outcome) == (0.5, "met")


def test_a_goal_may_be_of_the_matrix_products_rate(result: dict[str, Any]) -> None:
    result["cases"] = [_timed("fusednn", "forward", 2.0, operations=4000)]  # the product: 4000 in a microsecond
    goal = Goal("products", ("relu",), "forward", ("large",), "percent_of_product", at_least=88)
    (verdict,) = judge([result], [goal])
    assert (verdict.value, verdict.outcome) == (pytest.approx(50), "missed")


# --- Reports ----------------------------------------------------------------------------------------------------------


def test_report_shows_times_goals_losses_and_origin(result: dict[str, Any], tmp_path: Path) -> None:
    result["left_out"] = [{"case": "relu-bf16-large", "contestant": "compile", "reason": "no compiler"}]
    file = tmp_path / "times.json"
    results.save_result(result, file)
    assert report.main([str(file), "-o", str(tmp_path / "report.md"), "--plots", str(tmp_path / "plots")]) == 0
    text = (tmp_path / "report.md").read_text()
    words = ("Some GPU 9000", result["source"]["commit"], file.name, "4 GB/s", "no compiler", "Slower than another: 1")
    for word in (*words, "**0.90**", "](plots/times-roofline.png)"):
        assert word in text
    assert f"2 met, 3 missed, {len(load_goals()) - 5} unmeasured" in text
    assert "incomplete" not in text
    assert "incomplete" in render.render({"name": {**result, "complete": False}}, load_goals())


def test_what_was_not_timed_says_so(
    counted: dict[str, Any], predicted: dict[str, Any], compiled: dict[str, Any]
) -> None:
    text = render.render({"c": counted, "p": predicted, "r": compiled}, load_goals())
    for words in ("No GPU has run these kernels yet", "nothing was timed", "## Predictions, not measurements"):
        assert words in text
    assert "A machine: 4 TB/s, 800 TFLOP/s. Its maker." in text
    assert "a_kernel" in text
    assert "0 met, 0 missed" in text
    assert "No GPU has run" in render.summary({"c": counted}, load_goals())


def test_instructions_are_shown(instructions: dict[str, Any]) -> None:
    assert schema.problems(instructions) == []
    row = next(line for line in render.render({"i": instructions}, []).splitlines() if line.startswith("| relu forw"))
    assert [cell.strip() for cell in row.split("|")[4:9]] == ["5.00", "3.00", "0.50", "ALU", "**0.80**"]
    instructions["cases"][0]["instructions"] = 6.0
    assert schema.problems(instructions) == ["case 0: instructions are not those of the pipes"]


def test_memory_is_judged_and_shown(memory: dict[str, Any]) -> None:
    goals = [
        Goal("kept", (NETWORKS[0].name,), "training_step", ("small",), "memory", "eager", at_most=0.6, of=RECOMPUTE),
        Goal(
            "moved", (NETWORKS[0].name,), "training_step", ("small",), "traffic", "fusednn", at_most=1.1, of=RECOMPUTE
        ),
    ]
    assert schema.problems(memory) == []
    assert [(verdict.value, verdict.outcome) for verdict in judge([memory], goals)] == [(0.5, "met"), (1.15, "missed")]
    text = render.render({"m": memory}, goals)
    row = next(line for line in text.splitlines() if line.startswith(f"| {NETWORKS[0].name}"))
    assert [cell.strip() for cell in row.split("|")[2:-1]] == [
        "4x3x32x32",
        "0.00",
        "0.90",
        "0.10",
        "0.80",
        "0.50",
        "1.15",
        "0.50",
    ]
    shown = [[cell.strip() for cell in line.split("|")[1:-1]] for line in text.splitlines()]
    assert [NETWORKS[0].name, "0", "0.60", "1.15", "0.60"] in shown
    assert [NETWORKS[0].name, "MkldnnConvolution", "0.80"] in shown
    memory["cases"][0]["kept_bytes_by_maker"]["statistics"] += 1
    assert schema.problems(memory) == ["case 0: kept bytes are not those of their makers"]
    del memory["cases"][0]["kept_bytes_by_maker"]
    del memory["cases"][0]["kept_bytes"]
    assert schema.problems(memory) == ["case 0: kept bytes None is no number from 0"]


def test_the_guide_says_what_is_kept_and_which_goals_are_missed(memory: dict[str, Any], tmp_path: Path) -> None:
    (tmp_path / "docs").mkdir()
    (tmp_path / "README.md").write_text("Before\n")
    guide = tmp_path / "docs" / "memory.md"
    guide.write_text(
        "".join(f"<!-- {name}: begin (from bench/results) -->\n<!-- {name}: end -->\n" for name in ("layers", "missed"))
    )
    for case in memory["cases"]:
        case["operation"] = "BERT block"
        if case["contestant"] == RECOMPUTE:
            case["kept_bytes"] = 600
    census = _new("census")
    layers = [["attention.self", "Linear", "Addmm", 400]]
    census["cases"] = [{**memory["cases"][4], "kept_bytes_by_layer": layers}]
    found = {"census.json": census, "memory.json": memory}
    documents.write(found, tmp_path)
    lines = guide.read_text().splitlines()
    row = next([cell.strip() for cell in line.split("|")[1:-1]] for line in lines if "attention.self" in line)
    assert row == ["BERT block", "attention.self", "Linear", "Addmm", "0.667"]
    assert any(line.startswith("- BERT block: 0.600, wanted <= 0.58: the goal was set") for line in lines)
    assert documents.stale(found, tmp_path) == []


def test_a_count_that_was_interrupted_between_contestants(counted: dict[str, Any]) -> None:
    whole = tables.counted_tables(counted["cases"])
    ours = {**counted["cases"][0], "operation": "gelu"}
    assert ours["contestant"] == "fusednn"
    for contestant in ("fusednn", "eager"):
        assert tables.counted_tables([*counted["cases"], {**ours, "contestant": contestant}]) == whole


def test_plots_of_each_kind(
    result: dict[str, Any],
    counted: dict[str, Any],
    predicted: dict[str, Any],
    memory: dict[str, Any],
    instructions: dict[str, Any],
    tmp_path: Path,
) -> None:
    for kind in (result, counted, predicted, memory, instructions):
        drawn = plots.draw_plots(kind, f"{kind['kind']}.json", tmp_path)
        assert [plot.name for plot in drawn] == plots.plot_names(kind, f"{kind['kind']}.json") != []
        for plot in drawn:
            assert plot.read_bytes().startswith(b"\x89PNG")
            assert plots.digest_of_plot(plot) == plots.plot_digest(kind)
    counted["cases"][0]["bytes"] += 1
    assert plots.digest_of_plot(tmp_path / "counted-bytes-against-eager.png") != plots.plot_digest(counted)


def test_tables_line_up() -> None:
    lines = tables.markdown_table(("name", "value"), [("a", 1.0), ("long name", None), ("b", 12345)]).splitlines()
    assert len({len(line) for line in lines}) == 1
    assert lines[2].endswith(" 1.00 |")


def test_documents_are_written_and_noticed_when_stale(counted: dict[str, Any], tmp_path: Path) -> None:
    (tmp_path / "docs").mkdir()
    readme = tmp_path / "README.md"
    begin, end = "<!-- benchmarks: begin (python -m fusednn bench report --docs) -->", "<!-- benchmarks: end -->"
    readme.write_text(f"Before\n{begin}\nold\n{end}\nAfter\n")
    found = {"counted.json": counted}
    assert documents.stale(found, tmp_path)
    documents.write(found, tmp_path)
    assert documents.stale(found, tmp_path) == []
    assert readme.read_text().startswith("Before\n<!--")
    assert "old" not in readme.read_text()
    counted["cases"][0]["bytes"] += 1000
    stale = {path.name for path in documents.stale(found, tmp_path)}
    assert stale == {
        "benchmarks.md",
        "counted-bytes-against-eager.png",
        "counted-saved-activation-memory.png",
    }
    documents.write({}, tmp_path)
    assert not list((tmp_path / "docs" / "benchmarks").glob("*.png"))


def test_committed_documents_are_current() -> None:
    """Every figure in README and docs about bytes, launches, registers or times follows from committed files."""
    assert report.main(["--docs", "--check"]) == 0, "run: python -m fusednn bench report --docs"


# --- On the host ------------------------------------------------------------------------------------------------------


def test_kernels_that_instructions_bind_have_a_reason() -> None:
    cases = results.load_result(environment.ROOT / "bench" / "results" / "instructions.json")["cases"]
    assert set(exceptions.worst_ratios(cases)) == set(exceptions.EXCEPTIONS)


@pytest.fixture
def host() -> dict[str, Any]:
    result = _new("host", threads=1)
    for contestant, microseconds in (("fusednn", 30.0), ("eager", 20.0), ("eager, fused", 60.0)):
        samples = [microseconds] * 5 + [10 * microseconds] * 20  # a machine that is quiet now and then
        counts = {"launches": 2, "prepared": 0, "dispatched": 0}
        record = _case(contestant, "step", **counts, cpu_us=samples)
        result["cases"].append({**record, "operation": "Adam", "size": "tiny"})
    return result


def test_host_time_is_a_quiet_machines(host: dict[str, Any]) -> None:
    assert schema.problems(host) == []
    text = render.render({"host.json": host}, [])
    (row,) = [line for line in text.splitlines() if line.startswith("| Adam")]
    figures = [word for word in row.replace(":", " ").split() if "." in word]
    assert figures == ["30.00", "300.00", "20.00", "200.00", "1.50", "60.00", "0.50"]


@pytest.mark.parametrize(("against", "outcome"), [("eager", "missed"), ("eager, fused", "met"), ("none", "unmeasured")])
def test_goals_of_host_time(against: str, outcome: str, host: dict[str, Any]) -> None:
    goal = Goal("Adam", ("Adam",), "step", ("tiny",), "host_slowdown", against, at_most=1.0)
    assert [verdict.outcome for verdict in judge([host], [goal])] == [outcome]


@pytest.mark.parametrize("key", ["cpu_us", "launches", "prepared", "dispatched"])
def test_host_records_are_whole(key: str, host: dict[str, Any]) -> None:
    del host["cases"][0][key]
    assert schema.problems(host)
