#!/usr/bin/env bash
# Sets up, builds and tests everything; its last line is `N passed, N failed, N skipped`.
#
#   tests/run.sh                     what CI runs for every change
#   tests/run.sh --tier nightly      also tests labelled slow, and clang-tidy over all files
#   tests/run.sh --only asan,lint    parts of: release python deploy cuda asan tsan lint (this
#                                    of all files)
#
# Counts test cases, and every other check as one. A step that cannot run is a failure. Logs and
# reports: build/logs. Python packages: .venv, from tests/requirements.txt.
# shellcheck disable=SC2317  # parts are called by their names
set -uo pipefail
cd "$(dirname "$0")/.." || exit 2

readonly logs=$PWD/build/logs
readonly trace=tests/traces/smollm2-135m-moby-dick.safetensors
readonly python=.venv/bin/python

passed=0
failed=0
skipped=0
failures=()
details=()  # what failed cases and checks said, a line each

note() { printf '\n==> %s\n' "$*" >&2; }

count() {  # NAME PASSED FAILED SKIPPED
  ((passed += $2, failed += $3, skipped += $4))
  (($3 == 0)) || failures+=("$1: $3")
}

finish() {
  note "summary"
  local failure
  for failure in ${failures[@]+"${failures[@]}"}; do echo "failed: $failure" >&2; done
  ((${#details[@]} == 0)) || printf '%s\n' "" "${details[@]}" "" >&2
  echo "$passed passed, $failed failed, $skipped skipped"
  ((failed == 0))
  exit
}

# Of what a step said, for the summary.
keep() {  # NAME TEXT
  local lines
  mapfile -t lines <<<"$2"
  details+=("$1:" "${lines[@]/#/  }")
}

# One command, one check. The end of what it says is kept if it fails.
check() {  # NAME COMMAND...
  local name=$1 start=$SECONDS log=$logs/check.log
  shift
  note "$name"
  if "$@" 2>&1 | tee "$log" >&2; then
    count "$name" 1 0 0
  else
    count "$name" 0 1 0
    keep "$name" "$(tail -n 12 "$log" | cut -c -200)"
    echo "FAILED: $name" >&2
    return 1
  fi
  echo "$name: ok, $((SECONDS - start)) s" >&2
}

# A runner that wrote its cases to a JUnit file.
count_cases() {  # NAME JUNIT_FILE EXIT_CODE
  local name=$1 file=$2 code=$3 p=0 f=0 s=0 tally
  if [[ ! -s $file ]] || ! tally=$(python3 tests/tally.py "$file"); then
    echo "FAILED: $name left no results" >&2
    count "$name" 0 1 0
    return
  fi
  read -r p f s <<<"$tally"
  if ((f > 0)); then
    keep "$name" "${tally#*$'\n'}"
  elif ((code != 0)); then
    f=1
    keep "$name" "it ended with $code, and no case says that it failed"
  fi
  count "$name" "$p" "$f" "$s"
  echo "$name: $p passed, $f failed, $s skipped" >&2
}

configure_and_build() {  # PRESET [BUILD_OPTION...]
  local log=$logs/$1-configure.log
  cmake --preset "$1" >"$log" 2>&1 || { cat "$log"; return 1; }
  cmake --build --preset "$1" --parallel "$(deploy/build-jobs.sh)" "${@:2}"
}

# Labels of the tests that do not run in a preset.
excluded_labels() {  # PRESET
  local excluded="no-$1"
  [[ $1 == release ]] || excluded+="|no-sanitizer"
  [[ $tier == nightly ]] || excluded+="|slow"
  echo "$excluded"
}

# Only the test programs that run in this preset, and what they need: a build under a sanitizer takes
# as long as all the tests.
build_tests() {  # PRESET
  local log=$logs/$1-configure.log known tests=() name
  cmake --preset "$1" >"$log" 2>&1 || { cat "$log"; return 1; }
  known=$(cmake --build --preset "$1" --target help) || return
  while read -r name; do
    grep -q "^$name: phony$" <<<"$known" && tests+=("$name")
  done < <(ctest --test-dir "build/$1" --show-only --label-exclude "$(excluded_labels "$1")" |
    sed -n 's/^ *Test *#[0-9]*: *\([a-z_0-9]*\)$/\1/p')
  ((${#tests[@]} > 10)) || { echo "only ${#tests[@]} test programs are known" >&2; return 1; }
  cmake --build --preset "$1" --parallel "$(deploy/build-jobs.sh)" --target "${tests[@]}"
}

run_ctest() {  # PRESET
  local preset=$1 file=$logs/$1-ctest.xml
  local slow=(--label-exclude "$(excluded_labels "$1")")
  note "$preset: ctest"
  rm -f "$file"
  # All of the output goes to the file, for tally.py to read.
  "${exact_addresses[@]}" ctest --test-dir "build/$preset" --parallel 2 --output-on-failure \
    --output-junit "$file" --test-output-size-passed 100000000 \
    --test-output-size-failed 100000000 ${slow[@]+"${slow[@]}"} >&2
  count_cases "$preset ctest" "$file" $?
}

run_pytest() {  # NAME PROGRAMS PATH...
  local name=$1 bin=$2 file=$logs/${1// /-}.xml
  shift 2
  local slow=(-m "not slow")
  [[ $tier == nightly ]] && slow=()
  note "$name"
  rm -f "$file"
  CLUSTERKV_BIN=$bin PYTHONDONTWRITEBYTECODE=1 "${exact_addresses[@]}" "$python" -m pytest -q \
    -p no:cacheprovider -o junit_family=xunit1 --junitxml="$file" ${slow[@]+"${slow[@]}"} "$@" >&2
  count_cases "$name" "$file" $?
}

make_venv() {
  local wanted
  wanted=$(sha256sum tests/requirements.txt | cut -d' ' -f1)
  [[ -x $python && $(cat .venv/requirements.sha256 2>/dev/null) == "$wanted" ]] && return
  rm -rf .venv
  /usr/bin/python3 -m venv .venv &&
    .venv/bin/pip install --quiet --disable-pip-version-check -r tests/requirements.txt &&
    echo "$wanted" >.venv/requirements.sha256
}

replay() {  # NAME OPTION...
  local name=$1
  shift
  build/release/bin/clusterkv-replay "$trace" --format json \
    --dump-outputs "$logs/$name.safetensors" "$@" >"$logs/$name.json"
}

check_replay() {  # NAME
  "$python" tests/reference/check_replay.py "$trace" "$logs/$1.json" \
            --outputs "$logs/$1.safetensors" >&2
}

# What a sanitizer writes goes to files, also that of daemons which a test starts and kills.
no_reports() {  # PRESET
  local reports=("$logs/$1"-report.*)
  [[ -e ${reports[0]} ]] || return 0
  cat "${reports[@]}" >&2
  return 1
}

part_release() {
  check "release: build" configure_and_build release || return
  run_ctest release
  check "release: consumer of the install tree" tests/consumer/run.sh build/release
  local mode
  for mode in direct served; do
    check "release: replay, $mode" replay "$mode" --mode "$mode" &&
      check "release: independent check, $mode" check_replay "$mode"
  done
  check "release: direct and served agree" \
    "$python" tests/compare_dumps.py "$logs/direct.safetensors" "$logs/served.safetensors"
}

# Without a GPU its tests skip, and say so in the count; that programs start and say what is missing
# is tested everywhere.
part_cuda() {
  if ! command -v nvcc >/dev/null || ! nvcc --version | grep -q 'release 1[3-9]'; then
    note "cuda: nvcc 13 is not on PATH"
    count cuda 0 0 1
    return
  fi
  # The host's tests have run in preset release.
  check "cuda: build, and a bundle of it" configure_and_build cuda --target bundle || return
  local file=$logs/cuda-ctest.xml
  rm -f "$file"
  note "cuda: ctest"
  ctest --test-dir build/cuda --output-on-failure --output-junit "$file" --label-regex cuda \
    --test-output-size-passed 100000000 --test-output-size-failed 100000000 >&2
  count_cases "cuda ctest" "$file" $?
  check "cuda: a machine without a driver is told" says_what_is_missing
  # The tree of its image; the packaging is the same as the other's.
  run_pytest "cuda deploy" build/cuda/bin tests/deploy/test_image.py
}

says_what_is_missing() {
  build/cuda/bin/clusterkvctl --help >/dev/null || return
  nvidia-smi >/dev/null 2>&1 && return
  local code=0
  build/cuda/bin/clusterkvd --backend cuda --listen "unix:$logs/none.sock" --host-memory 64mb \
    --host-memory-dir "$logs/none-memory" --admin-listen 127.0.0.1:0 >"$logs/no-driver.log" 2>&1 ||
    code=$?
  ((code == 3)) && grep -q 'CUDA' "$logs/no-driver.log"
}

part_python() {
  check "python: the programs under test" test -x build/release/bin/clusterkvd || return
  run_pytest "python" build/release/bin tests/reference tests/integration tests/observability \
    tests/tally_test.py tests/benchmarks/cache_policies_test.py
  # By itself: it has fixtures of its own. Its pictures: build/logs/page-*.png, replay-*.png.
  run_pytest "pages" build/release/bin tests/page
}

part_deploy() {
  check "deploy: bundle" configure_and_build release --target bundle || return
  run_pytest "deploy" build/release/bin tests/deploy
}

sanitized() {  # PRESET
  # TSan's tests start no program; ASan's do.
  if [[ $1 == tsan ]]; then
    check "$1: build" build_tests "$1" || return
  else
    check "$1: build" configure_and_build "$1" || return
  fi
  rm -f "$logs/$1"-report.*
  run_ctest "$1"
  # Not with tsan: the packaged gRPC is not instrumented, so each of its hand-overs looks like a race.
  if [[ $1 == asan && ($tier == nightly || -n $only) ]]; then
    run_pytest "$1 integration" "build/$1/bin" tests/integration
  fi
  check "$1: nothing reported" no_reports "$1"
}

part_asan() {
  local -x ASAN_OPTIONS="log_path=$logs/asan-report:detect_stack_use_after_return=1"
  local -x UBSAN_OPTIONS="log_path=$logs/asan-report:print_stacktrace=1"
  local -x CLUSTERKV_TEST_SLOWDOWN=4
  sanitized asan
}

part_tsan() {
  local -x TSAN_OPTIONS="log_path=$logs/tsan-report:suppressions=$PWD/tests/sanitizers/tsan.supp"
  local -x CLUSTERKV_TEST_SLOWDOWN=10
  # With random addresses, more bits of them than g++ 12's runtime knows of end the program.
  setarch -R true 2>/dev/null && exact_addresses=(setarch -R)
  sanitized tsan
  exact_addresses=(env)
}

format_is_kept() {
  git ls-files -z '*.c' '*.cc' '*.h' '*.cu' '*.cuh' | xargs -0 clang-format --dry-run --Werror
}

# All files, or those that differ from the branch's start where that is known.
tidy_files() {
  local all=(gpu/*.cc gpu/*/*.cc service/*.cc service/*/*.cc client/*.cc client/*/*.cc)
  local base changed
  if [[ $tier == commit && -z $only ]]; then
    base=$(git merge-base HEAD origin/main 2>/dev/null) || base=
    [[ -n $base && $base != "$(git rev-parse HEAD)" ]] || base=HEAD~1
    if changed=$(git diff --name-only "$base" -- gpu service client 2>/dev/null); then
      # Of a changed header the file of the same name; the others wait for the night.
      mapfile -t all < <(printf '%s\n' "$changed" | sed 's/\.h$/.cc/' | sort -u)
    fi
  fi
  local file
  for file in "${all[@]}"; do
    # The release build, whose commands clang-tidy uses, has no cuda backend.
    [[ $file != *.cc || ! -f $file || $file == gpu/cuda/* ]] || echo "$file"
  done
}

tidy_is_silent() {
  local files=()
  mapfile -t files < <(tidy_files)
  if ((${#files[@]} == 0)); then
    echo "no file to look at has changed" >&2
    return 0
  fi
  # Of the list each is a pattern for the end of a path.
  run-clang-tidy -quiet -j "$(nproc)" -p build/release "${files[@]/%/\$}" \
    >"$logs/tidy.log" 2>"$logs/tidy-errors.log" ||
    { grep -E -A6 'error:|warning:' "$logs/tidy.log" "$logs/tidy-errors.log" >&2; return 1; }
}

part_lint() {
  check "lint: clang-format" format_is_kept
  check "lint: what clang-tidy needs" configure_and_build release \
    --target clusterkv_proto clusterkv_kubelet_proto &&
    check "lint: clang-tidy" tidy_is_silent
}

tier=commit
only=
while (($#)); do
  case $1 in
    --tier) tier=${2-} ; shift ;;
    --only) only=${2-} ; shift ;;
    -h | --help) sed -n '2,10s/^# \{0,1\}//p' "$0"; exit 0 ;;
    *) echo "tests/run.sh: '$1' is no option; see --help" >&2; exit 2 ;;
  esac
  shift || break
done
[[ $tier == commit || $tier == nightly ]] || { echo "--tier: commit or nightly" >&2; exit 2; }

exact_addresses=(env)
mkdir -p "$logs"
check "packages" deploy/install-packages.sh --tests || finish
check "python packages" make_venv || finish
read -r -a parts <<<"${only//,/ }"
((${#parts[@]})) || parts=(release python deploy cuda asan tsan lint)
for part in "${parts[@]}"; do
  if declare -F "part_$part" >/dev/null; then
    "part_$part"
  else
    echo "--only: there is no part '$part'" >&2
    count "$part" 0 1 0
  fi
done
finish
