"""Known defects of head CT archives, each as files that the phantom adds to a clean tree."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import PurePosixPath

import numpy as np
from numpy.typing import NDArray

from ich_prep.phantom.files import token
from ich_prep.phantom.series import Place
from ich_prep.phantom.trees import Listed, SliceFile, series_files

SECONDARY_CAPTURE = "1.2.840.10008.5.1.4.1.1.7"

# Each defect has its own patient, numbered from here, beyond any cohort.
_FIRST_PATIENT = 100_000
_DEFECT_STREAM = 200

_ALL = ("rsna", "cq500", "folder")
_SLICE_LABELS = ("rsna", "folder")

_CENTRE_MM = 22.0  # a level with ventricles and sulci


# Files by relative path, and their entries in the label files.
_Output = tuple[tuple[tuple[str, bytes], ...], tuple[Listed, ...]]


@dataclass(frozen=True)
class Damage:
    """What one defect adds to a tree: files by relative path, their entries in the label files, and its patient."""

    defect: str
    files: tuple[tuple[str, bytes], ...]
    listed: tuple[Listed, ...]
    place: Place


@dataclass(frozen=True)
class _Context:
    """The inputs of a defect: the tree's layout, seed and size, and the defect's patient number."""

    layout: str
    seed: int
    size: int
    patient: int

    def place(self, kinds: tuple[str, ...] = (), *, second: bool = False) -> Place:
        """Return the defect's own patient, or a ``second`` one; both are scanned with 16 bits and without tilt."""
        number = _FIRST_PATIENT + 12 * self.patient + (7 if second else 1)
        return Place(index=number, patient=number, first_index=number, follows=False, test=False, kinds=kinds, phase=0)

    def slice(self, kinds: tuple[str, ...] = ()) -> SliceFile:
        """Return one good slice at the level of the ventricles."""
        return next(self.slices((_CENTRE_MM,), kinds))

    def slices(
        self, heights_mm: tuple[float, ...], kinds: tuple[str, ...] = (), *, size: int | None = None
    ) -> Iterator[SliceFile]:
        """Yield good slices at the given levels."""
        where = self.place(kinds)
        return series_files(self.layout, self.seed, where, size=size or self.size, heights_mm=heights_mm)

    def rng(self) -> np.random.Generator:
        """Return the defect's own random numbers."""
        return np.random.default_rng((self.seed, _DEFECT_STREAM, self.patient))


def _pixels(file: SliceFile) -> NDArray[np.int16]:
    attributes = file.attributes
    flat = np.frombuffer(attributes["PixelData"], "<i2")
    return flat.reshape(attributes["Rows"], attributes["Columns"]).copy()


def _with_pixels(file: SliceFile, pixels: NDArray[np.int16] | NDArray[np.uint16]) -> SliceFile:
    rows, columns = pixels.shape
    return _with(file, Rows=rows, Columns=columns, PixelData=pixels.tobytes())


def _with(file: SliceFile, **attributes: object) -> SliceFile:
    return replace(file, attributes=file.attributes | attributes)


def _listed(*files: SliceFile) -> _Output:
    """Return files that are in the label files like any slice."""
    return tuple((file.path, file.content()) for file in files), tuple(file.listed for file in files)


def _unlisted(file: SliceFile) -> _Output:
    """Return a file that is in no label file."""
    return ((file.path, file.content()),), ()


def _unreadable(context: _Context, file: SliceFile, content: bytes) -> _Output:
    """Return an unreadable file that is in label files by slice, but not in those by series."""
    return ((file.path, content),), (file.listed,) if context.layout in _SLICE_LABELS else ()


def _truncated(context: _Context) -> _Output:
    file = context.slice()
    pixel_bytes = len(file.attributes["PixelData"])
    missing = pixel_bytes - pixel_bytes * 153_710 // 524_288  # as in RSNA's truncated slice
    return _unreadable(context, file, file.content()[:-missing])


def _zero_length(context: _Context) -> _Output:
    file = context.slice()
    # Only in RSNA's layout does the file name identify the slice.
    return ((file.path, b""),), (file.listed,) if context.layout == "rsna" else ()


def _not_dicom(context: _Context) -> _Output:
    folder = PurePosixPath(context.slice().path).parent
    thumbnails = bytes.fromhex("d0cf11e0a1b11ae1") + bytes(1016)  # a compound file, as Windows leaves it
    name = f"ID_{token(9, context.seed, 'not_dicom')}.dcm"
    return ((str(folder / "Thumbs.db"), thumbnails), (str(folder / name), context.rng().bytes(8192))), ()


def _localizer(context: _Context) -> _Output:
    return _unlisted(
        _with(
            context.slice(),
            ImageType=["ORIGINAL", "PRIMARY", "LOCALIZER"],
            ImageOrientationPatient=["0", "1", "0", "0", "0", "-1"],
        )
    )


def _dose_page(context: _Context) -> _Output:
    file = context.slice()
    page = np.zeros((context.size, context.size), np.uint16)
    page[context.size // 8 : context.size // 2 : 8, context.size // 8 : -context.size // 4] = 255  # lines of text
    ct_only = ("Image", "Rescale", "PixelPadding")
    general = {key: value for key, value in file.attributes.items() if not key.startswith(ct_only)}
    page_file = _with_pixels(replace(file, attributes=general), page)
    return _unlisted(
        _with(
            page_file,
            SOPClassUID=SECONDARY_CAPTURE,
            ImageType=["DERIVED", "SECONDARY", "SCREEN SAVE"],
            BitsStored=8,
            HighBit=7,
            PixelRepresentation=0,
        )
    )


def _multi_frame(context: _Context) -> _Output:
    file = context.slice()
    return _unreadable(
        context, file, _with(file, NumberOfFrames="3", PixelData=3 * file.attributes["PixelData"]).content()
    )


def _size_lie(context: _Context) -> _Output:
    file = context.slice()
    return _unreadable(context, file, _with(file, Rows=file.attributes["Rows"] + context.size // 4).content())


def _noise_tail(context: _Context) -> _Output:
    file = context.slice()
    pixels = _pixels(file)
    first = 332 * context.size // 512
    pixels[first:] = context.rng().integers(-32768, 32768, size=pixels[first:].shape)
    return _listed(_with_pixels(file, pixels))


def _constant(context: _Context) -> _Output:
    file = context.slice()
    return _listed(_with_pixels(file, np.zeros_like(_pixels(file))))


def _metal(context: _Context) -> _Output:
    file = context.slice()
    pixels = _pixels(file)
    centre, radius = context.size // 2, max(2, context.size // 60)
    pixels[centre, centre // 2 : -centre // 2] += 1500  # a streak
    pixels[centre - radius : centre + radius, centre - radius : centre + radius] = 31_743
    return _listed(_with_pixels(file, pixels))


def _newline_name(context: _Context) -> _Output:
    file = context.slice()
    return _listed(replace(file, path=file.path.replace(".dcm", "\n.dcm")))


def _odd_size(context: _Context) -> _Output:
    heights = (_CENTRE_MM, _CENTRE_MM + 5.0)
    rows, columns = 638 * context.size // 512, 490 * context.size // 512
    square, _ = context.slices(heights, size=436 * context.size // 512)
    _, wide = context.slices(heights, size=rows)
    left = (rows - columns) // 2
    x, y, z = wide.attributes["ImagePositionPatient"]
    x = f"{float(x) + left * float(wide.attributes['PixelSpacing'][1]):.6f}"
    narrow = _with_pixels(wide, np.ascontiguousarray(_pixels(wide)[:, left : left + columns]))
    return _listed(square, _with(narrow, ImagePositionPatient=[x, y, z]))


def _sign_12bit(context: _Context) -> _Output:
    files = []
    for number, file in enumerate(context.slices((_CENTRE_MM, _CENTRE_MM + 5.0, _CENTRE_MM + 10.0))):
        pixels = _pixels(file)
        # (stored + 1000) modulo 4096 is HU + 1000: so stored is HU modulo 4096.
        hu = (pixels - np.int16(1024)).clip(-1000, 3095)  # padding becomes air too
        stored = np.where(hu < 0, hu + 4096, hu).astype("<u2")
        signless = _with(_with_pixels(file, stored), BitsStored=12, HighBit=11, PixelRepresentation=0)
        files.append(_with(signless, RescaleIntercept="01"[number % 2]))
    return _listed(*files)


def _duplicate_file(context: _Context) -> _Output:
    file = context.slice()
    copy = file.path.replace(".dcm", " (1).dcm")
    return ((file.path, file.content()), (copy, file.content())), (file.listed,)


def _identical_patients(context: _Context) -> _Output:
    positive = context.slice(("subdural",))
    where = context.place(second=True)
    other = next(series_files(context.layout, context.seed, where, size=context.size, heights_mm=(_CENTRE_MM,)))
    same = _with_pixels(other, _pixels(positive))
    return _listed(positive, same)


def _duplicate_labels(context: _Context) -> _Output:
    files, listed = _listed(context.slice())
    return files, 2 * listed


@dataclass(frozen=True)
class Defect:
    """A known defect: a sentence, the layouts that support it, and the function that makes it."""

    sentence: str
    layouts: tuple[str, ...]
    make: Callable[[_Context], _Output]


KNOWN_DEFECTS: dict[str, Defect] = {
    "truncated": Defect("The file ends after 29% of its pixels.", _ALL, _truncated),
    "zero_length": Defect("The file has no bytes.", _ALL, _zero_length),
    "not_dicom": Defect("A thumbnail cache, and random bytes under a name like a slice's.", _ALL, _not_dicom),
    "localizer": Defect("A scout image among the slices.", _ALL, _localizer),
    "dose_page": Defect("A secondary capture with lines of text.", _ALL, _dose_page),
    "multi_frame": Defect("Three frames in the file of one slice.", _ALL, _multi_frame),
    "size_lie": Defect("The header promises a quarter more rows than there are pixels.", _ALL, _size_lie),
    "noise_tail": Defect("Two thirds down, the slice turns into noise over all 16 bits.", _ALL, _noise_tail),
    "constant": Defect("All pixels have one value.", _ALL, _constant),
    "metal": Defect("Stored values above 30,000 in a signed slice.", _ALL, _metal),
    "newline_name": Defect("A file name with a newline before its suffix.", ("rsna",), _newline_name),
    "odd_size": Defect(
        "Slices of 436 x 436 and 638 x 490 among 512 x 512, or in that proportion to the size.", _ALL, _odd_size
    ),
    "sign_12bit": Defect(
        "12 bits unsigned, intercept 0 or 1, where HU below zero were stored modulo 4096.", ("rsna",), _sign_12bit
    ),
    "duplicate_file": Defect("The same SOP instance in two files.", _ALL, _duplicate_file),
    "identical_patients": Defect(
        "The same pixels under two patients, one labelled with a bleed and one without.",
        _SLICE_LABELS,
        _identical_patients,
    ),
    "duplicate_labels": Defect("The label lines of a slice twice, equal.", _SLICE_LABELS, _duplicate_labels),
}


def damaged_files(layout: str, seed: int, *, size: int) -> Iterator[Damage]:
    """Yield the damage of each known defect that ``layout`` supports."""
    for patient, (name, defect) in enumerate(KNOWN_DEFECTS.items()):
        if layout in defect.layouts:
            context = _Context(layout=layout, seed=seed, size=size, patient=patient)
            files, listed = defect.make(context)
            yield Damage(name, files, listed, context.place())
