"""How one decode step runs.

A `Decoder` holds a batch of sequences and turns new tokens into the logits of the next:

    logits = decoder.prefill(prompts)      # a list of B lists of token ids, of any lengths -> (B, V) float32
    logits = decoder.step(tokens)          # (B,) int64, one token more for every sequence -> (B, V) float32

`EagerDecoder` runs the model itself, on any device and backend, `NativeDecoder` makes one C++ call a step, on a CPU,
and `CudaGraphDecoder` replays a recorded step, on a GPU; all have a KV cache that is allocated once. `KeepingDecoder`
is a native one that goes on from what its last text left, `SpeculatingDecoder` guesses ahead on top of one, and
`UncachedDecoder` computes everything again for every token; `adapted` gives sequences adapters of their own.
`execution.py` chooses between them.
"""

from llmfast.inference.decoders.adapted import NativeAdapter, beside
from llmfast.inference.decoders.cuda_graph import CudaGraphDecoder, DecoderPool
from llmfast.inference.decoders.eager import EagerDecoder, EagerReader
from llmfast.inference.decoders.keeping import KeepingDecoder, PrefixCache
from llmfast.inference.decoders.native import NativeDecoder, NativeModel, NativeReader
from llmfast.inference.decoders.protocol import Decoder, Reader
from llmfast.inference.decoders.speculating import SpeculatingDecoder
from llmfast.inference.decoders.static import StaticDecoder
from llmfast.inference.decoders.uncached import UncachedDecoder

__all__ = [
    "CudaGraphDecoder",
    "Decoder",
    "DecoderPool",
    "EagerDecoder",
    "EagerReader",
    "KeepingDecoder",
    "NativeAdapter",
    "NativeDecoder",
    "NativeModel",
    "NativeReader",
    "PrefixCache",
    "Reader",
    "SpeculatingDecoder",
    "StaticDecoder",
    "UncachedDecoder",
    "beside",
]
