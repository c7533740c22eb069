"""A stock Flower app: a ClientApp that loads the model and trains, a ServerApp that sends, waits and averages.

Flower starts a process for every message, so all is imported and loaded anew for each. The local work itself is
silotune's, so that only what lies around it differs.
"""

import json
import time
import traceback
from pathlib import Path

from flwr.app import Context, Message, RecordDict
from flwr.clientapp import ClientApp
from flwr.serverapp import Grid, ServerApp

client = ClientApp()
server = ServerApp()
TIMEOUT = 600.0


@client.train()
def train(message: Message, context: Context) -> Message:
    """One local round: import, load, train, reply."""
    began = time.perf_counter()
    from silotune.experiment import engines
    from silotune.transports.flower import pack, unpack

    envelope, data = unpack(message.content)
    states = Path(envelope["states"])
    frame = engines.actor_work(str(states), str(states / "ledger"), envelope, json.loads(envelope["setup"]), data)
    assert frame.header["status"] == "reply", frame.header
    said = {"seconds": str(time.perf_counter() - began), "loads": str(engines._resident().loads)}
    return Message(pack(said, frame.payload), reply_to=message)


@server.main()
def main(grid: Grid, context: Context) -> None:
    """The rounds; what goes wrong in them is written down, for Flower shows it to nobody."""
    try:
        work(grid, context)
    except Exception:
        Path(str(context.run_config["out"])).with_suffix(".error").write_text(traceback.format_exc(), encoding="utf-8")
        raise


def work(grid: Grid, context: Context) -> None:
    """Rounds as a template has them: send to all, wait for all, average."""
    from silotune.config import from_mapping
    from silotune.experiment.parts import MODES
    from silotune.experiment.prepare import prepare
    from silotune.experiment.rounds import plan_of
    from silotune.experiment.site import setup_of
    from silotune.federation.wire.messages import decode_reply, encode, layout_of
    from silotune.record.cost import Meter
    from silotune.structs import ClientUpdate, Request
    from silotune.tensors import digest
    from silotune.transports.flower import pack, unpack

    config = from_mapping(json.loads(Path(str(context.run_config["job"])).read_text(encoding="utf-8")))
    out = Path(str(context.run_config["out"]))
    prepared = prepare(config)
    (part,) = MODES["federated"](prepared)
    plan = plan_of(prepared, part, Meter())
    names = sorted(prepared.clients)
    setup = json.dumps(setup_of(config, is_simulated=True))
    while len(list(grid.get_node_ids())) < len(names):
        time.sleep(0.5)
    nodes = sorted(grid.get_node_ids())
    weights, rows = prepared.initial, []
    for number in range(1, int(context.run_config["rounds"]) + 1):
        began = time.perf_counter()
        messages = []
        for name, node in zip(names, nodes, strict=True):
            request = Request("train", number, name, weights, plan.body)
            envelope = {"job": "stock", "client": name, "setup": setup, "states": str(out.parent / "states")}
            messages.append(Message(pack(envelope, encode(request)), dst_node_id=node, message_type="train"))
        updates, seconds, loads = [], [], 0
        for answer in grid.send_and_receive(messages, timeout=TIMEOUT):
            said, data = unpack(answer.content)
            loads += int(said["loads"])
            reply = decode_reply(data, layout_of(weights))
            seconds.append(float(reply.body["seconds"]))
            updates.append(ClientUpdate(reply.client, reply.tensors, int(reply.body["num_examples"])))
        delta = plan.method.aggregate(sorted(updates, key=lambda update: update.client))
        weights, _ = plan.method.step(weights, delta, {}, 1.0)
        wall = time.perf_counter() - began
        rows.append(
            {"round": number, "wall": wall, "training": max(seconds), "loads": loads, "weights": digest(weights)}
        )
    written = out.with_suffix(".part")
    written.write_text(json.dumps(rows), encoding="utf-8")
    written.rename(out)
    context.state = RecordDict()
