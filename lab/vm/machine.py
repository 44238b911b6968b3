"""What the virtual machine consists of: QEMU's command line, and how the guest calls its NICs.

    node side                     wires                       far side
    node1, pf1 (SR-IOV, 7 VFs) ── wire 1 ─────────────────────── far1
    node2 ─────────────────────── wire 2 ─────────────────────── far2
    node3 ─────────────────────── wire 3 ─────────────────────── far3

A wire is a hub of QEMU's: all of it is in one guest, and nothing leads out. Tests put the far side, and what shall be a
node or a pod, into network namespaces. Wires 2 and 3 join two NICs each, so bonds of node2+node3 and far2+far3 speak
LACP.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from lab.vm.build import Image

PROGRAM = "qemu-system-x86_64"
VIRTIO, SRIOV = "virtio-net-pci,speed=10000,duplex=full", "igb"


PARAMETERS = (
    *("console=ttyS0", "quiet", "panic=-1", "oops=panic", "tsc=reliable", "net.ifnames=0"),
    # What keeps attackers out costs emulated time, and nobody is kept out of this guest.
    *("mitigations=off", "nokaslr", "init_on_alloc=0", "randomize_kstack_offset=off", "lsm=capability", "audit=0"),
    *("cryptomgr.notests", "preempt=none"),
    "rcupdate.rcu_expedited=1",  # namespaces and links go at once
)
"""The kernel's."""


@dataclass(frozen=True, slots=True)
class Nic:
    """A NIC of the guest."""

    name: str
    """In the guest, and of the device in QEMU."""
    wire: int
    role: int
    """Tells NICs of one wire apart; the last byte of the MAC."""
    model: str = VIRTIO

    @property
    def mac(self) -> str:
        """Its permanent MAC, with QEMU's prefix."""
        return f"52:54:00:73:{self.wire:02x}:{self.role:02x}"


NICS = (
    *(Nic(f"node{wire}", wire, 1) for wire in (1, 2, 3)),
    *(Nic(f"far{wire}", wire, 2) for wire in (1, 2, 3)),
    Nic("pf1", 1, 3, SRIOV),
)


@dataclass(frozen=True, slots=True)
class Share:
    """A folder of this machine that the guest may use."""

    tag: str
    path: str
    writable: bool


def command_line(
    image: Image,
    *,
    memory: int,
    cpus: int,
    shares: Sequence[Share],
    console: str,
    output: int,
    control: int,
    monitor: int,
) -> list[str]:
    """QEMU's command line. `memory` is in MiB; the last three are descriptors of stream sockets that QEMU inherits.

    `output` and `control` are the virtio ports of these names in the guest, `monitor` speaks QMP; the guest's console
    goes to the file `console`. The processor is emulated, whatever this machine could do: KVM is not looked for.
    """
    argv = [PROGRAM, "-nodefaults", "-no-user-config", "-display", "none", "-no-reboot", "-name", "spiderpool-vm"]
    # With a thread for each processor QEMU 10 ends now and then on a busy host while PCI is set up: one changes the
    # memory map while another looks something up there (iotlb_to_section, QEMU issue 1921).
    argv += ["-machine", "q35,usb=off,smbus=off", "-accel", "tcg,thread=single", "-cpu", "max,la57=off"]
    argv += ["-smp", str(cpus), "-m", str(memory), "-kernel", image.kernel, "-initrd", image.initramfs]
    argv += ["-append", " ".join(PARAMETERS)]
    argv += ["-serial", f"file:{console}", "-device", "virtio-serial-pci"]
    for name, descriptor in (("output", output), ("control", control)):
        argv += [
            "-chardev",
            f"socket,id={name},fd={descriptor}",
            "-device",
            f"virtserialport,chardev={name},name={name}",
        ]
    argv += ["-chardev", f"socket,id=monitor,fd={monitor}", "-mon", "chardev=monitor,mode=control"]
    for share in shares:
        access = "" if share.writable else ",readonly=on"
        path = share.path.replace(",", ",,")  # QEMU's escape
        argv += ["-fsdev", f"local,id={share.tag},path={path},security_model=none,multidevs=remap{access}"]
        argv += ["-device", f"virtio-9p-pci,fsdev={share.tag},mount_tag={share.tag}"]
    for number, nic in enumerate(NICS):
        bus = ""
        if nic.model == SRIOV:  # its VFs are functions of a PCI Express slot
            argv += ["-device", f"pcie-root-port,id=slot{number},chassis={number}"]
            bus = f",bus=slot{number}"
        argv += ["-netdev", f"hubport,id=net-{nic.name},hubid={nic.wire}"]
        argv += ["-device", f"{nic.model},id={nic.name},netdev=net-{nic.name},mac={nic.mac}{bus}"]
    return argv
