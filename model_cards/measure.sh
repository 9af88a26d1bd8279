#!/usr/bin/env bash
# Measure a shipped model again: its reports and card, and what the documentation says of it; prints the seconds of each step.
#   isic-vq encode MODEL --data 'parquet:${ISIC_VQ_DATA}/ham10000/train-*.parquet' -o CODES/train.parquet
#   isic-vq encode MODEL --data 'parquet:${ISIC_VQ_DATA}/ham10000/validation-*.parquet' -o CODES/validation.parquet --views 1
#   ISIC_VQ_DATA=FOLDER model_cards/measure.sh MODEL CODES [--features FOLDER_OF_ANOTHER_FEATURE_MODEL]
set -euo pipefail
model=$1 codes=$2
shift 2
# isic-vq reads ${ISIC_VQ_DATA} itself: reports name the variable, not its value.
train='parquet:${ISIC_VQ_DATA}/ham10000/train-*.parquet'
validation='parquet:${ISIC_VQ_DATA}/ham10000/validation-*.parquet'
uda1='parquet:${ISIC_VQ_DATA}/uda1/test-*.parquet'
reports=$model/reports
features=(--features model_cards/isic-derm-features)
timed() { local start=$SECONDS; "$@"; echo "$((SECONDS - start)) s: ${*:1:5}"; }
timed isic-vq evaluate "$model" --data "validation=$validation" --data "uda1=$uda1" --train-codes "$codes/train.parquet" \
  --train-data "$train" "${features[@]}" "$@" --floor-data "$train" --gallery runs/gallery --out "$reports/evaluation.json"
timed isic-vq audit -m "$model" --train-codes "$codes/train.parquet" --held-out-codes "$codes/validation.parquet" \
  "${features[@]}" --out "$reports/memorization.json"
timed isic-vq evaluate "$model" --only realism --train-data "$train" --data "validation=$validation" --out "$reports/realism.json"
timed isic-vq evaluate "$model" --only utility --size 200 --ratio 3 --train-data "$train" --data "validation=$validation" --data "uda1=$uda1" \
  --out "$reports/utility.json"
timed isic-vq evaluate "$model" --only sheets --out runs/sheets
timed python benchmarks/next_scale.py
timed isic-vq card "$model"
timed python docs/build.py
echo "$SECONDS s together"
