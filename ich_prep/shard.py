"""Task 2: one whole shard: read, repair, HU, resize, window, encode, one file; and the report of what is in it."""

from __future__ import annotations

import os
from functools import cache, lru_cache
from operator import itemgetter
from pathlib import Path
from typing import TYPE_CHECKING, Any

import cv2
import numpy as np
import pyarrow.parquet as pq
import xxhash
from pydantic import BaseModel, ConfigDict

from ich_prep import store
from ich_prep.decode import Decoder, PixelSource
from ich_prep.errors import SliceError
from ich_prep.ledger import renamed_when_whole
from ich_prep.pixels import repairs
from ich_prep.pixels.audit import Audit, HuTally, audit
from ich_prep.pixels.hounsfield import Rescale
from ich_prep.pixels.render import Scratch, render
from ich_prep.pixels.stored import mask_unused_bits
from ich_prep.plan import PIXEL_COLUMNS
from ich_prep.sharding import ShardWriter
from ich_prep.sources import read_ahead

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping

    from numpy.typing import NDArray

    from ich_prep.store import Spec

FILES_AHEAD = 8
COLUMNS = [*PIXEL_COLUMNS, "rescale_slope", "rescale_intercept", "repairs"]  # of the plan that rendering needs

_source_values = itemgetter(*PixelSource.__slots__[1:])


class RowReport(BaseModel):
    """What a shard says of one row: its ``status``, then for an ok row its ``Audit`` and the shares of ``HuTally``, else the
    reason's ``detail``.
    """

    model_config = ConfigDict(frozen=True, ser_json_inf_nan="constants")

    status: str
    detail: str | None = None
    hu_min: float | None = None
    hu_max: float | None = None
    hu_mean: float | None = None
    share_air: float | None = None
    share_soft: float | None = None
    share_bone: float | None = None
    content_hash: str | None = None
    flags: tuple[str, ...] = ()


class ShardReport(BaseModel):
    """The ledger's record of one shard, kept as JSON once the shard is on disk.

    ``plan``: digest of the plan it belongs to. ``bytes`` and ``fingerprint``: of the file. ``rows``: in their order.
    ``hu_histogram``: of all its slices, see ``HuTally``. ``chunk_crc32c``: the checksum stored behind each
    row's chunk, None for a row without one.
    """

    model_config = ConfigDict(frozen=True)

    plan: str
    bytes: int
    fingerprint: str
    rows: tuple[RowReport, ...]
    hu_histogram: tuple[int, ...]
    chunk_crc32c: tuple[int | None, ...]

    def to_json(self) -> str:
        """Return the report as compact JSON; equal reports give equal text."""
        return self.model_dump_json(exclude_defaults=True)

    @classmethod
    def from_json(cls, text: str) -> ShardReport:
        """Return the report that ``to_json`` wrote; raises ``ValueError`` for anything else."""
        return cls.model_validate_json(text)


def write_shard(out: str, src: str, digest: str, number: int) -> ShardReport:
    """Write shard ``number`` of the plan whose digest is ``digest``, under its name when whole; return its report."""
    root = Path(out)
    spec, plan = _opened(out, digest)
    rows = plan.read_row_group(number, columns=COLUMNS).to_pylist()
    path = store.shard_path(root, number)
    path.parent.mkdir(parents=True, exist_ok=True)
    decoder = _decoder()
    slices = SliceRenderer(spec)
    results: list[Audit | SliceError] = []
    checksums: list[int | None] = []
    with renamed_when_whole(path) as partial, open(partial, "wb", buffering=0) as file:
        writer = ShardWriter(file, spec.slices_per_shard, spec.codec)
        sources = [pixel_source(src, row) for row in rows]
        for row, source in zip(rows, read_ahead(sources, lambda item: item.path, files=FILES_AHEAD), strict=True):
            try:
                results.append(slices.render(decoder.read(source), row))
            except SliceError as error:
                writer.skip()
                checksums.append(None)
                results.append(error)
                continue
            checksums.append(writer.append(slices.out))
        size, fingerprint = writer.finish()
    return ShardReport(
        plan=digest,
        bytes=size,
        fingerprint=fingerprint,
        rows=tuple(_row_reports(results, slices.tally)),
        hu_histogram=tuple(slices.tally.histogram().tolist()),
        chunk_crc32c=tuple(checksums),
    )


def _row_reports(results: list[Audit | SliceError], tally: HuTally) -> Iterator[RowReport]:
    shares = iter(tally.shares().tolist())
    for result in results:
        if isinstance(result, SliceError):
            yield RowReport(status=str(result.reason), detail=result.detail)
            continue
        air, soft, bone = next(shares)
        yield RowReport(
            status=store.OK,
            hu_min=result.hu_min,
            hu_max=result.hu_max,
            hu_mean=result.hu_mean,
            share_air=air,
            share_soft=soft,
            share_bone=bone,
            content_hash=result.content_hash,
            flags=result.flags,
        )


@lru_cache(maxsize=1)
def _opened(out: str, digest: str) -> tuple[Spec, pq.ParquetFile]:
    """Return the spec and the open plan of the build; a new ``digest`` means a new plan at ``out``."""
    cv2.setNumThreads(1)
    build = Path(out) / store.BUILD
    return store.read_state(build).spec, pq.ParquetFile(build / store.PLAN)


@cache
def _decoder() -> Decoder:
    return Decoder()


# --- one slice: a line of the plan, or of the scan, as typed values ---------------------------------------------------


def pixel_source(src: str, line: Mapping[str, Any]) -> PixelSource:
    """Return where the pixels of a file below ``src`` lie, from its ``line`` of the plan or the scan."""
    return PixelSource(os.path.join(src, line["path"]), *_source_values(line))


def rescale_of(line: Mapping[str, Any]) -> Rescale:
    """Return the rescale that the header states, from its ``line`` of the plan or the scan."""
    low = line["padding_low"]
    return Rescale(
        slope=line["rescale_slope"],
        intercept=line["rescale_intercept"],
        signed=line["signed"],
        padding=None if low is None else (low, line["padding_high"]),
    )


class SliceRenderer:
    """Renders slices of one dataset, one after the other, into ``out`` (channel, y, x), and counts their HU in ``tally``."""

    def __init__(self, spec: Spec) -> None:
        self.out: NDArray[Any] = np.empty((spec.channels, spec.size, spec.size), spec.dtype)
        self.tally = HuTally()
        self._windows = spec.windows if spec.store == "windows" else None
        self._scratch = Scratch()

    def render(self, stored: NDArray[np.uint16], line: Mapping[str, Any]) -> Audit:
        """Fill ``out`` from the ``stored`` values (rows, columns) of the slice that a plan's ``line`` describes."""
        content_hash = xxhash.xxh3_128_hexdigest(stored.data)
        bits_stored = line["bits_stored"]
        repaired, rescale = repairs.apply(stored, rescale_of(line), line["repairs"])
        masked, limits = mask_unused_bits(repaired, bits_stored=bits_stored, signed=rescale.signed)
        self.tally.add(masked, rescale)
        result = audit(
            masked,
            rescale,
            limits,
            bits_stored=bits_stored,
            content_hash=content_hash,
            flags=() if masked is repaired else ("unused_bits",),
        )
        render(masked, rescale, windows=self._windows, out=self.out, scratch=self._scratch)
        return result
