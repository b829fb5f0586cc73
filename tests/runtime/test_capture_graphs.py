"""Capture, on a device whose graphs play the program again: what is captured when, what is copied, what is refused."""

from __future__ import annotations

import gc
import threading

import pytest
import torch

from dbo_compile.errors import RankLost
from dbo_compile.runtime import obstacles
from dbo_compile.runtime.agree import Agreement
from dbo_compile.runtime.capture import MOST_MOVES, CapturePlayer
from dbo_compile.runtime.graphs import Limits, Play
from dbo_compile.runtime.streams import StreamPlayer
from tests.runtime.fake_device import FakeDevice

MIB = 2**20


class FakeGraph:
    """Replaying plays again what was captured, on the same arguments, into the same results."""

    def __init__(self, device, play, results):
        self.device, self.play, self.results = device, play, results

    def replay(self):
        assert self.play is not None, "replays a graph that was reset"
        self.device.log.append("replay")
        for old, new in zip(self.results, self.play(), strict=True):
            if isinstance(old, torch.Tensor):
                old.copy_(new)

    def reset(self):
        self.play = None


class FakeGraphs:
    """Capturing must run nothing: a play that writes is caught, since tensors are restored after it."""

    def __init__(self):
        self.log, self.used, self.cost, self.capturing = [], 0, lambda: 0, False
        self.error = None

    def is_capturing(self):
        return self.capturing

    def capture(self, play):
        self.log.append("capture")
        self.capturing = True
        try:
            if self.error:
                raise self.error
            results = play()
        finally:
            self.capturing = False
        self.used += self.cost()
        return FakeGraph(self, play, results), results

    def new_pool(self):
        self.log.append("new pool")
        self.used = 0

    def memory_used(self):
        return self.used


class Program:
    """A program over arguments `(num_tokens, weight, x, ...)`: notes on which rows it was played."""

    def __init__(self):
        self.played = []

    def __call__(self, lanes, n, weight, x, *rest):
        assert x.shape[0] == n == lanes.rows(None)[0]
        self.played.append(lanes.num_rows)
        return x @ weight, n


WEIGHT = torch.arange(15.0).view(5, 3)


def setup(**limits):
    graphs = FakeGraphs()
    inner = StreamPlayer(FakeDevice())
    return CapturePlayer(inner, graphs, torch.device("cpu"), Limits(**limits)), graphs


def args_of(n, weight=WEIGHT):
    return [n, weight, torch.randn(n, 5)]


def check(player, module, rows, args):
    result, number = player(module, rows, args)
    assert number == args[0]
    torch.testing.assert_close(result, args[2] @ args[1], rtol=0, atol=0)
    return result


def test_the_first_play_is_the_warm_up_the_second_is_captured_the_rest_are_replayed():
    player, graphs = setup()
    module = Program()
    for _ in range(4):
        check(player, module, (4, 3), args_of(7))
    assert graphs.log == ["capture", "replay", "replay", "replay"]
    assert [str(key) for key in player.graphs] == ["a step of 7 tokens in 2"]


def test_each_size_and_number_of_microbatches_has_a_graph_of_its_own():
    player, graphs = setup()
    split, unsplit = Program(), Program()
    for _ in range(3):
        for module, rows in [(split, (4, 3)), (unsplit, (7,)), (split, (6, 5)), (unsplit, (11,))]:
            check(player, module, rows, args_of(sum(rows)))
    assert graphs.log.count("capture") == 4
    assert [key.rows for key in player.graphs] == [(4, 3), (7,), (6, 5), (11,)]


def test_an_input_that_comes_from_elsewhere_is_copied_and_one_that_stays_is_not():
    player, _ = setup()
    module, stays = Program(), torch.randn(7, 5)
    for _ in range(3):
        check(player, module, (7,), [7, WEIGHT, stays])
    captured = next(iter(player.graphs.values()))
    assert (list(captured.pinned), list(captured.copied)) == ([1, 2], [])
    stays.fill_(2.0)
    check(player, module, (7,), [7, WEIGHT, stays])
    for _ in range(3):
        check(player, module, (7,), args_of(7))
    captured = next(iter(player.graphs.values()))
    assert (list(captured.pinned), list(captured.copied)) == ([1], [2])
    assert torch.equal(stays, torch.full((7, 5), 2.0))


def test_a_new_tensor_in_the_place_of_one_that_is_gone_is_no_input_that_stays():
    memory, others = torch.zeros(7, 5).numpy(), []
    player, _ = setup()
    module, x = Program(), torch.from_numpy(memory)
    player(module, (7,), [7, WEIGHT, x])
    old = id(x), x.data_ptr()
    del x
    while (id(x := torch.from_numpy(memory)), x.data_ptr()) != old:
        others.append(x)
    player(module, (7,), [7, WEIGHT, x])
    (captured,) = player.graphs.values()
    assert (list(captured.pinned), list(captured.copied)) == ([1], [2])


def test_smaller_sizes_are_copied_into_the_memory_of_larger_ones():
    player, _ = setup()
    module = Program()
    player.capture_all([Play(module, (n,), args_of(n)) for n in (3, 11, 7)])
    places = {c.copied[2].untyped_storage().data_ptr() for c in player.graphs.values()}
    assert [key.rows for key in player.graphs] == [(11,), (7,), (3,)]
    assert len(places) == 1
    for n in (7, 3, 11, 3):
        check(player, module, (n,), args_of(n))


def test_copies_may_be_written_outside_of_inference_mode():
    player, _ = setup()
    module = Program()
    with torch.inference_mode():
        for _ in range(2):
            check(player, module, (7,), args_of(7))
    (captured,) = player.graphs.values()
    assert [buffer.is_inference() for buffer in captured.copied.values()] == [False]


def test_inputs_of_any_layout_are_copied_right():
    player, graphs = setup()
    module = Program()
    for x in (torch.randn(5, 7).t(), torch.randn(5, 7).t(), torch.randn(7, 5), torch.randn(1, 5).expand(7, 5)):
        check(player, module, (4, 3), [7, WEIGHT, x])
    assert graphs.log == ["capture", "replay", "replay", "replay"]


def test_an_expanded_input_has_one_row_in_memory_and_an_empty_one_none():
    for x in (lambda: torch.randn(1, 5).expand(7, 5), lambda: torch.randn(0, 5)):
        player, graphs = setup()
        module = Program()
        for _ in range(4):
            check(player, module, (len(x()),), [len(x()), WEIGHT, x()])
        assert (graphs.log, player.refused) == (["capture", "replay", "replay", "replay"], {})


def test_a_weight_that_moves_is_found_where_it_is_now():
    player, graphs = setup(static=frozenset({1}))
    module, weight = Program(), torch.nn.Parameter(WEIGHT.clone(), requires_grad=False)
    for _ in range(3):
        check(player, module, (7,), args_of(7, weight))
    weight.data = WEIGHT * 3
    for _ in range(3):
        check(player, module, (7,), args_of(7, weight))
    assert graphs.log == ["capture", "replay", "replay", "new pool", "capture", "replay", "replay"]


def test_what_is_written_in_place_is_copied_back_only_where_it_moves_again_and_again():
    def counts(lanes, n, state):
        state += n
        return state * 2, state

    player, graphs = setup(written=frozenset({1}))
    graphs.capture = without_effect(graphs)
    state, want = torch.zeros(3), 0.0
    for _ in range(5):
        want += 7
        doubled, same = player(counts, (7,), [7, state])
        assert same is state
        assert torch.equal(doubled, torch.full((3,), 2 * want))
    assert graphs.log == ["capture", "replay", "replay", "replay", "replay"]
    graphs.log.clear()
    for _ in range(20):
        moved = torch.ones(3)
        doubled, same = player(counts, (7,), [7, moved])
        assert same is moved
        assert torch.equal(moved, torch.full((3,), 8.0))
        assert torch.equal(doubled, torch.full((3,), 16.0))
    assert player.refused == {}
    assert graphs.log.count("capture") == MOST_MOVES
    assert graphs.log[-10:] == ["replay"] * 10


def test_a_weight_that_moves_again_and_again_is_not_captured():
    player, _ = setup(static=frozenset({1}), names={1: "weight"})
    module = Program()
    for _ in range(20):
        check(player, module, (7,), args_of(7, WEIGHT.clone()))
    assert list(player.refused.values()) == ["weight lies elsewhere in every call; keep it in one place"]


def without_effect(graphs):
    """Capturing as on a real device: what it writes is not written."""
    capture = FakeGraphs.capture.__get__(graphs)

    def restored(play):
        x = play.__closure__ and next(
            a for cell in play.__closure__ if isinstance(cell.cell_contents, list) for a in cell.cell_contents[1:]
        )
        before = x.clone()
        graph = capture(play)
        x.copy_(before)
        return graph

    return restored


@pytest.mark.parametrize("clone", [True, False])
def test_results_are_the_callers_or_live_until_the_next_play_of_that_size(clone):
    player, _ = setup(clone=clone)
    module = Program()
    results = [check(player, module, (7,), args_of(7)) for _ in range(5)]
    addresses = {r.data_ptr() for r in results[2:]}
    assert len(addresses) == (3 if clone else 1)
    assert torch.equal(results[-1], results[-2]) == (not clone)


def test_ahead_of_the_first_step_the_largest_comes_first():
    player, graphs = setup()
    split, unsplit = Program(), Program()
    plays = [
        Play(module, rows, args_of(sum(rows)))
        for module, rows in [(unsplit, (3,)), (split, (4, 3)), (unsplit, (7,)), (split, (6, 5)), (unsplit, (11,))]
    ]
    player.capture_all(plays)
    assert [key.rows for key in player.graphs] == [(6, 5), (11,), (4, 3), (7,), (3,)]
    assert split.played[:2] == [(6, 5), (4, 3)]  # warm-ups, before any capture
    assert graphs.log == ["capture"] * 5


def test_over_the_memory_bound_the_least_useful_size_goes_uncaptured():
    player, graphs = setup(most_bytes=10 * MIB)
    sizes = iter([7 * MIB, 2 * MIB, 2 * MIB, 4 * MIB, 3 * MIB, MIB])
    graphs.cost = lambda: next(sizes)
    module = Program()
    player.capture_all([Play(module, (n,), args_of(n)) for n in (3, 11, 7, 5)])
    assert [key.rows for key in player.graphs] == [(7,), (5,), (3,)]
    assert list(player.refused.values()) == [
        "it is the least useful size, and with it, graphs take 0.01 GiB, more than graph_memory_gib=0.00976562"
    ]
    assert graphs.log == ["capture"] * 3 + ["new pool"] + ["capture"] * 3
    assert player.num_bytes == 8 * MIB
    for n in (11, 3, 11, 11):
        check(player, module, (n,), args_of(n))
    assert graphs.log[7:] == ["replay"]


def test_a_size_that_is_used_is_kept_over_one_that_is_not():
    player, graphs = setup(most_bytes=10 * MIB)
    module = Program()
    for _ in range(3):
        check(player, module, (11,), args_of(11))
    player.release()
    costs = {11: 9 * MIB, 5: 4 * MIB}
    graphs.cost = lambda: costs[module.played[-1][0]]
    player.capture_all([Play(module, (n,), args_of(n)) for n in (5, 11)])
    assert [key.rows for key in player.graphs] == [(11,)]


def test_in_the_middle_of_work_a_graph_over_the_bound_is_dropped():
    player, graphs = setup(most_bytes=MIB)
    graphs.cost = lambda: 2 * MIB
    module = Program()
    for _ in range(4):
        check(player, module, (7,), args_of(7))
    assert graphs.log == ["capture", "new pool"]
    assert "more than graph_memory_gib" in next(iter(player.refused.values()))


@pytest.mark.parametrize(
    "error", [RuntimeError("operation not permitted when stream is capturing"), torch.OutOfMemoryError("out of memory")]
)
def test_a_capture_that_fails_is_played_uncaptured_with_the_reason(error, caplog):
    player, graphs = setup()
    graphs.error = error
    module = Program()
    with caplog.at_level("WARNING", "dbo_compile"):
        for _ in range(4):
            check(player, module, (7,), args_of(7))
    assert graphs.log == ["capture", "new pool"]
    assert list(player.refused.values()) == [str(error)]
    assert caplog.messages == [f"a step of 7 tokens in 1 is played uncaptured: {error}"]
    graphs.error = None
    for _ in range(3):
        check(player, module, (11,), args_of(11))
    assert [key.rows for key in player.graphs] == [(11,)]


def test_a_program_that_is_gone_leaves_nothing_to_one_in_its_place():
    player, graphs = setup()
    for _ in range(9):  # each may get the address of the last one
        check(player, Program(), (7,), args_of(7))
    assert graphs.log == []


def test_an_error_of_the_program_itself_reaches_the_caller():
    def broken(lanes, n):
        raise KeyError("mine")

    player, _ = setup()
    with pytest.raises(KeyError, match="mine"):
        player(broken, (7,), [7])


def test_inside_somebody_elses_capture_a_program_is_a_part_of_that():
    player, graphs = setup()
    module = Program()
    for _ in range(3):
        check(player, module, (7,), args_of(7))
    graphs.capturing = True
    check(player, module, (7,), args_of(7))
    assert graphs.log == ["capture", "replay", "replay"]


def test_while_another_thread_captures_a_program_is_played_and_captured_later():
    player, graphs = setup()
    module = Program()
    check(player, module, (7,), args_of(7))
    with obstacles._capturing:
        thread = threading.Thread(target=check, args=(player, module, (7,), args_of(7)))
        thread.start()
        thread.join()
    assert graphs.log == []
    check(player, module, (7,), args_of(7))
    assert graphs.log == ["capture", "replay"]


def test_a_tensor_on_another_device_is_named():
    player, graphs = setup(names={2: "x"})
    player.tensors_on = torch.device("meta")
    player.limits = Limits(names={1: "model.scale"})
    for _ in range(3):
        check(player, Program(), (7,), args_of(7)) if not player.refused else None
    module = Program()
    for _ in range(3):
        check(player, module, (7,), args_of(7))
    assert graphs.log == []
    assert next(iter(player.refused.values())) == (
        "model.scale is on cpu and the others on meta: a graph would keep the values that it has now; move it to meta"
    )


def test_a_thousand_replays_leak_nothing_and_do_not_drift():
    player, _ = setup()
    module, x = Program(), torch.randn(7, 5)
    for _ in range(3):
        player(module, (7,), [7, WEIGHT, x.clone()])
    gc.collect()
    before = sum(isinstance(o, torch.Tensor) for o in gc.get_objects())
    for step in range(1000):
        check(player, module, (7,), [7, WEIGHT, x * step])
    assert sum(isinstance(o, torch.Tensor) for o in gc.get_objects()) <= before


def test_the_report_has_each_graph_and_why_others_are_none():
    player, graphs = setup()
    graphs.cost = lambda: 3 * MIB
    module = Program()
    for _ in range(2):
        check(player, module, (4, 3), args_of(7))
    graphs.error = RuntimeError("no")
    for _ in range(2):
        check(player, module, (11,), args_of(11))
    first, *rest = str(player).splitlines()
    assert first.startswith("a step of 7 tokens in 2: 3.0 MiB, 0.")
    assert rest == ["a step of 11 tokens in 1: not captured, no", "1 graphs, 3.0 MiB in all"]


# -- ranks that play together ----------------------------------------------------------------------


class Others(Agreement):
    """The other ranks of several: in each exchange they say what is next in `theirs`, or else that all is well."""

    def __init__(self, *theirs):
        super().__init__(None, timeout_s=1.0)
        self.size, self.theirs, self.told, self.log = 2, list(theirs), 0, []

    def share(self, values):
        self.log.append(tuple(values))
        return [tuple(values), (self.theirs.pop(0) if self.theirs else 0,)]

    def tell(self):
        self.told += 1


READY, BUSY, TOO_MUCH, UNCAPTURABLE = range(4)


def among_ranks(*theirs, **limits):
    player, graphs = setup(**limits)
    player.ranks = Others(*theirs)
    return player, graphs, player.ranks


def test_ranks_exchange_what_becomes_of_a_capture_and_nothing_at_a_replay():
    player, graphs, ranks = among_ranks()
    module = Program()
    for _ in range(9):
        check(player, module, (4, 3), args_of(7))
    assert graphs.log == ["capture", *["replay"] * 8]
    assert ranks.log == [(READY,), (READY,)]


@pytest.mark.parametrize(
    ("theirs", "captures"), [([UNCAPTURABLE], 0), ([READY, UNCAPTURABLE], 1), ([READY, TOO_MUCH], 1)]
)
def test_what_one_rank_cannot_capture_no_rank_replays(theirs, captures):
    player, graphs, ranks = among_ranks(*theirs)
    module = Program()
    for _ in range(5):
        check(player, module, (7,), args_of(7))
    assert (player.graphs, graphs.log) == ({}, ["capture", "new pool"] * captures)
    assert list(player.refused.values()) == ["rank 1 cannot capture it, and says why"]
    assert len(ranks.log) == len(theirs)


@pytest.mark.parametrize("error", [RuntimeError("no"), torch.OutOfMemoryError("out of memory")])
def test_what_this_rank_cannot_capture_the_others_hear_of(error):
    player, graphs, ranks = among_ranks()
    graphs.error = error
    module = Program()
    for _ in range(5):
        check(player, module, (7,), args_of(7))
    assert ranks.log == [(READY,), (UNCAPTURABLE,)]
    assert list(player.refused.values()) == [str(error)]


def test_while_another_rank_is_busy_no_rank_captures_and_all_try_again():
    player, graphs, ranks = among_ranks(BUSY)
    module = Program()
    for _ in range(4):
        check(player, module, (7,), args_of(7))
    assert graphs.log == ["capture", "replay", "replay"]
    assert ranks.log == [(READY,)] * 3
    with obstacles._capturing:
        for _ in range(2):
            check(player, module, (11,), args_of(11))
    assert ranks.log[3:] == [(BUSY,)]
    assert player.refused == {}


def test_over_the_memory_bound_of_one_rank_all_leave_out_the_same_size():
    player, *_ = among_ranks(READY, TOO_MUCH)
    module = Program()
    player.capture_all([Play(module, (n,), args_of(n)) for n in (3, 11, 7)])
    assert [key.rows for key in player.graphs] == [(7,), (3,)]
    assert list(player.refused.values()) == ["it is the least useful size, and rank 1 cannot capture it, and says why"]


def test_a_weight_that_moves_on_one_rank_is_replayed_all_the_same_and_then_forgotten_on_all():
    player, graphs, ranks = among_ranks(static=frozenset({1}))
    module, weight = Program(), torch.nn.Parameter(WEIGHT.clone(), requires_grad=False)
    for _ in range(3):
        check(player, module, (7,), args_of(7, weight))
    old = weight.data
    weight.data = WEIGHT * 3
    for _ in range(2):
        check(player, module, (7,), args_of(7, weight))
    assert (ranks.told, player.news) == (2, 1)
    assert torch.equal(old, WEIGHT)
    assert graphs.log == ["capture", *["replay"] * 4]
    player.settle([player.news, 0])
    for _ in range(3):
        check(player, module, (7,), args_of(7, weight))
    assert graphs.log[5:] == ["new pool", "capture", "replay", "replay"]
    assert (ranks.told, player.news) == (2, 0)


def test_what_moved_on_another_rank_is_forgotten_here():
    player, graphs, _ = among_ranks()
    module = Program()
    for _ in range(3):
        check(player, module, (7,), args_of(7))
    player.settle([0, 0])
    assert len(player.graphs) == 1
    player.settle([0, 1])
    assert player.graphs == {}
    for _ in range(2):
        check(player, module, (7,), args_of(7))
    assert graphs.log[3:] == ["new pool", "capture", "replay"]


def test_state_of_tokens_that_is_padded_on_another_rank_is_copied_on_all():
    def counts(lanes, n, state):
        state += n
        return state * 2, state

    player, graphs, _ = among_ranks(written=frozenset({1}), tokens=frozenset({1}))
    graphs.capture = without_effect(graphs)
    state = torch.zeros(3)
    for step in range(1, 10):
        if step == 4:
            player.settle([0, 1 << 1])
        doubled, same = player(counts, (7,), [7, state])
        assert same is state
        assert torch.equal(state, torch.full((3,), 7.0 * step))
        assert torch.equal(doubled, 2 * state)
    (captured,) = player.graphs.values()
    assert (list(captured.pinned), list(captured.copied)) == ([], [1])


def test_state_that_moved_is_written_where_it_is_now():
    def counts(lanes, n, state):
        state += n
        return (state * 2,)

    player, graphs, ranks = among_ranks(written=frozenset({1}))
    graphs.capture = without_effect(graphs)
    first = torch.zeros(3)
    for _ in range(3):
        player(counts, (7,), [7, first])
    moved = torch.ones(3)
    (doubled,) = player(counts, (7,), [7, moved])
    assert (first.tolist(), moved.tolist(), doubled.tolist()) == ([21.0] * 3, [8.0] * 3, [16.0] * 3)
    assert graphs.log == ["capture", *["replay"] * 3]
    assert ranks.told == 1


def test_the_loss_of_a_rank_reaches_the_caller():
    player, _, ranks = among_ranks()
    module = Program()
    check(player, module, (7,), args_of(7))

    def share(values):
        raise RankLost("rank 1 left")

    ranks.share = share
    with pytest.raises(RankLost, match="rank 1 left"):
        check(player, module, (7,), args_of(7))
    assert not obstacles._capturing.locked()
