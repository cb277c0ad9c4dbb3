"""Builds the C++ CPU kernels, `llmfast/_C.abi3.so`, where a compiler is found; everything else is in pyproject.toml.

The library is optional: without a compiler, or when compiling fails, the install goes on without it, and the reason is
written to `llmfast/_C_missing.txt`, from where `llmfast backends` reads it. LLMFAST_REQUIRE_CPP=1 makes that an
error, LLMFAST_SKIP_CPP=1 does not try, LLMFAST_CXXFLAGS adds flags (-fsanitize=address, say).

It uses no Python symbol and only torch's stable ABI, so that one build serves every Python and every torch >= 2.10.
Instruction sets are chosen at run time, so there is no flag for the machine that compiles it.
"""

import os
import shlex
import shutil
import sys
import traceback
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).resolve().parent
os.environ.setdefault("MAX_JOBS", str(min(os.cpu_count() or 1, 8)))

try:
    from torch.utils.cpp_extension import BuildExtension, CppExtension
except ImportError as error:
    BuildExtension, no_torch = build_ext, str(error)
else:
    no_torch = None
    if shutil.which("ninja"):
        BuildExtension = BuildExtension.with_options(use_ninja=True)


def why_not() -> str | None:
    """What keeps the extension from being built, in words; None when it can be tried."""
    if os.environ.get("LLMFAST_SKIP_CPP") == "1":
        return "LLMFAST_SKIP_CPP=1 was set at install time"
    if sys.platform == "win32":
        return "the kernels need GCC's or Clang's vector extensions and are not built on Windows"
    if no_torch is not None:
        return f"torch could not be imported at install time ({no_torch}); install torch, then this package again"
    compiler = shlex.split(os.environ.get("CXX", "c++"))
    if not any(shutil.which(word) for word in compiler):
        return f"no C++ compiler ({compiler[-1]}) was found at install time; install g++ or clang, then retry"
    return None


def extension() -> Extension:
    if why_not() is not None:  # a name to hang the reason on; nothing is compiled
        return Extension("llmfast._C", sources=[], py_limited_api=True)
    extra = os.environ.get("LLMFAST_CXXFLAGS", "").split()
    flags = ["-std=c++17", "-O3", "-g0", "-fvisibility=hidden", "-Wno-psabi"]
    flags += ["-DTORCH_TARGET_VERSION=0x020a000000000000"]  # torch 2.10
    built = CppExtension(
        "llmfast._C",
        sources=sorted(str(path.relative_to(ROOT)) for path in (ROOT / "csrc").rglob("*.cpp")),
        depends=sorted(str(path.relative_to(ROOT)) for path in (ROOT / "csrc").rglob("*.[hi]*")),
        extra_compile_args={"cxx": flags + extra},
        extra_link_args=extra,
        py_limited_api=True,
    )
    built.libraries = ["torch_cpu"]  # where the stable ABI lives; no unstable C++ library is linked
    return built


class BuildOrSayWhy(BuildExtension):
    def run(self):
        reason = why_not()
        if reason is None:
            try:
                super().run()
            except Exception as error:
                if os.environ.get("LLMFAST_REQUIRE_CPP") == "1":
                    raise
                traceback.print_exc()
                last_line = (str(error).strip() or type(error).__name__).splitlines()[-1]
                reason = f"compiling failed at install time ({last_line}); `pip install -v` shows the compiler's words"
        elif os.environ.get("LLMFAST_REQUIRE_CPP") == "1":
            raise SystemExit(f"LLMFAST_REQUIRE_CPP=1, but {reason}")
        self.say_why(reason)

    def say_why(self, reason):
        package = ROOT / "llmfast" if self.inplace else Path(self.build_lib) / "llmfast"
        note = package / "_C_missing.txt"
        if reason is None:
            note.unlink(missing_ok=True)
            return
        package.mkdir(parents=True, exist_ok=True)
        note.write_text(f"{reason}\n")
        for stale in package.glob("_C.*so"):  # an older build would answer for sources it was not built from
            stale.unlink()
        print(f"llmfast: installing without the C++ kernels: {reason}", file=sys.stderr)

    def get_outputs(self):
        return [path for path in super().get_outputs() if Path(path).exists()]

    def get_output_mapping(self):
        return {built: source for built, source in super().get_output_mapping().items() if Path(built).exists()}


setup(
    ext_modules=[extension()],
    cmdclass={"build_ext": BuildOrSayWhy},
    options={"bdist_wheel": {"py_limited_api": "cp310"}},
)
