"""The report of a grid holds every cell, needs no network, and says what the numbers say."""

from __future__ import annotations

import csv
import html
import re
import shutil
import struct
import subprocess
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from finished_grid import LEVELS, Level, finished_grid, usual
from silotune.errors import RunFolderError
from silotune.evaluation.comparison import compare
from silotune.evaluation.observations import observe
from silotune.evaluation.statistics import describe
from silotune.record.grids import Cell, GridFolder
from silotune.report.figures import LONGEST_NAME, Picture, _front_line, apart, slug
from silotune.report.findings import findings
from silotune.report.grid import GridReport, as_mapping, facts_of, write_report
from silotune.report.pictures import panels
from silotune.report.tables import cell_rows

SMALL: Mapping[str, Any] = {"tasks": ("finance-news",), "adapters": ("lora",), "partitions": ("alpha 0.1",)}
"""Few pictures: each takes about half a second to draw."""
TWO = "finance-news with nano, alpha 0.1, fedavg"


def levels(**means: float) -> Level:
    """Means of the modes with a point of spread over the seeds."""

    def level(cell: Cell, mode: str) -> float:
        place = {"isolated": 0, "federated": 1, "centralized": 2}[mode]
        return means[mode] + 0.005 * ((cell.seed + place) % 3 - 1)

    return level


def estimated(cell: Cell, mode: str) -> Mapping[str, Any]:
    size = 2.0 if cell.adapter == "lora" else 1.0
    return {"joules": 100 * size, "co2_kg": 0.001, "energy_source": "estimated", "bytes_up": 1e6 * size,
            "bytes_down": 1e6 * size, "seconds": 5.0, "core_seconds": 9.0, "peak_memory_bytes": 8e8,
            "gpu_peak_memory_bytes": None, "trainable_parameters": 1000, "tokens": 5}  # fmt: skip


def said(path: Path, **options: Any) -> list[str]:
    """The findings alone, without pictures."""
    folder = finished_grid(path, **options)
    return findings(compare(observe(folder)), facts_of(folder))


def one(sentences: list[str], *words: str) -> str:
    (found,) = [sentence for sentence in sentences if all(word in sentence for word in words)]
    return found


@pytest.fixture(scope="module")
def grid(tmp_path_factory: pytest.TempPathFactory) -> GridFolder:
    failed = ("medical, nano, ia3, fedavg, alpha 1.0, seed 1",)
    return finished_grid(tmp_path_factory.mktemp("grids") / "demo", cost=estimated, failed=failed)


@pytest.fixture(scope="module")
def report(grid: GridFolder) -> GridReport:
    return write_report(grid)


@pytest.fixture
def undrawn(monkeypatch: pytest.MonkeyPatch) -> None:
    """Drawing is most of a report's time: tests of words alone go without."""
    monkeypatch.setattr("silotune.report.grid.pictures", lambda folder, comparison: iter(()))


def test_everything_is_written(grid: GridFolder, report: GridReport) -> None:
    assert all(path.is_file() and path.stat().st_size for path in report.files)
    names = {str(path.relative_to(grid.path / "report")) for path in report.files}
    assert {"index.html", "report.md", "cells.csv"} <= names
    stems = {Path(name).stem for name in names if name.startswith("figures/")}
    for task in ("finance-news", "medical"):
        assert {f"{kind}-{task}-nano" for kind in ("modes", "rounds", "bytes", "energy")} <= stems
        assert {f"skew-{task}-alpha-0-1", f"skew-{task}-alpha-1-0"} <= stems
    for stem in stems:
        assert (grid.path / "report" / "figures" / f"{stem}.svg").read_bytes().startswith(b"<?xml")
        assert (grid.path / "report" / "figures" / f"{stem}.png").read_bytes().startswith(b"\x89PNG")


def test_every_cell_is_in_the_csv_and_every_row_on_the_page(grid: GridFolder, report: GridReport) -> None:
    with (grid.path / "report" / "cells.csv").open(encoding="utf-8", newline="") as file:
        rows = list(csv.DictReader(file))
    cells = grid.cells()
    assert len(rows) == 3 * len(cells) == 72
    assert {row["folder"] for row in rows} == {cell.folder for cell in cells}
    lost = [row for row in rows if row["status"] == "failed"]
    assert len(lost) == 3 and {row["reason"] for row in lost} == {"the loss is not finite"}
    first = next(row for row in rows if row["mode"] == "federated")
    assert float(first["accuracy"]) == pytest.approx(0.69) and first["perplexity"] == "" and first["joules"] == "200.0"
    page = (grid.path / "report" / "index.html").read_text(encoding="utf-8")
    text = (grid.path / "report" / "report.md").read_text(encoding="utf-8")
    for row in report.comparison.rows:
        assert row.task in page and row.main is not None
        assert f"{100 * row.main.mean:.1f} ± {100 * (row.main.deviation or 0):.1f}" in page
    for sentence in report.findings:
        assert sentence in html.unescape(page) and sentence in text
    assert "the loss is not finite" in page and "the loss is not finite" in text
    assert "(estimated)" in page and "same examples and steps in every mode" in page and "same budget" in text


def test_the_page_stands_alone_and_speaks_to_all(grid: GridFolder, report: GridReport) -> None:
    page = (grid.path / "report" / "index.html").read_text(encoding="utf-8")
    assert "http://" not in page and "https://" not in page and "<script" not in page and "@import" not in page
    assert set(re.findall(r'(?:src|href)="([^":]*)', page)) <= {"data"} | {
        f"#{name}" for name in re.findall(r'<section id="(\w+)"', page)
    }
    images = re.findall(r'<img src="data:image/svg\+xml;base64,[A-Za-z0-9+/=]+" alt="([^"]*)"', page)
    assert len(images) == page.count("<img ") == (len(report.files) - 3) // 2
    assert all(re.search(r"\d", alternative) and len(alternative) > 40 for alternative in images)
    assert '<html lang="en">' in page and 'name="viewport"' in page and "@media print" in page
    assert page.count("<table>") == page.count("<thead>") == page.count('role="region" tabindex="0" aria-labelledby')
    text = (grid.path / "report" / "report.md").read_text(encoding="utf-8")
    for name in re.findall(r"!\[[^\]]+\]\(([^)]+)\)", text):
        assert (grid.path / "report" / name).is_file()
    for block in re.findall(r"(?:^\|.*\n)+", text, flags=re.MULTILINE):
        assert len({len(re.findall(r"(?<!\\)\|", line)) for line in block.splitlines()}) == 1


def test_the_same_numbers_give_the_same_files(report: GridReport, tmp_path: Path) -> None:
    folder = finished_grid(tmp_path / "grid", cost=estimated, **SMALL)
    once, again = write_report(folder), write_report(folder, tmp_path / "out")
    assert len(once.files) > 3
    for left, right in zip(once.files, again.files, strict=True):
        if left.suffix != ".png":
            assert left.read_bytes() == right.read_bytes(), left.name
    numbers = as_mapping(report)
    assert len(numbers["claims"]) == 16 and numbers["claims"][0]["verdict"] == "better"


def test_findings_follow_the_numbers(tmp_path: Path) -> None:
    gain = said(tmp_path / "gain", level=levels(isolated=0.5, federated=0.7, centralized=0.75))
    assert "learning together beats learning alone by 20.0 points" in one(gain, f"On {TWO}", "alone")
    assert "pooling everybody's text would still be better than federation by 5.0" in one(gain, f"On {TWO}", "pooling")
    loss = said(tmp_path / "loss", level=levels(isolated=0.7, federated=0.5, centralized=0.45))
    assert "learning together is worse than learning alone by 20.0 points" in one(loss, f"On {TWO}", "alone")
    assert "federation beats even the pooled text, by 5.0 points" in one(loss, f"On {TWO}", "pooled")
    equal = said(tmp_path / "equal", level=levels(isolated=0.6, federated=0.6, centralized=0.6))
    assert "changes the figure by +0.0 points of accuracy, which the seeds do not" in one(equal, f"On {TWO}", "alone")
    overall = "On average over all tasks, partitions and adapters, with fedavg"
    assert "beats" in one(gain, overall, "alone") and "worse" in one(loss, overall, "alone")
    holm = 'single rows "federated − isolated"'
    assert one(gain, holm) != one(equal, holm) and ", 0 have p below 0.05" in one(equal, holm)


def test_a_finding_says_what_the_corrected_p_beside_it_says(tmp_path: Path) -> None:
    """5 points in every seed but for a little: its own interval leaves out 0, and p after correction is above 0.05."""
    sentences = said(tmp_path / "grid", level=levels(isolated=0.5, federated=0.7, centralized=0.75))
    found = one(sentences, f"On {TWO}", "pooling")
    p = float(re.search(r"p = (0\.\d+) after Holm's correction, 3 seeds", found)[1])
    assert ("which the seeds do not decide" in found) == (p >= 0.05)


def constant(cell: Cell, mode: str) -> Mapping[str, Any]:
    """All models but the centralised ones give one answer to all; two of three examples have it."""
    confusion = [[60, 0, 0], [30, 0, 0]] if mode != "centralized" else [[50, 10, 0], [10, 20, 0]]
    classes = {"yes": {"f1": 0.8, "support": 60}, "no": {"f1": 0.0, "support": 30}}
    return {"confusion": confusion, "per_class": classes}


@pytest.mark.usefixtures("undrawn")
def test_an_answer_that_is_always_the_same_is_never_called_a_gain(tmp_path: Path) -> None:
    means = levels(isolated=0.4, federated=0.66, centralized=0.9)
    sentences = said(tmp_path / "grid", level=means, metrics=constant)
    found = one(sentences, f"On {TWO}", "alone")
    assert "most models of the better mode answer one class only: that is no gain" in found and "beats" not in found
    assert "pooling everybody's text would still be better" in one(sentences, f"On {TWO}", "pooling")
    text = write_report(GridFolder.open(tmp_path / "grid")).files[1].read_text(encoding="utf-8")
    assert "66.0 ± 0.5 (one class only)" in text and "majority class" in text and "66.7 ± 0.0" in text
    low = said(tmp_path / "low", level=levels(isolated=0.4, federated=0.5, centralized=0.66), metrics=constant)
    assert "where always giving the most frequent answer gives 66.7 %" in one(low, "alpha 0.1", "finance", "cannot do")


@pytest.mark.usefixtures("undrawn")
def test_two_seeds_are_no_claim(tmp_path: Path) -> None:
    sentences = said(tmp_path / "grid", seeds=(0, 1), **SMALL)
    assert "fewer than 3 seeds (the fewest 2): nothing is claimed" in one(sentences, "comparisons")
    assert not [sentence for sentence in sentences if "learning" in sentence or "pooling" in sentence]
    page = write_report(GridFolder.open(tmp_path / "grid")).files[0].read_text(encoding="utf-8")
    assert page.count("no claim: fewer than 3 seeds") == 2 + 2


def test_a_model_that_cannot_do_the_task_is_told(tmp_path: Path) -> None:
    sentences = said(tmp_path / "grid", level=levels(isolated=0.5, federated=0.5, centralized=0.5), tasks=("medical",))
    assert "answers 50.0 % right, where guessing gives 50.0 %" in one(sentences, "alpha 0.1", "cannot do the task")
    fine = said(tmp_path / "fine", tasks=("medical",))
    assert not [sentence for sentence in fine if "cannot do" in sentence]


def test_adapters_are_compared_with_the_first(tmp_path: Path) -> None:
    sentences = said(tmp_path / "grid", cost=estimated)
    ia3 = one(sentences, "ia3 is")
    assert (
        "2.0 points of accuracy worse than lora" in ia3
        and "(fedavg)" in ia3
        and "0.50 times the bytes, 0.50 times the energy" in ia3
    )
    turned = said(tmp_path / "turned", cost=estimated, adapters=("ia3", "lora"))
    assert "lora is 2.0 points of accuracy better than ia3" in one(turned, "lora is")


def test_energy_has_an_interval_where_seeds_differ(tmp_path: Path) -> None:
    def by_seed(cell: Cell, mode: str) -> Mapping[str, Any]:
        more = 1 + 0.1 * cell.seed if cell.adapter == "ia3" else 1.0
        return {**estimated(cell, mode), "joules": 100 * more}

    ia3 = one(said(tmp_path / "grid", cost=by_seed), "ia3 is")
    assert "1.10 times the energy (95 % interval 0.85 to 1.35)" in ia3 and "0.50 times the bytes, " in ia3


def test_energy_is_never_printed_as_if_measured(tmp_path: Path) -> None:
    sentences = said(tmp_path / "none", **SMALL)
    assert "unavailable" in one(sentences, "Energy was not measured")
    page = write_report(GridFolder.open(tmp_path / "none")).files[0].read_text(encoding="utf-8")
    assert "there is no picture of energy" in page and " J (" not in page
    assert not list((tmp_path / "none" / "report" / "figures").glob("energy-*"))
    assert "estimated" in one(said(tmp_path / "estimated", cost=estimated), "Energy is")


def test_a_budget_is_kept_or_not(tmp_path: Path) -> None:
    folder = finished_grid(tmp_path / "grid")
    for megabytes, words in ((1.0, "keep to the budget of 1 MB"), (0.001, "8 of 8 federated rows send more")):
        folder.write({**folder.description(), "budget_bytes": megabytes * 2**20}, folder.cells())
        assert one(findings(compare(observe(folder)), facts_of(folder)), "budget", words)


def test_a_grid_with_nothing_done_has_a_report(tmp_path: Path) -> None:
    folder = finished_grid(tmp_path / "grid", failed=("finance", "medical"))
    report = write_report(folder)
    assert "24 of 24 cells have no result (24 failed, 0 not run yet)" in report.findings[0]
    assert "nothing is compared" in report.findings[1] and len(report.files) == 3


def test_names_cannot_break_the_page(tmp_path: Path) -> None:
    folder = finished_grid(tmp_path / "grid", **{**SMALL, "tasks": ("<b>|x",)})
    write_report(folder)
    assert "<b>" not in (folder.path / "report" / "index.html").read_text(encoding="utf-8")
    assert "<b>\\|x" in (folder.path / "report" / "report.md").read_text(encoding="utf-8")


@pytest.mark.usefixtures("undrawn")
def test_the_overhead_is_told_where_it_is_known(tmp_path: Path) -> None:
    def told(folder: GridFolder) -> str:
        return (write_report(folder).files[1]).read_text(encoding="utf-8")

    short = finished_grid(tmp_path / "short", **SMALL, seconds=10.0)  # 3 cells of 8 seconds: more than there was
    assert "overhead is not known" in told(short)
    folder = finished_grid(tmp_path / "grid", **SMALL, seconds=30.0)
    assert "20.0 % of the processes' time" in told(folder)
    folder.write(folder.description(), folder.cells()[:1])  # a grid that was made smaller: the others took their time
    assert "20.0 % of the processes' time" in told(folder)
    shutil.rmtree(folder.path / folder.cells()[0].folder)
    assert "overhead is not known" in told(folder)  # the sessions computed three


@pytest.mark.usefixtures("undrawn")
def test_the_figures_of_a_task_are_those_of_its_metric(tmp_path: Path) -> None:
    def chosen(cell: Cell, mode: str) -> Mapping[str, Any]:
        return {"preference_accuracy": 0.61, "win_rate": 0.7, "margin": 3.0}

    folder = finished_grid(tmp_path / "grid", **SMALL, metrics=chosen, metric="preference_accuracy")
    page = (write_report(folder).files[1]).read_text(encoding="utf-8")
    table = page[page.index("Results by data set") :].split("\n\n")[2]
    assert "finance-news: preferred | finance-news: win rate |" in table and "margin" not in table
    assert "| 61.0 ± 0.0 | 70.0 ± 0.0 |" in table


def test_pictures_of_one_name_are_told_apart() -> None:
    made = [Picture(slug("modes", task, "nano"), "modes", task, task, None) for task in ("新闻", "医疗", "news")]
    assert [(picture.name, picture.caption) for picture in apart(made)] == [
        ("modes----nano", "新闻"), ("modes----nano--2", "医疗"), ("modes-news-nano", "news"),
    ]  # fmt: skip
    assert len(slug("modes", "/models/" + "x" * 300)) == LONGEST_NAME


def test_the_line_joins_what_nothing_beats() -> None:
    """Over all algorithms of a panel: one that costs more and reaches less is not on it."""
    rows = [
        SimpleNamespace(metric="accuracy", main=describe([reached] * 3), costs={"bytes": cost})
        for cost, reached in ((1e6, 0.9), (2e6, 0.5), (3e6, 0.95))
    ]
    _, (axes,) = panels(4.0, 3.0, 1)
    _front_line(axes, rows, "bytes", 1e6)
    (line,) = axes.get_lines()
    assert line.get_xydata().tolist() == [[1.0, pytest.approx(90)], [3.0, pytest.approx(95)]]


def chromium() -> str | None:
    return shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")


@pytest.mark.end_to_end
@pytest.mark.skipif(chromium() is None, reason="no Chromium here: apt-get install chromium")
@pytest.mark.parametrize("width", [390, 1280])
def test_a_browser_shows_the_page_without_a_network(
    grid: GridFolder, report: GridReport, tmp_path: Path, width: int
) -> None:
    page = tmp_path / "page.html"
    probe = (
        "<script>window.onload = () => document.title = ["
        "document.documentElement.scrollWidth, innerWidth, "
        "[...document.images].filter(image => image.complete && image.naturalWidth > 100).length].join(' ')</script>"
    )
    page.write_text((report.files[0]).read_text(encoding="utf-8").replace("</body>", f"{probe}</body>"))
    options = ["--headless", "--no-sandbox", "--disable-gpu", "--hide-scrollbars", f"--user-data-dir={tmp_path}/user"]
    options += ["--host-resolver-rules=MAP * ~NOTFOUND", f"--window-size={width},2000", "--virtual-time-budget=10000"]

    def run(*more: str) -> str:
        command = [str(chromium()), *options, *more, page.as_uri()]
        return subprocess.run(command, capture_output=True, text=True, timeout=180, check=True).stdout

    found = re.search(r"<title>(\d+) (\d+) (\d+)</title>", run("--dump-dom"))
    assert found is not None
    wide, inner, images = (int(number) for number in found.groups())
    assert wide <= inner, "the page is wider than the screen"
    assert images == page.read_text().count("<img ")
    run(f"--screenshot={tmp_path}/shot.png")
    content = (tmp_path / "shot.png").read_bytes()
    assert struct.unpack(">II", content[16:24])[0] >= width and len(content) > 50_000


def test_the_fixture_is_as_the_tests_say() -> None:
    level: Callable[[Cell, str], float] = usual
    cell = Cell("finance-news", "nano", "lora", "fedavg", "alpha 0.1", 1, (), "", "")
    assert {mode: level(cell, mode) for mode in LEVELS} == LEVELS


def test_epsilon_stands_beside_accuracy(tmp_path: Path) -> None:
    """Seeds that spent 3.9, 4.0 and 4.1; isolated institutions, of which the largest counts."""
    folder = finished_grid(tmp_path / "grid", **SMALL)
    for cell in folder.cells():
        run = folder.run(cell)
        for place, more in (("federated",), 0.0), (("isolated", "client-0"), 1.0), (("isolated", "client-1"), 2.0):
            result = run.part(*place).read_json("result")
            spent = {"dp": "example", "epsilon": 3.9 + more + 0.1 * cell.seed, "delta": 1e-5}
            run.part(*place).write_json("result", {**result, "privacy": spent})
        said = {"dp": "example", "statement": ["the server sees noise", "a record is protected", "trusted: nobody"]}
        run.write_json("summary", {**run.read_json("summary"), "privacy": said})
    made = write_report(folder)
    text = (folder.path / "report" / "report.md").read_text(encoding="utf-8")
    assert "- the server sees noise; a record is protected; trusted: nobody (3 runs)" in text
    heads = next(line for line in text.splitlines() if "finance-news: accuracy" in line)
    assert heads.endswith("finance-news: accuracy | finance-news: macro-F1 | finance-news: epsilon |")
    section = text.split("### Epsilon and what was reached")[1].split("###")[0]
    rows = [
        [part.strip() for part in line.split("|")[1:-1]]
        for line in section.splitlines()
        if line.startswith("| finance-news")
    ]
    assert [(row[4], row[7], row[8]) for row in rows] == [("each alone", "6", "1e-05"), ("federated", "4", "1e-05")]
    assert (folder.path / "report" / "figures" / "epsilon-finance-news-nano.svg").is_file()
    (_, *cells) = (folder.path / "report" / "cells.csv").read_text(encoding="utf-8").splitlines()
    assert sum(",4.1,1e-05," in line for line in cells) == 1
    assert "a record is protected" in (folder.path / "report" / "index.html").read_text(encoding="utf-8")
    assert made.files


def test_rows_of_cells_that_were_run_elsewhere_stand_for_their_runs(tmp_path: Path, undrawn: None) -> None:
    there = finished_grid(tmp_path / "there", **SMALL, cost=estimated)
    cells = [replace(cell, portable=f"{number:064x}") for number, cell in enumerate(there.cells())]
    there.write(there.description(), cells)
    write_report(there)
    here = GridFolder.make(tmp_path / "here")
    here.write(there.description(), cells)
    here.add_known(there.path / "report" / "cells.csv")
    assert compare(observe(here)) == compare(observe(there))
    assert (facts_of(here).missing, facts_of(there).missing) == (0, 0)
    again = cell_rows(here, observe(here))
    assert [{**row} for row in again] == cell_rows(there, observe(there))


@pytest.mark.parametrize(
    ("rows", "said"),
    [
        ("a,b\n1,2\n", "is no cells.csv of a report of this version"),
        ("\xff\xfe", "is no cells.csv of a report of this version"),
        ("key,mode,status,metric,accuracy\nk,federated,done,accuracy,high\n", "row 1: accuracy is not what a report"),
        ("key,mode,status,metric,accuracy\nk,federated,done,accuracy,nan\n", "row 1: accuracy is not what a report"),
        ("key,mode,status,metric\nk,federated,done,luck\n", "row 1: metric is not what a report writes"),
        ("key,mode,status,metric,by_client\nk,federated,done,accuracy,[1\n", "row 1: by_client is not what a report"),
        ("key,mode,status,metric\nk,federated,done,accuracy,1\n", "row 1: a cell without a heading is not what"),
    ],
)
def test_rows_that_no_report_writes_are_refused_before_anything_is_kept(tmp_path: Path, rows: str, said: str) -> None:
    (tmp_path / "cells.csv").write_bytes(rows.encode("latin-1"))
    folder = GridFolder.make(tmp_path / "grid")
    with pytest.raises(RunFolderError, match=said) as caught:
        folder.add_known(tmp_path / "cells.csv")
    assert "\n" not in str(caught.value) and not (folder.path / "known.csv").exists()
