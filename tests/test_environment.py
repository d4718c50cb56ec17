"""What the ranks find out about one another before they start."""

import json
import threading
from datetime import timedelta

import pytest
import torch
from torch.distributed import HashStore

from moetrain.errors import ConfigError, UserError
from moetrain.parallel import environment
from moetrain.parallel.environment import meet, name_ranks

SOFTWARE = {"Python": "3.12", "moetrain": "1", "torch": "2.13.0", "CUDA": "13.0", "triton": "3.9"}


def verdict(*accounts, size=None):
    """Of rank 0 on these (problem, facts)."""
    store = HashStore()
    for rank, (problem, facts) in enumerate(accounts):
        store.set(f"environment/{rank}", json.dumps({"problem": problem, "facts": SOFTWARE | facts}))
    return environment._verdict(store, size or len(accounts), timedelta(seconds=0.2))


def test_ranks_that_are_alike():
    assert verdict(*[(None, {"device": "cuda", "train.seed": "0"})] * 3) == ""


def test_other_versions_are_named():
    assert verdict(
        (None, {}), (None, {"torch": "2.11.0"}), (None, {}), (None, {"torch": "2.11.0", "CUDA": "12.8"})
    ) == (
        "the ranks differ: torch = 2.13.0 (ranks 0, 2), 2.11.0 (ranks 1, 3); CUDA = 13.0 (ranks 0–2), 12.8 (rank 3); "
        "install the same versions on every node"
    )


def test_other_settings_are_named():
    assert verdict((None, {"device": "cuda", "optim.lr": "1"}), (None, {"device": "cpu", "optim.lr": "2"})) == (
        "the ranks differ: device = cuda (rank 0), cpu (rank 1); optim.lr = 1 (rank 0), 2 (rank 1); give the same "
        "config and overrides on every node"
    )
    many = {f"key{number}": "x" for number in range(9)}
    assert verdict((None, many), (None, dict.fromkeys(many, "y"))).count("(rank 1)") == 5


def test_what_one_rank_lacks_comes_first():
    assert verdict((None, {}), ("no GPU for local rank 1", {"optim.lr": "2"})) == (
        "rank 1: no GPU for local rank 1; start fewer processes, or set CUDA_VISIBLE_DEVICES or run.device"
    )


def test_ranks_that_do_not_come():
    assert verdict((None, {}), (None, {}), size=5).startswith("ranks 2–4 did not come within")


def test_every_rank_needs_a_gpu_and_nccl(monkeypatch):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.distributed, "is_nccl_available", lambda: False)
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "4")
    monkeypatch.setenv("LOCAL_RANK", "3")
    assert environment._problem("cpu") is None
    problem = environment._problem("cuda") or ""
    assert problem.startswith("no GPU for local rank 3 on ")
    assert problem.endswith(": 2 visible, 4 processes")
    monkeypatch.setenv("LOCAL_RANK", "1")
    assert environment._problem("cuda") == "this torch comes without NCCL"


def test_one_process_has_nobody_to_meet(monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "1")
    assert meet({}, "cuda", 1.0) is None


class Joined(threading.Thread):
    """A rank, in a thread, of two that differ; `ended` is its error."""

    def __init__(self, monkeypatch, rank, store):
        super().__init__()
        monkeypatch.setenv("WORLD_SIZE", "2")
        monkeypatch.setenv("RANK", str(rank))
        monkeypatch.setenv("MASTER_ADDR", "nowhere")
        monkeypatch.setattr(torch.distributed, "rendezvous", lambda *_, **__: iter([(store, rank, 2)]))
        self.ended = None
        self.start()

    def run(self):
        try:
            meet({"optim.lr": 1}, "cpu", 0.1)
        except Exception as error:
            self.ended = error


def test_rank_0_stays_until_the_others_have_heard_why_it_ends(monkeypatch):
    """The store goes with it, and they would say that the connection was reset."""
    store = HashStore()
    store.set("environment/1", json.dumps({"problem": "no GPU for local rank 1", "facts": {}}))
    rank = Joined(monkeypatch, 0, store)
    rank.join(0.3)
    assert rank.is_alive()
    store.set("environment/heard/1", "")
    rank.join(2)
    assert isinstance(rank.ended, ConfigError)
    assert "rank 1: no GPU" in str(rank.ended)


def test_rank_0_that_has_left(monkeypatch):
    class Gone(HashStore):
        def wait(self, *_):
            raise torch.distributed.DistNetworkError("Connection reset by peer")

    rank = Joined(monkeypatch, 1, Gone())
    rank.join(2)
    assert isinstance(rank.ended, UserError)
    assert str(rank.ended).startswith("rank 0, or its launcher, has left nowhere:None before the ranks have met: Conn")


@pytest.mark.parametrize(("ranks", "name"), [([3], "rank 3"), ([8, 0, 1, 2], "ranks 0–2, 8"), ([1, 3], "ranks 1, 3")])
def test_names_of_ranks(ranks, name):
    assert name_ranks(ranks) == name
