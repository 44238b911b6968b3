#!/usr/bin/env bash
# Installs what a machine needs to run or build Spiderpool, and says what it installs. Quick when nothing is missing.
#   provision.sh run   what the agent, the lab and the demo need
#   provision.sh dev   also what lint, tests and benchmarks need
#   provision.sh kube  also what Kubernetes nodes on this machine need
#   provision.sh vm    what `dev` says, and what virtual machines need
# Debian 12, or a later one or a derivative with the same package names; root, if packages are missing. The virtual
# environment is made over the distribution's interpreter, for the distribution's BCC is built for that one.
set -euo pipefail
cd -P "$(dirname "$0")/.."
role=${1:-run}
case $role in run | dev | kube | vm) ;; *) echo "provision.sh: unknown role '$role', it is run, dev, kube or vm" >&2; exit 2 ;; esac

packages=(
  python3 python3-venv     # the interpreter, and virtual environments over it
  python3-bpfcc            # BCC: compiles the eBPF programs when they are loaded
  linux-libc-dev           # the kernel's UAPI headers (no headers of the running kernel are needed)
  iproute2                 # ip: network namespaces of the lab
  containernetworking-plugins # macvlan and the other standard CNI plugins
  gcc musl-tools           # the static CNI executable
  make
  tcpdump                  # for looking at the lab's wire, as the demo's last lines propose
)
if [ "$role" != run ]; then
  packages+=(
    iptables               # a rival that the benchmarks measure
    libc6-dev              # small C programs of tests and benchmarks
    nftables procps strace # nft, sysctl and strace of the tests
    git                    # which C files to lint
  )
fi
if [ "$role" = kube ]; then
  packages+=(containerd runc busybox-static) # what a Kubernetes node runs pods with, and what is in them
  role=dev                 # and no other Python packages
fi
vm=
if [ "$role" = vm ]; then
  packages+=(busybox-static kmod) # the first steps of the guest; its modules
  role=dev vm=yes
fi
missing=()
for package in "${packages[@]}"; do
  [ "$(dpkg-query -W -f '${db:Status-Status}' "$package" 2>/dev/null)" = installed ] || missing+=("$package")
done
if [ ${#missing[@]} -gt 0 ]; then
  [ "$(id -u)" = 0 ] || { echo "provision.sh: only root can install the missing packages: ${missing[*]}" >&2; exit 1; }
  echo "Installing Debian packages: ${missing[*]}"
  export DEBIAN_FRONTEND=noninteractive
  apt-get update -qq
  apt-get install -y -qq --no-install-recommends "${missing[@]}" >/dev/null
fi
[ -z "$vm" ] || lab/vm/packages.sh

lock=requirements-$role.lock
venv=build/venv
stamp=$venv/.$role-$(sha256sum "$lock" pyproject.toml lab/provision.sh | sha256sum | cut -c1-16)
# An environment that was made for another interpreter, or elsewhere before the checkout moved, is of no use.
if [ ! -d "$venv/lib/$(basename "$(readlink -f /usr/bin/python3)")" ] || ! grep -qsF " $PWD/$venv" $venv/pyvenv.cfg; then
  rm -rf $venv
fi
if [ ! -e "$stamp" ]; then
  [ -x $venv/bin/python ] || /usr/bin/python3 -m venv --system-site-packages $venv
  echo "Installing Python packages into $venv from $lock"
  $venv/bin/python -m pip install --quiet --disable-pip-version-check --require-hashes --requirement "$lock"
  # The sources are used where they are, so that an edit counts at once.
  site=$($venv/bin/python -c 'import sysconfig; print(sysconfig.get_path("purelib"))')
  pwd >"$site/spiderpool-sources.pth"
  for entry in "spiderpool-agent agent" "spiderpool-controller controller" "spiderpoolctl cli" "spiderpool-lab lab"; do
    read -r name module <<<"$entry"
    printf '#!%s\nimport sys\nfrom %s.__main__ import main\n\nsys.exit(main())\n' "$PWD/$venv/bin/python" "$module" >"$venv/bin/$name"
    chmod 755 "$venv/bin/$name"
  done
  rm -f "$venv/.$role-"*
  touch "$stamp"
fi
