#!/usr/bin/env bash
# What the Dockerfile runs: builds a preset's bundle and makes the image's root file system of it.
#
#   deploy/images/build-root.sh release|cuda OUT
set -euo pipefail

if (($# != 2)); then
  sed -n '2,4s/^# \{0,1\}//p' "$0" >&2
  exit 2
fi
preset=$1
out=$2
cd "$(dirname "$0")/../.."

cmake --preset "$preset" -DCLUSTERKV_BUILD_TESTS=OFF
cmake --build --preset "$preset" --parallel "$(deploy/build-jobs.sh)" --target bundle
deploy/images/assemble-root.sh "build/$preset/bundle" "$out"
