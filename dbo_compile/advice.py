"""What a user can do about a reason for not splitting."""

from __future__ import annotations

import re

_ADVICE = (
    (r'split="never"', "Leave out split=\"never\" and DBO_SPLIT=never."),
    (r"autograd", "Call the model under torch.no_grad() or torch.inference_mode()."),
    (r"no communication to hide", "Nothing to do: without communication there is nothing to overlap."),
    (r"could carry tokens", "Name the inputs that carry tokens: options={'token_dims': {'input_ids': 0}}."),
    (r"has a single token|do not make \d+ microbatches", "Give a step more tokens: two rows of the token dim or more."),
    (r"writes its input .* in place|no program can be made", "Have the model return it, and write it after the call."),
    (r"was timed to be faster", "Nothing to do: splitting costs more than it hides here; see the decisions."),
    (r"timing it", "Nothing to do: each way to play a size is timed on its first calls."),
    (r"num_microbatches=1", "Ask for two microbatches: num_microbatches=2."),
    (r"another rank|declined|the graph of ranks? ", "Look at the reports of the other ranks: all split, or none."),
    (r"splitting changed", "Find the op with dbo_compile.verify; a rule of yours may promise too much."),
    (r"is split from \d+ on", "Lower the option min_tokens, if splitting pays at that size."),
    (r"specialised|no other size of the model", "Call it first with a number of tokens that is no other size."),
    (r"token inputs differ|of different sizes", "Name the inputs that carry tokens with the option token_dims."),
    (r"the graph is made for", "Call it first with several requests: a size that is 1 in the first call is fixed."),
    (r"which tokens belong to one request", "Tell it of the requests: token_dims={'cu_seqlens': CuSeqlens()}, say."),
    (r"has to stay whole", "Say with register_attention_op what caches attention has: then a request may be cut."),
    (r"keeps what the graph was compiled for", "Pad to a size that is a multiple of what the guard asks for."),
    (r"nested compile region", "Give the region the whole tensor, or leave nested_compile_region off what writes it."),
    (r"depends on its data", "Use a form of fixed size: torch.where or a mask instead of nonzero or x[mask]."),
    (r"no placement rule", "Teach it: dbo_compile.register_rule(op); see the docs, adding a rule."),
    (r"random numbers", "Call model.eval(), or take random numbers as an input."),
    (r"reads a number out|single number", "Keep the number on the device, as a tensor of the token's row."),
    (r"place among all tokens", "Exchange rows that were sorted by their rank, as integrations.expert_parallel does."),
    (r"count through all tokens|by row numbers|its place", "Read by numbers that belong to each token."),
    (r"largest among many tokens|counts of rows|limit", "Route without a capacity that drops tokens."),
    (r"sorts values .* no integers", "Sort integers, such as expert numbers: other values mix tokens."),
    (r"statistics over all tokens", "Call model.eval(): batch statistics are taken in training alone."),
    (r"are in the .* dim, and it relates them", "Make the batch the token dim: tokens of a sequence need each other."),
    (r"mask", "Give the mask the token dim of what it masks, one row for each token."),
    (r"(sums?|reduces|adds? up|largest|smallest).*(token|rows)", "A sum or mean over tokens needs them all: make "
     "it one per token, or leave it out of inference, as an auxiliary loss can be."),
    (r"view|merges or cuts|flattens", "Keep the token dim a dim of its own, or fold only dims after it into it."),
)  # fmt: skip
ANY = "It is played once on all tokens; between splits that costs a join. What comes before and after it is split."


def advice(reason: str) -> str:
    """A sentence for the user; the first that fits."""
    return next((text for pattern, text in _ADVICE if re.search(pattern, reason)), ANY)
