"""What a site tells others of why it gives no reply: a closed list of codes, each with one sentence.

An error message of a site may hold names, paths, values and numbers of its examples, and a coordinator could provoke
errors to learn them. So only a code travels; the message itself is in the site's own log and audit trail. The
coordinator looks the sentence up, so no text of a site's reaches its records or its terminal.
"""

from __future__ import annotations

from collections.abc import Mapping

from silotune.errors import (
    BudgetError,
    ConfigError,
    DataError,
    KitError,
    MessageError,
    MissingPackageError,
    ModelError,
    PolicyError,
    PrivacyError,
    ProtectionError,
    RunFolderError,
    SilotuneError,
    TrainerLostError,
    TrainingError,
)

SEE = "; the site's own log and audit trail say more"
RULES: Mapping[str, str] = {
    "submitters": "the job is not signed by a submitter whom the site knows and allows",
    "coordinator": "the head of the coordinator's audit trail is missing or not signed by the federation's coordinator",
    "policy.toml": "the site's policy cannot be read, so everything is refused until it is mended",
    "job": "the request carries no job that can be read, or the job's signature does not fit",
    "job.expired": "the job has expired: its submitter signs it anew with 'silotune resume RUN --kit KIT --as KIT'",
    "job.run": "the job is of another run than the one that the request came with",
    "job.site": "the job does not name this site among its participants",
    "job.kind": "requests of this kind do not belong to the job",
    "job.order": "the order in the request names another setup, run or seed than those that the submitter signed",
    "job.round": "the round is not one of the job's",
    "job.cohort": "the sum is over fewer sites than the job says",
    "job.setup": "the run's setup is not the one that the submitter signed",
    "setup": "the run's setup names a place, cannot be read, or is larger than any run needs",
    "address": "the request is for another site",
    "bounds": "a setting of the request is beyond what any run needs",
    "working_hours": "requests are not served at this hour",
    "plugins": "the run uses plug-ins that the site has not installed in that version, or has not allowed",
    "charter": "the run does not name the charter that the site holds, or its last day has passed",
    "base_models": "the site does not allow its base model to be tuned",
    "tasks": "the site does not allow this task, or its examples are for another one",
    "objectives": "the site does not allow this objective",
    "smallest_adapter": "the site does not allow so small an adapter",
    "largest_adapter": "the site does not allow so large an adapter",
    "least_participants": "the run has too few participants for the site",
    "least_cohort": "the sum has too few sites for this one",
    "secure_aggregation": "updates of this site leave only inside a secure sum",
    "plain_gradients": "plain gradients leave this site only with noise of its own",
    "least_threshold": "the sum's threshold is too low for the site",
    "least_colluding": "the sum's noise is not enough without the shares of as many sites as the site's policy asks",
    "leakage_audit": "the site asks that the run measures what its model gives away, and it has not been measured",
    "largest_membership_advantage": "the run's model gives away more of the site's examples than its policy allows",
    "largest_epsilon_run": "the site's privacy budget for one run does not allow it",
    "largest_epsilon_total": "the site's privacy budget over all runs does not allow it",
    "largest_upload_bytes": "the reply would be larger than the site allows",
    "smallest_count": "the reply would speak of fewer examples than the site allows",
    "generation": "text may not be generated from the site's prompts",
    "most_models": "the round was trained with other models before, as many as the site allows",
    "most_scorings": "the run was scored on the site's examples as often as the site allows",
    "most_steps": "a round of so many steps is not allowed at the site",
    "most_seconds": "the round took longer than the site allows",
}
"""Rule of a refusal -> what the coordinator is told: the rule, and nothing about the site that it does not know."""
REASONS: Mapping[str, str] = {
    "form": "the request is not one that the site can read",
    "data": "the site's examples cannot be used for this run",
    "model": "the site's base model is not the run's, or cannot be loaded",
    "training": "the local round gave no usable update: its loss was not finite; lower training.learning_rate",
    "configuration": "the run's settings do not go together at the site",
    "protection": "the site takes no further part in this sum",
    "budget": "the privacy budget does not allow the round",
    "privacy": "the guarantee cannot be given",
    "disk": "no space left, or no permission, at the site",
    "package": "a package that the run needs is not installed at the site",
    "kit": "a key or a file of the site's kit cannot be used",
    "memory": "the site's memory is too small for the round",
    "trainer": "the site's trainer died over the request, or did not come back",
    "federation": "the site could not do the round",
    "error": "an unexpected error at the site",
    **RULES,
}
"""Code -> its sentence."""

_BY_TYPE: tuple[tuple[type[BaseException], str], ...] = (
    (MessageError, "form"), (ProtectionError, "protection"), (DataError, "data"), (ModelError, "model"),
    (TrainingError, "training"), (ConfigError, "configuration"), (BudgetError, "budget"), (PrivacyError, "privacy"),
    (TrainerLostError, "trainer"),
    (RunFolderError, "disk"), (MissingPackageError, "package"), (KitError, "kit"), (MemoryError, "memory"),
    (SilotuneError, "federation"),
)  # fmt: skip
"""The first type that an error is of gives its code."""


def code_of(error: BaseException) -> str:
    """The code that a site sends for an error of its own."""
    if isinstance(error, PolicyError):
        return error.rule if error.rule in RULES else "error"
    return next((code for kind, code in _BY_TYPE if isinstance(error, kind)), "error")


def sentence_of(code: str) -> str:
    """What the coordinator records for a code that came from a site, also where the code is not on the list."""
    if code in RULES:
        return f"policy rule {code!r}: {RULES[code]}{SEE}"
    return REASONS.get(code, "the site gave a reason that is not on the list") + SEE
