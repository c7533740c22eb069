"""Four sites with kits, one of which lies in every way, in memory and over TLS: the others end as without it."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

import tiny
from deployed import Deployed, document, over_tls, quickly, without_waiting
from lies import (
    LIES,
    complains_of_one_and_keeps_to_it,
    gives_false_shares,
    spoils_a_share_and_reveals_nothing,
    spoils_a_share_and_vanishes,
)
from protected import Lie
from silotune.config import from_mapping
from silotune.deploy.kits import site_folder
from silotune.errors import ProtectionError
from silotune.experiment.audit import verify_run
from silotune.federation.site.state import Protection, Site
from silotune.privacy.secure_sum.stages import Stage
from silotune.record.audit import FILE
from silotune.record.chain import read_chain
from silotune.record.runs import RunFolder
from silotune.structs import Reply, Request
from silotune.transports import trainer_host

pytestmark = pytest.mark.end_to_end
NAMES, WHO = ("client-0", "client-1", "client-2", "client-3"), "client-1"
OUT = {name: lie for name, (lie, _, is_in) in LIES.items() if not is_in and "malformed" not in name}
IN = {name: lie for name, (lie, _, is_in) in LIES.items() if is_in and "malformed" not in name}
ROUNDS: list[tuple[str, Lie, bool]] = [
    *((name, OUT[name], False) for name in ("wrong keys", "keys that are none", "garbage shares to all")),
    *((name, OUT[name], False) for name in ("too few shares", "wrong commitments", "complaints about all")),
    *((name, IN[name], True) for name in ("a wrong signature", "wrong shares revealed", "shares of keys")),
    ("a complaint about one", complains_of_one_and_keeps_to_it, True),
    ("a spoilt share, then nothing revealed", spoils_a_share_and_reveals_nothing, True),
    ("a spoilt share, then gone", spoils_a_share_and_vanishes, False),
    ("shares of no secret", gives_false_shares("seed"), False),
]
"""Round after round: how the site lies, and whether its input is in the sum all the same."""


class Teller:
    """One site's answers in a deployed run, changed before the site signs them; the lie's view of a site."""

    who = WHO

    def __init__(self, lies: Sequence[Lie]) -> None:
        self.lies, self.seen = lies, list[Reply]()
        self.site: Site | None = None
        self.before: Stage | None = None

    @property
    def liar(self) -> Protection:
        assert self.site is not None and self.site.protection is not None
        return self.site.protection

    def work(self, honest: Callable[[Request, Site], Reply], request: Request, site: Site) -> Reply:
        before = site.protection.stage if site.protection is not None else None
        reply = honest(request, site)
        self.seen.append(reply)
        if site.name != WHO or not request.kind.startswith("secure_sum."):
            return reply
        self.site, self.before = site, before
        changed = self.lies[request.round_number - 1](self, request, reply)
        if changed is None:
            raise ProtectionError("this site is away")
        return changed


@pytest.fixture(scope="module")
def deployed(tmp_path_factory: pytest.TempPathFactory, tiny_folder: Path) -> Iterator[Deployed]:
    with quickly():
        yield Deployed(tmp_path_factory.mktemp("tls") / "f", tiny_folder, NAMES)


@pytest.fixture
def asked(tiny_folder: Path, tmp_path: Path) -> Callable[[int], dict[str, Any]]:
    """A run of so many rounds."""
    return lambda rounds: document(
        tiny_folder, tmp_path / "runs", privacy={"protection": {"type": "secure_sum", "max_examples": 64}},
        federation={"rounds": rounds}, data={"partition": {"clients": 4, "scheme": "iid"}},
    )  # fmt: skip


@contextmanager
def lying(lies: Sequence[Lie]) -> Iterator[pytest.MonkeyPatch]:
    """Inside, one site lies so in one round after the other."""
    teller, honest = Teller(lies), trainer_host.client_round
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(trainer_host, "client_round", lambda request, site: teller.work(honest, request, site))
        yield patch


def in_memory(deployed: Deployed, asked: Mapping[str, Any], lies: Sequence[Lie], *, name: str) -> RunFolder:
    with lying(lies), without_waiting():
        return deployed.run(from_mapping({**asked, "record": {"name": name, "energy": False}}))


def is_away(net: Teller, request: Request, reply: Reply) -> None:
    return None


def answers(net: Teller, request: Request, reply: Reply) -> Reply:
    return reply


def failures(run: RunFolder) -> Iterator[Mapping[str, str]]:
    for row in run.part("federated").read_rows("metrics"):
        yield from row["failures"]


def check(deployed: Deployed, run: RunFolder, without: RunFolder, rounds: Sequence[tuple[str, Lie, bool]]) -> None:
    tiny.assert_same_bits(*(made.part("federated").load_adapter()[0] for made in (run, without)))
    in_sum = [row["clients_in_sum"] for row in run.part("federated").read_rows("clients")]
    assert in_sum == [4 if is_in else 3 for _, _, is_in in rounds]
    assert {failure["client"] for failure in failures(run)} == {WHO}
    assert "do not give its seed" in list(failures(run))[-1]["reason"]
    blamed = [entry.fields for entry in read_chain(run.part("federated").path / FILE) if entry.event == "failure"]
    assert {fields["client"] for fields in blamed} == {WHO}
    assert any("do not give its seed" in fields["reason"] for fields in blamed)
    keys = deployed.kit.members().signing_keys()
    found = verify_run(run.path, keys=keys, sites=[site_folder(deployed.site(site)) for site in NAMES])
    assert found.has_adapter and set(found.witnesses) == set(NAMES)


def honest_of(rounds: Sequence[tuple[str, Lie, bool]]) -> list[Lie]:
    return [answers if is_in else is_away for _, _, is_in in rounds]


def test_a_run_in_which_a_site_lies_in_every_way_ends_with_the_bits_of_honest_sites(
    deployed: Deployed, asked: Callable[[int], dict[str, Any]]
) -> None:
    run = in_memory(deployed, asked(len(ROUNDS)), [lie for _, lie, _ in ROUNDS], name="lying")
    check(deployed, run, in_memory(deployed, asked(len(ROUNDS)), honest_of(ROUNDS), name="honest"), ROUNDS)


def test_the_same_over_tls(deployed: Deployed, asked: Callable[[int], dict[str, Any]]) -> None:
    """Two kinds: left out before the sum, and found out when the sum was to be opened, which is done again."""
    kinds = ("garbage shares to all", "shares of no secret")
    rounds = [row for row in ROUNDS if row[0] in kinds]
    with over_tls(deployed), lying([lie for _, lie, _ in rounds]):
        run = deployed.submitted(asked(len(rounds)))
    check(deployed, run, in_memory(deployed, asked(len(rounds)), honest_of(rounds), name="without"), rounds)
