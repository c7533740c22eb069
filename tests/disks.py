"""A small real disk for tests: a tmpfs of a size, which fills up as a disk does. It takes root to mount one."""

from __future__ import annotations

import errno
import os
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

PAGE = os.sysconf("SC_PAGE_SIZE")
"""A tmpfs gives files their room in pages."""
_FILLER = "filler"


@contextmanager
def disk(place: Path, *, size: int) -> Iterator[Path]:
    """A tmpfs of ``size`` bytes at ``place``; skips the test where this user may not mount one."""
    if os.geteuid() != 0:
        pytest.skip("mounting a tmpfs takes root")
    place.mkdir(parents=True)
    made = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", str(place)], capture_output=True, text=True, check=False
    )
    if made.returncode:
        pytest.skip(f"no tmpfs can be mounted here: {made.stderr.strip()}")
    try:
        yield place
    finally:
        subprocess.run(["umount", "--lazy", str(place)], check=True)


def fill(place: Path, *, leave: int = 0) -> None:
    """Fills the disk with one file, until only ``leave`` bytes are free, in whole pages."""
    block = b"\xff" * (1 << 16)
    with (place / _FILLER).open("wb", buffering=0) as file:
        while True:
            try:
                file.write(block)
            except OSError as error:
                assert error.errno == errno.ENOSPC
                break
        file.truncate(max(0, file.tell() - leave))


def make_room(place: Path) -> None:
    """Frees what ``fill`` took."""
    (place / _FILLER).unlink()
