"""Measuring: how fast, with how much memory, and how near to what the machine can do.

In reading order:

    records.py         a result, and the file of them
    facts.py           the machine, the versions and the commit behind them
    limits.py          what the machine can do at most
    timing.py          competitors in turns, round by round
    comparison.py      who competes at what, how much work that is, and the records it becomes
    op_cases.py        single operations, which op_check.py holds to the reference at the size that is timed
    model_cases.py     prompts, decoding and whole texts, of the models of models.py
    training_cases.py, startup_cases.py, tokenizer_cases.py
    memory.py          the most memory, each case in a process of its own
    peers/             GPT-2 124M beside other libraries
    suite.py           which of it makes a quick, a usual and a full run
    tables.py          records for a terminal; report.py  as a page, with the pictures of plots.py

`llmfast bench` runs it, and so does `pytest benchmarks --benchmark-only` in a checkout.
"""
