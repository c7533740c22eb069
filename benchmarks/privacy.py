"""What protected sums cost: masks beside flwr's SecAgg+, whole rounds with dropouts, many clients, encryption.

    pip install -e '.[bench,he]'
    python benchmarks/privacy.py --markdown

Times are processor seconds of one process with one thread, so other work on the machine disturbs them little. Clients
and coordinator run one after the other; a round's seconds are those of all of them together. Training is not counted.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import time
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

import numpy as np
import torch
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from measure import Result, all_passed, as_document, from_document, machine, read_document, seconds_of, speed_up, table

from silotune.federation.wire.messages import decode_reply, encode, layout_of
from silotune.federation.wire.sum_orders import SharesReport, UnmaskReport, written
from silotune.privacy.encryption import Adder, Packing, decrypt, encrypt, new_key
from silotune.privacy.masks import BLOCK_BYTES, PIECE_BYTES, SEGMENT_BYTES, ZEROS, add_streams, fastest_keystream
from silotune.privacy.ring import RINGS, Scale, levels, mean, quantise
from silotune.privacy.secure_sum import coordinator, site
from silotune.privacy.secure_sum.sharing import SignedSharing
from silotune.privacy.secure_sum.stages import Sealed, Stage
from silotune.privacy.secure_sum.terms import Member, SignedKeys, Terms
from silotune.structs import Reply

VALUES = 1_000_000
MASKS = 10
"""A site's own and one for each of nine peers."""
MASK_REPETITIONS = 31
MASK_SIZES = ((1, 32), (1, 16), (10, 32))
"""Millions of values, and the bits of their ring."""
REPETITIONS = 9


def repeated(work: Callable[[], object], times: int = REPETITIONS) -> tuple[float, ...]:
    """Processor seconds of each call, after one that is not counted."""
    work()
    return tuple(seconds_of(work) for _ in range(times))


def masks() -> list[Result]:
    """A site's ten masks, as a round of ten clients needs them: on one core, and on all, as a site works.

    For a million values, and for ten, the size of a 7 B model's adapter.
    """
    cores = len(os.sched_getaffinity(0))
    cases = [(threads, millions, bits) for threads in sorted({1, cores}) for millions, bits in MASK_SIZES]
    return [
        result
        for threads, millions, bits in cases
        for result in _masks(millions, bits, threads, bound=10.0 if threads == cores else None)
    ]


def _masks(millions: int, bits: int, threads: int, *, bound: float | None) -> list[Result]:
    """Both sides in turn, so that the machine's moods meet both; in wall time where there are several threads."""
    vector = np.zeros(millions * VALUES, RINGS[bits])
    clock = time.process_time if threads == 1 else time.perf_counter
    sides = {
        "peer draws": partial(_peer_masks, vector.size, 1 << bits, add=False),
        "draws": partial(_draw, vector.nbytes, threads),
        "peer adds": partial(_peer_masks, vector.size, 1 << bits, add=True),
        "adds": lambda: add_streams([vector], [(seed, False) for seed in _seeds()]),
    }
    took: dict[str, list[float]] = {name: [] for name in sides}
    torch.set_num_threads(threads)
    for _ in range(1 + max(MASK_REPETITIONS // millions, REPETITIONS)):
        for name, work in sides.items():
            began = clock()
            work()
            took[name].append(clock() - began)
    torch.set_num_threads(1)
    counted = {name: tuple(seconds[1:]) for name, seconds in took.items()}
    rate = tuple(MASKS * vector.nbytes / threads / seconds / 1e9 for seconds in counted["adds"])
    what = f"{MASKS} x {millions} M values mod 2^{bits}, {'one core' if threads == 1 else f'{threads} cores'}"
    results = [Result("mask", f"{what}: GB/s a core drawn and added", (), rate, float(np.median(rate)), 1.0)]
    for does, name in (("draw", "draws"), ("draw and add", "adds")):
        peer, own = counted[f"peer {name}"], counted[name]
        results.append(Result("mask", f"{what}: both {does}, seconds", peer, own, speed_up(peer, own), bound))
    return results


def _peer_masks(size: int, ring: int, *, add: bool) -> None:
    """flwr's way: one draw after the other, each added to the sum."""
    from flwr.common.secure_aggregation.ndarrays_arithmetic import parameters_addition
    from flwr.common.secure_aggregation.secaggplus_utils import pseudo_rand_gen

    summed = [np.zeros(size, np.int64)]
    for seed in _seeds():
        mask = pseudo_rand_gen(seed, ring, [(size,)])
        summed = parameters_addition(summed, mask) if add else summed


def _draw(count: int, threads: int) -> None:
    """What `add_streams` draws, without adding it."""
    keystream, seeds = fastest_keystream(), _seeds()

    def segments(first: int) -> None:
        drawn = bytearray(PIECE_BYTES + BLOCK_BYTES)
        for number in range(first, -(-count // SEGMENT_BYTES), threads):
            streams = [keystream(seed, number) for seed in seeds]
            for start in range(number * SEGMENT_BYTES, min(count, (number + 1) * SEGMENT_BYTES), PIECE_BYTES):
                for stream in streams:
                    stream.update_into(ZEROS[: count - start], drawn)

    with ThreadPoolExecutor(threads) as pool:
        helpers = [pool.submit(segments, first) for first in range(1, threads)]
        segments(0)
        for helper in helpers:
            helper.result()


def _seeds() -> list[bytes]:
    return [os.urandom(32) for _ in range(MASKS)]


@dataclass
class Cost:
    """What one round took: processor seconds of all clients and of the coordinator, bytes by client."""

    clients: float = 0.0
    coordinator: float = 0.0
    bytes_up: dict[str, int] = field(default_factory=dict)
    bytes_down: dict[str, int] = field(default_factory=dict)
    error: float = 0.0

    def sent(self, name: str, count: int, *, down: int = 0) -> None:
        """Adds to a client's bytes."""
        self.bytes_up[name] = self.bytes_up.get(name, 0) + count
        self.bytes_down[name] = self.bytes_down.get(name, 0) + down


def one_round(parties: int, size: int, *, dropouts: int) -> Cost:
    """A whole secure sum on random updates; ``dropouts`` of the parties are gone before they send their input."""
    private = {f"site-{number:04}": Ed25519PrivateKey.generate() for number in range(parties)}
    public = {name: key.public_key().public_bytes_raw() for name, key in private.items()}
    members = {name: Member(name, key.sign, public, 3, 2 / 3) for name, key in private.items()}
    names = tuple(sorted(private))
    terms = Terms(
        session=os.urandom(16).hex(), round_number=1, cohort=names, threshold=2 / 3,
        bits=32, bound=1.0, max_examples=1000, size=size,
        work="0" * 64,
    )  # fmt: skip
    cost, scale = Cost(), Scale(levels(32, parties), 1.0, 1000)
    drawn = np.random.default_rng(0)
    update = drawn.normal(0, 0.01, size).astype(np.float32)

    began = time.process_time()
    stages: dict[str, Stage] = {}
    keys: dict[str, SignedKeys] = {}
    for name in names:
        stages[name], keys[name] = site.advertise(members[name], terms, os.urandom)
    began_server = time.process_time()
    circle = coordinator.circle(terms, keys)
    faults = [coordinator.fault_of_keys(terms, name, keys[name], (public[name],)) for name in names]
    cost.coordinator += time.process_time() - began_server
    sealed, sharings, complaints = {}, {}, {}
    for name in names:
        stages[name], sealed[name], sharings[name] = site.share(members[name], stages[name], keys, os.urandom)
        _note(cost, name, sealed[name], sharings[name])
    began_server = time.process_time()
    for name in names:
        known = (public[name],)
        faults.append(coordinator.fault_of_sharing(circle, name, sealed[name], sharings[name], known))
    routed = coordinator.routed(sealed)
    cost.coordinator += time.process_time() - began_server
    for name in names:
        stages[name], complaints[name] = site.accept(members[name], stages[name], names, routed[name])
    agreed = coordinator.after_complaints(circle, complaints)
    alive = names[: parties - dropouts]
    total = np.zeros(size, RINGS[32])
    for name in alive:
        stages[name] = site.confirm(members[name], stages[name], agreed.arrived)
        integers, _ = quantise(update, 1000, scale, bits=32, generator=drawn)
        site.mask(members[name], stages[name], [integers])
        reply = Reply("secure_sum.input", 1, name, {"values": torch.from_numpy(integers.view("<i4"))})
        sent = encode(reply)
        cost.sent(name, len(sent))
        began_server = time.process_time()
        total += decode_reply(sent, layout_of(reply.tensors)).tensors["values"].numpy().view("<u4")
        cost.coordinator += time.process_time() - began_server
    signatures = {}
    for name in alive:
        stages[name], signatures[name] = site.agree(members[name], stages[name], alive)
    lists = {"arrived": agreed.arrived, "survivors": alive}
    began_server = time.process_time()
    for name in alive:
        faults.append(coordinator.fault_of_signature(circle, signatures[name], (public[name],), **lists))
    cost.coordinator += time.process_time() - began_server
    revealed = {}
    for name in alive:
        revealed[name] = site.reveal(members[name], stages[name], signatures)
        shares = {kind: {o: s.hex() for o, (of, s) in revealed[name].items() if of == kind} for kind in ("seed", "key")}
        cost.sent(name, len(encode(Reply("secure_sum.unmask", 1, name, {}, UnmaskReport(**shares).model_dump()))))
    began_server = time.process_time()
    expected = coordinator.to_reveal(agreed, alive, holders=alive)
    fitting, wrong = coordinator.fitting(circle, sharings, revealed, expected=expected)
    if any(faults) or wrong:
        raise AssertionError("the coordinator finds a fault with a site that has none")
    coordinator.unmask([total], circle, sharings, **lists, revealed=fitting)
    found = mean(total, 1000 * len(alive), scale)
    cost.coordinator += time.process_time() - began_server
    cost.clients = time.process_time() - began - cost.coordinator
    cost.error = float(np.abs(found - update).max()) / scale.error_bound(len(alive), 1000 * len(alive))
    return cost


def _note(cost: Cost, name: str, sealed: Mapping[str, Sealed], sharing: SignedSharing) -> None:
    """Bytes of the first two answers: keys and signature, and sealed shares with their commitments."""
    body = SharesReport(shares={peer: written(one) for peer, one in sealed.items()}, sharing=sharing).model_dump()
    keys = {"mask": "0" * 64, "share": "0" * 64, "signature": "0" * 128}
    cost.sent(name, len(encode(Reply("secure_sum.shares", 1, name, {}, body))))
    cost.sent(name, len(encode(Reply("secure_sum.keys", 1, name, {}, keys))))


def a_round() -> list[Result]:
    """Ten clients, a million values, three dropouts."""
    costs = [one_round(10, VALUES, dropouts=3) for _ in range(5)]
    seconds = tuple(cost.clients + cost.coordinator for cost in costs)
    plain = len(encode(Reply("train", 1, "site-0000", {"values": torch.zeros(VALUES, dtype=torch.int32)})))
    sent = tuple(float(max(cost.bytes_up.values())) for cost in costs)
    error = max(cost.error for cost in costs)
    what = "10 clients, 1 M values, 3 dropouts"
    return [
        Result("round", f"{what}: seconds of all together", (), seconds, max(seconds), 2, "at most"),
        Result("round", f"{what}: bytes up a client", (float(plain),), sent, sent[0] / plain, 1.1, "at most"),
        Result("round", "largest error of the mean, in computed bounds", (), (error,), error, 1.01, "at most"),
    ]


def curve(parties: tuple[int, ...] = (10, 100, 300), size: int = 100_000) -> list[Result]:
    """What a client and the coordinator do in a round as the parties grow; a tenth drops out."""
    results = []
    for count in parties:
        cost = one_round(count, size, dropouts=math.ceil(count / 10))
        up = max(cost.bytes_up.values())
        where = f"{count} clients, {size:,} values"
        for what, figure in (
            ("seconds a client", cost.clients / count),
            ("seconds of the coordinator", cost.coordinator),
            ("bytes up a client over those of the values", up / (4 * size)),
        ):
            results.append(Result("curve", f"{where}: {what}", (), (figure,), figure))
    return results


PACKINGS = ((Packing(2), None), (Packing(3), 2.0), (Packing(4), 2.0))
"""What is measured, and the bound on its bytes."""


def encryption() -> list[Result]:
    """Bytes against float32 and values a second, for each packing; ten clients."""
    results = []
    for packing, bound in PACKINGS:
        name, key = f"bfv, {packing.values} values a slot", new_key()
        most = packing.levels(10) // 10
        numbers = np.random.default_rng(0).integers(-most, most + 1, VALUES)
        seconds = repeated(lambda n=numbers, p=packing, k=key: encrypt(n, p, k), 3)
        cells = encrypt(numbers, packing, key)
        total = Adder()
        total.add(total.read(cells))
        adding = tuple(seconds_of(lambda t=total, c=cells: t.add(t.read(c))) for _ in range(9))
        opened = decrypt(total.cells(), VALUES, packing, key)
        if not np.array_equal(opened, 10 * numbers):
            raise AssertionError("the decrypted sum is not the sum")
        wire = cells.nbytes / (4 * VALUES)
        rates = tuple(VALUES / one / 1e6 for one in seconds)
        added = tuple(VALUES / one / 1e6 for one in adding)
        results += [
            Result("he", f"{name}: bytes over float32", (), (wire,), wire, bound, "at most"),
            Result("he", f"{name}: M values/s encrypted, one core", (), rates, float(np.median(rates)), 1.0),
            Result("he", f"{name}: M values/s added by the coordinator", (), added, float(np.median(added))),
        ]
    return results


PARTS: Mapping[str, Callable[[], list[Result]]] = {
    "mask": masks,
    "round": a_round,
    "curve": curve,
    "he": encryption,
}


def main() -> int:
    """Measures the parts that were asked for; 1 when a bound does not hold."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--parts", nargs="+", choices=list(PARTS), default=list(PARTS))
    parser.add_argument("--json", type=Path, help="write the results here")
    parser.add_argument("--show", type=Path, help="print what an earlier run wrote, and measure nothing")
    parser.add_argument("--markdown", action="store_true")
    given = parser.parse_args()
    torch.set_num_threads(1)
    if given.show:
        results = from_document(read_document(given.show))
    else:
        results = [result for part in given.parts for result in PARTS[part]()]
    print(table(results, markdown=given.markdown))
    if given.json and not given.show:
        document = as_document(results, machine(), {"values": VALUES})
        given.json.write_text(json.dumps(document, indent=1) + "\n", encoding="utf-8")
    return 0 if all_passed(results) else 1


if __name__ == "__main__":
    raise SystemExit(main())
