"""What one round of a site releases under differential privacy, as the accountants count it."""

from __future__ import annotations

from silotune.privacy.accountant import Spend, noise_for
from silotune.settings.sections import PrivacySection, TrainingSection
from silotune.training.local import steps_in_round
from silotune.training.private import sampling_rate


def release_of(
    privacy: PrivacySection, training: TrainingSection, *, num_examples: int, rounds: int, noise: float | None = None
) -> Spend:
    """What one round of a site releases, with noise that fits the run's epsilon over all rounds unless it is given.

    Raises:
        ConfigError: No noise is enough.
    """
    dp = privacy.guarantee
    if dp.is_by_example:
        rate = sampling_rate(num_examples, training.batch_size, training.gradient_accumulation)
        steps = steps_in_round(num_examples, training)
    else:
        rate, steps = 1.0, 1
    found = dp.noise_multiplier or noise
    if found is None:
        target = float(dp.epsilon or 0)
        found = noise_for(target, dp.delta, sampling_rate=rate, steps=rounds * steps, accountant=dp.accountant)
    return Spend(found, rate, steps)
