#!/usr/bin/env bash
# Provides QEMU and the guest's kernel from the distribution: installs QEMU, lays the kernel's package into build/vm/packages.
# QEMU's SR-IOV NIC wants QEMU 8 or later; where the release has an older one, both come from the release's backports, from
# the mirror that this machine's apt is set up for. apt learns of that suite for these calls alone: its set-up stays as it is.
# Quick when nothing is missing. Called by lab/provision.sh vm.
set -euo pipefail
cd -P "$(dirname "$0")/../.."
folder=build/vm/packages
wanted=1:8 # QEMU's version with Debian's epoch

installed() { dpkg-query -W -f '${db:Status-Status} ${Version}' qemu-system-x86 2>/dev/null | sed -n 's/^installed //p'; }
enough() { [ -n "$1" ] && dpkg --compare-versions "$1" ge "$wanted"; }
[ "$(dpkg --print-architecture)" = amd64 ] || { echo "packages.sh: the virtual machine is an x86-64 one, as is its kernel" >&2; exit 1; }
if enough "$(installed)" && compgen -G "$folder/linux-image-*.deb" >/dev/null; then exit 0; fi
[ "$(id -u)" = 0 ] || { echo "packages.sh: only root can install qemu-system-x86 $wanted or later" >&2; exit 1; }

export DEBIAN_FRONTEND=noninteractive
apt=()
apt-get update -qq
# What would be installed on a machine that has nothing yet: what this one has tells nothing about its release's kernel.
if ! enough "$(apt-cache -o Dir::State::status=/dev/null policy qemu-system-x86 | sed -n 's/^ *Candidate: //p')"; then
  release=$(. /etc/os-release && echo "$VERSION_CODENAME")
  mirror=$(apt-get indextargets --format '$(REPO_URI)' "Created-By: Packages" "Codename: $release" "Component: main" | head -n 1)
  [ -n "$mirror" ] || { echo "packages.sh: apt is set up without the main component of $release, so not for its backports either" >&2; exit 1; }
  sources=$PWD/build/vm/sources
  rm -rf "$sources"
  mkdir -p "$sources"
  find /etc/apt/sources.list.d -type f \( -name '*.list' -o -name '*.sources' \) -exec cp -t "$sources" {} +
  echo "deb [signed-by=/usr/share/keyrings/debian-archive-keyring.gpg] $mirror $release-backports main" >"$sources/backports.list"
  apt=(-o "Dir::Etc::SourceParts=$sources" -t "$release-backports")
  apt-get "${apt[@]}" update -qq
fi
if ! enough "$(installed)"; then
  echo "Installing Debian packages: qemu-system-x86"
  apt-get "${apt[@]}" install -y -qq --no-install-recommends qemu-system-x86 >/dev/null
fi
# The package with the kernel in it is the one that the package without a version depends on.
version=$(apt-cache "${apt[@]}" show --no-all-versions linux-image-amd64 | sed -n 's/^Depends: \(linux-image-[^ ,]*\).*/\1/p')
echo "Fetching Debian package: $version"
rm -rf "$folder" "$folder.tmp"
mkdir -p "$folder.tmp"
(cd "$folder.tmp" && apt-get "${apt[@]}" -o APT::Sandbox::User=root download -qq "$version")
mv "$folder.tmp" "$folder"
