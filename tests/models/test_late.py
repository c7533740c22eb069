"""What is compiled late is compiled once, as it was asked for, and torch's own function is back afterwards."""

from __future__ import annotations

import importlib
from typing import Any

import pytest
import torch

from silotune.models import late


def test_a_function_is_compiled_at_its_first_call_and_once(monkeypatch: pytest.MonkeyPatch) -> None:
    compiled: list[dict[str, Any]] = []

    def at_once(function: Any, **settings: Any) -> Any:
        compiled.append(settings)
        return lambda *values: ("compiled", function(*values))

    def import_module(name: str) -> None:
        made["plain"] = torch.compile(max)
        made["set"] = torch.compile(dynamic=False)(min)

    made: dict[str, Any] = {}
    monkeypatch.setattr(torch, "compile", at_once)
    monkeypatch.setattr(late, "find_spec", lambda name: object())
    monkeypatch.setattr(importlib, "import_module", import_module)
    late.import_bitsandbytes()
    assert torch.compile is at_once and compiled == []
    assert [made["set"](2, 1), made["set"](4, 3)] == [("compiled", 1), ("compiled", 3)] and compiled == [
        {"dynamic": False}
    ]
    assert made["plain"](2, 1) == ("compiled", 2) and compiled == [{"dynamic": False}, {}]


def test_where_it_is_not_installed_nothing_is_imported(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(late, "find_spec", lambda name: None)
    monkeypatch.setattr(importlib, "import_module", lambda name: pytest.fail(name))
    late.import_bitsandbytes()
