"""Fresh keys of protected sums for sites that live in one process."""

from __future__ import annotations

from collections.abc import Iterable

from silotune.federation.site.state import Protection
from silotune.privacy.encryption import new_key
from silotune.privacy.secure_sum.terms import Member
from silotune.settings.protections import EncryptedSum, SecureSum, SumSettings
from silotune.settings.sections import PrivacySection


def members(names: Iterable[str], privacy: PrivacySection) -> dict[str, Protection]:
    """Fresh keys for sites that live in one process; real sites have theirs from their kits.

    Returns:
        Site -> its keys; empty where nothing is protected.
    """
    protection = privacy.protection
    if not isinstance(protection, SumSettings):
        return {}
    from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

    private = {name: Ed25519PrivateKey.generate() for name in names}
    public = {name: key.public_key().public_bytes_raw() for name, key in private.items()}
    he_key = new_key() if isinstance(protection, EncryptedSum) else None
    threshold = protection.threshold if isinstance(protection, SecureSum) else SecureSum().threshold
    return {
        name: Protection(
            Member(name, key.sign, public, protection.least_clients, threshold),
            is_required=True,
            he_key=he_key,
        )
        for name, key in private.items()
    }
