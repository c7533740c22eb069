"""Whole runs over compressed links and under a simulated clock: what the folder says, and resume."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import pytest

import tiny
from silotune.config import Config
from silotune.errors import ConfigError
from silotune.experiment.audit import verify_run
from silotune.experiment.estimate import estimate
from silotune.experiment.run import resume_experiment, run_experiment
from silotune.record.runs import RunFolder

Make = Callable[..., Config]
LINKS = {
    "upload": {"keep": "top-k", "share": 0.1, "values": "sign", "zstd": 1},
    "download": {"delta": True, "values": "int8", "zstd": 1},
    "clock": {"deadline_seconds": 9.0, "clients": {"client-1": {"speed": 0.2}}},
}
BUFFERED = {"upload": {"values": "int4"}, "clock": {"buffer": 2, "speed_spread": 0.8, "seconds_per_step": 3.0}}


class StoppedError(Exception):
    pass


def stopping(last: int) -> Callable[[str, Mapping[str, Any]], None]:
    def observe(event: str, fields: Mapping[str, Any]) -> None:
        if event == "round_finished" and fields["round"] == last:
            raise StoppedError

    return observe


def rows(run: RunFolder, name: str) -> list[dict[str, Any]]:
    measured = ("seconds", "core_seconds", "joules", "cost", "train_seconds", "evaluate_seconds")
    return [
        {key: value for key, value in row.items() if key not in measured}
        for row in run.part("federated").read_rows(name)
    ]


@pytest.mark.end_to_end
@pytest.mark.parametrize("links", [LINKS, BUFFERED], ids=["deadline", "buffer"])
def test_a_run_over_links_resumes_with_the_same_bits(configuration: Make, links: dict[str, Any]) -> None:
    config = configuration(federation={**links, "rounds": 4}, training={"optimizer_state": "keep"})
    whole = run_experiment(config)
    with pytest.raises(StoppedError):
        run_experiment(config, observer=stopping(3))
    cut = resume_experiment(whole.path.with_name("demo-2"))
    tiny.assert_same_bits(*(run.part("federated").load_adapter()[0] for run in (whole, cut)))
    for name in ("metrics", "clients"):
        assert rows(whole, name) == rows(cut, name)
    metrics, result = rows(whole, "metrics"), whole.part("federated").read_json("result")
    seconds = [row["simulated_seconds"] for row in metrics[1:]]
    assert seconds == sorted(seconds) and result["simulated_seconds"] == seconds[-1] > 0
    failures = [failure for row in metrics for failure in row["failures"]]
    if "buffer" in links["clock"]:
        assert failures == [] and any(row["staleness"] for row in rows(whole, "clients"))
    else:
        assert {(failure["client"], failure["stage"]) for failure in failures} == {("client-1", "deadline")}
        assert seconds[0] == 9.0


@pytest.mark.end_to_end
def test_only_what_travels_is_compressed_and_timed(configuration: Make) -> None:
    modes = {"modes": ["isolated", "centralized"], "rounds": 1}
    plain = run_experiment(configuration(federation=modes))
    small = run_experiment(configuration(federation={**LINKS, **modes}))
    for part in (("centralized",), ("isolated", "client-0")):
        tiny.assert_same_bits(*(run.part(*part).load_adapter()[0] for run in (plain, small)))
        assert "simulated_seconds" not in small.part(*part).read_json("result")


@pytest.mark.end_to_end
def test_updates_that_came_packed_are_kept_as_they_were_aggregated(configuration: Make) -> None:
    run = run_experiment(configuration(federation={**LINKS, "rounds": 3}, record={"keep_updates": True}))
    checked = verify_run(run.path)
    assert checked.rounds == 3 and checked.has_adapter and checked.chain.is_closed


def test_the_estimate_knows_of_the_links(configuration: Make) -> None:
    plain, small = (estimate(configuration(federation=links)) for links in ({}, LINKS))
    assert small["bytes_per_round"] < plain["bytes_per_round"] / 2


def test_a_clock_names_clients_that_there_are(configuration: Make) -> None:
    with pytest.raises(ConfigError, match=r"federation.clock: unknown client 'client-9': did you mean 'client-"):
        run_experiment(configuration(federation={"clock": {"clients": {"client-9": {"speed": 2}}}}))
