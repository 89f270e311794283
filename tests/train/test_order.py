from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from ich_prep.errors import UsageError
from ich_train.order import epoch_positions, rank_positions

ROWS = st.lists(st.integers(0, 5000), unique=True, max_size=300).map(lambda rows: np.array(sorted(rows), np.int64))


@given(rows=ROWS, order=st.sampled_from(["sequential", "shuffled", "windowed"]), per_shard=st.integers(1, 64))
def test_every_row_is_visited_once(rows: np.ndarray, order: str, per_shard: int) -> None:
    positions = epoch_positions(rows, order=order, seed=3, epoch=1, rows_per_shard=per_shard)
    assert positions.dtype == np.int64
    assert np.array_equal(np.sort(positions), np.arange(len(rows)))


@pytest.mark.parametrize("order", ["shuffled", "windowed"])
@pytest.mark.parametrize("weighted", [False, True])
def test_same_seed_and_epoch_same_order_and_only_then(order: str, weighted: bool) -> None:
    rows = np.arange(0, 2000, 2)
    weights = np.linspace(1, 2, len(rows)) if weighted else None

    def draw(seed: int, epoch: int) -> list[int]:
        return epoch_positions(rows, order=order, seed=seed, epoch=epoch, rows_per_shard=32, weights=weights).tolist()

    assert draw(1, 0) == draw(1, 0)
    assert draw(1, 0) != draw(1, 1)
    assert draw(1, 0) != draw(2, 0)


@given(rows=ROWS, per_shard=st.integers(1, 50), window=st.integers(1, 5), epoch=st.integers(0, 3))
def test_a_window_holds_whole_shards(rows: np.ndarray, per_shard: int, window: int, epoch: int) -> None:
    positions = epoch_positions(
        rows, order="windowed", seed=0, epoch=epoch, rows_per_shard=per_shard, window_shards=window
    )
    shards = rows[positions] // per_shard
    sizes = dict(zip(*np.unique(shards, return_counts=True), strict=True))
    seen: list[int] = []
    while len(shards):
        # A window ends where all rows of the shards begun in it have been visited.
        begun: set[int] = set()
        k = 0
        while k < len(shards) and (len(begun) < window or k < sum(sizes[shard] for shard in begun)):
            begun.add(int(shards[k]))
            k += 1
        assert len(begun) <= window
        assert k == sum(sizes[shard] for shard in begun)
        seen += begun
        shards = shards[k:]
    assert sorted(seen) == sorted(sizes)


def test_rows_of_a_window_are_mixed() -> None:
    positions = epoch_positions(np.arange(4096), order="windowed", seed=0, epoch=0, rows_per_shard=256, window_shards=8)
    shards = positions[:2048] // 256
    assert len(np.unique(shards)) == 8
    assert len(np.unique(shards[:100])) == 8


def test_weights_decide_how_often_a_row_is_drawn() -> None:
    weights = np.array([0.0, 1.0, 3.0] * 2000)
    positions = epoch_positions(np.arange(6000), order="shuffled", seed=0, epoch=0, rows_per_shard=100, weights=weights)
    share = np.bincount(positions % 3, minlength=3) / len(positions)
    assert len(positions) == 6000
    assert share == pytest.approx([0, 0.25, 0.75], abs=0.03)


@pytest.mark.parametrize("weights", [np.zeros(4), np.array([1, 2, 3.0]), np.array([1, np.nan, 1, 1]), -np.ones(4)])
def test_weights_that_cannot_be_drawn_by_are_refused(weights: np.ndarray) -> None:
    with pytest.raises(UsageError, match="one weight"):
        epoch_positions(np.arange(4), order="shuffled", seed=0, epoch=0, rows_per_shard=2, weights=weights)


def test_unknown_and_impossible_orders_are_refused() -> None:
    with pytest.raises(UsageError, match="sequential, shuffled, windowed"):
        epoch_positions(np.arange(4), order="random", seed=0, epoch=0, rows_per_shard=2)
    with pytest.raises(UsageError, match="cannot be sequential"):
        epoch_positions(np.arange(4), order="sequential", seed=0, epoch=0, rows_per_shard=2, weights=np.ones(4))
    with pytest.raises(UsageError, match="rank of 0 to 1"):
        rank_positions(np.arange(4), rank=2, world_size=2)


@given(n=st.integers(0, 100), world_size=st.integers(1, 7))
def test_ranks_have_disjoint_shares_of_one_length(n: int, world_size: int) -> None:
    positions = np.random.default_rng(0).permutation(n)
    shares = [rank_positions(positions, rank=rank, world_size=world_size) for rank in range(world_size)]
    assert {len(share) for share in shares} == {n // world_size}
    taken = np.concatenate(shares)
    assert len(np.unique(taken)) == len(taken)
    if world_size == 1:
        assert np.array_equal(shares[0], positions)
