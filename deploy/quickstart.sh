#!/usr/bin/env bash
# From a checkout to a result: installs what is missing, builds, starts a daemon, replays a real
# model's KV against it, and stops it. Needs Debian 12; no PyPI. On the GPU if there is one and nvcc 13
# is on PATH, else on the host backend. Leaves only build/ behind.
set -euo pipefail
cd "$(dirname "$0")/.."

readonly trace=tests/traces/smollm2-135m-moby-dick.safetensors
preset=release
backend=host
readonly ready_seconds=60

note() { echo "quickstart: $*" >&2; }

build() {
  deploy/install-packages.sh
  if command -v nvidia-smi >/dev/null && nvidia-smi -L 2>/dev/null | grep -q GPU; then
    if command -v nvcc >/dev/null && nvcc --version | grep -q 'release 1[3-9]'; then
      preset=cuda
      backend=cuda
    else
      note "there is a GPU here, but no nvcc 13 on PATH: this builds and runs the host backend only"
    fi
  fi
  bin=build/$preset/bin
  note "building (minutes the first time)"
  if ! { cmake --preset $preset &&
         cmake --build --preset $preset --parallel "$(deploy/build-jobs.sh)" \
               --target clusterkvd clusterkvctl clusterkv-replay; } >"$scratch/build.log" 2>&1; then
    tail -n 40 "$scratch/build.log" >&2
    note "the build failed"
    return 1
  fi
}

clean_up() {
  if [[ -n ${daemon-} ]] && kill -0 "$daemon" 2>/dev/null; then
    kill -KILL "$daemon"
    wait "$daemon" || true
  fi 2>/dev/null
  rm -rf "$scratch" ${host_memory_dir:+"$host_memory_dir"}
}

start_daemon() {
  # Memory if it has the room.
  local room=0
  [[ -w /dev/shm ]] && room=$(df --output=avail -B1M /dev/shm | tail -n 1)
  if ((room > 1024)); then
    host_memory_dir=$(mktemp -d /dev/shm/clusterkv-quickstart-XXXXXX)
  else
    host_memory_dir=$scratch/memory
  fi
  "$bin/clusterkvd" --listen "unix:$scratch/clusterkvd.sock" --admin-listen 127.0.0.1:0 \
    --host-memory 512mb --host-memory-dir "$host_memory_dir" --backend $backend \
    >"$scratch/stdout" 2>"$scratch/log" &
  daemon=$!
  local deadline=$((SECONDS + ready_seconds))
  until grep -q '^READY ' "$scratch/stdout"; do
    if ! kill -0 "$daemon" 2>/dev/null || ((SECONDS > deadline)); then
      tail -n 20 "$scratch/log" >&2
      note "the daemon did not get ready"
      return 1
    fi
    sleep 0.1
  done
  note "$(cat "$scratch/stdout")"
}

stop_daemon() {
  kill -TERM "$daemon"
  local code=0
  wait "$daemon" || code=$?
  daemon=
  if ((code != 0)); then
    tail -n 20 "$scratch/log" >&2
    note "the daemon ended with $code"
    return 1
  fi
}

scratch=$(mktemp -d /tmp/clusterkv-quickstart-XXXXXX)  # short: a socket's path has a limit
trap clean_up EXIT
trap 'exit 130' INT
trap 'exit 143' TERM

build
start_daemon
"$bin/clusterkv-replay" "$trace" --connect "unix:$scratch/clusterkvd.sock"
echo
"$bin/clusterkvctl" --address "unix:$scratch/clusterkvd.sock" status
stop_daemon
