"""ImageNet's weights by name: downloaded once from where they are published, checked, and kept in a cache."""

from __future__ import annotations

import hashlib
import os
import urllib.request
from pathlib import Path

from ich_prep.dataset.storage import write_whole
from ich_prep.errors import UsageError

IMAGENET = "imagenet"
MIRROR = "ICH_IMAGENET_URL"  # an environment variable: another server with files of the same names
TORCHVISION = "https://download.pytorch.org/models"
CADENE = "http://data.lip6.fr/cadene/pretrainedmodels"
TIMEOUT_S = 60

# The end of a name is the beginning of the file's SHA-256. Of torchvision the first published weights (IMAGENET1K_V1).
FILES = {
    "resnet18": (TORCHVISION, "resnet18-f37072fd.pth"),
    "resnet34": (TORCHVISION, "resnet34-b627a593.pth"),
    "resnet50": (TORCHVISION, "resnet50-0676ba61.pth"),
    "densenet121": (TORCHVISION, "densenet121-a639ec97.pth"),
    "densenet169": (TORCHVISION, "densenet169-b2777c0a.pth"),
    "seresnext50": (CADENE, "se_resnext50_32x4d-a260b3a4.pth"),
}


def imagenet_weights(model: str) -> Path:
    """Return the file with ImageNet's weights of ``model``, one of ``FILES``, downloaded if it is not in the cache.

    The cache is the folder ich/weights of XDG_CACHE_HOME (by default ~/.cache). A file is kept only if its SHA-256
    begins as its name says; one in the cache is checked again. Raises `UsageError` for another model, a failed download,
    or a file that is not the one published.
    """
    if model not in FILES:
        raise UsageError(
            f'weights = "{IMAGENET}" is known for {", ".join(FILES)}; found {model}. Name a file of its weights instead.'
        )
    server, name = FILES[model]
    url = f"{os.environ.get(MIRROR, server).rstrip('/')}/{name}"
    file = _cache() / name
    if not file.is_file():
        content = _download(url)
        _check(content, name, url)
        file.parent.mkdir(parents=True, exist_ok=True)
        write_whole(file, content)
    _check(file.read_bytes(), name, str(file))
    return file


def _cache() -> Path:
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "ich" / "weights"


def _download(url: str) -> bytes:
    try:
        with urllib.request.urlopen(url, timeout=TIMEOUT_S) as answer:
            content: bytes = answer.read()
            return content
    except (OSError, ValueError) as error:
        raise UsageError(
            f"Cannot download {url}: {error}. Download the file elsewhere and name it with --weights, or set {MIRROR} to "
            "a server that has it."
        ) from error


def _check(content: bytes, name: str, place: str) -> None:
    expected = name.removesuffix(".pth").rpartition("-")[2]
    found = hashlib.sha256(content).hexdigest()
    if not found.startswith(expected):
        raise UsageError(
            f"{place} is not the published file: expected a SHA-256 that begins with {expected}, found {found[:8]}. "
            "Remove it if it is a file, and try again."
        )
