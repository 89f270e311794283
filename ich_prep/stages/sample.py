"""A few slices of a plan rendered and encoded as a shard's task does, to estimate what the whole build takes."""

from __future__ import annotations

import io
import time
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import pyarrow as pa

from ich_prep.dataset.codecs import CODECS
from ich_prep.dataset.shard_format import ShardWriter
from ich_prep.errors import SliceError
from ich_prep.sources import open_source, read_ahead
from ich_prep.stages.shard import COLUMNS, FILES_AHEAD, SliceRenderer, pixel_source, shared_decoder, use_one_thread

if TYPE_CHECKING:
    from collections.abc import Sequence

    from ich_prep.dataset.bucket_path import Place
    from ich_prep.dataset.spec import Spec

SAMPLED = 32


@dataclass(frozen=True)
class Sample:
    """What ``slices`` slices took in one process: mean ``seconds`` and stored ``bytes`` of a slice, None if none decoded.

    ``failures`` are those that did not decode, as "path: reason: detail".
    """

    slices: int
    seconds: float | None
    bytes: float | None
    failures: tuple[str, ...]


def sampled_rows(count: int, most: int = SAMPLED) -> list[int]:
    """Return up to ``most`` rows of ``count``, evenly spaced."""
    return np.unique(np.linspace(0, count - 1, min(count, most)).round().astype(int)).tolist() if count else []


def measure(slices: pa.Table, keys: Sequence[bytes], sources: Sequence[Place], spec: Spec) -> Sample:
    """Return what rendering and encoding ``slices`` takes, lines of a plan, whose source keys are ``keys``.

    The first is done twice, and counted once: it starts the decoders.
    """
    if not len(slices):
        return Sample(0, None, None, ())
    use_one_thread()
    lines = slices.select([*COLUMNS]).to_pylist()
    source, decoder, renderer = open_source(sources), shared_decoder(), SliceRenderer(spec)
    located = [pixel_source(source, key, line) for key, line in zip(keys, lines, strict=True)]
    sink, codec = io.BytesIO(), CODECS[spec.codec]
    writer = ShardWriter(sink, len(lines) + 1, codec)
    failures: list[str] = []
    start, first = time.perf_counter(), 0
    pairs = zip([lines[0], *lines], read_ahead(source, [located[0], *located], lambda one: one.key, files=FILES_AHEAD))
    for number, (line, pixels) in enumerate(pairs):
        if number == 1:
            start, first = time.perf_counter(), sink.tell()
            failures.clear()
        try:
            renderer.render(decoder.read(pixels), line)
            writer.append(renderer.out)
        except SliceError as error:
            failures.append(f"{line['path']}: {error}")
    seconds, size = time.perf_counter() - start, sink.tell() - first
    done = len(lines) - len(failures)
    return Sample(
        slices=len(lines),
        seconds=seconds / len(lines) if done else None,
        bytes=size / done if done else None,
        failures=tuple(failures),
    )
