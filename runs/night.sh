#!/usr/bin/env bash
# A model of size `mini` (3.8M parameters) for all 36 categories of the gym, on one core of a CPU.
#
#   bash runs/night.sh                      20 hours, into out/night
#   HOURS=8 bash runs/night.sh out/short    every stage in proportion
#   HOURS=0.02 bash runs/night.sh out/try   a few steps of each stage, to see that everything runs
#   THREADS=2 nice bash runs/night.sh       two cores, 1.5 times as fast; other programs go first
#
# Interrupted, even by SIGKILL or a power cut? Start it again with the same HOURS and folder. A stage
# that is done is skipped, the others go on from their newest checkpoint, minutes old at most.
#
# While it runs, OUT/kept holds the weights of the newest checkpoint, in bf16 (7.6 MB): copy that
# folder, or use it as it is (`python sample.py ask --ckpt=out/night/kept --image=...`). `python -m
# lab.report out/night/first` writes a page with the curves of a stage; `tail` its log.jsonl.
set -euo pipefail
{   # bash reads all of a block before it runs it: the file may be edited while the run goes on
cd "$(dirname "$0")/.."
OUT=${1:-out/night} HOURS=${HOURS:-20} EXAM=${EXAM:-gym} PYTHON=${PYTHON:-.venv/bin/python}
export OMP_NUM_THREADS=${THREADS:-1}
mkdir -p "$OUT"

# A share of the hours in steps, at least one. Seconds a step, measured on one thread: 0.7 for the
# tower (64 pictures), 1.2 for pretraining (a row of 4,096 tokens). A busy machine takes longer.
steps() { awk "BEGIN { n = int($1 * $HOURS * 3600 / $2); print n < 1 ? 1 : n }"; }

# train RUN STEPS OPTIONS: one run of pretrain.py, unless it is done. A checkpoint every 150 steps is
# one every few minutes. Rows of 4,096 tokens: the longest document has about 2,100.
train() {
    local run=$OUT/$1 count=$2
    [ -d "$run/step_$(printf %06d "$count")" ] && return
    $PYTHON pretrain.py --size=mini --steps="$count" --out="$run" --resume --keep="$OUT/kept" \
        --rows=1 --row_tokens=4096 --own_question --workers=0 --save_every=150 "${@:3}"
}

# examine RUN FILE TASKS OPTIONS: held-out tasks of every category (or those in EXAM), of levels 0
# and 1 in turn.
examine() {
    [ -f "$2" ] && return
    local count
    count=$(awk "BEGIN { n = int($3 * $HOURS / 20); print n < 2 ? 2 : n }")
    $PYTHON sample.py eval --ckpt="$1" --mix="$EXAM" --levels=2 --slots=16 --count="$count" \
        --out="$2" "${@:4}"
}

# The mixture. A category's weight is 1 / sqrt(cost of a sample), in units of a cheap one: of the
# time, pictures of 64 pixels then get 30%, of 128 pixels 26%, of 256 pixels 44%, and no category
# more than 9%. With equal weights ui_polish alone would take 20%, with equal times it would be seen
# forty times less often than a cheap category.
CHEAP=shape_attr,counting,ocr_line,ground_box,ground_multi,point,map_route,grid_logic,gui_click
CHEAP+=,gui_form,world_knowledge,text_code,spatial_relation:.8,scene_to_json:.7,spot_diff:.7
CHEAP+=,interleaved_qa:.7,text_tools:.6,video_events:.5
MIDDLE=geometry:.7,matrix_puzzle:.7,gui_next_action:.7,gui_navigate:.7,gui_multi_app:.7
MIDDLE+=,widget_state:.6,ui_ground:.6,visual_tools:.4,gui_critic:.3,image_mining:.3
DEAR=ocr_document:.3,chart_arith:.3,code_output:.3,table_read:.27,chart_read:.27,ui_to_code:.26
DEAR+=,doc_qa:.2,ui_polish:.15
TEXT=text:.5,code:.5,atlas:2
MIX=$CHEAP,$MIDDLE,$DEAR,$TEXT

# improving FILE: the same mixture, each category's weight times 1/4 + 3p(1-p), where p is its mean
# reward in the examination FILE. Most is learnt where about half succeeds; what is solved or still
# hopeless keeps a quarter, since it would be forgotten, or never begin. RL chooses its tasks so,
# too (lib/curriculum.py). A category that the examination lacks keeps its whole weight.
improving() {
    $PYTHON - "$MIX" "$1" <<'END'
import json, sys
table, mix = json.load(open(sys.argv[2]))["table"], []
for part in sys.argv[1].split(","):
    name, _, weight = part.partition(":")
    p = table.get(name, {"reward": 0.5})["reward"]
    mix.append(f"{name}:{float(weight or 1) * (0.25 + 3 * p * (1 - p)):.3f}")
print(",".join(mix))
END
}

# 1. The tower, half an hour of 20: two teachers, distillation, alignment, on drawings of 64 pixels.
#    It did not pay in accuracy at `tiny` (RESULTS.md), so it is short. Look at: OUT/vit/report.json.
[ -f "$OUT/vit/done" ] || $PYTHON train_vit.py --size=mini --out="$OUT/vit" --resume --workers=0 \
    --steps="$(steps 0.00625 0.7)" --probes=256 --eval_every=0 --save_every=100
touch "$OUT/vit/done"

# 2. Level 0 of everything, 4 hours. A model first learns how answers read, and later to look at the
#    picture; it does so sooner on easy ones. Look at: `loss` falls in steps, `held_out` with it.
train first "$(steps 0.2 1.2)" --vit="$OUT/vit/align" --mix="$MIX" --levels=1 --curriculum=0 --mtp=0
examine "$OUT/first" "$OUT/first.json" 20

# 3. Levels 0 to 2, 9 hours: from level 1 on with light grounds, and things anywhere in pictures of
#    any aspect. The mixture is that of what still improves. Look at: OUT/first.json says which
#    categories that is; is their accuracy above `blank`, that with grey pictures?
train second "$(steps 0.45 1.2)" --init="$OUT/first" --mix="$(improving "$OUT/first.json")" \
    --levels=3 --curriculum=0 --mtp=0 --lr=3e-3
examine "$OUT/second" "$OUT/second.json" 20

# 4. Supervised fine-tuning, 4 hours: half of the replies begin with the oracle's reasons, where it
#    states any; the categories of tiers 0 to 3 include whole episodes of tools and phones. The
#    MTP head learns beside it, without changing the rest. Look at: `mtp1` below 1.
train sft "$(steps 0.2 1.2)" --init="$OUT/second" --mix="$(improving "$OUT/second.json")" \
    --levels=3 --curriculum=0 --think=0.5 --mtp_alone --lr=1.5e-3

# 5. The examination, an hour or less. The card with its figures lies beside the weights, where
#    `sample.py ask` looks for what a model was trained on.
examine "$OUT/sft" "$OUT/sft.json" 200 --card="$OUT/kept"
$PYTHON -m lab.report "$OUT/sft"
exit
}
