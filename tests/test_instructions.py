"""The instrument of machine code: what a program executes on the path of a whole tile, and what a call launches."""

from collections import Counter

import pytest
import torch
from support.baseline import BENCH  # noqa: F401  (makes the benchmarks importable)

from fusednn import autograd, kernels
from fusednn.instruments.control_flow import flow_of
from fusednn.instruments.instructions import busy, instructions_of

# A whole tile loads and stores 16 bytes, in a loop; the last one goes element by element.  A bias is added where the
# word at 0x220 isn't 0.
LISTING = """
        /*0000*/                   ULDC UR4, c[0x0][0x220] ;                 /* 0x0000000000047ab9 */
        /*0010*/                   ISETP.NE.U32.AND P1, PT, RZ, UR4, PT ;    /* 0x000000ff00007202 */
        /*0020*/                   IMAD.WIDE.U32 R2, R0, 0x10, R2 ;
        /*0030*/              @!P0 BRA 0x80 ;
        /*0040*/              @P2  LDG.E.U16 R4, desc[UR4][R2.64] ;
        /*0050*/              @P3  LDG.E.U16 R5, desc[UR4][R2.64+0x2] ;
        /*0060*/                   CALL.REL.NOINC 0x110 ;
        /*0070*/                   BRA 0xa0 ;
        /*0080*/                   LDG.E.128 R4, desc[UR4][R2.64] ;
        /*0090*/                   FFMA R4, R4, R4, RZ ;
        /*00a0*/              @!P1 BRA 0xc0 ;
        /*00b0*/                   FADD R4, R4, R8 ;
        /*00c0*/                   MUFU.EX2 R4, R4 ;
        /*00d0*/                   STG.E.128 desc[UR4][R2.64], R4 ;
        /*00e0*/              @P5  BRA 0x30 ;
        /*00f0*/                   DADD R6, R6, R8 ;
        /*0100*/                   EXIT ;
        /*0110*/                   RET.REL.NODEC R2 0x0 ;
        /*0120*/                   BRA 0x120 ;
"""


@pytest.mark.parametrize("has_bias", [True, False])
def test_a_whole_tiles_path_is_counted(has_bias: bool) -> None:
    flow = flow_of(instructions_of(LISTING), 32, {0x220: has_bias})
    assert flow.once == Counter({"others": 2, "ALU": 1, "wide multiplication": 1, "float64": 1})
    assert flow.each == Counter({"others": 5, "FMA": 1 + has_bias, "special function": 1})
    assert flow.bytes_in_flight == 32 * 16
    assert sum(flow.counted(3).values()) == 5 + 3 * (7 + has_bias)


def test_what_no_parameter_decides_goes_the_shortest_way() -> None:
    assert flow_of(instructions_of(LISTING), 32, {}).each["FMA"] == 1


def test_a_loop_inside_another_is_counted_by_itself() -> None:
    back = "        /*00d8*/              @P6  BRA 0xa0 ;\n        /*00e0*/              @P5  BRA 0x30"
    flow = flow_of(instructions_of(LISTING.replace("        /*00e0*/              @P5  BRA 0x30", back)), 32, {})
    assert flow.inside == Counter({"others": 3, "special function": 1})
    assert flow.each == Counter({"others": 3, "FMA": 1})
    assert sum(flow.counted(3, 4).values()) == 5 + 3 * (4 + 4 * 4)


@pytest.mark.compiles
def test_a_lines_end_comes_once_for_all_its_parts() -> None:
    from fusednn_bench.instructions import execution_of
    from fusednn_bench.launched import launches_of

    x, target = torch.empty(4096, 1024), torch.empty(4096, dtype=torch.int64)
    forward = kernels.cross_entropy.cross_entropy_forward
    launched, _ = launches_of(lambda: forward(x, target, None, "mean", -100, 0.0, x.dtype))
    execution = execution_of(launched, launched.elements, launched.bytes)
    lines, width = (dict(launched.configuration.constants)[name] for name in ("LINES", "WIDTH"))
    assert width < 1024
    assert execution.trips == 4096 / lines / launched.programs
    assert execution.each["float64"] < lines * 32 / execution.threads * 20


def test_pipes_are_busy_for_several_cycles() -> None:
    counted = {"ALU": 3, "wide multiplication": 1, "integer multiplication": 2, "others": 4}
    assert busy(counted) == {"issue": 10, "ALU": 6, "integer multiplication": 8}


@pytest.mark.compiled
def test_launches_are_recorded_without_memory() -> None:
    from fusednn_bench.launched import launches_of

    def call() -> None:
        x = torch.empty(2**33, dtype=torch.bfloat16, requires_grad=True)
        autograd.relu(x).sum().backward()

    for launched in launches_of(call):
        assert (launched.elements, launched.bytes, launched.programs) == (2**33, 2**33 * 4 + 2**30, 2**22)


@pytest.mark.compiles
@pytest.mark.parametrize(("classes", "trips"), [(4096, 0), (12 * 4096, 12)])
def test_programs_go_through_their_loops_as_often_as_a_line_is_long(classes: int, trips: int) -> None:
    from fusednn_bench.instructions import execution_of
    from fusednn_bench.launched import launches_of

    x = torch.empty(1024, classes, dtype=torch.bfloat16)
    (launched,) = launches_of(lambda: kernels.softmax.softmax_forward(x, 1, "softmax"))
    execution = execution_of(launched, launched.elements, launched.bytes)
    assert (execution.trips, execution.spills) == (trips, 0)
    assert launched.bytes == 2 * x.nbytes
    executed = (sum(execution.once.values()) + trips * sum(execution.each.values())) * execution.programs
    assert 10 < executed * execution.threads / x.numel() < 60
    assert 0 < execution.bytes_in_flight <= x.nbytes / execution.programs


@pytest.mark.compiles
def test_every_representative_is_a_case() -> None:
    import instructions

    names = [case.id for case in instructions.cases()]
    assert len(set(names)) == len(names)
    assert [case.id for case in instructions.cases(["adamw", "fp32"])] == ["adamw-fp32-resnet50"]
