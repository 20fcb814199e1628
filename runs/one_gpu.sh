#!/usr/bin/env bash
# A model of size `small` (65M parameters) for all categories of the gym, on one rented GPU.
#
#   bash runs/one_gpu.sh --plan             what each stage would take on an H100, then stop: needs
#   ON=A100 bash runs/one_gpu.sh --plan     no GPU
#   bash runs/one_gpu.sh                    half an hour, into out/one_gpu
#   HOURS=3 bash runs/one_gpu.sh out/long   three hours: twice the batch and one more level
#   DATA='data/*.jsonl:15' bash runs/one_gpu.sh    real data beside the gym: see runs/data.sh
#   HOURS=0.001 SIZE=tiny bash runs/one_gpu.sh out/try     a step of each stage, on any machine
#
# No GPU has run it yet. So it does not rely on any figure of a GPU: before each stage a short trial
# run measures its seconds a step, and the stage takes as many steps as fit into its share of the
# hours. Only --plan uses figures of a GPU, which are computed (lib/roofline.py). For half an hour
# on an H100 at $2.50 an hour they are, without the time of drawing and of the examinations:
#
#   the tower      4 x 720 steps    0.24 billion patches    0.06 h   $0.14
#   pretraining     12,900 steps    0.42 billion tokens     0.22 h   $0.56
#   SFT              5,000 steps    0.16 billion tokens     0.10 h   $0.25
#   RL                 415 steps    0.03 billion tokens     0.07 h   $0.18
#
# Interrupted, even by SIGKILL? Start it again with the same HOURS and folder. A stage that is done
# is skipped, the others continue from their newest checkpoint.
#
# While it runs: `tail -f out/one_gpu/pretrain/log.jsonl`, and `python -m lab.report
# out/one_gpu/pretrain` writes a page with the curves. `mfu` far below the plan's, or `loading` in
# the lines, means that the GPU waits for pictures: they are drawn on the CPU, 8 cores or more help.
set -euo pipefail
{   # bash reads all of a block before it runs it: the file may be edited while the run goes on
cd "$(dirname "$0")/.."
source runs/data.sh     # --plan, DATA, PAIRS, the teachers
OUT=${1:-out/one_gpu} HOURS=${HOURS:-0.5} SIZE=${SIZE:-small} ON=${ON:-H100} TRIAL=${TRIAL:-40}
# Processes that draw: as many as there are cores. An H100 is often rented with about 26 of them.
WORKERS=${WORKERS:-$([ "$PLAN" ] && echo 24 || nproc)}

# From size to size. The learning rates are those that were found at `tiny`, which is 96 wide.
#
#   Width   Muon's updates have entries of the same RMS whatever the shape of a matrix, those of
#           AdamW [Moonlight, arXiv 2502.16982], so one rate serves both. Their largest singular
#           value then grows with sqrt(width). So that an update changes a layer's output as much in
#           a wide model as in a narrow one, the rate falls with 1 / sqrt(width) [the spectral
#           condition, arXiv 2310.17813].
#   Batch   Larger sizes and longer runs have larger batches, the defaults of pretrain.py --rows;
#           between those the rate stays. In a batch N times as large as the default of its size the
#           noise of the gradient is 1 / sqrt(N), and the rate sqrt(N) times as large
#           [arXiv 2205.10782; nanochat does so].
#
# The two together are our choice; no run of `small` has tested them. nanochat's rates, in these
# units 0.1 / sqrt(width) x sqrt(tokens a step / 2^19) for a square matrix, are 0.65 times ours at
# the default batch of `small` and 0.9 times at that of `base`.
case $SIZE in
    tiny) WIDTH=96 ROWS=2 TOKENS=2048 IMAGES=64 PROBES=64 PROMPTS=4 SLOTS=32 REPLY=32 ;;
    small) WIDTH=512 ROWS=2 TOKENS=16384 IMAGES=256 PROBES=512 PROMPTS=32 SLOTS=256 REPLY=128 ;;
    *) echo "SIZE is tiny or small, not $SIZE; for base see runs/nodes.sh" >&2; exit 2 ;;
esac
# Two budgets. From two hours on the batch is twice as large: with six times as many steps the noise
# of the gradient limits the model, and no longer their number. Level 2 joins, as in runs/night.sh.
if awk "BEGIN { exit !($HOURS >= 2) }"; then N=2 LEVELS=3; else N=1 LEVELS=2; fi
scaled() { awk "BEGIN { print $1 * $N }"; }
rate() { awk "BEGIN { printf \"%.2g\", $1 * sqrt(96 / $WIDTH) * sqrt($N) }"; }

# fit SHARE SECONDS: how many steps of so many seconds fit into a share of the hours, at least one.
fit() { awk "BEGIN { n = int($1 * $HOURS * 3600 / $2); print n < 1 ? 1 : n }"; }

# seconds FOLDER: seconds a step of the run in it, by the second half of its steps: during the first
# ones kernels are compiled and caches filled. The four stages of train_vit.py are added.
seconds() {
    $PYTHON - "$1" <<'END'
import json, pathlib, sys
total = 0
for log in pathlib.Path(sys.argv[1]).rglob("log.jsonl"):
    times = [json.loads(line)["dt"] for line in log.open()]
    times = times[len(times) // 2:]
    total += sum(times) / len(times)
print(total)
END
}

# stage NAME SHARE COMPUTED TRIAL FROM SCRIPT OPTIONS: one run of a script, unless it is done. SHARE
# of the hours; COMPUTED: seconds a step on an H100, for --plan; TRIAL: steps of the trial run;
# FROM: the option with the weights to start from, which a plan does not need.
stage() {
    local name=$1 share=$2 computed=$3 trial=$4 from=$5 script=$6
    local run=("$PYTHON" "$script" "${@:7}")
    # rl.py has the size of the weights that it starts from; a plan is without these.
    if [ "$PLAN" ] || [ "$script" != rl.py ]; then run+=(--size="$SIZE"); fi
    if [ "$PLAN" ]; then
        computed=$(fit "$share" "$computed")
        printf '\n%s: %s steps\n' "$name" "$computed"
        "${run[@]}" --steps="$computed" --plan --on="$ON"
        return
    fi
    [ -f "$OUT/$name/done" ] && return
    run+=(${from:+"$from"})
    if [ ! -f "$OUT/$name.steps" ]; then
        echo "$name: a trial of $trial steps"
        rm -rf "$OUT/trial"
        "${run[@]}" --steps="$trial" --out="$OUT/trial" --save_every=1000000
        fit "$share" "$(seconds "$OUT/trial")" > "$OUT/steps.part"
        mv "$OUT/steps.part" "$OUT/$name.steps"
        rm -rf "$OUT/trial"
    fi
    echo "$name: $(cat "$OUT/$name.steps") steps"
    "${run[@]}" --steps="$(cat "$OUT/$name.steps")" --out="$OUT/$name" --resume
    touch "$OUT/$name/done"
}

# examine RUN: held-out tasks of every category (or those in CATEGORIES), with their pictures and
# with grey ones, into OUT/RUN.json; 20 tasks a category in half an hour.
examine() {
    if [ "$PLAN" ]; then
        printf '\nexamination of %s: no model of its time; 4%% of the hours are left for it\n' "$1"
        return
    fi
    [ -f "$OUT/$1.json" ] && return
    local count
    count=$(awk "BEGIN { n = int(40 * $HOURS); print n < 2 ? 2 : n }")
    $PYTHON sample.py eval --ckpt="$OUT/$1" --mix="$CATEGORIES" --levels=$LEVELS --slots=$SLOTS \
        --count="$count" --out="$OUT/$1.json"
}

recipe() {
# 1. The tower, 12% of the hours: two teachers, distillation, alignment with captions. SEMANTIC and
#    TEXTURE name SigLIP2's and DINOv3's folders, which are better teachers than the stand-ins that
#    are trained otherwise. 256 pictures of 224 pixels are 65,536 patches a step. Look at:
#    OUT/vit/report.json, whether the student of both teachers is better than each of them.
stage vit 0.12 "$(scaled 0.3)" "$TRIAL" "" train_vit.py --batch=$((N * IMAGES)) \
    --lr="$(rate 4e-3)" --workers="$WORKERS" --probes=$PROBES --eval_every=0 \
    ${SEMANTIC:+--semantic_teacher="$SEMANTIC"} ${TEXTURE:+--texture_teacher="$TEXTURE"} \
    ${PAIRS:+--pairs="$PAIRS"}

# 2. Pretraining, 45%: conversations about pictures of all categories, and some text; the first
#    fifth of the steps at level 0, where the model learns to look at the picture. The MTP head
#    joins in the last fifth. Look at: `loss` falls in steps, one an ability; `held_out` with it.
local rows=(--rows=$((N * ROWS)) --row_tokens=$TOKENS --mix=$MIX --levels=$LEVELS)
stage pretrain 0.45 "$(scaled 0.063)" "$TRIAL" --vit="$OUT/vit/align" \
    pretrain.py "${rows[@]}" ${DATA:+--data="$DATA"} --own_question --lr="$(rate 4e-3)" \
    --workers="$WORKERS" --save_every=2000

# 3. Supervised fine-tuning, 20%: half of the replies begin with the oracle's reasons, where it
#    states any. The rate is 3/8 of the first one, so that the model keeps what it knows. Look at:
#    `mtp1` below 1; OUT/sft.json: which categories are above `blank`, that with grey pictures?
stage sft 0.2 "$(scaled 0.072)" "$TRIAL" --init="$OUT/pretrain" \
    pretrain.py "${rows[@]}" ${SFT_DATA:+--data="$SFT_DATA"} --curriculum=0 --think=0.5 \
    --mtp_share=1 --lr="$(rate 1.5e-3)" --workers="$WORKERS" --save_every=2000
examine sft

# 4. RL on all categories, 15%: 32 tasks a step, each played 8 times. One GPU plays and learns in
#    turn. With --max_staleness=1 samples are one step old at most, and environments and verifiers,
#    which run on the CPU, delay neither. The rate is a fifth of pretraining's. Look at: `reward`;
#    is OUT/rl.json above OUT/sft.json? A short run teaches little that is new: afterwards the model
#    does reliably what it did sometimes.
stage rl 0.15 "$(scaled 0.65)" $((TRIAL / 8 + 1)) --init="$OUT/sft" rl.py --mix="$CATEGORIES" \
    --levels=$LEVELS --prompts=$((N * PROMPTS)) --group=8 --row_tokens=$TOKENS --max_new=$REPLY \
    --context=4096 --max_staleness=1 --slots=$SLOTS --workers=8 --lr="$(rate 8e-4)" --eval_every=0

# 5. The examination once more, 4%.
examine rl
}

if [ "$PLAN" ]; then
    echo "$HOURS h of size $SIZE on one $ON. Every figure is computed by a model of the machine;"
    echo "only the time that drawing takes (loading) is measured, on this CPU. Where it is longer"
    echo "than that of the GPU, the run itself, which measures both, takes fewer steps."
    recipe | total
    exit
fi
mkdir -p "$OUT"
recipe
$PYTHON -m lab.report "$OUT/rl"
exit
}
