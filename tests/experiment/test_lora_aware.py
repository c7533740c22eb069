"""Whole runs under LoRA rules: faults of the configuration, what is saved, and that it is the model that was scored."""

from __future__ import annotations

import tomllib
from collections.abc import Callable
from pathlib import Path

import pytest

import tiny
from markdown import ROOT, blocks
from silotune import lora
from silotune.config import Config
from silotune.errors import ConfigError, ModelError, PolicyError
from silotune.experiment.audit import verify_run
from silotune.experiment.prepare import prepare
from silotune.experiment.run import run_experiment
from silotune.experiment.tuned import evaluate, export, load_tuned
from silotune.report.runs import summary_table
from silotune.settings.lora_rules import LORA_RULES, PERSONALIZATIONS

Make = Callable[..., Config]


@pytest.mark.parametrize(
    ("sections", "needles"),
    [
        ({"federation": {"lora": "stack"}, "adapter": {"type": "ia3"}}, ["'stack' needs adapter.type = 'lora'"]),
        ({"federation": {"lora": "svd"}, "adapter": {"dora": True}}, ["not adapter.dora = true"]),
        ({"federation": {"ranks": {"a": 1}}, "adapter": {"type": "none"}}, ["federation.ranks needs adapter.type"]),
        ({"federation": {"ranks": {"a": 9}}}, ["'a' = 9 exceeds adapter.rank = 2"]),
        ({"federation": {"lora": "sb", "ranks": {"a": 1}}}, ["no ranks by client"]),
        (
            {
                "federation": {
                    "lora": "exact-residual",
                    "algorithm": {"server_learning_rate": 0.5},
                    "personalization": "ditto",
                },
                "training": {"optimizer_state": "keep"},
            },
            ["server_learning_rate = 1", "use 'fine-tune'", "optimizer_state = 'reset'"],
        ),
        ({"federation": {"lora": "stack", "aggregation": "median"}}, ["federation.aggregation = 'mean' and"]),
        ({"federation": {"lora": "freeze-a", "algorithm": "feddyn"}}, ["keeps a control for all that is trained"]),
        (
            {"federation": {"lora": "share-a", "personalization": "fine-tune"}, "evaluation": {"keep": "best"}},
            ["a model of its own already", "no global model to select by"],
        ),
        ({"federation": {"ranks": {"a": 1}, "memory_mb": {"a": 1.0}}}, ["keep one"]),
        ({"federation": {"memory_mb": {"a": 1.0}, "policies": {"a": "policy.toml"}}}, ["in federation.policies: keep"]),
        ({"federation": {"lora": "stak"}}, ["did you mean 'stack'"]),
    ],
)
def test_what_does_not_go_together_is_said_at_once(configuration: Make, sections: dict, needles: list[str]) -> None:
    with pytest.raises(ConfigError) as caught:
        configuration(**sections)
    for needle in needles:
        assert sum(needle in fault for fault in caught.value.faults) == 1, caught.value.faults
    assert len(caught.value.faults) == len(needles)


def test_the_page_s_rules_and_example_are_the_configuration_s(configuration: Make) -> None:
    page = ROOT / "docs" / "lora-aggregation.md"
    text = page.read_text(encoding="utf-8")
    for name in (*LORA_RULES, *PERSONALIZATIONS):
        assert f"`{name}`" in text or f'"{name}"' in text or name == "none"
    (example,) = blocks(page, "toml")
    made = configuration(**tomllib.loads(example)).federation
    assert made.ranks == {"clinic-3": 4} and made.memory_mb == {"clinic-7": 2.5}
    assert made.policies == {"clinic-9": Path("clinic-9/policy.toml")}


def test_a_rank_for_nobody_is_refused(configuration: Make) -> None:
    with pytest.raises(ConfigError, match="unknown client 'client-9'"):
        run_experiment(configuration(federation={"ranks": {"client-9": 1}}))
    with pytest.raises(ConfigError, match="'client-0' do not hold"):
        run_experiment(configuration(federation={"memory_mb": {"client-0": 1e-6}}))


def test_a_policy_bounds_the_rank(configuration: Make, tmp_path: Path) -> None:
    place = tmp_path / "policy.toml"
    prepared = prepare(configuration())
    whole, rank = sum(tensor.numel() for tensor in prepared.initial.values()), lora.rank_of(prepared.initial)
    for values, expected in ((whole, {"client-1": rank}), (whole - 1, {"client-1": rank - 1})):
        place.write_text(f"largest_adapter = {values}\n")
        assert prepare(configuration(federation={"policies": {"client-1": str(place)}})).ranks == expected
    place.write_text("")
    assert prepare(configuration(federation={"policies": {"client-1": str(place)}})).ranks == {}
    with pytest.raises(PolicyError, match="there is no"):
        prepare(configuration(federation={"policies": {"client-1": str(place.parent / "none.toml")}}))


@pytest.mark.end_to_end
@pytest.mark.parametrize("rule", ["exact-residual", "stack", "sb"])
def test_the_saved_adapter_is_the_model_that_was_scored(rule: str, configuration: Make) -> None:
    run = run_experiment(configuration(federation={"lora": rule, "rounds": 2}, record={"keep_updates": True}))
    part = run.part("federated")
    checked = verify_run(run.path)
    assert checked.has_adapter and checked.rounds == 2  # the kept updates aggregate to this model again
    result = part.read_json("result")
    figures = evaluate(run.path)
    for name in ("accuracy", "macro_f1"):
        assert figures[name] == pytest.approx(result["metrics"][name], abs=1e-6)
    _, saved = part.load_adapter()
    assert (saved["r"] == 2) == (rule == "sb")
    assert saved["lora_alpha"] / saved["r"] == pytest.approx(2)
    assert load_tuned(run.path).config["r"] == saved["r"]


@pytest.mark.end_to_end
def test_a_model_whose_residual_exceeds_the_layers_rank_is_used_as_any_other(
    configuration: Make, tmp_path: Path
) -> None:
    options = {"federation": {"lora": "exact-residual", "rounds": 2}, "training": {"max_steps": 1}}
    run = run_experiment(configuration(**options, adapter={"rank": 24, "alpha": 48}))
    result, (_, saved) = run.part("federated").read_json("result"), run.part("federated").load_adapter()
    assert saved["r"] > 32  # the width of the model
    assert evaluate(run.path)["accuracy"] == pytest.approx(result["metrics"]["accuracy"], abs=1e-6)
    assert (export(run.path, tmp_path / "merged", merge=True) / "model.safetensors").is_file()
    start = {"start": str(run.path), "rank": saved["r"], "alpha": saved["lora_alpha"]}
    went_on = run_experiment(configuration(adapter=start, federation={"rounds": 1}, record={"name": "on"}))
    assert went_on.part("federated").load_adapter()[1]["r"] == saved["r"]
    with pytest.raises(ModelError, match=f"set adapter.rank = {saved['r']} and adapter.alpha = {saved['lora_alpha']}"):
        run_experiment(configuration(adapter={**start, "rank": 24}, record={"name": "off"}))


@pytest.mark.end_to_end
@pytest.mark.parametrize(
    "federation", [{"lora": "share-a"}, {"personalization": "ditto"}, {"personalization": "fine-tune", "lora": "stack"}]
)
def test_own_models_are_saved_and_scored_on_their_own_share(federation: dict, configuration: Make) -> None:
    run = run_experiment(configuration(federation={"ranks": {"client-1": 1}, **federation}))
    personal = run.part("federated").read_json("result")["personal"]
    assert personal["num_examples"] == 18 and personal["without"] == []
    assert sum(row["own"]["num_examples"] for row in personal["by_client"].values()) == 18
    right = sum(row["own"]["accuracy"] * row["own"]["num_examples"] for row in personal["by_client"].values())
    assert personal["metrics"]["accuracy"] == pytest.approx(right / 18)
    assert all(row["global"]["num_examples"] == row["own"]["num_examples"] for row in personal["by_client"].values())
    for name in personal["by_client"]:
        assert run.part("federated", "personal", name).load_adapter()[0]
    assert "federated, own models" in list(summary_table(run.read_json("summary")).columns[0].cells)
    figures = evaluate(run.path, mode="federated/personal/client-0")
    assert figures["num_examples"] == 18


@pytest.mark.end_to_end
@pytest.mark.parametrize("federation", [{"ranks": {"client-0": 1}}, {"lora": "svd"}, {"lora": "alternate"}])
def test_a_mixture_of_experts_is_federated_by_all_rules_for_factors(
    federation: dict, configuration: Make, tmp_path: Path
) -> None:
    tiny.save(tmp_path / "base", "qwen3_moe")
    options = {"model": {"name": str(tmp_path / "base")}, "training": {"max_steps": 1}}
    run = run_experiment(configuration(**options, federation={"rounds": 1, **federation}))
    result = run.part("federated").read_json("result")
    assert evaluate(run.path)["accuracy"] == pytest.approx(result["metrics"]["accuracy"], abs=1e-6)
    assert any("factors of fused experts" in note for note in run.read_json("summary")["notes"]) == (
        federation != {"lora": "alternate"}
    )
    for rule in ("exact-residual", "stack", "sb"):
        with pytest.raises(ConfigError, match=rf"'{rule}' is for linear layers.*'k_proj'"):
            prepare(configuration(**options, federation={"lora": rule}))
