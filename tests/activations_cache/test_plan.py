"""The plan of a capture: limits, order, fingerprints, each against a plain loop over the sequences."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from activations_cache.errors import DataError
from activations_cache.plan import SHARD_TOKENS_PER_BATCH, Plan, batches_of, default_shard_rows, make_plan

PAIRS = st.lists(
    st.integers(1, 30).flatmap(lambda n: st.tuples(st.just(n), st.integers(0, n))), min_size=1, max_size=60
).filter(lambda pairs: any(kept for _, kept in pairs))


def greedy(pairs: list[tuple[int, int]], shard_rows: int, batch_tokens: int) -> list[tuple[int, int]]:
    """The shards that a loop makes which takes one sequence after the other."""
    made, start, end = [], 0, len(pairs)
    while start < end:
        stop = start + 1
        while stop < end:
            rows, tokens = sum(k for _, k in pairs[start : stop + 1]), sum(n for n, _ in pairs[start : stop + 1])
            none_yet = not any(k for _, k in pairs[start:stop])
            fits = rows <= shard_rows and tokens <= SHARD_TOKENS_PER_BATCH * batch_tokens
            if not (fits or none_yet):
                break
            stop += 1
        if not any(k for _, k in pairs[stop:]):
            stop = end
        made.append((start, stop))
        start = stop
    return made


@given(pairs=PAIRS, batch_tokens=st.integers(1, 80), shard_rows=st.integers(1, 80))
def test_a_plan_holds_every_sequence_once_and_keeps_its_limits(
    pairs: list[tuple[int, int]], batch_tokens: int, shard_rows: int
):
    lengths, stored = [n for n, _ in pairs], [kept for _, kept in pairs]
    plan = make_plan(lengths, stored, batch_tokens=batch_tokens, shard_rows=shard_rows)
    assert [(s.first_sequence, s.stop) for s in plan.shards] == greedy(pairs, shard_rows, batch_tokens)
    row = sequence = 0
    for shard in plan.shards:
        inside = list(range(shard.first_sequence, shard.stop))
        assert sorted(int(number) for batch in shard.batches for number in batch) == inside
        assert (shard.first_row, shard.first_sequence) == (row, sequence)
        assert shard.rows == sum(stored[n] for n in inside) > 0
        assert shard.tokens == sum(lengths[n] for n in inside)
        assert shard.rows <= shard_rows or sum(stored[n] > 0 for n in inside) == 1
        for batch in shard.batches:
            assert max(lengths[n] for n in batch) * len(batch) <= batch_tokens or len(batch) == 1
        longest = [max(lengths[n] for n in batch) for batch in shard.batches]
        assert longest == sorted(longest, reverse=True)
        row, sequence = row + shard.rows, sequence + shard.sequences
    assert (sequence, row) == (len(lengths), plan.rows)
    assert (plan.rows, plan.tokens) == (sum(stored), sum(lengths))
    assert plan.n_batches == sum(len(shard.batches) for shard in plan.shards)
    again = make_plan(np.array(lengths), np.array(stored), batch_tokens=batch_tokens, shard_rows=shard_rows)
    assert plan.fingerprint() == again.fingerprint()


@given(lengths=st.lists(st.integers(1, 9), min_size=1, max_size=40), batch_tokens=st.integers(1, 30))
def test_batches_follow_from_a_shards_lengths_alone(lengths: list[int], batch_tokens: int):
    """A batch is filled longest first, ties in the order of the data; another start only shifts the numbers."""
    order, expected = sorted(range(len(lengths)), key=lambda n: -lengths[n]), []
    while order:
        count = max(1, batch_tokens // lengths[order[0]])
        expected.append(sorted(order[:count]))
        order = order[count:]
    assert [batch.tolist() for batch in batches_of(lengths, 0, batch_tokens)] == expected
    shifted = batches_of(lengths, 100, batch_tokens)
    assert [(batch - 100).tolist() for batch in shifted] == expected
    assert all(batch.dtype == np.int64 for batch in shifted)


def test_the_batches_of_a_plan_are_those_of_its_shards():
    lengths = np.random.default_rng(0).integers(1, 20, 500)
    plan = make_plan(lengths, lengths, batch_tokens=64, shard_rows=300)
    assert len(plan.shards) > 10
    for shard in plan.shards:
        again = batches_of(lengths[shard.first_sequence : shard.stop], shard.first_sequence, 64)
        assert [a.tolist() for a in again] == [b.tolist() for b in shard.batches]


def plan_of(lengths: list[int], stored: list[int], **change: int) -> Plan:
    return make_plan(lengths, stored, **{"batch_tokens": 8, "shard_rows": 9, **change})


def test_plans_that_differ_have_other_fingerprints():
    plans = [
        plan_of([3, 4, 5], [3, 4, 5]),
        plan_of([3, 4, 5], [1, 1, 1]),
        plan_of([3, 4, 5], [3, 4, 4]),
        plan_of([3, 4, 5], [3, 4, 5], batch_tokens=4),
        plan_of([3, 4, 5], [3, 4, 5], shard_rows=4),
        plan_of([5, 4, 3], [3, 4, 3]),
    ]
    assert len({plan.fingerprint() for plan in plans}) == len(plans)


def test_few_stored_rows_still_end_a_shard():
    plan = make_plan([10] * 1000, [1] * 1000, batch_tokens=10, shard_rows=10**6)
    assert max(shard.tokens for shard in plan.shards) == 640


def test_a_shard_is_never_without_a_row():
    stored = [0] * 500 + [1] + [0] * 500 + [2] + [0] * 500
    plan = make_plan([10] * len(stored), stored, batch_tokens=10, shard_rows=5)
    assert [(s.first_sequence, s.stop, s.rows) for s in plan.shards] == [(0, 501, 1), (501, 1502, 2)]


def test_a_million_sequences_are_planned_exactly():
    rng = np.random.default_rng(0)
    lengths = rng.integers(1, 60, 10**6)
    stored = np.minimum(lengths, rng.integers(0, 3, 10**6))
    plan = make_plan(lengths, stored, batch_tokens=8192, shard_rows=2**15)
    assert plan.rows == stored.sum() and plan.shards[-1].stop == 10**6
    assert all(s.rows <= 2**15 and s.tokens <= SHARD_TOKENS_PER_BATCH * 8192 for s in plan.shards)
    for shard in plan.shards[:-1]:  # one sequence more would break a limit
        one_more = slice(shard.first_sequence, shard.stop + 1)
        assert stored[one_more].sum() > 2**15 or lengths[one_more].sum() > SHARD_TOKENS_PER_BATCH * 8192


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"batch_tokens": 0}, "batch_tokens must be at least 1; got 0"),
        ({"shard_rows": -1}, "shard_rows must be at least 1; got -1"),
        ({"stored": [1, 2]}, "one count per sequence"),
        ({"stored": [0, 0, 0]}, "no row is to be stored"),
        ({"stored": [1, 6, 1]}, "6 rows cannot be stored of sequence 1, which has 4"),
        ({"stored": [1, 1, -1]}, "-1 rows cannot be stored of sequence 2"),
        ({"lengths": [3, 4, 0], "stored": [1, 1, 0]}, "sequence 2 has no token"),
    ],
)
def test_what_cannot_be_planned_is_refused(change: dict[str, Any], message: str):
    asked: dict[str, Any] = {"lengths": [3, 4, 5], "stored": [3, 4, 5], "batch_tokens": 8, "shard_rows": 9, **change}
    with pytest.raises(DataError, match=message):
        make_plan(asked.pop("lengths"), asked.pop("stored"), **asked)


def test_default_shards_are_large_but_hold_a_batch():
    assert default_shard_rows(row_bytes=1536, batch_tokens=8192) == 128 * 2**20 // 1536
    assert default_shard_rows(row_bytes=2**20, batch_tokens=8192) == 8192
    assert default_shard_rows(row_bytes=1, batch_tokens=8192) == 2**20
