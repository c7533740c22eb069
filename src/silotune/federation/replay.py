"""Aggregates the updates that a run kept once more, and compares every round with what its audit trail says."""

from __future__ import annotations

from collections.abc import Sequence

from silotune.errors import AuditError
from silotune.methods.algorithms import method
from silotune.record.chain import Entry
from silotune.record.runs import RunFolder
from silotune.sections import FederationSection
from silotune.structs import ClientUpdate, Tensors
from silotune.tensors import digest


def replayed(
    folder: RunFolder,
    rounds: Sequence[tuple[Entry, Sequence[Entry]]],
    *,
    federation: FederationSection,
    last: Entry | None,
) -> int:
    """Does the aggregations again, from the weights before round 1 on.

    Args:
        folder: Where the updates were kept.
        rounds: Each aggregation with the replies it is made of, from round 1 on without a gap.
        federation: The method.
        last: The entry with the result; its adapter must be the weights of its round.

    Returns:
        Rounds that were compared.

    Raises:
        AuditError: An update is not the one that was logged, or a round aggregates to something else.
    """
    made = method(federation)
    weights = folder.kept_tensors("round-0-weights")
    memory: Tensors = {}
    digests = {0: digest(weights)}
    for entry, replies in rounds:
        sent = made.sent(weights, memory)
        delta = made.aggregate(_update(folder, reply, sent) for reply in replies)
        weights, memory = made.step(weights, delta, memory, float(entry.fields["share"]))
        number = int(entry.fields["round"])
        digests[number] = digest(weights)
        if digests[number] != entry.fields["weights"]:
            raise AuditError(f"entry {entry.index}: round {number} does not aggregate to the weights it says")
    if last is not None and digests.get(last.fields["round"]) != last.fields["adapter"]:
        raise AuditError(f"entry {last.index}: the adapter is not what the updates aggregate to")
    return len(rounds)


def _update(folder: RunFolder, reply: Entry, sent: Tensors) -> ClientUpdate:
    fields, report = reply.fields, reply.fields["report"]
    tensors = folder.kept_tensors(str(fields["file"]))
    if digest(tensors) != fields["update"]:
        raise AuditError(f"entry {reply.index}: the kept update of {fields['client']!r} is not the one that was logged")
    delta = {name: tensors[name] for name in sent}
    return ClientUpdate(str(fields["client"]), delta, report["num_examples"], report["loss"], report["steps"])
