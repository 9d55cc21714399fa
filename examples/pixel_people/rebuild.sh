#!/usr/bin/env bash
# SPDX-License-Identifier: Apache-2.0
# Rebuilds everything that diffusers_ternary/demo/data holds: data set, judge, teacher, scores.
#   bash examples/pixel_people/rebuild.sh [WORK_FOLDER]
# Needs node >= 18, npm and about 1.5 hours on one CPU core. Run it again after an interruption: it resumes.
set -euo pipefail
here="$(cd "$(dirname "$0")" && pwd)"
work="$(mkdir -p "${1:-$here/work}" && cd "${1:-$here/work}" && pwd)"
data="$here/../../diffusers_ternary/demo/data"
export OMP_NUM_THREADS="${OMP_NUM_THREADS:-1}"

python -m pip install --quiet -r "$here/requirements.txt"
[ -f "$work/dataset/train.npz" ] || python "$here/make_dataset.py" --output "$work/dataset"
[ -f "$work/judge/judge.safetensors" ] || python "$here/train_judge.py" --data "$work/dataset" --output "$work/judge"
python "$here/train_teacher.py" --data "$work/dataset" --work "$work/run" --output "$work/teacher"

mkdir -p "$data/teacher"
cp "$work"/judge/* "$data/"
cp -r "$work/teacher/." "$data/teacher/"
python "$here/score_teacher.py" --data "$work/dataset" --output "$here/scores.json"

# The ternary versions, from prompts only.
python "$here/calibrate_student.py" "$data/calibrated"
python "$here/../distill_pixel_people.py" --output "$work/distilled"
python "$here/embed_distilled.py" "$work/distilled" "$data/distilled"
