"""A model hub on this machine: a base comes from it with a token, and without it from the cache."""

from __future__ import annotations

import hashlib
import json
import os
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

TOKEN = "hf_secret"  # noqa: S105 - of the hub in this file
COMMIT = "0123456789abcdef0123456789abcdef01234567"
CODE = """
import json, os, sys
from silotune.errors import ModelError
from silotune.models.load import load_base
from silotune.settings.sections import ModelSection

def load(**more):
    try:
        base = load_base(ModelSection(name="acme/tiny", max_length=64, device="cpu", **more))
    except ModelError as error:
        return str(error)
    return sum(float(tensor.double().sum()) for tensor in base.model.state_dict().values())

found = {"off": load(offline=True), "nobody": load()}
os.environ["HF_TOKEN"] = sys.argv[1]
found["member"] = load()
del os.environ["HF_TOKEN"]
os.environ["HF_HUB_OFFLINE"] = "1"
found["variable"] = load()
del os.environ["HF_HUB_OFFLINE"]
print("LAST ONLINE", flush=True)
found["cached"] = load(offline=True)
found["wrong"] = load(offline=True, revision="v2")
print(json.dumps(found))
"""


@contextmanager
def hub(folder: Path) -> Iterator[tuple[str, list[tuple[str, bool]]]]:
    """Serves a folder as the repository ``acme/tiny`` to whoever has the token; its address, and who asked for what."""
    asked: list[tuple[str, bool]] = []

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_HEAD(self) -> None:
            self._answer(with_body=False)

        def do_GET(self) -> None:
            self._answer(with_body=True)

        def _answer(self, *, with_body: bool) -> None:
            may = self.headers.get("Authorization") == f"Bearer {TOKEN}"
            asked.append((self.path, may))
            name = self.path.partition("?")[0].removeprefix("/acme/tiny/resolve/main/")
            file = folder / name
            found = "/" not in name and file.is_file()
            body = file.read_bytes() if may and found else b""
            self.send_response(200 if may and found else 404 if may else 401)
            self.send_header("X-Repo-Commit", COMMIT)
            self.send_header("Content-Length", str(len(body)))
            if not may:
                self.send_header("X-Error-Code", "GatedRepo")
            elif found:
                self.send_header("ETag", f'"{hashlib.sha256(body).hexdigest()}"')
            else:
                self.send_header("X-Error-Code", "EntryNotFound")
            self.end_headers()
            if with_body:
                self.wfile.write(body)

        def log_message(self, *given: object) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_port}", asked
    finally:
        server.shutdown()
        thread.join()
        server.server_close()


@pytest.mark.end_to_end
def test_a_base_comes_from_the_hub_with_a_token_and_then_from_the_cache(tiny_folder: Path, tmp_path: Path) -> None:
    import tiny

    kept = {name: value for name, value in os.environ.items() if not name.startswith(("HF_", "TRANSFORMERS_"))}
    with hub(tiny_folder) as (address, asked):
        variables = {**kept, "HF_ENDPOINT": address, "HF_HOME": str(tmp_path), "HF_HUB_DISABLE_XET": "1"}
        done = subprocess.run(
            [sys.executable, "-c", CODE, TOKEN], env=variables, capture_output=True, text=True, timeout=120
        )
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout.splitlines()[-1])
    expected = sum(float(tensor.double().sum()) for tensor in tiny.model("llama").state_dict().values())
    assert found["member"] == found["variable"] == found["cached"] == pytest.approx(expected)
    for name in ("off", "nobody", "wrong"):
        assert "'acme/tiny' is neither a local folder nor a model that the Hub gave" in found[name], name
        assert "HF_TOKEN" in found[name] and "\n" not in found[name]
    assert {may for path, may in asked if "resolve" in path} == {True, False}
    assert any(path.endswith("model.safetensors") for path, _ in asked)
    first, last = asked[0], max(place for place, (_, may) in enumerate(asked) if may)
    assert not first[1] and last == len(asked) - 1  # nobody asked offline, before or after
