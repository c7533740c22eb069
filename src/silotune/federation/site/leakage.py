"""Membership at a site: what the model that came gives away of the site's own examples, measured where they are.

The site compares examples that it trained on with those that it held back. Only figures leave, and under differential
privacy not even these; the site writes them down for its own policy, which may forbid to sign such a model.
"""

from __future__ import annotations

from silotune.errors import PrivacyError
from silotune.evaluation.leakage import membership
from silotune.federation.site.ledger import has_spent
from silotune.federation.site.state import Site
from silotune.federation.wire.orders import read_order
from silotune.structs import Reply, Request
from silotune.tensors import digest
from silotune.training.encode import Encoded

FIGURES = ("auc", "auc_interval", "advantage")
"""Of the reply's body: what tells how well members are known."""


def measure(request: Request, site: Site) -> Reply:
    """``leakage``: how well the model's loss, or its gain over the base, tells the site's members from its reserve.

    The figures are of the score that tells more. The advantage is 2 AUC - 1 at the upper end of its 95 % interval: what
    a bound has to hold for.

    Raises:
        PrivacyError: Nothing was held back, or too little for an interval.
    """
    read_order(request)
    members, reserve = site.members, site.reserve
    count, scored = len(members), _scored(request, site, [*members, *reserve])
    made = [membership.SCORES[name](scored) for name in _SCORES]
    every = [membership.advantage(values[:count], values[count:]) for values in made]
    found = max((each for each in every if each), key=lambda each: each.largest_advantage, default=None)
    if found is None:
        raise PrivacyError(
            f"{len(members)} members and {len(reserve)} examples of the reserve are too few to measure what a model "
            f"gives away: {membership.LEAST_EACH} of each are needed (audit.reserve)"
        )
    site.served.note_leaked(digest(request.tensors), found.largest_advantage)
    body = {
        "num_examples": len(members),
        "others": len(reserve),
        "auc": found.auc,
        "auc_interval": list(found.auc_interval),
        "advantage": found.largest_advantage,
    }
    if site.settings.privacy.dp.is_promised or has_spent(site.state):
        body |= dict.fromkeys(FIGURES)
    return Reply(request.kind, request.round_number, site.name, {}, body)


_SCORES = ("loss", "ratio")


def _scored(request: Request, site: Site, examples: list[Encoded]) -> dict[str, list[float]]:
    training, batch = site.settings.training, site.settings.evaluation.batch_size
    return {
        name: membership.losses(site.adapted, weights, examples, training=training, batch_size=batch)
        for name, weights in (("loss", request.tensors), ("base", site.initial))
    }
