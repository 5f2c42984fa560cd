#!/usr/bin/env bash
# libclusterkv exports the functions that its header declares and nothing else, and needs no library
# of CUDA's.
#
#   exports_test.sh LIBRARY HEADER
set -euo pipefail

library=$1
header=$2
exported=$(nm -D --defined-only "$library" | awk '{print $3}' | sort)
# Of a declaration the first name that a parenthesis follows.
declared=$(grep -A1 '^CLUSTERKV_API' "$header" | grep -oE 'clusterkv_[a-z_]+\(' | tr -d '(' | sort)
if [[ $exported != "$declared" || -z $declared ]]; then
  echo "exported by $library (>) and declared in $header (<):" >&2
  diff <(echo "$declared") <(echo "$exported") >&2
  exit 1
fi
needed=$(readelf -d "$library" | grep -F '(NEEDED)')
if grep -iE 'cuda|nvidia|nvrtc|nccl' <<<"$needed"; then
  echo "these should be linked statically, or opened when they are needed" >&2
  exit 1
fi
