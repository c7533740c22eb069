"""How many parts a message of Flower's may have: one with too many is refused before any part is fetched."""

from __future__ import annotations

from flwr.common.constant import FLWR_PRIVATE_MAX_ARRAY_CHUNK_SIZE
from flwr.proto.message_pb2 import ObjectTree
from flwr.supercore.inflatable.inflatable_object import iterate_object_tree

SPARE_PARTS = 8
"""Parts that a message may have besides the pieces of its array."""


def has_too_many_parts(tree: ObjectTree, size: int) -> bool:
    """Whether a message is made of more parts than one with an array of this many bytes."""
    parts = sum(1 for _ in iterate_object_tree(tree))
    return parts > size / FLWR_PRIVATE_MAX_ARRAY_CHUNK_SIZE + SPARE_PARTS
