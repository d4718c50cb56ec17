"""Objectives by name: one, or a sum of several with weights, as in ``load+0.02*traffic``."""

from __future__ import annotations

import re
from collections.abc import Sequence
from math import inf

from moetrain.errors import PlacementError


def parse_sum(text: str, names: Sequence[str]) -> list[tuple[float, str]]:
    """The weights and names of a sum. Raises PlacementError for other names, and weights that are not in (0, ∞)."""
    terms = []
    for part in text.replace(" ", "").split("+"):
        match = re.fullmatch(r"(?:([0-9]+(?:\.[0-9]+)?(?:e-?[0-9]+)?)\*)?([a-z]+)", part)
        if match is None or match[2] not in names:
            known = ", ".join(names)
            raise PlacementError(f"{part!r} is none of {known}, which may be added up as in load+0.5*traffic")
        weight = float(match[1] or 1)
        if not 0 < weight < inf:
            raise PlacementError(f"the weight in {part!r} must be positive and finite")
        terms.append((weight, match[2]))
    return terms
