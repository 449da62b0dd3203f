"""The worst case of several attacks, with an interval that knows that it was chosen for being the worst."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from probe.audit._numbers import Estimate, Ratio
from probe.errors import AuditError


def worst_case(
    ratios: Sequence[Ratio], n: int | Sequence[int], *, n_boot: int, seed: int, people: str
) -> tuple[int, Estimate]:
    """Return which of several numbers is the largest, and that number.

    Each bootstrap replicate takes the maximum anew over all of them, on the same resampled groups. So the interval
    holds the luck of the choice as well; the value keeps it too (a maximum of noisy numbers is on average too large),
    which is why gold's own worst case belongs beside it. Where the largest is a share that is the same in every group,
    its interval is Clopper and Pearson's over groups; any other number whose replicates are all the same has none.

    Args:
        ratios: One per attack, over the same groups.
        n: On how many questions each rests; one number for all, or one each.
        n_boot: Bootstrap replicates.
        seed: Of the bootstrap.
        people: What a group is, in the plural.

    Raises:
        AuditError: No attack.
    """
    if not ratios:
        raise AuditError("the worst case of no attack at all was asked for; give at least one")
    index = int(np.argmax([ratio.value for ratio in ratios]))
    worst = ratios[index]
    groups = len(worst.top)
    low, high, how = np.nan, np.nan, "none: one group"
    if groups > 1 and worst.alike:
        low, high = worst.interval(n_boot, seed)
        how = f"95 %, Clopper-Pearson over {people}, all alike"
    elif groups > 1:
        draws = np.max([ratio.draws(n_boot, seed) for ratio in ratios], axis=0)  # [boot]
        how = f"none: the same for all {people}"  # an interval without width would be read as certainty
        if np.ptp(draws) > 0:
            low, high = (float(end) for end in np.quantile(draws, [0.025, 0.975]))
            how = f"95 %, bootstrap over {people}, the worst case chosen anew in each replicate"
    count = n if isinstance(n, int) else n[index]
    return index, Estimate(worst.value, count, groups, low, high, how)
