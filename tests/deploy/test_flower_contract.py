"""What silotune relies on of Flower, compared with the release that is installed: one line for each thing that changed.

The table is ``flower_contract.toml``. What it says of imports is compared with the source too: an import without an
entry fails, and so does an entry that nothing imports any more. Nothing of flwr is imported at the top, nor a module
that does so: a name that is gone must not keep the lines from being told.
"""

from __future__ import annotations

import ast
import importlib
import inspect
import re
import tomllib
from collections.abc import Iterator, Mapping
from importlib.metadata import version
from pathlib import Path
from typing import Any

import pytest

import silotune
from silotune.deploy.check import MOST_SECONDS_OFF
from silotune.deploy.flower import disk
from silotune.deploy.flower.superlink import FLEET, OBJECT
from silotune.deploy.processes import ENVIRONMENT

SOURCE = Path(silotune.__file__).parent
FILES = [*sorted((SOURCE / "deploy" / "flower").glob("*.py")), SOURCE / "transports" / "flower.py"]
TREES = {path.relative_to(SOURCE).as_posix(): ast.parse(path.read_text(encoding="utf-8")) for path in FILES}
TABLE = tomllib.loads((Path(__file__).parent / "flower_contract.toml").read_text(encoding="utf-8"))
IMPORTED: Mapping[str, str] = TABLE["imported"]
BEHIND: Mapping[str, str] = TABLE["behind"]
GONE = "is gone"
KINDS = {1: "double", 4: "uint64", 8: "bool", 9: "string", 12: "bytes"}
"""Numbers of protobuf's types -> their names."""


# --- what there is ---------------------------------------------------------------------------------------------------


def found(key: str, expected: str) -> str:
    """What the installed Flower has under a key, in the words of the table."""
    kind, _, name = key.rpartition(" ")
    if kind == "table":
        return columns_of(name, listed(expected))
    if kind == "answer":
        return status_of(name)
    if kind == "path":
        return router_of(name, expected.rpartition(" ")[2])
    if kind == "variable":
        return reader_of(name, expected.rpartition(" ")[2])
    parts = key.split(".")
    for length in range(len(parts) - 1, 0, -1):
        owner = module(".".join(parts[:length]))
        if owner is not None:
            return described(owner, parts[length:], expected)
    return GONE


def module(name: str) -> Any:
    """A module of Flower's; None where there is none that can be imported."""
    try:
        return importlib.import_module(name)
    except ImportError:
        return None


def listed(expected: str) -> list[str]:
    """Names of the fields in a line such as ``has run_id: uint64, fab: Fab``."""
    return re.findall(r"(\w+):", expected)


def described(owner: Any, path: list[str], expected: str) -> str:
    """What stands at a path below a module."""
    for place, name in enumerate(path, start=1):
        try:
            thing = inspect.getattr_static(owner, name) if isinstance(owner, type) else getattr(owner, name)
        except AttributeError:
            is_set = place == len(path) and isinstance(owner, type) and sets(owner, name)
            return "is set by its class" if is_set else GONE
        owner = thing
    if hasattr(owner, "DESCRIPTOR"):
        return fields_of(owner.DESCRIPTOR, listed(expected))
    if isinstance(owner, property):
        return "is a property"
    if callable(owner):
        return "is a class" if expected == "is a class" and isinstance(owner, type) else f"takes {signature(owner)}"
    return f"is {owner!r}"


def sets(owner: type, name: str) -> bool:
    """Whether a class of Flower's, or one of its bases, gives its objects an attribute."""
    bases = [base for base in owner.__mro__ if base.__module__.startswith("flwr.")]
    ways = rf'self\.{name}(: [^=\n]+)? = |^    {name}: |^\s+"{name}": '  # the last: into the object's __dict__
    return any(re.search(ways, inspect.getsource(base), re.MULTILINE) for base in bases)


class Default:
    """Stands for any default of a parameter."""

    def __repr__(self) -> str:
        return ""


def signature(thing: Any) -> str:
    """A signature without its types and without what its defaults are."""
    plain = [
        one.replace(annotation=one.empty, default=one.default if one.default is one.empty else Default())
        for one in inspect.signature(thing).parameters.values()
        if one.name != "self"
    ]
    return str(inspect.Signature(plain))


def fields_of(descriptor: Any, names: list[str]) -> str:
    """The named fields of a protobuf message."""
    told = []
    for name in names:
        field = descriptor.fields_by_name.get(name)
        if field is None:
            told.append(f"{name}: nothing")
            continue
        kind = field.message_type.name if field.message_type else KINDS.get(field.type, f"type {field.type}")
        told.append(f"{name}: {'list of ' if field.is_repeated else ''}{kind}")
    return f"has {', '.join(told)}" if names else "is a message"


def columns_of(name: str, columns: list[str]) -> str:
    """The named columns of a table of the SuperLink's database."""
    tables: dict[str, Any] = {}
    for part in ("linkstate", "objectstore"):
        make = getattr(module(f"flwr.supercore.state.schema.{part}_tables"), f"create_{part}_metadata", None)
        tables.update(make().tables if make else {})
    if name not in tables:
        return GONE
    known = {column.name: repr(column.type) for column in tables[name].columns}
    return "has " + ", ".join(f"{column}: {known.get(column, 'nothing')}" for column in columns)


def status_of(name: str) -> str:
    """The status of HTTP of an answer that says no, by its name in Flower."""
    codes = getattr(module("flwr.supercore.error.base"), "ApiErrorCode", {})
    answers = getattr(module("flwr.supercore.error.catalog"), "API_ERROR_MAP", {})
    code = getattr(codes, name, None)
    return f"is status {answers[code].http_status_code}" if code in answers else GONE


def router_of(path: str, place: str) -> str:
    """Whether a router of Flower's, which stands in a module, serves a path."""
    routes = getattr(getattr(module(place), "router", None), "routes", ())
    is_served = path in {route.path for route in routes}
    return f"is served by {place}" if is_served else f"is not served by {place}"


def reader_of(name: str, place: str) -> str:
    """Whether a module of Flower's reads a variable of the environment."""
    there = module(place)
    text = inspect.getsource(there) if there else ""
    return f"is read in {place}" if re.search(rf'os\.getenv\(\s*"?{name}\b', text) else f"is not read in {place}"


def differences(table: Mapping[str, str]) -> list[str]:
    """A line for each entry that the installed Flower does not keep to; of a class that is gone, one for it alone."""
    release, users = version("flwr"), {path: used_in(tree) for path, tree in TREES.items()}
    lines: dict[str, str] = {}
    for key, expected in table.items():
        now = found(key, expected)
        if now != expected and key.rpartition(".")[0] not in lines:
            where = " and ".join(path for path, names in users.items() if key in names) or "silotune"
            count = "count" if " and " in where else "counts"
            lines[key] = f"flwr {release}: {key} now {now}; {where} {count} on: {expected}"
    return list(lines.values())


# --- what the source uses --------------------------------------------------------------------------------------------


def names_in(tree: ast.AST) -> dict[str, str]:
    """What a file imports of flwr: its name in the file -> its name in Flower."""
    return {
        alias.asname or alias.name: f"{node.module}.{alias.name}"
        for node in ast.walk(tree)
        if isinstance(node, ast.ImportFrom) and str(node.module).split(".")[0] == "flwr"
        for alias in node.names
    }


def used_in(tree: ast.AST) -> set[str]:
    """What a file imports of flwr, and what it takes from a name that it imports, such as ``Status.FINISHED``."""
    names = names_in(tree)
    taken = {
        f"{names[node.value.id]}.{node.attr}"
        for node in ast.walk(tree)
        if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and node.value.id in names
    }
    return {*names.values(), *taken}


def calls_in(tree: ast.AST) -> Iterator[tuple[str, ast.Call]]:
    """Calls of what a file imports of flwr, each with its name in Flower."""
    names = names_in(tree)
    for node in ast.walk(tree):
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id in names:
            yield names[node.func.id], node


def hidden_in(tree: ast.AST) -> set[str]:
    """Attributes that can only be Flower's: calls of its services by a client, private ones of other objects."""
    taken = [node for node in ast.walk(tree) if isinstance(node, ast.Attribute)]
    calls = {node.attr for node in taken if node.attr[0].isupper() and ast.unparse(node.value).endswith("client")}
    private = {node.attr for node in taken if re.match("_[a-z]", node.attr) and ast.unparse(node.value) != "self"}
    return calls | private


# --- the tests -------------------------------------------------------------------------------------------------------


def test_flower_is_what_the_table_says() -> None:
    lines = differences({**IMPORTED, **BEHIND})
    assert not lines, "\n" + "\n".join(lines)


def test_every_import_has_an_entry_and_every_entry_is_imported() -> None:
    used = set().union(*map(used_in, TREES.values()))
    assert used - IMPORTED.keys() == set(), "add these to [imported]"
    assert IMPORTED.keys() - used == set(), "nothing imports these: take them out"
    for path, tree in TREES.items():
        plain = [alias.name for node in ast.walk(tree) if isinstance(node, ast.Import) for alias in node.names]
        assert not [name for name in plain if name.split(".")[0] == "flwr"], f"{path}: import names, not modules"


@pytest.mark.parametrize("path", TREES)
def test_what_is_hidden_has_an_entry(path: str) -> None:
    assert hidden_in(TREES[path]) <= {key.rpartition(".")[2] for key in BEHIND}


@pytest.mark.parametrize("path", TREES)
def test_flower_takes_each_call_as_it_is_made(path: str) -> None:
    for key, call in calls_in(TREES[path]):
        place, _, name = key.rpartition(".")
        callee = getattr(importlib.import_module(place), name)
        words = {word.arg: None for word in call.keywords if word.arg}
        if hasattr(callee, "DESCRIPTOR"):
            assert words.keys() <= set(listed(IMPORTED[key])), f"{path}:{call.lineno}: add the field to {key}"
        else:
            try:
                inspect.signature(callee).bind(*call.args, **words)
            except TypeError as error:
                pytest.fail(f"flwr {version('flwr')}: {path}:{call.lineno} calls {key}, which takes otherwise: {error}")


def test_what_is_named_without_an_import_has_an_entry() -> None:
    """Tables in SQL, variables of the environment, paths of the Fleet interface, and times."""
    from silotune.deploy.flower import fleet

    entries: dict[str, set[str]] = {}
    for key in BEHIND:
        kind, _, name = key.rpartition(" ")
        entries.setdefault(kind, set()).add(name)
    assert entries["table"] == set(re.findall(r"FROM (\w+)", disk._HELD))
    assert entries["variable"] == {name for name in ENVIRONMENT if name.startswith("FLWR_")}
    assert entries["path"] == {OBJECT} and OBJECT.startswith(FLEET)
    oldest = float(BEHIND["flwr.supercore.constant.MAX_TIMESTAMP_DIFF_SECONDS"].removeprefix("is "))
    assert oldest > MOST_SECONDS_OFF
    assert BEHIND["flwr.common.constant.HEARTBEAT_MIN_INTERVAL"] == f"is {fleet.HEARTBEAT_SECONDS:g}"


def otherwise(self: Any, address: str, *, token: str = "") -> None:
    """A signature that Flower could have one day."""


CHANGES = {
    "flwr.superlink.grid.HttpGrid": (
        "takes (token)",
        "now takes (address, *, token=); deploy/flower/grid.py counts on: takes (token)",
    ),
    "flwr.superlink.grid.HttpGrid._sockets": ("is a property", "now is gone; silotune counts on: is a property"),
    "flwr.superlink.nowhere.HttpGrid": ("is a class", "now is gone; silotune counts on: is a class"),
    "flwr.proto.fab_pb2.Fab": (
        "has content: string, code: bytes",
        "now has content: bytes, code: nothing; deploy/flower/grid.py counts on: has content: string, code: bytes",
    ),
    "flwr.common.constant.Status.FINISHED": (
        "is 'done'",
        "now is 'finished'; deploy/flower/disk.py counts on: is 'done'",
    ),
    "table message_ins": ("has run: Text()", "now has run: nothing; silotune counts on: has run: Text()"),
    "table parts": ("has run: Text()", "now is gone; silotune counts on: has run: Text()"),
    "answer NOT_TODAY": ("is status 412", "now is gone; silotune counts on: is status 412"),
    "path /v1/fleet/rest": (
        "is served by flwr.superlink.routers.fleet.router",
        "now is not served by flwr.superlink.routers.fleet.router; "
        "silotune counts on: is served by flwr.superlink.routers.fleet.router",
    ),
    "variable FLWR_QUIET": (
        "is read in flwr.supercore.telemetry",
        "now is not read in flwr.supercore.telemetry; silotune counts on: is read in flwr.supercore.telemetry",
    ),
}
"""Name in Flower -> what the table could say, and what of the line then says what is there."""


@pytest.mark.parametrize("key", CHANGES)
def test_a_change_is_told_in_one_line(key: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("flwr.superlink.grid.HttpGrid.__init__", otherwise)
    expected, line = CHANGES[key]
    assert differences({key: expected}) == [f"flwr {version('flwr')}: {key} {line}"]
