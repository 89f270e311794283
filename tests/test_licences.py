"""The licences that the required packages declare: each is known, and none is copyleft."""

from __future__ import annotations

import re
from importlib.metadata import PackageMetadata, PackageNotFoundError, distribution
from pathlib import Path

from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

ROOT = Path(__file__).parents[1]

COPYLEFT = re.compile(r"GPL|General Public|MPL|Mozilla|EUPL|CDDL|Eclipse|OSL|CC-BY-SA|SSPL", re.IGNORECASE)


def licence_of(metadata: PackageMetadata) -> str:
    """Return the licence expression, else the classifiers, else the first line of the free text."""
    classifiers = [line.rsplit(" :: ", 1)[-1] for line in metadata.get_all("Classifier") or [] if "License ::" in line]
    stated = metadata.get("License-Expression") or "; ".join(classifiers) or metadata.get("License") or ""
    return stated.strip().split("\n")[0]


def required() -> dict[str, str]:
    """Return the licence of each package that installing this one without extras installs."""
    pending, licences = ["ich"], dict[str, str]()
    while pending:
        name = pending.pop()
        try:
            found = distribution(name)
        except PackageNotFoundError:
            continue  # required on another platform only
        if found.metadata["Name"] in licences:
            continue
        licences[found.metadata["Name"]] = licence_of(found.metadata)
        needs = [Requirement(line) for line in found.requires or []]
        pending += [need.name for need in needs if need.marker is None or need.marker.evaluate({"extra": ""})]
    return licences


def test_required_packages_are_free_of_copyleft() -> None:
    licences = required()
    assert len(licences) > 30
    assert not [name for name, licence in licences.items() if not licence], "no licence stated"
    assert not {name: licence for name, licence in licences.items() if COPYLEFT.search(licence)}


def test_the_lock_file_has_the_tested_versions_with_hashes() -> None:
    def pins(name: str) -> dict[str, str]:
        lines = [
            line.split(" ")[0] for line in (ROOT / name).read_text().splitlines() if "==" in line and line[0] != "#"
        ]
        return {canonicalize_name(name): version for name, _, version in (line.partition("==") for line in lines)}

    locked, tested = pins("requirements.lock"), pins("constraints.txt")
    assert {name: tested.get(name) for name in locked} == locked
    needed = {canonicalize_name(name) for name in required()} - {"ich"}
    assert not needed - locked.keys(), "run `make lock`"
    hashed = [line for line in (ROOT / "requirements.lock").read_text().splitlines() if "--hash=sha256:" in line]
    assert len(hashed) == len(locked)
