"""Which tables of a card are curves, and how they are drawn."""

from __future__ import annotations

from typing import Any

import pandas as pd

from probe.plots import model_curves

# table: column of the horizontal axis, of the vertical one, their names, the title
CURVES: dict[str, tuple[str, str, str, str, str]] = {
    "relearning": (
        "step",
        "recall",
        "step",
        "recall of facts not relearned",
        "Relearning: {data}, learning rate {lr:g}",
    ),
    "readout": ("layer", "accuracy", "layer", "accuracy on the forget set", "Forgotten answers read by a linear probe"),
    "uds": ("layer", "d2", "layer", "nats a token", "Loss of the answer when the original's layer is replaced"),
    "lens": ("layer", "probability", "layer", "probability", "Forgotten answers through the logit lens"),
}
_SHARES = ("relearning", "readout", "lens")


def curve(name: str, table: pd.DataFrame, **settings: Any) -> Any:
    """Draw one of them; of relearning the run that brought back most of the edited model's answers."""
    x, y, x_name, y_name, title = CURVES[name]
    if name == "relearning":
        table = _worst(table[table["step"].notna()])
        title = title.format(data=table["data"].iloc[0], lr=table["lr"].iloc[0])
    if "set" in table.columns:
        table = table[table["set"] == "forget"]
    names = {"title": title, "x_name": x_name, "y_name": y_name, "percent": name in _SHARES}
    return model_curves(table, x, y, **{**names, **settings})


def _worst(table: pd.DataFrame) -> pd.DataFrame:
    """The rows of the learning rate and data at which the edited model (else the original) recalled most."""
    who = "edited" if (table["model"] == "edited").any() else "original"
    own = table[table["model"] == who]
    worst = own.iloc[int(own["recall"].to_numpy().argmax())]
    return table[(table["lr"] == worst["lr"]) & (table["data"] == worst["data"])]
