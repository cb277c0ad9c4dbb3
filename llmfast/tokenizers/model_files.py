"""What the files beside a model say of its tokenizer besides the vocabulary: names of special tokens, the template."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from llmfast.tokenizers.protocol import TEMPLATE, read_json

CONFIG, SPECIAL = "tokenizer_config.json", "special_tokens_map.json"
NAMED = ("bos_token", "eos_token", "unk_token", "pad_token")
MOST_TEMPLATE = 1 << 20  # bytes of a chat template


def read_config(directory: Path) -> dict[str, Any]:
    """`tokenizer_config.json`, completed by the names in `special_tokens_map.json`; its `chat_template` is a string,
    from `chat_template.jinja` where there is one, or missing. `ValueError` names a damaged file."""
    path = directory / CONFIG
    config = read_json(path) if path.exists() else {}
    if (directory / SPECIAL).exists():
        config = token_names(read_json(directory / SPECIAL)) | config
    template = config.pop("chat_template", None)
    if isinstance(template, list):  # several, by name
        template = {entry.get("name"): entry.get("template") for entry in template if isinstance(entry, dict)}
    if isinstance(template, dict):
        template = template.get("default")
    if (file := directory / TEMPLATE).exists():
        if file.stat().st_size > MOST_TEMPLATE:
            raise ValueError(f"{file} is larger than a chat template may be ({MOST_TEMPLATE >> 20} MB)")
        try:
            template = file.read_text(encoding="utf-8")
        except UnicodeDecodeError as error:
            raise ValueError(f"{file} is not text: {error}") from None
    if template is not None and not isinstance(template, str):
        raise ValueError(f"{path}: chat_template should be a string")
    return config | ({} if template is None else {"chat_template": template})


def token_names(config: Mapping[str, Any]) -> dict[str, str]:
    """The names of a model's special tokens, by "bos_token", "eos_token", …"""
    names = {}
    for role in NAMED:
        token = config.get(role)
        if isinstance(token, dict):
            token = token.get("content")
        if isinstance(token, str):
            names[role] = token
    return names
