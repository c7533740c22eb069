"""The audit trail: what was written verifies, and any damage is found at the first bad entry."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from silotune.errors import AuditError
from silotune.federation.coordinator.course import check_rounds, verify_trail
from silotune.record.audit import FILE, Head, Trail
from silotune.record.chain import has_ended, is_closed, read_chain
from silotune.record.plain_json import canonical, canonical_json, sha256
from silotune.record.signatures import new_key

KEY, OTHER = new_key(), new_key()
END = ("closed", {"round": 2, "manifest": "4" * 64, "files": 0, "trail": FILE})
Damage = Callable[[list[bytes]], list[bytes]]


def write(folder: Path, *, rounds: int = 2, closed: bool = True) -> Path:
    trail = Trail(folder / FILE, KEY, actor="coordinator")
    trail.add("started", {"round": 0, "weights": "0" * 64})
    for number in range(1, rounds + 1):
        trail.add("request", {"kind": "train", "round": number, "client": "a"})
        trail.add("reply", {"kind": "train", "round": number, "client": "a", "tensors": "0" * 64})
        trail.add("aggregation", {"round": number, "clients": ["a"], "weights": "1" * 64})
    trail.add("result", {"round": rounds, "weights": "1" * 64, "adapter": "2" * 64, "result": "3" * 64})
    if closed:
        trail.add(*END)
    trail.flush()
    return folder / FILE


@pytest.fixture(scope="module")
def lines(tmp_path_factory: pytest.TempPathFactory) -> list[bytes]:
    return write(tmp_path_factory.mktemp("trail")).read_bytes().splitlines(keepends=True)


def test_what_was_written_verifies(tmp_path: Path) -> None:
    found = verify_trail(write(tmp_path), keys={"coordinator": [KEY.public]})
    assert [entry.event for entry in found.entries][:3] == ["started", "request", "reply"]
    assert found.is_closed and found.keys == {"coordinator": (KEY.public,)}
    assert found.head == hashlib.sha256((tmp_path / FILE).read_bytes().splitlines()[-1]).hexdigest()


def edited(place: int, **changes: object) -> Damage:
    def damage(lines: list[bytes]) -> list[bytes]:
        entry = {**json.loads(lines[place]), **changes}
        return [*lines[:place], canonical(entry) + b"\n", *lines[place + 1 :]]

    return damage


def linked_again(place: int) -> Damage:
    """An edit by somebody who computes every hash anew, but has no key."""

    def damage(lines: list[bytes]) -> list[bytes]:
        made = edited(place, fields={"forged": True})(lines)
        for number in range(place + 1, len(made)):
            previous = hashlib.sha256(made[number - 1].rstrip(b"\n")).hexdigest()
            made = edited(number, previous=previous)(made)
        return made

    return damage


DAMAGES: dict[str, tuple[Damage, int]] = {
    "edit": (edited(3, fields={"round": 9}), 3),
    "edit of the last": (edited(8, fields={"round": 9}), 8),
    "edit of the time": (edited(4, time=1.5), 4),
    "edit of the first": (edited(0, actor="bank"), 0),
    "edit with all hashes made again": (linked_again(2), 2),
    "deletion": (lambda lines: lines[:4] + lines[5:], 4),
    "deletion of the first": (lambda lines: lines[1:], 0),
    "insertion": (lambda lines: lines[:4] + [lines[2]] + lines[4:], 4),
    "reorder": (lambda lines: [*lines[:3], lines[4], lines[3], *lines[5:]], 3),
    "truncation": (lambda lines: lines[:-1], 8),
    "truncation by half": (lambda lines: lines[:4], 4),
    "torn line": (lambda lines: [*lines[:-1], lines[-1][:40]], 8),
    "no entry": (lambda lines: [*lines[:5], b"{}\n", *lines[6:]], 5),
    "no JSON": (lambda lines: [*lines[:5], b"\xff\n", *lines[6:]], 5),
    "blank within a line": (lambda lines: [*lines[:5], lines[5].replace(b":", b": ", 1), *lines[6:]], 5),
    "wrong type": (edited(5, index="5"), 5),
    "a time that no calendar has": (edited(5, time=10**400), 5),
    "not a number": (lambda lines: [*lines[:5], lines[5].replace(b'"time":', b'"time":NaN,"x":', 1), *lines[6:]], 5),
}


@pytest.mark.parametrize("name", DAMAGES)
def test_damage_is_found_at_the_first_bad_entry(lines: list[bytes], tmp_path: Path, name: str) -> None:
    damage, place = DAMAGES[name]
    (tmp_path / FILE).write_bytes(b"".join(damage(list(lines))))
    with pytest.raises(AuditError, match=rf"^entry {place}\b"):
        verify_trail(tmp_path / FILE, keys={"coordinator": [KEY.public]})


@given(st.data())
@settings(max_examples=25, deadline=None)
def test_no_single_byte_can_change(tmp_path_factory: pytest.TempPathFactory, lines: list[bytes], data) -> None:
    whole = b"".join(lines)
    place = data.draw(st.integers(0, len(whole) - 1))
    changed = bytes([whole[place] ^ (1 << data.draw(st.integers(0, 7)))])
    path = tmp_path_factory.getbasetemp() / FILE
    path.write_bytes(whole[:place] + changed + whole[place + 1 :])
    with pytest.raises(AuditError, match=r"^entry \d+"):
        verify_trail(path, keys={"coordinator": [KEY.public]})


def test_another_key_is_not_the_author_s(tmp_path: Path) -> None:
    with pytest.raises(AuditError, match="entry 0 is signed with none of the keys known for 'coordinator'"):
        verify_trail(write(tmp_path), keys={"coordinator": [OTHER.public]})


def test_a_trail_that_is_not_closed(tmp_path: Path) -> None:
    path = write(tmp_path, closed=False)
    with pytest.raises(AuditError, match="entry 8 is missing: the trail was cut off, or its run has not ended"):
        verify_trail(path)
    assert not verify_trail(path, is_open_allowed=True).is_closed
    with pytest.raises(AuditError, match="there is no audit trail"):
        verify_trail(tmp_path / "nothing.jsonl")


@pytest.mark.parametrize("torn", [b'{"actor":"coord', b'{"actor":"coord\0\0\0\n', b"\0" * 5000, b"\n"])
def test_a_trail_goes_on_behind_a_torn_line(tmp_path: Path, caplog: pytest.LogCaptureFixture, torn: bytes) -> None:
    path = write(tmp_path, closed=False)
    with path.open("ab") as file:
        file.write(torn)
    trail = Trail(path, KEY, actor="coordinator")
    assert trail.entries == 8 and "was torn" in caplog.text
    trail.add(*END)
    trail.flush()
    assert verify_trail(path).is_closed and Trail(path, KEY, actor="coordinator").is_closed


def test_a_trail_does_not_go_on_behind_damage(tmp_path: Path) -> None:
    path = write(tmp_path)
    path.write_bytes(path.read_bytes() + b"{}\n")
    with pytest.raises(AuditError, match="does not end with entry 9"):
        Trail(path, KEY, actor="coordinator")


Steps = tuple[tuple[str, dict], ...]
MODEL, OTHER_MODEL = "0" * 64, "1" * 64
STARTED = ("started", {"round": 0, "weights": MODEL})


def asked(number: int, client: str = "a", kind: str = "train") -> Steps:
    fields = {"kind": kind, "round": number, "client": client}
    return ("request", fields), ("reply", fields)


def one_round(number: int, weights: str = OTHER_MODEL) -> Steps:
    return (*asked(number), ("aggregation", {"round": number, "clients": ["a"], "weights": weights}))


def result(number: int, weights: str) -> tuple[str, dict]:
    return "result", {"round": number, "weights": weights, "adapter": MODEL, "result": MODEL}


def check(tmp_path: Path, *entries: tuple[str, dict]) -> None:
    trail = Trail(tmp_path / FILE, KEY, actor="coordinator")
    for event, fields in entries:
        trail.add(event, fields)
    trail.flush()
    check_rounds(read_chain(tmp_path / FILE))


LEFT_OUT: dict[str, tuple[Steps, str]] = {
    "a round": (
        (STARTED, *one_round(1), ("request", {"kind": "train", "round": 3, "client": "a"})),
        "entry 4: a request of round 3 follows round 1",
    ),
    "a reply": (
        (STARTED, *one_round(1), ("aggregation", {"round": 2, "clients": ["a"], "weights": MODEL})),
        "entry 4: round 2 aggregates other updates",
    ),
    "a request": (
        (STARTED, ("reply", {"kind": "train", "round": 1, "client": "z"})),
        "entry 1: 'z' answers, but was not asked",
    ),
    "one of those who answered": (
        (STARTED, *asked(1), ("aggregation", {"round": 1, "clients": ["a", "b"], "weights": MODEL})),
        "entry 3: round 1 aggregates other updates",
    ),
    "the start": (one_round(1), "entry 0: a coordinator's trail begins with 'started', not 'request'"),
    "an earlier start": ((("started", {"round": 3, "weights": MODEL}),), "entry 0: a run starts once, before round 1"),
    "a second start": ((STARTED, *one_round(1), STARTED), "entry 4: a run starts once"),
    "the model that it goes on from": (
        (STARTED, *one_round(1), ("resumed", {"round": 1, "weights": MODEL})),
        "entry 4: the run goes on from another model than it had after round 1",
    ),
    "the model of a round that was done again": (
        (
            STARTED, *one_round(1), ("resumed", {"round": 0, "weights": MODEL}), *one_round(1, "2" * 64),
            ("resumed", {"round": 1, "weights": OTHER_MODEL}),
        ),
        "entry 8: the run goes on from another model",
    ),
    "rounds that it goes on after": (
        (STARTED, *one_round(1), ("resumed", {"round": 2, "weights": OTHER_MODEL})),
        "entry 4: the run goes on from another model than it had after round 2",
    ),
    "a shortfall's round": (
        (STARTED, *asked(1), ("shortfall", {"round": 4, "tried": 1})),
        "entry 3: round 1 falls short after round 0",
    ),
    "the round of a checkpoint": (
        (STARTED, *one_round(1), ("checkpoint", {"round": 2, "sha256": MODEL})),
        "entry 4: a checkpoint of round 2 in round 1",
    ),
    "the model of the result": (
        (STARTED, *one_round(1), result(1, MODEL)),
        "entry 4: the result is another model than the run had after round 1",
    ),
    "the result": ((STARTED, *one_round(1), END), "entry 4: the trail was closed before its run had a result"),
    "the result of rounds after another": (
        (STARTED, *one_round(1), result(1, OTHER_MODEL), *one_round(2), END),
        "entry 8: the trail was closed before its run had a result",
    ),
    "that it was closed": (
        (STARTED, result(0, MODEL), END, ("evaluation", {"round": 1})),
        "entry 3 follows the one that closed the trail",
    ),
    "a number": ((STARTED, ("request", {"kind": "train", "round": "1", "client": "a"})), "entry 1 is not one of"),
    "a list": (
        (STARTED, *asked(1), ("aggregation", {"round": 1, "clients": "a", "weights": MODEL})),
        "entry 3 is not one of 'aggregation': its 'clients' is missing or of another type",
    ),
    "a manifest": ((STARTED, result(0, MODEL), ("closed", {"round": 0})), "entry 2 is not one of 'closed'"),
}  # fmt: skip


@pytest.mark.parametrize("name", LEFT_OUT)
def test_what_the_author_left_out_or_made_up(tmp_path: Path, name: str) -> None:
    entries, why = LEFT_OUT[name]
    with pytest.raises(AuditError, match=why):
        check(tmp_path, *entries)


def test_a_course_with_all_that_can_happen(tmp_path: Path) -> None:
    check(
        tmp_path,
        STARTED,
        *one_round(1),
        ("checkpoint", {"round": 1, "sha256": MODEL}),
        *asked(2),
        ("shortfall", {"round": 1, "tried": 2}),  # tried again
        *asked(2),
        ("shortfall", {"round": 2, "tried": 2}),  # and passed over
        ("checkpoint", {"round": 2, "sha256": MODEL}),
        *one_round(3, "3" * 64),
        ("resumed", {"round": 2, "weights": OTHER_MODEL}),  # killed before the checkpoint of round 3
        *one_round(3, "4" * 64),
        result(3, "4" * 64),
        ("resumed", {"round": 3, "weights": "4" * 64}),  # killed before the result was written
        *asked(7, kind="personalize"),
        *asked(3, kind="evaluate"),
        result(1, OTHER_MODEL),  # the best round
        END,
    )


def test_a_trail_has_one_author_and_only_a_coordinator_ends_one(tmp_path: Path) -> None:
    """A site with a key of its own cannot put its own trail in the place of the coordinator's."""
    trail = Trail(tmp_path / FILE, OTHER, actor="bank-a")
    trail.add("request", {"round": 1})
    trail.add(*END)
    trail.flush()
    with pytest.raises(AuditError, match="entry 2 is missing"):
        verify_trail(tmp_path / FILE)
    trail = Trail(tmp_path / FILE, KEY, actor="coordinator")
    trail.add(*STARTED)
    trail.flush()
    with pytest.raises(AuditError, match="entry 2 is by 'coordinator', but the trail is that of 'bank-a'"):
        verify_trail(tmp_path / FILE, is_open_allowed=True)


def test_a_trail_that_has_ended_is_told_by_its_last_whole_line(tmp_path: Path) -> None:
    assert not is_closed(tmp_path / FILE) and not has_ended(tmp_path)
    path = write(tmp_path)
    assert is_closed(path)
    path.write_bytes(path.read_bytes() + b'{"event":"st')
    assert is_closed(path)
    for end in (b"{}\n", b"[]\n", b"\xff\n", b"[" * 5000 + b"\n"):
        (tmp_path / "other").write_bytes(path.read_bytes() + b"\n" + end)
        assert not is_closed(tmp_path / "other")
    run = tmp_path / "run"
    (run / "federated").mkdir(parents=True)
    (run / "summary.json").write_text("{}")
    assert has_ended(run)  # a run without a trail
    write(run / "federated", closed=False)
    assert not has_ended(run)


def test_a_head_is_signed_and_readable() -> None:
    trail = Trail(Path("never-written"), KEY, actor="coordinator")
    head = trail.head()
    assert Head.parse(head.text()) == head
    assert head.is_signed_by(OTHER.public, KEY.public) and not head.is_signed_by(OTHER.public)
    assert not Head(1, head.hash, head.signature).is_signed_by(KEY.public)
    for text in ("", "1", "x:" + "0" * 64 + ":s", "1:00:s", "1:" + "0" * 64 + ":", "٣:" + "0" * 64 + ":s"):
        with pytest.raises(AuditError, match="cannot be read"):
            Head.parse(text)


def test_canonical_text() -> None:
    assert canonical({"b": 1.0, "a": (Path("x"), None, float("nan")), "ä": "é"}) == (
        '{"a":["x",null,null],"b":1.0,"ä":"é"}'.encode()
    )
    assert canonical({"a": 1, "b": 2}) == canonical({"b": 2, "a": 1}) == canonical_json({"a": 1, "b": 2})
    assert sha256({}) == hashlib.sha256(b"{}").hexdigest()
