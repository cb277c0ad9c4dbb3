"""The native decoder: one C++ call a step, on weights packed for this CPU (`csrc/decoder/native_decoder.h`).

weights = NativeModel(config, tensors, "bf16")          # packed once
decoder = NativeDecoder(weights, batch=1, capacity=512)  # a KV cache of its own; any number may share the weights
logits = decoder.prefill([[1, 2, 3]])
logits = decoder.step(torch.tensor([4]))
"""

from __future__ import annotations

import weakref
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from llmfast.backends import BackendUnavailable, cpp, resolve
from llmfast.inference.decoders.protocol import Decoder, precision_label
from llmfast.inference.finite import check_chosen
from llmfast.inference.sampling import Sampler, SamplingSettings, uniform_numbers
from llmfast.models import ModelConfig
from llmfast.models.architecture import Parameter
from llmfast.quantization.encodings import ENCODINGS
from llmfast.quantization.formats import QuantizedWeight, quantize
from llmfast.quantization.plan import PRECISIONS as QUANTIZED
from llmfast.quantization.plan import plan
from llmfast.threads import thread_count

if TYPE_CHECKING:
    from llmfast.inference.decoders.adapted import NativeAdapter

PRECISIONS = ("fp32", "bf16", *QUANTIZED)
SPLIT = "fp32_split"  # floats, kept for products of many rows (csrc/gemm/split_floats.inl): an encoder's
FORMATS = {form: number for number, form in enumerate(("fp32", "bf16", *ENCODINGS, SPLIT))}  # csrc/decoder/decoder.h
IN_GROUPS = {"int4", "q8_0", "q4_1", "q4_k"}  # they take activations in one form (packed.inl)
FUSED = (("query", "key", "value"), ("gate", "up"))  # one matrix; the rows of the last two alternate
PARTS = ("values", "scale", "minimum", "scale_code", "minimum_code")
CACHE_PRECISIONS = ("fp32", "bf16", "int8")
MOST_ROWS = 512  # tokens a step: enough for the weights to be read once for many, few enough for little scratch memory
BLOCK_ROWS = 16  # up to here a row of a step has the same bits as if it came alone


def why_not(config: ModelConfig, device: torch.device) -> str | None:
    """Why a model of this shape can't be run natively under the current choice of backends, or None."""
    if device.type != "cpu":
        return f"it runs on a CPU, not on {device}"
    if config.arithmetic() is None:
        return "the model's block is one that only its module computes"
    if config.head_dim > cpp.MAX_HEAD_DIM:
        return f"the model's heads have {config.head_dim} channels, more than {cpp.MAX_HEAD_DIM}"
    try:
        chosen = {op: resolve(op, device, torch.float32, config.head_dim)[0] for op in config.ops}
    except BackendUnavailable as error:
        return str(error)
    others = [f"{op} on {name}" for op, name in chosen.items() if name != "cpp"]
    if others:
        return cpp.why_not("linear", device, torch.float32) or f"the chosen backends run {', '.join(others)}"
    return None


def fastest_float() -> str:
    """The precision of floats that this CPU multiplies fastest: bf16 where it has instructions for it, else fp32."""
    return "bf16" if cpp.isa() in ("amx", "avx512_bf16") else "fp32"


class NativeModel:
    """A model's weights, packed for this CPU in one precision. It never changes, and may be shared between threads.

    `tensors` are (name, tensor) pairs under the names of `config.parameters()`, taken one at a time; quantised ones are
    used as they are where `formats` says so, others are brought into the precision asked for. `formats` gives the
    matrices that differ from "fp32" or "bf16", as `quantization.plan` does; it defaults to that plan. Weights that are
    multiplied as one matrix and can't be in formats of their own are kept in fp32, which holds all of them exactly;
    `formats` says how each is kept. `ValueError` names a weight that is unknown, missing or of another shape.
    """

    def __init__(
        self,
        config: ModelConfig,
        tensors: Iterable[tuple[str, Tensor | QuantizedWeight]],
        precision: str,
        formats: Mapping[str, str] | None = None,
    ):
        if precision not in PRECISIONS:
            raise ValueError(f"precision must be {', '.join(PRECISIONS)}, got {precision!r}")
        if (reason := cpp.why_not("linear", torch.device("cpu"), torch.float32)) is not None:
            raise ValueError(f"there is no native decoder here: {reason}")
        self.config, self.precision = config, precision
        floats = precision if precision in ("fp32", "bf16") else fastest_float()
        if floats == "fp32" and not config.generates:
            floats = SPLIT
        formats = formats if formats is not None else plan(config, precision) if precision in QUANTIZED else {}
        parameters = config.parameters()
        matrices = [p for p in parameters if p.is_matrix and (config.generates or p.role != "token_embedding")]
        formats = {p.name: formats[p.name] for p in matrices if p.name in formats}
        self.formats = _kept(matrices, {p.name: formats.get(p.name, floats) for p in matrices})
        self._number = _native_model(config, parameters, self.formats)
        weakref.finalize(self, torch.ops.llmfast.native_model_free, self._number)
        missing = {p.name: (number, p) for number, p in enumerate(parameters)}
        places, threads = dict(missing), thread_count()
        for name, tensor in tensors:
            if name == "lm_head.weight" and config.tie_word_embeddings:
                continue
            if name not in places:
                raise ValueError(f"the model has no weight {name}")
            number, parameter = places[name]
            if tuple(tensor.shape) != parameter.shape:
                raise ValueError(f"{name} has shape {tuple(tensor.shape)}, expected {parameter.shape}")
            if isinstance(tensor, Tensor) and parameter.role == "type_embedding":
                tensor = tensor[0]  # all texts are of the first type
            tensor = _rounded(tensor, formats.get(name))
            parts = _parts(tensor, self.formats.get(name))
            torch.ops.llmfast.native_model_give(self._number, number, *map(parts.get, PARTS), threads)
            missing.pop(name, None)
            del tensor, parts  # before the next one is read: they may be a mapped part of the file
        if missing:
            raise ValueError(f"the weight {next(iter(missing))} is missing")

    @property
    def nbytes(self) -> int:
        """The memory of the packed weights."""
        return torch.ops.llmfast.native_model_bytes(self._number)

    def __deepcopy__(self, memo: dict[int, Any]) -> NativeModel:
        return self  # it never changes

    def __reduce__(self) -> Any:
        raise TypeError("packed weights can't be pickled: save the model instead, and load it where it is needed")


def next_token(
    logits: Tensor,
    settings: SamplingSettings,
    generators: list[torch.Generator] | None,
    vocabulary: int,
    masks: Tensor | None = None,
) -> Tensor:
    """`sampling.next_token` in one C++ call, among the first `vocabulary` tokens, and of these among those whose bit is
    set in `masks` (B, words) int32; without a repetition penalty."""
    greedy = settings.temperature == 0
    tokens = torch.ops.llmfast.sample(
        logits,
        vocabulary,
        settings.temperature,
        settings.top_k or 0,
        1.0 if settings.top_p is None else settings.top_p,
        settings.min_p or 0.0,
        None if greedy else uniform_numbers(len(logits), generators, logits.device),
        masks,
    )
    check_chosen(tokens)
    return tokens


def chosen(logits: Tensor, best: Tensor, sampler: Sampler) -> Tensor:
    """What `sampler` chooses from a step's logits, of which `best` (B,) are the largest: a native step has found them
    on its way, and C++ draws a token faster than PyTorch's operators."""
    if sampler.seen is not None:
        return sampler.choose(logits)
    check_chosen(best)
    masks = sampler.masks()
    if sampler.settings.temperature == 0 and masks is None and sampler.bias is None:
        tokens = best
    else:
        biased = sampler.biased(logits)
        tokens = next_token(biased, sampler.settings, sampler.generators, sampler.vocabulary, masks)
    sampler.accept(tokens)
    return tokens


def forced(token: int, best: Tensor, sampler: Sampler) -> Tensor:
    """The token that a form leaves no choice of: as `chosen`, random numbers and errors included."""
    check_chosen(best)
    if sampler.generators is not None:
        uniform_numbers(1, sampler.generators, best.device)
    tokens = torch.tensor([token])
    if sampler.seen is not None:
        sampler.seen[0, token] = True
    sampler.accept(tokens)
    return tokens


def describe(model: NativeModel, weights: str) -> str:
    """`Decoder.describe` of what runs packed weights."""
    return f"native ({cpp.isa()}), {precision_label(weights, model.precision)}, {thread_count()} threads"


def _native_model(config: ModelConfig, parameters: Sequence[Parameter], formats: Mapping[str, str]) -> int:
    """The number of a C++ model (`csrc/decoder/native_decoder.h`) that waits for these parameters, in this order."""
    a = config.arithmetic()
    assert a is not None  # `why_not` says so
    turning = a.rotary is not None
    return torch.ops.llmfast.native_model(
        [
            *(config.vocab_size, config.context, config.width, config.blocks),
            *(config.heads, config.key_heads, config.head_dim, config.inner_dim),
        ],
        [
            *(a.norm_epsilon, a.attention_scale, a.embedding_multiplier, a.residual_multiplier, a.logits_divisor),
            a.rotary.factor if a.rotary is not None else 1.0,
        ],
        a.norm,
        a.activation,
        a.gated,
        a.rotary.inverse_frequencies.tolist() if a.rotary is not None else [],
        [int(turning and a.rotary_blocks[block]) for block in range(config.blocks)],
        [window or 0 for window in a.windows],
        [-1 if p.block is None else p.block for p in parameters],
        [p.role for p in parameters],
        [int(p.name.endswith(".bias")) for p in parameters],
        [FORMATS[formats.get(p.name, "fp32")] for p in parameters],
    )


def _kept(matrices: Sequence[Parameter], formats: Mapping[str, str]) -> dict[str, str]:
    """In which formats matrices are packed: in their own, as far as those that share panels or an input allow."""
    kept = dict(formats)
    for roles in FUSED:
        for block in {p.block for p in matrices}:
            names = [p.name for p in matrices if p.block == block and p.role in roles]
            found = {formats[name] for name in names}
            if len(found) > 1 and not (roles == FUSED[0] and found <= IN_GROUPS):
                kept |= dict.fromkeys(names, "fp32")
    return kept


def _rounded(tensor: Tensor | QuantizedWeight, form: str | None) -> Tensor | QuantizedWeight:
    """The tensor in `form`, if that is a format of integers."""
    if form not in ENCODINGS or isinstance(tensor, QuantizedWeight) and tensor.precision == form:
        return tensor
    return quantize(tensor.dequantize() if isinstance(tensor, QuantizedWeight) else tensor.float(), form)


def _parts(tensor: Tensor | QuantizedWeight, kept: str | None) -> Mapping[str, Tensor]:
    """The tensor's parts, `values` alone where it is kept as floats, as the C++ side takes them."""
    if isinstance(tensor, QuantizedWeight):
        if tensor.precision == kept:
            return tensor.parts
        tensor = tensor.dequantize()
    tensor = tensor.detach()
    return {"values": tensor if tensor.dtype in (torch.float32, torch.bfloat16) else tensor.float()}


class NativeDecoder(Decoder):
    """`batch` sequences of up to `capacity` tokens, one C++ call a step: see `Decoder` for the protocol.

    The cache holds fp32, bf16 or int8 (with a scale for each token and head), by default fp32 for fp32 weights and
    bf16 otherwise. Sequences may have any lengths: a step takes each one's new tokens as they are, without padding,
    and reads every weight once for all of them. Not for two threads at once.
    """

    def __init__(
        self,
        model: NativeModel,
        batch: int = 1,
        capacity: int | None = None,
        cache_precision: str | None = None,
        vocabulary: int | None = None,
    ):
        config = model.config
        if cache_precision is None:
            cache_precision = "fp32" if model.precision == "fp32" else "bf16"
        if cache_precision not in CACHE_PRECISIONS:
            raise ValueError(f"cache_precision must be {', '.join(CACHE_PRECISIONS)}, got {cache_precision!r}")
        self.model, self.batch = model, batch
        self.capacity = config.context if capacity is None else capacity
        self.vocabulary = config.vocab_size if vocabulary is None else vocabulary
        self.lengths = [0] * batch
        # Of the last step's logits, the largest below `vocabulary`; -1 where one of those is not finite.
        self.best = torch.empty(0, dtype=torch.int64)
        self._most_rows = max(batch, min(MOST_ROWS, batch * self.capacity))
        self._number = torch.ops.llmfast.native_decoder(
            model._number, batch, self.capacity, self._most_rows, cache_precision
        )
        # The memory of the cache. Asked now: a generator that outlives the program's end is closed after this is freed.
        self.nbytes: int = torch.ops.llmfast.native_decoder_bytes(self._number)
        weakref.finalize(self, torch.ops.llmfast.native_decoder_free, self._number)

    def adapt(self, adapters: Sequence[NativeAdapter | None]) -> None:
        """Gives every sequence its adapter, or none; what they hold already was made without."""
        numbers = [0 if adapter is None else adapter._number for adapter in adapters]
        torch.ops.llmfast.native_decoder_adapt(self._number, numbers)

    def prefill(self, prompts: list[list[int]]) -> Tensor:
        """Starts over: prompts of any lengths, at least one token each -> logits (B, V)."""
        if len(prompts) != self.batch or not all(prompts):
            raise ValueError(f"prefill takes {self.batch} prompts of at least one token")
        self.lengths = [0] * self.batch
        logits = torch.empty(self.batch, self.model.config.vocab_size)
        best = torch.empty(self.batch, dtype=torch.int64)
        pieces = self._pieces(prompts)
        for piece in pieces:
            last = [slot for slot, start, count in piece if start + count == len(prompts[slot])]
            out = self._run(_tokens(prompts, piece), piece)
            for row, (slot, _, _) in enumerate(piece):
                if slot in last:
                    logits[slot], best[slot] = out[row], self.best[row]
        self.lengths, self.best = [len(prompt) for prompt in prompts], best
        return logits

    def step(self, tokens: Tensor) -> Tensor:
        """One token more for every sequence: (B,) int64 -> logits (B, V)."""
        return self.extend(tokens.unsqueeze(1))

    def extend(self, tokens: Tensor) -> Tensor:
        """T tokens more for every sequence: (B, T) int64 -> the logits after the last of them (B, V).

        Up to `BLOCK_ROWS` tokens the logits have the same bits as after as many steps.
        """
        count = tokens.shape[1]
        logits = self._run(
            tokens.flatten().contiguous(), [(slot, length, count) for slot, length in enumerate(self.lengths)]
        )
        self.lengths = [length + count for length in self.lengths]
        return logits

    def step_block(self, tokens: Tensor) -> Tensor:
        """T tokens more for the only sequence: (T,) int64 -> the logits after each, (T, V).

        Up to `BLOCK_ROWS` tokens, every row has the same bits as `step` would have given it. `rewind` forgets tokens.
        """
        if self.batch != 1:
            raise ValueError("a block of tokens is for one sequence")
        logits = self._run(tokens, [(0, self.lengths[0], len(tokens))], all_rows=True)
        self.lengths[0] += len(tokens)
        return logits

    def read(self, sequences: list[list[int]], skip: list[int], rows: int = MOST_ROWS) -> Iterator[Tensor]:
        """Starts over: the logits (n, V) after every token of each sequence but its first `skip`, for which the head
        does not run; one sequence after the other, up to `rows` at a time.
        """
        if len(sequences) != self.batch or not all(sequences):
            raise ValueError(f"read takes {self.batch} sequences of at least one token")
        skipped = [sequence[:count] for sequence, count in zip(sequences, skip, strict=True)]
        for piece in self._pieces(skipped):
            if piece:
                self._run(_tokens(sequences, piece), piece)
        self.lengths = [len(sequence) for sequence in sequences]
        for piece in self._pieces(sequences, skip, rows):
            yield self._run(_tokens(sequences, piece), piece, all_rows=True)

    def rewind(self, length: int) -> None:
        """Forgets what the only sequence has beyond its first `length` tokens."""
        if self.batch != 1 or not 0 <= length <= self.lengths[0]:
            raise ValueError(f"can't rewind {self.lengths} to {length} tokens")
        self.lengths[0] = length

    def _pieces(
        self, prompts: list[list[int]], starts: list[int] | None = None, most: int = MOST_ROWS
    ) -> list[list[tuple[int, int, int]]]:
        """The prompts, from `starts` on, cut into steps of at most `most` rows: lists of (slot, start, count)."""
        pieces: list[list[tuple[int, int, int]]] = [[]]
        most = min(most, self._most_rows)
        room = most
        for slot, prompt in enumerate(prompts):
            start = 0 if starts is None else starts[slot]
            while start < len(prompt):
                if room == 0 or any(slot == other for other, _, _ in pieces[-1]):
                    pieces.append([])
                    room = most
                count = min(room, len(prompt) - start)
                pieces[-1].append((slot, start, count))
                start, room = start + count, room - count
        return pieces

    def _run(self, ids: Tensor, segments: list[tuple[int, int, int]], all_rows: bool = False) -> Tensor:
        logits = torch.empty(len(ids) if all_rows else len(segments), self.model.config.vocab_size)
        flat = [number for segment in segments for number in segment]
        self.best = torch.ops.llmfast.native_step(
            self._number, ids, flat, all_rows, self.vocabulary, thread_count(), logits
        )
        return logits

    def begin(self, sampler: Sampler) -> None:
        self.vocabulary = sampler.vocabulary

    def choose(self, logits: Tensor, sampler: Sampler) -> Tensor:
        return chosen(logits, self.best, sampler)

    def describe(self, weights: str) -> str:
        return describe(self.model, weights)

    def __deepcopy__(self, memo: dict[int, Any]) -> NativeDecoder:
        raise TypeError("a decoder can't be copied: make another from the same NativeModel")

    def __reduce__(self) -> Any:
        raise TypeError("a decoder can't be pickled: make another from the model")


class NativeReader:
    """A `Reader` that runs packed weights: every call is a decoder of its own, of sequences with these adapters."""

    def __init__(self, model: NativeModel, adapters: Sequence[NativeAdapter | None] | None = None):
        self.model, self.adapters = model, adapters

    @property
    def config(self) -> ModelConfig:
        return self.model.config

    def read(self, sequences: list[list[int]], skip: list[int], rows: int) -> Iterator[Tensor]:
        yield from self._decoder(len(sequences), max(map(len, sequences))).read(sequences, skip, rows)

    def replay(self, prompts: list[list[int]], following: list[Tensor]) -> Tensor:
        """As `Reader.replay`, to the bit what a decoder's steps gave."""
        decoder = self._decoder(len(prompts), max(map(len, prompts)) + len(following))
        logits = decoder.prefill(prompts)
        if following:
            for tokens in torch.stack(following, dim=1).split(
                max(1, min(BLOCK_ROWS, MOST_ROWS // len(prompts))), dim=1
            ):
                logits = decoder.extend(tokens)
        return logits

    def _decoder(self, batch: int, capacity: int) -> NativeDecoder:
        decoder = NativeDecoder(self.model, batch, capacity)
        if self.adapters is not None:
            decoder.adapt(self.adapters)
        return decoder

    def describe(self, weights: str) -> str:
        return describe(self.model, weights)


def _tokens(sequences: list[list[int]], piece: list[tuple[int, int, int]]) -> Tensor:
    """What the segments of a step cover."""
    return torch.tensor([token for slot, start, count in piece for token in sequences[slot][start : start + count]])
