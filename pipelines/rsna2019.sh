#!/usr/bin/env bash
# RSNA 2019, from the competition's files to a submission: build, verify, train, test, predict.
#
#   pipelines/rsna2019.sh SOURCE [OUT] [RECIPE]
#
# SOURCE holds stage_2_train, stage_2_test and their CSV files. Run it again after a stop: every step resumes or is repeated.
set -euo pipefail
source=${1:?"Usage: pipelines/rsna2019.sh SOURCE [OUT] [RECIPE]"}
out=${2:-rsna2019}
recipe=${3:-"$(dirname "$0")/rsna_densenet121.toml"}
mkdir -p "$out"

ich-prep build --src "$source" --out "$out/data.zarr" --recipe "$recipe"
ich-prep verify "$out/data.zarr" --src "$source" --sample 0.001
resume=()
if [ -e "$out/run/recipe.toml" ]; then resume=(--resume); fi
ich-train run --recipe "$recipe" --data "$out/data.zarr" --out "$out/run" "${resume[@]}"
ich-train eval "$out/run" --subset val --out "$out/val"
ich-train predict "$out/run" --out "$out/submission.csv" --sample "$source/stage_2_sample_submission.csv"
echo "The report: $out/run/report.html; the submission: $out/submission.csv"
