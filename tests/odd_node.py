"""A site's node that is not in order, as a process of its own: ``python -m odd_node KIT``.

What is wrong stands in the kit's file ``odd``, which is read anew for every reply: ``clock`` (a day fast, from the
start), ``replay`` (the first reply again), ``huge`` (a reply that announces 10 GB); anything else is an honest node.
"""

from __future__ import annotations

import datetime
import hashlib
import sys
from pathlib import Path
from typing import Any

from flwr.app import Context, Message, RecordDict
from flwr.proto.message_pb2 import ObjectTree
from flwr.supernode import node_auth_http_interceptor as authentication

from silotune.deploy import node
from silotune.deploy.flower import fleet
from silotune.transports import flower

PARTS = 10_000_000_000 // (5 << 20)


def wrong() -> str:
    path = Path(sys.argv[1]) / "odd"
    return path.read_text(encoding="utf-8") if path.exists() else ""


def replaying(message: Message, context: Context, work: Any) -> Message:
    made = honest_answer(message, context, work)
    kept.append(made.content)
    return Message(kept[0], reply_to=message) if wrong() == "replay" else made


def announcing(reply: Any) -> ObjectTree:
    tree = honest_tree(reply)
    if wrong() == "huge":
        named = (hashlib.sha256(str(number).encode()).hexdigest() for number in range(PARTS))
        tree.children.extend(ObjectTree(object_id=name) for name in named)
    return tree


kept: list[RecordDict] = []
honest_answer, honest_tree = flower.answer, fleet.get_object_tree

if __name__ == "__main__":
    flower.answer, fleet.get_object_tree = replaying, announcing
    if wrong() == "clock":
        authentication.now = lambda: datetime.datetime.now(datetime.UTC) + datetime.timedelta(days=1)
    node.main()
