#!/usr/bin/env bash
# Packs a bundle (deploy/bundle.sh) as clusterkv-VERSION-linux-x86_64.tar.gz, with -cuda before the ending
# if its programs have that backend; beside it its SHA-256. What is in it runs from anywhere on a Linux
# of glibc 2.36 or later. The same bundle gives the same bytes. Prints the archive's path.
#
#   deploy/package.sh BUNDLE OUT_DIRECTORY
set -euo pipefail

if (($# != 2)); then
  sed -n '2,7s/^# \{0,1\}//p' "$0" >&2
  exit 2
fi
bundle=$1
mkdir -p "$2"
out=$(readlink -f "$2")
here=$(dirname "$(readlink -f "$0")")
[[ -x $bundle/bin/clusterkvd ]] || { echo "package: $bundle is no bundle" >&2; exit 2; }

# What the program says, not what the folder is called: without a GPU too it knows the backend, or not.
variant=
if grep -q cudaGetDriverEntryPoint "$bundle/bin/clusterkvd"; then variant=-cuda; fi
name=clusterkv-$("$here/version.sh")-linux-x86_64$variant

scratch=$(mktemp -d)
trap 'rm -rf "$scratch"' EXIT
tree=$scratch/$name
mkdir -p "$tree"/{doc,etc,systemd}
cp -a "$bundle/bin" "$bundle/lib" "$bundle/include" "$tree/"
install -m 644 "$here/../LICENSE" "$tree/"
install -m 644 "$here/systemd/clusterkvd.yaml" "$tree/etc/"
install -m 644 "$here/systemd/clusterkvd.service" "$here/systemd/clusterkv.sysusers" "$tree/systemd/"
install -m 644 "$here"/*.md "$tree/doc/"
mapfile -t libraries < <(find "$bundle/lib" -type f ! -name 'libclusterkv.so*')
"$here/third-party.sh" "$tree/doc/third-party" "" "${libraries[@]}"
(cd "$tree" && find . -type f -print0 | sort -z | xargs -0 sha256sum) >"$scratch/sums"
mv "$scratch/sums" "$tree/SHA256SUMS"

archive=$out/$name.tar.gz
tar --create --directory "$scratch" --sort=name --owner=0 --group=0 --numeric-owner \
  --mtime="@${SOURCE_DATE_EPOCH:-0}" --mode=go-w "$name" | gzip --no-name >"$archive"
(cd "$out" && sha256sum "$name.tar.gz" >"$name.tar.gz.sha256")
echo "$archive"
