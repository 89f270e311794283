#!/usr/bin/env bash
# A build as Slurm jobs without Dask: one that plans, an array that writes the shards in parts, one that publishes.
#
#   pipelines/slurm/parts.sh SOURCE OUT PARTS [OPTION OF ich-prep plan]...
#
# Run on a login node, with ich-prep on the PATH, in a folder that all nodes see. Run it again if a job failed or was
# cancelled: what is done is kept. ICH_SBATCH has more options for every job, such as "--partition cpu --account ich".
# ICH_PUBLISH has options for ich-prep publish, such as "--max-quarantined 0.02".
set -euo pipefail
usage="Usage: pipelines/slurm/parts.sh SOURCE OUT PARTS [OPTION OF ich-prep plan]..."
source=$(realpath -- "${1:?$usage}")
out=$(realpath --canonicalize-missing -- "${2:?$usage}")
parts=${3:?$usage}
shift 3
read -r -a more <<< "${ICH_SBATCH:-}"
read -r -a publish <<< "${ICH_PUBLISH:-}"
cpus=${ICH_CPUS:-8}

# quoted WORD...: the words as one command for sbatch --wrap.
quoted() { printf '%q ' "$@"; }

submit() { sbatch --parsable --kill-on-invalid-dep=yes "${more[@]}" "$@" | cut -d ';' -f 1; }

plan=$(submit --job-name ich-plan --cpus-per-task "$cpus" --mem 8G --time 4:00:00 \
    --wrap "$(quoted ich-prep plan --src "$source" --out "$out" --workers "$cpus" "$@")")
# The task's number and the number of parts are words of the job, not of this shell.
shards=$(submit --job-name ich-shards --dependency "afterok:$plan" --array "1-$parts" --requeue \
    --cpus-per-task "$cpus" --mem-per-cpu 1G --time 12:00:00 \
    --wrap "$(quoted ich-prep shards "$out" --workers "$cpus") --part \"\$SLURM_ARRAY_TASK_ID/$parts\"")
last=$(submit --job-name ich-publish --dependency "afterok:$shards" --cpus-per-task 2 --mem 16G --time 1:00:00 \
    --wrap "$(quoted ich-prep publish "$out" "${publish[@]}")")
echo "Jobs: $plan plans, $shards writes the shards in $parts parts, $last publishes."
echo "Watch it with: ich-prep status $(quoted "$out")"
