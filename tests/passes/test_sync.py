"""Synchronisation: a record right after the maker, a wait right before the reader, a free as soon as it is safe."""

from __future__ import annotations

from dbo_compile.ir.program import Begin, End, Join, Rows, Run, Slice
from dbo_compile.ir.schedule import Lane, Segment
from dbo_compile.passes.sync import sync
from tests.ir.moe import comm, compute


def run(text, lane=Lane.COMPUTE, writes=""):
    """`y#0 = f#0(x#0)` as an instruction."""
    outs, call = text.split(" = ")
    name, ins = call.rstrip(")").split("(")
    segment, _, m = name.partition("#")
    return Run(lane, segment, int(m) if m else None, tuple(ins.split()), tuple(outs.split()), tuple(writes.split()))


def send(text, writes=""):
    return run(text, Lane.COMM, writes)


def synced(*instrs, segments=()):
    plain = {i.segment: Segment(i.segment, i.lane, (), (), True) for i in instrs if isinstance(i, Run)}
    return [" ".join(str(i).split()) for i in sync(instrs, plain | {s.name: s for s in segments})]


def test_sync_records_right_after_the_maker_and_waits_right_before_the_reader():
    program = synced(
        Begin(("x#0", "x#1")),
        run("a#0 = attn#0(x#0)"),
        run("a#1 = attn#1(x#1)"),
        send("b#0 = send#0(a#0)"),
        run("c#1 = mlp#1(a#1)"),
        run("c#0 = mlp#0(b#0)"),
        End(("c#0", "c#1")),
    )
    assert program == [
        "begin x#0 x#1",
        "compute a#0 = attn#0(x#0)",
        "compute record attn#0",
        "free x#0",
        "compute a#1 = attn#1(x#1)",
        "free x#1",
        "comm wait attn#0",
        "comm b#0 = send#0(a#0)",
        "comm record send#0",
        "compute c#1 = mlp#1(a#1)",
        "free a#1",
        "compute wait send#0",
        "free a#0",
        "compute c#0 = mlp#0(b#0)",
        "end c#0 c#1",
    ]


def test_one_lane_needs_no_events():
    assert synced(Begin(("x",)), run("y = f(x)"), run("z = g(y)"), End(("z",))) == [
        "begin x", "compute y = f(x)", "free x", "compute z = g(y)", "free y", "end z",
    ]  # fmt: skip


def test_a_later_wait_covers_earlier_events():
    program = synced(
        Begin(("x",)),
        run("a = f(x)"),
        run("b = g(x)"),
        send("u = one(b)"),
        send("v = two(a b)"),
        run("w = h(v)"),
        run("y = i(u w)"),
        End(("y",)),
    )
    assert [line for line in program if "wait" in line or "record" in line] == [
        "compute record g",
        "comm wait g",
        "comm record two",
        "compute wait two",
    ]


def test_numbers_and_arguments_are_there_without_waiting():
    numbers = Rows(None, ("rows", "start"))
    program = synced(Begin(("x",)), numbers, run("y = f(x)"), send("z = send(x rows)"), End(("y",)))
    assert program == [
        "begin x",
        "rows, start = rows()",
        "compute y = f(x)",
        "comm z = send(x, rows)",
        "comm record send",
        "free z",
        "compute wait send",
        "free x",
        "end y",
    ]


def test_a_write_waits_for_readers_and_writers_on_the_other_lane():
    program = synced(
        Begin(("x",)),
        send("a = one(x)"),
        run("b = f(x)", writes="x"),
        send("c = two(x)", writes="x"),
        run("d = g(x)"),
        End(("d",)),
    )
    assert program == [
        "begin x",
        "comm a = one(x)",
        "comm record one",
        "free a",
        "compute wait one",
        "compute b = f(x) writes x",
        "compute record f",
        "free b",
        "comm wait f",
        "comm c = two(x) writes x",
        "comm record two",
        "free c",
        "compute wait two",
        "compute d = g(x)",
        "free x",
        "end d",
    ]


def test_slices_of_different_microbatches_do_not_wait_for_each_other():
    program = synced(
        Begin(("kv",)),
        Slice("kv", 1, 0, "kv#0"),
        Slice("kv", 1, 1, "kv#1"),
        run("a#0 = f#0(kv#0)", writes="kv#0"),
        run("a#1 = f#1(kv#1)", writes="kv#1"),
        send("b#0 = send#0(kv#0)"),
        run("c = g(kv)", writes="kv"),
        End(("c",)),
    )
    assert program[4:] == [
        "compute record f#0",
        "free a#0",
        "compute a#1 = f#1(kv#1) writes kv#1",
        "free kv#1 a#1",
        "comm wait f#0",
        "comm b#0 = send#0(kv#0)",
        "comm record send#0",
        "free b#0",
        "compute wait send#0",
        "free kv#0",
        "compute c = g(kv) writes kv",
        "free kv",
        "end c",
    ]


def test_slicing_touches_no_data():
    program = synced(
        Begin(("kv",)), send("a = f(kv)", writes="kv"), Slice("kv", 0, 0, "kv#0"), run("b#0 = g#0(kv#0)"), End(("b#0",))
    )
    assert program[3:7] == [
        "free a",
        "compute kv#0 = slice(kv, dim=0, microbatch=0)",
        "compute wait f",
        "compute b#0 = g#0(kv#0)",
    ]


def test_memory_is_kept_while_an_alias_of_it_is_read():
    view = compute("look", "x", "v", aliases={"v": "x"})
    steps = (run("x = f(w)"), run("v = look(x)"), run("y = g(w)"), run("z = h(v y)"))
    program = synced(Begin(("w",)), *steps, End(("z",)), segments=[view])
    assert program[-2:] == ["free x v y", "end z"]
    assert sum("free" in line for line in program) == 2


def test_a_write_through_an_alias_waits_for_readers_of_the_base():
    view = compute("look", "x", "v", aliases={"v": "x"})
    program = synced(
        Begin(("x",)),
        run("v = look(x)"),
        send("a = send(x)"),
        run("b = f(v)", writes="v"),
        End(("b",)),
        segments=[view, comm("send", "x", "a")],
    )
    assert program == [
        "begin x",
        "compute v = look(x)",
        "comm a = send(x)",
        "comm record send",
        "free a",
        "compute wait send",
        "compute b = f(v) writes v",
        "free x v",
        "end b",
    ]


def test_slices_and_joins_are_events_of_their_own():
    program = synced(
        Begin(("x",)),
        run("y = f(x)"),
        Slice("y", 0, 0, "y#0"),
        Slice("y", 0, 1, "y#1"),
        send("a#1 = send#1(y#1)"),
        send("a#0 = send#0(y#0)"),
        Join(("a#0", "a#1"), 0, "a"),
        send("b = all(a)"),
        End(("b",)),
    )
    assert [line for line in program if "wait" in line or "record" in line] == [
        "compute record slice:y#1",
        "comm wait slice:y#1",
        "comm record send#0",
        "compute wait send#0",
        "compute record join:a",
        "comm wait join:a",
        "comm record all",
        "compute wait all",
    ]


def test_the_lane_that_made_a_register_frees_it_after_it_has_waited_for_its_last_reader():
    program = synced(
        Begin(("x",)),
        send("a = one(x)"),
        run("b = f(a)"),
        send("c = two(x)"),
        run("d = g(b)"),
        send("e = three(b)"),
        run("y = h(c e)"),
        End(("y",)),
    )
    assert program == [
        "begin x",
        "comm a = one(x)",
        "comm record one",
        "compute wait one",
        "compute b = f(a)",
        "compute record f",
        "comm c = two(x)",
        "compute d = g(b)",
        "free d",
        "comm wait f",
        "free a",
        "comm e = three(b)",
        "comm record three",
        "compute wait three",
        "free x b",
        "compute y = h(c, e)",
        "end y",
    ]
