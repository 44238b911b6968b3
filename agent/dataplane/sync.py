"""The task that keeps the node's services right: loads the programs, then follows Services and EndpointSlices."""

from __future__ import annotations

import asyncio
import json
import logging
import os
import sys
from collections.abc import Callable
from contextlib import suppress
from random import uniform
from typing import Any, ParamSpec, TypeVar

from prometheus_client import REGISTRY

from agent.dataplane import hooks, metrics
from agent.dataplane.desired import Desired, Frontend, Owner
from agent.dataplane.errors import DataplaneError, HeadersMissingError, HooksOwnedError, LoadError
from agent.dataplane.hooks import Pins
from agent.dataplane.settings import DataplaneSettings
from agent.dataplane.tables import Changes, Report, ServiceTables
from api.service import SERVICE_NAME_LABEL, EndpointSlice, Service
from store.informer import Informer
from store.port import Store

log = logging.getLogger(__name__)

P = ParamSpec("P")
T = TypeVar("T")

_FIRST_RETRY = 1.0
"""Seconds until a failed start is tried again; doubled each time, up to the drift period."""

_SLICE = 256
"""Services translated before other tasks of the agent get their turn: a few milliseconds."""

_ROOT = os.path.dirname(os.path.dirname(os.path.dirname(os.path.abspath(__file__))))

_REFUSALS: dict[str, type[DataplaneError]] = {
    "HooksOwnedError": HooksOwnedError,
    "HeadersMissingError": HeadersMissingError,
}
"""Results of the loader that a person must act on; it is still asked again, since they may."""


class Dataplane:
    """Keeps maps and hooks as the store's Services want them. Forwarding does not need it: it survives its end.

    Nothing that goes wrong here ends the agent, whose other work does not depend on services: it is logged, counted,
    and tried again with growing pauses, at most the drift period apart.
    """

    def __init__(self, store: Store, settings: DataplaneSettings) -> None:
        self._settings = settings
        self._pins = Pins(f"{os.path.normpath(settings.bpffs)}/spiderpool")
        self._services = Informer(store, Service, on_change=self._service_changed)
        self._slices = Informer(store, EndpointSlice, on_change=self._slice_changed)
        self._slices_of: dict[Owner, dict[str, EndpointSlice]] = {}
        self._desired = Desired()
        self._dirty: set[Owner] = set()
        """Services to look at again: as many at most as there are, however many events come."""
        self._wake = asyncio.Event()
        self._tables: ServiceTables | None = None
        self._ready = asyncio.Event()
        self._unprogrammed: set[Frontend] = set()

    @property
    def is_ready(self) -> bool:
        """Whether hooks are attached and the maps follow the services."""
        return self._ready.is_set()

    async def ready(self) -> None:
        """Return when `is_ready`; the caller sets the deadline."""
        await self._ready.wait()

    async def run(self) -> None:
        """Work until cancelled; returns at once if the dataplane is switched off."""
        if not self._settings.enabled:
            log.info("services by eBPF are switched off")
            return
        collector = metrics.KernelCounters(self._counters)
        REGISTRY.register(collector)
        try:
            async with asyncio.TaskGroup() as tasks:
                tasks.create_task(self._services.run())
                tasks.create_task(self._slices.run())
                tasks.create_task(self._keep())
        finally:
            REGISTRY.unregister(collector)
            self._stop()

    def _counters(self) -> tuple[ServiceTables, Desired] | None:
        return (self._tables, self._desired) if self._tables is not None else None

    def _stop(self) -> None:
        self._ready.clear()
        metrics.READY.set(0)
        if self._tables is not None:
            self._tables.close()
            self._tables = None

    async def _keep(self) -> None:
        pause = _FIRST_RETRY
        while True:
            try:
                await self._start()
                pause = _FIRST_RETRY
                await self._follow()
            except (DataplaneError, OSError) as error:
                metrics.FAILURES.labels(type(error).__name__).inc()
                self._stop()
                pause = min(pause * 2, self._settings.drift_period)
                log.error("services are not kept up to date, next attempt in at most %.0f s: %s", pause, error)
            await asyncio.sleep(uniform(pause / 2, pause))

    async def _start(self) -> None:
        """Load, fill the maps, then attach: new programs never run over maps that are not filled."""
        cgroup = hooks.find_cgroup(self._settings.cgroup)
        await self._load()
        await self._synced()
        await self._translate()
        self._tables = await _in_thread(ServiceTables.open, self._pins)
        report = await _in_thread(self._tables.reconcile, dict(self._desired.frontends))
        self._account(report)
        await _in_thread(self._attach, cgroup)
        self._ready.set()
        metrics.READY.set(1)
        log.info("services are served in cgroup %s: %d frontends", cgroup, len(self._tables.programmed))

    def _attach(self, cgroup: str) -> None:
        with self._pins.locked():
            hooks.attach(cgroup, self._pins)

    async def _load(self) -> None:
        """Run the loader and wait for it. Raises LoadError, or what the loader reports."""
        settings = self._settings
        arguments = {
            "--pins": self._pins.directory,
            "--cgroup": settings.cgroup,
            "--headers-cache": settings.headers_cache,
            "--max-services": str(settings.max_services),
            "--max-backends": str(settings.max_backends),
            "--max-udp-flows": str(settings.max_udp_flows),
        }
        command = [sys.executable, "-m", "agent.dataplane.load", "load", "--defer-attach"]
        command += [f"{name}={value}" for name, value in arguments.items()]
        process = await asyncio.create_subprocess_exec(
            *command, stdin=asyncio.subprocess.DEVNULL, stdout=asyncio.subprocess.PIPE, stderr=asyncio.subprocess.PIPE,
            cwd=_ROOT,
        )  # fmt: skip
        try:
            async with asyncio.timeout(settings.loader_deadline):
                output, messages = await process.communicate()
        except TimeoutError:
            raise LoadError(f"the loader did not end within {settings.loader_deadline:.0f} s") from None
        finally:
            with suppress(ProcessLookupError):  # it ended
                process.kill()
            await process.wait()
        result = _loader_result(output, messages, process.returncode or 0)
        metrics.LOADS.labels(result["programs"]).inc()
        log.info("socket programs %s, maps %s", result["programs"], result["maps"])

    async def _synced(self) -> None:
        for informer in (self._services, self._slices):
            while not informer.is_synced:
                try:
                    async with asyncio.timeout(self._settings.drift_period):
                        await informer.synced()
                except TimeoutError:
                    log.warning("still waiting for the store to list services; what is in the maps is served")

    async def _follow(self) -> None:
        """Bring changes into the maps as they come, and look for drift in between."""
        loop = asyncio.get_running_loop()
        check_at = loop.time() + self._settings.drift_period
        while True:
            with suppress(TimeoutError):
                async with asyncio.timeout_at(check_at):
                    await self._wake.wait()
            changed = await self._translate()
            if changed and self._tables is not None:
                changes: Changes = {frontend: self._desired.frontends.get(frontend) for frontend in changed}
                self._account(await _in_thread(self._tables.program, changes), changed)
            if loop.time() >= check_at:
                await self._check()
                check_at = loop.time() + self._settings.drift_period

    async def _check(self) -> None:
        """Repair what somebody else changed, and try again what found no room. Raises LoadError to start over."""
        if self._tables is None:
            return
        cgroup = hooks.find_cgroup(self._settings.cgroup)
        if not await _in_thread(hooks.is_attached, cgroup, self._pins):
            raise LoadError(f"hooks or pins of cgroup {cgroup} were removed")
        expected = not self._unprogrammed
        report = await _in_thread(self._tables.reconcile, dict(self._desired.frontends))
        if report.writes and expected:
            metrics.REPAIRS.inc(report.writes)
            log.warning("%d map entries were not as they should be, and are now", report.writes)
        self._account(report)

    async def _translate(self) -> set[Frontend]:
        """Take in what the informers saw; returns the frontends that changed."""
        self._wake.clear()
        changed: set[Frontend] = set()
        count = 0
        while self._dirty:
            owner = self._dirty.pop()
            service = self._services.get(owner.name, owner.namespace)
            changed |= self._desired.put(owner, service, self._slices_of.get(owner, {}).values())
            count += 1
            if count % _SLICE == 0:
                await asyncio.sleep(0)
        if changed:
            self._report_conflicts(changed)
        return changed

    def _report_conflicts(self, changed: set[Frontend]) -> None:
        conflicts = self._desired.conflicts()
        metrics.CONFLICTS.set(len(conflicts))
        for frontend in sorted(changed & conflicts.keys()):
            winner, *others = (f"{owner.namespace}/{owner.name}" for owner in conflicts[frontend])
            log.warning("%s is claimed by %s, so not by %s", metrics.frontend_text(frontend), winner, ", ".join(others))

    def _account(self, report: Report, touched: set[Frontend] | None = None) -> None:
        """Tell of `report`, which is about the frontends `touched` (None: about all there are)."""
        metrics.WRITES.inc(report.writes)
        programmed = self._tables.programmed if self._tables is not None else {}
        metrics.FRONTENDS.set(len(programmed))
        metrics.BACKENDS.set(sum(len(service.slots) for service in programmed.values()))
        for frontend in sorted(report.unprogrammed.keys() - self._unprogrammed):
            error = report.unprogrammed[frontend]
            metrics.FAILURES.labels(type(error).__name__).inc()
            name = metrics.frontend_text(frontend)
            log.error("%s is not served as it should be, raise max_services or max_backends: %s", name, error)
        untouched = self._unprogrammed - touched if touched is not None else set[Frontend]()
        self._unprogrammed = untouched | report.unprogrammed.keys()
        metrics.UNPROGRAMMED.set(len(self._unprogrammed))

    def _service_changed(self, old: Service | None, new: Service | None) -> None:
        service = new if new is not None else old
        if service is not None:
            self._mark(Owner(service.metadata.namespace, service.metadata.name))

    def _slice_changed(self, old: EndpointSlice | None, new: EndpointSlice | None) -> None:
        if old is not None and (owner := _owner(old)) is not None:
            known = self._slices_of.get(owner, {})
            known.pop(old.metadata.name, None)
            if not known:
                self._slices_of.pop(owner, None)
            self._mark(owner)
        if new is not None and (owner := _owner(new)) is not None:
            self._slices_of.setdefault(owner, {})[new.metadata.name] = new
            self._mark(owner)

    def _mark(self, owner: Owner) -> None:
        self._dirty.add(owner)
        self._wake.set()


async def _in_thread(work: Callable[P, T], *args: P.args, **kwargs: P.kwargs) -> T:
    """Run blocking `work`, to its end even when cancelled: its descriptors must not be closed under it."""
    running = asyncio.ensure_future(asyncio.to_thread(work, *args, **kwargs))
    try:
        return await asyncio.shield(running)
    except asyncio.CancelledError:
        await asyncio.wait([running])
        raise


def _owner(part: EndpointSlice) -> Owner | None:
    name = part.metadata.labels.get(SERVICE_NAME_LABEL)
    return Owner(part.metadata.namespace, name) if name else None


def _loader_result(output: bytes, messages: bytes, status: int) -> dict[str, Any]:
    """The loader's answer. Raises the error it tells of, or LoadError."""
    try:
        result: dict[str, Any] = json.loads(output)
    except ValueError:
        last = messages.decode(errors="replace").strip()[-500:]
        raise LoadError(f"the loader ended with status {status}: {last or 'it said nothing'}") from None
    if not result["ok"]:
        details = messages.decode(errors="replace").strip()[-2000:]
        error = _REFUSALS.get(result["reason"], LoadError)
        raise error(f"{result['error']}{f' ({details})' if details else ''}")
    return result
