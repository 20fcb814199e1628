#!/usr/bin/env bash
# A night on 2-4 cores, every stage in turn: tower, pretraining on all that 64 pixels can show, joint
# RL, examination. Interrupted, start it again: each stage goes on where it was.
#
#   bash runs/night.sh                  some six hours by the steps' measured times; never run whole
#   PART=500 OUT=out/try bash runs/night.sh    a five-hundredth of it, to see that all of it runs
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
