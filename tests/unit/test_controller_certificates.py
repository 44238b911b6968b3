"""When certificates are renewed: at no time is one shown whose authority was not announced before."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest
from cryptography import x509 as cryptography_x509
from hypothesis import given, settings
from hypothesis import strategies as st

from controller.certificates import plan, x509
from controller.certificates.plan import Material, Policy
from controller.certificates.serving import authorities_of
from controller.settings import TlsSettings

NOW = datetime(2026, 5, 1, tzinfo=UTC)
DAY = timedelta(days=1)
POLICY = Policy(authority=3650 * DAY, server=90 * DAY, overlap=timedelta(hours=1))
NAMES = ("spiderpool-controller.kube-system.svc", "127.0.0.1", "::1")


def test_what_is_issued_is_what_tls_wants() -> None:
    material = plan.first(NOW, POLICY, NAMES)
    assert x509.names_of(material.server.certificate) == frozenset(NAMES)
    assert x509.signed_by(material.server.certificate, material.signer.certificate)
    server, signer = x509.parse(material.server.certificate), x509.parse(material.signer.certificate)
    assert server.not_valid_before_utc < NOW < NOW + 89 * DAY < server.not_valid_after_utc
    assert signer.extensions.get_extension_for_class(cryptography_x509.BasicConstraints).value.ca
    assert not server.extensions.get_extension_for_class(cryptography_x509.BasicConstraints).value.ca
    assert material.bundle == material.signer.certificate
    assert "PRIVATE" not in repr(material)


def test_the_secret_tells_all_of_it() -> None:
    material = plan.first(NOW, POLICY, NAMES)
    announced = plan.renewed(material, NOW + 3000 * DAY, POLICY, NAMES, announced=True)
    assert announced.following is not None
    for each in (material, announced):
        assert plan.from_data(plan.to_data(each)) == each


def test_whom_to_trust_for_a_certificate_from_elsewhere(tmp_path: Path) -> None:
    material = plan.first(NOW, POLICY, NAMES)
    server, root = material.server.certificate, material.signer.certificate
    certificate, authorities = tmp_path / "tls.crt", tmp_path / "ca.crt"
    certificate.write_bytes(server)
    (tmp_path / "tls.key").write_bytes(material.server.key)

    def trusted() -> bytes:
        TlsSettings(server_cert=str(certificate), server_key=str(tmp_path / "tls.key"))
        return authorities_of(str(certificate), str(authorities))

    with pytest.raises(
        ValueError, match=r"server_ca is '': .*ca\.crt is missing or empty.* no certificate that signed"
    ):
        trusted()
    authorities.write_bytes(b"\n")
    with pytest.raises(ValueError, match="is missing or empty"):
        trusted()
    certificate.write_bytes(server + root)
    assert trusted() == root
    certificate.write_bytes(root)
    assert trusted() == root
    authorities.write_bytes(server)
    assert trusted() == server, "what is given counts, whatever it is"
    authorities.write_bytes(b"-----BEGIN CERTIFICATE-----")
    with pytest.raises(ValueError, match="has no certificates"):
        trusted()


@pytest.mark.parametrize(
    "damage",
    [
        {"tls.key": b""},
        {"tls.crt": b"junk"},
        {"ca.crt": b""},
        {"signer.key": plan.first(NOW, POLICY, NAMES).signer.key},
        {"ca.crt": plan.first(NOW, POLICY, NAMES).bundle},
        {"following.crt": b"junk", "following.key": b"junk"},
    ],
    ids=",".join,
)
def test_a_secret_that_makes_no_sense_is_none(damage: dict[str, bytes]) -> None:
    data = plan.to_data(plan.first(NOW, POLICY, NAMES))
    assert plan.from_data(data) is not None
    assert plan.from_data(data | damage) is None
    for key in damage:
        if not key.startswith("following"):
            assert plan.from_data({name: value for name, value in data.items() if name != key}) is None


@pytest.mark.parametrize("name", ["fd00:0:0::1", "FD00::1", "Mixed.Example", "10.0.0.1"])
def test_a_name_spelt_otherwise_is_no_reason_for_certificates_without_end(name: str) -> None:
    material = plan.first(NOW, POLICY, [name])
    assert plan.renewed(material, NOW, POLICY, [name], announced=True) == material


def test_what_is_due_but_not_announced_is_no_reason_to_hurry() -> None:
    material = plan.renewed(plan.first(NOW, POLICY, NAMES), NOW + 3000 * DAY, POLICY, NAMES, announced=True)
    later = NOW + 3001 * DAY
    waiting = plan.renewed(material, later, POLICY, NAMES, announced=False)
    assert waiting == material
    assert plan.next_look(waiting, later, POLICY) >= 1


def test_other_names_need_another_certificate_at_once() -> None:
    material = plan.first(NOW, POLICY, NAMES)
    again = plan.renewed(material, NOW, POLICY, ("other.svc",), announced=True)
    assert again.signer == material.signer
    assert x509.names_of(again.server.certificate) == {"other.svc"}
    assert plan.renewed(material, NOW, POLICY, reversed(NAMES), announced=True) == material


def test_nothing_is_usable_beyond_its_time() -> None:
    material = plan.first(NOW, POLICY, NAMES)
    assert plan.usable(material, NOW + 89 * DAY)
    assert not plan.usable(material, NOW + 91 * DAY)
    assert not plan.usable(material, NOW - DAY)
    stranger = plan.first(NOW, POLICY, NAMES)
    assert not plan.usable(Material(stranger.signer, material.server, stranger.trusted), NOW)


def test_after_a_loss_known_authorities_go_on_being_trusted() -> None:
    old = plan.first(NOW, POLICY, NAMES)
    dead = x509.new_authority(NOW - 10 * DAY, DAY).certificate
    fresh = plan.first(NOW, POLICY, NAMES, [old.signer.certificate, dead])
    assert fresh.trusted == (old.signer.certificate, fresh.signer.certificate)
    later = plan.renewed(fresh, NOW + timedelta(hours=2), POLICY, NAMES, announced=True)
    assert later.trusted == (fresh.signer.certificate,)


@given(
    steps=st.lists(st.tuples(st.integers(1, 200), st.booleans()), min_size=10, max_size=10),
    authority=st.integers(60, 400),
    server=st.integers(30, 60),
)
@settings(max_examples=10, deadline=None)
def test_whoever_verifies_by_an_announced_bundle_accepts_what_is_shown(
    steps: list[tuple[int, bool]], authority: int, server: int
) -> None:
    """Announcements may fail for any time; the leader looks every few hours to days."""
    policy = Policy(authority=authority * DAY, server=server * DAY, overlap=timedelta(hours=1))
    now = NOW
    material = plan.first(now, policy, NAMES)
    announced = material.trusted
    for hours, reachable in steps * 5:
        now += timedelta(hours=hours)
        if not plan.usable(material, now):
            return  # announcements failed for weeks: from then on it is another story
        complete = announced == material.trusted
        if reachable:
            announced = material.trusted
        before = material
        material = plan.renewed(material, now, policy, NAMES, announced=complete and reachable)
        assert any(x509.signed_by(material.server.certificate, pem) for pem in announced)
        assert any(x509.signed_by(before.server.certificate, pem) for pem in material.trusted)
        assert len(material.trusted) <= 3
        if material == before:
            assert plan.next_look(material, now, policy) >= 0
