"""The table of protections: how a round's updates are collected under each, and the keys that sites need for it."""

from __future__ import annotations

from collections.abc import Callable, Mapping

from silotune.federation.coordinator.encrypted_sum import encrypted_sum
from silotune.federation.coordinator.exchange import Collector, SigningKeys
from silotune.federation.coordinator.secure_sum import secure_sum
from silotune.settings.privacy import EncryptedSum, NoProtection, ProtectionSettings, SecureSum
from silotune.settings.sections import PrivacySection

PROTECTIONS: Mapping[type[ProtectionSettings], Callable[[PrivacySection, SigningKeys], Collector | None]] = {
    NoProtection: lambda privacy, keys: None,
    SecureSum: secure_sum,
    EncryptedSum: lambda privacy, keys: encrypted_sum(privacy),
}
"""Settings -> builder of a round's collector, from settings and the keys that clients sign with; None where each
client's update is seen."""

SEES: Mapping[type[ProtectionSettings], str] = {
    NoProtection: "the coordinator sees each institution's update, number of examples and figures",
    SecureSum: "the coordinator sees the sum of the institutions' updates, examples and figures, and who took part; "
    "of a single institution it sees masked integers, even if it does not keep to the protocol",
    EncryptedSum: "the coordinator sees ciphertexts and, opened by one of the institutions, their sum; it holds no "
    "key, and is trusted not to have a single update opened",
}
"""Settings -> what the coordinator sees of a round, in one sentence."""


TRUSTED: Mapping[type[ProtectionSettings], str] = {
    NoProtection: "the server, and whoever gets the model",
    SecureSum: "the institutions, of which fewer than 2 x privacy.protection.threshold - 1 work with the server "
    "against one of them, and whoever gets the model; not the server",
    EncryptedSum: "the server, not to have a single update opened; every institution, with the key that all of them "
    "share; and whoever gets the model",
}
"""Settings -> who must be trusted where nothing is noised."""
