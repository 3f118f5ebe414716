#!/usr/bin/env bash
# The core's tests and the hostile files on a build of the core under a sanitizer: address (default) or undefined.
# Runs in an environment with the test extra; further arguments go to pytest.
set -euo pipefail
cd "$(dirname "$0")/.."
kind=${1:-address}
shift || true
build=build/sanitize-$kind
cmake -S . -B "$build" -G Ninja -DCMAKE_BUILD_TYPE=RelWithDebInfo -DPELLUCID_SANITIZE="$kind"
cmake --build "$build"
export PELLUCID_LIBRARY=$PWD/$build/libpellucid.so
case $kind in
  address) runtime=libasan.so ;;
  undefined) runtime=libubsan.so ;;
  *) echo "sanitizer is $kind; known: address, undefined" >&2; exit 2 ;;
esac
# Python itself is not instrumented: its leaks are not ours, and the runtime must come first.
export ASAN_OPTIONS=detect_leaks=0:abort_on_error=1 UBSAN_OPTIONS=halt_on_error=1:print_stacktrace=1
LD_PRELOAD="$(g++ -print-file-name=$runtime) $(g++ -print-file-name=libstdc++.so.6)" \
  python -m pytest tests/core tests/ops -q -x -p no:cacheprovider \
  -k "core or hostile or ops or gguf or safetensors or program" "$@"
