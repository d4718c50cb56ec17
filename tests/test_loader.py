"""The loader: one stream of samples, whatever the number of ranks, the interruptions and the epochs."""

from __future__ import annotations

import gc
import threading
import time
import weakref
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from moetrain.config import DataConfig
from moetrain.data import IGNORED, Batch, BytesTokenizer, Loader, Split, heldout_batches, heldout_samples
from moetrain.data.build import build
from moetrain.data.dataset import Dataset, open_dataset
from moetrain.data.loader import Permutation, num_samples
from moetrain.errors import DataError

S = 16


@pytest.fixture(scope="module")
def dataset(tmp_path_factory: pytest.TempPathFactory) -> Dataset:
    folder = tmp_path_factory.mktemp("loader")
    rng = np.random.default_rng(0)
    (folder / "text").mkdir()
    for i in range(80):
        text = rng.integers(97, 123, int(rng.integers(5, 60)), dtype=np.uint8).tobytes()
        (folder / "text" / f"{i:03d}.txt").write_bytes(text)
    build(
        [str(folder / "text")],
        folder / "built",
        BytesTokenizer(),
        held_out_fraction=0.3,
        shard_tokens=500,
        progress=False,
    )
    return open_dataset(DataConfig(path=str(folder / "built")))


def make_loader(split: Split, **changes: Any) -> Loader:
    arguments: dict[str, Any] = {
        "split": split,
        "seq_len": S,
        "micro_batch": 2,
        "accumulation": 1,
        "dp_rank": 0,
        "dp_size": 1,
        "seed": 3,
        "end_of_document": 256,
        "mask_documents": False,
        "prefetch": 2,
    }
    return Loader(**(arguments | changes))


def take(loader: Loader, count: int) -> list[Batch]:
    batches = [next(loader) for _ in range(count)]
    loader.close()
    return batches


def rows(batches: list[Batch]) -> list[tuple[int, ...]]:
    """Each sequence with its last target: the S + 1 tokens of a sample."""
    return [
        (*tokens, targets[-1])
        for batch in batches
        for tokens, targets in zip(batch.tokens_BS.tolist(), batch.targets_BS.tolist(), strict=True)
    ]


def steps_of_all_ranks(
    split: Split, steps: int, micro_batch: int, accumulation: int, dp_size: int, **changes: Any
) -> list[list[tuple[int, ...]]]:
    """The samples of each step in the order of the stream, collected from every rank."""
    collected: list[dict[tuple[int, int], Batch]] = [{} for _ in range(steps)]
    for rank in range(dp_size):
        loader = make_loader(
            split, micro_batch=micro_batch, accumulation=accumulation, dp_rank=rank, dp_size=dp_size, **changes
        )
        for i, batch in enumerate(take(loader, steps * accumulation)):
            collected[i // accumulation][i % accumulation, rank] = batch
    return [rows([step[key] for key in sorted(step)]) for step in collected]


@settings(max_examples=60, deadline=None)
@given(size=st.integers(1, 400), seed=st.integers(0, 2**63), epoch=st.integers(0, 1000))
def test_permutation_is_a_bijection(size: int, seed: int, epoch: int) -> None:
    permutation = Permutation(size, seed, epoch)
    assert sorted(permutation(i) for i in range(size)) == list(range(size))


def test_permutation_shuffles() -> None:
    size = 4000
    orders = [
        np.array([Permutation(size, seed, epoch)(i) for i in range(size)]) for seed, epoch in ((0, 0), (0, 1), (1, 0))
    ]
    index = np.arange(size)
    for order in orders:
        # Neighbours must scatter, and the order must not follow the data.
        assert abs(np.corrcoef(index, order)[0, 1]) < 0.06
        assert np.mean(np.abs(np.diff(order)) < size / 10) < 0.25
        # 20 × 20 cells of position and value hold 10 each: χ² has 361 degrees of freedom.
        cells = np.histogram2d(index, order, bins=20)[0]
        assert ((cells - 10) ** 2 / 10).sum() < 361 + 5 * (2 * 361) ** 0.5
    for first, second in ((0, 1), (0, 2), (1, 2)):
        assert np.mean(orders[first] == orders[second]) < 0.01
    with pytest.raises(IndexError):
        Permutation(10, 0, 0)(10)


def test_permutation_of_a_huge_range_needs_no_memory() -> None:
    permutation = Permutation(10**13, 0, 0)
    values = [permutation(i) for i in range(1000)]
    assert len(set(values)) == 1000
    assert max(values) > 9 * 10**12


def test_an_epoch_has_every_sample_once(dataset: Dataset) -> None:
    split = dataset.train
    samples = num_samples(split, S)
    assert samples == (split.num_tokens - 1) // S
    expected = [tuple(split.read(i * S, S + 1).tolist()) for i in range(samples)]
    batches = take(make_loader(split, micro_batch=1), 2 * samples)
    first, second = rows(batches[:samples]), rows(batches[samples:])
    assert sorted(first) == sorted(second) == sorted(expected)
    assert first != second
    assert first != expected
    for batch in batches[:3]:
        assert batch.tokens_BS.dtype == batch.targets_BS.dtype == torch.int64
        assert batch.tokens_BS.shape == batch.targets_BS.shape == (1, S)
        assert batch.tokens_BS.is_contiguous()
        assert batch.documents_BS is None
        assert torch.equal(batch.tokens_BS[:, 1:], batch.targets_BS[:, :-1])


@pytest.mark.parametrize(("micro_batch", "accumulation", "dp_size"), [(2, 1, 4), (4, 1, 2), (2, 2, 2), (1, 4, 2)])
def test_steps_do_not_depend_on_the_number_of_ranks(
    dataset: Dataset, micro_batch: int, accumulation: int, dp_size: int
) -> None:
    steps = 2 * num_samples(dataset.train, S) // 8  # into the second epoch
    expected = steps_of_all_ranks(dataset.train, steps, 8, 1, 1)
    collected = steps_of_all_ranks(dataset.train, steps, micro_batch, accumulation, dp_size)
    assert collected == expected
    if micro_batch == 2 and accumulation == 1:
        assert collected != steps_of_all_ranks(dataset.train, steps, micro_batch, accumulation, dp_size, seed=4)


@pytest.mark.parametrize("done", [0, 1, 7, 30])
@pytest.mark.parametrize(("accumulation", "dp_size"), [(4, 1), (2, 2), (1, 4)])
def test_resume_is_exact_also_with_other_ranks(dataset: Dataset, done: int, accumulation: int, dp_size: int) -> None:
    uninterrupted = steps_of_all_ranks(dataset.train, done + 5, 2, 2, 2)
    loader = make_loader(dataset.train, micro_batch=2, accumulation=2, dp_rank=1, dp_size=2, prefetch=4)
    for _ in range(2 * done):
        next(loader)
    state = loader.state_dict()
    loader.close()
    assert state == {"samples": done * 8}
    resumed = steps_of_all_ranks(dataset.train, 5, 2, accumulation, dp_size, start_sample=state["samples"])
    assert resumed == uninterrupted[done:]


def test_state_counts_whole_steps_only(dataset: Dataset) -> None:
    loader = make_loader(dataset.train, accumulation=3, dp_size=2, start_sample=120)
    counts = []
    for _ in range(7):
        next(loader)
        counts.append(loader.state_dict()["samples"])
    loader.close()
    assert counts == [120, 120, 132, 132, 132, 144, 144]


def test_documents_start_after_each_end_of_document(dataset: Dataset) -> None:
    seen = 0
    for batch in take(make_loader(dataset.train, mask_documents=True), 20):
        assert batch.documents_BS is not None
        assert batch.documents_BS.dtype == torch.int32
        for tokens, documents in zip(batch.tokens_BS.tolist(), batch.documents_BS.tolist(), strict=True):
            current = 0
            for token, document in zip(tokens, documents, strict=True):
                assert document == current
                current += token == 256
            seen += current
    assert seen > 5


def test_last_sample_has_its_target(dataset: Dataset) -> None:
    split = dataset.train
    assert num_samples(split, split.num_tokens - 1) == 1
    with pytest.raises(DataError):
        num_samples(split, split.num_tokens)


def test_too_little_data_is_an_error(dataset: Dataset) -> None:
    with pytest.raises(DataError, match=r"the train split has \d+ tokens, fewer than data\.seq_len \+ 1 = 100001"):
        make_loader(dataset.train, seq_len=100_000)


class CountingSplit(Split):
    """Counts reads, fails from one on."""

    def __init__(self, split: Split, fail_at: int | None = None) -> None:
        super().__init__(split.folder, split.name, split.shards)
        self.reads, self.fail_at = 0, fail_at

    def read(self, start: int, count: int) -> Any:
        self.reads += 1
        if self.reads == self.fail_at:
            raise OSError("disk gone")
        return super().read(start, count)


def wait_until(condition: Any) -> bool:
    deadline = time.monotonic() + 5
    while not condition() and time.monotonic() < deadline:
        time.sleep(0.01)
    return bool(condition())


def test_prefetch_is_bounded_and_not_counted(dataset: Dataset) -> None:
    split = CountingSplit(dataset.train)
    loader = make_loader(split, prefetch=3)
    assert wait_until(lambda: split.reads == 6)
    time.sleep(0.1)
    assert split.reads == 6
    assert loader.state_dict() == {"samples": 0}
    next(loader)
    assert wait_until(lambda: split.reads == 8)
    loader.close()


def test_error_of_the_thread_reaches_the_consumer(dataset: Dataset) -> None:
    loader = make_loader(CountingSplit(dataset.train, fail_at=6))
    next(loader)
    next(loader)
    for _ in range(2):
        with pytest.raises(OSError, match="disk gone"):
            next(loader)
    loader.close()


def loader_threads() -> list[threading.Thread]:
    return [thread for thread in threading.enumerate() if thread.name == "moetrain-loader"]


def test_close_and_drop_end_the_thread(dataset: Dataset) -> None:
    assert not loader_threads()
    loader = make_loader(dataset.train)
    next(loader)
    assert len(loader_threads()) == 1
    loader.close()
    loader.close()
    assert not loader_threads()
    with pytest.raises(StopIteration):
        next(loader)

    loader = make_loader(dataset.train)
    next(loader)
    alive = weakref.ref(loader)
    del loader
    gc.collect()
    assert alive() is None
    assert wait_until(lambda: not loader_threads())


def test_close_wakes_a_waiting_consumer(dataset: Dataset) -> None:
    gate = threading.Event()

    class SlowSplit(CountingSplit):
        def read(self, start: int, count: int) -> Any:
            gate.wait(10)
            return super().read(start, count)

    loader = make_loader(SlowSplit(dataset.train))
    ended = threading.Event()

    def consume() -> None:
        list(loader)
        ended.set()

    consumer = threading.Thread(target=consume)
    consumer.start()
    threading.Timer(0.1, gate.set).start()
    loader.close()
    assert ended.wait(5)
    consumer.join()


@pytest.mark.parametrize("dp_size", [1, 2, 3, 5])
@pytest.mark.parametrize("micro_batch", [1, 4])
@pytest.mark.parametrize("max_tokens", [S, 13 * S + 3, 10**9])
def test_held_out_sequences_are_each_on_one_rank(
    dataset: Dataset, dp_size: int, micro_batch: int, max_tokens: int
) -> None:
    split = dataset.heldout
    samples = heldout_samples(split, S, max_tokens)
    assert samples == min(max_tokens // S, (split.num_tokens - 1) // S)
    expected = split.read(0, samples * S + 1)
    ranks = [
        list(heldout_batches(split, S, micro_batch, max_tokens, rank, dp_size, end_of_document=256))
        for rank in range(dp_size)
    ]
    assert len({len(batches) for batches in ranks}) == 1
    kept = []
    for round_of_batches in zip(*ranks, strict=True):
        for batch in round_of_batches:
            assert batch.tokens_BS.shape == batch.targets_BS.shape == (micro_batch, S)
            assert batch.documents_BS is not None
            counted = (batch.targets_BS != IGNORED).all(1)
            assert torch.equal(counted, (batch.targets_BS != IGNORED).any(1))
            kept += list(zip(batch.tokens_BS[counted].tolist(), batch.targets_BS[counted].tolist(), strict=True))
    assert len(kept) == samples
    np.testing.assert_array_equal(np.concatenate([tokens for tokens, _ in kept]), expected[:-1])
    np.testing.assert_array_equal(np.concatenate([targets for _, targets in kept]), expected[1:])


def test_held_out_budget_below_one_sequence(tmp_path: Path, dataset: Dataset) -> None:
    with pytest.raises(DataError, match=r"eval\.tokens = 15"):
        heldout_batches(dataset.heldout, S, 1, S - 1, 0, 1)
