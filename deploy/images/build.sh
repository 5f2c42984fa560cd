#!/usr/bin/env bash
# Builds a container image of this checkout: clusterkv:VERSION-cpu or clusterkv:VERSION-cuda.
#
#   deploy/images/build.sh cpu|cuda [OPTION OF docker build...]
set -euo pipefail

case ${1-} in
  cpu | cuda) variant=$1 ;;
  *)
    sed -n '2,4s/^# \{0,1\}//p' "$0" >&2
    exit 2
    ;;
esac
shift
cd "$(dirname "$0")/../.."

version=$(deploy/version.sh)
# Of the commit, so that the same commit gives the same image.
epoch=$(git log -1 --format=%ct)
exec docker build --file deploy/images/Dockerfile --target "$variant" \
  --build-arg "VERSION=$version" \
  --build-arg "REVISION=$(git rev-parse HEAD)" \
  --build-arg "CREATED=$(date --utc --date="@$epoch" +%Y-%m-%dT%H:%M:%SZ)" \
  --build-arg "SOURCE_DATE_EPOCH=$epoch" \
  --tag "clusterkv:$version-$variant" "$@" .
