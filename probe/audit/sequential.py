"""Requests that come one after another, and requests that grow: does forgetting the next bring back the last?

Sustainability of unlearning in the sense of MUSE (arXiv 2407.06460): real requests do not come once. `sequential`
applies edit on edit, each made for the model as the last one left it; `growing` starts from the original each time with
more to forget.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from itertools import combinations
from typing import TYPE_CHECKING, Any

import pandas as pd
from tqdm.auto import tqdm

from probe.audit._numbers import Ratio, by_group
from probe.data import Questions
from probe.errors import AuditError, DataError
from probe.models import Model
from probe.scoring import score_answers

if TYPE_CHECKING:
    import plotly.graph_objects as go

__all__ = ["MakeEdit", "RequestCurves", "edited", "growing", "sequential"]

MakeEdit = Callable[[Model, Questions, Questions], Any]

RELATIONS = {
    "now": "asked for now",
    "earlier": "asked for earlier",
    "later": "not asked for yet",
    "retain": "never to be forgotten",
}


@dataclass(frozen=True)
class RequestCurves:
    """What was known after each step.

    Attributes:
        kind: "sequential" or "growing".
        table: A row for each step (0 is before any), set, and metric (recall, probability), with `relation`: whether
            the set is asked for "now", was "earlier", will be "later", or is "retain". The rows with set "all" pool the
            questions of all sets of one relation. `value`, `low`, `high` (95 %, over groups), `n` and `n_groups`.
        n_boot: Bootstrap replicates.
        seed: Of the bootstrap.
    """

    kind: str
    table: pd.DataFrame
    n_boot: int
    seed: int

    def to_df(self) -> pd.DataFrame:
        """The table, a copy."""
        return self.table.copy()

    def plot(self, metric: str = "recall") -> go.Figure:
        """Recall (or probability) by step: what is asked for now, was earlier, will be later, and must stay."""
        from probe.plots._template import PALETTE, interval_bars, new_figure

        pooled = self.table[(self.table["metric"] == metric) & (self.table["set"] == "all")]
        if pooled.empty:
            raise DataError(f"the metrics are {', '.join(sorted(set(self.table['metric'])))}; there is no {metric!r}")
        titles = {"sequential": "One request after another", "growing": "Growing requests"}
        figure = new_figure(titles[self.kind], "requests", metric)
        for colour, (relation, name) in zip(PALETTE, RELATIONS.items(), strict=False):
            rows = pooled[pooled["relation"] == relation]
            if len(rows):
                value, low, high = (rows[key].to_numpy(dtype=float) for key in ("value", "low", "high"))
                bars = interval_bars(value, low, high)
                line = {"color": colour, "width": 2.5}
                figure.add_scatter(
                    x=rows["step"], y=value, name=name, mode="lines+markers", line=line, error_y=bars,
                    hovertemplate="after %{x}: <b>%{y:.3f}</b><extra>%{fullData.name}</extra>",
                )  # fmt: skip
        return figure.update_xaxes(dtick=1).update_yaxes(range=[-0.02, 1.02])


def sequential(
    model: Model,
    requests: Mapping[str, Questions] | Sequence[Questions],
    retain: Questions,
    make_edit: MakeEdit,
    *,
    bos: bool | None = None,
    chat: bool = False,
    batch_size: int = 64,
    n_boot: int = 1000,
    seed: int = 0,
    progress: bool = True,
) -> RequestCurves:
    """Apply one request after another, each edit on top of the last, and measure all requests and retain each time.

    Args:
        model: The original; it has its own bits again at the end, also after an exception.
        requests: What is to be forgotten, in this order; by name, or "request 1", "request 2", ...
        retain: What must stay.
        make_edit: Called with the model as it then is, the request, and retain; returns an `Edit` (or anything with
            `.applied(model)`) or another `Model`.
        bos: As in `score_answers`.
        chat: As in `score_answers`.
        batch_size: Rows a forward.
        n_boot: Bootstrap replicates.
        seed: Of the bootstrap.
        progress: Show a bar.

    Raises:
        DataError: Fewer than two requests, an empty one, or sets that share a group.
        AuditError: `make_edit` returned neither an edit nor a model.
    """
    named = _named(requests, retain)
    scores = _Scores({**named, "retain": retain}, {"bos": bos, "chat": chat, "batch_size": batch_size}, n_boot, seed)
    rows = scores.rows(model, 0, dict.fromkeys(named, "later"))
    with ExitStack() as stack:
        current = model
        bar = tqdm(enumerate(named.items(), start=1), total=len(named), desc="requests", disable=not progress)
        for step, (_, request) in bar:
            current = stack.enter_context(edited(current, make_edit(current, request, retain)))
            order = {one: i for i, one in enumerate(named, start=1)}
            relation = {k: "now" if i == step else "earlier" if i < step else "later" for k, i in order.items()}
            rows += scores.rows(current, step, relation)
    return RequestCurves("sequential", pd.DataFrame(rows), n_boot, seed)


def growing(
    model: Model,
    requests: Mapping[str, Questions] | Sequence[Questions],
    retain: Questions,
    make_edit: MakeEdit,
    *,
    bos: bool | None = None,
    chat: bool = False,
    batch_size: int = 64,
    n_boot: int = 1000,
    seed: int = 0,
    progress: bool = True,
) -> RequestCurves:
    """Forget the first request, the first two, ... from the original each time; arguments as in `sequential`."""
    named = _named(requests, retain)
    scores = _Scores({**named, "retain": retain}, {"bos": bos, "chat": chat, "batch_size": batch_size}, n_boot, seed)
    rows = scores.rows(model, 0, dict.fromkeys(named, "later"))
    for step in tqdm(range(1, len(named) + 1), desc="requests", disable=not progress):
        together = Questions((row for one in list(named.values())[:step] for row in one), "forget")
        with edited(model, make_edit(model, together, retain)) as current:
            relation = {name: "now" if i < step else "later" for i, name in enumerate(named)}
            rows += scores.rows(current, step, relation)
    return RequestCurves("growing", pd.DataFrame(rows), n_boot, seed)


@contextmanager
def edited(model: Model, made: Any) -> Iterator[Model]:
    """The model with an edit applied inside the block, or the other model that was made.

    Raises:
        AuditError: `made` is neither.
    """
    if isinstance(made, Model):
        yield made
    elif hasattr(made, "applied"):
        with made.applied(model):
            yield model
    else:
        raise AuditError(f"make_edit must return an Edit or a Model; it returned {type(made).__name__}")


@dataclass(frozen=True)
class _Scores:
    """Measures every set, and every relation's sets together."""

    sets: Mapping[str, Questions]
    how: Mapping[str, Any]
    n_boot: int
    seed: int

    def rows(self, model: Model, step: int, relation: Mapping[str, str]) -> list[dict[str, Any]]:
        relation = {**relation, "retain": "retain"}
        found = {name: score_answers(model, rows, **self.how) for name, rows in self.sets.items()}
        made = []
        for metric, attribute in (("recall", "exact"), ("probability", "prob")):
            values = {name: getattr(one, attribute).astype(float) for name, one in found.items()}
            for name, one in found.items():
                ratio = by_group(values[name], one.groups, share=metric == "recall")
                made.append(self._row(step, name, relation[name], metric, ratio))
            for kind in dict.fromkeys(relation.values()):
                names = [name for name in found if relation[name] == kind]
                pooled = [value for name in names for value in values[name]]
                groups = [group for name in names for group in found[name].groups]
                ratio = by_group(pooled, groups, share=metric == "recall")
                made.append(self._row(step, "all", kind, metric, ratio))
        return made

    def _row(self, step: int, name: str, relation: str, metric: str, ratio: Ratio) -> dict[str, Any]:
        low, high = ratio.interval(self.n_boot, self.seed)
        sizes = {"n": int(ratio.bottom.sum()), "n_groups": len(ratio.bottom)}
        keys = {"step": step, "set": name, "relation": relation, "metric": metric}
        return {**keys, "value": ratio.value, "low": low, "high": high, **sizes}


def _named(requests: Mapping[str, Questions] | Sequence[Questions], retain: Questions) -> dict[str, Questions]:
    given: Any = requests
    if isinstance(given, Questions) or not isinstance(given, (Mapping, Sequence)):
        raise DataError(f"requests must be a list or mapping of Questions; received {type(given).__name__}")
    pairs = given.items() if isinstance(given, Mapping) else enumerate(given, start=1)
    named: dict[str, Questions] = {key if isinstance(key, str) else f"request {key}": rows for key, rows in pairs}
    if len(named) < 2:
        raise DataError(f"at least two requests are needed; received {len(named)}")
    if {"retain", "all"} & set(named):
        raise DataError('no request may be called "retain" or "all"')
    for name, rows in {**named, "retain": retain}.items():
        if not isinstance(rows, Questions) or len(rows) == 0:
            raise DataError(f"{name} must be Questions with at least one row")
    for (one, a), (other, b) in combinations({**named, "retain": retain}.items(), 2):
        if set(a.groups) & set(b.groups):
            raise DataError(f"{one} and {other} share a group, {min(set(a.groups) & set(b.groups))!r}; none may")
    return named
