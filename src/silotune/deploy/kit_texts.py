"""The texts within a kit: settings, the policy that a site begins with, instructions, and service files.

Most are templates in the folder ``templates``, which ``str.format`` fills in.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from importlib.resources import files

from silotune.deploy.kits import FederationPlan
from silotune.federation.site.policy import Policy

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
    "leakage_audit": '"required"',
    "largest_membership_advantage": "0.1",
    "charter": '"64 hexadecimal digits, as sha256sum prints them"',
    "plugins": '["silotune-nesterov"]',
}
_OWN_KEYS = "Put `auth.key` and `signing.key`, which `silotune provision request` made here, into the folder.\n\n"
PLACE = "/srv/silotune"
"""Where the unit expects kits to be unpacked."""


def submitter_toml(plan: FederationPlan, submitter: str) -> str:
    """``submitter.toml``."""
    return _filled("submitter.toml", federation=json.dumps(plan.name), submitter=json.dumps(submitter))


def submitter_readme(plan: FederationPlan, submitter: str) -> str:
    """``README.md`` of a submitter's kit."""
    return _filled("submitter.md", federation=plan.name, submitter=submitter)


def site_toml(plan: FederationPlan, site: str) -> str:
    """``site.toml``, as a site gets it."""
    return _filled("site.toml", site=json.dumps(site), **_address(plan))


def coordinator_toml(plan: FederationPlan) -> str:
    """``coordinator.toml``."""
    return _filled("coordinator.toml", he=json.dumps(plan.he), **_address(plan))


def site_readme(plan: FederationPlan, site: str, *, holds_keys: bool) -> str:
    """``README.md`` of a site's kit."""
    return _filled("site.md", site=site, federation=plan.name, keys="" if holds_keys else _OWN_KEYS)


def coordinator_readme(plan: FederationPlan) -> str:
    """``README.md`` of the coordinator's kit."""
    return _filled("coordinator.md", federation=plan.name)


def policy_toml(site: str, *, submitters: Sequence[str], charter: str | None) -> str:
    """The policy that a site begins with: it names every rule, and sets those that the kit can set."""
    given = {"submitters": json.dumps(list(submitters)), **({"charter": json.dumps(charter)} if charter else {})}
    given |= {
        "format": "1",
        "generation": "false",
        "secure_aggregation": "false",
        "plain_gradients": "true",
        "smallest_count": "5",
    }
    given |= {name: f"{Policy.model_fields[name].default:g}" for name in ("most_models", "most_scorings")}
    given |= {name: f"{Policy.model_fields[name].default:.0f}" for name in ("most_steps", "most_seconds")}
    lines = [
        f"# The policy of {site}. It belongs to the site and wins over whatever a coordinator asks.",
        "# With an unknown key or an impossible value in it, the site refuses everything. See docs/policy.md.",
        "",
    ]
    for name, field in Policy.model_fields.items():
        if name == "working_hours":
            continue
        lines += [f"# {field.description}"] if field.description else []
        lines.append(f"{name} = {given[name]}" if name in given else f"# {name} = {_POLICY_EXAMPLES[name]}")
    lines += ["", "# [working_hours]", '# begin = "08:00"', '# end = "18:00"', '# zone = "Europe/Madrid"', ""]
    return "\n".join(lines)


def _filled(template: str, **values: str) -> str:
    return files("silotune.deploy").joinpath("templates", template).read_text(encoding="utf-8").format(**values)


def _address(plan: FederationPlan) -> dict[str, str]:
    coordinator = plan.coordinator
    return {
        "federation": json.dumps(plan.name),
        "host": json.dumps(coordinator.host),
        "fleet": str(coordinator.fleet_port),
    }


def service_files(kind: str, top: str, *, port: int | None = None) -> dict[str, bytes]:
    """The files that start a coordinator or a site as a service, by name.

    Args:
        kind: ``coordinator`` or ``site``.
        top: Name of the kit's folder.
        port: Port at which the coordinator listens; None for a site, which listens nowhere.
    """
    ports = "" if port is None else f'    ports: ["{port}:{port}"]\n'
    values: Mapping[str, str] = {"kind": kind, "top": top, "place": PLACE, "name": f"silotune-{kind}", "ports": ports}
    return {
        f"silotune-{kind}.service": _filled("silotune.service", **values).encode(),
        "compose.yaml": _filled("compose.yaml", **values).encode(),
    }
