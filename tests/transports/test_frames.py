"""Frames over a private socket: what is sent arrives, and nothing else is believed."""

from __future__ import annotations

import os
import socket
import struct
import threading
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from silotune.errors import FederationError, MessageError
from silotune.transports import frames
from silotune.transports.frames import Frame, NoAnswerError


def passed(data: bytes, **limits: int) -> Frame:
    """A frame as a receiver reads these bytes, after which the sender is gone."""
    left, right = socket.socketpair()
    with left, right:
        threading.Thread(target=lambda: (left.sendall(data), left.close()), daemon=True).start()
        return frames.receive(right, **limits)


def sent(frame: Frame) -> bytes:
    left, right = socket.socketpair()
    with right, left:
        frames.send(left, frame)
        left.shutdown(socket.SHUT_WR)
        parts = []
        while part := right.recv(1 << 16):
            parts.append(part)
    return b"".join(parts)


WORDS = st.text(st.characters(blacklist_categories=["Cc", "Cs", "Cf", "Zl", "Zp", "Cn"]), max_size=8)


@settings(max_examples=20, deadline=None)
@given(st.dictionaries(WORDS, st.one_of(st.none(), st.integers(-(2**62), 2**62), WORDS)), st.binary())
def test_what_is_sent_arrives(header: dict, payload: bytes) -> None:
    frame = passed(sent(Frame(header, payload)))
    assert (frame.header, frame.payload) == (header, payload)


@settings(max_examples=25, deadline=None)
@given(st.binary(max_size=64))
def test_noise_is_refused_in_one_kind_of_error(noise: bytes) -> None:
    with pytest.raises(FederationError):
        passed(noise)


def test_a_length_that_cannot_be_is_refused_before_anything_is_read() -> None:
    with pytest.raises(MessageError, match="10000000000 bytes"):
        passed(struct.pack("<4sIQ", b"SF01", 2, 10_000_000_000), max_bytes=1 << 20)
    with pytest.raises(MessageError, match="at most"):
        passed(struct.pack("<4sIQ", b"SF01", 1 << 30, 0))


def test_a_header_that_is_not_plain_json_is_refused() -> None:
    for text in (b"[1]", b'{"a":NaN}', b'{"a":1,"a":2}', b"\xff"):
        with pytest.raises(MessageError):
            passed(struct.pack("<4sIQ", b"SF01", len(text), 0) + text)


def test_a_frame_cut_short_says_that_nobody_answers() -> None:
    whole = sent(Frame({"verb": "work"}, b"x" * 100))
    with pytest.raises(NoAnswerError):
        passed(whole[:-1])


def test_the_folder_must_be_private(tmp_path: Path) -> None:
    folder = tmp_path / "open"
    folder.mkdir(mode=0o755)
    folder.chmod(0o755)
    with pytest.raises(FederationError, match="chmod 700"):
        frames.listen(folder / "trainer.sock")
    folder.chmod(0o700)
    with frames.listen(folder / "trainer.sock"):
        assert (folder / "trainer.sock").stat().st_mode & 0o777 == 0o600


def test_a_socket_is_its_owner_s_alone_from_its_first_moment(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "state").mkdir(mode=0o700)
    path = tmp_path / "state" / "trainer.sock"
    monkeypatch.setattr(os, "chmod", lambda *_, **__: pytest.fail("the mode was changed after the socket was there"))
    before = os.umask(0)
    try:
        with frames.listen(path):
            assert path.stat().st_mode & 0o777 == 0o600
    finally:
        os.umask(before)


def test_another_user_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    left, right = socket.socketpair()
    with left, right:
        frames.check_peer(left)
        monkeypatch.setattr(os, "getuid", lambda: 12345)
        with pytest.raises(FederationError, match="refused"):
            frames.check_peer(left)


def test_a_long_path_gets_a_short_socket_of_this_user(tmp_path: Path) -> None:
    assert frames.socket_path(Path("/srv/kit"), "s") == Path("/srv/kit/s")
    long = frames.socket_path(tmp_path / ("x" * 120), "trainer.sock")
    assert len(os.fsencode(long)) <= frames.LONGEST_PATH and str(os.getuid()) in long.parent.name
    assert long != frames.socket_path(tmp_path / ("y" * 120), "trainer.sock")


def test_waits_have_a_limit_that_the_error_names(tmp_path: Path) -> None:
    path = tmp_path / "s" / "trainer.sock"
    with pytest.raises(NoAnswerError, match="no trainer answers"):
        frames.ask(path, Frame({}), timeout_seconds=1)
    with frames.listen(path), pytest.raises(FederationError, match=r"within 0\.2 s"):
        frames.ask(path, Frame({}), timeout_seconds=0.2)
    path.unlink()
    with pytest.raises(FederationError, match=r"did not start within 0\.1 s"):
        frames.wait_until_ready(path, timeout_seconds=0.1)
