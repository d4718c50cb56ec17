"""`python -m faults.launched …` is `python -m moetrain …` with a fault on one rank.

FAULT = KIND:RANK:STEP in the environment. kill, raise, hang and stop (the process) happen at the beginning of the step;
config, which needs no step, gives the rank another learning rate; with "once" after the step a restart is spared.
"""

from __future__ import annotations

import os
import signal
import sys
import time
from typing import Any

from moetrain.cli import main
from moetrain.trainer import Trainer

KIND, RANK, STEP, *ONCE = os.environ["FAULT"].split(":")
HERE = os.environ.get("RANK") == RANK and not (ONCE and os.environ["TORCHELASTIC_RESTART_COUNT"] != "0")


def fail() -> None:
    if KIND == "kill":
        os.kill(os.getpid(), signal.SIGKILL)
    if KIND == "stop":
        os.kill(os.getpid(), signal.SIGSTOP)
    if KIND == "raise":
        raise RuntimeError("the disk is on fire")
    if KIND == "hang":
        time.sleep(600)


step = Trainer._step


def faulty(self: Trainer, batches: Any) -> None:
    if HERE and self.progress.step + 1 == int(STEP):
        fail()
    step(self, batches)


Trainer._step = faulty  # type: ignore[method-assign]

if __name__ == "__main__":
    sys.exit(main(sys.argv[1:] + ["optim.lr=0.5"] * (HERE and KIND == "config")))
