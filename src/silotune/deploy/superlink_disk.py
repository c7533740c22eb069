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
CLEAR_SECONDS = 1.0
"""Between two times that ended runs are looked for and the log is emptied."""
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


def onlooker(database: Path) -> sqlite3.Connection:
    """A connection for ``clear_log``, which waits for nobody."""
    return sqlite3.connect(database, timeout=0, isolation_level=None, check_same_thread=False)


def clear_log(connection: sqlite3.Connection, seen: int = 0) -> int:
    """Puts what the write-ahead log holds into the database; empties the log where nobody has written since ``seen``.

    Emptying takes the lock of writers for a moment, in which SQLite refuses whoever has read and is about to write, as
    Flower's transactions do. Where writes go on, the next one begins the log anew and cuts off what was behind it.

    Args:
        connection: Of an ``onlooker``, the same each time.
        seen: What the call before gave.

    Returns:
        The number of the database's state, which changes when others write.
    """
    (state,) = connection.execute("PRAGMA data_version").fetchone()
    is_busy, pages, moved = connection.execute("PRAGMA wal_checkpoint(PASSIVE)").fetchone()
    if state == seen and pages > 0 and moved == pages and not is_busy:
        connection.execute("PRAGMA wal_checkpoint(TRUNCATE)").close()
    return int(state)


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

    done, said, seen, connection = threading.Event(), "", 0, onlooker(database)

    def clear() -> None:
        nonlocal said, seen
        try:
            clean_up_ended(state())
            seen = clear_log(connection, seen)
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
        thread.join()
        clear()
        clear()  # nobody writes any more: the log is emptied the second time
        connection.close()
