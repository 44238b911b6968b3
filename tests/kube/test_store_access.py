"""Who the store is to the API server, and that it stays so when tokens, certificates and authorities are replaced."""

from __future__ import annotations

import asyncio
import json
import os
import stat
import sys
from pathlib import Path

import pytest

from api.claim import Claim
from lab.kube.cluster import Cluster
from lab.kube.pki import Authority
from store.errors import NotFoundError, UnavailableError
from store.kube import KubeStore
from store.kube_access import Credentials
from store.kube_settings import KubeSettings
from store.port import EVERYTHING
from tests.integration.store_adapters import claim, take, told
from tests.kube.store_rig import make_admin, token_of, write_kubeconfig


@pytest.fixture(scope="module")
def token(kube: Cluster) -> str:
    token = token_of(kube, "spt-access")
    make_admin(kube, "spt-access")
    return token


def doomed(kube: Cluster, name: str) -> str:
    """A token with all rights that is no good any more after `revoke`."""
    token = token_of(kube, name)
    make_admin(kube, name)
    return token


def revoke(kube: Cluster, name: str) -> None:
    kube.kubectl("delete", "serviceaccount", name)


async def refused(store: KubeStore) -> None:
    """Wait until the server does not take our token any more; one that was used it remembers for ten seconds."""
    async with asyncio.timeout(20):
        while True:
            try:
                await store.list(Claim)
            except UnavailableError as error:
                assert "credentials" in str(error)  # noqa: PT017
                return
            await asyncio.sleep(0.2)


def replace_file(path: str, content: str) -> None:
    """As a kubelet does it: at once."""
    with open(f"{path}.new", "w") as file:
        file.write(content)
    os.rename(f"{path}.new", path)


class TestServiceAccount:
    """In a pod."""

    @pytest.fixture
    def folder(self, kube: Cluster, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
        monkeypatch.setenv("KUBERNETES_SERVICE_HOST", "127.0.0.1")
        monkeypatch.setenv("KUBERNETES_SERVICE_PORT", str(kube.place.port))
        (tmp_path / "ca.crt").write_text(Path(f"{kube.place.pki}/ca.crt").read_text())
        return tmp_path

    def test_token_is_replaced_after_it_was_revoked(self, kube: Cluster, folder: Path, token: str) -> None:
        first = doomed(kube, "spt-doomed")
        (folder / "token").write_text(f"{first}\n")

        async def main() -> None:
            store = await KubeStore.open(KubeSettings(service_account=str(folder), look=3600))
            revoke(kube, "spt-doomed")
            await refused(store)
            replace_file(f"{folder}/token", token)
            await store.list(Claim)  # at once, on the refusal
            await store.close()

        asyncio.run(main())

    def test_token_is_replaced_in_time(
        self, kube: Cluster, folder: Path, token: str, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """Without a refusal ever: the new one is used before the old one ends."""

        async def fail(*_: object) -> bool:
            raise AssertionError("the server refused a token")

        monkeypatch.setattr(Credentials, "refused", fail)
        first = doomed(kube, "spt-early")
        (folder / "token").write_text(first)

        async def main() -> None:
            store = await KubeStore.open(KubeSettings(service_account=str(folder), look=0.2))
            start = (await store.list(Claim)).resource_version
            events = store.watch(Claim, EVERYTHING, start)
            await store.create(claim(2_000_001))
            assert told(await take(events, 1)) == [("ADDED", claim(2_000_001).metadata.name)]
            replace_file(f"{folder}/token", token)
            await asyncio.sleep(0.3)
            await store.list(Claim)
            revoke(kube, "spt-early")
            for _ in range(60):  # the ten seconds, and some
                await store.get(Claim, claim(2_000_001).metadata.name)
                await asyncio.sleep(0.2)
            await store.delete(Claim, claim(2_000_001).metadata.name)
            assert told(await take(events, 1)) == [("DELETED", claim(2_000_001).metadata.name)]
            await store.close()

        asyncio.run(main())

    def test_authority_is_replaced(self, kube: Cluster, folder: Path, token: str, tmp_path: Path) -> None:
        other = str(tmp_path / "other")
        os.mkdir(other)
        Authority(other).create()
        right = (folder / "ca.crt").read_text()
        (folder / "token").write_text(token)
        (folder / "ca.crt").write_text(Path(f"{other}/ca.crt").read_text())

        async def main() -> None:
            store = await KubeStore.open(KubeSettings(service_account=str(folder), look=3600, deadline=2))
            with pytest.raises(UnavailableError, match="certificate"):
                await store.list(Claim)
            with pytest.raises(UnavailableError, match="certificate"):
                await store.create(claim(2_000_002))
            replace_file(f"{folder}/ca.crt", right)
            await store.list(Claim)
            await store.close()

        asyncio.run(main())

    def test_files_gone_for_a_while_change_nothing(self, kube: Cluster, folder: Path, token: str) -> None:
        (folder / "token").write_text(token)

        async def main() -> None:
            store = await KubeStore.open(KubeSettings(service_account=str(folder), look=0.05))
            await store.list(Claim)
            os.rename(folder / "token", folder / "away")
            await asyncio.sleep(0.1)
            await store.list(Claim)
            os.rename(folder / "away", folder / "token")
            await store.close()
            os.remove(folder / "token")
            with pytest.raises(UnavailableError, match="no credentials"):
                await KubeStore.open(KubeSettings(service_account=str(folder)))

        asyncio.run(main())


class TestKubeconfig:
    def test_file_is_replaced(self, kube: Cluster, tmp_path: Path, token: str) -> None:
        first = doomed(kube, "spt-config")
        path = write_kubeconfig(f"{tmp_path}/config", kube, kube.place.url, {"token": first})

        async def main() -> None:
            store = await KubeStore.open(KubeSettings(kubeconfig=path, look=3600))
            revoke(kube, "spt-config")
            await refused(store)
            write_kubeconfig(path, kube, kube.place.url, {"token": token})
            await store.list(Claim)
            await store.close()

        asyncio.run(main())

    def test_token_file_is_replaced(self, kube: Cluster, tmp_path: Path, token: str) -> None:
        (tmp_path / "token").write_text("not one")
        path = write_kubeconfig(f"{tmp_path}/config", kube, kube.place.url, {"tokenFile": "token"})

        async def main() -> None:
            store = await KubeStore.open(KubeSettings(kubeconfig=path, look=0.05))
            with pytest.raises(UnavailableError, match="credentials"):
                await store.list(Claim)
            replace_file(f"{tmp_path}/token", token)
            await store.list(Claim)
            await store.close()

        asyncio.run(main())

    def test_client_certificate_is_replaced(self, kube: Cluster, tmp_path: Path) -> None:
        pki = kube.place.pki
        Authority(pki).issue("spt-cert", "spt-somebody")
        for name in ("crt", "key"):
            (tmp_path / name).write_text(Path(f"{pki}/spt-cert.{name}").read_text())
        admin = {name: Path(f"{pki}/admin.{name}").read_text() for name in ("crt", "key")}
        user = {"client-certificate": "crt", "client-key": "key"}
        path = write_kubeconfig(f"{tmp_path}/config", kube, kube.place.url, user)

        async def main() -> None:
            store = await KubeStore.open(KubeSettings(kubeconfig=path, look=0.05))
            with pytest.raises(Exception, match='User "spt-somebody" cannot'):
                await store.list(Claim)
            for name, content in admin.items():
                replace_file(f"{tmp_path}/{name}", content)
            await asyncio.sleep(0.1)
            await store.list(Claim)
            await store.close()

        asyncio.run(main())

    def test_plugin_runs_once_and_again_when_refused(self, kube: Cluster, tmp_path: Path, token: str) -> None:
        first = doomed(kube, "spt-plugin")
        plugin, runs = tmp_path / "plugin", tmp_path / "runs"
        (tmp_path / "token").write_text(first)
        credential = {"apiVersion": "client.authentication.k8s.io/v1", "kind": "ExecCredential"}
        plugin.write_text(
            f"#!{sys.executable}\nimport json\nopen({str(runs)!r}, 'a').write('x')\n"
            f"print(json.dumps({json.dumps(credential)} | "
            f"{{'status': {{'token': open({str(tmp_path / 'token')!r}).read()}}}}))\n"
        )
        plugin.chmod(plugin.stat().st_mode | stat.S_IXUSR)
        user = {"exec": {"apiVersion": credential["apiVersion"], "command": str(plugin), "interactiveMode": "Never"}}
        path = write_kubeconfig(f"{tmp_path}/config", kube, kube.place.url, user)

        async def main() -> None:
            store = await KubeStore.open(KubeSettings(kubeconfig=path, look=0.05))
            for _ in range(5):
                await store.list(Claim)
                await asyncio.sleep(0.06)
            assert runs.read_text() == "x"
            revoke(kube, "spt-plugin")
            await refused(store)
            (tmp_path / "token").write_text(token)
            await store.list(Claim)
            plugin.write_text("#!/bin/false\n")
            with pytest.raises(UnavailableError, match="plugin"):
                await KubeStore.open(KubeSettings(kubeconfig=path))
            await store.close()

        asyncio.run(main())

    def test_tls_is_verified_or_refused(self, kube: Cluster, tmp_path: Path, token: str) -> None:
        path = write_kubeconfig(f"{tmp_path}/config", kube, kube.place.url, {"token": token})
        content = json.loads(Path(path).read_text())
        for cluster, complaint in (
            ({"server": kube.place.url, "insecure-skip-tls-verify": True}, "insecure-skip-tls-verify"),
            ({"server": kube.place.url.replace("https", "http")}, "without TLS"),
        ):
            content["clusters"][0]["cluster"] = cluster
            Path(path).write_text(json.dumps(content))
            with pytest.raises(UnavailableError, match=complaint):
                asyncio.run(KubeStore.open(KubeSettings(kubeconfig=path)))
        content["clusters"][0]["cluster"] = {"server": kube.place.url}  # the system's authorities, none of which it has
        Path(path).write_text(json.dumps(content))

        async def main() -> None:
            store = await KubeStore.open(KubeSettings(kubeconfig=path, deadline=2))
            with pytest.raises(UnavailableError, match="certificate"):
                await store.get(Claim, "10.0.0.1")
            await store.close()

        asyncio.run(main())

    def test_names_that_no_object_can_have_reach_no_url(self, kube: Cluster) -> None:
        async def main() -> None:
            store = await KubeStore.open(KubeSettings(kubeconfig=kube.admin))
            for name in ("", ".", "..", "../spiderippools", "a/b", "a?watch=1", "%2e%2e"):
                with pytest.raises(NotFoundError):
                    await store.get(Claim, name)
                with pytest.raises(NotFoundError):
                    await store.delete(Claim, name)
            await store.close()

        asyncio.run(main())
