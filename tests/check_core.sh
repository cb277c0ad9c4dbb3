#!/bin/sh
# The C++ core without torch, under the address and undefined-behaviour sanitizers, under the thread sanitizer, or for
# Arm in an emulator:
#
#   tests/check_core.sh sanitize     # g++ or clang++
#   tests/check_core.sh thread       # the same compilers: data races
#   tests/check_core.sh arm          # g++-aarch64-linux-gnu and qemu-user-static (Debian's names)
#
# Every instruction set that can run computes the same small models, decoders and an encoder, and is compared with the
# generic one. The kernels behind torch's operators are put to the test suite the same way with
# `tests/check_core.sh pytest`: it builds the extension with the sanitizers in a copy of the checkout, and runs the suite's
# C++ parts on it.
set -eu
root=$(cd "$(dirname "$0")/.." && pwd)
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
cd "$root/csrc"
core="isa/isa.cpp scratch.cpp decoder/team.cpp decoder/native_adapter.cpp decoder/native_decoder.cpp decoder/sampling.cpp
  encoder/native_encoder.cpp ../tests/core.cpp"
flags="-std=c++17 -Wno-psabi -pthread"
sanitizers="-g1 -fsanitize=address,undefined -fno-sanitize-recover=undefined"

case "${1-}" in
sanitize)
  ${CXX:-g++} $flags -O1 $sanitizers isa/kernels_*.cpp $core -o "$work/core"
  LLMFAST_CPU_ISA=generic "$work/core" >"$work/expected"
  for isa in avx2 avx512 avx512_bf16 amx neon; do
    LLMFAST_CPU_ISA=$isa "$work/core" compare <"$work/expected" 2>"$work/error" || {
      grep -q "does not have these instructions\|is not known here" "$work/error" && continue
      cat "$work/error" && exit 1
    }
  done
  ;;
thread)
  ${CXX:-g++} $flags -O1 -g1 -fsanitize=thread isa/kernels_*.cpp $core -o "$work/core"
  for isa in generic ""; do  # and what this CPU has
    LLMFAST_CPU_ISA=$isa TSAN_OPTIONS=halt_on_error=1 "$work/core" threads
  done
  ;;
arm)
  aarch64-linux-gnu-g++ $flags -O2 -static isa/kernels_*.cpp $core -o "$work/core"
  LLMFAST_CPU_ISA=generic qemu-aarch64-static "$work/core" >"$work/expected"
  LLMFAST_CPU_ISA=neon qemu-aarch64-static "$work/core" compare <"$work/expected"
  ;;
pytest)
  mkdir "$work/copy"
  (cd "$root" && tar -c --exclude=.git --exclude=build --exclude='*.so' .) | tar -x -C "$work/copy"
  cd "$work/copy"
  LLMFAST_REQUIRE_CPP=1 LLMFAST_CXXFLAGS="-O1 $sanitizers" python setup.py -q build_ext --inplace
  # torch itself is not built with them: the runtime is preloaded, and leaks at exit are Python's and torch's.
  preload="$(${CXX:-g++} -print-file-name=libasan.so) $(${CXX:-g++} -print-file-name=libubsan.so)"
  LD_PRELOAD="$preload" ASAN_OPTIONS=detect_leaks=0 PYTHONPATH="$work/copy" \
    python -m pytest -q -p no:cacheprovider tests/test_fuzz.py tests/test_inference_native.py \
    tests/test_inference_encoders.py tests/test_contract.py \
    -k "not triton and not fork and not thousand and not instruction"
  ;;
*)
  sed -n '2,12s/^# \{0,1\}//p' "$root/tests/check_core.sh"
  exit 2
  ;;
esac
