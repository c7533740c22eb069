"""What is deleted from a SuperLink's database is gone from the disk, and nobody who uses it is disturbed."""

from __future__ import annotations

import os
import sqlite3
import stat
import threading
import time
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path

import pytest
from sqlalchemy import create_engine, event, text
from sqlalchemy.exc import OperationalError

from silotune.deploy.flower.disk import (
    clear_log,
    delete_for_good,
    log_of_changes,
    make_private,
    onlooker,
    wait_for_writers,
)


def opened(database: Path) -> sqlite3.Connection:
    """A connection as Flower makes it, with our settings."""
    connection = sqlite3.connect(database, timeout=5, isolation_level=None)
    for setting in ("journal_mode = WAL", "synchronous = NORMAL"):
        connection.execute(f"PRAGMA {setting}").close()
    delete_for_good(connection)
    return connection


@pytest.fixture
def database(tmp_path: Path) -> Iterator[Path]:
    """A database that somebody holds open: SQLite removes the log when the last one leaves."""
    place = tmp_path / "link.db"
    make_private(place)
    with closing(opened(place)) as held:
        held.execute("CREATE TABLE parts (id INTEGER PRIMARY KEY, content BLOB)").close()
        yield place


def cleared(database: Path) -> None:
    with closing(onlooker(database)) as connection:
        clear_log(connection)


def on_disk(database: Path) -> bytes:
    return b"".join(path.read_bytes() for path in database.parent.iterdir() if path.is_file())


@pytest.mark.parametrize("size", [100, 4000, 300_000])
def test_what_was_deleted_is_on_the_disk_no_more(database: Path, size: int) -> None:
    secret = os.urandom(size)
    with closing(opened(database)) as connection:
        connection.executemany("INSERT INTO parts (content) VALUES (?)", [(secret,), (b"x" * 5000,)])
        assert secret[:48] in on_disk(database)
        cleared(database)
        assert secret[:48] in database.read_bytes()  # it is not deleted yet
        connection.execute("DELETE FROM parts WHERE content = ?", (secret,))
        cleared(database)
        content = on_disk(database)
        assert all(secret[start : start + 48] not in content for start in range(0, size - 47, 48))
        assert log_of_changes(database).stat().st_size == 0


def test_nobody_is_refused_while_the_log_is_emptied_or_somebody_writes_for_long(database: Path) -> None:
    """Flower's own settings would refuse after 5 s, here after no time at all."""
    engine = create_engine(f"sqlite:///{database}", connect_args={"check_same_thread": False, "timeout": 0})
    event.listen(engine, "connect", delete_for_good)
    event.listen(engine, "checkout", wait_for_writers)
    refused: list[str] = []

    def work() -> None:
        for _ in range(60):
            try:
                with engine.begin() as connection:
                    connection.execute(text("SELECT COUNT(*) FROM parts")).fetchall()
                    connection.execute(text("INSERT INTO parts (content) VALUES (:it)"), {"it": os.urandom(50_000)})
                    connection.execute(text("DELETE FROM parts WHERE id % 2"))
            except OperationalError as error:
                refused.append(str(error.orig))

    threads = [threading.Thread(target=work) for _ in range(3)]
    with closing(onlooker(database)) as connection:
        connection.execute("BEGIN IMMEDIATE")
        for thread in threads:
            thread.start()
        time.sleep(0.5)
        connection.execute("COMMIT")
        while any(thread.is_alive() for thread in threads):
            clear_log(connection)
            time.sleep(0.01)
        clear_log(connection)
    engine.dispose()
    assert not refused and log_of_changes(database).stat().st_size == 0


def test_a_reader_is_not_disturbed_and_the_log_is_emptied_later(database: Path) -> None:
    with closing(opened(database)) as reader, closing(opened(database)) as writer:
        writer.execute("INSERT INTO parts (content) VALUES (?)", (b"first",))
        reader.execute("BEGIN")
        assert reader.execute("SELECT content FROM parts").fetchall() == [(b"first",)]
        writer.execute("INSERT INTO parts (content) VALUES (?)", (b"second",))
        cleared(database)
        assert log_of_changes(database).stat().st_size > 0
        assert reader.execute("SELECT content FROM parts").fetchall() == [(b"first",)]
        reader.execute("COMMIT")
        cleared(database)
        assert log_of_changes(database).stat().st_size == 0


def test_the_files_are_the_owner_s_alone_also_those_of_an_earlier_version(tmp_path: Path) -> None:
    place = tmp_path / "link.db"
    before = os.umask(0)
    try:
        with closing(opened(place)) as connection:
            connection.execute("CREATE TABLE parts (content)").close()
            assert stat.S_IMODE(place.stat().st_mode) & 0o044
            make_private(place)
            assert {stat.S_IMODE(path.stat().st_mode) for path in tmp_path.iterdir()} == {0o600}
        place.unlink()
        make_private(place)
        with closing(opened(place)) as connection:
            connection.execute("CREATE TABLE parts (content)").close()
            assert len(list(tmp_path.iterdir())) == 3
            assert {stat.S_IMODE(path.stat().st_mode) for path in tmp_path.iterdir()} == {0o600}
    finally:
        os.umask(before)
