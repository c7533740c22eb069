"""The federation's own certificate authority, the server's certificate, node keys, and a site's signing requests."""

from __future__ import annotations

import ipaddress
from collections.abc import Iterable
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from typing import TYPE_CHECKING

from cryptography import x509
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PublicKey
from cryptography.hazmat.primitives.serialization import (
    Encoding,
    NoEncryption,
    PrivateFormat,
    PublicFormat,
    load_pem_private_key,
)
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID

from silotune.errors import KitError

if TYPE_CHECKING:
    from silotune.record.signatures import SigningKey

_END = "-----END CERTIFICATE REQUEST-----"
_CLOCK_SLACK = timedelta(hours=1)
"""Certificates become valid a little before they are made, because clocks differ."""


@dataclass(frozen=True)
class Pair:
    """A private key and its certificate or public key, as file contents."""

    private: bytes
    public: bytes


def new_authority(federation: str, *, days: int) -> Pair:
    """A self-signed authority (ECDSA P-384) that may sign servers' certificates, but no further authorities."""
    key = ec.generate_private_key(ec.SECP384R1())
    name = _name(f"{federation} authority")
    built = (
        _builder(name, name, key.public_key(), days=days)
        .add_extension(x509.BasicConstraints(ca=True, path_length=0), critical=True)
        .add_extension(_usage(signs_certificates=True), critical=True)
        .add_extension(x509.SubjectKeyIdentifier.from_public_key(key.public_key()), critical=False)
    )
    return Pair(_pem(key), built.sign(key, hashes.SHA384()).public_bytes(Encoding.PEM))


def new_server(authority: Pair, hosts: Iterable[str], *, days: int) -> Pair:
    """A server key and its certificate for these host names and IP addresses."""
    named = tuple(dict.fromkeys(hosts))
    issuer_key = load_pem_private_key(authority.private, password=None)
    issuer = x509.load_pem_x509_certificate(authority.public)
    if not isinstance(issuer_key, ec.EllipticCurvePrivateKey):
        raise KitError("the authority's key is not the one that 'silotune provision' made")
    key = ec.generate_private_key(ec.SECP384R1())
    built = (
        _builder(_name(named[0]), issuer.subject, key.public_key(), days=days)
        .add_extension(x509.BasicConstraints(ca=False, path_length=None), critical=True)
        .add_extension(_usage(signs_certificates=False), critical=True)
        .add_extension(x509.ExtendedKeyUsage([ExtendedKeyUsageOID.SERVER_AUTH]), critical=False)
        .add_extension(x509.SubjectAlternativeName([_general(host) for host in named]), critical=False)
        .add_extension(x509.AuthorityKeyIdentifier.from_issuer_public_key(issuer_key.public_key()), critical=False)
    )
    return Pair(_pem(key), built.sign(issuer_key, hashes.SHA384()).public_bytes(Encoding.PEM))


def new_node_key() -> tuple[ec.EllipticCurvePrivateKey, Pair]:
    """A key of Flower's node authentication: ECDSA P-384, both halves in OpenSSH's format."""
    key = ec.generate_private_key(ec.SECP384R1())
    private = key.private_bytes(Encoding.PEM, PrivateFormat.OpenSSH, NoEncryption())
    return key, Pair(private, key.public_key().public_bytes(Encoding.OpenSSH, PublicFormat.OpenSSH))


def signing_request(site: str, node: ec.EllipticCurvePrivateKey, signing: SigningKey) -> bytes:
    """Two PKCS #10 requests in one PEM file, for the node key and the signing key; each proves that the site has it."""
    made = []
    for key, algorithm in ((node, hashes.SHA384()), (signing.private, None)):
        built = x509.CertificateSigningRequestBuilder().subject_name(_name(site))
        made.append(built.sign(key, algorithm).public_bytes(Encoding.PEM))
    return b"".join(made)


def read_request(content: bytes, *, source: str) -> tuple[str, str, str]:
    """The site's name, its public node key and its public signing key, from a request.

    Raises:
        KitError: The file is not such a request, or does not prove that the site has the private keys.
    """
    texts = [part + _END + "\n" for part in content.decode(errors="replace").split(_END)[:-1]]
    try:
        read = [x509.load_pem_x509_csr(text.encode()) for text in texts]
        names = {str(item.subject.get_attributes_for_oid(NameOID.COMMON_NAME)[0].value) for item in read}
        keys = [item.public_key() for item in read]
        is_proven = all(item.is_signature_valid for item in read)
    except (ValueError, IndexError):
        read, names, keys, is_proven = [], set(), [], False
    if len(read) != 2 or len(names) != 1 or not is_proven:
        raise KitError(f"{source!r} is not a request that 'silotune provision request' wrote")
    node, signing = keys
    if not isinstance(node, ec.EllipticCurvePublicKey) or not isinstance(node.curve, ec.SECP384R1):
        raise KitError(f"{source!r}: its first key is not ECDSA P-384")
    if not isinstance(signing, Ed25519PublicKey):
        raise KitError(f"{source!r}: its second key is not Ed25519")
    lines = [key.public_bytes(Encoding.OpenSSH, PublicFormat.OpenSSH).decode() for key in (node, signing)]
    return names.pop(), lines[0], lines[1]


def validity(content: bytes, *, source: str) -> tuple[datetime, datetime]:
    """Since when and until when a certificate in PEM holds.

    Raises:
        KitError: It is no certificate.
    """
    try:
        read = x509.load_pem_x509_certificate(content)
    except ValueError:
        raise KitError(f"{source!r} is not a certificate: unpack the kit again") from None
    return read.not_valid_before_utc, read.not_valid_after_utc


def _builder(
    subject: x509.Name, issuer: x509.Name, key: ec.EllipticCurvePublicKey, *, days: int
) -> x509.CertificateBuilder:
    now = datetime.now(UTC)
    return (
        x509.CertificateBuilder()
        .subject_name(subject)
        .issuer_name(issuer)
        .public_key(key)
        .serial_number(x509.random_serial_number())
        .not_valid_before(now - _CLOCK_SLACK)
        .not_valid_after(now + timedelta(days=days))
    )


def _usage(*, signs_certificates: bool) -> x509.KeyUsage:
    return x509.KeyUsage(
        digital_signature=not signs_certificates, content_commitment=False, key_encipherment=False,
        data_encipherment=False, key_agreement=False, key_cert_sign=signs_certificates, crl_sign=signs_certificates,
        encipher_only=False, decipher_only=False,
    )  # fmt: skip


def _name(common: str) -> x509.Name:
    return x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, common[:64])])


def _general(host: str) -> x509.GeneralName:
    try:
        return x509.IPAddress(ipaddress.ip_address(host))
    except ValueError:
        return x509.DNSName(host)


def _pem(key: ec.EllipticCurvePrivateKey) -> bytes:
    return key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption())
