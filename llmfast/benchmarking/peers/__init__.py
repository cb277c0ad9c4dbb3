"""Models on a CPU beside the libraries that one would take instead: llama.cpp, CTranslate2, transformers and
openvino-genai.

    CMAKE_ARGS=-DGGML_NATIVE=ON pip install -e ".[peers]"     # builds llama.cpp for this CPU, about five minutes
    llmfast bench peers --model smollm2                       # the real model's file; without --model GPT-2 124M
    llmfast bench peers                                       # under ten minutes; --quick under two, --threads 4

docs/benchmarks.md says what is measured and how. In reading order:

    plan.py       who is measured at what, and what it should come to
    counting.py   the bytes and the operations that the work needs, for shares of the machine's limits
    making.py     the same weights in every engine's format; models.py  what the peers' libraries make of them
    engines.py    each library behind the same three functions
    worker.py     the process around one of them; client.py  the other end of its pipes
    campaign.py   the measurement of a group; report.py  its records; session.py  all groups

Files that the workers need import each other relatively: a worker knows this folder as the package `peers`, so that
the process of another library holds neither llmfast nor, unless it wants to, torch.
"""
