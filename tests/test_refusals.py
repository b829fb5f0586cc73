"""What cannot be split is played on all tokens, with the reason and the user's line, and the answer is right."""

from __future__ import annotations

import re

import pytest
import torch
import torch.distributed as dist
import torch.distributed._functional_collectives as funcol
from torch import nn
from torch.nn import functional as F

from dbo_compile import Config, reports
from dbo_compile.report import new_reports

ALWAYS = {"split": "always", "inner": "eager"}


def run(fn, *inputs, options=ALWAYS):
    """`fn` compiled, called on `inputs`; its result and its report."""
    compiled = torch.compile(fn, backend="dbo", options=options, fullgraph=True)
    with torch.no_grad():
        return compiled(*inputs), reports()[-1]


def barrier_of(report):
    """The only reason in the report, and that it names a line of this file."""
    ((op, reason),) = report.barriers.items()
    assert "test_refusals.py" in op
    return reason


class Normed(nn.Module):
    def __init__(self):
        super().__init__()
        self.lin, self.norm = nn.Linear(6, 6), nn.BatchNorm1d(6)

    def forward(self, x):
        return self.lin(self.norm(self.lin(x)))


def test_batch_statistics_are_a_barrier():
    model, reference = Normed().double().train(), Normed().double().train()
    reference.load_state_dict(model.state_dict())
    x = torch.randn(7, 6, dtype=torch.float64)
    got, report = run(model, x)
    with torch.no_grad():
        torch.testing.assert_close(got, reference(x), rtol=0, atol=1e-12)
    torch.testing.assert_close(model.norm.running_mean, reference.norm.running_mean, rtol=0, atol=1e-12)
    assert model.norm.num_batches_tracked == 1
    assert report.calls_split == 1
    assert "statistics" in next(iter(report.barriers.values()))


@pytest.mark.parametrize(
    ("fn", "reason"),
    [
        (lambda x: x * x.mean(0), "reduces over the token dim 0"),
        (lambda x: x * torch.softmax(x.exp(), 0), "normalises over the token dim 0"),
        (lambda x: x + x.cumsum(0), "adds up values of many tokens"),
        (lambda x: x * 2 / x.shape[0], "number of tokens"),
        (lambda x: x @ (x.T @ x), "sums over the tokens"),
        (lambda x: x.flip(0) + 1, "token"),
        (lambda x: x.exp()[1:].sum(1), "takes some of the tokens"),
        (lambda x: F.pad(x.exp(), (0, 0, 1, 0)).sum(1), "token"),
    ],
    ids=["mean", "softmax", "cumsum", "count", "gram", "flip", "slice", "pad"],
)
def test_an_op_that_mixes_tokens_is_a_barrier_with_its_line(fn, reason):
    x = torch.randn(9, 5, dtype=torch.float64)
    got, report = run(fn, x)
    torch.testing.assert_close(got, fn(x), rtol=0, atol=1e-12)
    assert report.calls_split == 1, (report.reason, report.decline_counts)
    assert reason in barrier_of(report)


def counted(x):
    """As many rows of a constant as a number says that was read out of data: as there are tokens."""
    count = ((x.sum() < 1e9).long() * x.shape[0]).item()
    torch._check(count >= 0)
    torch._check(count <= 40)
    return torch.arange(200, dtype=x.dtype).view(40, 5)[:count]


def sent(x):
    return x + funcol.all_to_all_single(counted(x), [x.shape[0]], [x.shape[0]], dist.group.WORLD)


@pytest.mark.usefixtures("group")
@pytest.mark.parametrize(
    ("fn", "reason"),
    [
        (lambda x: x + counted(x).reshape(x.shape[0], -1), "checks the number of all tokens against one that is"),
        (sent, "sends the same rows for all microbatches, by numbers of which each has its own"),
    ],
    ids=["checked", "sent"],
)
def test_numbers_of_all_tokens_do_not_meet_those_of_a_microbatch(fn, reason):
    x = torch.randn(9, 5, dtype=torch.float64)
    with torch._dynamo.config.patch(capture_scalar_outputs=True):
        got, report = run(fn, x)
    torch.testing.assert_close(got, fn(x), rtol=0, atol=1e-12)
    assert any(reason in why for why in report.barriers.values())


def test_dropout_draws_what_eager_draws():
    def fn(x):
        return F.dropout(x.exp(), 0.5, training=True).sin()

    x = torch.randn(9, 5, dtype=torch.float64)
    torch.manual_seed(3)
    want = fn(x)
    torch.manual_seed(3)
    got, report = run(fn, x)
    torch.testing.assert_close(got, want, rtol=0, atol=1e-12)
    assert "random" in next(iter(report.barriers.values()))


@pytest.mark.parametrize(
    "fn",
    [
        lambda x: x * torch.arange(x.shape[0], dtype=x.dtype)[:, None],
        lambda x: x + F.embedding(torch.arange(x.shape[0]), torch.arange(600.0, dtype=x.dtype).view(-1, 1)),
        lambda x: x + x[torch.arange(x.shape[0])],
        lambda x: torch.where(torch.arange(x.shape[0])[:, None] < 4, x, -x),
    ],
    ids=["value", "table", "rows", "compared"],
)
def test_row_numbers_are_those_of_the_step(fn):
    x = torch.randn(9, 5, dtype=torch.float64)
    got, report = run(fn, x)
    torch.testing.assert_close(got, fn(x), rtol=0, atol=1e-12)
    assert report.calls_split == 1
    assert report.barriers == {}


class CapacityMoE(nn.Module):
    """Each expert takes the first `capacity` tokens routed to it and drops the others: a split would drop others."""

    def __init__(self, num_experts=3, capacity=2):
        super().__init__()
        self.router = nn.Linear(5, num_experts)
        self.experts = nn.Parameter(torch.randn(num_experts, 5, 5))
        self.capacity = capacity

    def forward(self, x):
        chosen = F.one_hot(self.router(x).argmax(-1), self.experts.shape[0])
        position = (chosen.cumsum(0) * chosen).sum(-1) - 1
        keep = position < self.capacity
        out = torch.einsum("td,tdh->th", x, self.experts[chosen.argmax(-1)])
        return x + out * keep[:, None]


def test_a_capacity_drops_the_tokens_that_eager_drops():
    model = CapacityMoE().double()
    x = torch.randn(11, 5, dtype=torch.float64)
    got, report = run(model, x)
    with torch.no_grad():
        torch.testing.assert_close(got, model(x), rtol=0, atol=1e-12)
    assert report.calls_split == 1, (report.reason, report.decline_counts)
    assert any("positions or counts" in reason for reason in report.barriers.values()), report.barriers


@torch.library.custom_op("dbo_test::opaque", mutates_args=())
def opaque(x: torch.Tensor) -> torch.Tensor:
    return x - x.mean(0)


@opaque.register_fake
def _(x):
    return torch.empty_like(x)


def test_an_unknown_op_is_a_barrier_and_the_reason_says_what_to_do():
    x = torch.randn(9, 5, dtype=torch.float64)
    got, report = run(lambda x: opaque(x.exp()).sin(), x)
    torch.testing.assert_close(got, opaque(x.exp()).sin(), rtol=0, atol=1e-12)
    assert "register_rule" in barrier_of(report)


def test_a_single_token_is_not_split_and_says_so():
    got, report = run(torch.exp, torch.ones(1, 4))
    assert torch.equal(got, torch.ones(1, 4).exp())
    assert not report.split
    assert report.reason == "it has a single token"


def test_token_dims_that_name_no_input_are_said_where_a_guess_finds_a_single_token():
    """A model that takes `input_ids` in its `**kwargs` has another name for it where it is given by position."""
    got, report = run(torch.exp, torch.ones(1, 4), options=ALWAYS | {"token_dims": {"input_ids": 1}})
    assert torch.equal(got, torch.ones(1, 4).exp())
    assert re.fullmatch(r"token_dims names none of its inputs \(\w+\), and .* a single token", report.reason)


def test_a_size_that_the_model_fixes_is_not_split_and_says_so():
    def fn(x):
        return x.exp() * 2 if x.shape[0] == 6 else x

    x = torch.randn(6, 4)
    got, report = run(fn, x)
    assert torch.equal(got, fn(x))
    assert not report.split
    assert "specialised" in report.reason


def test_autograd_gets_inductor_and_its_gradients():
    lin = nn.Linear(4, 4)
    x = torch.randn(6, 4)
    compiled = torch.compile(lin, backend="dbo", options={"split": "always"})
    compiled(x).sum().backward()
    got = lin.weight.grad.clone()
    lin.weight.grad = None
    lin(x).sum().backward()
    torch.testing.assert_close(got, lin.weight.grad)
    assert "no_grad" in reports()[-1].reason


def test_without_communication_there_is_nothing_to_split():
    _, report = run(torch.exp, torch.randn(6, 4), options={"inner": "eager"})
    assert not report.split
    assert "no communication" in report.reason


def test_a_model_without_tensors_is_not_split():
    got, report = run(lambda n: torch.full((3,), 2.0) * n, 5)
    assert torch.equal(got, torch.full((3,), 10.0))
    assert "none of its inputs" in report.reason


def test_a_graph_break_splits_each_graph_on_its_own():
    def fn(x):
        y = x.exp().sin()
        torch._dynamo.graph_break()
        return y.cos() + 1

    x = torch.randn(9, 5)
    before = reports()
    compiled = torch.compile(fn, backend="dbo", options=ALWAYS)
    with torch.no_grad():
        for n in (9, 4):
            torch.testing.assert_close(compiled(x[:n]), fn(x[:n]))
    assert [r.calls_split for r in new_reports(before)] == [2, 2]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"splitt": "always"}, "split"),
        ({"split": "sometimes"}, "always"),
        ({"num_microbatches": "two"}, "num_microbatches"),
    ],
)
def test_a_wrong_option_is_an_error_before_anything_is_compiled(options, message):
    with pytest.raises(ValueError, match=message):
        Config.from_options(options)
    with pytest.raises(Exception, match=message):
        run(torch.exp, torch.randn(4, 4), options=options)


def test_the_environment_turns_splitting_off(monkeypatch):
    monkeypatch.setenv("DBO_SPLIT", "never")
    _, report = run(torch.exp, torch.randn(6, 4))
    assert report.reason == 'split="never"'
