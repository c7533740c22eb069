"""Aggregates the updates that a run kept once more, and compares every round with what its audit trail says."""

from __future__ import annotations

from collections.abc import Sequence

from silotune.errors import AuditError
from silotune.federation.coordinator.audit import model_name
from silotune.methods.algorithms import advance, method
from silotune.methods.products import Products
from silotune.methods.schedule import outgoing, returned
from silotune.record.chain import Entry
from silotune.record.runs import RunFolder
from silotune.seeds import derive
from silotune.settings.sections import FederationSection, TrainingSection
from silotune.structs import ClientUpdate, ServerState, Tensors
from silotune.tensors import digest


def replayed(
    folder: RunFolder,
    rounds: Sequence[tuple[Entry, Sequence[Entry]]],
    *,
    federation: FederationSection,
    training: TrainingSection,
    seed: int,
    last: Entry | None,
) -> int:
    """Does the aggregations again, from the weights before round 1 on.

    Args:
        folder: Where the updates were kept.
        rounds: Each aggregation with the replies it is made of, from round 1 on without a gap.
        federation: The method.
        training: The steps of it that the server takes, where it does.
        seed: The run's.
        last: The entry with the result; its global model must be that of its round.

    Returns:
        Rounds that were compared.

    Raises:
        AuditError: An update is not the one that was logged, or a round aggregates to something else.
    """
    made = method(federation, training)
    weights = folder.kept_tensors(model_name(0))
    memory: Tensors = {}
    digests = {0: digest(weights)}
    for entry, replies in rounds:
        number, share = int(entry.fields["round"]), float(entry.fields["share"])
        parts = made.schedule(number)
        sent = returned(outgoing(made.sent(weights, memory), parts), parts)
        products = Products(weights, parts, weigh=made.weigh, keep=made.fold is not None)
        delta = made.aggregate(products.watch(_update(folder, reply, sent) for reply in replies))
        drawn = derive(seed, "adapter-init", round_number=number)
        before = ServerState(number - 1, weights, memory)
        weights, memory, _ = advance(made, before, delta, products=products, share=share, seed=drawn)
        digests[number] = digest(weights)
        if digests[number] != entry.fields["weights"]:
            raise AuditError(f"entry {entry.index}: round {number} does not aggregate to the weights it says")
    if last is not None and digests.get(last.fields["round"]) != last.fields["weights"]:
        raise AuditError(f"entry {last.index}: the model is not what the updates aggregate to")
    return len(rounds)


def _update(folder: RunFolder, reply: Entry, sent: Tensors) -> ClientUpdate:
    fields, report = reply.fields, reply.fields["report"]
    tensors = folder.kept_tensors(str(fields["file"]))
    if digest(tensors) != fields["update"]:
        raise AuditError(f"entry {reply.index}: the kept update of {fields['client']!r} is not the one that was logged")
    delta = {name: tensors[name] for name in sent}
    return ClientUpdate(str(fields["client"]), delta, report["num_examples"], report["loss"], report["steps"])
