"""The pages of a dossier as a table: which facts stand under which heading, and what a person has to judge there."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Part:
    """A heading of a page.

    Attributes:
        title: The heading.
        facts: Names of facts, as ``dossier_facts.facts_of`` gives them.
        says: A sentence about them.
        judgements: Questions that no file answers; each is left open and marked.
    """

    title: str
    facts: tuple[str, ...] = ()
    says: str = ""
    judgements: tuple[str, ...] = ()


_COMPUTE = ("tokens", "parameters", "trainable", "flops", "base_flops", "share")
_RESULTS = ("metric", "split", "figure", "interval", "base_figure", "notes")
_METHOD = ("adapter", "algorithm", "lora", "rounds", "learning_rate", "batch_size", "budget", "seed")
_PRIVACY = ("dp", "epsilon", "delta", "protection", "promise")
_SOFTWARE = ("python", "platform", "machine")

_MODEL_CARD = (
    Part("Model", ("model", "revision", "precision", "adapter_sha256")),
    Part("Data", ("task", "institutions", "examples", "partition", "data_sha256")),
    Part("Training", (*_METHOD, "seconds", "peak_memory_bytes", "bytes_up", "bytes_down")),
    Part("Figures", _RESULTS),
    Part("Privacy", (*_PRIVACY, "leakage")),
    Part(
        "Use", judgements=("Intended use, and uses that are out of scope.", "Licence of the base and of the adapter.")
    ),
)
_EVIDENCE = (
    Part("Privacy ledger", ("ledger", *_PRIVACY)),
    Part("Audit trail", ("audit_on", "audit")),
    Part("Charter and policies", ("charter", "policies")),
    Part(
        "Leakage report",
        ("leakage",),
        "What an attack did not find, a better one may: these figures bound leakage from below.",
    ),
)
_DPIA = (
    Part(
        "Description of the processing",
        ("task", "model", "institutions", "examples", "partition", "algorithm", "rounds"),
        "To be copied into the template of the European Data Protection Board; the headings are silotune's own.",
        (
            "Name and contact of the controllers, joint controllers and processors.",
            "Purposes of the processing and its legal basis.",
            "Categories of persons and of personal data.",
            "How long data, adapters and checkpoints are kept.",
        ),
    ),
    Part(
        "Flows of data",
        ("bytes_up", "bytes_down", "promise", "protection"),
        judgements=("Recipients of the trained model, and transfers to third countries.",),
    ),
    Part(
        "Necessity and proportionality",
        ("figure", "interval", "base_figure"),
        judgements=("Is the processing necessary and proportionate?", "How are the rights of persons exercised?"),
    ),
    Part(
        "Measures",
        ("dp", "epsilon", "delta", "protection", "audit", "charter"),
        judgements=("Which further technical and organisational measures are in place?",),
    ),
    Part(
        "Risks that were measured",
        ("leakage", "epsilon"),
        judgements=("Likelihood and severity of each risk.", "Is the residual risk acceptable?"),
    ),
    Part(
        "Consultation and decision",
        judgements=(
            "Advice of the data-protection officer.",
            "Views of the persons concerned.",
            "Is prior consultation of the authority needed?",
            "Decision, name and date.",
        ),
    ),
)
_ANNEX_IV = (
    Part(
        "1. General description of the system",
        ("task", "model", "revision", "adapter", *_SOFTWARE),
        judgements=("Intended purpose, provider, version.", "How it is placed on the market; hardware; instructions."),
    ),
    Part(
        "2. Elements of the system and its development",
        (*_METHOD, "institutions", "examples", "data_sha256", *_COMPUTE, *_RESULTS),
        judgements=("Human oversight (Article 14).", "Provenance, labelling and cleaning of the data."),
    ),
    Part(
        "3. Monitoring, functioning and control",
        ("figure", "interval", "notes", "audit"),
        judgements=("Foreseeable unintended outcomes, and risks to health, safety and fundamental rights.",),
    ),
    Part(
        "4. Appropriateness of the performance metrics", ("metric",), judgements=("Why these metrics fit the purpose.",)
    ),
    Part("5. Risk management system (Article 9)", ("leakage",), judgements=("The risk management system.",)),
    Part("6. Relevant changes through the lifecycle", judgements=("Changes that the provider made.",)),
    Part("7. Harmonised standards applied", judgements=("Standards, or other solutions adopted.",)),
    Part("8. EU declaration of conformity", judgements=("A copy of the declaration.",)),
    Part("9. Post-market monitoring (Article 72)", judgements=("The monitoring plan.",)),
)
_ANNEX_XI = (
    Part(
        "Section 1, 1. General description of the model",
        ("task", "model", "revision", "adapter", "parameters", "trainable"),
        judgements=("Acceptable use policies, date and way of release, modality, licence.",),
    ),
    Part("Section 1, 2. Training process", _METHOD, judgements=("Key design choices and their rationale.",)),
    Part(
        "Section 1, 2. Data",
        ("institutions", "examples", "partition", "data_sha256"),
        judgements=("Type and provenance of the data, curation, detection of bias.",),
    ),
    Part(
        "Section 1, 2. Computational resources and energy",
        (*_COMPUTE, "seconds", "joules", "co2"),
        "The share is fine-tuning's operations by those of the base's own training, which no file of a run says.",
    ),
    Part(
        "Section 2. Models with systemic risk",
        judgements=("Whether this section applies; if so, evaluation, adversarial testing and architecture.",),
    ),
)
_HIPAA = (
    Part("(a) Access control", judgements=(
        "(2)(i) Unique user identification and (ii) emergency access: nothing in a run folder says it.",
        "(2)(iii) Automatic logoff: nothing in a run folder says it.",
        "(2)(iv) Encryption at rest: silotune does not encrypt run folders; say what the disks do.",
    )),
    Part("(b) Audit controls", ("audit_on", "audit"), judgements=("Who examines the records, and how often.",)),
    Part("(c) Integrity", ("audit", "data_sha256", "adapter_sha256"), judgements=("What else guards it.",)),
    Part("(d) Person or entity authentication", ("charter", "audit"), judgements=("How persons and sites are known.",)),
    Part(
        "(e) Transmission security",
        ("protection", "bytes_up", "bytes_down"),
        "Differential privacy and protected sums are no encryption of a transport.",
        ("How the transport between sites and coordinator is encrypted, and by which certificates.",),
    ),
)  # fmt: skip
PAPERS: tuple[tuple[str, str, tuple[Part, ...]], ...] = (
    ("model-card.html", "Model card", _MODEL_CARD),
    ("evidence.html", "Privacy, audit, charter and leakage", _EVIDENCE),
    ("dpia.html", "Data protection impact assessment, prefilled", _DPIA),
    ("ai-act-annex-iv.html", "AI Act, Annex IV, skeleton", _ANNEX_IV),
    ("ai-act-annex-xi.html", "AI Act, Annex XI, skeleton", _ANNEX_XI),
    ("45-cfr-164-312.html", "Security measures by 45 CFR 164.312", _HIPAA),
)
"""File, title and headings of each page."""
