"""The app bundle that Flower carries with a run: a description, no code.

Neither side ever runs what a bundle holds: a coordinator and a site run the silotune that is installed there. A site
refuses a run whose bundle is not, byte for byte, the one that its own silotune makes.
"""

from __future__ import annotations

import hashlib
import io
import zipfile

from silotune.record.environment import version_of

_DATE = (2024, 1, 1, 0, 0, 0)
_PROJECT = """[project]
name = "silotune"
version = "{version}"
description = "Names the silotune that a run needs; holds no code."

[tool.flwr.app]
publisher = "silotune"

[tool.flwr.app.components]
serverapp = "silotune.deploy.queued_run:server_app"
clientapp = "silotune.deploy.node:client_app"

[tool.flwr.app.config]
job = ""
"""


def bundle() -> bytes:
    """The bundle of the installed silotune, the same bytes on every machine (nothing in it is compressed)."""
    project = _PROJECT.format(version=version_of("silotune") or "0").encode()
    manifest = f"pyproject.toml,{hashlib.sha256(project).hexdigest()},{len(project) * 8}".encode()
    made = io.BytesIO()
    with zipfile.ZipFile(made, "w", zipfile.ZIP_STORED) as archive:
        for name, content in (("pyproject.toml", project), (".info/CONTENT", manifest)):
            archive.writestr(zipfile.ZipInfo(name, _DATE), content)
    return made.getvalue()


def bundle_hash() -> str:
    """SHA-256 of the bundle, as Flower names it."""
    return hashlib.sha256(bundle()).hexdigest()
