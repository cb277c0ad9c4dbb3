"""What llama.cpp calls a model's settings and its tensors, in both directions.

A GGUF file of a family of ours becomes a `config.json`'s document, which that family reads as it reads any other; a
configuration becomes the values of a GGUF file. Tensors are named after what `ModelConfig.parameters` states. Two
things differ beyond names: weights of linear layers are never transposed, and in some families the rows of queries and
keys are in another order, because llama.cpp turns neighbouring channels where Hugging Face turns halves of a head.
(llama.cpp: gguf-py/gguf/constants.py, src/llama-arch.cpp, src/llama-model.cpp)
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor

from llmfast.models import ModelConfig, config_from_document
from llmfast.models.architecture import Parameter
from llmfast.models.gpt2 import ACTIVATIONS as GPT2_ACTIVATIONS
from llmfast.models.gpt2 import GPTConfig
from llmfast.models.llama import ACTIVATIONS as LLAMA_ACTIVATIONS
from llmfast.models.llama import LlamaConfig
from llmfast.weights.gguf import GGUFArray, GGUFFile

# Of a parameter's role, in a block or outside.
TENSORS = {
    "token_embedding": "token_embd",
    "position_embedding": "position_embd",
    "attention_norm": "attn_norm",
    "query_key_value": "attn_qkv",
    "query": "attn_q",
    "key": "attn_k",
    "value": "attn_v",
    "query_norm": "attn_q_norm",
    "key_norm": "attn_k_norm",
    "attention_out": "attn_output",
    "mlp_norm": "ffn_norm",
    "mlp_in": "ffn_up",
    "gate": "ffn_gate",
    "up": "ffn_up",
    "mlp_out": "ffn_down",
    "final_norm": "output_norm",
    "head": "output",
}
EMBEDDING, HEAD, ROTARY_FACTORS = "token_embd.weight", "output.weight", "rope_freqs.weight"

# Keys after "ARCHITECTURE.", and the same in a config.json. Those in OPTIONAL may be missing.
GPT2 = {
    "context_length": "n_positions",
    "embedding_length": "n_embd",
    "block_count": "n_layer",
    "feed_forward_length": "n_inner",
    "attention.head_count": "n_head",
    "attention.layer_norm_epsilon": "layer_norm_epsilon",
}
LLAMA = {
    "context_length": "max_position_embeddings",
    "embedding_length": "hidden_size",
    "block_count": "num_hidden_layers",
    "feed_forward_length": "intermediate_size",
    "attention.head_count": "num_attention_heads",
    "attention.head_count_kv": "num_key_value_heads",
    "attention.key_length": "head_dim",
    "attention.layer_norm_rms_epsilon": "rms_norm_eps",
    "rope.freq_base": "rope_theta",
}
GRANITE = {
    "embedding_scale": "embedding_multiplier",
    "attention.scale": "attention_multiplier",
    "residual_scale": "residual_multiplier",
    "logit_scale": "logits_scaling",
}
OPTIONAL = {"attention.head_count_kv", "attention.key_length", "rope.freq_base", *GRANITE}
SETTINGS = {
    "gpt2": GPT2,
    "llama": LLAMA,
    "qwen2": LLAMA,
    "qwen3": LLAMA,
    "smollm3": LLAMA,
    "granite": LLAMA | GRANITE,
}
# The architecture under which llama.cpp runs a model_type, where it is another.
ARCHITECTURES = {"mistral": "llama"}
NEIGHBOURS_TURN = {"llama", "smollm3", "granite"}
# Read by `_rotary`, or saying nothing about the arithmetic. Other keys that say something are an error.
HARMLESS = {"vocab_size", "rope.dimension_count", "attention.value_length", "tensor_data_layout"}
ROTARY = {
    "rope.scale_linear",
    *("rope.scaling.type", "rope.scaling.factor", "rope.scaling.original_context_length", "rope.scaling.attn_factor"),
    *("rope.scaling.yarn_ext_factor", "rope.scaling.yarn_attn_factor", "rope.scaling.finetuned"),
    *("rope.scaling.yarn_beta_fast", "rope.scaling.yarn_beta_slow"),
}
END_TOKENS = ("eos", "eot", "eom")  # tokenizer.ggml.…_token_id
STILL_EVERY = 4  # SmolLM3's blocks without rotary positions, which llama.cpp counts by itself


def tensor_name(parameter: Parameter) -> str:
    """A parameter's name in a GGUF file."""
    kind = "bias" if parameter.name.endswith(".bias") else "weight"
    name = f"{TENSORS[parameter.role]}.{kind}"
    return name if parameter.block is None else f"blk.{parameter.block}.{name}"


def architecture_of(config: ModelConfig) -> str:
    """`general.architecture` of a model. `ValueError` for one that llama.cpp does not have under a name known here."""
    kind = getattr(config, "model_type", config.model_types[0])
    architecture = ARCHITECTURES.get(kind, kind)
    if architecture not in SETTINGS:
        raise ValueError(f"{kind} models have no GGUF form here; those that have are {', '.join(SETTINGS)}, mistral")
    return architecture


def row_order(config: ModelConfig, parameter: Parameter) -> Tensor | None:
    """Which row of the GGUF file each row of a parameter is: int64 (N,), or None where they are the same.

    A head's channels i and i + D/2 of ours are its channels 2i and 2i + 1.
    """
    if parameter.role not in ("query", "key") or architecture_of(config) not in NEIGHBOURS_TURN:
        return None
    heads = config.heads if parameter.role == "query" else config.key_heads
    return torch.arange(parameter.shape[0]).view(heads, -1, 2).transpose(1, 2).reshape(-1)


def config_of(file: GGUFFile) -> ModelConfig:
    """The configuration that a GGUF file states. `ValueError` names what is missing, or not computed here."""
    try:
        return config_from_document(_document(file))
    except (ValueError, TypeError) as error:
        raise ValueError(f"{file.path}: {error}") from None


def _document(file: GGUFFile) -> dict[str, Any]:
    """What a `config.json` would say."""
    if (parts := file.metadata.get("split.count", 1)) not in (0, 1):
        raise ValueError(
            f"it is one of {parts!r:.60} files that are a model together: llama-gguf-split --merge joins them"
        )
    architecture = file.metadata.get("general.architecture")
    if not isinstance(architecture, str) or architecture not in SETTINGS:
        raise ValueError(f"it holds a {architecture!r:.60} model; the architectures that run are {', '.join(SETTINGS)}")
    prefix = f"{architecture}."
    settings = {
        key.removeprefix(prefix): _value(value) for key, value in file.metadata.items() if key.startswith(prefix)
    }
    names = SETTINGS[architecture]
    if missing := [prefix + key for key in names if key not in settings and key not in OPTIONAL]:
        raise ValueError(f"it does not say {', '.join(missing)}")
    for key, value in settings.items():
        known = key in names or key in HARMLESS or (key in ROTARY and architecture != "gpt2")
        neutral = value is True if key == "attention.causal" else value in (0, "")
        if not known and not neutral:
            raise ValueError(f"it sets {prefix}{key} to {value!r:.60}, which is not computed here")
    embedding = file.tensors.get(EMBEDDING)
    if embedding is None or len(embedding.shape) != 2:
        raise ValueError(f"it has no {EMBEDDING}")
    ids = {kind: file.metadata.get(f"tokenizer.ggml.{kind}_token_id") for kind in ("bos", *END_TOKENS)}
    ends = list(dict.fromkeys(ids[kind] for kind in END_TOKENS if ids[kind] is not None))
    document = {"model_type": architecture} | {name: settings[key] for key, name in names.items() if key in settings}
    document |= {
        "vocab_size": embedding.shape[0],
        "tie_word_embeddings": head_is_tied(file),
        "bos_token_id": ids["bos"],
    }
    if architecture == "gpt2":
        return document | {"eos_token_id": ends[0] if ends else None}
    document["eos_token_id"] = ends if len(ends) > 1 else ends[0] if ends else None
    document |= _rotary(file, settings, document)
    document["attention_bias"] = architecture not in ("qwen2", "qwen3") and "blk.0.attn_q.bias" in file.tensors
    document["mlp_bias"] = "blk.0.ffn_gate.bias" in file.tensors
    if architecture == "granite":
        document.setdefault("attention_multiplier", document["head_dim"] ** -0.5)
    if architecture == "smollm3":
        document["no_rope_layer_interval"] = STILL_EVERY
    return document


def head_is_tied(file: GGUFFile) -> bool:
    """Whether the head is the token embedding: it is left out, or the same bytes."""
    head, embedding = file.tensors.get(HEAD), file.tensors[EMBEDDING]
    if head is None:
        return True
    if (head.shape, head.type) != (embedding.shape, embedding.type):
        return False
    step = max(1, (1 << 22) // embedding.row_bytes)
    chunks = [slice(start, start + step) for start in range(0, head.shape[0], step)]
    return all(torch.equal(head.read(rows), embedding.read(rows)) for rows in chunks)


def _rotary(file: GGUFFile, settings: Mapping[str, Any], document: Mapping[str, Any]) -> dict[str, Any]:
    """`head_dim`, and `rope_parameters` in the words of a config.json."""
    width, heads = document["hidden_size"], document["num_attention_heads"]
    usual = width // heads if isinstance(width, int) and isinstance(heads, int) and heads > 0 else 0
    head_dim = document.get("head_dim", usual)
    for key in ("attention.value_length", "rope.dimension_count"):
        if settings.get(key, head_dim) != head_dim:
            raise ValueError(f"heads of {head_dim} channels with {key} {settings[key]!r:.60} are not computed here")
    if settings.get("rope.scaling.finetuned") is False and document["model_type"] == "granite":
        raise ValueError("it sets granite.rope.scaling.finetuned to False, which is not computed here")
    theta = settings.get("rope.freq_base", 10000.0)
    rope: dict[str, Any] = {"rope_type": "default", "rope_theta": theta}
    kind = settings.get("rope.scaling.type", "linear")  # llama.cpp's default, with a factor of 1
    factor = settings.get("rope.scaling.factor", settings.get("rope.scale_linear", 1.0)) or 1.0
    if kind == "yarn":
        rope |= {"rope_type": "yarn", "factor": factor} | _yarn(settings, document, factor)
    elif kind == "linear" and factor != 1.0:
        rope |= {"rope_type": "linear", "factor": factor}
    elif kind not in ("none", "linear"):
        raise ValueError(f"it scales rotary positions by {kind!r:.60}, which is not computed here")
    if ROTARY_FACTORS in file.tensors:
        if rope["rope_type"] != "default":
            raise ValueError(f"it has {ROTARY_FACTORS} beside a scaling of {kind!r:.60}, which is not computed here")
        tensor = file.tensors[ROTARY_FACTORS]
        if tensor.type != "F32" or tensor.shape != (head_dim // 2,):
            raise ValueError(f"{ROTARY_FACTORS} is {tensor.type} {tensor.shape}, not F32 ({head_dim // 2},)")
        factors = [_short(value) for value in tensor.read().tolist()]
        rope |= {"rope_type": "longrope", "short_factor": factors, "long_factor": factors, "attention_factor": 1.0}
        rope["original_max_position_embeddings"] = document["max_position_embeddings"]
    return {"head_dim": head_dim, "rope_parameters": rope}


def _yarn(settings: Mapping[str, Any], document: Mapping[str, Any], factor: float) -> dict[str, Any]:
    for key in ("rope.scaling.yarn_ext_factor", "rope.scaling.yarn_attn_factor"):
        if settings.get(key, 1.0) not in (1.0, -1.0):  # -1 leaves it to llama.cpp, which takes 1
            raise ValueError(f"it sets {key} to {settings[key]!r:.60}, which is not computed here")
    original = settings.get("rope.scaling.original_context_length") or document["max_position_embeddings"]
    found = {"original_max_position_embeddings": original}
    for name in ("beta_fast", "beta_slow"):
        if f"rope.scaling.yarn_{name}" in settings:
            found[name] = settings[f"rope.scaling.yarn_{name}"]
    if "rope.scaling.attn_factor" in settings:
        found["attention_factor"] = settings["rope.scaling.attn_factor"] * _yarn_factor(factor)
    return found


def _yarn_factor(factor: float) -> float:
    """By which YaRN multiplies cosine and sine by default."""
    return 0.1 * math.log(factor) + 1.0 if factor > 1 else 1.0


def _value(value: Any) -> Any:
    """A setting as JSON would have it: float32 in as few digits as say it, one number for the same in every block."""
    if isinstance(value, GGUFArray):
        distinct = list(dict.fromkeys(value))
        return _value(distinct[0]) if len(distinct) == 1 else [_value(one) for one in distinct[:4]]
    return _short(value) if isinstance(value, float) else value


def _short(value: float) -> float:
    return float(str(np.float32(value)))


def settings_of(config: ModelConfig) -> dict[str, Any]:
    """The values of a GGUF file by key; of the tokenizer's, the ids of the tokens that begin and end a text.

    A window that llama.cpp would not compute cuts the context to its length, within which nothing differs. `ValueError`
    for arithmetic that llama.cpp's architecture of this name does not have.
    """
    architecture = architecture_of(config)
    if not isinstance(config, (GPTConfig, LlamaConfig)):
        raise ValueError(f"a {type(config).__name__} has no GGUF form here")
    if complaint := _beyond(config):
        raise ValueError(f"llama.cpp does not compute {complaint} in a {architecture} model")
    values: dict[str, Any] = {"general.architecture": architecture}
    described = config.arithmetic()
    context = min([config.context, *(window for window in described.windows if window is not None)])
    given: dict[str, Any] = {"n_inner": config.inner_dim} | dict.fromkeys(
        ("n_positions", "max_position_embeddings"), context
    )
    if isinstance(config, LlamaConfig):
        given |= {"rope_theta": config.rope.rope_theta, "num_key_value_heads": config.key_heads}
        given["attention_multiplier"] = described.attention_scale
    for key, name in SETTINGS[architecture].items():
        values[f"{architecture}.{key}"] = given[name] if name in given else getattr(config, name)
    values[f"{architecture}.vocab_size"] = config.vocab_size
    if isinstance(config, LlamaConfig):
        values |= {f"{architecture}.{key}": value for key, value in _rotary_settings(config).items()}
    for kind, token in (("bos", config.bos_token_id), *zip(END_TOKENS, config.end_tokens, strict=False)):
        if token is not None:
            values[f"tokenizer.ggml.{kind}_token_id"] = token
    return values


def rotary_factors(config: ModelConfig) -> Tensor | None:
    """What a GGUF file holds as `rope_freqs.weight`: float32 (D/2,) that divide the plain frequencies, or None."""
    if not isinstance(config, LlamaConfig) or config.rope.rope_type not in ("llama3", "longrope"):
        return None
    plain = config.replaced(rope=type(config.rope)(config.rope.rope_theta)).arithmetic().rotary
    scaled = config.arithmetic().rotary
    assert plain is not None and scaled is not None
    return plain.inverse_frequencies / scaled.inverse_frequencies


def _rotary_settings(config: LlamaConfig) -> dict[str, Any]:
    rope, head_dim = config.rope, config.head_channels
    values: dict[str, Any] = {"rope.dimension_count": head_dim, "attention.value_length": head_dim}
    if rope.rope_type == "linear":
        values |= {"rope.scaling.type": "linear", "rope.scaling.factor": rope.factor}
    if rope.rope_type == "yarn":
        assert rope.factor is not None
        original = rope.original_max_position_embeddings or config.context
        values |= {"rope.scaling.type": "yarn", "rope.scaling.factor": rope.factor}
        values |= {"rope.scaling.original_context_length": original}
        if rope.attention_factor is not None:
            values["rope.scaling.attn_factor"] = rope.attention_factor / _yarn_factor(rope.factor)
    return values


def _beyond(config: GPTConfig | LlamaConfig) -> str | None:
    """What of a model's arithmetic llama.cpp has no place for, or None."""
    if isinstance(config, GPTConfig):
        fits = GPT2_ACTIVATIONS[config.activation_function] == "gelu_tanh"
        return None if fits else f"activation_function {config.activation_function!r}"
    rope, family = config.rope, config.model_type
    if LLAMA_ACTIVATIONS[config.hidden_act] != "silu":
        return f"hidden_act {config.hidden_act!r}"
    if rope.partial_rotary_factor != 1.0:
        return f"partial_rotary_factor {rope.partial_rotary_factor}"
    changed = rope.mscale or rope.mscale_all_dim or not rope.truncate
    if rope.rope_type == "yarn" and (changed or (rope.beta_fast or 32) != 32 or (rope.beta_slow or 1) != 1):
        return "yarn with mscale, mscale_all_dim, beta_fast, beta_slow or without truncate"  # it does not read them
    if config.attention_bias and family not in ("llama", "mistral", "granite", "qwen2"):
        return "attention_bias"
    if config.mlp_bias and family not in ("llama", "mistral", "granite"):
        return "mlp_bias"
    if family == "smollm3":
        counted = tuple(block for block in range(config.blocks) if (block + 1) % STILL_EVERY == 0)
        if config.no_rope_blocks != counted:
            return f"rotary positions left out of other blocks than every fourth: {config.no_rope_blocks}"
    elif config.no_rope_blocks:
        return "blocks without rotary positions"
    return None
