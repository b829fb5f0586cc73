"""The verifier of programs: it refuses each way to be wrong by name, and never accepts what brute force finds wrong."""

from __future__ import annotations

import re
from dataclasses import replace

import pytest

from dbo_compile.errors import InvalidProgram
from dbo_compile.ir.program import Begin, End, Free, Join, Program, Record, Rows, Run, Slice, Wait, lane_of
from dbo_compile.ir.proof import verify_program
from dbo_compile.ir.schedule import Lane, Segment
from dbo_compile.ir.tokens import Shared, Split
from dbo_compile.passes.order import order
from tests.ir.moe import comm, compute, moe_places, moe_program, program_of
from tests.ir.oracle import evaluate, races

PROGRAM = moe_program(3)


def find(text, program=PROGRAM):
    (at,) = [i for i, instr in enumerate(program.instrs) if text in str(instr)]
    return at


def without(at):
    return replace(PROGRAM, instrs=PROGRAM.instrs[:at] + PROGRAM.instrs[at + 1 :])


def moved(at, to):
    """The program with instruction `at` moved to before what was instruction `to`."""
    rest = [*PROGRAM.instrs[:at], *PROGRAM.instrs[at + 1 :]]
    rest.insert(to if to <= at else to - 1, PROGRAM.instrs[at])
    return replace(PROGRAM, instrs=tuple(rest))


def replaced(at, instr):
    return replace(PROGRAM, instrs=(*PROGRAM.instrs[:at], instr, *PROGRAM.instrs[at + 1 :]))


def positions(*kinds):
    return [i for i, instr in enumerate(PROGRAM.instrs) if isinstance(instr, kinds)]


def refusal(program):
    with pytest.raises(InvalidProgram) as error:
        verify_program(program)
    return str(error.value)


@pytest.mark.parametrize("policy", ["list", "alternate", "sequential"])
@pytest.mark.parametrize("num_microbatches", [1, 2, 3, 4])
def test_programs_of_every_policy_are_proven(policy, num_microbatches):
    verify_program(moe_program(3, num_microbatches, policy))


def test_a_dropped_wait_names_what_must_be_waited_for():
    message = refusal(without(find("compute wait dispatch1#0")))
    assert "reads d1#0 without waiting for `dispatch1#0` on the comm lane" in message
    assert re.search(r"e1#0 = experts1#0\(d1#0, k1#0\)   <-- HERE$", message, re.MULTILINE)


@pytest.mark.parametrize("at", positions(Wait))
def test_no_wait_is_superfluous(at):
    message = refusal(without(at))
    assert "without waiting for" in message or "may still use" in message


@pytest.mark.parametrize("at", positions(Record))
def test_no_record_is_superfluous(at):
    assert "waits for an event that nothing before it records" in refusal(without(at))


def test_a_record_after_the_next_compute_loses_overlap():
    instrs = (
        Begin(("x",)),
        Slice("x", 0, 0, "x#0"),
        Slice("x", 0, 1, "x#1"),
        Run(Lane.COMPUTE, "attn", 0, ("x#0",), ("a#0",)),
        Run(Lane.COMPUTE, "attn", 1, ("x#1",), ("a#1",)),
        Record(Lane.COMPUTE, "late"),
        Wait(Lane.COMM, "late"),
        Run(Lane.COMM, "send", 0, ("a#0",), ("b#0",)),
        Run(Lane.COMM, "send", 1, ("a#1",), ("b#1",)),
        Record(Lane.COMM, "sent"),
        Wait(Lane.COMPUTE, "sent"),
        End(()),
    )
    segments = {"attn": compute("attn", "x", "a"), "send": comm("send", "a", "b")}
    message = refusal(Program(instrs, segments, 2))
    assert "`comm b#0 = send#0(a#0)`, waits for `attn#1`, which nothing it reads depends on: overlap is lost" in message
    early = (*instrs[:4], Record(Lane.COMPUTE, "a0"), instrs[4], instrs[5], Wait(Lane.COMM, "a0"), instrs[7], instrs[6])
    verify_program(Program((*early, *instrs[8:]), segments, 2))


def test_a_record_after_the_next_collective_loses_overlap():
    message = refusal(moved(find("record combine1#0"), find("= dispatch1#1(") + 1))
    assert "waits for `dispatch1#1`, which nothing it reads depends on: overlap is lost" in message


@pytest.mark.parametrize("at", positions(Record))
def test_every_record_after_the_next_run_of_its_lane_is_refused(at):
    record = PROGRAM.instrs[at]
    later = [i for i in positions(Run, Join) if i > at and lane_of(PROGRAM.instrs[i]) is record.lane]
    if later:
        verdict = refusal(moved(at, later[0] + 1))
        assert "overlap is lost" in verdict or "nothing before it records" in verdict


def test_a_wait_before_other_work_loses_overlap():
    message = refusal(moved(find("compute wait combine1#0"), find("= shared1#0(")))
    assert "waits for `combine1#0`, which nothing it reads depends on" in message


def test_an_early_free_names_the_reader():
    at = next(i for i in positions(Free) if "e1#0" in PROGRAM.instrs[i].regs)
    message = refusal(moved(at, find("compute wait combine1#0")))
    assert "frees n1#0, which `combine1#0` may still use; expected it after the compute lane" in message


def test_a_read_after_a_free_is_refused():
    at = next(i for i in positions(Free) if "e1#0" in PROGRAM.instrs[i].regs)
    assert "reads e1#0, which has been freed" in refusal(moved(at, find("b1#0 = combine1#0")))


def test_freeing_the_base_of_a_view_that_is_still_read_is_refused():
    at, early = next(i for i in positions(Free) if "kv1" in PROGRAM.instrs[i].regs), find("record attn1#1")
    later = Free(tuple(reg for reg in PROGRAM.instrs[at].regs if reg != "kv1"))
    instrs = (*PROGRAM.instrs[:early], Free(("kv1",)), *PROGRAM.instrs[early:at], later, *PROGRAM.instrs[at + 1 :])
    assert "frees kv1, which `experts1#1` may still use" in refusal(replace(PROGRAM, instrs=instrs))


def test_freeing_twice_is_refused():
    at = positions(Free)[0]
    twice = replace(PROGRAM, instrs=(*PROGRAM.instrs[: at + 1], *PROGRAM.instrs[at:]))
    assert "reads h0#0, which has been freed" in refusal(twice)


def test_two_collectives_swapped_on_one_microbatch_are_refused():
    first, second = find("counts1#0("), find("dispatch1#0(")
    swapped = list(PROGRAM.instrs)
    swapped[first : second + 1] = [swapped[second], *swapped[first + 1 : second], swapped[first]]
    assert "reads n1#0, which nothing before it makes" in refusal(replace(PROGRAM, instrs=tuple(swapped)))


def test_independent_collectives_of_a_group_keep_the_order_of_the_graph():
    from_graph = dict(PROGRAM.segments)
    earlier = {"dispatch1": from_graph.pop("dispatch1")}
    names = list(PROGRAM.segments)
    reordered = {n: (earlier | from_graph)[n] for n in ["dispatch1", *(n for n in names if n != "dispatch1")]}
    message = refusal(replace(PROGRAM, segments=reordered))
    assert "counts0#0(a0#0)`, comes before dispatch1#0; expected it after that" in message
    assert "the collectives of group ep are issued in the order of the graph" in message


def test_a_step_played_twice_is_refused():
    at = find("s1#1 = shared1#1")
    again = replace(PROGRAM.instrs[at], outs=("again",))
    twice = replace(PROGRAM, instrs=(*PROGRAM.instrs[: at + 1], again, *PROGRAM.instrs[at + 1 :]))
    assert "plays shared1#1 a second time; expected every step once" in refusal(twice)


def test_a_step_never_played_is_refused():
    head, free = find("y = head"), find("free w h3")
    program = replace(PROGRAM, instrs=(*PROGRAM.instrs[:head], PROGRAM.instrs[free], End(())))
    assert "`end`, comes before head is played; expected every step once" in refusal(program)


def test_a_register_made_twice_is_refused():
    at = find("s1#1 = shared1#1")
    twice = replace(PROGRAM, instrs=(*PROGRAM.instrs[: at + 1], *PROGRAM.instrs[at:]))
    assert "makes s1#1, which has been made before" in refusal(twice)


def test_a_read_before_its_write_is_refused():
    early = moved(find("h2#0 = add1#0"), find("b1#0 = combine1#0"))
    assert "reads b1#0, which nothing before it makes" in refusal(early)


def test_reading_the_rows_of_another_microbatch_is_refused():
    run = PROGRAM.instrs[find("experts1#0(")]
    wrong = replaced(find("experts1#0("), replace(run, ins=("d1#0", "k1#1")))
    assert "reads k1#1, which is not k1 for microbatch 0" in refusal(wrong)


def test_reading_all_tokens_for_one_microbatch_is_refused():
    at = find("= attn0#0(")
    wrong = replaced(at, replace(PROGRAM.instrs[at], ins=("h0", *PROGRAM.instrs[at].ins[1:])))
    assert "reads h0, which is not h0 for microbatch 0" in refusal(wrong)


def test_joining_in_another_order_is_refused():
    join = PROGRAM.instrs[find("join(")]
    assert "does not join h3 of all" in refusal(replaced(find("join("), replace(join, srcs=join.srcs[::-1])))


def test_a_segment_on_the_other_lane_is_refused():
    at = find("combine1#0(")
    moved_over = replaced(at, replace(PROGRAM.instrs[at], lane=Lane.COMPUTE))
    assert "is no segment of the compute lane" in refusal(moved_over)


def test_a_hidden_write_is_refused():
    at = find("= attn1#0(")
    hidden = replaced(at, replace(PROGRAM.instrs[at], writes=("kv1#0",)))
    assert "does not say what it writes; expected kv1, seen" in refusal(hidden)


def test_a_run_that_does_not_fit_its_segment_is_refused():
    at = find("= experts1#0(")
    short = replaced(at, replace(PROGRAM.instrs[at], ins=("d1#0",)))
    assert "does not fit its segment; expected (d1, k1) -> (e1)" in refusal(short)


def test_a_step_for_no_microbatch_of_the_program_is_refused():
    at = find("s1#1 = shared1#1")
    of_none = replaced(at, replace(PROGRAM.instrs[at], microbatch=None))
    assert "plays shared1; expected shared1#0 shared1#1" in refusal(of_none)
    of_all = {"f": Segment("f", Lane.COMPUTE, (), (), per_microbatch=False)}
    program = Program((Begin(()), Run(Lane.COMPUTE, "f", 1, (), ()), End(())), of_all, 2)
    assert "`compute _ = f#1()`, plays f#1; expected f\n" in refusal(program)


def test_a_join_from_before_its_rows_were_written_is_refused():
    segments = (compute("make", "w", "y"), compute("add", "y", "", writes=("y",)))
    head = Segment("head", Lane.COMPUTE, ("y",), ("z",), per_microbatch=False)
    places = {"w": Shared(), "y": Split(0), "z": Shared()}
    schedule = order({s.name: s for s in (*segments, head)}, 2)
    program = program_of(schedule, places, ("w",), ("z",))
    verify_program(program)
    instrs = list(program.instrs)
    join = next(i for i, instr in enumerate(instrs) if isinstance(instr, Join))
    instrs.insert(find("y#1 = make#1", program) + 1, instrs.pop(join))
    assert "reads y, joined before its rows were written; expected a new join" in refusal(
        replace(program, instrs=tuple(instrs))
    )


def test_waiting_again_for_what_has_happened_is_harmless():
    at = find("compute wait combine1#0")
    again = PROGRAM.instrs[find("compute wait dispatch1#0")]
    verify_program(replace(PROGRAM, instrs=(*PROGRAM.instrs[:at], again, *PROGRAM.instrs[at:])))


def test_state_of_all_tokens_is_written_microbatch_0_first():
    schedule_of_1_first = moe_program(1, policy="alternate")
    text = schedule_of_1_first.instrs
    begun = next(i for i, instr in enumerate(text) if isinstance(instr, Rows))
    swap = {0: 1, 1: 0}
    renamed = [_for_other_microbatch(i, swap) if at >= begun else i for at, i in enumerate(text)]
    message = refusal(replace(schedule_of_1_first, instrs=tuple(renamed)))
    assert "writes seen after microbatch 1; expected microbatch 0 first" in message


def _for_other_microbatch(instr, swap):
    def name(text):
        return re.sub(r"#(\d)", lambda m: f"#{swap[int(m[1])]}", text)

    match instr:
        case Run():
            regs = {f: tuple(map(name, getattr(instr, f))) for f in ("ins", "outs", "writes")}
            return replace(instr, microbatch=swap.get(instr.microbatch), **regs)
        case Rows():
            return replace(instr, microbatch=swap[instr.microbatch], outs=tuple(map(name, instr.outs)))
        case Record() | Wait():
            return replace(instr, event=name(instr.event))
        case Free():
            return Free(tuple(map(name, instr.regs)))
        case _:
            return instr


def test_begin_and_end_stand_at_the_ends():
    assert "is out of place" in refusal(moved(0, 2))
    assert "is out of place" in refusal(without(len(PROGRAM.instrs) - 1))


def test_the_comm_lane_is_joined_at_the_end():
    segments = {n: s for n, s in PROGRAM.segments.items() if n == "counts0"}
    run = Run(Lane.COMM, "counts0", None, ("a0",), ("c0",))
    program = replace(PROGRAM, instrs=(Begin(("a0",)), run, End(())), segments=segments, num_microbatches=1)
    assert "ends the program without waiting for `counts0` on the comm lane" in refusal(program)


def test_a_wait_with_nothing_after_it_is_refused():
    at = len(PROGRAM.instrs) - 1
    late = (Record(Lane.COMPUTE, "late"), Wait(Lane.COMM, "late"))
    assert "waits for `head`" in refusal(replace(PROGRAM, instrs=(*PROGRAM.instrs[:at], *late, PROGRAM.instrs[at])))


def test_recording_an_event_twice_is_refused():
    at = positions(Record)[0]
    twice = replace(PROGRAM, instrs=(*PROGRAM.instrs[: at + 1], *PROGRAM.instrs[at:]))
    assert "has been recorded before; expected each event once" in refusal(twice)


def mutants(program):
    """Every single slip: an instruction left out, played twice, or moved by up to five places."""
    instrs = program.instrs
    for at, instr in enumerate(instrs):
        rest = [*instrs[:at], *instrs[at + 1 :]]
        yield f"without {at}", rest
        yield f"{at} twice", [*instrs[:at], instr, *instrs[at:]]
        for by in (-5, -2, -1, 1, 2, 5):
            yield f"{at} moved by {by}", [*rest[: max(at + by, 0)], instr, *rest[max(at + by, 0) :]]


@pytest.mark.parametrize(("num_microbatches", "policy"), [(2, "list"), (3, "alternate")])
def test_whatever_slip_is_accepted_is_harmless(num_microbatches, policy):
    program = moe_program(2, num_microbatches, policy)
    places = moe_places(2)
    expected, accepted = evaluate(program, places), 0
    for what, instrs in mutants(program):
        mutant = replace(program, instrs=tuple(instrs))
        try:
            verify_program(mutant)
        except InvalidProgram:
            continue
        accepted += 1
        assert races(mutant) == [], f"{what}\n{mutant}"
        assert evaluate(mutant, places) == expected, f"{what}\n{mutant}"
    assert accepted > len(program.instrs) // 4, "a verifier that refuses everything proves nothing"


@pytest.mark.parametrize("num_microbatches", [1, 2, 3])
def test_brute_force_finds_no_race_either(num_microbatches):
    assert races(moe_program(3, num_microbatches)) == []


def test_only_slices_of_all_tokens_are_views():
    at = find("slice(h0, dim=0, microbatch=1)")
    assert "slices what is split already" in refusal(replaced(at, Slice("h0#0", 0, 1, "h0#1")))
