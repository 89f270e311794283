"""Task 2: one whole shard: read, HU, resize, window, encode, one file."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache, lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

import cv2
import numpy as np
import pyarrow.parquet as pq
import xxhash

from ich_prep import store
from ich_prep.dicom.decode import PIXEL_FIELDS, Decoder, PixelSource
from ich_prep.errors import SliceError
from ich_prep.hounsfield import apply_rescale, apply_rescale_and_windows, apply_windows
from ich_prep.layouts.rsna import SIGN_12BIT
from ich_prep.ledger import renamed_when_whole
from ich_prep.resize import resize_hu
from ich_prep.sharding import ShardWriter
from ich_prep.sources import Source, open_source, read_ahead
from ich_prep.windows import HIGHEST_HU

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from ich_prep.store import Spec

FILES_AHEAD = 8
NOISE_ROWS = 16
NOISE_SHARE = 0.125


@dataclass(frozen=True, slots=True)
class Audit:
    """What a slice's pixels say: extremes and mean in HU before clipping, a hash of the stored values, flags."""

    hu_min: float
    hu_max: float
    hu_mean: float
    content_hash: str
    flags: list[str]


def write_shard(out: str, sources: tuple[str, ...], digest: str, number: int) -> dict[str, Any]:
    """Write shard ``number`` of the plan whose digest is ``digest``, under its name when whole; return its ledger entry.

    The entry has the plan's digest, the shard's ``bytes`` and ``fingerprint``, and for each of its rows the status with
    what the audit found, or the reason's detail. It may go into the ledger once the shard is on disk.
    """
    root = Path(out)
    spec, plan = _opened(out, digest)
    rows = plan.read_row_group(number).to_pylist()
    path = store.shard_path(root, number)
    path.parent.mkdir(parents=True, exist_ok=True)
    decoder = _decoder()
    lines: list[dict[str, Any]] = []
    with renamed_when_whole(path) as partial, open(partial, "wb", buffering=0) as file:
        writer = ShardWriter(file, spec.slices_per_shard, spec.codec)
        pixels = _Pixels(spec)
        source = open_source(sources)
        located = [_pixel_source(source, row, key) for row, key in zip(rows, _keys(root, number), strict=True)]
        ahead = read_ahead(source, located, lambda one: one.key, files=FILES_AHEAD)
        for row, pixel_source in zip(rows, ahead, strict=True):
            try:
                audit = pixels.make(row, decoder.read(pixel_source))
            except SliceError as error:
                writer.skip()
                lines.append({"status": error.reason, "detail": error.detail})
                continue
            writer.append(pixels.out)
            lines.append({"status": store.OK, **{name: getattr(audit, name) for name in Audit.__slots__}})
        size, fingerprint = writer.finish()
    return {"plan": digest, "bytes": size, "fingerprint": fingerprint, "rows": lines}


@lru_cache(maxsize=1)
def _opened(out: str, digest: str) -> tuple[Spec, pq.ParquetFile]:
    """Return the spec and the open plan of the build; ``digest`` tells one plan at ``out`` from the next."""
    cv2.setNumThreads(1)
    build = Path(out) / store.BUILD
    return store.read_state(build).spec, pq.ParquetFile(build / store.PLAN)


@cache
def _decoder() -> Decoder:
    return Decoder()


def _keys(root: Path, number: int) -> list[bytes]:
    """Return by which keys the source has the files of shard ``number``: written by each run, a worker may outlive one."""
    with pq.ParquetFile(root / store.BUILD / store.KEYS) as keys:
        found: list[bytes] = keys.read_row_group(number)["key"].to_pylist()
    return found


def _pixel_source(source: Source, row: dict[str, Any], key: bytes) -> PixelSource:
    return PixelSource(source=source, key=key, **{name: row[name] for name in PIXEL_FIELDS})


class _Pixels:
    """Makes the stored pixels of one slice after the other, in buffers that are used again."""

    def __init__(self, spec: Spec) -> None:
        self.out: NDArray[Any] = np.empty((spec.channels, spec.size, spec.size), spec.dtype)
        self._spec = spec
        self._hu = np.empty((spec.size, spec.size), np.int16)

    def make(self, row: dict[str, Any], words: NDArray[np.uint16]) -> Audit:
        """Fill ``out`` with the pixels of ``row``, a line of the plan, from its stored ``words`` (rows, columns)."""
        spec = self._spec
        content_hash = xxhash.xxh3_128_hexdigest(words.data)
        intercept = row["rescale_intercept"]
        if SIGN_12BIT in row["repairs"]:
            words = undo_sign_12bit(words)
            intercept = -1000.0
        signed = row["signed"]
        flags: list[str] = []
        span = extremes(words, signed=signed)
        fitted = fit_to_bits(words, span, bits_stored=row["bits_stored"], signed=signed)
        if fitted is not words:
            words, span, flags = fitted, extremes(fitted, signed=signed), ["unused_bits"]
        low = row["padding_low"]
        rescale = {
            "signed": signed,
            "slope": row["rescale_slope"],
            "intercept": intercept,
            "padding": None if low is None else (low, row["padding_high"]),
        }
        audit = audit_of(words, span, row, intercept=intercept, content_hash=content_hash, flags=flags)
        native = words.shape == self.out.shape[1:]
        if native and spec.store == "windows":
            apply_rescale_and_windows(words, **rescale, windows=spec.windows, out=self.out)
            return audit
        hu = self.out[0] if spec.store == "hu" else self._hu
        if native:
            apply_rescale(words, **rescale, out=hu)
        else:
            full = np.empty(words.shape, np.int16)
            apply_rescale(words, **rescale, out=full)
            resize_hu(full, out=hu)
        if spec.store == "windows":
            apply_windows(hu, windows=spec.windows, out=self.out)
        return audit


def undo_sign_12bit(words: NDArray[np.uint16]) -> NDArray[np.uint16]:
    """Return stored values shifted back by 1000 and unwrapped at 4096; the intercept that goes with them is -1000."""
    return (words + np.uint16(1000)) % np.uint16(4096)


def extremes(words: NDArray[np.uint16], *, signed: bool) -> tuple[int, int]:
    """Return the least and the greatest of the stored values that ``words`` (rows, columns) stand for."""
    least, most, _, _ = cv2.minMaxLoc(words.view(np.int16) if signed else words)
    return int(least), int(most)


def fit_to_bits(
    words: NDArray[np.uint16], span: tuple[int, int], *, bits_stored: int, signed: bool
) -> NDArray[np.uint16]:
    """Return ``words``, whose ``extremes`` are ``span``, with what lies above BitsStored taken off where there is any.

    PS3.5 8.1.1: bits that are not stored are no part of the value. Signed values are extended to 16 bits.
    """
    low, high = (-(1 << bits_stored - 1), (1 << bits_stored - 1) - 1) if signed else (0, (1 << bits_stored) - 1)
    if low <= span[0] and span[1] <= high:
        return words
    shift = 16 - bits_stored
    if signed:
        return ((words << shift).view(np.int16) >> shift).view(np.uint16)
    return words & np.uint16(high)


def audit_of(
    words: NDArray[np.uint16],
    span: tuple[int, int],
    row: dict[str, Any],
    *,
    intercept: float,
    content_hash: str,
    flags: list[str],
) -> Audit:
    """Return the audit of stored ``words`` (rows, columns), whose ``extremes`` are ``span``; padding counts too.

    Flags: ``constant`` (one value everywhere), ``noise`` (a stretch of rows in which neighbours differ by an eighth of
    all that can be stored, on average), ``clipped_high`` (a value above 3071 HU).
    """
    stored = words.view(np.int16) if row["signed"] else words
    least, most = span
    slope = row["rescale_slope"]
    flags = list(flags)
    if least == most:
        flags.append("constant")
    if most * slope + intercept > HIGHEST_HU:
        flags.append("clipped_high")
    if most - least > NOISE_SHARE * 2 ** row["bits_stored"] and stored.shape[1] > 1:
        some = stored[:: max(1, len(stored) // NOISE_ROWS)]
        steps = cv2.absdiff(some[:, 1:], some[:, :-1])
        roughness = cv2.reduce(steps, 1, cv2.REDUCE_AVG, dtype=cv2.CV_32F)
        if int((roughness > NOISE_SHARE * 2 ** row["bits_stored"]).sum()) >= 2:
            flags.append("noise")
    mean = cv2.sumElems(stored)[0] / stored.size
    return Audit(
        hu_min=least * slope + intercept,
        hu_max=most * slope + intercept,
        hu_mean=mean * slope + intercept,
        content_hash=content_hash,
        flags=flags,
    )
