#!/usr/bin/env bash
# Installs the Debian 12 packages that a build needs, if any of them is missing.
#
#   deploy/install-packages.sh           to build and run
#   deploy/install-packages.sh --tests   also what tests/run.sh needs
#
# Root, or sudo. Touches no network when nothing is missing.
set -euo pipefail
cd "$(dirname "$0")/.."

packages=(
  # Tools.
  g++ cmake ninja-build pkgconf ccache
  # Protocol.
  libgrpc++-dev libprotobuf-dev protobuf-compiler protobuf-compiler-grpc libabsl-dev
  # Device layer, configuration, logs, metrics, health, memory policy.
  libhwy-dev libyaml-cpp-dev libfmt-dev libspdlog-dev nlohmann-json3-dev libcli11-dev
  prometheus-cpp-dev libcpp-httplib-dev libnuma-dev
  # The presets configure the tests too.
  libgtest-dev libgmock-dev
)
test_packages=(
  git clang-format clang-tidy python3 python3-venv iproute2 strace systemd
  # The admin port's page and the replay's report are looked at in a browser.
  chromium chromium-driver fonts-dejavu-core
)
# Another kubectl serves as well, and Debian's package clashes with it.
command -v kubectl >/dev/null || test_packages+=(kubernetes-client)
# Unpacked into build/tools, not installed: they would bring a service that starts with the machine.
unpacked_packages=(prometheus)

case ${1-} in
  "") unpacked_packages=() ;;
  --tests) packages+=("${test_packages[@]}") ;;
  *)
    echo "usage: deploy/install-packages.sh [--tests]" >&2
    exit 2
    ;;
esac

if ! command -v apt-get >/dev/null; then
  echo "install-packages: this is no Debian; it needs the likes of: ${packages[*]}" >&2
  exit 3
fi

missing=()
for package in "${packages[@]}"; do
  state=$(dpkg-query -W -f '${Status}' "$package" 2>/dev/null || true)
  [[ $state == "install ok installed" ]] || missing+=("$package")
done
to_unpack=()
for package in ${unpacked_packages[@]+"${unpacked_packages[@]}"}; do
  [[ -e build/tools/$package.unpacked ]] || to_unpack+=("$package")
done
((${#missing[@]} + ${#to_unpack[@]})) || exit 0

as_root=()
if ((EUID != 0)); then
  if ! command -v sudo >/dev/null; then
    echo "install-packages: not root and no sudo; install: ${missing[*]} ${to_unpack[*]-}" >&2
    exit 3
  fi
  as_root=(sudo)
fi
"${as_root[@]}" env DEBIAN_FRONTEND=noninteractive apt-get update -qq
if ((${#missing[@]})); then
  echo "installing ${missing[*]}" >&2
  "${as_root[@]}" env DEBIAN_FRONTEND=noninteractive \
    apt-get install -y -qq --no-install-recommends "${missing[@]}" >&2
fi
for package in ${to_unpack[@]+"${to_unpack[@]}"}; do
  echo "unpacking $package into build/tools" >&2
  mkdir -p build/tools/download
  (cd build/tools/download && rm -f ./*.deb && apt-get download -qq "$package" >&2)
  dpkg-deb -x build/tools/download/*.deb build/tools
  rm -r build/tools/download
  touch "build/tools/$package.unpacked"
done
