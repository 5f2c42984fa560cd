#!/usr/bin/env bash
# Prints the project's version.
set -euo pipefail
sed -n 's/^project(clusterkv VERSION \([0-9.]*\).*/\1/p' "$(dirname "$0")/../CMakeLists.txt"
