"""Measuring: how fast, with how much memory, and how near to what the machine can do.

In reading order:

    records.py         a result, and the file of them
    facts.py           the machine, the versions and the commit behind them
    limits.py          what the machine can do at most
    timing.py          competitors in turns, round by round
    op_cases.py …      what is measured: how to run it, how to check it, its bytes and operations
    suite.py           which of it makes a quick, a usual and a full run

`llmfast bench` runs it, and so does `pytest benchmarks --benchmark-only` in a checkout.
"""
