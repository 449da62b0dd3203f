"""Meta-evaluation against scikit-learn's AUC and cases worked by hand."""

from __future__ import annotations

import numpy as np
import pytest
from sklearn.metrics import roc_auc_score

from probe.audit.meta import faithfulness, harmonic_mean, meta_table, robustness
from probe.errors import AuditError


def test_faithfulness_is_the_auc():
    rng = np.random.default_rng(0)
    knows, does_not = rng.normal(1, 1, 30).round(1), rng.normal(0, 1, 31).round(1)
    area, low, high = faithfulness(knows, does_not)
    assert area == pytest.approx(roc_auc_score([1] * 30 + [0] * 31, [*knows, *does_not]))
    assert low < area < high
    assert faithfulness([1, 2], [0, 0.5]) == (1.0, 1.0, 1.0)
    assert faithfulness([1, 1], [1, 1])[0] == 0.5


def test_robustness_worked_by_hand():
    # 1 - 0/2, 1 - .5/1.5, both zero
    assert robustness([1, 1, 0], [1, 0.5, 0]) == pytest.approx((1 + 2 / 3 + 1) / 3)
    assert robustness([0.0], [1.0]) == 0.0


def test_harmonic_mean():
    assert harmonic_mean([0.5, 1.0]) == pytest.approx(2 / 3)
    assert harmonic_mean([0.0, 1.0]) == 0.0


def test_the_table_is_ordered_by_what_counts():
    good, bad = [0.9, 0.8], [0.5, 0.4]
    values = {"a": good, "b": bad}
    table = meta_table(values, {"a": [0.1, 0.2], "b": [0.45, 0.6]}, values, values, {"a": good, "b": [0.25, 0.2]})
    assert list(table["metric"]) == ["a", "b"]
    first = table.iloc[0]
    assert (first["faithfulness"], first["robustness"], first["overall"]) == (1.0, 1.0, 1.0)
    second = table.iloc[1]
    assert second["faithfulness"] == 0.25 and second["quantisation"] == pytest.approx(2 / 3)


@pytest.mark.parametrize(
    "call", [lambda: faithfulness([], [1.0]), lambda: faithfulness([np.nan], [1.0]), lambda: robustness([1.0], [])]
)
def test_pools_that_are_none(call):
    with pytest.raises(AuditError, match="at least"):
        call()
