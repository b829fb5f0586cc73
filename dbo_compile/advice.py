"""What a user can do about a reason for not splitting.

A pattern fits the beginning of a reason, in the words of the code that gives it: a word alone, such as `view`, may be
the name of an op or a tensor.
"""

from __future__ import annotations

import re

_ADVICE = (
    (r'split="never"', "Leave out split=\"never\" and DBO_SPLIT=never."),
    (r"autograd needs a backward", "torch.inference_mode() will do as well, or model.requires_grad_(False)."),
    (r"it has no communication to hide", "Nothing to do: without communication there is nothing to overlap."),
    (r"none of its inputs is a tensor", "Name the inputs that carry tokens: options={'token_dims': {'input_ids': 0}}."),
    (r"token_dims names none of its", "Name one of these there, or give a step more tokens: two rows or more."),
    (r"(it has a single token|.* do not make \S+ microbatches)", "Give a step more tokens: two rows of the token dim "
     "or more."),
    (r"(it writes its input \S+ in place|no program can be made)", "Have the model return it, and write it after the "
     "call."),
    (r"\S+ was timed to be faster", "Nothing to do: splitting costs more than it hides here; see the decisions."),
    (r"timing it ", "Nothing to do: each way to play a size is timed on its first calls."),
    (r"no rank has tokens", "Nothing to do: there was nothing to play."),
    (r"num_microbatches=1", "Ask for two microbatches: num_microbatches=2."),
    (r"(another rank cannot|ranks? .* declined$|the graph of ranks? )", "Look at the reports of the other ranks: all "
     "split, or none."),
    (r"ranks have other programs for this graph", "Mark the sizes that differ before the first call, on every rank: "
     "torch._dynamo.mark_dynamic(input_ids, 1)."),
    (r"splitting changed ", "Find the op with dbo_compile.verify; a rule of yours may promise too much."),
    (r".*, and a \w+ is split from ", "Lower the option min_tokens, if splitting pays at that size."),
    (r"the model was specialised to", "Call it first with a size that no other dim of the model has."),
    (r"\S+ (has another dim whose size|is traced with a size)", "A prime number seldom is one: 97 tokens, 7 requests."),
    (r"its inputs differ in", "Name the inputs that carry tokens with the option token_dims."),
    (r"\S+ says how an input that tells of requests lies", "Call .contiguous() on it, before the model is called."),
    (r"microbatch \S+ would have", "Call it first with several requests: a size that is 1 in the first call is fixed."),
    (r"nothing tells which tokens belong", "Tell it of the requests: token_dims={'cu_seqlens': CuSeqlens()}, say."),
    (r"all ranks must have as many rows", "Say with register_attention_op what caches attention has: then a request "
     "may be cut."),
    (r"(no split of .* keeps what|what is played once was not compiled)", "Pad to a size that is a multiple of what "
     "the guard asks for."),
    (r"a nested compile region writes", "Give the region the whole tensor, or leave nested_compile_region off what "
     "writes it."),
    (r"the size of the result of \S+ depends", "Use a form of fixed size: torch.where or a mask instead of nonzero or "
     "x[mask]."),
    (r"\S+ has no placement rule", "A rule takes a line or two: see the docs, adding a rule. For an exchange there is "
     "register_comm_op, for attention register_attention_op."),
    (r"\S+ is part of a result that is a view", "Return a copy of it: .clone()."),
    (r"it draws random numbers|it drops elements by a mask", "Call model.eval(), or take random numbers as an input."),
    (r"it reads a (number out of|single number)", "Keep the number on the device, as a tensor of the token's row."),
    (r"which rank a row goes (back )?to depends", "Exchange rows that were sorted by their rank, as "
     "integrations.expert_parallel does."),
    (r"it reads (elements by numbers that count|what all tokens share by|a row of what all tokens share)", "Read by "
     "numbers that belong to each token."),
    (r"it (takes the largest among|compares positions or counts of) ", "Route without a capacity that drops tokens."),
    (r"it sorts values of many tokens", "Sort integers, such as expert numbers: other values mix tokens."),
    (r"it takes statistics over all tokens", "Call model.eval(): batch statistics are taken in training alone."),
    (r"its tokens are in the .* dim, and it relates", "Make the batch the token dim: tokens of a sequence need each "
     "other."),
    (r"its (block )?mask (.* )?(has size|has a size|has no row|carries tokens in)", "Give the mask the token dim of "
     "what it masks, one row for each token."),
    (r"it (sums over|reduces over|normalises over|adds up) ", "A sum or mean over tokens needs them all: make it one "
     "per token, or leave it out of inference, as an auxiliary loss can be."),
    (r"(the view .* merges or cuts|it flattens dims before) ", "Keep the token dim a dim of its own, or fold only dims "
     "after it into it."),
)  # fmt: skip
ANY = "It is played once on all tokens; between splits that costs a join. What comes before and after it is split."
_NEEDED = " needs its result for all tokens at once, because "


def advice(reason: str) -> str:
    """A sentence for the user; the first that fits, of what another op needs that of the other op."""
    own = reason.rpartition(_NEEDED)[2]
    return next((text for pattern, text in _ADVICE if re.match(pattern, own)), ANY)
