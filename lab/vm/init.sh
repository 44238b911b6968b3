#!/bin/busybox sh
# First process of the guest, in the initramfs: lays a tmpfs over the host's file system, and goes on there in guest.sh.
# What it says is in the machine's console log; without a word from guest.sh the host tells that log's end.
/bin/busybox mkdir -p /proc /sys /dev /host /layer /root
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

# The host's files do not change under a test that matters, so the guest may keep what it has read once. 500 kB is what one
# request of virtio-9p can carry.
share=trans=virtio,version=9p2000.L,msize=512000,access=any
mount -t 9p -o "ro,cache=loose,$share" host /host || fail "the host's file system is not there"
mount -t tmpfs -o size=75%,mode=755 layer /layer && mkdir /layer/upper /layer/work || fail "no tmpfs"
mount -t overlay -o lowerdir=/host,upperdir=/layer/upper,workdir=/layer/work overlay /root || fail "no overlay"
mount --move /proc /root/proc && mount --move /sys /root/sys && mount --move /dev /root/dev || fail "no /dev"
mount -t tmpfs -o mode=755 run /root/run && mount -t tmpfs -o mode=1777 tmp /root/tmp || fail "no /run"
mkdir /root/run/vm
mount -t 9p -o "rw,cache=none,$share" run /root/run/vm || fail "no folder of this run"
. /root/run/vm/settings
exec switch_root /root /bin/sh "$GUEST"
