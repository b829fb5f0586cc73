"""What a user vouches for, so that it need not be taken on trust."""

from __future__ import annotations

from contextlib import AbstractContextManager

from torch.fx.traceback import annotate


def token_local() -> AbstractContextManager[object]:
    """Vouch for a region of a model: rows that are put back there, in some order of their own, come to their tokens.

    A context manager, and a decorator of functions. Its ops are split like all others, but what their rules would take
    on trust is no open question any more: it is not reported, and the gate does not make barriers of it.

        with dbo_compile.token_local():
            out[slots] = experts(rows)

    If that is wrong, results are wrong unless the gate finds out. In eager mode it does nothing.
    """
    context: AbstractContextManager[object] = annotate({"dbo_compile": "token_local"})
    return context
