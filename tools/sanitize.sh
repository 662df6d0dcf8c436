#!/usr/bin/env bash
# SPDX-License-Identifier: Apache-2.0
# Executes every CUDA kernel on the host (tests/csrc/host_model.h) and compares it with scalar loops:
#   1. fibers with AddressSanitizer and UndefinedBehaviorSanitizer, in both orders of blocks and threads;
#   2. threads with ThreadSanitizer, one tiny case per kernel;
#   3. kernels with a deliberate mistake, which must be reported.
# Needs only a C++20 compiler: no CUDA toolkit, no GPU, no torch. Usage: tools/sanitize.sh [name...] runs test_<name>.cpp
# only. Prints one line per run and "N passed, 0 failed". Logs are kept in $SANITIZE_OUT (default: build/sanitize).
set -u
cd "$(dirname "$0")/.." || exit 1

CXX=${CXX:-g++}
OUT=${SANITIZE_OUT:-build/sanitize}
JOBS=${SANITIZE_JOBS:-$(nproc)}
FLAGS=(-std=c++20 -DTOKENPRUNE_HOST_MODEL -I tests/csrc -Wall -Wextra -Wno-unknown-pragmas -g1 -fno-strict-aliasing)
ADDRESS=(-O1 -fsanitize=address,undefined -fno-sanitize-recover=all)
THREAD=(-O1 -fsanitize=thread -DTOKENPRUNE_HOST_THREADS -DTOKENPRUNE_TINY -pthread)
export ASAN_OPTIONS=detect_leaks=0 TSAN_OPTIONS=halt_on_error=0:exitcode=66 OMP_NUM_THREADS=1
mkdir -p "$OUT"

names=("$@")
if [ ${#names[@]} -eq 0 ]; then
  for file in tests/csrc/test_*.cpp; do
    name=$(basename "$file" .cpp)
    names+=("${name#test_}")
  done
fi

# build SOURCE PROGRAM FLAGS...: compiles unless the program is newer than every source.
build() {
  local source=$1 program=$2
  shift 2
  if [ -x "$program" ] && [ -z "$(find csrc tests/csrc tools/sanitize.sh -newer "$program" -print -quit)" ]; then return 0; fi
  "$CXX" "${FLAGS[@]}" "$@" "$source" -o "$program" 2> "$program.build.log"
}

# step NAME EXPECTED(pass|fail) PROGRAM ARGS...: runs one program, leaves its verdict in a file.
step() {
  local name=$1 expected=$2 program=$3 status=0 started=$SECONDS
  shift 3
  timeout 300 "$program" "$@" > "$OUT/$name.log" 2>&1 || status=$?
  local verdict=FAIL
  if [ "$expected" = pass ]; then
    [ $status -eq 0 ] && verdict=ok
  else
    [ $status -ne 0 ] && [ $status -ne 124 ] && [ $status -ne 2 ] && verdict=ok
  fi
  printf '%-4s  %-45s %4ss  %s\n' "$verdict" "$name" "$((SECONDS - started))" "$(grep -E '^[0-9]+ passed' "$OUT/$name.log")" \
    | tee "$OUT/$name.verdict"
  if [ $verdict = FAIL ]; then grep -vE '^ok ' "$OUT/$name.log" | head -40; fi
}

# all_of NAME: the runs of one test file, or "FAIL" lines when it does not compile.
all_of() {
  local name=$1
  rm -f "$OUT/$name".*.verdict
  if build "tests/csrc/test_$name.cpp" "$OUT/$name.address" "${ADDRESS[@]}"; then
    step "$name.address" pass "$OUT/$name.address"
    TOKENPRUNE_MODEL_REVERSE=1 step "$name.reversed" pass "$OUT/$name.address"
  else
    echo "FAIL  $name.address does not compile" | tee "$OUT/$name.address.verdict"
    head -40 "$OUT/$name.address.build.log"
  fi
  if build "tests/csrc/test_$name.cpp" "$OUT/$name.thread" "${THREAD[@]}"; then
    step "$name.thread" pass "$OUT/$name.thread"
  else
    echo "FAIL  $name.thread does not compile" | tee "$OUT/$name.thread.verdict"
    head -40 "$OUT/$name.thread.build.log"
  fi
}

# The mistakes that each mode must find.
all_mistakes() {
  rm -f "$OUT"/mistake.*.verdict
  build tests/csrc/racy.cpp "$OUT/racy.address" "${ADDRESS[@]}" && build tests/csrc/racy.cpp "$OUT/racy.thread" "${THREAD[@]}"
  step mistake.none.address pass "$OUT/racy.address" none
  for mistake in half wait overrun uninitialised divergent; do
    step "mistake.$mistake.address" fail "$OUT/racy.address" "$mistake"
  done
  build tests/csrc/racy_hopper.cpp "$OUT/racy_hopper.address" "${ADDRESS[@]}"
  step mistake.hopper.none pass "$OUT/racy_hopper.address" none
  for mistake in fence product early copy arrival bytes; do
    step "mistake.hopper.$mistake" fail "$OUT/racy_hopper.address" "$mistake"
  done
  step mistake.none.thread pass "$OUT/racy.thread" none
  for mistake in barrier shuffle; do
    step "mistake.$mistake.thread" fail "$OUT/racy.thread" "$mistake"
  done
}

export -f build step all_of all_mistakes
export CXX OUT
export FLAGS_TEXT="${FLAGS[*]}" ADDRESS_TEXT="${ADDRESS[*]}" THREAD_TEXT="${THREAD[*]}"
rm -f "$OUT"/*.verdict
{
  printf 'all_of %s\n' "${names[@]}"
  [ $# -eq 0 ] && echo all_mistakes
} | xargs -P "$JOBS" -I{} bash -c 'FLAGS=($FLAGS_TEXT) ADDRESS=($ADDRESS_TEXT) THREAD=($THREAD_TEXT); {}'

passed=$(cat "$OUT"/*.verdict | grep -c '^ok')
failed=$(cat "$OUT"/*.verdict | grep -c '^FAIL')
echo "$passed passed, $failed failed"
[ "$failed" -eq 0 ] && [ "$passed" -gt 0 ]
