"""Frames over a private Unix socket, between the thin part of a site and its resident trainer; imports nothing heavy.

A frame is ``SF01``, the length of a JSON header (4 bytes) and of a payload (8 bytes), little-endian, then both. The
payload is an encoded message, or nothing. The socket lies in a folder of mode 0700; each side checks that the other
runs as the same user, so that neither a stranger's request is trained on nor a stranger's reply is sent.
"""

from __future__ import annotations

import hashlib
import json
import os
import socket
import struct
import tempfile
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from silotune.errors import FederationError, MessageError, TrainerLostError
from silotune.record.plain_json import strict_object

MAGIC = b"SF01"
MAX_HEADER_BYTES = 1 << 20
MAX_PAYLOAD_BYTES = 64 << 30
LONGEST_PATH = 100
"""Bytes of a Unix socket's path; the system takes 107."""
_START = struct.Struct("<4sIQ")
_CREDENTIALS = struct.Struct("3i")


@dataclass(frozen=True, slots=True)
class Frame:
    """A header of plain JSON, and an encoded message or nothing."""

    header: Mapping[str, Any]
    payload: bytes = field(default=b"", repr=False)


class NoAnswerError(FederationError):
    """Nobody listens at the socket, or whoever did is gone: the trainer is starting, or has died."""


def socket_path(folder: Path, name: str) -> Path:
    """Where a socket of this name lies: in the folder, or in one of this user's own where that path is too long."""
    path = folder.absolute() / name
    if len(os.fsencode(path)) <= LONGEST_PATH:
        return path
    short = hashlib.sha256(os.fsencode(folder.absolute())).hexdigest()[:16]
    return Path(tempfile.gettempdir()) / f"silotune-{os.getuid()}-{short}" / name


def listen(path: Path) -> socket.socket:
    """Listens at ``path``, which has mode 0600 from its first moment; its folder is made with mode 0700 if missing.

    Raises:
        FederationError: The folder belongs to somebody else, or others may enter it.
    """
    path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
    check_folder(path.parent)
    path.unlink(missing_ok=True)
    listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    os.fchmod(listener.fileno(), 0o600)  # Linux makes the file with the mode that the socket has when it is bound
    listener.bind(str(path))
    listener.listen(8)
    return listener


def check_folder(folder: Path) -> None:
    """Refuses a folder that is not this user's own, or that others may enter."""
    state = folder.stat()
    if state.st_uid != os.getuid():
        raise FederationError(f"{str(folder)!r} belongs to user {state.st_uid}, not to this one: choose another folder")
    if state.st_mode & 0o077:
        raise FederationError(f"{str(folder)!r} may be entered by others: chmod 700 {folder}")


def check_peer(connection: socket.socket) -> None:
    """Refuses a connection whose other end runs as another user (root's too: it needs no socket)."""
    raw = connection.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, _CREDENTIALS.size)
    _, user, _ = _CREDENTIALS.unpack(raw)
    if user != os.getuid():
        raise FederationError(f"the other end of the trainer's socket runs as user {user}: refused")


def send(connection: socket.socket, frame: Frame) -> None:
    """Writes a frame.

    Raises:
        MessageError: The header is too long, or not plain JSON.
    """
    try:
        header = json.dumps(dict(frame.header), separators=(",", ":"), allow_nan=False).encode()
    except (TypeError, ValueError) as error:
        raise MessageError(f"a frame's header is not plain JSON: {error}") from error
    if len(header) > MAX_HEADER_BYTES:
        raise MessageError(f"a frame's header of {len(header)} bytes is longer than {MAX_HEADER_BYTES}")
    connection.sendall(_START.pack(MAGIC, len(header), len(frame.payload)) + header)
    if frame.payload:  # the other end may have answered already, and be gone
        connection.sendall(frame.payload)


def receive(connection: socket.socket, *, max_bytes: int = MAX_PAYLOAD_BYTES) -> Frame:
    """Reads a frame; nothing is allocated for a payload that says it is longer than ``max_bytes``.

    Raises:
        MessageError: It is no frame, or too long.
        NoAnswerError: The connection ends before the frame does.
    """
    magic, header_bytes, payload_bytes = _START.unpack(_read(connection, _START.size))
    if magic != MAGIC:
        raise MessageError("not a silotune frame, or one of another version")
    if header_bytes > MAX_HEADER_BYTES or payload_bytes > max_bytes:
        raise MessageError(f"a frame announces {header_bytes} and {payload_bytes} bytes; at most {max_bytes} are read")
    header = strict_object(_read(connection, header_bytes), "frame", is_prose=True)
    return Frame(header, _read(connection, payload_bytes))


def _read(connection: socket.socket, count: int) -> bytes:
    parts = []
    while count:
        part = connection.recv(min(count, 1 << 20))
        if not part:
            raise NoAnswerError("the trainer's socket was closed in the middle of a frame")
        parts.append(part)
        count -= len(part)
    return b"".join(parts)


def ask(path: Path, frame: Frame, *, timeout_seconds: float, max_bytes: int = MAX_PAYLOAD_BYTES) -> Frame:
    """Sends a frame to the trainer and waits for its answer.

    Raises:
        NoAnswerError: Nobody listens, or the trainer died over the work.
        FederationError: The limit has passed, or the socket is somebody else's.
    """
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as connection:
        connection.settimeout(timeout_seconds)
        try:
            connection.connect(str(path))
            check_folder(path.parent)
            check_peer(connection)
            send(connection, frame)
            return receive(connection, max_bytes=max_bytes)
        except TimeoutError:
            raise FederationError(f"the trainer gave no answer within {timeout_seconds:g} s") from None
        except OSError as error:
            raise NoAnswerError(f"no trainer answers at {str(path)!r}: {error.strerror or error}") from None


def work_frame(job: str, setup: bytes, message: bytes) -> Frame:
    """What asks the trainer to do a request's work for a run; name, setup and message are as they came."""
    named = job if job.isascii() and job.isprintable() else ""
    return Frame({"verb": "work", "job": named, "setup_bytes": len(setup)}, setup + message)


def wait_until_ready(path: Path, *, timeout_seconds: float) -> dict[str, Any]:
    """Waits until the trainer answers, and gives its state.

    Raises:
        TrainerLostError: It did not within the limit.
    """
    limit = time.monotonic() + timeout_seconds
    while True:
        try:
            return dict(ask(path, Frame({"verb": "state"}), timeout_seconds=5).header)
        except NoAnswerError:
            if time.monotonic() > limit:
                raise TrainerLostError(f"the trainer did not start within {timeout_seconds:g} s") from None
            time.sleep(0.1)
