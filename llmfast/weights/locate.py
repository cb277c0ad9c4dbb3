"""From the name of a model to the place of its files."""

from __future__ import annotations

from pathlib import Path

ASSETS = Path(__file__).parents[1] / "assets"
EMBEDDED = ("stories",)  # the models that come with the package
HUB_FILES = ["*.json", "merges.txt", "vocab.txt", "*.safetensors"]
HUB_OLD_WEIGHTS = ["pytorch_model*.bin"]  # fetched only where there are no safetensors


def locate_model(name: str | Path) -> Path:
    """The directory or file of a model: an embedded one, a path, or a name on the Hugging Face hub, in this order.

    A hub model is downloaded (or found in the hub's cache) through `huggingface_hub`, an optional dependency.
    `FileNotFoundError` in one line says what was looked for where.
    """
    if str(name) in EMBEDDED:
        return ASSETS / str(name)
    path = Path(name).expanduser()
    if str(name) and path.exists():
        return path
    text = str(name)
    looks_like_hub = isinstance(name, str) and text.count("/") <= 1 and text[:1] not in ("", ".", "/", "~", "\\")
    if not looks_like_hub or path.suffix in (".safetensors", ".bin"):
        raise FileNotFoundError(f"no model at {text}")
    missing = f"no model {text!r}: it is not embedded ({', '.join(EMBEDDED)}), not a file or directory"
    try:
        from huggingface_hub import snapshot_download
    except ImportError:
        raise FileNotFoundError(f"{missing}, and huggingface_hub is not installed to look for it on the hub") from None
    try:
        path = Path(snapshot_download(text, allow_patterns=HUB_FILES, etag_timeout=10))
        if not any(path.glob("*.safetensors")):
            path = Path(snapshot_download(text, allow_patterns=HUB_FILES + HUB_OLD_WEIGHTS, etag_timeout=10))
        return path
    except Exception as error:  # a network, a name and a server have many ways to fail
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise FileNotFoundError(f"{missing}, and the hub did not give it: {reason}") from None
