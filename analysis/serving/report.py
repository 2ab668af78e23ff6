"""Write the tables and figures of a study of serving."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path

import matplotlib as mpl
import pandas as pd
from matplotlib.figure import Figure

from analysis.serving.figures import agreement_figure, policies_figure, timeline_figure, title_of
from analysis.serving.frames import Group, Serving, agreement_frame, read_serving, served_frame
from analysis.serving.tables import tables
from analysis.style import FORMATS, RC, save
from bench.results import write_atomic

COLUMNS = 3
"""Most loads that are drawn as time goes by."""


def write_serving(folder: Path, formats: Sequence[str] = FORMATS) -> list[Path]:
    """Write what a study of serving shows below ``tables/`` and ``figures/``; nothing where nothing was served.

    Parameters
    ----------
    folder
        ``results/<study>``.
    formats
        Of the figures.
    """
    serving = read_serving(folder)
    if serving is None or not serving.groups:
        return []
    paths = []
    agreement = agreement_frame(serving)
    for name, text in tables(serving, agreement).items():
        paths.append(folder / "tables" / name)
        write_atomic(paths[-1], text.encode())
    with mpl.rc_context(RC):
        for name, figure in _figures(serving, agreement):
            paths += save(figure, folder / "figures" / name, formats)
    return paths


def _figures(serving: Serving, agreement: pd.DataFrame) -> Iterator[tuple[str, Figure]]:
    served = served_frame(serving)
    first = serving.study.calibrations[0].engine
    for mode in ("real", "simulated"):
        alone = served[(served["mode"] == mode) & (served["replicas"] == 1) & (served["times"] == 1)]
        longest = alone[alone["seconds"] == alone["seconds"].max()]
        how = "in real time" if mode == "real" else "simulated"
        own = longest[longest["engine"] == first]
        if len(own):
            yield f"serving_{mode}", policies_figure(own, title_of(serving, how))
        if longest["engine"].nunique() > 1:
            yield f"serving_{mode}_rivals", policies_figure(longest, title_of(serving, how))
    if chosen := _changing(serving, first):
        yield "serving_timeline", timeline_figure(serving, chosen, title_of(serving, "in real time"))
    if len(agreement):
        yield "serving_agreement", agreement_figure(agreement, "simulated against real")


def _changing(serving: Serving, engine: str) -> list[Group]:
    """Return the deadline policy, or the first adaptive one, under the loads that change as time goes by."""
    found = [
        group
        for group in serving.groups
        if group.condition.mode == "real" and group.engine == engine and not group.static
        and not group.condition.load.startswith("poisson")
    ]  # fmt: skip
    best = (
        "deadline" if any(group.policy.startswith("deadline") for group in found) else found[0].policy if found else ""
    )
    return [group for group in found if group.policy.startswith(best)][:COLUMNS]
