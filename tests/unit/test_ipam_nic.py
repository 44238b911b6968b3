"""Finding the physical function behind a NIC, in folders made as the kernel makes them in /sys."""

from __future__ import annotations

from pathlib import Path

import pytest

from plugins.ipam.nic import pci_address, physical_function

BUS = "0000:3b:02.1"


def device(sysfs: Path, bus: str, *nics: str) -> Path:
    folder = sysfs / "bus/pci/devices" / bus
    folder.mkdir(parents=True)
    for nic in nics:
        (folder / "net" / nic).mkdir(parents=True)
    return folder


def test_the_physical_functions_nic(tmp_path: Path) -> None:
    physical = device(tmp_path, "0000:3b:00.0", "ens1f0")
    (device(tmp_path, BUS) / "physfn").symlink_to(physical)
    assert physical_function(str(tmp_path), BUS, "net1") == "ens1f0"


def test_no_virtual_function(tmp_path: Path) -> None:
    device(tmp_path, BUS, "ens1f0")
    with pytest.raises(OSError, match=r"net1 at 0000:3b:02.1 is no virtual function"):
        physical_function(str(tmp_path), BUS, "net1")


def test_a_physical_function_whose_nic_is_elsewhere(tmp_path: Path) -> None:
    physical = device(tmp_path, "0000:3b:00.0")
    (physical / "net").mkdir()
    (device(tmp_path, BUS) / "physfn").symlink_to(physical)
    with pytest.raises(OSError, match=r"the physical function of net1 .* has no NIC here"):
        physical_function(str(tmp_path), BUS, "net1")


@pytest.mark.parametrize("bus", ["", "../../etc", "virtio0", "0000:3b:02.9", "0000:3b:02.1/.."])
def test_no_path_is_made_of_what_is_no_pci_address(tmp_path: Path, bus: str) -> None:
    with pytest.raises(OSError, match="is no PCI device"):
        physical_function(str(tmp_path), bus, "net1")


def test_a_nic_without_a_driver_that_tells() -> None:
    with pytest.raises(OSError, match=r"not supported|No such device"):
        pci_address("lo")
