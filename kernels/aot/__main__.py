"""The command: `python -m llmfast.kernels.aot`."""

import os
import warnings

# Before Triton is imported: nothing compiles under the interpreter, and line numbers only take time.
os.environ.pop("TRITON_INTERPRET", None)
os.environ.setdefault("TRITON_DISABLE_LINE_INFO", "1")
warnings.filterwarnings("ignore", message="TRITON_DEFAULT_FP_FUSION")

from .command import main  # noqa: E402

main()
