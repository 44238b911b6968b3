"""All kinds, by the names a manifest uses."""

from __future__ import annotations

from api.apps import (
    CronJob,
    DaemonSet,
    Deployment,
    Job,
    ReplicaSet,
    StatefulSet,
    VirtualMachine,
    VirtualMachineInstance,
    VirtualMachineInstanceMigration,
)
from api.claim import Claim
from api.coordinator import Coordinator
from api.core import ConfigMap, Namespace, Node, Pod
from api.endpoint import Endpoint
from api.meta import Resource
from api.multusconfig import MultusConfig
from api.pool import Pool
from api.reservedip import ReservedIP
from api.service import EndpointSlice, Service
from api.subnet import Subnet

OWN: tuple[type[Resource], ...] = (Pool, Subnet, ReservedIP, Endpoint, Claim, Coordinator, MultusConfig)
"""Kinds of our API group: they have a CRD."""

READ: tuple[type[Resource], ...] = (
    Pod,
    Namespace,
    Node,
    ConfigMap,
    Deployment,
    ReplicaSet,
    StatefulSet,
    DaemonSet,
    Job,
    CronJob,
    VirtualMachine,
    VirtualMachineInstance,
    VirtualMachineInstanceMigration,
)
"""Partial kinds: read and never written."""

ALL: tuple[type[Resource], ...] = (*OWN, Service, EndpointSlice)
"""Kinds that a manifest for this program may contain."""

BY_NAME: dict[tuple[str, str], type[Resource]] = {(k.TYPE.api_version, k.TYPE.kind): k for k in ALL}
"""(apiVersion, kind) to type."""
