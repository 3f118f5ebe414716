#!/usr/bin/env bash
# The core's tests and the hostile files on a build of the core under a sanitizer: address (default), undefined or thread.
# Runs in an environment with the test extra; further arguments go to pytest. `sanitize.sh KIND --run COMMAND …` runs a command
# on that build instead, such as a fuzzer of scripts/campaigns.
set -euo pipefail
cd "$(dirname "$0")/.."
kind=${1:-address}
shift || true
flags=$kind
case $kind in
  address) runtime=libasan.so ;;
  undefined) runtime=libubsan.so flags=undefined,float-cast-overflow ;;
  thread) runtime=libtsan.so ;;
  *) echo "sanitizer is $kind; known: address, undefined, thread" >&2; exit 2 ;;
esac
build=build/sanitize-$kind
cmake -S . -B "$build" -G Ninja -DCMAKE_BUILD_TYPE=RelWithDebInfo -DPELLUCID_SANITIZE="$flags"
cmake --build "$build"
export PELLUCID_LIBRARY=$PWD/$build/libpellucid.so
# Python itself is not instrumented: its leaks and locks are not ours, and the runtime must come first.
# What cannot be had is refused, as without a sanitizer, and what is very large is not asked for.
export ASAN_OPTIONS=detect_leaks=0:abort_on_error=1:allocator_may_return_null=1:max_allocation_size_mb=1024 UBSAN_OPTIONS=halt_on_error=1:print_stacktrace=1
export TSAN_OPTIONS=halt_on_error=1:ignore_noninstrumented_modules=1
preload="$(g++ -print-file-name=$runtime) $(g++ -print-file-name=libstdc++.so.6)"

# A check that cannot fail is none: a caller that lies about its memory must be caught.
lie='
import numpy as np
from pellucid.core import abi
source, target, context = np.zeros(64, np.uint8), np.zeros(4096, np.uint8), abi.Context(num_threads=1)
status = abi.library().pld_convert(context.handle, source.ctypes.data, 4096, 0, 16, 64, target.ctypes.data, 4096, 0)
raise SystemExit(3 if status else 0)'
if [ "$kind" = address ]; then
  report=$( (LD_PRELOAD="$preload" python -c "$lie" || echo "ended with status $?") 2>&1)
  if [[ $report != *heap-buffer-overflow* ]]; then
    printf 'the sanitizer saw no overflow where there is one:\n%s\n' "$report" >&2
    exit 1
  fi
fi

if [ "${1:-}" = --run ]; then
  shift
  export PYTHONMALLOC=malloc # each object of Python's is an allocation with fences of its own
  exec env LD_PRELOAD="$preload" "$@"
fi

tests=(tests/ops tests/sampling/test_sampling_core.py tests/core/test_core_*.py tests/core/test_program_*.py
  tests/core/test_weights_{checkpoint,gguf,hostile,safetensors}.py tests/offline/test_offline_same_bits_long.py)
if [ "$kind" = thread ]; then # what shares work between threads; the rest runs on one
  tests=(tests/core/test_core_{attention,decode,moe,quantised,sample,scratch,sequences,threads}*.py
    tests/offline/test_offline_same_bits_long.py)
fi
LD_PRELOAD="$preload" python -m pytest -q -x -p no:cacheprovider "${tests[@]}" --deselect tests/core/test_core_instructions.py "$@"
