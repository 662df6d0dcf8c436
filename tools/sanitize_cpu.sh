#!/usr/bin/env bash
# SPDX-License-Identifier: Apache-2.0
# The CPU library under AddressSanitizer and UBSan: a build of its own, and the value, gradient and error tests on it.
set -euo pipefail
cd "$(dirname "$0")/.."
PYTHON=${PYTHON_BIN:-.venv/bin/python}
BUILD=build/sanitize
TORCH=$("$PYTHON" -c 'import importlib.util as u; print(u.find_spec("torch").submodule_search_locations[0])')
echo "sanitize: building the CPU library"
cmake -S . -B "$BUILD" -G Ninja -DTOKENPRUNE_TORCH_DIR="$TORCH" -DTOKENPRUNE_SANITIZE=address,undefined \
  -DCMAKE_BUILD_TYPE=None > /dev/null
cmake --build "$BUILD" -- --quiet
# The interpreter is not instrumented, so the runtimes must be there before it starts. Leaks are Python's own.
LD_PRELOAD="$(gcc -print-file-name=libasan.so):$(gcc -print-file-name=libubsan.so)" \
  ASAN_OPTIONS=detect_leaks=0 UBSAN_OPTIONS=halt_on_error=1:print_stacktrace=1 \
  TOKENPRUNE_LIBRARY_DIR="$PWD/$BUILD" PYTHONPATH="$PWD/python" \
  "$PYTHON" -m pytest -p no:faulthandler -p no:cacheprovider tests/ops \
  -k "(test_value or test_gradient or rules) and not forced"
