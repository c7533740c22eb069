"""Asks of lines of core modules whether a test notices when they are wrong (mutation testing).

``python scripts/mutate.py`` draws 40 lines of the modules in ``MODULES`` and makes one small change on each: another
operator, a condition turned round, a number off by one, ``min`` for ``max``. For each it runs the module's own tests in
a copy of the sources, and prints which test failed, or that none did. A change that survives is a gap in the tests, or
makes no difference: then say so in ``EQUIVALENT``. ``--at privacy/ring.py:40-60`` makes every change on these lines
instead. Not part of ``make test``: 40 lines take about half an hour on two cores.
"""

from __future__ import annotations

import argparse
import ast
import os
import random
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

ROOT: Final = Path(__file__).resolve().parents[1]
PACKAGE: Final = Path("src/silotune")
COPIED: Final = ("src", "tests", "configs", "scripts", "pyproject.toml")

MODULES: Final[Mapping[str, tuple[str, ...]]] = {
    "data/partition.py": ("data/test_partition.py", "data/test_frozen_partitions.py"),
    "methods/aggregate.py": (
        "methods/test_aggregate.py",
        "methods/test_robust.py",
        "federation/**/test_algorithms_run.py",
    ),
    "methods/robust.py": ("methods/test_robust.py",),
    "methods/server_step.py": ("methods/test_server_steps.py", "methods/test_algorithms.py"),
    "methods/corrections.py": ("methods/test_corrections.py", "methods/test_algorithms.py"),
    "methods/products.py": ("methods/test_products.py",),
    "methods/ranks.py": ("methods/test_ranks.py", "methods/test_products.py"),
    "methods/compress/*.py": ("methods/test_compress.py",),
    "privacy/accountant.py": ("privacy/test_accountant.py", "privacy/test_distributed.py"),
    "privacy/client_dp.py": ("privacy/test_client_dp.py",),
    "privacy/distributed.py": ("privacy/test_distributed.py", "federation/**/test_noised_sum.py"),
    "privacy/ledger.py": ("federation/**/test_budget.py", "federation/**/test_noised_sum.py"),
    "privacy/ring.py": ("privacy/test_ring.py", "privacy/test_secure_sum.py"),
    "privacy/secure_sum/*.py": ("privacy/test_secure_sum.py", "federation/**/test_secure.py"),
    "federation/**/messages.py": ("federation/**/test_messages.py",),
    "federation/**/settlement.py": ("federation/**/test_replies.py", "federation/**/test_secure.py"),
    "federation/**/admission.py": ("federation/**/test_guard.py", "attacks/test_hostile_coordinator.py"),
    "evaluation/metrics.py": ("evaluation/test_metrics.py", "evaluation/test_comparison.py"),
    "evaluation/statistics.py": ("evaluation/test_statistics.py", "evaluation/test_comparison.py"),
    "record/chain.py": ("record/test_audit.py", "federation/**/test_witness.py"),
    "training/local.py": ("training/test_local.py",),
}
"""Modules of the package -> the files under ``tests`` that are to notice a fault in them."""

EQUIVALENT: Final[Mapping[tuple[str, str, str], str]] = {
    ("privacy/accountant.py", "if spend.sampling_rate < 1:", "1 -> 2"): "a sample of everybody costs the same to 1e-6",
    ("privacy/secure_sum/site.py", "after = Consistent(stage, tuple(sorted(names)))",
     "sorted(names) -> sorted(names, reverse=True)"): "what is signed of them is sorted where it is written",
}  # fmt: skip
"""(module, text of the line, change) -> why the change makes no difference."""
COMPARISONS: Final[Mapping[type[ast.cmpop], type[ast.cmpop]]] = {
    ast.Lt: ast.LtE, ast.LtE: ast.Lt, ast.Gt: ast.GtE, ast.GtE: ast.Gt, ast.Eq: ast.NotEq, ast.NotEq: ast.Eq,
    ast.In: ast.NotIn, ast.NotIn: ast.In, ast.Is: ast.IsNot, ast.IsNot: ast.Is,
}  # fmt: skip
OPERATORS: Final[Mapping[type[ast.operator], type[ast.operator]]] = {
    ast.Add: ast.Sub, ast.Sub: ast.Add, ast.Mult: ast.Div, ast.Div: ast.Mult, ast.FloorDiv: ast.Mult,
    ast.Mod: ast.FloorDiv, ast.Pow: ast.Mult, ast.LShift: ast.RShift, ast.RShift: ast.LShift,
    ast.BitAnd: ast.BitOr, ast.BitOr: ast.BitAnd, ast.BitXor: ast.BitOr,
}  # fmt: skip
NAMES: Final = {"min": "max", "max": "min", "any": "all", "all": "any", "floor": "ceil", "ceil": "floor"}
FIELDS_LEFT_OUT: Final = ("annotation", "returns", "decorator_list")


@dataclass(frozen=True)
class Mutant:
    """One change of a module: on which line, what it was and became, and the module's source with it."""

    line: int
    change: str
    source: str


def mutants(source: str) -> list[Mutant]:
    """Every small change of a module, in the order of its lines."""
    tree = ast.parse(source)
    found = []
    for holder, key, node in _places(tree):
        before = ast.unparse(node)
        for changed in (*_other_operators(node, key), *_other_values(node)):
            _put(holder, key, changed)
            found.append(Mutant(node.lineno, f"{before} -> {ast.unparse(changed)}", ast.unparse(tree)))
        _put(holder, key, node)
    return sorted(found, key=lambda mutant: mutant.line)


def _places(parent: ast.AST) -> Iterator[tuple[Any, Any, Any]]:
    """Where each statement or expression hangs: (holder, key, node); not in types, decorators, errors and messages."""
    for name, value in ast.iter_fields(parent):
        several = [(value, place, node) for place, node in enumerate(value)] if isinstance(value, list) else None
        for holder, key, node in several or [(parent, name, value)]:
            if name in FIELDS_LEFT_OUT or not isinstance(node, ast.AST) or _is_left_out(node):
                continue
            if isinstance(node, ast.expr | ast.stmt):
                yield holder, key, node
            yield from _places(node)


def _is_left_out(node: ast.AST) -> bool:
    if isinstance(node, ast.If):
        return ast.unparse(node.test) == "TYPE_CHECKING"
    return isinstance(node, ast.Raise | ast.JoinedStr) or (isinstance(node, ast.keyword) and node.arg == "strict")


def _put(holder: Any, key: Any, node: ast.AST) -> None:
    if isinstance(holder, list):
        holder[key] = node
    else:
        setattr(holder, key, node)


def _other_operators(node: Any, key: Any) -> Iterator[ast.AST]:
    if key == "test" and not isinstance(node, ast.Compare | ast.UnaryOp):
        yield ast.UnaryOp(ast.Not(), node)
    match node:
        case ast.Compare(left, ops, comparators):
            for place, own in enumerate(ops):
                yield ast.Compare(left, [*ops[:place], COMPARISONS[type(own)](), *ops[place + 1 :]], comparators)
        case ast.BinOp(left, own, right) if type(own) in OPERATORS:
            yield ast.BinOp(left, OPERATORS[type(own)](), right)
        case ast.AugAssign(target, own, value) if type(own) in OPERATORS:
            yield ast.AugAssign(target, OPERATORS[type(own)](), value)
        case ast.BoolOp(own, values):
            yield ast.BoolOp(ast.And() if isinstance(own, ast.Or) else ast.Or(), values)
        case ast.UnaryOp(ast.Not() | ast.USub(), operand):
            yield operand


def _other_values(node: ast.AST) -> Iterator[ast.AST]:
    match node:
        case ast.Constant(bool(value)):
            yield ast.Constant(not value)
        case ast.Constant(int(value) | float(value)):
            yield ast.Constant(value + 1)
        case ast.Name(name, ast.Load()) if name in NAMES:
            yield ast.Name(NAMES[name], ast.Load())
        case ast.Attribute(value, name, ast.Load()) if name in NAMES:
            yield ast.Attribute(value, NAMES[name], ast.Load())
        case ast.Call(ast.Name("sorted") as function, arguments, keywords):
            others = [own for own in keywords if own.arg != "reverse"]
            added = [ast.keyword("reverse", ast.Constant(True))] if len(others) == len(keywords) else []
            yield ast.Call(function, arguments, others + added)


def modules() -> dict[str, tuple[str, ...]]:
    """Module (its path in the package) -> the paths of its test files, both as they are now."""
    found = {}
    for pattern, tests in MODULES.items():
        files = tuple(f"tests/{name}" for test in tests for name in _found(Path("tests"), test))
        found.update({name: files for name in _found(PACKAGE, pattern) if not name.endswith("__init__.py")})
    return found


def _found(folder: Path, pattern: str) -> list[str]:
    paths = sorted(path.relative_to(ROOT / folder).as_posix() for path in (ROOT / folder).glob(pattern))
    if not paths:
        raise SystemExit(f"scripts/mutate.py: nothing under {folder} matches {pattern!r}; correct the table MODULES")
    return paths


def drawn(names: Iterable[str], count: int, seed: int) -> list[tuple[str, Mutant]]:
    """One change on each of so many lines, which are drawn from all that can be changed."""
    lines: dict[tuple[str, int], list[Mutant]] = {}
    for name in sorted(names):
        for mutant in mutants((ROOT / PACKAGE / name).read_text(encoding="utf-8")):
            lines.setdefault((name, mutant.line), []).append(mutant)
    generator = random.Random(seed)
    chosen = sorted(generator.sample(sorted(lines), min(count, len(lines))))
    return [(name, generator.choice(lines[name, line])) for name, line in chosen]


def at(*places: str) -> list[tuple[str, Mutant]]:
    """Every change on the lines of places such as ``privacy/ring.py:40-60``."""
    found = []
    for place in places:
        if not (match := re.fullmatch(r"(.+):(\d+)(?:-(\d+))?", place)):
            raise SystemExit(f"--at {place}: give a module of the package and lines, such as privacy/ring.py:40-60")
        name, first, last = match[1], int(match[2]), int(match[3] or match[2])
        source = (ROOT / PACKAGE / name).read_text(encoding="utf-8")
        found += [(name, mutant) for mutant in mutants(source) if first <= mutant.line <= last]
    return found


def outcome(copy: Path, name: str, mutant: Mutant, tests: Sequence[str], seconds: int) -> str:
    """``killed by TEST``, ``killed: ...``, ``survived``, or ``equivalent: ...`` without running a test."""
    module = copy / PACKAGE / name
    whole = module.read_bytes()
    if note := EQUIVALENT.get((name, whole.decode().splitlines()[mutant.line - 1].strip(), mutant.change)):
        return f"equivalent: {note}"
    module.write_text(mutant.source, encoding="utf-8")
    try:
        return tested(copy, tests, seconds)
    finally:
        module.write_bytes(whole)


def tested(copy: Path, tests: Sequence[str], seconds: int) -> str:
    """Runs test files of the copy until the first one fails."""
    command = [sys.executable, "-m", "pytest", "-x", "-q", "-m", "not end_to_end", "-p", "no:cacheprovider", *tests]
    environment = {**os.environ, "PYTHONPATH": str(copy / "src"), "PYTHONDONTWRITEBYTECODE": "1"}
    try:
        done = subprocess.run(command, cwd=copy, env=environment, capture_output=True, text=True, timeout=seconds)
    except subprocess.TimeoutExpired:
        return f"killed: the tests took more than {seconds} s"
    if done.returncode == 0:
        return "survived"
    if done.returncode == 5:
        raise SystemExit(f"no test ran: {' '.join(tests)}; correct the table MODULES")
    failed = re.search(r"^(?:FAILED|ERROR) tests/(\S+)", done.stdout, re.MULTILINE)
    return f"killed by {failed[1]}" if failed else f"killed: pytest ended with {done.returncode}"


def main() -> None:
    """Prints one line of a Markdown table for each change, as soon as its tests have run."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--lines", type=int, default=40, help="how many lines are changed")
    parser.add_argument("--seed", type=int, default=0, help="draws the lines")
    parser.add_argument("--at", nargs="+", metavar="MODULE:FIRST-LAST", help="make every change on these lines instead")
    parser.add_argument("--seconds", type=int, default=600, help="how long the tests of one change may take")
    options = parser.parse_args()
    tests = modules()
    chosen = at(*options.at) if options.at else drawn(tests, options.lines, options.seed)
    with tempfile.TemporaryDirectory() as folder:
        copy = Path(folder)
        for part in COPIED:
            source = ROOT / part
            (shutil.copytree if source.is_dir() else shutil.copy)(source, copy / part)
        needed = sorted({file for name, _ in chosen for file in tests[name]})
        if (whole := tested(copy, needed, 10 * options.seconds)) != "survived":
            raise SystemExit(f"the tests fail without any change: {whole}")
        print("| where | change | result |\n|---|---|---|", flush=True)
        for name, mutant in chosen:
            result = outcome(copy, name, mutant, tests[name], options.seconds)
            change = mutant.change.replace("|", "\\|")
            print(f"| {name}:{mutant.line} | `{change}` | {result} |", flush=True)


if __name__ == "__main__":
    main()
