#!/usr/bin/env bash
# Installs a build into a temporary prefix, builds a stranger's project against it and runs that.
#
#   tests/consumer/run.sh [BUILD_DIRECTORY]     default: build/release
set -euo pipefail
cd "$(dirname "$0")/../.."

build=${1:-build/release}
if [[ ! -f $build/CMakeCache.txt ]]; then
  echo "consumer: $build is no build directory" >&2
  exit 2
fi
scratch=$(mktemp -d)
trap 'rm -rf "$scratch"' EXIT

cmake --install "$build" --prefix "$scratch/prefix" >"$scratch/install.log" ||
  { cat "$scratch/install.log"; exit 1; }
for file in bin/clusterkvd bin/clusterkvctl bin/clusterkv-replay \
            include/clusterkv/client/client.h include/clusterkv/gpu/device.h \
            share/clusterkv/proto/clusterkv/v1/clusterkv.proto; do
  [[ -e $scratch/prefix/$file ]] || { echo "consumer: $file is not installed" >&2; exit 1; }
done

# Moved, so that a path of the build tree in the package would show.
mv "$scratch/prefix" "$scratch/moved"
if grep -rlF -e "$PWD" "$scratch/moved/lib" --include='*.cmake'; then
  echo "consumer: the package names the source tree" >&2
  exit 1
fi
cmake -S tests/consumer -B "$scratch/build" -G Ninja -DCMAKE_BUILD_TYPE=Release \
      -DCMAKE_PREFIX_PATH="$scratch/moved" >"$scratch/configure.log" ||
  { cat "$scratch/configure.log"; exit 1; }
cmake --build "$scratch/build"
"$scratch/build/consumer" "unix:$scratch/nobody.sock"
