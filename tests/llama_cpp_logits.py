"""What llama.cpp computes, for tests: run by a Python that has llama-cpp-python.

    llama_cpp_logits.py JOBS.json OUT.npz   # jobs: [{"file", "ids", "new", "text", "from", "type"}]

A job whose `type` is given first makes its file of the file `from`, by llama.cpp's quantiser. Of job i OUT holds
`logits.i` (T, V) after each of its ids, `greedy.i`, the `new` tokens that follow, and `tokens.i`, the ids of its text.
Keys and values are kept in float32, and weights as they are in the file: repacking them changes nothing but the speed,
and for AMX it ends in an illegal instruction where the system does not let programs use that.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

import numpy as np
from llama_cpp import Llama, llama_cpp

defaults = llama_cpp.llama_model_default_params


def as_in_the_file():
    parameters = defaults()
    parameters.use_extra_bufts = False
    return parameters


def main(jobs: str, out: str) -> None:
    llama_cpp.llama_model_default_params = as_in_the_file
    arrays = {}
    for i, job in enumerate(json.loads(Path(jobs).read_text(encoding="utf-8"))):
        if "type" in job:
            parameters = llama_cpp.llama_model_quantize_default_params()
            parameters.ftype, parameters.nthread = getattr(llama_cpp, f"LLAMA_FTYPE_MOSTLY_{job['type']}"), 1
            assert llama_cpp.llama_model_quantize(job["from"].encode(), job["file"].encode(), parameters) == 0
        model = Llama(
            job["file"],
            n_ctx=64,
            n_threads=1,
            n_threads_batch=1,
            logits_all=True,
            type_k=0,
            type_v=0,
            verbose=False,
        )
        model.eval(job["ids"])
        arrays[f"logits.{i}"] = np.array(model.scores[: model.n_tokens])
        greedy = []
        for _ in range(job["new"]):
            greedy.append(int(np.argmax(model.scores[model.n_tokens - 1])))
            model.eval(greedy[-1:])
        arrays[f"greedy.{i}"] = np.array(greedy)
        if job.get("text") is not None:
            arrays[f"tokens.{i}"] = np.array(model.tokenize(job["text"].encode(), add_bos=False, special=False))
        model.close()
    np.savez(out, **arrays)


if __name__ == "__main__":
    main(*sys.argv[1:3])
