#!/usr/bin/env bash
# Lays out what was built as a tree that runs on another Linux of the same or a later glibc (2.36):
# bin/ with the programs, tests/ with the test programs, lib/ with libclusterkv and the shared libraries
# that they need, found by $ORIGIN; include/ with its header. glibc and the GPU's driver stay the
# machine's own. The tests need LD_LIBRARY_PATH=OUT/lib.
#
#   deploy/bundle.sh BUILD_DIRECTORY OUT [TEST...]
set -euo pipefail

if (($# < 2)); then
  sed -n '2,9s/^# \{0,1\}//p' "$0" >&2
  exit 2
fi
build=$1
out=$2
shift 2
rm -rf "$out"
mkdir -p "$out/bin" "$out/lib"
programs=("$build"/bin/*)
install -m 755 "${programs[@]}" "$out/bin"
if (($#)); then
  mkdir -p "$out/tests"
  install -m 755 "${@/#/$build/tests/}" "$out/tests"
  programs+=("${@/#/$build/tests/}")
fi
library=$(find "$build" -name 'libclusterkv.so.[0-9]' -print -quit)
if [[ -n $library ]]; then
  install -m 755 "$(realpath "$library")" "$out/lib/$(basename "$library")"
  ln -s "$(basename "$library")" "$out/lib/libclusterkv.so"
  install -D -m 644 "$(dirname "$0")/../client/c/clusterkv.h" "$out/include/clusterkv/clusterkv.h"
  programs+=("$library")
fi
for program in "${programs[@]}"; do
  ldd "$program" | awk '$3 ~ /^\// {print $3}'
done | sort -u |
  grep -v -E '/(libc|libm|libdl|libpthread|librt|libresolv|ld-linux-x86-64)\.so' |
  while read -r library; do install -m 644 "$(realpath "$library")" "$out/lib/$(basename "$library")"; done
find "$out" -type f -exec strip --strip-unneeded {} + 2>/dev/null || true
du -sh "$out" >&2
