#!/usr/bin/env bash
# One night on 2-4 cores, all stages in turn: vision tower, pretraining on every category that 64
# pixels can show, joint RL, evaluation. If it is interrupted, start it again: each stage resumes.
#
#   bash runs/night.sh          about six hours, computed from measured times of a step; the whole
#                               script has not been run yet
#   PART=500 OUT=out/try bash runs/night.sh     1/500 of the steps, to check that everything runs
set -euo pipefail
cd "$(dirname "$0")/.."
PY=${PY:-.venv/bin/python} OUT=${OUT:-out/night} PART=${PART:-1}
steps() { echo $(( $1 / PART > 0 ? $1 / PART : 1 )); }

$PY train_vit.py --stage=all --steps="$(steps 2000)" --out="$OUT/vit" --resume
$PY pretrain.py --vit="$OUT/vit/align" --mix=gym:9,text,code --levels=2 --steps="$(steps 40000)" \
    --out="$OUT/pretrain" --resume
$PY rl.py --init="$OUT/pretrain" --mix=gym --levels=3 --prompts=48 --context=1024 \
    --steps="$(steps 600)" --eval_count="$(steps 100)" --out="$OUT/rl" --resume
$PY sample.py eval --ckpt="$OUT/rl" --mix=gym --levels=2 --count="$(steps 200)" --out="$OUT/eval.json"
$PY -m lab.report "$OUT/vit"
$PY -m lab.report "$OUT/rl"
