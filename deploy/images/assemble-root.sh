#!/usr/bin/env bash
# Lays out the root file system of a container image from a bundle (deploy/bundle.sh): the programs and
# their libraries, glibc, a few files in /etc, and what scanners read. No shell, no package manager.
# The image is this tree and nothing else, so that it can be tried without a container engine
# (tests/deploy). Runs on the Debian that the bundle was made on.
#
#   deploy/images/assemble-root.sh BUNDLE OUT
set -euo pipefail

if (($# != 2)); then
  sed -n '2,8s/^# \{0,1\}//p' "$0" >&2
  exit 2
fi
bundle=$1
out=$2
here=$(dirname "$(readlink -f "$0")")
readonly libraries=usr/lib/x86_64-linux-gnu
# Its own, so that no worker has it: a process with the daemon's uid could write the KV of others.
readonly user=39464

fail() { echo "assemble-root: $*" >&2; exit 1; }

[[ -x $bundle/bin/clusterkvd ]] || fail "$bundle is no bundle: it has no bin/clusterkvd"
[[ ! -e $out ]] || fail "$out is there already"

# glibc by its own loader's choice; the stubs libdl, libpthread and librt are what GPU drivers link.
glibc=(ld-linux-x86-64.so.2 libc.so.6 libm.so.6 libdl.so.2 libpthread.so.0 librt.so.1 libresolv.so.2)

copy_programs() {
  mkdir -p "$out/opt/clusterkv/share"
  cp -a "$bundle/bin" "$bundle/lib" "$out/opt/clusterkv/"
  rm -f "$out"/opt/clusterkv/lib/libclusterkv.so*  # for who builds, not for who runs
  install -m 644 "$here/../../LICENSE" "$out/opt/clusterkv/"
  # What the sample worker replays.
  install -m 644 "$here/../../tests/traces/smollm2-135m-moby-dick.safetensors" \
    "$out/opt/clusterkv/share/sample.safetensors"
}

copy_glibc() {
  local name
  mkdir -p "$out/$libraries" "$out/usr/lib64" "$out/usr/bin"
  # As in Debian: /lib64 has the loader, and libraries lie where a driver's are mounted beside them.
  ln -s usr/lib "$out/lib"
  ln -s usr/lib64 "$out/lib64"
  ln -s usr/bin "$out/bin"
  for name in "${glibc[@]}"; do
    install -m 755 "$(readlink -f "/$libraries/$name")" "$out/$libraries/$name"
  done
  ln -s "../lib/x86_64-linux-gnu/ld-linux-x86-64.so.2" "$out/usr/lib64/ld-linux-x86-64.so.2"
}

write_etc() {
  mkdir -p "$out"/{etc/ld.so.conf.d,dev,proc,sys,tmp,run/clusterkv,var/lib/kubelet/device-plugins}
  chmod 1777 "$out/tmp"
  cat >"$out/etc/passwd" <<END
root:x:0:0:root:/:/nonexistent
clusterkv:x:$user:$user:clusterkv:/tmp:/nonexistent
END
  cat >"$out/etc/group" <<END
root:x:0:
clusterkv:x:$user:
END
  echo "hosts: files dns" >"$out/etc/nsswitch.conf"
  # The GPU's container toolkit runs its own ldconfig here, and asks debian_version where libraries go.
  echo "include /etc/ld.so.conf.d/*.conf" >"$out/etc/ld.so.conf"
  echo "/$libraries" >"$out/etc/ld.so.conf.d/debian.conf"
  install -m 644 /etc/debian_version "$out/etc/debian_version"
  install -m 644 /usr/lib/os-release "$out/usr/lib/os-release"
  ln -s ../usr/lib/os-release "$out/etc/os-release"
  if ((EUID == 0)); then chown "$user:$user" "$out/run/clusterkv"; fi
  chmod 750 "$out/run/clusterkv"
}

# Every library by the loader's rules: beside the programs, or glibc.
nothing_is_missing() {
  local file needed missing=0
  while read -r file; do
    while read -r needed; do
      [[ -e $out/opt/clusterkv/lib/$needed || -e $out/$libraries/$needed ]] && continue
      echo "assemble-root: ${file#"$out"} needs $needed" >&2
      missing=1
    done < <(readelf -d "$file" | sed -n 's/.*(NEEDED).*\[\(.*\)\]/\1/p')
  done < <(find "$out/opt/clusterkv/bin" "$out/opt/clusterkv/lib" "$out/$libraries" -type f)
  ((missing == 0))
}

mkdir -p "$out"
copy_programs
copy_glibc
write_etc
"$here/../third-party.sh" "$out/usr/share/doc" "$out/var/lib/dpkg/status.d" \
  "$out"/opt/clusterkv/lib/* "$out/$libraries"/*
nothing_is_missing
if [[ -n ${SOURCE_DATE_EPOCH-} ]]; then
  find "$out" -exec touch --no-dereference --date="@$SOURCE_DATE_EPOCH" {} +
fi
du -sh "$out" >&2
