"""Automatic pools: whose they are, how they are called and found, how many addresses they have, and which. Pure.

The controller makes one pool for each application, NIC and address family from the subnet that the application's pod
template names. The agent finds it by `lookup_labels` and waits until it has `desired_number` addresses; more is fine,
for the cluster's spare number is the controller's to add.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Callable
from typing import NamedTuple

from api.annotations import IP_NUMBER, RECLAIM, IPNumber
from api.claim import Controller
from api.meta import FINALIZER, ObjectMeta
from api.pool import LABEL_CIDR, LabelSelector, Pool, PoolSpec, cidr_label
from api.ranges import Family, IPSet
from api.subnet import AFFINITY, LABEL_APP_NAME, LABEL_OWNER_SUBNET, Subnet, is_automatic, label_text, owner_reference
from api.validate.labels import is_subdomain

LABEL_APP_GV = "ipam.spidernet.io/owner-application-gv"
LABEL_APP_KIND = "ipam.spidernet.io/owner-application-kind"
LABEL_APP_NAMESPACE = "ipam.spidernet.io/owner-application-namespace"
LABEL_APP_UID = "ipam.spidernet.io/owner-application-uid"
LABEL_INTERFACE = "ipam.spidernet.io/interface"
LABEL_IP_VERSION = "ipam.spidernet.io/ip-version"
LABEL_RECLAIM = RECLAIM
"""`true`: the pool goes with its application; `false`: it waits for the next one of that name and kind."""
ANNOTATION_NUMBER = IP_NUMBER
"""On a pool: the number that it was made for."""

MOST_ADDRESSES = 100_000
"""What an automatic pool has at most: its addresses are chosen one by one."""
_NAME_LENGTH = 253
"""Of an object, at most (DNS-1123 subdomain)."""


class Application(NamedTuple):
    """The top controller of the pods that a pool is for. Pools find it by everything but the UID."""

    api_version: str
    kind: str
    namespace: str
    name: str

    @classmethod
    def of(cls, controller: Controller, namespace: str) -> Application:
        """A pod's top controller, and the pod's namespace."""
        return cls(controller.api_version, controller.kind, namespace, controller.name)

    @property
    def group(self) -> str:
        """API group; empty for the core group."""
        return self.api_version.rpartition("/")[0]

    @property
    def version(self) -> str:
        """API version without the group."""
        return self.api_version.rpartition("/")[2]

    def __str__(self) -> str:
        """As the ledger has it: `apps_v1_Deployment_shop_web`, without a group `v1_Pod_shop_web`."""
        return "_".join(part for part in (self.group, self.version, self.kind, self.namespace, self.name) if part)


def kin_labels(application: Application, family: Family, nic: str) -> dict[str, str]:
    """Labels that all pools of an application's NIC have, also those of its forerunners of that name and kind."""
    return {
        LABEL_APP_GV: label_text(application.api_version.replace("/", "_")),
        LABEL_APP_KIND: label_text(application.kind),
        LABEL_APP_NAMESPACE: application.namespace,
        LABEL_APP_NAME: label_text(application.name),
        LABEL_IP_VERSION: f"IPv{family}",
        LABEL_INTERFACE: label_text(nic),
    }


def application_labels(application: Application) -> dict[str, str]:
    """Labels that all pools of an application have, and of its forerunners."""
    labels = kin_labels(application, 4, "")
    return {key: value for key, value in labels.items() if key not in {LABEL_IP_VERSION, LABEL_INTERFACE}}


def lookup_labels(application: Application, uid: str, family: Family, nic: str, subnet: str) -> dict[str, str]:
    """Labels of the one pool that serves this NIC of the application's pods; `uid` is the application's."""
    return {**kin_labels(application, family, nic), LABEL_APP_UID: uid, LABEL_OWNER_SUBNET: label_text(subnet)}


def desired_number(number: IPNumber | None, replicas: int, *, spare: int) -> int:
    """How many addresses an automatic pool is to have; `spare` is what the cluster adds where nothing is asked for."""
    return replicas + spare if number is None else number.wanted(replicas)


def number_text(number: IPNumber | None, *, spare: int) -> str:
    """The same as the pool's annotation has it: `+1`, `5`."""
    if number is None:
        return f"+{spare}"
    return f"{'+' if number.flexible else ''}{number.count}"


def affinity(application: Application) -> dict[str, str]:
    """`spec.podAffinity.matchLabels` of the application's pools."""
    return dict(
        zip(
            AFFINITY,
            (application.group, application.version, application.kind, application.namespace, application.name),
            strict=True,
        )
    )


def application_of(pool: Pool) -> Application | None:
    """Whom the pool is for; None if it was made by hand, or its affinity was tampered with."""
    selector = pool.spec.pod_affinity
    labels = selector.match_labels if selector is not None and is_automatic(pool) else None
    if not labels or any(key not in labels for key in AFFINITY):
        return None
    group, version, kind, namespace, name = (labels[key] for key in AFFINITY)
    return Application(f"{group}/{version}" if group else version, kind, namespace, name)


def pool_name(application: Application, uid: str, family: Family, nic: str, *, long: bool = False) -> str:
    """`auto4-shop-eth0-9f3c1`: family, application, NIC and the beginning of the last group of the UID.

    `long` takes all of that group, for when the first name is another pool's. What does not fit is cut from the
    application's name; what no object name may have is replaced, and told apart by a hash.
    """
    unique = uid.rpartition("-")[2].lower() or "0"
    if not re.fullmatch(r"[a-z0-9]+", unique):
        unique = hashlib.sha256(uid.encode()).hexdigest()
    tail = f"-{_plain(nic)}-{unique[: 12 if long else 5]}"
    head = f"auto{family}-"
    middle = _plain(application.name)[: _NAME_LENGTH - len(head) - len(tail)].rstrip("-.")
    return f"{head}{middle}{tail}"


def _plain(text: str) -> str:
    """`text` in small letters, if that can be a part of an object's name, or something like it."""
    small = text.lower()
    if is_subdomain(small):
        return small
    legible = re.sub(r"[^a-z0-9]+", "-", small).strip("-")
    return f"{legible}-{hashlib.sha256(text.encode()).hexdigest()[:6]}".lstrip("-")


class Wish(NamedTuple):
    """One automatic pool as it is to be, its addresses apart."""

    application: Application
    uid: str
    """The application's."""
    family: Family
    nic: str
    subnet: str
    """Name of the subnet."""
    size: int
    """How many addresses."""
    number: str
    """The number asked for, as the annotation has it."""
    reclaim: bool


def new_pool(wish: Wish, subnet: Subnet, name: str) -> Pool:
    """The pool, without addresses: those are the subnet's to give, after the pool is there."""
    network = subnet.spec.subnet
    labels = {
        **lookup_labels(wish.application, wish.uid, wish.family, wish.nic, wish.subnet),
        LABEL_RECLAIM: "true" if wish.reclaim else "false",
        LABEL_CIDR: cidr_label(network),
    }
    return Pool(
        metadata=ObjectMeta(
            name=name,
            labels=labels,
            annotations={ANNOTATION_NUMBER: wish.number},
            finalizers=[FINALIZER],
            owner_references=[owner_reference(subnet)],
        ),
        spec=PoolSpec(
            subnet=network,
            ip_version=wish.family,
            gateway=subnet.spec.gateway,
            routes=subnet.spec.routes,
            detect_ip_conflict=subnet.spec.detect_ip_conflict,
            detect_gateway=subnet.spec.detect_gateway,
            pod_affinity=LabelSelector(match_labels=affinity(wish.application)),
            default=False,
            disable=False,
        ),
    )


def lowest(free: IPSet, count: int, avoided: Callable[[int], bool]) -> IPSet | None:
    """The lowest `count` of the free addresses but those to be avoided; None if there are not so many."""
    found: list[tuple[int, int]] = []
    for low, high in free.intervals:
        for number in range(low, high + 1):
            if len(found) == count:
                return IPSet(free.family, found)
            if not avoided(number):
                found.append((number, number))
    return IPSet(free.family, found) if len(found) == count else None
