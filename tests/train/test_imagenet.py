"""ImageNet's weights by name: from a server, checked, cached; a local server stands for the one that publishes them."""

from __future__ import annotations

import hashlib
import threading
from collections.abc import Iterator
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
import torch

from ich_prep.errors import UsageError
from ich_train import imagenet
from ich_train.imagenet import FILES, imagenet_weights
from ich_train.model import build_model


class Quiet(SimpleHTTPRequestHandler):
    def log_message(self, *_: Any) -> None:
        pass


@pytest.fixture
def server(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """The folder that a server on this machine serves in place of the real one."""
    folder = tmp_path / "served"
    folder.mkdir()
    http = ThreadingHTTPServer(("127.0.0.1", 0), partial(Quiet, directory=str(folder)))
    thread = threading.Thread(target=http.serve_forever)
    thread.start()
    monkeypatch.setenv("ICH_IMAGENET_URL", f"http://127.0.0.1:{http.server_port}/")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    yield folder
    http.shutdown()
    thread.join()
    http.server_close()


def publish(folder: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, torch.Tensor]:
    """Weights of a ResNet-18 under a name with the digest that they have."""
    tensors = build_model("resnet18", channels=3, size=32, classes=1000).state_dict()
    torch.save(tensors, folder / "new.pth")
    digest = hashlib.sha256((folder / "new.pth").read_bytes()).hexdigest()[:8]
    name = f"resnet18-{digest}.pth"
    (folder / "new.pth").rename(folder / name)
    monkeypatch.setitem(imagenet.FILES, "resnet18", (imagenet.TORCHVISION, name))
    return tensors


def test_weights_are_downloaded_once_and_used(server: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tensors = publish(server, monkeypatch)
    file = imagenet_weights("resnet18")
    assert file.parent == tmp_path / "cache" / "ich" / "weights"
    model = build_model("resnet18", channels=9, size=32, classes=6, weights=file)
    assert torch.equal(model.state_dict()["layer1.0.conv1.weight"], tensors["layer1.0.conv1.weight"])
    for served in server.iterdir():
        served.unlink()
    assert imagenet_weights("resnet18") == file, "from the cache"


def test_another_file_of_the_name_is_refused(server: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    publish(server, monkeypatch)
    (name,) = (path.name for path in server.iterdir())
    good = (server / name).read_bytes()
    (server / name).write_bytes(good[:-1] + b"x")
    with pytest.raises(UsageError, match="is not the published file: expected a SHA-256 that begins with"):
        imagenet_weights("resnet18")
    assert not list((tmp_path / "cache").rglob("*.pth")), "nothing wrong is kept"
    (server / name).write_bytes(good)
    file = imagenet_weights("resnet18")
    file.write_bytes(good[:-1])
    with pytest.raises(UsageError, match="Remove it if it is a file"):
        imagenet_weights("resnet18")


def test_a_failed_download_says_what_to_do(server: Path) -> None:
    with pytest.raises(
        UsageError, match=r"Cannot download http://127\.0\.0\.1:\d+/densenet121-a639ec97\.pth.*--weights"
    ):
        imagenet_weights("densenet121")
    with pytest.raises(UsageError, match=r"is known for resnet18, .*; found baseline"):
        imagenet_weights("baseline")
    assert server.is_dir()


def test_each_name_ends_with_the_beginning_of_a_digest() -> None:
    for _, name in FILES.values():
        digest = name.removesuffix(".pth").rpartition("-")[2]
        assert len(digest) == 8
        assert int(digest, 16) >= 0
