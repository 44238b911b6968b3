"""Endpoints that an agent did not come to write before it ended, found by comparing them with claims at its start."""

from __future__ import annotations

import asyncio
import logging
from collections import defaultdict
from collections.abc import Callable, Mapping

from api.claim import Claim
from api.endpoint import Endpoint, EndpointIP
from plugins.errors import NoPoolError
from plugins.ipam.answer import PoolOf, result_of
from plugins.ipam.endpoints import EndpointWriter, Key, key_of, subject_of, uid_of
from plugins.ipam.held import SetKey, by_family, is_retained, partial, set_key
from store.errors import NotFoundError, StoreError
from store.port import Store

log = logging.getLogger(__name__)

_PAUSE = 30.0
"""Seconds until the store is asked again."""


async def repair(
    store: Store, writer: EndpointWriter, sets: Callable[[], Mapping[SetKey, list[Claim]]], pool_of: PoolOf
) -> None:
    """Have the endpoints written that do not tell what the sets of claims say; tried again until the store answers.

    What claims do not say is lost for such an endpoint: the pod's own routes, and whether a default route was left
    out. One read for each pod of the node, one after the other: nobody waits for it.
    """
    while True:
        try:
            number = await _compare(store, writer, sets, pool_of)
        except StoreError as error:
            log.warning("endpoints are not compared with claims yet: %s", error)
            await asyncio.sleep(_PAUSE)
            continue
        if number:
            log.info("endpoints that differed from claims, and are written anew: %d", number)
        return


async def _compare(
    store: Store, writer: EndpointWriter, sets: Callable[[], Mapping[SetKey, list[Claim]]], pool_of: PoolOf
) -> int:
    pods: defaultdict[Key, list[list[Claim]]] = defaultdict(list)
    for claims in sets().values():
        if all(key_of(claims[0])):
            pods[key_of(claims[0])].append(claims)
    repaired = 0
    for (namespace, name), nics in pods.items():
        try:
            endpoint: Endpoint | None = await store.get(Endpoint, name, namespace)
        except NotFoundError:
            endpoint = None
        held = sets()  # a DEL that came meanwhile has had the endpoint removed: nothing would remove it again
        still = [claims for claims in nics if held.get(set_key(claims[0])) == claims]
        wrong = [(claims[0], entry) for claims in still if (entry := missing_entry(endpoint, claims, pool_of))]
        for claim, entry in wrong:
            writer.attached(claim, entry)
        repaired += bool(wrong)
    return repaired


def missing_entry(endpoint: Endpoint | None, claims: list[Claim], pool_of: PoolOf) -> EndpointIP | None:
    """The entry for the NIC of these claims that the endpoint should have and has not; None if all is well.

    An incomplete set says less than the endpoint, which adoption may need yet for upstream's record of the other
    family.
    """
    if partial(claims):
        return None
    uid = subject_of(claims[0]).uid
    if endpoint is not None and uid_of(endpoint) not in ("", uid) and is_retained(claims[0]):
        return None  # the workload's next pod has it, on another node
    try:
        _, entry = result_of(by_family(claims)[0], pool_of, clean_gateway=False)
    except NoPoolError:
        return None
    known = endpoint.status.current.ips if endpoint is not None and endpoint.status is not None else []
    told = next((other for other in known if other.interface == entry.interface), None)
    same_pod = endpoint is not None and uid_of(endpoint) == uid
    if same_pod and told is not None and (told.ipv4, told.ipv6, told.mac) == (entry.ipv4, entry.ipv6, entry.mac):
        return None
    return entry
