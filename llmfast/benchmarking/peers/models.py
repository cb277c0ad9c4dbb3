"""The same random weights in every engine's format, made once in a folder of about 1.4 GB.

    models.py FOLDER CONFIG   # by a Python that has the peers' packages; a config.json's content

    FOLDER/hf/              Hugging Face's layout, which llmfast loads too
    FOLDER/f32.gguf         also bf16, q8_0 and q4_0, for llama.cpp
    FOLDER/ct2/             for CTranslate2, which converts to its precision as it loads (GPT-2 only)
    FOLDER/reference.npz    transformers' float32 logits after some of the prompts, to check every engine with

Random weights are as fast as trained ones, and nothing has to be downloaded.
"""

from __future__ import annotations

import json
import shutil
import sys
import tempfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

GGUF_TYPES = ("f32", "bf16", "q8_0", "q4_0")
CHECKED_LENGTHS = (32, 512)
VERSION = "2"  # a folder made by another version of this file is made again

# llama.cpp's name of a part of GPT-2's block -> transformers', and whether it is stored transposed there.
GPT2_PARTS = {
    "attn_norm": ("ln_1", False),
    "attn_qkv": ("attn.c_attn", True),
    "attn_output": ("attn.c_proj", True),
    "ffn_norm": ("ln_2", False),
    "ffn_up": ("mlp.c_fc", True),
    "ffn_down": ("mlp.c_proj", True),
}
LLAMA_PARTS = {
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}


def prompt_ids(count: int, vocabulary: int) -> list[int]:
    """The ids that every engine is given."""
    return [(i * 7919) % vocabulary for i in range(count)]


def is_made(folder: Path) -> bool:
    stamp = folder / "version"
    return stamp.exists() and stamp.read_text(encoding="utf-8") == VERSION


def make(folder: Path, document: dict[str, Any]) -> None:
    """Fills `folder`, whole or not at all, with a model of the shape that a config.json's `document` gives."""
    import torch
    from transformers import CONFIG_MAPPING, AutoModelForCausalLM

    folder.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder.parent, prefix=".making-") as temporary:
        place = Path(temporary) / folder.name
        place.mkdir()
        torch.manual_seed(0)
        config = CONFIG_MAPPING[document["model_type"]].from_dict(document)
        model = AutoModelForCausalLM.from_config(config).eval()
        model.save_pretrained(place / "hf")
        write_reference(model, place / "reference.npz")
        for name in GGUF_TYPES:
            write_gguf(model, place / f"{name}.gguf", name)
        if config.model_type == "gpt2":
            write_ctranslate2(model, place / "ct2")
        (place / "version").write_text(VERSION, encoding="utf-8")
        if folder.exists():
            shutil.rmtree(folder)
        place.rename(folder)


def write_reference(model: Any, path: Path) -> None:
    import numpy as np
    import torch

    with torch.inference_mode():
        ids = torch.tensor([prompt_ids(max(CHECKED_LENGTHS), model.config.vocab_size)])
        logits = {str(n): model(ids[:, :n], logits_to_keep=1).logits[0, -1].numpy() for n in CHECKED_LENGTHS}
    np.savez(path, **logits)


def write_gguf(model: Any, path: Path, type_name: str) -> None:
    import gguf

    config, weights = model.config, model.state_dict()
    type_ = gguf.GGMLQuantizationType[type_name.upper()]
    writer = gguf.GGUFWriter(path, config.model_type)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_head_count(config.num_attention_heads)
    writer.add_tokenizer_model("gpt2")  # llama.cpp wants a vocabulary; nothing is ever tokenised
    writer.add_tokenizer_pre("gpt-2")
    writer.add_token_list([f"t{i}".encode() for i in range(config.vocab_size)])
    writer.add_token_types([gguf.TokenType.NORMAL] * config.vocab_size)
    writer.add_token_merges(["t 1"])
    writer.add_bos_token_id(config.vocab_size - 1)
    writer.add_eos_token_id(config.vocab_size - 1)

    def add(name: str, tensor: Any, keep: bool = False) -> None:
        array = tensor.detach().float().contiguous().numpy()
        if keep or array.ndim == 1 or type_name == "f32":
            writer.add_tensor(name, array)
        else:
            writer.add_tensor(name, gguf.quants.quantize(array, type_), raw_dtype=type_)

    if config.model_type == "gpt2":
        add_gpt2(writer, config, weights, add)
    else:
        add_llama(writer, config, weights, add)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def add_gpt2(writer: Any, config: Any, weights: Mapping[str, Any], add: Callable[..., None]) -> None:
    writer.add_feed_forward_length(4 * config.n_embd)
    writer.add_layer_norm_eps(config.layer_norm_epsilon)
    for name in ("token_embd.weight", "output.weight"):
        add(name, weights["transformer.wte.weight"])
    add("position_embd.weight", weights["transformer.wpe.weight"], keep=True)
    for i in range(config.n_layer):
        for name, (part, transposed) in GPT2_PARTS.items():
            weight = weights[f"transformer.h.{i}.{part}.weight"]
            add(f"blk.{i}.{name}.weight", weight.t() if transposed else weight)
            add(f"blk.{i}.{name}.bias", weights[f"transformer.h.{i}.{part}.bias"])
    for kind in ("weight", "bias"):
        add(f"output_norm.{kind}", weights[f"transformer.ln_f.{kind}"])


def add_llama(writer: Any, config: Any, weights: Mapping[str, Any], add: Callable[..., None]) -> None:
    heads = {"attn_q": config.num_attention_heads, "attn_k": config.num_key_value_heads}
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_rope_dimension_count(config.head_dim)
    writer.add_rope_freq_base(config.rope_parameters["rope_theta"])
    writer.add_vocab_size(config.vocab_size)
    add("token_embd.weight", weights["model.embed_tokens.weight"])
    for i in range(config.num_hidden_layers):
        for name, part in LLAMA_PARTS.items():
            weight = weights[f"model.layers.{i}.{part}.weight"]
            if name in heads:  # llama.cpp turns neighbouring channels where Hugging Face turns halves of a head
                H, D = heads[name], config.head_dim
                weight = weight.view(H, 2, D // 2, -1).transpose(1, 2).reshape(H * D, -1)
            add(f"blk.{i}.{name}.weight", weight)
    add("output_norm.weight", weights["model.norm.weight"])
    if not config.tie_word_embeddings:
        add("output.weight", weights["lm_head.weight"])


def write_ctranslate2(model: Any, folder: Path) -> None:
    from ctranslate2.converters import transformers as converters

    # The converter itself would ask the hub for a tokenizer; its loader of the model does not.
    specification = converters._MODEL_LOADERS["GPT2Config"].get_model_spec(model)
    specification.register_vocabulary([f"t{i}" for i in range(model.config.vocab_size)])
    last = f"t{model.config.vocab_size - 1}"
    specification.config.bos_token = specification.config.eos_token = specification.config.unk_token = last
    specification.validate()
    specification.optimize(quantization=None)
    folder.mkdir()
    specification.save(str(folder))


if __name__ == "__main__":
    make(Path(sys.argv[1]), json.loads(sys.argv[2]))
