#!/usr/bin/env bash
# SPDX-License-Identifier: Apache-2.0
# Rebuilds everything in examples/scenes/models (autoencoder, judge, teachers, scores), the benchmark's table and the
# ternary model of the demo.
#   bash examples/scenes/rebuild.sh [WORK_FOLDER]
# Uses a GPU if accelerate finds one, otherwise one CPU core for many hours. Run it again after an interruption: it
# goes on where it was.
set -euo pipefail
here="$(cd "$(dirname "$0")" && pwd)"
work="$(mkdir -p "${1:-$here/work}" && cd "${1:-$here/work}" && pwd)"
models="$here/models"
export OMP_NUM_THREADS="${OMP_NUM_THREADS:-1}"

[ -d "$work/vae" ] || python "$here/train_vae.py" --output "$work/vae"
[ -d "$work/vae-refined" ] || python "$here/train_vae.py" --refine "$work/vae" --output "$work/vae-refined" --steps 1500
[ -f "$work/judge/judge.safetensors" ] || python "$here/train_judge.py" --vae "$work/vae-refined" --output "$work/judge"
python "$here/train_teacher.py" --vae "$work/vae-refined" --work "$work/flux" --compile
python "$here/train_teacher.py" --vae "$work/vae-refined" --work "$work/sana" --architecture sana --num-layers 12 --compile \
  --float8

mkdir -p "$models"
rm -rf "${models:?}/vae"
cp -r "$work/vae-refined" "$models/vae"
cp "$work/judge/judge.safetensors" "$work/judge/judge_scores.json" "$models/"
for name in flux sana; do
  rm -rf "${models:?}/$name"
  cp -r "$work/$name/teacher" "$models/$name"
  python "$here/score_teacher.py" --teacher "$models/$name" --judge "$models/judge.safetensors" \
    --output "$models/${name}_scores.json" --sheet "$work/$name.png"
done

quality="$here/../../integration_tests/benchmarks/quality.py"
python "$quality" --work "$work/quality"
python "$quality" --work "$work/quality" --teacher sana
python "$here/embed_ternary.py" "$(ls -td "$work"/quality/Flux*/converted/distilled-full-*/model | head -n 1)"
