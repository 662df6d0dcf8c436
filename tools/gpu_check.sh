#!/usr/bin/env bash
# SPDX-License-Identifier: Apache-2.0
# Everything that needs a GPU, in one command: make gpu-check OUT=dir  (or tools/gpu_check.sh dir)
#
# Builds the CUDA library, compares every op with the CPU kernels, runs compute-sanitizer where it is installed, the op
# tests on the GPU, and the benchmarks. Needs torch >= 2.11 with CUDA, a compiler and nvcc; no network. Takes at most
# GPU_CHECK_SECONDS (600). A step that passed leaves OUT/<step>.done and is not repeated: call again to go on after an
# interruption or a timeout. Logs and JSON lie in OUT; send that folder along with a report.
set -u
OUT=${1:-${OUT:-out/gpu_check}}
LIMIT=${GPU_CHECK_SECONDS:-600}
PYTHON=${PYTHON:-python3}
ROOT=$(cd "$(dirname "$0")/.." && pwd)
cd "$ROOT" || exit 1
mkdir -p "$OUT" || exit 2
OUT=$(cd "$OUT" && pwd)
export PYTHONPATH="$ROOT/python${PYTHONPATH:+:$PYTHONPATH}" PYTHONUNBUFFERED=1 TOKENPRUNE_CUDA=ON
START=$SECONDS
failed=0

if ! "$PYTHON" -c 'import torch' 2>"$OUT/torch.log"; then
  echo "gpu-check: $PYTHON cannot import torch (see $OUT/torch.log); set PYTHON=/path/to/python" >&2
  exit 2
fi
if ! "$PYTHON" -c 'import sys, torch; sys.exit(not torch.cuda.is_available())'; then
  echo "gpu-check: no GPU: torch $("$PYTHON" -c 'import torch; print(torch.__version__)') sees no usable CUDA device here." >&2
  echo "gpu-check: on a machine without a GPU, 'make cuda-check' compiles for every card and 'make sanitize' runs the kernels on the host." >&2
  exit 2
fi
if [ -z "${TORCH_CUDA_ARCH_LIST:-}" ]; then
  # Only the card at hand: the build is then short. 9.0 needs the suffix for its own instructions.
  TORCH_CUDA_ARCH_LIST=$("$PYTHON" -c 'import torch; m = "%d.%d" % torch.cuda.get_device_capability(); print(m + "a" if m == "9.0" else m)')
  export TORCH_CUDA_ARCH_LIST
fi
# What was checked before belongs to these sources only.
STATE=$(find csrc python tests benchmarks tools CMakeLists.txt setup.py -type f \( -name '*.py' -o -name '*.cpp' -o -name '*.cu*' -o -name '*.h' -o -name '*.txt' \) -print0 | sort -z | xargs -0 cat | cksum)
if [ "$(cat "$OUT/state" 2>/dev/null)" != "$STATE" ]; then
  rm -f "$OUT"/*.done
  echo "$STATE" >"$OUT/state"
fi

# step NAME SECONDS COMMAND...: run once, log to NAME.log, never beyond the time that is left.
step() {
  local name=$1 wanted=$2 left=$((LIMIT - (SECONDS - START))) began=$SECONDS code
  shift 2
  if [ -e "$OUT/$name.done" ]; then
    echo "gpu-check: $name: done before"
    return 0
  fi
  if [ "$left" -lt 15 ]; then
    echo "gpu-check: $name: no time left; call again to go on" | tee "$OUT/$name.log"
    failed=1
    return 1
  fi
  [ "$wanted" -lt "$left" ] || wanted=$left
  timeout --kill-after=10 "$wanted" "$@" >"$OUT/$name.log" 2>&1
  code=$?
  if [ "$code" -eq 0 ]; then
    touch "$OUT/$name.done"
    echo "gpu-check: $name: ok ($((SECONDS - began)) s)"
    return 0
  fi
  failed=1
  [ "$code" -ne 124 ] || echo "gpu-check: $name: stopped after $wanted s; call again to go on"
  [ "$code" -eq 124 ] || { echo "gpu-check: $name: FAILED (exit $code), see $OUT/$name.log"; tail -n 5 "$OUT/$name.log"; }
  return "$code"
}

build() {
  # In place: nothing is installed or fetched.
  "$PYTHON" setup.py build_ext --inplace || return
  "$PYTHON" -c 'import sys; from tokenprune_ext import _library as lib; print(lib.cuda_error); sys.exit(not lib.cuda_loaded())'
}
sanitizer() {
  if ! command -v compute-sanitizer >/dev/null; then
    echo "compute-sanitizer is not installed: skipped"
    return 0
  fi
  local tool
  for tool in memcheck racecheck synccheck; do
    compute-sanitizer --tool "$tool" --error-exitcode 9 "$PYTHON" tools/gpu_smoke.py --small || return
  done
}
export -f build sanitizer
export PYTHON

step build 420 bash -c build || exit 1
"$PYTHON" -m tokenprune_ext.collect_env --json >"$OUT/environment.json"
step smoke 60 "$PYTHON" tools/gpu_smoke.py
step sanitizer 120 bash -c sanitizer
# The sm_90a units are off by default: the same comparison with them, where they are built.
units=$("$PYTHON" -c 'import torch; from tokenprune_ext import _library; print(int(torch.cuda.get_device_capability() == (9, 0) and hasattr(torch.ops.tokenprune_sm90a, "gather_linear")))')
if [ "$units" = 1 ]; then
  step smoke_hopper 60 env TOKENPRUNE_HOPPER=1 "$PYTHON" tools/gpu_smoke.py
  step bench_hopper 90 env TOKENPRUNE_HOPPER=1 "$PYTHON" -m benchmarks --suite ops --family attention --device cuda --quick --json "$OUT/bench_hopper_attention.json"
  step bench_hopper_linear 60 env TOKENPRUNE_HOPPER=1 "$PYTHON" -m benchmarks --suite ops --family linear --device cuda --quick --json "$OUT/bench_hopper_linear.json"
else
  echo "gpu-check: sm_90a units: not built (needs capability 9.0 and the headers of nvidia-cutlass)"
fi
for file in tests/ops/test_*.py; do
  step "$(basename "$file" .py)" 100 env TOKENPRUNE_TEST_DEVICE=cuda "$PYTHON" -m pytest "$file" -q --no-header -p no:cacheprovider
done
step bench_ops 180 "$PYTHON" -m benchmarks --suite ops --device cuda --quick --json "$OUT/bench_ops.json"
if ! "$PYTHON" -c 'import timm, torchvision' 2>/dev/null; then
  echo "gpu-check: timm or torchvision is missing: the models and the demo are left out"
  exit "$failed"
fi
step bench_models 180 "$PYTHON" -m benchmarks --suite models --device cuda --quick --json "$OUT/bench_models.json"
step demo 60 "$PYTHON" -m tokenprune_ext.cli demo --device cuda --dtype bfloat16 --seconds 3 --out "$OUT/demo.png" --json "$OUT/demo.json"

echo "gpu-check: $(ls "$OUT" | wc -l) files in $OUT, $((SECONDS - START)) s"
exit "$failed"
