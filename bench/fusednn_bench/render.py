"""A report of results as Markdown: every figure in it comes from a result file."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import Any, NamedTuple

from .exceptions import exceptions_table
from .goals import OUTCOMES, Goal, judge
from .gpu_tables import (
    counters_table,
    host_model_table,
    issue_table,
    next_steps,
    predictions_table,
    thresholds_table,
)
from .memory_table import layers_table, memory_table, peak_table
from .tables import (
    compiled_table,
    counted_tables,
    host_table,
    inductor_table,
    instructions_table,
    markdown_table,
    network_table,
    predicted_table,
    slower,
    timed_tables,
)

__all__ = ["render", "summary"]

Results = Mapping[str, Mapping[str, Any]]  # by the name of the file

_ORDER = (
    "timed",
    "thresholds",
    "counters",
    "host",
    "memory",
    "census",
    "peak",
    "inductor",
    "counted",
    "predicted",
    "instructions",
    "compiled",
)


def render(
    results: Results, goals: Sequence[Goal], plots: Iterable[Path] = (), beside: Results = MappingProxyType({})
) -> str:
    """The report of valid results, from their data alone.  ``plots`` are shown where a result's file name begins
    their own; results ``beside`` are compared with, and not shown.
    """
    everything = {**beside, **results}
    drawn = list(plots)
    parts = ["# Benchmarks", _state(results)]
    for name, result in sorted(results.items(), key=lambda item: (_ORDER.index(item[1]["kind"]), item[0])):
        parts += [_SECTIONS[result["kind"]](result, name)]
        parts += [f"![{_caption(plot, name)}]({plot.as_posix()})" for plot in drawn if _is_of(plot, name)]
        if result["left_out"]:
            rows = [(item["case"], item["contestant"] or "all", item["reason"]) for item in result["left_out"]]
            parts += ["### Left out", markdown_table(("case", "contestant", "reason"), rows)]
    for title, table in _COMPARISONS.items():
        if against := table(everything):
            parts += [f"## {title}: median (lowest to highest)", against]
    if steps := next_steps(results, goals, beside):
        parts += ["## What to do next, the worst first", "\n".join(f"1. {step}" for step in steps)]
    parts += ["## Goals", _goals(results, goals)]
    return "\n\n".join(parts) + "\n"


#: Of a GPU's figures with those that were made without one.
_COMPARISONS: dict[str, Callable[[Results], str]] = {
    "Measured over predicted device time": predictions_table,
    "Measured over modelled host time": host_model_table,
    "Issued over expected instructions": issue_table,
}


def summary(results: Results, goals: Sequence[Goal]) -> str:
    """What there is to say in a few lines."""
    return f"{_state(results)} {_count(results, goals)}"


def _state(results: Results) -> str:
    devices = sorted({result["environment"]["device"] for result in results.values() if result["kind"] == "timed"})
    if devices:
        return f"Timed on {', '.join(devices)}."
    return "**No GPU has run these kernels yet: nothing on this page is a measured time.**"


def _is_of(plot: Path, name: str) -> bool:
    return plot.name.startswith(f"{Path(name).stem}-")


def _caption(plot: Path, name: str) -> str:
    return plot.stem.removeprefix(f"{Path(name).stem}-").replace("-", " ")


def _origin(result: Mapping[str, Any], name: str) -> str:
    environment, source = result["environment"], result["source"]
    keys = ("driver", "torch", "triton", "python", "cuda")
    facts = [f"{key} {environment[key]}" for key in keys if environment.get(key)]
    facts += [f"{library} {version}" for library, version in environment.get("peers", {}).items()]
    state = {True: ", **changed since**", False: "", None: ", a copy without a repository"}[source["dirty"]]
    whole = "" if result["complete"] else ", **incomplete**: the run was interrupted"
    lines = [
        f"- Data: `{name}`, {result['date']}{whole}",
        f"- Device: {environment['device']}; {', '.join(facts)}",
        f"- Sources: commit {source['commit']}{state}; SHA-256 {source['sha256'][:16]}",
    ]
    return "\n".join(lines)


def _timed(result: Mapping[str, Any], name: str) -> str:
    losses = slower(result)
    settings = ", ".join(f"{key} {value}" for key, value in result["settings"].items())
    networks = network_table(result)
    parts = [
        f"## Timed on {result['environment']['device']}",
        f"{_origin(result, name)}\n- Settings of all contestants: {settings}",
        timed_tables(result),
        *(("### Networks", networks) if networks else ()),
        f"### Slower than another: {len(losses)}",
        markdown_table(("case", "contestant", "ratio"), losses) if losses else "Nowhere.",
    ]
    return "\n\n".join(parts)


def _counted(result: Mapping[str, Any], name: str) -> str:
    families: dict[str, list[Mapping[str, Any]]] = {}
    for case in result["cases"]:
        families.setdefault(case["family"], []).append(case)
    parts = [
        "## Counted bytes and launches",
        "Counted in Triton's interpreter; nothing was timed. A ratio above 1: eager PyTorch moves more. What a kernel "
        "of ours reads again counts again, though a cache would serve it (overlapping windows, tiles of products); "
        "what an operator of PyTorch's reads counts once. The tensors are small, so that sums and tables of fixed "
        "sizes weigh more than they would.",
        _origin(result, name),
    ]
    for family, cases in sorted(families.items()):
        parts += [f"### {family.replace('_', ' ').capitalize()}", counted_tables(cases)]
    return "\n\n".join(parts)


def _predicted(result: Mapping[str, Any], name: str) -> str:
    machine = result["settings"]["machine"]
    parts = [
        "## Predictions, not measurements",
        "Predicted device time = max(bytes / copy rate, operations / matrix rate, time of the instructions), of a call "
        "as a whole: a bound that no contestant reaches, without launches, caches or occupancy. Our bytes are the "
        "budget that the traffic meter holds the kernels to, our instructions those of the machine code, at the rate "
        "of the pipe that is busy the longest; eager's bytes are those of its ATen operators at that shape, and its "
        "instructions aren't known: where it is bound by them, too, the ratio is better than it looks.",
        f"{_origin(result, name)}\n- Machine: {machine['name']}: {machine['copy_bytes_per_second'] / 1e12:g} TB/s, "
        f"{machine['matrix_operations_per_second'] / 1e12:g} TFLOP/s. {machine['source']}",
        predicted_table(result["cases"]),
    ]
    return "\n\n".join(parts)


class _Section(NamedTuple):
    """A kind of result that is told by a few words and one table; ``words`` may name settings in braces."""

    title: str
    words: str
    table: Callable[[Mapping[str, Any]], str]

    def __call__(self, result: Mapping[str, Any], name: str) -> str:
        words = self.words.format(**{"over": "a driver that does nothing", **result["settings"]})
        return "\n\n".join([f"## {self.title}", words, _origin(result, name), self.table(result)])


def _of_cases(table: Callable[[Any], str]) -> Callable[[Mapping[str, Any]], str]:
    return lambda result: table(result["cases"])


def _instructions(cases: Sequence[Mapping[str, Any]]) -> str:
    return f"{instructions_table(cases)}\n\nExceptions, and why:\n\n{exceptions_table(cases)}"


_SECTIONS: dict[str, Callable[[Mapping[str, Any], str], str]] = {
    "inductor": _Section(
        "Compiled training steps",
        "Forward and backward as Inductor compiles them ({gpu}; nothing ran): the stock model, the same after "
        "`replace_layers`, and with `fuse=True`. Bytes of Inductor's kernels are its scheduler's, those of libraries "
        "and of our launches their operands and results, each once. bf16 is autocast's. Bold: more than stock.",
        _of_cases(inductor_table),
    ),
    "memory": _Section(
        "What networks keep for the backward pass",
        "Bytes of distinct memory that autograd saved, beside parameters, buffers and the input, in bfloat16, of eager "
        "PyTorch's. Compiled: torch.compile's own partition. Checkpointed: each block's input alone, or every fourth "
        "layer's, for which the whole forward pass is computed again. Fused: `replace_layers(model, fuse=True)`; made "
        "again: with `recompute=True`, whose gradients had the same bits. Moved: bytes of forward and backward, of "
        "those without making results again, launches as they move their operands. Peak: the most that tensors held at "
        "one time, beside parameters and the input, of eager's, while each parameter's gradient is let go as it "
        "comes; cuDNN's workspaces aren't in it. Blocks of transformers have no dropout in attention.",
        memory_table,
    ),
    "census": _Section(
        "What layers keep still",
        "Of the same networks, with results that are made again: the layers that keep the most, the largest first, by "
        "what made it (`fusednn.census`).",
        layers_table,
    ),
    "peak": _Section(
        "What a training step holds at most",
        "By PyTorch's allocator, beside parameters, buffers and the input, in bfloat16, of eager PyTorch's; each "
        "parameter's gradient is let go as it comes, and what libraries allocate by way of PyTorch is in it. "
        "Checkpointed: as above. Held: after the forward pass, without its result.",
        peak_table,
    ),
    "thresholds": _Section(
        "Thresholds",
        "Two ways to compute the same, on both sides of the size at which the library takes one for the other. A call "
        "takes the longer of the device's time and, where tensors are small, the host's. A ratio below 1: the way that "
        "the library doesn't take is faster.",
        _of_cases(thresholds_table),
    ),
    "host": _Section(
        "What calls cost the host",
        "CPU time of calls on a few hundred elements, with Triton's own launcher and compiled kernels. The 5th "
        "percentile of many rounds, in which the contestants take turns, and the median. Here they run over {over}. "
        "Over one that does nothing, eager is PyTorch on the CPU, so that its arithmetic is part of its time and the "
        "launch of its kernels isn't. A ratio above 1: ours takes longer. `always_kernels` is ours where small tensors "
        "aren't left to PyTorch. Counted of such a call: launches, those among them that Triton prepared, and "
        "operators of ours that went through PyTorch's dispatcher.",
        _of_cases(host_table),
    ),
    "counters": _Section(
        "What the GPU counts",
        "By Nsight Compute, of one call forward and backward, with cold caches. A ratio above 1: the kernels move more "
        "than they must.",
        _of_cases(counters_table),
    ),
    "timed": _timed,
    "counted": _counted,
    "predicted": _predicted,
    "instructions": _Section(
        "What kernels execute for what they move",
        "Instructions of the path that a whole tile takes, from the machine code for an H100, for every launch that "
        "moves a part of its call's bytes worth mentioning. Issue/bytes: the time that the instructions need if one is "
        "issued in every cycle, over the time of the operands' bytes, each once, at the rates of {machine[name]}; the "
        "same for the pipe that is busy the longest. Bold: more than 0.7, where memory doesn't bind the kernel any "
        "more (matrix products aside, which mean to be bound otherwise). Instructions of a warp once a program, and "
        "for each tile; what is in flight is what the programs load before they wait.",
        _of_cases(_instructions),
    ),
    "compiled": _Section(
        "What the compiler says",
        "One shipped configuration of each kernel, compiled ahead of time. Occupancy is computed: the share of a "
        "multiprocessor's warps that registers, shared memory and threads leave room for.",
        _of_cases(compiled_table),
    ),
}


def _count(results: Results, goals: Sequence[Goal]) -> str:
    counted = Counter(verdict.outcome for verdict in judge(results.values(), goals))
    return "Goals: " + ", ".join(f"{counted[outcome]} {outcome}" for outcome in ("met", "missed", "unmeasured")) + "."


def _goals(results: Results, goals: Sequence[Goal]) -> str:
    head = ("goal", "operation", "dtype", "size", "wanted", "measured", "result")
    rows = [
        (v.goal.name, v.operation, v.dtype, v.size, v.goal.wanted, v.value, v.outcome)
        for v in sorted(judge(results.values(), goals), key=lambda verdict: OUTCOMES.index(verdict.outcome))
    ]
    missed = {v.goal.name: v.goal.reason for v in judge(results.values(), goals) if v.outcome == "missed"}
    reasons = [f"- *{name}*: {reason}" for name, reason in missed.items() if reason]
    why = ["Why goals are missed, and what it would take:", "\n".join(reasons)] if reasons else []
    return "\n\n".join([_count(results, goals), markdown_table(head, rows), *why])
