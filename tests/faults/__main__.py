"""`python -m tests.faults --count 200 --seed 0`: inject faults of every kind, and print a table."""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from random import Random

from .cases import KINDS, Laboratory, Outcome, inject


def shares(count: int, weights: Mapping[str, int]) -> list[str]:
    """`count` names: each once, and as often again as its weight says; of too few the heaviest."""
    names = sorted(weights, key=lambda name: -weights[name])[:count]
    total = sum(weights[name] for name in names)
    exact = {name: 1 + (count - len(names)) * weights[name] / total for name in names}
    numbers = {name: int(share) for name, share in exact.items()}
    for name in sorted(names, key=lambda name: numbers[name] - exact[name])[: count - sum(numbers.values())]:
        numbers[name] += 1
    return [name for name in names for _ in range(numbers[name])]


def table(outcomes: Sequence[Outcome]) -> str:
    """By kind: how many were injected, survived, refused as they must be, and what went wrong."""
    width = max(map(len, KINDS))
    lines = [f"{'':{width}}  injected  recovered  refused  lost or changed"]
    rows = {name: Counter(o.result if o.good else "bad" for o in outcomes if o.kind == name) for name in KINDS}
    for name, row in {**rows, "all": sum(rows.values(), Counter())}.items():
        if row.total():
            lines.append(f"{name:{width}}  {row.total():8}  {row['recovered']:9}  {row['refused']:7}  {row['bad']:15}")
    return "\n".join(lines)


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.faults", description=__doc__)
    parser.add_argument("--count", type=int, default=200, metavar="N", help="(default: %(default)s)")
    parser.add_argument("--seed", type=int, default=0, metavar="N", help="(default: %(default)s)")
    parser.add_argument("--kinds", nargs="+", choices=KINDS, default=list(KINDS), metavar="K", help="(default: all)")
    parser.add_argument("--only", type=int, metavar="N", help="of all faults this one, to see it again")
    parser.add_argument("--json", metavar="F", help="also write all outcomes to this file")
    parser.add_argument("--folder", metavar="DIR", help="for runs; what was not survived is left there")
    arguments = parser.parse_args()
    names = shares(arguments.count, {name: KINDS[name][0] for name in arguments.kinds})
    Random(arguments.seed).shuffle(names)
    folder = Path(arguments.folder or tempfile.mkdtemp(prefix="moetrain-faults-"))
    folder.mkdir(parents=True, exist_ok=True)
    laboratory = Laboratory(folder)
    outcomes = []
    for number, name in enumerate(names):
        if arguments.only not in (None, number):
            continue
        outcome = inject(name, laboratory, Random(f"{arguments.seed} {number}"))
        outcomes.append(outcome)
        print(f"{number:4}  {outcome.seconds:5.1f} s  {name}: {outcome.what}: {outcome.result}", flush=True)
        if arguments.json:
            Path(arguments.json).write_text(json.dumps([asdict(outcome) for outcome in outcomes], indent=1))
    print(table(outcomes))
    bad = [outcome for outcome in outcomes if not outcome.good]
    if bad:
        print(f"what is left of the others is in {folder}")
    return 1 if bad else 0


if __name__ == "__main__":
    sys.exit(main())
