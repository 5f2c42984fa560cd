#!/usr/bin/env bash
# Lays out what was built as a tree that runs on another Linux of the same or a later glibc (2.36):
# bin/ with the programs, tests/ with the test programs, lib/ with the shared libraries they need,
# found by $ORIGIN. glibc itself and the GPU's driver stay the machine's own.
#
#   deploy/bundle.sh BUILD_DIRECTORY OUT [TEST...]
set -euo pipefail

if (($# < 2)); then
  sed -n '2,7s/^# \{0,1\}//p' "$0" >&2
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
for program in "${programs[@]}"; do
  ldd "$program" | awk '$3 ~ /^\// {print $3}'
done | sort -u |
  grep -v -E '/(libc|libm|libdl|libpthread|librt|libresolv|ld-linux-x86-64)\.so' |
  while read -r library; do install -m 644 "$(realpath "$library")" "$out/lib/$(basename "$library")"; done
find "$out" -type f -exec strip --strip-unneeded {} + 2>/dev/null || true
du -sh "$out" >&2
