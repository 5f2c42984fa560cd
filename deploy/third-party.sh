#!/usr/bin/env bash
# For libraries copied from this Debian: the copyright file of each one's package to DOC/PACKAGE/, and
# what dpkg knows of it to STATUS/PACKAGE, which is where scanners for known weaknesses look in images
# without dpkg. An empty STATUS leaves that out. A library of no package is an error.
#
#   deploy/third-party.sh DOC STATUS LIBRARY...
set -euo pipefail

if (($# < 3)); then
  sed -n '2,6s/^# \{0,1\}//p' "$0" >&2
  exit 2
fi
doc=$1
status=$2
shift 2

mkdir -p "$doc" ${status:+"$status"}
# dpkg may know either path of a file, /lib being a link; it also fails for what it does not find.
paths=()
for library in "$@"; do
  name=$(basename "$library")
  paths+=("/usr/lib/x86_64-linux-gnu/$name" "/lib/x86_64-linux-gnu/$name")
done
found=$(dpkg-query --search "${paths[@]}" 2>/dev/null || true)
for library in "$@"; do
  name=$(basename "$library")
  package=$(awk -F': ' -v name="/$name" \
    'substr($2, length($2) - length(name) + 1) == name {print $1; exit}' <<<"$found")
  [[ -n $package ]] || { echo "third-party: $name is of no package" >&2; exit 1; }
  package=${package%%:*}
  [[ ! -e $doc/$package ]] || continue
  mkdir "$doc/$package"
  cp -L "/usr/share/doc/$package/copyright" "$doc/$package/copyright"
  [[ -z $status ]] || dpkg-query --status "$package" >"$status/$package"
done
