"""llmfast: a GPT that can be read in an afternoon and runs as fast as the machine allows.

>>> import llmfast
>>> llmfast.generate("Once upon a time")              # a story by the embedded model
>>> llm = llmfast.load("path/to/gpt2")                # a GPT-2 checkpoint of your own
>>> with llmfast.use_backend("pytorch"): ...          # or "cpp", "triton", or one for each op
"""

from llmfast.backends import BackendUnavailable, backends, explain, load_backend, register_backend, use_backend
from llmfast.inference.embedding import Embedder
from llmfast.inference.finite import NonFiniteLogits
from llmfast.inference.llm import LLM
from llmfast.inference.loading import generate, load
from llmfast.models import GPT, GPTConfig

__version__ = "0.1.0"

__all__ = [
    "GPT",
    "LLM",
    "BackendUnavailable",
    "Embedder",
    "GPTConfig",
    "NonFiniteLogits",
    "__version__",
    "backends",
    "explain",
    "generate",
    "load",
    "load_backend",
    "register_backend",
    "use_backend",
]
