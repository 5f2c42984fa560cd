#!/usr/bin/env bash
# Everything that needs a GPU, in parts of a few minutes each.
#
#   tests/gpu.sh [--bin DIR] [--tests DIR] [--out DIR] PART...
#
# Parts: conformance sanitizer property replay litmus kill bench beside decode; without one, all.
# Programs: preset cuda's build, or a tree of deploy/bundle.sh. Each part leaves PART.json and
# PART.log in --out (build/gpu); at the end all parts there are merged into gpu.json, which a later
# call with other parts extends. Exit 1 if a part failed.
set -uo pipefail
cd "$(dirname "$0")/.." || exit 2

bin=build/cuda/bin
tests=build/cuda/tests
out=build/gpu
trace=tests/traces/smollm2-135m-moby-dick.safetensors
parts=()
while (($#)); do
  case $1 in
    --bin) bin=${2-} ; shift ;;
    --tests) tests=${2-} ; shift ;;
    --out) out=${2-} ; shift ;;
    -h | --help) sed -n '2,11s/^# \{0,1\}//p' "$0"; exit 0 ;;
    -*) echo "tests/gpu.sh: '$1' is no option; see --help" >&2; exit 2 ;;
    *) parts+=("$1") ;;
  esac
  shift
done
((${#parts[@]})) || parts=(conformance sanitizer property replay litmus kill bench beside decode)
mkdir -p "$out" || exit 2
export CLUSTERKV_REQUIRE_CUDA=1 CLUSTERKV_TEST_CLUSTERKVD=$PWD/$bin/clusterkvd
[[ $bin == /* ]] && CLUSTERKV_TEST_CLUSTERKVD=$bin/clusterkvd
# Of a bundle, whose test programs know no library path.
[[ -d $tests/../lib ]] && export LD_LIBRARY_PATH=$tests/../lib
failed=()

# A GoogleTest program; its own report is the part's JSON.
gtest() {  # NAME PROGRAM OPTION...
  local name=$1 program=$2
  shift 2
  timeout 400 "$tests/$program" --gtest_brief=1 --gtest_output="json:$out/$name.json" "$@"
}

part_conformance() {
  gtest conformance-device cuda_device_test && gtest conformance cuda_conformance_test &&
    gtest conformance-graph cuda_graph_test && "$tests/c_graph_test" &&
    "$tests/kmeans_kernel_benchmark" --check
}

# The small cases: sanitizers slow kernels down by tens of times.
part_sanitizer() {
  local filter='*LeastWorth*:*Damaged*:*Stale*:*Batched*:*Publish*:*64x3*:*96x4bf*:*256x16fp*'
  compute-sanitizer --error-exitcode 9 --tool memcheck \
    "$tests/cuda_conformance_test" --gtest_brief=1 --gtest_filter="$filter" &&
    compute-sanitizer --error-exitcode 9 --tool racecheck \
      "$tests/cuda_conformance_test" --gtest_brief=1 \
      --gtest_filter='*SameSteps*:*Batched*:*64x3bf16:*96x4bf16:*256x16fp16' &&
    compute-sanitizer --error-exitcode 9 --tool memcheck "$tests/kmeans_kernel_benchmark" --paths
}

part_property() {
  CLUSTERKV_TEST_BACKEND=cuda CLUSTERKV_TEST_HISTORIES=${CLUSTERKV_TEST_HISTORIES:-60} \
    gtest property property_test
}

# Worker and daemon in two processes; the host backend's figures to 0.01, and an outsider's numbers.
part_replay() {
  local mode backend sharing
  for backend in host cuda; do
    sharing=vmm  # the host backend has no other
    [[ $backend == host ]] || sharing=${CLUSTERKV_GPU_SHARING:-vmm}
    for mode in direct served; do
      CLUSTERKV_GPU_SHARING=$sharing "$bin/clusterkv-replay" "$trace" --backend $backend --mode $mode --format json \
        --dump-outputs "$out/$backend-$mode.safetensors" >"$out/replay-$backend-$mode.json" ||
        return 1
    done
  done
  for mode in direct served; do
    python3 tests/reference/check_replay.py "$trace" "$out/replay-cuda-$mode.json" \
      --outputs "$out/cuda-$mode.safetensors" || return 1
    python3 tests/reference/compare_replays.py "$out/replay-host-$mode.json" \
      "$out/replay-cuda-$mode.json" --tolerance 0.01 || return 1
  done
  python3 tests/compare_dumps.py "$out/cuda-direct.safetensors" "$out/cuda-served.safetensors" &&
    cp "$out/replay-cuda-direct.json" "$out/replay.json"
}

with_mps() {  # COMMAND...
  local pipe log code
  pipe=$(mktemp -d) && log=$(mktemp -d)
  PATH=$PATH:/usr/local/nvidia/bin
  command -v nvidia-cuda-mps-control >/dev/null || { echo "no MPS here" >&2; return 1; }
  export CUDA_MPS_PIPE_DIRECTORY=$pipe CUDA_MPS_LOG_DIRECTORY=$log
  nvidia-cuda-mps-control -d && sleep 1
  "$@"
  code=$?
  echo quit | nvidia-cuda-mps-control
  unset CUDA_MPS_PIPE_DIRECTORY CUDA_MPS_LOG_DIRECTORY
  return $code
}

part_litmus() {
  timeout 300 "$tests/latch_litmus" 100000 >"$out/litmus.json" &&
    with_mps timeout 120 "$tests/latch_litmus" 100000 >"$out/litmus-mps.json"
}

part_kill() { timeout 300 python3 tests/gpu/kill_test.py --bin "$bin" >"$out/kill.json"; }

part_bench() {
  timeout 400 "$bin/clusterkv-bench" --format json \
    --ops hbm-copy,h2d,d2h,gather,kmeans,permute-offload,select,fetch,attend,step,served \
    >"$out/bench.json" &&
    with_mps timeout 120 "$bin/clusterkv-bench" --format json --ops served >"$out/bench-mps.json"
}

part_beside() {
  timeout 200 python3 tests/gpu/step_beside.py --bin "$bin" >"$out/beside.json" &&
    with_mps timeout 200 python3 tests/gpu/step_beside.py --bin "$bin" >"$out/beside-mps.json"
}

# Beside it, where it is installed, FlashInfer's attention over full KV.
part_decode() {
  timeout 400 "$bin/clusterkv-bench" --format json --ops decode >"$out/decode.json" || return 1
  timeout 75 python3 tests/gpu/flashinfer_decode.py >"$out/flashinfer.json"
  local code=$?
  ((code == 3)) && rm "$out/flashinfer.json"
  ((code == 0 || code == 3))
}

for part in "${parts[@]}"; do
  if ! declare -F "part_$part" >/dev/null; then
    echo "there is no part '$part'; see --help" >&2
    exit 2
  fi
  start=$SECONDS
  if "part_$part" > >(tee "$out/$part.log") 2>&1; then
    echo "$part: ok, $((SECONDS - start)) s"
  else
    failed+=("$part")
    echo "$part: FAILED, $((SECONDS - start)) s"
  fi
done
python3 - "$out" <<'PYTHON'
import json, pathlib, sys
out = pathlib.Path(sys.argv[1])
merged = {}
for file in sorted(out.glob("*.json")):
    if file.name != "gpu.json":
        try:
            merged[file.stem] = json.loads(file.read_text())
        except ValueError as error:
            merged[file.stem] = {"unreadable": str(error)}
(out / "gpu.json").write_text(json.dumps(merged, indent=1))
PYTHON
((${#failed[@]} == 0))
