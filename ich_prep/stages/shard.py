"""Task 2: write one shard (read, repair, HU, resize, window, encode), and report what is in it."""

from __future__ import annotations

import atexit
from functools import cache, lru_cache
from typing import TYPE_CHECKING, Any

import cv2
import numpy as np
import xxhash
from pydantic import BaseModel, ConfigDict

from ich_prep.dataset.codecs import CODECS
from ich_prep.dataset.schema import OK, shard_path
from ich_prep.dataset.shard_format import ShardWriter
from ich_prep.dataset.storage import written_whole
from ich_prep.dataset.tables import rows_of
from ich_prep.dicom.decode import PIXEL_FIELDS, Decoder, PixelSource
from ich_prep.errors import SliceError
from ich_prep.pixels import repairs
from ich_prep.pixels.audit import Audit, HuHistogram, Tissues, audit
from ich_prep.pixels.hounsfield import Rescale
from ich_prep.pixels.render import Scratch, render
from ich_prep.pixels.stored import mask_unused_bits
from ich_prep.pixels.turn import turn
from ich_prep.sources import open_source, read_ahead
from ich_prep.stages.plan_tables import PIXEL_COLUMNS
from ich_prep.stages.state import BuildFolder, State, read_state

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Mapping, Sequence

    import pyarrow.parquet as pq
    from numpy.typing import NDArray

    from ich_prep.dataset.bucket_path import Place
    from ich_prep.dataset.spec import Spec
    from ich_prep.sources import Source

FILES_AHEAD = 8
COLUMNS = [*PIXEL_COLUMNS, "rescale_slope", "rescale_intercept", "repairs", "turn"]  # of the plan that rendering needs


class RowReport(BaseModel):
    """The report of one row: its ``status``; for an ok row its ``Audit`` and the ``chunk_crc32c`` stored after its chunk,
    otherwise the ``detail`` of the reason.
    """

    model_config = ConfigDict(frozen=True, ser_json_inf_nan="constants")

    status: str
    detail: str | None = None
    hu_min: float | None = None
    hu_max: float | None = None
    hu_mean: float | None = None
    content_hash: str | None = None
    chunk_crc32c: int | None = None
    share_air: float | None = None
    share_soft: float | None = None
    share_bone: float | None = None
    body: int = 0  # sampled pixels inside the body, and how many of them are in the range of lung
    lung: int = 0
    flags: tuple[str, ...] = ()


class ShardReport(BaseModel):
    """The ledger's record of one shard, kept as JSON once the shard is on disk.

    ``plan``: digest of the plan it belongs to. ``bytes`` and ``fingerprint``: of the file. ``rows``: in order.
    ``hu_histogram``: of all its slices, see ``HuHistogram``.
    """

    model_config = ConfigDict(frozen=True)

    plan: str
    bytes: int
    fingerprint: str
    rows: tuple[RowReport, ...]
    hu_histogram: tuple[int, ...]

    def to_json(self) -> str:
        """Return the report as compact JSON; equal reports give equal text."""
        return self.model_dump_json(exclude_defaults=True)

    @classmethod
    def from_json(cls, text: str) -> ShardReport:
        """Return the report that ``to_json`` wrote; raises ``ValueError`` for anything else."""
        return cls.model_validate_json(text)


def write_shard(out: Place, folder: BuildFolder, sources: tuple[Place, ...], digest: str, number: int) -> ShardReport:
    """Write shard ``number`` of the plan whose digest is ``digest``, renamed into place when complete; return its report.

    ``folder`` is the working folder, ``sources`` are the folders and archives.
    """
    state, plan = _opened(folder, digest)
    spec, group = state.spec, number - state.first_shard
    rows = plan.read_row_group(group, columns=COLUMNS).to_pylist()
    path = shard_path(out, number)
    decoder = shared_decoder()
    slices = SliceRenderer(spec)
    results: list[Audit | SliceError] = []
    with written_whole(path) as file:
        writer = ShardWriter(file, spec.slices_per_shard, CODECS[spec.codec])
        source = open_source(sources)
        located = [pixel_source(source, key, row) for key, row in zip(_keys(folder, group), rows, strict=True)]
        ahead = read_ahead(source, located, lambda pixels: pixels.key, files=FILES_AHEAD)
        for row, pixels in zip(rows, ahead, strict=True):
            try:
                results.append(slices.render(decoder.read(pixels), row))
            except SliceError as error:
                writer.skip()
                results.append(error)
                continue
            writer.append(slices.out)
        written = writer.finish()
    return ShardReport(
        plan=digest,
        bytes=written.size,
        fingerprint=written.fingerprint,
        rows=tuple(row_reports(results, written.chunk_crc32c.tolist(), slices.histogram.tissues())),
        hu_histogram=tuple(slices.histogram.counts().tolist()),
    )


def row_reports(
    results: Sequence[Audit | SliceError], checksums: Iterable[int | None], tissues: Tissues
) -> Iterator[RowReport]:
    """Yield the report of each row; ``tissues`` are those of the slices that were rendered, in their order.

    ``checksums`` are those of the chunks, None where pixels are kept in memory.
    """
    samples = zip(tissues.shares.tolist(), tissues.body.tolist(), tissues.lung.tolist(), strict=True)
    for result, checksum in zip(results, checksums, strict=False):
        if isinstance(result, SliceError):
            yield RowReport(status=str(result.reason), detail=result.detail)
            continue
        (air, soft, bone), body, lung = next(samples)
        yield RowReport(
            status=OK,
            hu_min=result.hu_min,
            hu_max=result.hu_max,
            hu_mean=result.hu_mean,
            content_hash=result.content_hash,
            chunk_crc32c=checksum,
            share_air=air,
            share_soft=soft,
            share_bone=bone,
            body=body,
            lung=lung,
            flags=result.flags,
        )


@lru_cache(maxsize=1)
def _opened(folder: BuildFolder, digest: str) -> tuple[State, pq.ParquetFile]:
    """Return the state and the open plan of the build; a new ``digest`` means a new plan in ``folder``."""
    use_one_thread()
    return read_state(folder), rows_of(folder.plan)


def use_one_thread() -> None:
    """Make OpenCV use one thread in this process, as each worker does: there is a worker for every core."""
    cv2.setNumThreads(1)


def _keys(folder: BuildFolder, group: int) -> list[bytes]:
    """Return the source keys of the files of row group ``group`` of the plan.

    Not cached: a worker may outlive the run that wrote them.
    """
    with rows_of(folder.keys) as file:
        keys: list[bytes] = file.read_row_group(group)["key"].to_pylist()
    return keys


@cache
def shared_decoder() -> Decoder:
    """Return the decoder of this process."""
    decoder = Decoder()
    atexit.register(decoder.close)
    return decoder


# --- one slice: a line of the plan or the scan -> typed values --------------------------------------------------------


def pixel_source(source: Source, key: bytes, line: Mapping[str, Any]) -> PixelSource:
    """Return where the pixels of the file with ``key`` in ``source`` are, from its ``line`` of the plan or the scan."""
    return PixelSource(source=source, key=key, **{name: line[name] for name in PIXEL_FIELDS})


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
    """Renders slices of one dataset, one by one, into ``out`` (channel, y, x), and counts their HU in ``histogram``."""

    def __init__(self, spec: Spec) -> None:
        self.out: NDArray[Any] = np.empty((spec.channels, spec.size, spec.size), spec.dtype)
        self.histogram = HuHistogram()
        self._windows = spec.windows if spec.store == "windows" else None
        self._scratch = Scratch()

    def render(self, stored: NDArray[np.uint16], line: Mapping[str, Any]) -> Audit:
        """Fill ``out`` from the ``stored`` values (rows, columns) of the slice that a plan's ``line`` describes.

        The audit and the histogram are of the values as the file stores them, before the turn.
        """
        content_hash = xxhash.xxh3_128_hexdigest(stored.data)
        bits_stored = line["bits_stored"]
        repaired, rescale = repairs.apply(stored, rescale_of(line), line["repairs"])
        masked, limits = mask_unused_bits(repaired, bits_stored=bits_stored, signed=rescale.signed)
        self.histogram.add(masked, rescale)
        result = audit(
            masked,
            rescale,
            limits,
            bits_stored=bits_stored,
            content_hash=content_hash,
            flags=() if masked is repaired else ("unused_bits",),
        )
        render(turn(masked, line["turn"]), rescale, windows=self._windows, out=self.out, scratch=self._scratch)
        return result
