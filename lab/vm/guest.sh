#!/bin/sh
# First process of the guest once its root is the host's under a tmpfs: what a distribution's start would do, then the command.
# /run/vm is the folder of this run on the host: `settings` and `command` are read, /dev/virtio-ports/control is told the end.
. /run/vm/settings # SECONDS_LEFT, MODULES, NICS, WRITE
export PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin HOME=/root LANG=C.UTF-8 TERM=dumb
fail() {
  echo "vm: $*" >/dev/console
  end
}
end() {
  echo o >/proc/sysrq-trigger
  sleep 60
}
# Also when the host's end of this machine is gone.
(sleep "$SECONDS_LEFT"; fail "out of time") &

mkdir -p /dev/pts /dev/shm /dev/virtio-ports /run/lock /run/netns "/lib/modules/$(uname -r)"
mount -t devpts -o mode=620,ptmxmode=666 devpts /dev/pts
mount -t tmpfs shm /dev/shm
mount -t cgroup2 cgroup /sys/fs/cgroup || fail "no cgroup v2"
mount -t bpf bpf /sys/fs/bpf || fail "no BPF file system"
mount -t tracefs tracing /sys/kernel/tracing
mount --bind "$MODULES" "/lib/modules/$(uname -r)" || fail "no modules"
ln -sf /proc/self/fd /dev/fd
for name in /sys/class/virtio-ports/*/name; do
  ln -s "/dev/$(basename "$(dirname "$name")")" "/dev/virtio-ports/$(cat "$name")"
done
for folder in $WRITE; do # TAG=PATH
  mkdir -p "${folder#*=}"
  mount -t 9p -o trans=virtio,version=9p2000.L,msize=512000,access=any,rw,cache=none "${folder%%=*}" "${folder#*=}" ||
    fail "${folder#*=} cannot be written to"
done

hostname vm
ip link set lo up
modprobe -a virtio_net igb igbvf || fail "no drivers for the NICs"
for nic in $NICS; do # MAC=NAME
  for link in /sys/class/net/*; do
    [ "$(cat "$link/address")" != "${nic%%=*}" ] || ip link set "${link##*/}" name "${nic#*=}" || fail "no ${nic#*=}"
  done
done

/bin/sh /run/vm/command </dev/null >/dev/virtio-ports/output 2>&1
echo "exit $?" >/dev/virtio-ports/control
end
