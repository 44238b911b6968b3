#!/bin/busybox sh
# First process of the guest, in the initramfs: lays a tmpfs over the host's file system, does what a distribution's start
# would do, and goes on in guest.sh. All by the static busybox in memory: each program of the distribution's costs a tenth
# of a second here. What it says is in the machine's console log, whose end the host tells if it hears of no exit status.
/bin/busybox mkdir -p /proc /sys /dev /host /layer /root /lib/modules
/bin/busybox --install -s /bin
export PATH=/bin
mount -t devtmpfs dev /dev
fail() {
  echo "vm: $*" >/dev/console
  poweroff -f
}
mount -t proc proc /proc && mount -t sysfs sys /sys || fail "no /proc or /sys"
while read -r module; do
  insmod "/modules/$module" || fail "module $module does not load"
done </modules/order

# The host's files do not change under a test that matters, so the guest may keep what it has read once. 500 kB is what
# one request of virtio-9p can carry.
share=trans=virtio,version=9p2000.L,msize=512000,access=any
mount -t 9p -o "ro,cache=loose,$share" host /host || fail "the host's file system is not there"
mount -t tmpfs -o size=75%,mode=755 layer /layer && mkdir /layer/upper /layer/work || fail "no tmpfs"
mount -t overlay -o lowerdir=/host,upperdir=/layer/upper,workdir=/layer/work overlay /root || fail "no overlay"
mount -t tmpfs -o mode=755 run /root/run && mount -t tmpfs -o mode=1777 tmp /root/tmp || fail "no /run or /tmp"
mkdir -p /root/run/vm /root/run/lock /root/run/netns
mount -t 9p -o "rw,cache=none,$share" run /root/run/vm || fail "no folder of this run"
. /root/run/vm/settings # REPOSITORY, MODULES, NICS, SECONDS_LEFT, WRITE
case $REPOSITORY in
  /tmp/* | /run/*) # hidden by now
    mkdir -p "/root$REPOSITORY" /layer/upper-repository /layer/work-repository
    layers=lowerdir=/host$REPOSITORY,upperdir=/layer/upper-repository,workdir=/layer/work-repository
    mount -t overlay -o "$layers" overlay "/root$REPOSITORY" || fail "no repository"
    ;;
esac
(
  # The host ends the machine at its deadline; this is for when that end of it is gone.
  sleep "$SECONDS_LEFT"
  fail "out of time"
) &
for folder in $WRITE; do # TAG=PATH
  mkdir -p "/root${folder#*=}"
  mount -t 9p -o "rw,cache=none,$share" "${folder%%=*}" "/root${folder#*=}" || fail "${folder#*=} cannot be written to"
done

read -r release </proc/sys/kernel/osrelease
mkdir -p "/root/lib/modules/$release" /dev/pts /dev/shm /dev/virtio-ports "/lib/modules/$release"
mount --bind "/host$MODULES" "/root/lib/modules/$release" && mount --bind "/host$MODULES" "/lib/modules/$release" ||
  fail "no modules"
mount -t devpts -o mode=620,ptmxmode=666 devpts /dev/pts
mount -t tmpfs shm /dev/shm
ln -s /proc/self/fd /dev/fd
mount -t cgroup2 cgroup /sys/fs/cgroup || fail "no cgroup v2"
mount -t bpf bpf /sys/fs/bpf || fail "no BPF file system"
mount -t tracefs tracing /sys/kernel/tracing
for name in /sys/class/virtio-ports/*/name; do
  read -r port <"$name"
  name=${name%/name}
  ln -s "/dev/${name##*/}" "/dev/virtio-ports/$port"
done

hostname vm
ip link set lo up
modprobe -a virtio_net igb igbvf || fail "no drivers for the NICs"
for link in /sys/class/net/*; do
  read -r mac <"$link/address"
  for nic in $NICS; do # MAC=NAME
    [ "$mac" != "${nic%%=*}" ] || ip link set "${link##*/}" name "${nic#*=}" || fail "no ${nic#*=}"
  done
done

umount "/lib/modules/$release"
mount --move /proc /root/proc && mount --move /sys /root/sys && mount --move /dev /root/dev || fail "no /dev"
exec switch_root /root /bin/busybox sh "$REPOSITORY/lab/vm/guest.sh"
