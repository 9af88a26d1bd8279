#!/usr/bin/env bash
# From images to a trained model to new images, by the command line alone: under 15 minutes on two CPU cores.
#
#   examples/quickstart.sh                     synthetic images, made on the spot
#   examples/quickstart.sh folder:my_images    your own: folder:DIR, parquet:PATTERN or a path; a tenth is held out
#   examples/quickstart.sh folder:my_images psoriasis,eczema   of your own classes; or auto for all that are there
#
# Writes runs/quickstart/{vqvae,codes,prior,samples,figures}.
set -euo pipefail
configs=$(cd "$(dirname "$0")" && pwd)/configs
data=${1:-synthetic:1024:0}
classes=() declared=()
if [ $# -gt 1 ]; then
  classes=(--classes "$2")
  declared=("data.classes=[$2]")
fi
run=runs/quickstart
if [ -e "$run" ]; then
  echo "$run exists: move it away first" >&2
  exit 1
fi

isic-vq train "$configs/vqvae-tiny.yaml" output_dir=$run/vqvae "data.train=$data" ${declared[@]+"${declared[@]}"}
isic-vq encode $run/vqvae/model --data "$data" ${classes[@]+"${classes[@]}"} --part train --output $run/codes/train.parquet
isic-vq encode $run/vqvae/model --data "$data" ${classes[@]+"${classes[@]}"} --part validation --views 1 --output $run/codes/validation.parquet
isic-vq train "$configs/prior-tiny.yaml" output_dir=$run/prior tokenizer=$run/vqvae/model \
  train_codes=$run/codes/train.parquet validation_codes=$run/codes/validation.parquet
isic-vq generate --model $run/prior/model --num-images 16 --output $run/samples
isic-vq figures $run --output $run/figures
