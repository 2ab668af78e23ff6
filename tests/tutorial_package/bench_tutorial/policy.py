"""A policy: the dense model, until somebody has waited for too long."""

from dataclasses import dataclass
from typing import Annotated

from pydantic import Field

from bench.serving.policies import Policy, View


@dataclass(frozen=True)
class Patience(Policy):
    """The dense model while the oldest request is young, else the fastest plugin.

    Attributes
    ----------
    share
        Share of the deadline that the oldest request may have waited.
    """

    name = "patience"
    share: Annotated[float, Field(gt=0, lt=1)] = 0.5

    def choose(self, view: View) -> int:
        """Return the first or the last k."""
        waited = view.now - view.arrived[0]
        return view.ks[0] if waited <= self.share * view.deadline else view.ks[-1]
