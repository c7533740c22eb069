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

from silotune.deploy.superlink_disk import clear_log, delete_for_good, log_of_changes, make_private, onlooker


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
    """As when nobody writes between two looks."""
    with closing(onlooker(database)) as connection:
        clear_log(connection, clear_log(connection))


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


def test_clearing_refuses_nobody_who_reads_and_then_writes(database: Path) -> None:
    """SQLite refuses such a transaction at once, without a wait, where somebody else holds the lock of writers."""
    done, refused, written = threading.Event(), [], [0]

    def work() -> None:
        with closing(opened(database)) as connection:
            for _ in range(300):
                try:
                    connection.execute("BEGIN")
                    connection.execute("SELECT COUNT(*) FROM parts").fetchall()
                    connection.execute("INSERT INTO parts (content) VALUES (?)", (os.urandom(50_000),))
                    connection.execute("DELETE FROM parts WHERE id % 2")
                    connection.execute("COMMIT")
                except sqlite3.OperationalError as error:
                    refused.append(str(error))
                    connection.execute("ROLLBACK")
                written[0] += 1
        done.set()

    thread = threading.Thread(target=work)
    thread.start()
    with closing(onlooker(database)) as connection:
        seen = looks = 0
        while not done.is_set():
            before = written[0]
            seen, looks = clear_log(connection, seen), looks + 1
            while written[0] < before + 2 and not done.is_set():  # somebody writes between two looks
                time.sleep(0)
    thread.join()
    assert looks > 10 and not refused


def test_the_log_is_emptied_only_when_nobody_has_written_since_the_look_before(database: Path) -> None:
    said: list[str] = []
    with closing(onlooker(database)) as connection, closing(opened(database)) as writer:
        connection.set_trace_callback(said.append)
        seen = 0
        for _ in range(5):
            writer.execute("INSERT INTO parts (content) VALUES (?)", (b"x" * 5000,))
            seen = clear_log(connection, seen)
        assert not any("TRUNCATE" in statement for statement in said)
        clear_log(connection, seen)
        assert any("TRUNCATE" in statement for statement in said)
        assert log_of_changes(database).stat().st_size == 0


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
