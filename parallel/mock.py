"""Many ranks in one process: threads that compute real numbers on one device, with real collectives between them.

    def work(factor):
        x = torch.full((3,), float(dist.get_rank()))
        dist.all_reduce(x)
        return factor * x

    results = MockWorld(4).run(work, 2)    # what each rank returned, in order

Inside, `torch.distributed` works as usual: :func:`moetrain.parallel.create_mesh`, DeviceMesh, groups, uneven
all-to-all, objects, autograd through collectives. A reduction adds in the order of the ranks, so results repeat bit for
bit.

A mistake of one rank becomes an error that says what the others were doing, not a hang: collectives check that all
ranks of a group are in the same one, with the same root and reduction and with shapes that fit.
"""
# torch.distributed calls a group's methods by position; torch's stubs have names for the arguments, some only by type.
# mypy: disable-error-code="override, assignment, attr-defined, call-arg"

from __future__ import annotations

import functools
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, field
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch._subclasses import FakeTensorMode
from torch.distributed import ReduceOp, distributed_c10d

_this = threading.local()
"""The rank that a thread is, or works for: .run, .rank, .groups; nothing in other threads."""
_one_world = threading.Lock()
"""torch keeps the names of groups by thread or for the process, which is a setting of the process."""


class RankError(RuntimeError):
    """An error of one rank, which is its cause; `rank` says which."""

    def __init__(self, rank: int, size: int, error: BaseException) -> None:
        first_line = (str(error).splitlines() or [""])[0]
        super().__init__(f"rank {rank} of {size}: {type(error).__name__}: {first_line}")
        self.rank = rank


class CollectiveError(RuntimeError):
    """Ranks that wait for one another in vain, or do not do the same."""


class _Stopped(BaseException):
    """Ends a rank that waits for one that has failed. Not an Exception: no handler of the code under test keeps it."""


class _Groups:
    """What torch.distributed knows of the process groups (its ``_World``), of one rank."""

    def __init__(self) -> None:
        self.default_pg = None
        self.pg_map: dict[Any, Any] = {}
        self.pg_names: dict[Any, str] = {}
        self.pg_group_ranks: dict[Any, dict[int, int]] = {}
        self.pg_backend_config: dict[Any, str] = {}
        self.group_count = 0
        self.tags_to_pg: dict[str, list[Any]] = {}
        self.pg_to_tag: dict[Any, str] = {}
        self.pg_coalesce_state: dict[Any, Any] = {}
        self.comms: list[Any] = []


class _GroupsOfThread:
    """The groups of the rank that a thread is, and those of the process in any other thread."""

    def __init__(self, of_process: Any) -> None:
        object.__setattr__(self, "of_process", of_process)

    def __getattr__(self, name: str) -> Any:
        return getattr(getattr(_this, "groups", self.of_process), name)

    def __setattr__(self, name: str, value: Any) -> None:
        setattr(getattr(_this, "groups", self.of_process), name, value)


class MockWorld:
    """`size` ranks on one device.

    Parameters
    ----------
    size : number of ranks, at least 1
    device : "cpu" or "cuda", the default device of all ranks; :func:`create_mesh` takes it where it is to choose
    timeout : seconds that a rank waits in a collective for the others, and may go on for after another one failed

    The ranks share what belongs to a process: torch's default generators (give one of your own to random functions),
    environment variables, signals, and what torch.compile has made, in which a rank's place may be a constant. Threads
    that a rank starts belong to it.
    """

    def __init__(self, size: int, device: str = "cpu", timeout: float = 60.0) -> None:
        if size < 1:
            raise ValueError(f"a world needs at least one rank, not {size}")
        self.size = size
        self.device = torch.device(device)
        self.timeout = timeout

    def run(self, function: Callable[..., Any], *arguments: Any) -> list[Any]:
        """Call `function(*arguments)` on every rank; returns their results in order.

        Raises :class:`RankError` with the first error of any rank, and :class:`CollectiveError` where ranks wait for
        one another in vain. A rank that computes without end is waited for, unless another one fails. Worlds of one
        process run one after the other, and not inside one another.
        """
        if hasattr(_this, "run"):
            raise RuntimeError("a rank of a mock world cannot run another one")
        _install()
        run = _Run(self.size, self.timeout)
        store = dist.HashStore()

        def be(rank: int) -> None:
            _this.run, _this.rank, _this.groups = run, rank, _Groups()
            try:
                # The threads of a process share autograd's workers, in which a collective would wait for itself.
                with torch.autograd.set_multithreading_enabled(False), self._default_device():
                    dist.init_process_group(
                        "mock", store=store, rank=rank, world_size=self.size, timeout=timedelta(seconds=self.timeout)
                    )
                    result = function(*arguments)
                run.end(rank, result)
            except _Stopped:
                pass
            except BaseException as error:
                run.fail(rank, error)

        with _one_world, _inherited_ranks():
            torch._C._distributed_c10d._set_thread_isolation_mode(True)
            try:
                threads = [
                    threading.Thread(target=be, args=(rank,), name=f"rank {rank}", daemon=True)
                    for rank in range(self.size)
                ]
                for thread in threads:
                    thread.start()
                run.wait(threads)
            finally:
                torch._C._distributed_c10d._set_thread_isolation_mode(False)
        if run.errors:
            rank, error = run.errors[0]
            if isinstance(error, CollectiveError):
                raise error
            raise RankError(rank, self.size, error) from error
        return [run.results[rank] for rank in range(self.size)]

    def _default_device(self) -> AbstractContextManager[Any]:
        return nullcontext() if self.device.type == "cpu" else self.device


@contextmanager
def _inherited_ranks() -> Iterator[None]:
    """A thread that a rank's thread starts works for that rank."""
    start = threading.Thread.start

    def start_inheriting(thread: threading.Thread) -> None:
        inherited, run = dict(_this.__dict__), thread.run

        def run_as_rank() -> None:
            _this.__dict__.update(inherited)
            run()

        if inherited:
            thread.run = run_as_rank
        start(thread)

    threading.Thread.start = start_inheriting
    try:
        yield
    finally:
        threading.Thread.start = start


@dataclass
class _Call:
    """One collective of one group: what each rank brought, until all are there and one of them does the work."""

    arrived: dict[int, tuple[str, Any]] = field(default_factory=dict)
    done: bool = False
    error: str | None = None


class _Run:
    """The ranks of one run of a world, and where they meet."""

    def __init__(self, size: int, timeout: float) -> None:
        self.timeout = timeout
        self.results: dict[int, Any] = {}
        self.errors: list[tuple[int, BaseException]] = []
        self._changed = threading.Condition()
        self._calls: dict[tuple[str, int], _Call] = {}
        self._where = ["has not called a collective"] * size

    def end(self, rank: int, result: Any) -> None:
        with self._changed:
            self.results[rank] = result
            self._where[rank] = "has returned"

    def fail(self, rank: int, error: BaseException) -> None:
        with self._changed:
            self.errors.append((rank, error))
            self._where[rank] = f"has raised {type(error).__name__}"
            self._changed.notify_all()

    def wait(self, threads: Sequence[threading.Thread]) -> None:
        """For all ranks, and after the first failure for as long as they may take to notice it."""
        deadline: float | None = None
        while any(thread.is_alive() for thread in threads):
            if self.errors and deadline is None:
                deadline = time.monotonic() + self.timeout
            if deadline is not None and time.monotonic() > deadline:
                return
            for thread in threads:
                thread.join(0.02)

    def meet(self, group: _MockGroup, name: str, brought: Any, work: Callable[[list[Any]], None]) -> None:
        """Bring `brought` to the group's next collective, and wait until the last rank to come has done the work."""
        key, ranks = group.members()
        number = group.calls
        group.calls += 1
        what = f"{name}, number {number} of the group of ranks {ranks}"
        with self._changed:
            self._where[_this.rank] = f"is in {what}"
            call = self._calls.setdefault((key, number), _Call())
            call.arrived[group.rank()] = (name, brought)
            if len(call.arrived) == len(ranks) and not call.done:
                call.error = _do(call, ranks, work)
                call.done = True
                self._changed.notify_all()
            self._wait(call, ranks, what)
            if len(call.arrived) == len(ranks):
                self._calls.pop((key, number), None)
            if call.error is not None:
                raise CollectiveError(call.error)
            self._where[_this.rank] = f"has left {what}"

    def _wait(self, call: _Call, ranks: list[int], what: str) -> None:
        end = time.monotonic() + self.timeout
        while not call.done:
            if self.errors:
                raise _Stopped
            left = end - time.monotonic()
            if left <= 0:
                missing = [ranks[place] for place in range(len(ranks)) if place not in call.arrived]
                told = "; ".join(f"rank {rank} {self._where[rank]}" for rank in missing)
                # Who comes later fails too: a rank that has left must not take part.
                call.error = f"rank {_this.rank} waited {self.timeout:g} s in {what}, in vain: {told}"
                call.done = True
                self._changed.notify_all()
                return
            self._changed.wait(left)


def _do(call: _Call, ranks: list[int], work: Callable[[list[Any]], None]) -> str | None:
    """Run the collective over what all ranks brought; why it cannot be, if so."""
    names = {ranks[place]: name for place, (name, _) in sorted(call.arrived.items())}
    if len(set(names.values())) > 1:
        return "ranks are in different collectives: " + ", ".join(f"rank {r} in {n}" for r, n in names.items())
    try:
        with torch.no_grad():
            work([call.arrived[place][1] for place in range(len(ranks))])
    except Exception as error:
        return f"{names[ranks[0]]} of ranks {ranks}: {error}"
    return None


class _Done(dist.Work):
    """The handle of a collective that is over."""

    def wait(self, timeout: timedelta = timedelta(0)) -> bool:
        return True

    def is_completed(self) -> bool:
        return True


class _MockGroup(dist.ProcessGroup):
    """A process group of threads, as torch.distributed calls it; each collective is over when it returns."""

    def __init__(self, rank: int, size: int) -> None:
        super().__init__(rank, size)
        self.calls = 0

    def members(self) -> tuple[str, list[int]]:
        """The name that all members know the group by, and their ranks in the world."""
        groups: _Groups = _this.groups
        return groups.pg_names[self], list(groups.pg_group_ranks[self])

    @property
    def group_name(self) -> str:
        return self.members()[0]

    def getBackendName(self) -> str:
        return "mock"

    def _meet(self, name: str, brought: Any, work: Callable[[list[Any]], None]) -> dist.Work:
        run: _Run = _this.run
        run.meet(self, name, brought, work)
        return _Done()

    def allreduce(self, tensors: Any, opts: Any = None) -> dist.Work:
        tensors = [tensors] if isinstance(tensors, Tensor) else list(tensors)
        op = ReduceOp.SUM if opts is None else opts.reduceOp

        def work(brought: list[list[Tensor]]) -> None:
            for column in zip(*brought, strict=True):
                _same_shapes(column)
                total = _reduce(column, op)
                for tensor in column:
                    tensor.copy_(total)

        return self._meet(f"all_reduce by {_name(op)}", tensors, work)

    def allreduce_coalesced(self, tensors: Any, opts: Any = None) -> dist.Work:
        return self.allreduce(tensors, opts)

    def reduce(self, tensors: list[Tensor], opts: Any) -> dist.Work:
        def work(brought: list[list[Tensor]]) -> None:
            column = [tensors[0] for tensors in brought]
            _same_shapes(column)
            column[opts.rootRank].copy_(_reduce(column, opts.reduceOp))

        return self._meet(f"reduce by {_name(opts.reduceOp)} to {opts.rootRank}", tensors, work)

    def broadcast(self, tensors: list[Tensor], opts: Any) -> dist.Work:
        def work(brought: list[list[Tensor]]) -> None:
            for column in zip(*brought, strict=True):
                _same_shapes(column)
                for place, tensor in enumerate(column):
                    if place != opts.rootRank:
                        tensor.copy_(column[opts.rootRank])

        return self._meet(f"broadcast from {opts.rootRank}", tensors, work)

    def allgather(self, outputs: list[list[Tensor]], inputs: list[Tensor], opts: Any = None) -> dist.Work:
        def work(brought: list[tuple[list[list[Tensor]], list[Tensor]]]) -> None:
            for outputs, _ in brought:
                for output, (_, inputs) in zip(outputs[0], brought, strict=True):
                    _copy(output, inputs[0])

        return self._meet("all_gather", (outputs, inputs), work)

    def all_gather_single(self, output: Tensor, input: Tensor, opts: Any = None) -> dist.Work:
        return self.allgather([_pieces(output.view(-1), [], self.size())], [input.reshape(-1)], opts)

    _allgather_base = all_gather_single

    def all_gather_single_coalesced(self, outputs: list[Tensor], inputs: list[Tensor], opts: Any = None) -> dist.Work:
        for output, input in zip(outputs, inputs, strict=True):
            self.all_gather_single(output, input)
        return _Done()

    allgather_into_tensor_coalesced = all_gather_single_coalesced

    def gather(self, outputs: list[list[Tensor]], inputs: list[Tensor], opts: Any) -> dist.Work:
        def work(brought: list[tuple[list[list[Tensor]], list[Tensor]]]) -> None:
            for output, (_, inputs) in zip(brought[opts.rootRank][0][0], brought, strict=True):
                _copy(output, inputs[0])

        return self._meet(f"gather to {opts.rootRank}", (outputs, inputs), work)

    def scatter(self, outputs: list[Tensor], inputs: list[list[Tensor]], opts: Any) -> dist.Work:
        def work(brought: list[tuple[list[Tensor], list[list[Tensor]]]]) -> None:
            for (outputs, _), input in zip(brought, brought[opts.rootRank][1][0], strict=True):
                _copy(outputs[0], input)

        return self._meet(f"scatter from {opts.rootRank}", (outputs, inputs), work)

    def reduce_scatter(self, outputs: list[Tensor], inputs: list[list[Tensor]], opts: Any = None) -> dist.Work:
        op = ReduceOp.SUM if opts is None else opts.reduceOp

        def work(brought: list[tuple[list[Tensor], list[list[Tensor]]]]) -> None:
            totals = [_reduce(pieces, op) for pieces in zip(*(inputs[0] for _, inputs in brought), strict=True)]
            for (outputs, _), total in zip(brought, totals, strict=True):
                _copy(outputs[0], total)

        return self._meet(f"reduce_scatter by {_name(op)}", (outputs, inputs), work)

    def reduce_scatter_single(self, output: Tensor, input: Tensor, opts: Any = None) -> dist.Work:
        return self.reduce_scatter([output.view(-1)], [_pieces(input.reshape(-1), [], self.size())], opts)

    _reduce_scatter_base = reduce_scatter_single

    def reduce_scatter_single_coalesced(
        self, outputs: list[Tensor], inputs: list[Tensor], opts: Any = None
    ) -> dist.Work:
        for output, input in zip(outputs, inputs, strict=True):
            self.reduce_scatter_single(output, input, opts)
        return _Done()

    reduce_scatter_tensor_coalesced = reduce_scatter_single_coalesced

    def alltoall(self, outputs: list[Tensor], inputs: list[Tensor], opts: Any = None) -> dist.Work:
        def work(brought: list[tuple[list[Tensor], list[Tensor]]]) -> None:
            for destination, (outputs, _) in enumerate(brought):
                for output, (_, inputs) in zip(outputs, brought, strict=True):
                    _copy(output, inputs[destination])

        return self._meet("all_to_all", (outputs, inputs), work)

    def all_to_all_single(
        self, output: Tensor, input: Tensor, output_splits: list[int], input_splits: list[int], opts: Any = None
    ) -> dist.Work:
        return self.alltoall(_pieces(output, output_splits, self.size()), _pieces(input, input_splits, self.size()))

    alltoall_base = all_to_all_single

    def barrier(self, opts: Any = None) -> dist.Work:
        return self._meet("barrier", None, lambda brought: None)


_PAIRWISE: dict[Any, Callable[[Tensor, Tensor], Tensor]] = {
    ReduceOp.SUM: torch.add,
    ReduceOp.AVG: torch.add,
    ReduceOp.PRODUCT: torch.mul,
    ReduceOp.MAX: torch.maximum,
    ReduceOp.MIN: torch.minimum,
    ReduceOp.BAND: torch.bitwise_and,
    ReduceOp.BOR: torch.bitwise_or,
    ReduceOp.BXOR: torch.bitwise_xor,
}


def _kind(op: Any) -> Any:
    return getattr(op, "op", op)  # options hold a kind with its parameters


def _name(op: Any) -> str:
    return str(_kind(op)).rpartition(".")[2]


def _reduce(column: Sequence[Tensor], op: Any) -> Tensor:
    """The reduction of one tensor a rank, in the order of the ranks."""
    kind = _kind(op)
    if kind not in _PAIRWISE:
        raise ValueError(f"a reduction by {_name(op)}: there are {', '.join(map(_name, _PAIRWISE))}")
    total = column[0].clone()
    for other in column[1:]:
        total = _PAIRWISE[kind](total, other)
    return total / len(column) if kind == ReduceOp.AVG else total


def _same_shapes(column: Sequence[Tensor]) -> None:
    kinds = [(list(tensor.shape), tensor.dtype) for tensor in column]
    if any(kind != kinds[0] for kind in kinds):
        raise ValueError("tensors differ: " + ", ".join(f"{shape} {dtype}" for shape, dtype in kinds))


def _copy(output: Tensor, input: Tensor) -> None:
    if output.shape != input.shape or output.dtype != input.dtype:
        raise ValueError(
            f"one rank sends {list(input.shape)} {input.dtype}, another expects {list(output.shape)} {output.dtype}"
        )
    output.copy_(input)


def _pieces(tensor: Tensor, splits: list[int], size: int) -> list[Tensor]:
    """Along the first dimension: the splits, or equal parts."""
    if not splits and tensor.shape[0] % size:
        raise ValueError(f"{tensor.shape[0]} rows or elements do not divide among {size} ranks")
    return list(tensor.split(splits or tensor.shape[0] // size)) if len(tensor) or splits else [tensor] * size


def _create_group(store: Any, rank: int, size: int, timeout: timedelta) -> dist.ProcessGroup:
    return _MockGroup(rank, size)


@functools.cache
def _install() -> None:
    """Make torch.distributed tell ranks apart, and know the backend. Other threads go on as before."""
    distributed_c10d._world = _GroupsOfThread(distributed_c10d._world)
    dist.Backend.register_backend("mock", _create_group, devices=["cpu", "cuda"])
    # DTensor uses this mode, which at its first use replaces the process's CUDA guard where torch was built for a GPU
    # and finds none: threads that are computing would crash.
    with FakeTensorMode():
        pass
