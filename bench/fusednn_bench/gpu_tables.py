"""What a GPU says about the figures that were made without one, and what follows from it."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from types import MappingProxyType
from typing import Any, NamedTuple

from fusednn.benchmark.quantiles import median, quiet

from .goals import Goal, judge
from .results import TIME_LIMIT
from .tables import by_contestant, markdown_table, slower

__all__ = [
    "counters_table",
    "host_model_table",
    "issue_table",
    "next_steps",
    "predictions_table",
    "thresholds_table",
]

_Record = Mapping[str, Any]
_Results = Mapping[str, Mapping[str, Any]]


class Threshold(NamedTuple):
    """Two ways of a case, the one that the library takes first, with what a call takes: the longer of the device's time
    and the host's, which overlap.
    """

    place: str
    taken: str
    taken_us: float
    other: str
    other_us: float

    @property
    def ratio(self) -> float:
        return self.other_us / self.taken_us


def thresholds(cases: Iterable[_Record]) -> Iterator[Threshold]:
    """Of the cases in which it is known which way is taken."""
    for (operation, dtype, size, shape, direction), ways in by_contestant(cases).items():
        times = {name: max(one["device_us"], one["host_us"]) for name, one in ways.items()}
        taken = [name for name, one in ways.items() if one["taken"]]
        if len(times) == 2 and len(taken) == 1:
            (other,) = times.keys() - taken
            place = f"{operation} {direction} {dtype} {size} {'x'.join(map(str, shape))}"
            yield Threshold(place, taken[0], times[taken[0]], other, times[other])


def thresholds_table(cases: Iterable[_Record]) -> str:
    """Both ways of each case, and how many times as long the one that the library doesn't take is."""
    rows = [(*each, each.ratio) for each in thresholds(cases)]
    return markdown_table(("case", "taken", "us", "the other", "us", "ratio"), rows)


class Moved(NamedTuple):
    """What the launches of a case moved and took together, beside the bytes that the traffic meter counts of it."""

    case: str
    launches: int
    dram_bytes: float
    counted_bytes: float
    microseconds: float
    issue_percent: float  # of the launch that issued in the largest share of its cycles
    busiest: str  # that launch's kernel
    bank_conflicts: float

    @property
    def ratio(self) -> float | None:
        return self.dram_bytes / self.counted_bytes if self.counted_bytes else None


def moved(cases: Iterable[_Record]) -> Iterator[Moved]:
    launches: dict[tuple[Any, ...], list[_Record]] = {}
    for case in cases:
        launches.setdefault((case["operation"], case["dtype"], tuple(case["shape"])), []).append(case)
    for (operation, dtype, shape), own in launches.items():
        busiest = max(own, key=lambda record: float(record["issue_percent"]))
        yield Moved(
            f"{operation} {dtype} {'x'.join(map(str, shape))}",
            len(own),
            sum(record["dram_bytes"] for record in own),
            own[0]["budget_bytes"],
            sum(record["duration_us"] for record in own),
            busiest["issue_percent"],
            busiest["kernel"].split(" ", 1)[-1],
            sum(record["bank_conflicts"] for record in own),
        )


def counters_table(cases: Iterable[_Record]) -> str:
    """A row a case: DRAM bytes beside those that are counted, and the launch that issued in the largest share of its
    cycles, which is bound by instructions where that is near 100 %.
    """
    rows = [
        (
            *(each.case, each.launches, each.dram_bytes / 1e6, each.counted_bytes / 1e6, each.ratio),
            *(each.microseconds, each.issue_percent, each.busiest, round(each.bank_conflicts)),
        )
        for each in moved(cases)
    ]
    head = ("case", "launches", "DRAM MB", "counted MB", "ratio", "us", "issued %", "by", "bank conflicts")
    return markdown_table(head, rows)


def predictions_table(results: _Results) -> str:
    """By family: measured over predicted device time, ours and eager's.  Empty where nothing was measured.

    Where a family's figure is far from the others', its prediction leaves out what limits it.
    """
    return _by_family(_device_ratios(results))


def host_model_table(results: _Results) -> str:
    """By family: CPU time over the GPU's own driver, over that of one that does nothing.  Empty without both.

    What is above 1 is the driver's, and the machine's: `fusednn.kernels.base.figures` reckons with that.
    """
    files = [result for result in results.values() if result["kind"] == "host"]
    here, modelled = ([case for file in files if _on_gpu(file) is on for case in file["cases"]] for on in (True, False))
    known = {_key(case): quiet(case["cpu_us"]) for case in modelled}
    ratios: _Ratios = {}
    for case in here:
        if _key(case) in known:
            own = ratios.setdefault(case["family"], {}).setdefault(case["contestant"], [])
            own.append(quiet(case["cpu_us"]) / known[_key(case)])
    return _by_family(ratios)


def issue_table(results: _Results) -> str:
    """By family: the share of cycles in which instructions were issued, over what the machine code and the bytes ask
    for, of launches that both know.  Empty where none is.
    """
    asked: dict[tuple[Any, ...], float] = {}
    for case in _cases(results, "instructions"):
        asked[_tensor(case)] = max(asked.get(_tensor(case), 0.0), min(100.0, 100 * case["issue_over_bytes"]))
    issued: dict[tuple[Any, ...], float] = {}
    for case in _cases(results, "counters"):
        issued[_tensor(case)] = max(issued.get(_tensor(case), 0.0), case["issue_percent"])
    ratios: _Ratios = {}
    for key in issued.keys() & asked.keys():
        ratios.setdefault(key[0], {}).setdefault("fusednn", []).append(issued[key] / asked[key])
    return _by_family(ratios)


def _tensor(case: _Record) -> tuple[Any, ...]:
    return (case["family"], case["operation"], case["dtype"], tuple(case["shape"]))


_Ratios = dict[str, dict[str, list[float]]]  # by family and contestant


def _on_gpu(result: Mapping[str, Any]) -> bool:
    return bool(result["environment"].get("driver"))


def _device_ratios(results: _Results) -> _Ratios:
    predicted = {_key(case): case["predicted_us"] for case in _cases(results, "predicted")}
    ratios: _Ratios = {}
    for case in _cases(results, "timed"):
        if _key(case) in predicted:
            ratio = median(case["device_us"]) / predicted[_key(case)]
            ratios.setdefault(case["family"], {}).setdefault(case["contestant"], []).append(ratio)
    return ratios


def _by_family(ratios: _Ratios) -> str:
    rows = [
        (
            family,
            *(
                f"{median(own):.2f} ({min(own):.2f} to {max(own):.2f})" if own else None
                for own in (ratios[family].get(name, []) for name in ("fusednn", "eager"))
            ),
        )
        for family in sorted(ratios)
    ]
    return markdown_table(("family", "fusednn", "eager"), rows) if rows else ""


#: What is worth a look: less than this share of the rate, or this many times the bytes.
_FAR_FROM_PREDICTED, _MORE_BYTES = 0.8, 1.1


def next_steps(results: _Results, goals: Sequence[Goal], beside: _Results = MappingProxyType({})) -> list[str]:
    """What to do, the worst first: contestants of ours that are wrong or fail; then, by how much is missing, goals that
    are missed, cases where another is faster, ways that aren't the faster one, families that are far from what was
    predicted (``beside``, too), and kernels that move more than was counted.
    """
    found = [*_left_out(results), *_missed(results, goals)]
    for result in results.values():
        if result["kind"] == "timed":
            found += [(ratio, f"{case}: {name} is faster ({ratio:.2f})") for case, name, ratio in slower(result)]
    for each in thresholds(_cases(results, "thresholds")):
        if each.ratio < 1:
            words = f"{each.place}: {each.taken} is taken, {each.other} is faster ({each.ratio:.2f})"
            found.append((each.ratio, f"{words}: correct the figures of kernels/base/figures.py"))
    for family, ratios in _device_ratios({**beside, **results}).items():
        if (share := 1 / median(ratios.get("fusednn", [1.0]))) < _FAR_FROM_PREDICTED:
            words = f"{family}: takes {1 / share:.2f} times what was predicted"
            found.append((share, f"{words}: mend the kernel, or the model"))
    for one in moved(_cases(results, "counters")):
        if one.ratio is not None and one.ratio > _MORE_BYTES:
            found.append((1 / one.ratio, f"{one.case}: moves {one.ratio:.2f} times the bytes that were counted"))
    return [text for _, text in sorted(found)]


_Step = tuple[float, str]  # the share of what is wanted that there is, and words


def _left_out(results: _Results) -> Iterator[_Step]:
    """Of ours: what is wrong, or doesn't run at all."""
    for result in results.values():
        for item in result["left_out"] if result["kind"] == "timed" else ():
            if str(item["contestant"]).startswith("fusednn") and item["reason"] != TIME_LIMIT:
                yield 0.0, f"{item['case']}: {item['contestant']} is left out: {item['reason']}"


def _missed(results: _Results, goals: Sequence[Goal]) -> Iterator[_Step]:
    for verdict in judge(results.values(), goals):
        if verdict.outcome == "missed" and verdict.value is not None:
            goal = verdict.goal
            bound = goal.at_least if goal.at_least is not None else goal.at_most
            assert bound is not None
            short = verdict.value / bound if goal.at_least is not None else bound / verdict.value
            where = f"{verdict.operation} {verdict.dtype} {verdict.size}"
            yield short, f"{goal.name}: {where} has {verdict.value:.2f}, wanted {goal.wanted}"


def _cases(results: _Results, kind: str) -> list[_Record]:
    return [case for result in results.values() if result["kind"] == kind for case in result["cases"]]


def _key(case: _Record) -> tuple[Any, ...]:
    return (*(case[name] for name in ("operation", "contestant", "direction", "dtype")), tuple(case["shape"]))
