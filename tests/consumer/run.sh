#!/usr/bin/env bash
# Installs a build into a temporary prefix, builds strangers' projects against it, in C++ and in C,
# and runs those.
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
            include/clusterkv/clusterkv.h lib/libclusterkv.so lib/pkgconfig/clusterkv.pc \
            share/clusterkv/proto/clusterkv/v1/clusterkv.proto; do
  [[ -e $scratch/prefix/$file ]] || { echo "consumer: $file is not installed" >&2; exit 1; }
done

# Moved, so that a path of the build tree in the package would show.
mv "$scratch/prefix" "$scratch/moved"
if grep -rlF -e "$PWD" "$scratch/moved/lib" --include='*.cmake' --include='*.pc'; then
  echo "consumer: the package names the source tree" >&2
  exit 1
fi
build_project() {  # SOURCE BUILD
  cmake -S "$1" -B "$2" -G Ninja -DCMAKE_BUILD_TYPE=Release \
        -DCMAKE_PREFIX_PATH="$scratch/moved" >"$scratch/configure.log" ||
    { cat "$scratch/configure.log"; exit 1; }
  cmake --build "$2"
}
build_project tests/consumer "$scratch/build"
"$scratch/build/consumer" "unix:$scratch/nobody.sock"
build_project tests/consumer/c "$scratch/c-build"
"$scratch/c-build/c_consumer" "unix:$scratch/nobody.sock"

# By pkg-config, as a Makefile would.
export PKG_CONFIG_PATH=$scratch/moved/lib/pkgconfig
read -r -a flags < <(pkg-config --cflags --libs clusterkv)
cc -std=c11 -Wall -Wextra -pedantic -Werror tests/consumer/c/consumer.c \
   -o "$scratch/by_pkg_config" "${flags[@]}"
LD_LIBRARY_PATH=$(pkg-config --variable=libdir clusterkv) \
  "$scratch/by_pkg_config" "unix:$scratch/nobody.sock"
