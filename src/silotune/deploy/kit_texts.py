"""The texts within a kit: its settings, the policy that a site begins with, what to type, and what keeps it running."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence

from silotune.deploy.kits import FederationPlan
from silotune.federation.site.policy import Policy

_SITE = """# What this site brings. [model] and [data] are yours to fill in; then: silotune site check .
format = 1
federation = {federation}
site = {site}

[coordinator]
host = {host}
fleet_port = {fleet}

[model]
path = "nano"        # folder of the base model, or "nano", which silotune brings
# precision = "float32"
# device = "auto"
# sha256 = ""        # fingerprint that the folder must have

[data]
# task = "finance-news"                 # a name from: silotune tasks
# train = "/path/to/train.jsonl"        # stays here; relative paths begin at this folder

[trainer]
folder = "state"     # socket, logs, audit trail; mode 0700
"""
_COORDINATOR = """# What the coordinator runs on; see README.md.
format = 1
federation = {federation}
listen = "0.0.0.0"
folder = "state"     # server state, logs and run folders; mode 0700
he = {he}           # whether the sites have the key of encrypted sums

[address]
host = {host}
fleet_port = {fleet}
"""
_SUBMITTER = """# Who may ask for runs; see README.md.
format = 1
federation = {federation}
submitter = {submitter}
"""
_POLICY_EXAMPLES = {
    "base_models": '["64 hexadecimal digits"]',
    "tasks": '["finance-news"]',
    "objectives": '["choice", "classify"]',
    "smallest_adapter": "1000",
    "largest_adapter": "50000000",
    "least_participants": "3",
    "least_cohort": "3",
    "least_threshold": "0.75",
    "least_colluding": "1",
    "largest_epsilon_run": "4.0",
    "largest_epsilon_total": "8.0",
    "delta": "1e-6",
    "largest_upload_bytes": "200000000",
    "metrics": '["loss", "accuracy", "macro_f1"]',
    "charter": '"64 hexadecimal digits, as sha256sum prints them"',
}
_SITE_README = """# {site} in the federation {federation}

Unpack this kit where the examples are, into a folder that only you can read, and check it before you
change any file (later: `silotune site check .`):

    tar -xpf {federation}-{site}.tar && cd {federation}-{site} && sha256sum -c checksums.sha256

{keys}Fill in `site.toml` ([model] and [data]) and read `policy.toml`: it is yours, and it wins over whatever the
coordinator asks. Then:

    silotune site check .
    silotune site start .

Nobody else needs a file of this kit. `auth.key` and `signing.key` never leave this folder.
"""
_OWN_KEYS = "Put `auth.key` and `signing.key`, which `silotune provision request` made here, into the folder.\n\n"
_COORDINATOR_README = """# Coordinator of the federation {federation}

Unpack this kit into a folder that only you can read, and check it before you change a
file:

    tar -xpf {federation}-coordinator.tar && cd {federation}-coordinator && sha256sum -c checksums.sha256

Then:

    silotune coordinator start .
    silotune submit RUN.json --kit .

A run is signed by a submitter, with a kit of its own that is not on this machine: what it may ask, this kit cannot
change. When sites are added, revoked or rotated you get a new `members.json`: silotune provision members . FILE
"""


_SUBMITTER_README = """# Submitter {submitter} of the federation {federation}

Unpack this kit on your own machine, into a folder that only you can read, and check it before you change a
file:

    tar -xpf {federation}-{submitter}.tar && cd {federation}-{submitter} && sha256sum -c checksums.sha256

`signing.key` signs what you ask of the sites. Nobody else needs it: the coordinator must not have it. Sign a run here
and hand the file to whoever runs the coordinator:

    silotune submit CONFIG --as . --out run.json
    silotune submit run.json --kit COORDINATOR       # on the coordinator's machine
"""


def submitter_toml(plan: FederationPlan, submitter: str) -> str:
    """``submitter.toml``."""
    return _SUBMITTER.format(federation=json.dumps(plan.name), submitter=json.dumps(submitter))


def submitter_readme(plan: FederationPlan, submitter: str) -> str:
    """``README.md`` of a submitter's kit."""
    return _SUBMITTER_README.format(federation=plan.name, submitter=submitter)


def site_toml(plan: FederationPlan, site: str) -> str:
    """``site.toml``, as a site gets it."""
    return _SITE.format(site=json.dumps(site), **_address(plan))


def coordinator_toml(plan: FederationPlan) -> str:
    """``coordinator.toml``."""
    return _COORDINATOR.format(he=json.dumps(plan.he), **_address(plan))


def site_readme(plan: FederationPlan, site: str, *, holds_keys: bool) -> str:
    """``README.md`` of a site's kit."""
    return _SITE_README.format(site=site, federation=plan.name, keys="" if holds_keys else _OWN_KEYS)


def coordinator_readme(plan: FederationPlan) -> str:
    """``README.md`` of the coordinator's kit."""
    return _COORDINATOR_README.format(federation=plan.name)


def policy_toml(site: str, *, submitters: Sequence[str], charter: str | None) -> str:
    """The policy that a site begins with: every rule named, those that the kit can set are set."""
    given = {"submitters": json.dumps(list(submitters)), **({"charter": json.dumps(charter)} if charter else {})}
    given |= {"format": "1", "generation": "false", "secure_aggregation": "false", "smallest_count": "5"}
    given |= {name: f"{Policy.model_fields[name].default:g}" for name in ("most_models", "most_scorings")}
    given |= {name: f"{Policy.model_fields[name].default:.0f}" for name in ("most_steps", "most_seconds")}
    lines = [
        f"# The policy of {site}. It belongs to the site and wins over whatever a coordinator asks.",
        "# A key that is unknown, or a value that cannot be, refuses everything. See docs/policy.md.",
        "",
    ]
    for name, field in Policy.model_fields.items():
        if name == "working_hours":
            continue
        lines += [f"# {field.description}"] if field.description else []
        lines.append(f"{name} = {given[name]}" if name in given else f"# {name} = {_POLICY_EXAMPLES[name]}")
    lines += ["", "# [working_hours]", '# begin = "08:00"', '# end = "18:00"', '# zone = "Europe/Madrid"', ""]
    return "\n".join(lines)


def _address(plan: FederationPlan) -> dict[str, str]:
    coordinator = plan.coordinator
    return {
        "federation": json.dumps(plan.name),
        "host": json.dumps(coordinator.host),
        "fleet": str(coordinator.fleet_port),
    }


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
