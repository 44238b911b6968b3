"""`spiderpoolctl gc`: have the leading controller look at all claims now, rather than at its next scan."""

from __future__ import annotations

from datetime import UTC, datetime

from msgspec.structs import replace

from api.pool import ANNOTATION_SCAN, Pool
from cli.naming import CliError
from store.errors import ConflictError
from store.port import Store

_ATTEMPTS = 10


async def request(store: Store) -> str:
    """Ask for a scan; what was done. Raises CliError, StoreError.

    The controller watches pools anyway, and who may change one may ask: no port to open, no permission to invent. The
    request is an annotation on one of them, no matter which. A leader that starts scans by itself.
    """
    for _ in range(_ATTEMPTS):
        pools = [p for p in (await store.list(Pool)).items if p.metadata.deletion_timestamp is None]
        if not pools:
            raise CliError("there is no SpiderIPPool to ask by: the controller scans every ten minutes by itself")
        pool = pools[0]
        stamp = datetime.now(UTC).isoformat(timespec="milliseconds")
        noted = {**pool.metadata.annotations, ANNOTATION_SCAN: stamp}
        try:
            await store.update(replace(pool, metadata=replace(pool.metadata, annotations=noted)))
        except ConflictError:
            continue
        return (
            f"asked the leading controller to look at all claims (annotation {ANNOTATION_SCAN} on pool"
            f" {pool.metadata.name}); what it releases is in its log and in Events on pods and pools"
        )
    raise CliError("the pool is changed all the time by others, try again")
