"""Kits of a federation on 127.0.0.1, made in a second, for tests that start real processes."""

from __future__ import annotations

import datetime
import ipaddress
import json
import socket
from collections.abc import Sequence
from pathlib import Path

from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import NameOID

from silotune.record.signatures import new_key, private_bytes, write_secret


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def pem(key: ec.EllipticCurvePrivateKey) -> bytes:
    return key.private_bytes(
        serialization.Encoding.PEM, serialization.PrivateFormat.OpenSSH, serialization.NoEncryption()
    )


def certificate(name: str, key, issuer, issuer_key, *, days: int = 1, authority: bool = False):  # noqa: ANN001, ANN201
    subject = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, name)])
    now = datetime.datetime.now(datetime.UTC)
    made = (
        x509.CertificateBuilder()
        .subject_name(subject)
        .issuer_name(issuer.subject if issuer else subject)
        .public_key(key.public_key())
        .serial_number(x509.random_serial_number())
        .not_valid_before(now - datetime.timedelta(days=2))
        .not_valid_after(now + datetime.timedelta(days=days))
        .add_extension(x509.BasicConstraints(ca=authority, path_length=None), critical=True)
    )
    if not authority:
        names = x509.SubjectAlternativeName([x509.IPAddress(ipaddress.ip_address("127.0.0.1"))])
        made = made.add_extension(names, critical=False)
    return made.sign(issuer_key or key, hashes.SHA256())


def make(folder: Path, sites: Sequence[str], *, server_days: int = 1) -> Path:
    """``folder/coordinator`` and ``folder/<site>``, all on one free port."""
    port = free_port()
    authority_key, server_key = ec.generate_private_key(ec.SECP256R1()), ec.generate_private_key(ec.SECP256R1())
    authority = certificate("authority", authority_key, None, None, authority=True)
    server = certificate("coordinator", server_key, authority, authority_key, days=server_days)
    address = {"host": "127.0.0.1", "fleet_port": port, "control_port": port}
    lines = "\n".join(f"{key} = {json.dumps(value)}" for key, value in address.items())
    members = []
    for name in sites:
        own = folder / name
        own.mkdir(parents=True)
        key = ec.generate_private_key(ec.SECP384R1())
        (own / "auth.key").write_bytes(pem(key))
        (own / "auth.key").chmod(0o600)
        (own / "ca.crt").write_bytes(authority.public_bytes(serialization.Encoding.PEM))
        (own / "site.toml").write_text(f'federation = "test"\nsite = "{name}"\n[coordinator]\n{lines}\n')
        signing = new_key()
        write_secret(own / "signing.key", private_bytes(signing))
        (own / "policy.toml").write_text("format = 1\n")
        public = key.public_key().public_bytes(serialization.Encoding.OpenSSH, serialization.PublicFormat.OpenSSH)
        members.append({"name": name, "auth_public": public.decode(), "signing_public": signing.public, "since": "now"})
    own = folder / "coordinator"
    own.mkdir()
    (own / "ca.crt").write_bytes(authority.public_bytes(serialization.Encoding.PEM))
    (own / "server.crt").write_bytes(server.public_bytes(serialization.Encoding.PEM))
    (own / "server.key").write_bytes(
        server_key.private_bytes(
            serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
        )
    )
    (own / "server.key").chmod(0o600)
    (own / "coordinator.toml").write_text(f'federation = "test"\nlisten = "127.0.0.1"\n[address]\n{lines}\n')
    signing = new_key()
    write_secret(own / "signing.key", private_bytes(signing))
    document = {"federation": "test", "version": 1, "coordinator": [signing.public], "members": members}
    for name in ("coordinator", *sites):
        (folder / name / "members.json").write_text(json.dumps(document))
    return folder
