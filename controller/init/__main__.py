"""`spiderpool-init`: the entry point of the Job."""

from __future__ import annotations

import asyncio
import logging
import os
import sys
from collections.abc import Mapping
from typing import Final

from api.meta import Resource
from api.service import SERVICE_NAME_LABEL, EndpointSlice
from controller.init.plan import InitError, Plan, plan
from daemon.logs import configure
from store.errors import AlreadyExistsError, ForbiddenError, InvalidError, StoreError
from store.kube import KubeStore
from store.kube_settings import KubeSettings
from store.port import Query, Store

_DEADLINE: Final = 600.0
"""Seconds for the whole; then the Job fails, and Kubernetes starts it again."""
_PAUSE: Final = 1.0
"""Seconds between two attempts."""

_log = logging.getLogger(__name__)


def main() -> int:
    """Make the objects. Exit status: 0 made or there already, 1 not possible now, 2 wrong environment."""
    configure("info")
    try:
        what = plan(os.environ)
    except InitError as error:
        _log.critical("%s", error)
        return 2
    try:
        asyncio.run(_run(what, os.environ))
    except (StoreError, TimeoutError) as error:
        _log.critical("cannot finish: %s", str(error) or "it took too long")
        return 1
    if os.path.isdir(os.path.dirname(what.ready_file)):
        with open(what.ready_file, "w") as file:
            file.write("ready\n")
    _log.info("Finish init")
    return 0


async def _run(what: Plan, environ: Mapping[str, str]) -> None:
    store = await KubeStore.open(KubeSettings(kubeconfig=environ.get("KUBECONFIG", "")))
    try:
        async with asyncio.timeout(_DEADLINE):
            await initialise(store, what)
    finally:
        await store.close()


async def initialise(store: Store, what: Plan) -> None:
    """Wait for admission and make the objects; those that are there stay as they are.

    The caller sets the deadline. Raises InvalidError and ForbiddenError, which waiting does not heal.
    """
    while not await _is_served(store, what):
        _log.info("waiting for endpoints of service %s/%s", what.namespace, what.controller)
        await asyncio.sleep(_PAUSE)
    for resource in what.objects:
        await _make(store, resource)


async def _is_served(store: Store, what: Plan) -> bool:
    query = Query(namespace=what.namespace, labels={SERVICE_NAME_LABEL: what.controller})
    try:
        slices = (await store.list(EndpointSlice, query)).items
    except ForbiddenError:
        raise
    except StoreError as error:
        _log.warning("the API server: %s", error)
        return False
    endpoints = [endpoint for each in slices for endpoint in each.endpoints or ()]
    return any(each.addresses and (each.conditions is None or each.conditions.ready is not False) for each in endpoints)


async def _make(store: Store, resource: Resource) -> None:
    what = f"{resource.TYPE.kind} {resource.metadata.name}"
    while True:
        try:
            await store.create(resource)
        except AlreadyExistsError:
            _log.info("%s is there already", what)
            return
        except (InvalidError, ForbiddenError):
            raise
        except StoreError as error:
            _log.warning("%s is not made yet: %s", what, error)
            await asyncio.sleep(_PAUSE)
        else:
            _log.info("%s is made", what)
            return


if __name__ == "__main__":
    sys.exit(main())
