"""What a round costs outside of training, over TLS on one machine: the resident trainer beside a stock Flower app.

Both run the same configuration (nano, the same clients, steps and batches) on a SuperLink with TLS and node
authentication. The stock side is Flower as it comes: SuperExec, a new process per message, its own loops.
"""

from __future__ import annotations

import argparse
import json
import os
import socket
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from measure import QUIET, Result, all_passed, as_document, machine, table

from silotune.config import Config, load_config
from silotune.deploy.coordinator import public_keys
from silotune.deploy.demo import demo_federation
from silotune.deploy.kits import read_kit
from silotune.deploy.provision import provision
from silotune.deploy.site import status
from silotune.record.runs import RunFolder
from silotune.tensors import digest

STOCK = Path(__file__).parent / "stock_deployment"
CONFIG = Path(__file__).parents[1] / "configs" / "demo-federation.toml"
LEAST, MOST_SECONDS = 8.0, 1.5
START_SECONDS, ROUND_SECONDS = 120.0, 60.0


def configuration(sites: int, rounds: int) -> Config:
    """What both sides run: scoring after the last round alone."""
    changes = [f"data.partition.clients={sites}", f"federation.rounds={rounds}", f"evaluation.every={rounds}"]
    return load_config(CONFIG, [*changes, "record.keep_updates=false"])


@dataclass(frozen=True)
class Side:
    """What was measured of one side.

    Attributes:
        overheads: Seconds of each round in which no site trained, as the slowest site counts.
        training: Seconds of each round's slowest site.
        loads: How often the sites together read the base from disk.
        weights: Digest of the model after the last round.
    """

    overheads: tuple[float, ...]
    training: tuple[float, ...]
    loads: int
    weights: str


def silotune_side(config: Config, folder: Path, sites: int) -> Side:
    """The run on silotune's own deployment, started by the demonstration; evaluation is left out on both sides."""
    loads: list[int] = []

    def watch(event: str, fields: Mapping[str, Any]) -> None:
        if event == "mode_finished":
            for number in range(sites):
                loads.append(status(read_kit(folder / f"demo-client-{number}"))["trainer"]["base_loads"])

    shown = demo_federation(config, folder, sites=sites, notify=watch)
    part = RunFolder(shown.folder).part("federated")
    longest: dict[int, float] = {}
    for row in part.read_rows("clients"):
        longest[row["round"]] = max(longest.get(row["round"], 0.0), row["seconds"])
    rounds = [row for row in part.read_rows("metrics") if row["round"]]
    overheads = tuple(row["train_seconds"] - longest[row["round"]] for row in rounds)
    checkpoint = part.load_checkpoint()
    assert checkpoint is not None and len(loads) == sites
    return Side(overheads, tuple(longest.values()), sum(loads), digest(checkpoint[0].weights))


def stock_side(config: Config, folder: Path, sites: int, rounds: int) -> Side:
    """The same rounds in the stock app."""
    names = [f"client-{number}" for number in range(sites)]
    job, out = folder / "job.json", folder / "rounds.json"
    job.write_text(json.dumps(config.model_dump(mode="json")), encoding="utf-8")
    with stock_federation(folder, names) as port:
        start_stock_run(folder, port, job, out, rounds)
        failed = out.with_suffix(".error")
        wait(
            lambda: out.is_file() or failed.is_file(),
            START_SECONDS + rounds * ROUND_SECONDS,
            f"the stock run; logs are in {folder}",
        )
    if failed.is_file():
        raise SystemExit(f"the stock app failed:\n{failed.read_text(encoding='utf-8')}")
    rows = json.loads(out.read_text(encoding="utf-8"))
    overheads = tuple(row["wall"] - row["training"] for row in rows)
    loads = sum(row["loads"] for row in rows)
    return Side(overheads, tuple(row["training"] for row in rows), loads, rows[-1]["weights"])


@contextmanager
def stock_federation(folder: Path, names: list[str]) -> Iterator[int]:
    """Flower's own SuperLink and SuperNodes, with silotune's certificates and keys; the SuperLink's port."""
    port = free_port()
    lines = ['name = "stock"', "[coordinator]", 'host = "127.0.0.1"', f"fleet_port = {port}"]
    (folder / "federation.toml").write_text("\n".join([*lines, *(f"[sites.{name}]" for name in names)]))
    kits = {}
    for made in provision(folder / "federation.toml", folder / "office"):
        subprocess.run(["tar", "-xf", made.path, "-C", folder], check=True)
        kits[made.name] = folder / f"stock-{made.name}"
    tls = kits["coordinator"]
    server = ["--ssl-ca-certfile", "ca.crt", "--ssl-certfile", "server.crt", "--ssl-keyfile", "server.key"]
    own = ["--host", "127.0.0.1", "--port", str(port), "--disable-runtime-dependency-installation"]
    commands = {"superlink": (["flower-superlink", *server, *own, "--enable-supernode-auth"], tls)}
    for name in names:
        inside = ["--host", "127.0.0.1", "--port", str(free_port())]
        key = ["--auth-supernode-private-key", "auth.key", "--root-certificates", "ca.crt"]
        commands[name] = (["flower-supernode", "--superlink", f"127.0.0.1:{port}", *key, *inside], kits[name])
    processes = []
    try:
        for name, (command, place) in commands.items():
            log = (folder / f"{name}.log").open("wb")
            program = str(Path(sys.executable).parent / command[0])
            environment = {**os.environ, **QUIET, "FLWR_HOME": str(folder / "flwr"), "PATH": path()}
            processes.append(
                subprocess.Popen([program, *command[1:]], cwd=place, stdout=log, stderr=log, env=environment)
            )
            if name == "superlink":
                wait(lambda: is_open(port), START_SECONDS, "the stock SuperLink")
                register_stock(kits["coordinator"], port)
        yield port
    finally:
        for process in reversed(processes):
            process.terminate()
        for process in reversed(processes):
            try:
                process.wait(15)
            except subprocess.TimeoutExpired:
                process.kill()


def control(folder: Path, port: int) -> Any:
    """Flower's own client of the stock SuperLink, which takes runs from whoever reaches it."""
    from flwr.supercore.control import ControlHttpClient
    from flwr.supercore.interceptors import RuntimeVersionHttpInterceptor

    return ControlHttpClient.from_server_address(
        f"127.0.0.1:{port}", False, (folder / "ca.crt").read_bytes(),
        interceptors=[RuntimeVersionHttpInterceptor(component_name="flwr CLI")],
    )  # fmt: skip


def register_stock(kit: Path, port: int) -> None:
    """Makes the sites' keys known to the SuperLink."""
    from flwr.proto.control_pb2 import RegisterNodeRequest

    with control(kit, port) as client:
        for name, key in public_keys(read_kit(kit)).items():
            client.RegisterNode(RegisterNodeRequest(public_key=key, name=name))


def start_stock_run(folder: Path, port: int, job: Path, out: Path, rounds: int) -> None:
    """Submits the stock app."""
    import hashlib

    from flwr.cli.build import build_fab_from_disk
    from flwr.proto.control_pb2 import StartRunRequest
    from flwr.proto.fab_pb2 import Fab
    from flwr.proto.transport_pb2 import Scalar

    fab = build_fab_from_disk(STOCK)
    values = {"job": Scalar(string=str(job)), "out": Scalar(string=str(out)), "rounds": Scalar(sint64=rounds)}
    with control(folder / "stock-coordinator", port) as client:
        given = Fab(hash_str=hashlib.sha256(fab).hexdigest(), content=fab)
        client.StartRun(StartRunRequest(fab=given, override_config=values))


def path() -> str:
    """Flower starts its own commands by name."""
    return f"{Path(sys.executable).parent}{os.pathsep}{os.environ.get('PATH', '')}"


def free_port() -> int:
    """A port that nobody listens at."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def is_open(port: int) -> bool:
    """Whether somebody listens."""
    with socket.socket() as probe:
        return probe.connect_ex(("127.0.0.1", port)) == 0


def wait(is_done: Any, limit_seconds: float, what: str) -> None:
    """Waits, within a limit that the error names."""
    limit = time.monotonic() + limit_seconds
    while not is_done():
        if time.monotonic() > limit:
            raise SystemExit(f"{what} was not there within {limit_seconds:g} s")
        time.sleep(0.2)


def results(stock: Side, own: Side, sites: int) -> list[Result]:
    """The table's lines; the first round of each side is left out of the medians: it opens the run."""
    peer, mine = (statistics.median(side.overheads[1:]) for side in (stock, own))
    part, once = "deployment", f"base read from disk in the run, by {sites} sites together"
    return [
        Result(part, "a round outside of training, s", stock.overheads[1:], own.overheads[1:], peer / mine, LEAST),
        Result(part, "the same, median, s", (), own.overheads[1:], mine, MOST_SECONDS, "at most"),
        Result(part, "the first round outside of training, s", stock.overheads[:1], own.overheads[:1],
               stock.overheads[0] / own.overheads[0]),
        Result(part, "training in a round, slowest site, s", stock.training, own.training,
               statistics.median(stock.training) / statistics.median(own.training)),
        Result(part, once, (float(stock.loads),), (float(own.loads),), own.loads / sites, 1.0, "at most"),
        Result(part, "final models differ in a bit", (), (), float(stock.weights != own.weights), 0.0, "at most"),
    ]  # fmt: skip


def main() -> None:
    """Runs both sides, prints the table, and fails where a bound does not hold."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--sites", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=10)
    parser.add_argument("--work", type=Path, help="keep logs and results here")
    parser.add_argument("--json", type=Path, help="file for everything that was measured")
    parser.add_argument("--markdown", action="store_true", help="print the table for README.md")
    chosen = parser.parse_args()
    if chosen.rounds < 3:
        parser.error("--rounds must be at least 3: the first opens the run and is left out of the medians")
    folder = chosen.work or Path(tempfile.mkdtemp(prefix="deployment-"))
    for name in ("stock", "own"):
        (folder / name).mkdir(parents=True)
    where, config = machine(), configuration(chosen.sites, chosen.rounds)
    own = silotune_side(config, folder / "own", chosen.sites)
    stock = stock_side(config, folder / "stock", chosen.sites, chosen.rounds)
    found = results(stock, own, chosen.sites)
    print(table(found, markdown=chosen.markdown))
    print(f"logs and results: {folder}")
    if chosen.json:
        document = as_document(found, where, {"sites": chosen.sites, "rounds": chosen.rounds})
        chosen.json.write_text(json.dumps(document, indent=1) + "\n", encoding="utf-8")
    sys.exit(0 if all_passed(found) else 1)


if __name__ == "__main__":
    main()
