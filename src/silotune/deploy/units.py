"""Files that keep a coordinator or a site running: a systemd unit and a compose file, as they stand in the kits."""

from __future__ import annotations

from collections.abc import Mapping

PLACE = "/srv/silotune"
"""Where the unit expects kits to be unpacked."""

_UNIT = """# sudo cp {name}.service /etc/systemd/system/ && sudo systemctl enable --now {name}
# Expects this kit in {place}/{top}, a user 'silotune' that owns it, and silotune in {place}/venv.
[Unit]
Description=silotune {kind} {top}
After=network-online.target time-sync.target
Wants=network-online.target

[Service]
User=silotune
WorkingDirectory={place}/{top}
Environment=FLWR_TELEMETRY_ENABLED=0
ExecStart={place}/venv/bin/silotune {kind} start {place}/{top}
Restart=on-failure
RestartSec=5
TimeoutStopSec=60
UMask=0077
NoNewPrivileges=true
PrivateTmp=true
ProtectSystem=strict
ProtectHome=true
ReadWritePaths={place}/{top}

[Install]
WantedBy=multi-user.target
"""
_COMPOSE = """# docker compose up -d, in this folder; the image is one that you build with silotune[deploy] in it.
services:
  {kind}:
    image: ${{SILOTUNE_IMAGE:?name an image that has silotune}}
    command: ["silotune", "{kind}", "start", "/kit"]
    user: "${{SILOTUNE_USER:?the id of the user that owns this folder, as 'id -u' prints it}}"
    volumes: [".:/kit"]
    environment:
      FLWR_TELEMETRY_ENABLED: "0"
    restart: on-failure
    stop_grace_period: 60s
{ports}"""


def service_files(kind: str, top: str, *, port: int | None = None) -> dict[str, bytes]:
    """The files by name.

    Args:
        kind: ``coordinator`` or ``site``.
        top: Name of the kit's folder.
        port: That the coordinator listens at; None for a site, which listens nowhere.
    """
    ports = "" if port is None else f'    ports: ["{port}:{port}"]\n'
    values: Mapping[str, str] = {"kind": kind, "top": top, "place": PLACE, "name": f"silotune-{kind}", "ports": ports}
    return {
        f"silotune-{kind}.service": _UNIT.format(**values).encode(),
        "compose.yaml": _COMPOSE.format(**values).encode(),
    }
