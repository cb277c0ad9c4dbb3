"""What it means to be right: the cases, the tolerance rule and the suite that every backend has to pass.

`cases` is the table of calls, `checking` compares one of them with the float64 reference, `suite` runs them all.
The tests parametrise over it, `llmfast verify` runs it from a wheel, against anybody's backend.
"""

from llmfast.contract.cases import CASES, Case
from llmfast.contract.checking import Comparison, Outcome, check
from llmfast.contract.suite import Plan, Summary, Task, Verdict, plan, run, summarise

__all__ = [
    "CASES",
    "Case",
    "Comparison",
    "Outcome",
    "Plan",
    "Summary",
    "Task",
    "Verdict",
    "check",
    "plan",
    "run",
    "summarise",
]
