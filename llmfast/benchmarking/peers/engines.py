"""Each library behind the same functions: read a prompt, take one more token, give the logits of the last position.

A library is imported when its engine is made, so that the process of one never holds another's threads or memory.
Every engine gets the same token ids, one sequence, a cache of `capacity` positions and the same number of threads.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from .plan import CT2, HF, HF_COMPILED, LLAMA, OPENVINO, OURS


class Engine:
    """`base` is what the process imports before its memory counts as the engine's."""

    base = "torch"

    def __init__(self, models: Path, precision: str, capacity: int, threads: int):
        raise NotImplementedError

    def prefill(self, ids: list[int]) -> None:
        """Starts over with a prompt, up to the logits of its last position."""
        raise NotImplementedError

    def step(self, token: int) -> None:
        """One token more, up to the logits after it."""
        raise NotImplementedError

    def logits(self) -> np.ndarray:
        """(vocabulary,) float32, of the last call."""
        raise NotImplementedError

    def time_prefill(self, ids: list[int]) -> float:
        """Seconds."""
        start = time.perf_counter()
        self.prefill(ids)
        return time.perf_counter() - start

    def time_decode(self, prompt: list[int], new: list[int]) -> float:
        """Seconds that the new tokens take after the prompt."""
        self.prefill(prompt)
        start = time.perf_counter()
        for token in new:
            self.step(token)
        return time.perf_counter() - start


class Llmfast(Engine):
    def __init__(self, models: Path, precision: str, capacity: int, threads: int):
        import torch

        import llmfast

        torch.set_num_threads(threads)
        self.torch = torch
        file = models / f"{precision}.gguf"  # of a precision that is no other than a file's, its file
        source = file if precision.startswith("q") else models / "hf"
        llm = llmfast.load(source, precision=precision, device="cpu")
        self.decoder = llm.decoder(batch=1, capacity=capacity)
        self.last: Any = None

    def prefill(self, ids: list[int]) -> None:
        self.last = self.decoder.prefill([ids])

    def step(self, token: int) -> None:
        self.last = self.decoder.step(self.torch.tensor([token]))

    def logits(self) -> np.ndarray:
        return self.last[0].float().numpy()


class LlamaCpp(Engine):
    base = "llama_cpp"

    def __init__(self, models: Path, precision: str, capacity: int, threads: int):
        import llama_cpp

        self.llama_cpp = llama_cpp
        self.model = llama_cpp.Llama(
            model_path=str(models / f"{precision}.gguf"),
            n_ctx=capacity,
            n_batch=512,
            n_ubatch=512,
            n_threads=threads,
            n_threads_batch=threads,
            flash_attn=True,
            verbose=False,
        )

    def prefill(self, ids: list[int]) -> None:
        self.model.reset()
        self.model.eval(ids)

    def step(self, token: int) -> None:
        self.model.eval([token])

    def logits(self) -> np.ndarray:
        pointer = self.llama_cpp.llama_get_logits(self.model.ctx)
        return np.ctypeslib.as_array(pointer, shape=(self.model.n_vocab(),)).copy()


class Transformers(Engine):
    def __init__(self, models: Path, precision: str, capacity: int, threads: int):
        import torch
        from transformers import AutoModelForCausalLM

        torch.set_num_threads(threads)
        torch.set_grad_enabled(False)
        self.torch = torch
        dtype = {"fp32": torch.float32, "bf16": torch.bfloat16}[precision]
        loaded = AutoModelForCausalLM.from_pretrained(models / "hf", dtype=dtype, attn_implementation="sdpa")
        self.model = loaded.eval()
        self.last: Any = None

    def prefill(self, ids: list[int]) -> None:
        self.last = self.model(self.torch.tensor([ids]), use_cache=True, logits_to_keep=1)

    def step(self, token: int) -> None:
        cache = self.last.past_key_values
        self.last = self.model(self.torch.tensor([[token]]), past_key_values=cache, use_cache=True)

    def logits(self) -> np.ndarray:
        return self.last.logits[0, -1].float().numpy()


class TransformersCompiled(Transformers):
    """With its cache of fixed size, as compiling asks for. Prompts, whose lengths differ, are read uncompiled."""

    def __init__(self, models: Path, precision: str, capacity: int, threads: int):
        from transformers import StaticCache

        super().__init__(models, precision, capacity, threads)
        self.cache = StaticCache(config=self.model.config, max_cache_len=capacity)
        self.compiled = self.torch.compile(self.model.forward)
        self.length = 0

    def prefill(self, ids: list[int]) -> None:
        self.cache.reset()
        self.length = len(ids)
        self.last = self.model(self.torch.tensor([ids]), past_key_values=self.cache, use_cache=True, logits_to_keep=1)

    def step(self, token: int) -> None:
        position = self.torch.tensor([[self.length]])
        self.last = self.compiled(
            self.torch.tensor([[token]]), past_key_values=self.cache, use_cache=True, position_ids=position
        )
        self.length += 1


class CTranslate2(Engine):
    """It has no call for one step: decoding is timed from a generation's first token to its last, as they arrive."""

    base = "ctranslate2"

    def __init__(self, models: Path, precision: str, capacity: int, threads: int):
        import ctranslate2

        self.model = ctranslate2.Generator(
            str(models / "ct2"), device="cpu", compute_type=precision, inter_threads=1, intra_threads=threads
        )
        self.ids: list[int] = []

    def prefill(self, ids: list[int]) -> None:
        self.ids = ids
        self._generate(ids, 1)

    def logits(self) -> np.ndarray:
        tokens = [f"t{i}" for i in self.ids]
        return np.array(self.model.forward_batch([tokens], return_log_probs=False))[0, -1].astype(np.float32)

    def time_decode(self, prompt: list[int], new: list[int]) -> float:
        arrivals: list[float] = []
        self._generate(prompt, 1 + len(new), lambda _: arrivals.append(time.perf_counter()))
        return arrivals[-1] - arrivals[0]

    def _generate(self, ids: list[int], count: int, on_token: Callable[[Any], None] | None = None) -> None:
        self.model.generate_batch(
            [[f"t{i}" for i in ids]],
            min_length=count,
            max_length=count,
            sampling_topk=1,
            include_prompt_in_result=False,
            end_token=[],
            callback=on_token,
        )


class OpenVINO(Engine):
    """It has no call for one step, and gives no logits: it says itself how long the first token and the others took."""

    base = "openvino_genai"

    def __init__(self, models: Path, precision: str, capacity: int, threads: int):
        import openvino
        import openvino_genai

        self.openvino, self.genai = openvino, openvino_genai
        forgetful = openvino_genai.SchedulerConfig()
        forgetful.enable_prefix_caching = False  # or a prompt that it has seen before takes it no time
        file = str(models / f"{precision}.gguf")
        self.model = openvino_genai.LLMPipeline(file, "CPU", scheduler_config=forgetful, INFERENCE_NUM_THREADS=threads)

    def prefill(self, ids: list[int]) -> None:
        self._metrics(ids, 1)

    def time_prefill(self, ids: list[int]) -> float:
        return self._metrics(ids, 1).get_ttft().mean / 1000

    def time_decode(self, prompt: list[int], new: list[int]) -> float:
        return self._metrics(prompt, 1 + len(new)).get_tpot().mean / 1000 * len(new)

    def _metrics(self, ids: list[int], count: int) -> Any:
        tensors = [self.openvino.Tensor(np.array([row], dtype=np.int64)) for row in (ids, [1] * len(ids))]
        config = self.genai.GenerationConfig()
        config.max_new_tokens, config.do_sample, config.ignore_eos = count, False, True
        return self.model.generate(self.genai.TokenizedInputs(*tensors), config).perf_metrics


ENGINES: dict[str, type[Engine]] = {
    OURS: Llmfast,
    LLAMA: LlamaCpp,
    CT2: CTranslate2,
    HF: Transformers,
    HF_COMPILED: TransformersCompiled,
    OPENVINO: OpenVINO,
}
