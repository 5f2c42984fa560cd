#!/usr/bin/env bash
# Prints how many compilers may run at once: all cores, but 1.5 GiB of memory for each.
set -euo pipefail

cores=$(nproc)
available_kib=$(awk '/^MemAvailable:/ {print $2}' /proc/meminfo)
by_memory=$((available_kib / (1536 * 1024)))
jobs=$((cores < by_memory ? cores : by_memory))
echo $((jobs > 0 ? jobs : 1))
