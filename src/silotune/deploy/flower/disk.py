"""Keeps a SuperLink's disk clear: what sites and coordinator send stays there only until it is fetched.

Flower holds messages in a SQLite database until they are fetched. When a run ends or dies, Flower leaves messages that
nobody has fetched, and SQLite leaves the bytes of deleted messages in free pages and in its write-ahead log. This
module repeatedly deletes what ended runs have left, overwrites deleted bytes, and empties the log.
"""

from __future__ import annotations

import contextlib
import logging
import os
import sqlite3
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from silotune.record.files import explained

DATABASE = "superlink.db"
DELETES_FOR_GOOD = (("secure_delete", "ON"), ("journal_size_limit", "0"))
"""SQLite's settings for each connection: deleted bytes are overwritten, and an emptied log is truncated."""
WAIT_SECONDS = 60.0
"""How long a writer waits for the lock. With Flower's own 5 s, other calls fail while Flower stores a message that
announces many parts."""
CLEAR_SECONDS = 1.0
"""Pause between two clean-ups."""
STOP_SECONDS = 5.0
_HELD = """
SELECT run_id FROM run_objects UNION SELECT run_id FROM message_ins UNION SELECT run_id FROM message_res
"""
"""Runs for which Flower still holds anything that was sent."""


def make_private(database: Path) -> None:
    """Makes the database's file with mode 0600 if it is missing; SQLite gives its log the mode of the database."""
    with explained(database):
        os.close(os.open(database, os.O_RDWR | os.O_CREAT, 0o600))
        for path in (database, log_of_changes(database), database.with_name(f"{database.name}-shm")):
            with contextlib.suppress(FileNotFoundError):
                path.chmod(0o600)


def delete_for_good(connection: Any, _: object = None) -> None:
    """Applies ``DELETES_FOR_GOOD`` to a connection of SQLite; SQLAlchemy calls this for each new connection."""
    for name, value in DELETES_FOR_GOOD:
        connection.execute(f"PRAGMA {name} = {value}").close()


def log_of_changes(database: Path) -> Path:
    """SQLite's write-ahead log beside a database."""
    return database.with_name(f"{database.name}-wal")


def wait_for_writers(connection: Any, *_: object) -> None:
    """Makes a connection wait ``WAIT_SECONDS`` for locks; SQLAlchemy calls this whenever it hands one out."""
    connection.execute(f"PRAGMA busy_timeout = {WAIT_SECONDS * 1000:.0f}").close()


def onlooker(database: Path) -> sqlite3.Connection:
    """A connection for ``clear_log``, which does not wait for long."""
    return sqlite3.connect(database, timeout=1, isolation_level=None, check_same_thread=False)


def clear_log(connection: sqlite3.Connection) -> None:
    """Moves the write-ahead log into the database and empties the log, unless a reader blocks it for too long."""
    connection.execute("PRAGMA wal_checkpoint(TRUNCATE)").close()


def clean_up_ended(state: Any) -> None:
    """Makes Flower delete what it holds of runs that have ended.

    Args:
        state: Flower's LinkState over SQLite.
    """
    from flwr.common.constant import Status
    from flwr.supercore.utils import int64_to_uint64

    held = {int64_to_uint64(int(row["run_id"])) for row in state.query(_HELD)}
    for run_id, status in state.get_run_status(held).items() if held else ():
        if status.status == Status.FINISHED:
            state.cleanup_run(run_id)


@contextlib.contextmanager
def kept_clear(state: Callable[[], Any], database: Path) -> Iterator[None]:
    """Within the block, a thread keeps the disk clear; the disk is cleared once more at the end.

    Args:
        state: Gives Flower's LinkState.
        database: Its file.
    """
    from sqlalchemy.exc import SQLAlchemyError

    done, said, connection = threading.Event(), "", onlooker(database)

    def clear() -> None:
        nonlocal said
        try:
            clean_up_ended(state())
            clear_log(connection)
            said = ""
        except (SQLAlchemyError, sqlite3.Error) as error:  # locked, or a full disk: it is tried again soon
            if said != (said := str(error).splitlines()[0]):
                logging.getLogger("silotune").warning("the SuperLink's disk is not cleared for now: %s", said)

    def go_on() -> None:
        while not done.wait(CLEAR_SECONDS):
            clear()

    thread = threading.Thread(target=go_on, daemon=True)
    thread.start()
    try:
        yield
    finally:
        done.set()
        thread.join(STOP_SECONDS)
        clear()
        connection.close()
