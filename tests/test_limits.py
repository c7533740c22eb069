"""The table of what does not go together: settings that would do nothing are refused, each with what it is for."""

from __future__ import annotations

import re

import pytest

from silotune.config import from_mapping, merge, overlaid
from silotune.errors import ConfigError
from silotune.settings.adapters import ADAPTERS
from silotune.settings.limits import LIMITS, SECTIONS, Limit, faults
from silotune.settings.sections import FederationSection, Sections, TrainingSection

IDLE = {
    "federation.algorithm.proximal_mu=0.1": "this is a setting of 'fedprox' and means nothing with 'fedavg'",
    "federation.algorithm.option=II": "this is a setting of 'scaffold'",
    "federation.algorithm.alpha=0.1": "this is a setting of 'feddyn'",
    "federation.algorithm.server_momentum=0.5": "this is a setting of 'fedavgm'",
    "federation.algorithm.server_beta1=0.9": "means nothing with 'fedavg'",
    "federation.algorithm.server_beta2=0.9": "means nothing with 'fedavg'",
    "federation.algorithm.server_tau=0.01": "means nothing with 'fedavg'",
    "federation.aggregation.trim=0.2": "this is a setting of 'trimmed-mean'",
    "federation.aggregation.bound=2": "this is a setting of 'norm-bound'",
    "federation.aggregation.malicious=2": "means nothing with 'mean'",
    "federation.weighting.fairness_q=2": "this is a setting of 'q-ffl'",
    "federation.weighting.cap=0.5": "this is a setting of 'capped'",
    "federation.personalization.pull=1": "means nothing with 'none'",
    "federation.attack.clients=1": "means nothing with 'none'",
    "federation.ray_cpus=2": "federation.ray_cpus is for federation.engine = 'ray' (now 'in_process')",
    "federation.ray_gpus=1": "federation.ray_gpus is for federation.engine = 'ray' (now 'in_process')",
    "federation.upload.share=0.2": "federation.upload.share is for federation.upload.keep = 'top-k' (now 'all')",
    "federation.upload.rank=2": "federation.upload.rank is for federation.upload.keep = 'low-rank'",
    "federation.upload.block=32": "is for federation.upload.values = 'int8' or 'int4' or 'sign'",
    "federation.download.share=0.2": "federation.download.share is for federation.download.keep = 'top-k'",
    "federation.clock.staleness_exponent=1": "is for federation.clock.buffer, which is not given",
    "federation.clock.over_sampling=2": "federation.clock.over_sampling needs federation.clients_per_round",
    "training.optimizer.momentum=0.5": "means nothing with 'adamw'",
    "training.objective.beta=0.3": "means nothing with 'sft'",
    "training.objective.preference_loss=ipo": "this is a setting of 'dpo'",
    "training.objective.label_smoothing=0.1": "means nothing with 'sft'",
    "training.objective.desirable_weight=2": "this is a setting of 'kto'",
    "privacy.dp.epsilon=3": "means nothing with 'none'",
    "privacy.dp.clip_norm=3": "means nothing with 'none'",
    "privacy.dp.ledger=here": "means nothing with 'none'",
    "privacy.dp.colluding=2": "this is a setting of 'distributed'",
    "privacy.dp.client_sampling=poisson": "this is a setting of 'client'",
    "privacy.protection.threshold=0.8": "this is a setting of 'secure_sum'",
    "privacy.protection.ring_bits=16": "this is a setting of 'secure_sum'",
    "privacy.protection.packing=2": "this is a setting of 'he'",
    "privacy.protection.least_clients=4": "means nothing with 'none'",
    "data.partition.scheme=iid data.partition.alpha=0.7": "data.partition.alpha is for data.partition.scheme",
    "data.partition.scheme=iid data.partition.field=sector": "data.partition.field is for data.partition.scheme",
    "data.holdout_seed=7": "data.holdout_seed is for data.holdout, which is not given",
    'data.mixture={"finance-news"=1}': "data.mixture needs data.task = 'mixture'",
    "training.max_steps=4 training.epochs=2": "training.epochs means nothing beside training.max_steps = 4: leave one",
    "evaluation.max_new_tokens=4": "evaluation.max_new_tokens is for evaluation.scoring = 'generation'",
    "evaluation.forgetting_tokens=99": "evaluation.forgetting_tokens is for evaluation.forgetting, which is not given",
    "evaluation.select_every=2": "evaluation.select_every: nothing is decided by the selection set",
    "evaluation.selection=test": "evaluation.selection: nothing is decided by the selection set",
    "record.audit=false record.keep_updates=true": "record.keep_updates is for record.audit = true (now false)",
    "record.audit=false record.audit_key=key": "record.audit_key is for record.audit = true (now false)",
    "record.energy=false record.country=DEU": "record.country is for record.energy = true (now false)",
    "adapter=ia3 adapter.rank=4": "this is a setting of 'lora' and 'qlora'",
    "adapter=none adapter.targets=all-linear": "means nothing with 'none'",
}
"""Overrides that change nothing about a run, and what is said of them."""


@pytest.mark.parametrize("overrides", IDLE)
def test_a_setting_that_would_do_nothing_is_refused_with_what_it_is_for(overrides: str) -> None:
    with pytest.raises(ConfigError) as caught:
        from_mapping(merge({}, overrides.split()))
    assert any(IDLE[overrides] in fault for fault in caught.value.faults), caught.value.faults


def test_every_default_goes_with_every_other() -> None:
    assert faults(Sections()) == [] and faults(from_mapping({})) == []
    assert from_mapping({"training": {"max_steps": 4}}).training.epochs == TrainingSection().epochs


def test_a_value_below_is_left_out_where_one_above_makes_it_mean_nothing() -> None:
    below = {"training": {"epochs": 2.0}, "evaluation": {"forgetting": "embedded", "forgetting_tokens": 99}}
    for changed in (
        merge(below, ["training.max_steps=4", "evaluation.forgetting="]),
        overlaid(below, {"training": {"max_steps": 4}, "evaluation": {"forgetting": ""}}),
    ):
        assert "epochs" not in changed["training"] and "forgetting_tokens" not in changed["evaluation"]


def test_the_subjects_of_the_table_can_be_asked_one_by_one() -> None:
    odd = Sections(
        training=TrainingSection(batch_size=1, objective="kto"),  # type: ignore[arg-type]
        federation=FederationSection(modes=()),
    )
    assert faults(odd, "guarantees") == []
    assert len(faults(odd, "method")) == len(faults(odd, "objectives")) == 1
    assert set(faults(odd)) == {*faults(odd, "method"), *faults(odd, "objectives")}


@pytest.mark.parametrize("limit", [each for rows in LIMITS.values() for each in rows], ids=lambda each: each.says[:60])
def test_what_a_limit_says_names_sections_or_what_its_cases_say(limit: Limit) -> None:
    names = set(re.findall(r"\{(\w+)", limit.says))
    assert names - {*SECTIONS, "what", "why", "key", "given", "clients", "name", "rank", "first", "second"} == set()
    assert limit.says[-1] not in ".:" and "  " not in limit.says


def test_a_limit_asks_for_traits_so_that_a_choice_of_a_plug_in_stands_in_the_table() -> None:
    class Odd(ADAPTERS["ia3"]):  # type: ignore[misc]
        """As a package of one's own may bring it."""

        type = "odd"
        needs_int4 = True

    assert faults(Sections(adapter=Odd())) == ["adapter.type = 'odd' needs model.precision = 'int4'"]
