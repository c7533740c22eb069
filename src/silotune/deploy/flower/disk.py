"""Keeps a SuperLink's disk clear: what sites and coordinator have sent stays there until it is fetched, and no longer.

Flower holds messages in a SQLite database until they are fetched. What nobody fetched it leaves there when a run ends
in order, or dies; and of what it does delete, SQLite leaves the bytes in free pages and in its write-ahead log. Here
ended runs are cleaned up, deleted bytes are overwritten, and the log is emptied, again and again.
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
"""SQLite's settings of each connection: what is deleted is overwritten, and the log keeps no room that it had."""
WAIT_SECONDS = 60.0
"""For the lock of writers; Flower's own 5 s end calls of others while it books a message that announces many parts."""
CLEAR_SECONDS = 1.0
"""Between two times that ended runs are looked for and the log is emptied."""
STOP_SECONDS = 5.0
_HELD = """
SELECT run_id FROM run_objects UNION SELECT run_id FROM message_ins UNION SELECT run_id FROM message_res
"""
"""Runs of which Flower holds anything that was sent."""


def make_private(database: Path) -> None:
    """Makes the database's file with mode 0600 where it is not there; SQLite gives its log the mode of the database."""
    with explained(database):
        os.close(os.open(database, os.O_RDWR | os.O_CREAT, 0o600))
        for path in (database, log_of_changes(database), database.with_name(f"{database.name}-shm")):
            with contextlib.suppress(FileNotFoundError):
                path.chmod(0o600)


def delete_for_good(connection: Any, _: object = None) -> None:
    """Sets a connection of SQLite's so; SQLAlchemy may call it for each one that it makes."""
    for name, value in DELETES_FOR_GOOD:
        connection.execute(f"PRAGMA {name} = {value}").close()


def log_of_changes(database: Path) -> Path:
    """SQLite's write-ahead log beside a database."""
    return database.with_name(f"{database.name}-wal")


def wait_for_writers(connection: Any, *_: object) -> None:
    """Has a connection of SQLite's wait; SQLAlchemy may call it for each one that it hands out, after Flower set it."""
    connection.execute(f"PRAGMA busy_timeout = {WAIT_SECONDS * 1000:.0f}").close()


def onlooker(database: Path) -> sqlite3.Connection:
    """A connection for ``clear_log``, which does not wait for long."""
    return sqlite3.connect(database, timeout=1, isolation_level=None, check_same_thread=False)


def clear_log(connection: sqlite3.Connection) -> None:
    """Puts what the write-ahead log holds into the database, and empties the log, unless somebody reads for long."""
    connection.execute("PRAGMA wal_checkpoint(TRUNCATE)").close()


def clean_up_ended(state: Any) -> None:
    """Has Flower delete what it holds of runs that have ended.

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
    """While it holds, a thread of its own keeps the disk clear; once more at the end.

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
        except (SQLAlchemyError, sqlite3.Error) as error:  # locked, or a full disk: the next time is soon
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
