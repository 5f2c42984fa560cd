#!/usr/bin/env bash
# A daemon, a load and a Prometheus on this machine for some minutes; then plots of what the
# dashboards of deploy/grafana show, and a screenshot of the admin page if chromium is installed.
#
#   deploy/observe-demo.sh [--minutes 5] [--out build/observe]
#
# Installs what it needs (deploy/install-packages.sh --tests; matplotlib into build/observe-venv) and
# builds preset release. Listens on loopback alone, and leaves nothing behind but the plots.
set -euo pipefail
cd "$(dirname "$0")/.."

minutes=5
out=build/observe
while (($#)); do
  case $1 in
    --minutes) minutes=${2-} ; shift ;;
    --out) out=${2-} ; shift ;;
    -h | --help) sed -n '2,8s/^# \{0,1\}//p' "$0"; exit 0 ;;
    *) echo "observe-demo: '$1' is no option; see --help" >&2; exit 2 ;;
  esac
  shift || break
done

deploy/install-packages.sh --tests
cmake --preset release >/dev/null
cmake --build --preset release --parallel "$(deploy/build-jobs.sh)" --target clusterkvd clusterkv-replay
venv=build/observe-venv
if ! cmp -s deploy/observe/requirements.txt "$venv/requirements.txt"; then
  rm -rf "$venv"
  python3 -m venv "$venv"
  "$venv/bin/pip" install --quiet --disable-pip-version-check -r deploy/observe/requirements.txt
  cp deploy/observe/requirements.txt "$venv/requirements.txt"
fi
exec env PYTHONDONTWRITEBYTECODE=1 "$venv/bin/python" deploy/observe/demo.py --minutes "$minutes" \
  --out "$out"
