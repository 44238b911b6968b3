"""IPAM as a CNI plugin: ADD, DEL, CHECK, STATUS and GC against claims."""

from __future__ import annotations

import asyncio
import logging
import math
import time
from collections.abc import Coroutine, Iterable, Iterator, Mapping
from contextlib import contextmanager
from ipaddress import ip_address, ip_interface
from random import Random
from typing import Any

from api.annotations import ROUTES
from api.claim import Claim
from api.coordinator import ClusterCoordinatorSpec, Coordinator, chosen_of
from api.endpoint import EndpointIP
from api.pool import Pool
from api.ranges import Address, Family, IPSet
from plugins.cni import Call, Plugin, decode_prev_result, encode_result, valid_attachments
from plugins.coordinator.probe import Prober
from plugins.errors import (
    CheckFailedError,
    CniError,
    ExhaustedError,
    InternalError,
    InvalidConfigError,
    NoPoolError,
    NotAvailableError,
    TryAgainLaterError,
)
from plugins.ipam import metrics
from plugins.ipam.allocation import Allocator
from plugins.ipam.answer import Given
from plugins.ipam.candidates import PoolFacts
from plugins.ipam.catalog import Catalog
from plugins.ipam.claims import ClaimWriter
from plugins.ipam.complaints import Complaints
from plugins.ipam.concurrency import KeyLocks, container_key, pod_key, together
from plugins.ipam.config import Request, network_name, parse_config, parse_request
from plugins.ipam.detection import Detector
from plugins.ipam.endpoints import EndpointWriter
from plugins.ipam.fate import Fates
from plugins.ipam.held import NodeClaims, belongs, set_key
from plugins.ipam.housekeeping import Housekeeping, keys_of
from plugins.ipam.identity import last_nic, of_pod
from plugins.ipam.nic import addresses_of
from plugins.ipam.pods import NoPods, PodSource
from plugins.ipam.provider import Provider
from plugins.ipam.questions import Policy
from plugins.ipam.repair import repair
from plugins.ipam.retained import RetainedClaims
from plugins.ipam.settings import IpamSettings
from plugins.ipam.takeover import TakeOvers
from plugins.ipam.view import Views
from store.errors import InvalidError, NotFoundError, StoreError
from store.informer import Informer
from store.port import Store
from store.recorder import Recorder

log = logging.getLogger(__name__)


class Ipam(Plugin):
    """The plugin. `run` must be running for anything to work; `ready` tells when it does."""

    def __init__(
        self,
        store: Store,
        node: str,
        settings: IpamSettings,
        prober: Prober,
        *,
        pods: PodSource | None = None,
        provider: Provider | None = None,
    ) -> None:
        self._store = store
        self._settings = settings
        self._pods = pods or NoPods()
        knows_pods = self._pods.knows_pods
        self._catalog = Catalog(
            store, node, settings, self._pool_changed, self._reserved_changed, knows_pods=knows_pods
        )
        self._held = NodeClaims(store, node)
        self._views = Views(store, self._reserved_of, self._spawn, Random(), self._held.informer.values)
        self._writer = ClaimWriter(store, self._held, self._views, provider)
        self._coordinators = Informer(store, Coordinator)
        self._policy = Policy(settings, self._catalog.get, self._cluster)
        detector = Detector(
            settings=settings,
            policy=self._policy,
            catalog=self._catalog,
            views=self._views,
            writer=self._writer,
            prober=prober,
        )
        take_overs = TakeOvers(
            node=node,
            settings=settings,
            catalog=self._catalog,
            held=self._held,
            writer=self._writer,
            retained=RetainedClaims(store),
        )
        self._allocator = Allocator(
            node=node,
            settings=settings,
            catalog=self._catalog,
            views=self._views,
            held=self._held,
            writer=self._writer,
            detector=detector,
            take_overs=take_overs,
            provider=provider,
        )
        self._endpoints = EndpointWriter(store, node, settings.endpoint_queue, owners_collect=knows_pods)
        self._complaints = Complaints(Recorder(store, "spiderpool-agent", node))
        self._locks = KeyLocks()
        self._group: asyncio.TaskGroup | None = None
        self._house = Housekeeping(
            settings=settings,
            views=self._views,
            held=self._held,
            writer=self._writer,
            allocator=self._allocator,
            locks=self._locks,
            fates=lambda: Fates(store, settings),
            released=self._endpoints.detached,
        )

    async def run(self) -> None:
        """Keep the caches and do the background work until cancelled."""
        try:
            async with asyncio.TaskGroup() as group:
                self._group = group
                for informer in (self._catalog.pools, self._catalog.reserved_ips, self._held.informer):
                    group.create_task(informer.run())
                group.create_task(self._coordinators.run())
                group.create_task(self._pods.run())
                group.create_task(self._endpoints.run())
                group.create_task(self._complaints.run())
                group.create_task(self._repair_endpoints())
                group.create_task(self._house.run())
        finally:
            self._group = None

    async def ready(self, deadline: float) -> None:
        """Return when the caches are complete. Raises TimeoutError after `deadline` seconds."""
        async with asyncio.timeout(deadline):
            for informer in (self._catalog.pools, self._catalog.reserved_ips, self._held.informer):
                await informer.synced()
            await self._coordinators.synced()
            await self._pods.ready()

    def held(self) -> list[Claim]:
        """This node's claims as far as they are known now."""
        return [claim for claims in self._held.sets().values() for claim in claims]

    def asked_about(self) -> list[tuple[Claim, str]]:
        """This node's claims of pools with conflict detection, as of now, each with its pool's gateway (or nothing)."""
        return [
            (claim, facts.gateway)
            for claims in self._held.sets().values()
            for claim in claims
            if (facts := self._catalog.get(claim.spec.pool)) is not None and self._policy.of(facts.name).conflict
        ]

    async def _repair_endpoints(self) -> None:
        """Once, write the endpoints that were left unwritten when the agent ended."""
        await self.ready(math.inf)
        await repair(self._store, self._endpoints, self._held.sets, self._catalog.get)

    # The commands

    async def add(self, call: Call) -> Mapping[str, Any]:
        """Allocate; the same addresses again for the same identity and NIC."""
        return encode_result((await self.attach(call)).result, call.cni_version)

    async def attach(self, call: Call) -> Given:
        """`add` with everything that is known of the NIC, for callers that speak another language than CNI."""
        metrics.allocations.inc()
        started = time.monotonic()
        try:
            with self._endpoints.yielding():
                return await self._attach(call)
        except BaseException as error:
            metrics.allocation_failures.inc()
            _classify(error, _ALLOCATION_FAILURES, metrics.allocation_internal)
            raise
        finally:
            metrics.allocation_duration.observe(time.monotonic() - started)

    async def delete(self, call: Call) -> None:
        """Release what this container has for this NIC; nothing is success."""
        metrics.releases.inc()
        started = time.monotonic()
        try:
            await self._delete(call)
        except BaseException as error:
            metrics.release_failures.inc()
            _classify(error, _RELEASE_FAILURES, metrics.release_internal)
            raise
        finally:
            metrics.release_duration.observe(time.monotonic() - started)

    async def check(self, call: Call) -> None:
        """Compare the claims with prevResult and with the NIC."""
        previous = decode_prev_result(call.config)
        if previous is None:
            raise InvalidConfigError("CHECK needs the result of ADD", "prevResult: is missing")
        with self._foreign_errors("CHECK"):
            async with asyncio.timeout(self._settings.add_deadline):
                await self.ready(self._settings.add_deadline)
                held = await self._held.of_container(call.container_id, call.ifname, call.pod_uid)
                claims = [claim for claim in [await self._writer.read(c.metadata.name) for c in held] if claim]
        claimed = {
            ip_address(c.spec.address) for c in claims if belongs(c, call.container_id, call.ifname, call.pod_uid)
        }
        names = {index for index, nic in enumerate(previous.interfaces) if nic.name == call.ifname and nic.sandbox}
        told = {
            ip_interface(ip.address).ip
            for ip in previous.ips
            if ip.interface is None or not previous.interfaces or ip.interface in names
        }
        if not claimed:
            raise CheckFailedError("no address is claimed", f"container {call.container_id}, NIC {call.ifname}")
        if claimed != told:
            raise CheckFailedError(
                "claims and prevResult differ", f"claimed: {_list(claimed)}; prevResult: {_list(told)}"
            )
        assert call.netns_fd is not None  # noqa: S101 - parse_call refuses a CHECK without it
        missing = claimed - await addresses_of(call.netns_fd, call.ifname)
        if missing:
            raise CheckFailedError(
                "the NIC lacks an address", f"{call.ifname}: {_list(missing)} is claimed and not on it"
            )

    async def status(self, call: Call) -> None:
        """Whether an ADD with this configuration could succeed: caches, store, a pool that may serve.

        Full pools do not count: a node that says so would be taken out of service, and a DEL heals it.
        """
        try:
            await self.ready(1.0)
            await self._store.get(Pool, "status")
        except NotFoundError:
            pass
        except TimeoutError:
            raise NotAvailableError("the agent is starting", "pools and claims have not been read yet") from None
        except StoreError as error:
            raise NotAvailableError("the store cannot be reached", str(error)) from error
        config = parse_config(call.config)
        if self._pods.knows_pods:
            return  # which pools are asked for is each pod's to say
        try:
            await self._catalog.select(config, "", None)
        except StoreError as error:
            raise NotAvailableError("the store cannot be reached", str(error)) from error
        except NoPoolError as error:
            raise NotAvailableError(error.msg, error.details) from error

    async def gc(self, call: Call) -> None:
        """Release this network's claims on this node that belong to no valid attachment.

        Quarantined claims are nobody's attachment, and claims with a call in flight are not stale.
        """
        network = network_name(call.config)
        if not network:
            raise InvalidConfigError("GC without a network", "name: is missing")
        valid = valid_attachments(call.config)
        with self._foreign_errors("GC"):
            await self.ready(self._settings.add_deadline)
            stale = [
                claim
                for claims in self._held.sets().values()
                for claim in claims
                if claim.spec.network == network
                and (claim.spec.container_id, claim.spec.nic) not in valid
                and not any(self._locks.busy(key) for key in keys_of(claim))
            ]
            # Nobody holds these locks, so they are taken at once: no ADD comes between the judgement and the deletion.
            async with self._locks.hold(*(key for claim in stale for key in keys_of(claim))):
                await self._release_all(stale)

    # What they consist of

    async def _attach(self, call: Call) -> Given:
        request = parse_request(call)
        with self._foreign_errors("ADD"):
            async with asyncio.timeout(self._settings.add_deadline) as timer:
                await self.ready(self._settings.add_deadline)
                request = of_pod(request, await self._pods.find(call.pod_namespace, call.pod_name, call.pod_uid))
                locks = self._locks.hold(
                    container_key(request.container_id, request.nic), pod_key(request.identity, request.nic)
                )
                async with locks:
                    with self._complaining(request):
                        given = await self._allocator.allocate(request, call.netns_fd, timer.when() or math.inf)
        log.info("gave %s", _told(given.entry))
        if given.unreachable and request.nic == last_nic(request.facts):
            routes = ", ".join(f"{route.dst} via {route.gw}" for route in given.unreachable)
            log.warning("annotation %s: no NIC of the pod is in the subnet of the gateway of %s", ROUTES, routes)
        self._endpoints.attached(given.claims[0], given.entry)
        return given

    async def _delete(self, call: Call) -> None:
        with self._foreign_errors("DEL"):
            async with asyncio.timeout(self._settings.add_deadline):
                await self._release(call.container_id, call.ifname, call.pod_uid)

    async def _release(self, container_id: str, nic: str, pod_uid: str) -> None:
        async with self._locks.hold(container_key(container_id, nic)):
            claims = await self._held.of_container(container_id, nic, pod_uid)
            if not claims and self._writer.in_doubt:  # an ADD gave up on a write that may land after this look
                await self._writer.catch_up()
                claims = await self._held.read_container(container_id, nic, pod_uid)
            async with self._locks.hold(*(pod_key(*set_key(claim)) for claim in claims)):
                await self._release_all(claims)

    async def _release_all(self, claims: Iterable[Claim]) -> None:
        """Delete those of the claims that nobody needs, as long as they are for the container that they are for now.

        The caller has the locks.
        """
        fates = Fates(self._store, self._settings)
        unneeded: list[Claim] = []
        for claim in claims:
            reason = await fates.reason_to_keep(claim) if self._pods.knows_pods else ""
            if reason:
                log.info("kept %s of pool %s: %s", claim.spec.address, claim.spec.pool, reason)
            else:
                unneeded.append(claim)

        async def release(claim: Claim) -> None:
            container_id, nic, pod_uid = claim.spec.container_id, claim.spec.nic, claim.spec.pod_uid
            if await self._writer.free(
                claim, lambda current: belongs(current, container_id, nic, pod_uid), metrics.release_conflicts
            ):
                log.info("released %s of pool %s", claim.spec.address, claim.spec.pool)
                self._endpoints.detached(claim)

        await together(release(claim) for claim in unneeded)

    # Errors and caches

    @contextmanager
    def _foreign_errors(self, command: str) -> Iterator[None]:
        """The store's errors, and the end of the time, as CNI errors."""
        try:
            yield
        except CniError:
            raise
        except InvalidError as error:
            raise InternalError("the store refuses a claim", str(error)) from error
        except StoreError as error:
            raise TryAgainLaterError("the store could not do it now", str(error)) from error
        except TimeoutError as error:
            limit = f"{command} has {self._settings.add_deadline:g} s in all (ipam.add_deadline)"
            waited = "the store, the network, or addresses that other ADDs may give back"
            raise TryAgainLaterError("it took too long", f"{limit}; it waited for {waited}") from error

    @contextmanager
    def _complaining(self, request: Request) -> Iterator[None]:
        """Errors that the pod's owner can do something about, also as an event on the pod."""
        try:
            yield
        except CniError as error:
            if request.facts is not None:
                self._complaints.about(request.facts.pod, request.nic, error)
            raise

    def _spawn(self, work: Coroutine[Any, Any, None]) -> asyncio.Task[None]:
        if self._group is None:
            work.close()
            raise TryAgainLaterError("the agent is stopping")
        return self._group.create_task(work)

    def _cluster(self) -> ClusterCoordinatorSpec | None:
        chosen = chosen_of(self._coordinators.values())
        return chosen.spec if chosen is not None else None

    def _reserved_of(self, facts: PoolFacts) -> IPSet:
        return self._catalog.reserved[facts.family]

    def _pool_changed(self, name: str, facts: PoolFacts | None) -> None:
        del name
        if facts is not None:
            self._views.rebase(facts)

    def _reserved_changed(self, family: Family) -> None:
        for name in self._views.names():
            facts = self._catalog.get(name)
            if facts is not None and facts.family == family:
                self._views.rebase(facts)


_ALLOCATION_FAILURES = (
    (NoPoolError, metrics.allocation_no_pool),
    (ExhaustedError, metrics.allocation_used_out),
    ((TryAgainLaterError, asyncio.CancelledError), metrics.allocation_retries),
)
_RELEASE_FAILURES = (((TryAgainLaterError, asyncio.CancelledError), metrics.release_retries),)


def _classify(error: BaseException, classes: Any, otherwise: Any) -> None:
    next((counter for kind, counter in classes if isinstance(error, kind)), otherwise).inc()


def _told(entry: EndpointIP) -> str:
    """What an ADD gave, for the log."""
    given = ((entry.ipv4, entry.ipv4_pool), (entry.ipv6, entry.ipv6_pool))
    return ", ".join(f"{address} of pool {pool}" for address, pool in given if address)


def _list(addresses: Iterable[Address]) -> str:
    return ", ".join(sorted(map(str, addresses))) or "none"
