"""Flower's SuperLink as a coordinator runs it: sites reach the Fleet API over TLS, and nothing else.

Flower 1.42 serves three interfaces at one port: Fleet for nodes, which sign every request; Control, which starts runs
and registers nodes; and Runtime, which hands out a run's work. Control and Runtime are open to whoever reaches the
port. Here the port answers only Fleet, and all three are served at a Unix socket in the coordinator's private folder.

Run as ``python -m silotune.deploy.flower.superlink KIT``.
"""

from __future__ import annotations

import asyncio
import sys
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

from silotune.deploy.flower.disk import DATABASE, delete_for_good, kept_clear, make_private, wait_for_writers
from silotune.deploy.kits import (
    AUTHORITY,
    SERVER_CERTIFICATE,
    SERVER_KEY,
    Kit,
    coordinator_folder,
    coordinator_settings,
    link_socket,
    read_kit,
)
from silotune.deploy.processes import follow_parent
from silotune.record.signatures import read_secret
from silotune.transports.frames import listen

FLEET = "/v1/fleet/"
OBJECT = f"{FLEET}push-object"
MOST_OBJECT_BYTES = 32 << 20
"""Most bytes of one part of a message; Flower cuts arrays into pieces of 5 MiB."""
MOST_BODY_BYTES = 256 << 10
"""Most bytes of any other request of a node. That is enough to announce some 3,600 parts, 18 GB; other nodes wait
while Flower stores the announcement."""
Application = Callable[[Any, Any, Any], Awaitable[None]]


def fleet_only(app: Application) -> Application:
    """The application with only the Fleet API, and with a bound on the size of requests."""

    async def gate(scope: Any, receive: Any, send: Any) -> None:
        if scope["type"] == "http":
            length = dict(scope["headers"]).get(b"content-length", b"")
            if not scope["path"].startswith(FLEET):
                return await _refuse(send, 404)
            most = MOST_OBJECT_BYTES if scope["path"] == OBJECT else MOST_BODY_BYTES
            if not length.isdigit() or int(length) > most:
                return await _refuse(send, 413)
        elif scope["type"] != "lifespan":
            return None
        return await app(scope, receive, send)

    return gate


async def _refuse(send: Any, status: int) -> None:
    await send({"type": "http.response.start", "status": status, "headers": [(b"content-length", b"0")]})
    await send({"type": "http.response.body", "body": b""})


def build_app(kit: Kit, folder: Path) -> Any:
    """Flower's application (FastAPI) with node authentication, its state in a private database of this folder."""
    from flwr.common.constant import ISOLATION_MODE_PROCESS, TRANSPORT_TYPE_GRPC_RERE
    from flwr.superlink.cli.flower_superlink import SuperLinkLifespan
    from flwr.superlink.config_loader import SuperLinkLifespanConfig, load_control_authn_plugin
    from flwr.superlink.main import create_app

    names = (AUTHORITY, SERVER_CERTIFICATE, SERVER_KEY)
    authority, certificate, key = (kit.path(name) for name in names)
    settings, database = coordinator_settings(kit), folder / DATABASE
    make_private(database)
    config = SuperLinkLifespanConfig(
        control_address="", health_server_address=None, host=settings.listen, port=settings.address.fleet_port,
        insecure=False, certificates=(authority.read_bytes(), certificate.read_bytes(), read_secret(key)),
        superexec_auth_secret=None, authn_plugin=load_control_authn_plugin(), event_log_plugin=None,
        fleet_event_log_plugin=None, enable_event_log=False, artifact_provider=None, enable_supernode_auth=True,
        fleet_api_type=TRANSPORT_TYPE_GRPC_RERE, fleet_api_address=None, simulation=False,
        ssl_ca_certfile=str(authority), ssl_certfile=str(certificate), ssl_keyfile=str(key),
        database=str(database), isolation=ISOLATION_MODE_PROCESS, runtime_dependency_install=False,
    )  # fmt: skip
    return create_app(config, SuperLinkLifespan)


async def _serve(kit: Kit, folder: Path) -> None:
    import uvicorn
    from sqlalchemy import Engine, Pool, event

    event.listen(Engine, "connect", delete_for_good)  # Flower makes its engines internally, one for each of its stores
    event.listen(Pool, "checkout", wait_for_writers)
    settings = coordinator_settings(kit)
    app = build_app(kit, folder)
    inside = listen(link_socket(kit))
    common: dict[str, Any] = {"workers": 1, "access_log": False, "log_level": "warning", "server_header": False}
    private = uvicorn.Server(uvicorn.Config(app, **common))
    public = uvicorn.Server(
        uvicorn.Config(
            fleet_only(app), host=settings.listen, port=settings.address.fleet_port, lifespan="off",
            ssl_certfile=str(kit.path(SERVER_CERTIFICATE)), ssl_keyfile=str(kit.path(SERVER_KEY)), **common,
        )
    )  # fmt: skip
    with kept_clear(app.state.linkstate_factory.state, folder / DATABASE):
        first, *_ = await asyncio.wait(
            [asyncio.create_task(private.serve(sockets=[inside])), asyncio.create_task(public.serve())],
            return_when=asyncio.FIRST_COMPLETED,
        )
        private.should_exit = public.should_exit = True
        await asyncio.sleep(0.5)
    for task in first:
        task.result()


def main() -> None:
    """Serves until told to stop."""
    follow_parent()
    kit = read_kit(Path(sys.argv[1]))
    asyncio.run(_serve(kit, coordinator_folder(kit)))


if __name__ == "__main__":
    main()
