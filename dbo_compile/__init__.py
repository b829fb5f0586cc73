"""dbo-compile: dual-batch overlap for any PyTorch model, as a `torch.compile` backend.

`torch.compile(model, backend="dbo")` splits the tokens of a step into two microbatches and plays the communication of one
under the compute of the other.
"""

from dbo_compile.config import Config
from dbo_compile.explain import Explanation, Verification, explain, verify
from dbo_compile.report import Report, reports
from dbo_compile.rules.collectives import register_comm_op
from dbo_compile.rules.registry import rule as register_rule

__all__ = [
    "Config",
    "Explanation",
    "Report",
    "Verification",
    "explain",
    "register_comm_op",
    "register_rule",
    "reports",
    "verify",
]
