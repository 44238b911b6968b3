"""Where the API server is, and who we are to it: from the `kubernetes` package's configuration, and kept fresh.

Kubelets replace a pod's token every hour, people replace kubeconfigs, clusters replace their CA; none of it may need a
restart. The files are looked at now and then, and at once when the server refuses us.
"""

from __future__ import annotations

import asyncio
import logging
import os
import ssl
from collections.abc import Callable
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from typing import Any

from store.errors import UnavailableError
from store.kube_settings import KubeSettings
from store.lane import Job, Lane

log = logging.getLogger(__name__)

SKEW = timedelta(seconds=30)
"""How long before its expiry a plugin's credential is renewed."""

Marks = tuple[tuple[str, int, int, int], ...]
"""Path, inode, size and time of change in nanoseconds of files."""


@dataclass(frozen=True, slots=True)
class Access:
    """How to talk to the server."""

    server: str
    """URL without a slash at the end."""
    authorization: str = field(repr=False)
    """The header's value; empty: a client certificate or nothing."""
    tls: ssl.SSLContext
    server_name: str | None
    """Name to verify in the server's certificate in place of the URL's."""
    proxy: str | None


@dataclass(frozen=True, slots=True)
class _Loaded:
    access: Access
    marks: Marks
    """The files it came from, as they were."""
    expiry: datetime | None
    material: tuple[bytes, ...] = field(repr=False)
    """What the TLS context was made of."""


class Credentials:
    """The current `Access`, read by a thread of its own: files may hang and plugins take their time."""

    def __init__(self, settings: KubeSettings) -> None:
        self._settings = settings
        self._loaded: _Loaded | None = None
        self._next_look = 0.0
        self._turn = asyncio.Lock()
        self._lane: Lane[bool] = Lane(
            "store-credentials", self._work, batch=1, limit=16, patience=settings.attempt, finish=lambda: None
        )

    async def close(self) -> None:
        """End the thread."""
        await self._lane.close(self._settings.connect)

    async def access(self) -> Access:
        """How to talk to the server now. Raises UnavailableError if that cannot be found out."""
        if self._loaded is not None and asyncio.get_running_loop().time() < self._next_look:
            return self._loaded.access
        async with self._turn:
            return await self._refresh(lambda: asyncio.get_running_loop().time() >= self._next_look, force=False)

    async def refused(self, access: Access) -> bool:
        """The server does not take `access`, or we do not take the server: read all again; whether it is another."""
        async with self._turn:
            return (
                await self._refresh(lambda: access is (self._loaded and self._loaded.access), force=True) is not access
            )

    async def _refresh(self, due: Callable[[], bool], *, force: bool) -> Access:
        """What is valid; whoever waited for his turn finds it done."""
        old = self._loaded
        if old is not None and not due():
            return old.access
        try:
            new: _Loaded = await self._lane.call(force)
        except UnavailableError as error:
            if old is None:
                raise
            log.warning("going on with the credentials that we have: %s", error)
            new = old
        self._loaded = new
        self._next_look = asyncio.get_running_loop().time() + self._settings.look
        return new.access

    def _work(self, jobs: list[Job[bool]]) -> None:
        for job in jobs:
            try:
                job.result = renew(self._settings, self._loaded, force=job.work)
            except UnavailableError as error:
                job.error = error


def renew(settings: KubeSettings, loaded: _Loaded | None, *, force: bool) -> _Loaded:
    """What is valid now: `loaded` itself if nothing has changed. Blocks. Raises UnavailableError."""
    if loaded is not None and not force:
        expired = loaded.expiry is not None and datetime.now(UTC) >= loaded.expiry - SKEW
        if not expired and _marks([path for path, *_ in loaded.marks]) == loaded.marks:
            return loaded
    from kubernetes.config import ConfigException  # noqa: PLC0415 (0.3 s and 30 MB that only a cluster's agent pays)

    try:
        if settings.kubeconfig or "KUBERNETES_SERVICE_HOST" not in os.environ:
            fresh = _from_kubeconfig(settings, loaded)
        else:
            fresh = _from_service_account(settings, loaded)
    except (ConfigException, OSError, ValueError) as error:  # ssl.SSLError is an OSError, a YAML error is below
        raise UnavailableError(f"no credentials for the Kubernetes API: {error}") from error
    if loaded is not None and fresh.access == loaded.access:
        return _Loaded(loaded.access, fresh.marks, fresh.expiry, fresh.material)
    if loaded is not None:
        log.info("the credentials for the Kubernetes API were renewed")
    return fresh


def _from_service_account(settings: KubeSettings, old: _Loaded | None) -> _Loaded:
    from kubernetes.client import Configuration  # noqa: PLC0415
    from kubernetes.config.incluster_config import InClusterConfigLoader  # noqa: PLC0415

    token = os.path.join(settings.service_account, "token")
    authority = os.path.join(settings.service_account, "ca.crt")
    marks = _marks([token, authority])  # before reading: what is replaced meanwhile is read once more
    configuration = Configuration()
    InClusterConfigLoader(token, authority, try_refresh_token=False).load_and_set(configuration)
    return _loaded(configuration, marks, None, old, None)


def _from_kubeconfig(settings: KubeSettings, old: _Loaded | None) -> _Loaded:
    import yaml  # noqa: PLC0415
    from kubernetes.client import Configuration  # noqa: PLC0415
    from kubernetes.config.kube_config import KubeConfigLoader, KubeConfigMerger  # noqa: PLC0415

    paths = settings.kubeconfig or os.environ.get("KUBECONFIG") or "~/.kube/config"
    files = [os.path.expanduser(path) for path in paths.split(":") if path]
    marks = _marks(files)
    try:
        merged = KubeConfigMerger(paths)
    except yaml.YAMLError as error:
        raise ValueError(f"{paths}: {error}") from error
    if merged.config is None:
        raise ValueError(f"there is no kubeconfig file at {paths}")
    configuration = Configuration()
    configuration.proxy = None  # what the environment says about proxies is for the web
    loader = KubeConfigLoader(merged.config, active_context=settings.context or None, config_base_path=None)
    user = _user(merged.config, loader.current_context)
    token_file = user is not None and user.safe_get("tokenFile")
    others = [configuration.ssl_ca_cert, configuration.cert_file, configuration.key_file]
    if token_file:
        others.append(os.path.join(os.path.dirname(os.path.abspath(user.path)), token_file))
    loader.load_and_set(configuration)
    others += [configuration.ssl_ca_cert, configuration.cert_file, configuration.key_file]
    if user is not None and "exec" in user and not (configuration.api_key or configuration.cert_file):
        raise ValueError(f"the credential plugin {user['exec']['command']} failed")
    marks += _marks([path for path in dict.fromkeys(others) if path])
    return _loaded(configuration, marks, getattr(loader, "expiry", None), old, getattr(loader, "proxy", None))


def _user(config: Any, context: dict[str, Any]) -> Any:
    name = context["context"].get("user")
    found = config["users"].get_with_name(name, safe=True) if name and config.safe_get("users") else None
    return found and found["user"]


def _loaded(
    configuration: Any, marks: Marks, expiry: datetime | None, old: _Loaded | None, proxy: str | None
) -> _Loaded:
    """Raises OSError, ValueError."""
    if not configuration.verify_ssl:
        raise ValueError("insecure-skip-tls-verify is not supported: give the server's certificate-authority")
    material = tuple(
        _content(path) for path in (configuration.ssl_ca_cert, configuration.cert_file, configuration.key_file)
    )
    if old is not None and material == old.material:
        tls = old.access.tls  # keeps the connections
    else:
        tls = ssl.create_default_context(cafile=configuration.ssl_ca_cert)
        if configuration.cert_file:
            tls.load_cert_chain(configuration.cert_file, configuration.key_file)
    authorization = configuration.api_key.get("BearerToken", "").strip()
    server = configuration.host.rstrip("/")
    if authorization and not server.startswith("https://"):
        raise ValueError(f"{server}: credentials are not sent without TLS")
    access = Access(server, authorization, tls, configuration.tls_server_name or None, proxy)
    return _Loaded(access, marks, expiry, material)


def _content(path: str | None) -> bytes:
    if not path:
        return b""
    with open(path, "rb") as file:
        return file.read()


def _marks(paths: list[str]) -> Marks:
    """The files' present state; what does not exist has inode 0."""
    marks = []
    for path in paths:
        try:
            found = os.stat(path)
        except FileNotFoundError:
            marks.append((path, 0, 0, 0))
        else:
            marks.append((path, found.st_ino, found.st_size, found.st_mtime_ns))
    return tuple(marks)
