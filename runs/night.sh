#!/usr/bin/env bash
# A model of size `mini` (3.3M parameters) for all 36 categories of the gym, on one core of a CPU:
# how `ckpt/gym` was trained.
#
#   bash runs/night.sh                      7 hours of an idle core, into out/night
#   HOURS=3 bash runs/night.sh out/short    every stage in proportion
#   HOURS=0.02 bash runs/night.sh out/try   a few steps of each stage, to see that everything runs
#   THREADS=2 nice bash runs/night.sh       two cores, 1.5 times as fast; other programs go first
#
# Interrupted, even by SIGKILL or a power cut? Start it again with the same HOURS and folder. A stage
# that is done is skipped, the others go on from their newest checkpoint, minutes old at most.
#
# While it runs, OUT/kept holds the weights of the newest checkpoint, in bf16 (6.6 MB): copy that
# folder, or use it as it is (`python sample.py ask --ckpt=out/night/kept --image=...`). `python -m
# lab.report out/night/first` writes a page with the curves of a stage; `tail` its log.jsonl.
set -euo pipefail
{   # bash reads all of a block before it runs it: the file may be edited while the run goes on
cd "$(dirname "$0")/.."
OUT=${1:-out/night} HOURS=${HOURS:-7} EXAM=${EXAM:-gym} PYTHON=${PYTHON:-.venv/bin/python}
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
        --rows=1 --row_tokens=4096 --own_question --workers=0 --save_every=150 \
        --levels=1 --mtp=0 "${@:3}"
}
FALLING=(--lr=2.5e-3 --schedule=linear --decay=1 --curriculum=0)    # from the first step on

# examine RUN FILE TASKS OPTIONS: held-out tasks of every category (or those in EXAM), of levels 0
# and 1 in turn.
examine() {
    [ -f "$2" ] && return
    local count
    count=$(awk "BEGIN { n = int($3 * $HOURS / 7); print n < 2 ? 2 : n }")
    $PYTHON sample.py eval --ckpt="$1" --mix="$EXAM" --levels=2 --slots=32 --count="$count" \
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

# The mixture of the last stage, when a third of the categories was learned: less of what is solved,
# more of what is near, and of pages and tables, since single words can be read by now. Polishing
# pages and mining pictures take longest and are still hopeless.
LATER=shape_attr:.5,counting:1.5,ocr_line:.5,ground_box:1.2,ground_multi:1.5,point:.6,map_route:1.5
LATER+=,grid_logic:1.5,gui_click:.8,gui_form:.5,world_knowledge:.8,text_code:.8,spatial_relation:1
LATER+=,scene_to_json:.7,spot_diff:.6,interleaved_qa:.8,text_tools:1,video_events:.4,geometry:.6
LATER+=,matrix_puzzle:.8,gui_next_action:.9,gui_navigate:.9,gui_multi_app:.9,widget_state:.5
LATER+=,ui_ground:1,visual_tools:.4,gui_critic:.4,image_mining:.1,ocr_document:.5,chart_arith:.3
LATER+=,code_output:.4,table_read:.5,chart_read:.5,ui_to_code:.1,doc_qa:.3,ui_polish:.04
LATER+=,text:.2,code:.4,atlas:1.5

# 1. The tower, half an hour: two teachers, distillation, alignment, on drawings of 64 pixels. It did
#    not pay in accuracy at `tiny` (RESULTS.md), so it is short. Look at: OUT/vit/report.json.
[ -f "$OUT/vit/done" ] || $PYTHON train_vit.py --size=mini --out="$OUT/vit" --resume --workers=0 \
    --steps="$(steps 0.018 0.7)" --probes=256 --eval_every=0 --save_every=100
touch "$OUT/vit/done"

# 2. Level 0 of everything, nearly three hours. A model first learns how answers read, and later to
#    look at the picture; it does so sooner on easy ones. Look at: `loss` falls in steps, `held_out`
#    with it.
train first "$(steps 0.37 1.2)" --vit="$OUT/vit/align" --mix="$MIX" --curriculum=0

# 3. and 4. The same with a rate that falls from beginning to end: at the full rate the model hardly
#    learned any more. The second stage learned most in its last third, the third one nothing there.
#    Look at: `held_out` at the end of each.
train second "$(steps 0.2 1.2)" --init="$OUT/first" --mix="$MIX" "${FALLING[@]}"
train third "$(steps 0.2 1.2)" --init="$OUT/second" --mix="$LATER" --seed=1 "${FALLING[@]}"

# 5. The examination. The card with its figures lies beside the weights, where `sample.py ask` looks
#    for what a model was trained on.
examine "$OUT/third" "$OUT/third.json" 200 --card="$OUT/kept"
$PYTHON -m lab.report "$OUT/third"
exit
}
