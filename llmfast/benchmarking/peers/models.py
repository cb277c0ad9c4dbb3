"""What only the peers' libraries can make of a model: transformers' form of random weights, CTranslate2's, and the
logits that every engine is checked with. `making.py` makes the rest.

    models.py FOLDER [CONFIG]   # by a Python that has the peers' packages; a config.json's content

    FOLDER/hf/              Hugging Face's layout: with CONFIG random weights of its shape, else there already
    FOLDER/reference.npz    transformers' float32 logits after some of the prompts
    FOLDER/ct2/             for CTranslate2, which converts to its precision as it loads (GPT-2 only)
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

CHECKED_LENGTHS = (32, 512)


def prompt_ids(count: int, vocabulary: int) -> list[int]:
    """The ids that every engine is given."""
    return [(i * 7919) % vocabulary for i in range(count)]


def make(folder: Path, document: dict[str, Any] | None) -> None:
    import torch
    from transformers import CONFIG_MAPPING, AutoModelForCausalLM

    if document is None:
        model = AutoModelForCausalLM.from_pretrained(folder / "hf", dtype=torch.float32).eval()
    else:
        torch.manual_seed(0)
        config = CONFIG_MAPPING[document["model_type"]].from_dict(document)
        model = AutoModelForCausalLM.from_config(config).eval()
        model.save_pretrained(folder / "hf")
    write_reference(model, folder / "reference.npz")
    if model.config.model_type == "gpt2":
        write_ctranslate2(model, folder / "ct2")


def write_reference(model: Any, path: Path) -> None:
    import numpy as np
    import torch

    with torch.inference_mode():
        ids = torch.tensor([prompt_ids(max(CHECKED_LENGTHS), model.config.vocab_size)])
        logits = {str(n): model(ids[:, :n], logits_to_keep=1).logits[0, -1].numpy() for n in CHECKED_LENGTHS}
    np.savez(path, **logits)


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
    make(Path(sys.argv[1]), json.loads(sys.argv[2]) if len(sys.argv) > 2 else None)
