"""Which networks pods and services have, from each source."""

from __future__ import annotations

from typing import Any

import msgspec
import pytest

from api.clusternet import CalicoIPPool, CiliumPodIPPool, ControllerManager, ServiceCIDR
from api.core import ConfigMap
from api.meta import R
from controller.coordinator.cni_directory import first_name
from controller.coordinator.networks import (
    ClusterNetworks,
    NotReadyError,
    Sources,
    found_out,
    kubeadm_networks,
    manager_networks,
    type_of_cni,
)


def make(kind: type[R], name: str = "x", age: int = 0, *, gone: bool = False, **body: Any) -> R:
    metadata = {"name": name, "creationTimestamp": f"2030-01-01T00:00:{age:02d}Z"}
    if gone:
        metadata["deletionTimestamp"] = "2030-01-01T00:01:00Z"
    return msgspec.convert({"metadata": metadata, **body}, kind)


def kubeadm(text: str) -> ConfigMap:
    return make(ConfigMap, data={"ClusterConfiguration": text})


def manager(*args: str, command: tuple[str, ...] = ("kube-controller-manager",), name: str = "m") -> ControllerManager:
    return make(ControllerManager, name, spec={"containers": [{"command": list(command), "args": list(args)}]})


def cilium(**data: str) -> ConfigMap:
    return make(ConfigMap, data={key.replace("_", "-"): value for key, value in data.items()})


KUBEADM = kubeadm(
    "apiVersion: kubeadm.k8s.io/v1beta3\nnetworking:\n  dnsDomain: cluster.local\n"
    "  podSubnet: 10.244.0.0/16,fd00:10:244::/56\n  serviceSubnet: 10.96.0.0/12\n"
)
MANAGER = manager("--cluster-cidr=10.1.0.0/16,fd01::/56", "--service-cluster-ip-range=10.2.0.0/16")
SERVICES = (
    make(ServiceCIDR, "late", 2, spec={"cidrs": ["10.8.0.0/16"]}),
    make(ServiceCIDR, "kubernetes", 1, spec={"cidrs": ["10.7.0.0/16", "fd07::/112"]}),
)


@pytest.mark.parametrize(
    ("name", "kind"),
    [
        ("calico", "calico"),
        ("k8s-pod-network", "calico"),
        ("cilium", "cilium"),
        ("flannel", "cluster"),
        ("macvlan-conf", "none"),
        ("", "none"),
        (None, "none"),
    ],
)
def test_types_by_cni_name(name: str | None, kind: str) -> None:
    assert type_of_cni(name) == kind


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("podSubnet: \"10.0.0.0/8\"\nserviceSubnet: '10.9.0.0/16'", ClusterNetworks(("10.0.0.0/8",), ("10.9.0.0/16",))),
        ("podSubnet:\nserviceSubnet: 10.9.0.0/16", ClusterNetworks((), ("10.9.0.0/16",))),
        ("podSubnet: 10.0.0.0/8,bad,fd00::/64", ClusterNetworks(("10.0.0.0/8", "fd00::/64"), ())),
        ("", ClusterNetworks()),
    ],
)
def test_kubeadm(text: str, expected: ClusterNetworks) -> None:
    assert kubeadm_networks(kubeadm(text)) == expected


def test_the_controller_managers_flags() -> None:
    expected = ClusterNetworks(("10.1.0.0/16", "fd01::/56"), ("10.2.0.0/16",))
    assert manager_networks(MANAGER) == expected
    flags = ("kcm", "--cluster-cidr=10.1.0.0/16,fd01::/56", "--service-cluster-ip-range=10.2.0.0/16")
    assert manager_networks(manager("--cluster-cidr=9.0.0.0/8", command=flags)) == expected, "command before args"
    assert manager_networks(make(ControllerManager, spec={"containers": []})) == ClusterNetworks()


FOUND: list[tuple[str, Sources, list[str], list[str]]] = [
    ("cluster", Sources(kubeadm=KUBEADM, managers=(MANAGER,)), ["10.244.0.0/16", "fd00:10:244::/56"], ["10.96.0.0/12"]),
    ("cluster", Sources(managers=(MANAGER,)), ["10.1.0.0/16", "fd01::/56"], ["10.2.0.0/16"]),
    (
        "cluster",
        Sources(kubeadm=kubeadm("podSubnet: 10.0.0.0/8"), managers=(MANAGER,)),
        ["10.1.0.0/16", "fd01::/56"],
        ["10.2.0.0/16"],
    ),
    ("cluster", Sources(kubeadm=kubeadm("podSubnet: 10.0.0.0/8")), ["10.0.0.0/8"], []),
    (
        "cluster",
        Sources(kubeadm=KUBEADM, service_cidrs=SERVICES),
        ["10.244.0.0/16", "fd00:10:244::/56"],
        ["10.7.0.0/16", "fd07::/112", "10.8.0.0/16"],
    ),
    ("none", Sources(kubeadm=KUBEADM), [], ["10.96.0.0/12"]),
    ("none", Sources(service_cidrs=SERVICES[1:]), [], ["10.7.0.0/16", "fd07::/112"]),
    (
        "calico",
        Sources(
            kubeadm=KUBEADM,
            calico=(
                make(CalicoIPPool, "b", 2, spec={"cidr": "10.22.0.0/16"}),
                make(CalicoIPPool, "a", 3, spec={"cidr": "10.21.0.0/16", "disabled": True}),
                make(CalicoIPPool, "c", 1, spec={"cidr": "fd22::/64", "ipipMode": "Always"}),
                make(CalicoIPPool, "d", 0, gone=True, spec={"cidr": "10.23.0.0/16"}),
            ),
        ),
        ["fd22::/64", "10.22.0.0/16"],
        ["10.96.0.0/12"],
    ),
    (
        "cilium",
        Sources(
            kubeadm=KUBEADM,
            cilium=cilium(
                ipam="cluster-pool", cluster_pool_ipv4_cidr=" 10.31.0.0/16 ", cluster_pool_ipv6_cidr="fd31::/104"
            ),
        ),
        ["10.31.0.0/16", "fd31::/104"],
        ["10.96.0.0/12"],
    ),
    (
        "cilium",
        Sources(kubeadm=KUBEADM, cilium=cilium(ipam="cluster-pool-v2beta", cluster_pool_ipv4_cidr="10.31.0.0/16")),
        ["10.31.0.0/16"],
        ["10.96.0.0/12"],
    ),
    (
        "cilium",
        Sources(kubeadm=KUBEADM, cilium=cilium(ipam="kubernetes")),
        ["10.244.0.0/16", "fd00:10:244::/56"],
        ["10.96.0.0/12"],
    ),
    (
        "cilium",
        Sources(
            kubeadm=KUBEADM,
            cilium=cilium(ipam="multi-pool"),
            cilium_pools=(
                make(CiliumPodIPPool, "b", 2, spec={"ipv4": {"cidrs": ["10.42.0.0/16"], "maskSize": 24}}),
                make(
                    CiliumPodIPPool,
                    "a",
                    1,
                    spec={"ipv6": {"cidrs": ["fd41::/64"]}, "ipv4": {"cidrs": ["10.41.0.0/16", "10.40.0.0/16"]}},
                ),
                make(CiliumPodIPPool, "c", 0, gone=True, spec={"ipv4": {"cidrs": ["10.43.0.0/16"]}}),
            ),
        ),
        ["10.41.0.0/16", "10.40.0.0/16", "fd41::/64", "10.42.0.0/16"],
        ["10.96.0.0/12"],
    ),
]


@pytest.mark.upstream("V00003", "V00004", "V00005", "V00009", "V00010")
@pytest.mark.parametrize(("kind", "sources", "pods", "services"), FOUND)
def test_found_out(kind: str, sources: Sources, pods: list[str], services: list[str]) -> None:
    status = found_out(kind, sources)
    assert (status.phase, status.reason) == ("Synced", None)
    assert (status.overlay_pod_cidr, status.service_cidr) == (pods, services)


@pytest.mark.upstream("V00006", "V00011")
@pytest.mark.parametrize(
    ("kind", "sources", "text", "event"),
    [
        ("cluster", Sources(service_cidrs=SERVICES), "No kube-controller-manager pod found", "ClusterNotReady"),
        ("none", Sources(), "No kube-controller-manager pod found", "ClusterNotReady"),
        ("calico", Sources(kubeadm=KUBEADM), "is Calico installed", ""),
        ("cilium", Sources(kubeadm=KUBEADM), "ConfigMap is not there", "CiliumNotReady"),
        ("cilium", Sources(kubeadm=KUBEADM, cilium=cilium(ipam="eni")), "unsupported CIlium IPAM mode: eni", ""),
        ("cilium", Sources(kubeadm=KUBEADM, cilium=cilium(ipam="multi-pool")), "multi-pool needs", ""),
        (
            "cilium",
            Sources(kubeadm=KUBEADM, cilium=cilium(ipam="cluster-pool", cluster_pool_ipv4_cidr="10.0.0.0")),
            "cluster-pool-ipv4-cidr is '10.0.0.0'",
            "",
        ),
    ],
)
def test_not_ready(kind: str, sources: Sources, text: str, event: str) -> None:
    with pytest.raises(NotReadyError, match=text) as caught:
        found_out(kind, sources)
    assert caught.value.event == event


@pytest.mark.upstream("V00001", "V00002")
def test_the_first_cni_configuration_counts(tmp_path: Any) -> None:
    folder = str(tmp_path)
    assert first_name(folder) is None
    (tmp_path / "00-multus.conf").write_text('{"name":"multus-cni-network"}')
    (tmp_path / "05-aaa.json").write_text('{"name":"ignored"}')
    assert first_name(folder) is None
    (tmp_path / "20-flannel.conf").write_text('{"name":"flannel"}')
    (tmp_path / "10-calico.conflist").write_text('{"name":"k8s-pod-network","plugins":[]}')
    assert first_name(folder) == "k8s-pod-network"
    (tmp_path / "10-calico.conflist").write_text("{")
    with pytest.raises(NotReadyError, match=r"10-calico\.conflist is malformed"):
        first_name(folder)
    with pytest.raises(NotReadyError, match="cannot be listed"):
        first_name(f"{folder}/absent")
