"""From the name of a model to the place of its files."""

from __future__ import annotations

from pathlib import Path

from llmfast.weights.fetching import KNOWN, how_to_get, is_there, place_of

ASSETS = Path(__file__).parents[1] / "assets"
EMBEDDED = ("stories",)  # the models that come with the package
HUB_FILES = ["*.json", "merges.txt", "vocab.txt", "tokenizer.model", "*.safetensors"]
HUB_OLD_WEIGHTS = ["pytorch_model*.bin"]  # fetched only where there are no safetensors


def locate_model(name: str | Path) -> Path:
    """The directory or file of a model: an embedded one, one that `llmfast get` has brought, a path, or a name on the
    Hugging Face hub, in this order.

    A hub model is downloaded (or found in the hub's cache) through `huggingface_hub`, an optional dependency; its name
    may go on to a GGUF file, as in owner/name/file.gguf. `FileNotFoundError` in one line says what was looked for
    where.
    """
    if str(name) in EMBEDDED:
        return ASSETS / str(name)
    if str(name) in KNOWN:
        if not is_there(str(name)):
            raise FileNotFoundError(f"the model {name} is not here yet: {how_to_get(str(name))}")
        return place_of(str(name))
    path = Path(name).expanduser()
    if str(name) and path.exists():
        return path
    text = str(name)
    gguf_file = text.count("/") == 2 and path.suffix == ".gguf"
    repository = text.count("/") <= 1 and path.suffix not in (".safetensors", ".bin", ".gguf")
    if not isinstance(name, str) or not (gguf_file or repository) or text[:1] in ("", ".", "/", "~", "\\"):
        raise FileNotFoundError(f"no model at {text}")
    names = ", ".join((*EMBEDDED, *KNOWN))
    missing = f"no model {text!r}: it is none of {names}, not a file or directory"
    try:
        import huggingface_hub
    except ImportError:
        raise FileNotFoundError(f"{missing}, and huggingface_hub is not installed to look for it on the hub") from None
    try:
        if gguf_file:
            owner_and_name, _, file = text.rpartition("/")
            return Path(huggingface_hub.hf_hub_download(owner_and_name, file, etag_timeout=10))
        path = Path(huggingface_hub.snapshot_download(text, allow_patterns=HUB_FILES, etag_timeout=10))
        if not any(path.glob("*.safetensors")):
            path = Path(
                huggingface_hub.snapshot_download(text, allow_patterns=HUB_FILES + HUB_OLD_WEIGHTS, etag_timeout=10)
            )
        return path
    except Exception as error:  # a network, a name and a server have many ways to fail
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise FileNotFoundError(f"{missing}, and the hub did not give it: {reason}") from None
