"""The order in which an epoch visits the rows of a dataset: integers in, integers out."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from ich_prep.errors import UsageError

ORDERS = ("sequential", "shuffled", "windowed")


def epoch_positions(
    rows: NDArray[np.int64],
    *,
    order: str,
    seed: int,
    epoch: int,
    rows_per_shard: int,
    weights: NDArray[np.float64] | None = None,
    window_shards: int = 16,
) -> NDArray[np.int64]:
    """Return the indices into ``rows`` that one epoch visits, in order.

    ``rows`` is (n,) int64, the result is (n,) int64. ``sequential`` visits ``rows`` as they stand; ``shuffled`` is
    a permutation; ``windowed`` shuffles the shards, cuts them into windows of ``window_shards`` and shuffles the rows
    inside each window, so that a reader touches few shards at a time. ``weights`` (n,) float64 draws n rows with
    replacement, each in proportion to its weight, instead of visiting each row once. The result depends on the
    arguments alone. Raises `UsageError` on an unknown order, or on invalid weights.
    """
    n = len(rows)
    check_order(order, weighted=weights is not None)
    if order == "sequential":
        return np.arange(n, dtype=np.int64)
    rng = np.random.default_rng((seed, epoch))
    if weights is None:
        drawn = rng.permutation(n).astype(np.int64, copy=False)
    else:
        drawn = rng.choice(n, size=n, p=_probabilities(weights, n))
    if order == "shuffled":
        return drawn
    shards, shard_of_drawn = np.unique(rows[drawn] // rows_per_shard, return_inverse=True)
    window_of_shard = rng.permutation(len(shards)) // window_shards
    # A stable sort keeps the random order of ``drawn`` inside each window.
    return drawn[np.argsort(window_of_shard[shard_of_drawn], kind="stable")]


def bucketed_positions(
    positions: NDArray[np.int64],
    lengths: NDArray[np.int64],
    *,
    batch_size: int,
    seed: int,
    epoch: int,
    pool_batches: int = 16,
) -> NDArray[np.int64]:
    """Return ``positions``, (n,) int64, so that each whole batch has items of similar length, to waste little on padding.

    ``lengths`` are those of the items, which ``positions`` index. Each run of ``pool_batches`` batches is sorted by
    length, cut into batches, and all batches are shuffled; the positions of a last batch that is not whole stay where
    they are, so that it is not always the longest that a loader drops. Depends on the arguments alone.
    """
    whole = len(positions) // batch_size * batch_size
    pools = np.arange(whole) // (batch_size * pool_batches)
    batches = positions[np.lexsort((lengths[positions[:whole]], pools))].reshape(-1, batch_size)
    shuffled = np.random.default_rng((seed, epoch, 1)).permutation(len(batches))
    return np.concatenate([batches[shuffled].reshape(-1), positions[whole:]])


def check_order(order: str, *, weighted: bool) -> None:
    """Raise `UsageError` for an unknown order, or one that rows drawn by weights cannot have."""
    if order not in ORDERS:
        raise UsageError(f"Unknown order {order!r}; expected {', '.join(ORDERS)}.")
    if order == "sequential" and weighted:
        raise UsageError("Weights draw rows at random and cannot be sequential: use shuffled or windowed.")


def rank_positions(positions: NDArray[np.int64], *, rank: int, world_size: int) -> NDArray[np.int64]:
    """Return the share of ``positions`` that one of ``world_size`` ranks visits: every ``world_size``-th of them.

    Shares are disjoint and equally long: up to ``world_size - 1`` positions at the end of the epoch are skipped,
    because ranks that took different numbers of steps would wait for each other forever. Raises `UsageError` for a
    rank outside 0 .. ``world_size - 1``.
    """
    if not 0 <= rank < world_size:
        raise UsageError(f"Expected a rank of 0 to {world_size - 1}; found {rank}.")
    return positions[: len(positions) // world_size * world_size][rank::world_size]


def _probabilities(weights: NDArray[np.float64], n: int) -> NDArray[np.float64]:
    if weights.shape != (n,) or not np.isfinite(weights).all() or (weights < 0).any() or not weights.any():
        raise UsageError(f"Expected one weight >= 0 for each of the {n} rows, not all of them 0; found {weights!r}.")
    probabilities: NDArray[np.float64] = weights / weights.sum()
    return probabilities
