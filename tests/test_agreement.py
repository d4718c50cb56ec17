"""Decisions of all ranks: an error of one is raised by all, whatever it is."""

from __future__ import annotations

import pytest
from ranks import run_ranks

from moetrain.errors import ConfigError, DataError, UserError
from moetrain.parallel import create_mesh, destroy_mesh, first_on_each_node, on_all_ranks, on_rank_0, raise_together


class Unpicklable(Exception):
    def __init__(self, code: int, reason: str) -> None:
        super().__init__(f"{reason}\nin detail")
        self.code = code
        self.callback = lambda: None


class MissingKeyError(ConfigError):
    def __init__(self, key: str, folder: str) -> None:
        super().__init__(f"{key} is missing in {folder}")


def test_ranks_agree_on_an_error_of_one() -> None:
    run_ranks(2, fail_on_rank_one)


def fail_on_rank_one() -> None:
    mesh = create_mesh(device="cpu", timeout_minutes=0.5)
    for error, kind, message in (
        (ValueError("of rank 1"), RuntimeError, "rank 1: ValueError: of rank 1"),
        (Unpicklable(3, "a socket"), RuntimeError, "rank 1: Unpicklable: a socket"),
        (DataError("tokens.bin: missing"), DataError, "tokens.bin: missing"),
        (MissingKeyError("lr", "optim"), ConfigError, "lr is missing in optim"),
    ):

        def work(error: Exception = error) -> None:
            if mesh.rank == 1:
                raise error

        for attempt in (
            lambda error=error: raise_together(error if mesh.rank == 1 else None, mesh),
            lambda work=work: first_on_each_node(lambda _: work(), mesh),
            lambda work=work: on_all_ranks(work, mesh.host_group),
        ):
            with pytest.raises(Exception) as caught:
                attempt()
            if mesh.rank == 1:
                assert caught.value is error
            else:
                assert (type(caught.value), str(caught.value)) == (kind, message)
            assert getattr(caught.value, "agreed", False) == isinstance(error, UserError)

    with pytest.raises(UserError, match="first"):  # the lowest rank's where a rank has none itself
        raise_together(UserError("first") if mesh.rank == 0 else None, mesh)
    raise_together(None, mesh)
    assert on_all_ranks(lambda: mesh.rank + 5, mesh.host_group) == [5, 6]
    assert on_rank_0(lambda: f"by {mesh.rank}", mesh.host_group) == "by 0"
    destroy_mesh()


def test_one_rank_alone_raises_its_own_error() -> None:
    mesh = create_mesh(device="cpu")
    error = DataError("missing")
    with pytest.raises(DataError) as caught:
        raise_together(error, mesh)
    destroy_mesh()
    assert caught.value is error
    assert error.agreed
