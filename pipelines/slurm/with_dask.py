"""A build on Slurm with Dask: dask-jobqueue submits the workers, and the build runs here.

    pip install '.[cluster]'
    python pipelines/slurm/with_dask.py SOURCE OUT --jobs 20 --queue cpu -- --recipe pipelines/rsna_resnet50.toml

What follows ``--`` are options of ``ich-prep build``. Run it on a node that the workers can reach, in a folder that all
of them see, and run it again after a stop: it resumes. Workers that Slurm ends are replaced.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
from collections.abc import Sequence

from dask_jobqueue import SLURMCluster


def make_cluster(options: argparse.Namespace) -> SLURMCluster:
    """Return a cluster without workers: one job has ``cores`` worker processes of one thread each."""
    return SLURMCluster(
        queue=options.queue,
        account=options.account,
        cores=options.cores,
        processes=options.cores,
        memory=options.memory,
        walltime=options.walltime,
        interface=options.interface,
        python=sys.executable,
        job_script_prologue=["export OMP_NUM_THREADS=1 OPENBLAS_NUM_THREADS=1"],
    )


def parse(words: Sequence[str]) -> argparse.Namespace:
    """Return the options of this script; ``build`` has those of ``ich-prep build``."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("source")
    parser.add_argument("out")
    parser.add_argument("--jobs", type=int, default=4, help="Slurm jobs with workers.")
    parser.add_argument("--cores", type=int, default=8, help="Worker processes of a job.")
    parser.add_argument("--memory", default="16GB", help="Memory of a job.")
    parser.add_argument("--walltime", default="04:00:00")
    parser.add_argument("--queue", help="The partition.")
    parser.add_argument("--account")
    parser.add_argument("--interface", help="The network interface of workers and scheduler, such as ib0.")
    parser.add_argument("--job-script", action="store_true", help="Print the job script, and submit nothing.")
    end = words.index("--") if "--" in words else len(words)
    return parser.parse_args(words[:end], argparse.Namespace(build=words[end + 1 :]))


def main(words: Sequence[str]) -> int:
    """Build on the cluster; return the exit code of ``ich-prep build``."""
    options = parse(words)
    with make_cluster(options) as cluster:
        if options.job_script:
            print(cluster.job_script())
            return 0
        cluster.scale(jobs=options.jobs)
        print(f"Dashboard: {cluster.dashboard_link}", file=sys.stderr)
        build = ["build", "--src", options.source, "--out", options.out, "--scheduler", cluster.scheduler_address]
        return subprocess.run([sys.executable, "-m", "ich_prep", *build, *options.build], check=False).returncode


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
