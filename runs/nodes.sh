#!/usr/bin/env bash
#SBATCH --job-name=nanoglmv
#SBATCH --nodes=2
#SBATCH --ntasks-per-node=1      # one torchrun a node, which starts one process a GPU
#SBATCH --gpus-per-node=8
#SBATCH --cpus-per-task=96       # 12 a GPU: pictures are drawn on them
#SBATCH --time=08:00:00
#SBATCH --output=%x-%j.txt
#
# A model of size `base` (GLM-OCR's own, 1.1B parameters) on several nodes of eight GPUs, by SLURM.
#
#   bash runs/nodes.sh --plan           what each stage would take on 2 x 8 H100, then stop: needs
#                                       neither SLURM nor a GPU
#   sbatch runs/nodes.sh                two nodes, into out/nodes, a folder that all nodes see
#   sbatch --nodes=4 runs/nodes.sh out/four             four nodes: the batch is twice as large
#   sbatch --dependency=singleton runs/nodes.sh         one more job, which continues the first one
#
# Real data beside the gym: set DATA, PAIRS, SEMANTIC and TEXTURE as runs/data.sh says; sbatch hands
# the environment on.
#
# No cluster has run it yet; the tests run it at `tiny`, two agents of torchrun on one machine. What
# it takes on 16 H100 at $2.50 a GPU-hour, computed (--plan) and never measured:
#
#   the tower    2 x 5,000 steps    16.6 billion patches    2.8 h   $113    distill and align
#   pretraining     20,000 steps    21.0 billion tokens     5.9 h   $236
#   SFT              5,000 steps     5.2 billion tokens     1.6 h    $62
#   RL                 400 steps     0.2 billion tokens     0.4 h    $16    half of the ranks play
#
# Stand-ins for the tower's teachers would be 1.4 h more. Each rank draws or loads its share of the
# samples (lib/partition.py): in pretraining GPUs wait for none that takes ten processes a GPU less
# than 45 ms each.
#
# The number of steps is fixed (STEPS), since the learning rate falls with it, and a job may end
# before: each stage gets what is left of the hours as --max_hours, saves its last step in time and
# says so. The next job of the same folder continues there. A rank that dies ends the others, and
# torchrun starts all again from the newest checkpoint, three times at most.
set -euo pipefail
{   # bash reads all of a block before it runs it: the file may be edited while the run goes on
[ -z "${SLURM_SUBMIT_DIR:-}" ] || cd "$SLURM_SUBMIT_DIR"    # sbatch runs a copy of this file
[ -f pretrain.py ] || cd "$(dirname "$0")/.."
source runs/data.sh     # --plan, DATA, PAIRS, the teachers
OUT=${1:-out/nodes} SIZE=${SIZE:-base} ON=${ON:-H100} HOURS=${HOURS:-7.5} STEPS=${STEPS:-20000}
NODES=${SLURM_NNODES:-2} GPUS=${GPUS:-8} WORKERS=${WORKERS:-10} PORT=${PORT:-29500}
RANKS=$((NODES * GPUS))

# How many ranks play in RL, the last ones; the others train. A rollout takes a forward for each of
# its tokens, an update a forward and a backward for all of them at once: playing takes longer, and
# half of the ranks is where to start. Then look at the log: if the trainers wait (`waited` beside
# `learning`), let more ranks play, if the players do (`idle`), fewer. With whole nodes on either
# side, a step's weights cross the network once a node that plays.
PLAYERS=${PLAYERS:-$((RANKS / 2))}

# Learning rates, from those of `tiny` by the rule in runs/one_gpu.sh: 1 / sqrt(width), and sqrt(N)
# for a batch N times that of one GPU. base is 1,536 wide; on one GPU its batch has 65,536 tokens.
# On 16 GPUs that makes 4e-3 for pretraining, and nanochat's rule 3.6e-3. With more GPUs it stays
# there: no larger rate has been tried at any size.
case $SIZE in
    tiny) WIDTH=96 TOKENS=512 IMAGES=8 MICRO=4 PROBES=32 PROMPTS=1 SLOTS=16 REPLY=8 ;;
    base) WIDTH=1536 TOKENS=16384 IMAGES=256 MICRO=32 PROBES=1024 PROMPTS=16 SLOTS=128 REPLY=128 ;;
    *) echo "SIZE is base, or tiny to try it out, not $SIZE" >&2; exit 2 ;;
esac
ROWS=$([ "$SIZE" = tiny ] && echo 1 || echo 4)      # a rank
N=$((RANKS < 16 ? RANKS : 16))
rate() { awk "BEGIN { printf \"%.2g\", $1 * sqrt(96 / $WIDTH) * sqrt($N) }"; }

# launch SCRIPT OPTIONS: torchrun on each node, a rank on each GPU. They meet at the first node.
launch() {
    srun --kill-on-bad-exit=1 "$PYTHON" -m torch.distributed.run --nnodes="$NODES" \
        --nproc_per_node="$GPUS" --rdzv_backend=c10d --rdzv_endpoint="$HEAD:$PORT" \
        --rdzv_id="${SLURM_JOB_ID:-1}" --max-restarts=3 "$@"
}

# stage NAME STEPS FROM SCRIPT OPTIONS: one run of a script, unless it is done. FROM: the option
# with the weights to start from, which a plan does not need.
stage() {
    local name=$1 steps=$2 from=$3 script=$4
    local run=("$script" --steps="$steps" --workers="$WORKERS" "${@:5}")
    if [ "$PLAN" ] || [ "$script" != rl.py ]; then run+=(--size="$SIZE"); fi
    if [ "$PLAN" ]; then
        printf '\n%s: %s steps\n' "$name" "$steps"
        "$PYTHON" "${run[@]}" --plan --on="${RANKS}x$ON"
        return
    fi
    [ -f "$OUT/$name/done" ] && return
    launch "${run[@]}" ${from:+"$from"} --out="$OUT/$name" --resume \
        --max_hours="$(awk "BEGIN { h = $HOURS - $SECONDS / 3600; print (h > 0.0001 ? h : 0.0001) }")"
    if [ ! -d "$OUT/$name/$(printf "${LAST:-}step_%06d" "$steps")" ]; then
        echo "$name is not done: start the next job with the same folder and STEPS"
        exit
    fi
    touch "$OUT/$name/done"
}

# share PART: so many of STEPS, at least one.
share() { awk "BEGIN { n = int($1 * $STEPS); print n < 1 ? 1 : n }"; }

recipe() {
# 1. The tower: teachers, distillation, alignment. Of this size SigLIP2 and DINOv3 (SEMANTIC,
#    TEXTURE) are the teachers; stand-ins of the student's own size are a waste, and so are drawn
#    captions. The contrastive batch is that of all ranks; the texts travel round the ring
#    (lib/ring.py). Look at: OUT/vit/report.json.
LAST=align/ stage vit "$(share 0.25)" "" train_vit.py --batch=$((RANKS * IMAGES)) --micro=$MICRO \
    --lr="$(rate 4e-3)" ${SEMANTIC:+--semantic_teacher="$SEMANTIC"} \
    ${TEXTURE:+--texture_teacher="$TEXTURE"} ${PAIRS:+--pairs="$PAIRS"} --probes=$PROBES \
    --eval_every=0

# 2. Pretraining: 65,536 tokens a GPU and step, a million on 16 of them. Look at: `mfu`, `loading`.
local rows=(--rows=$((RANKS * ROWS)) --row_tokens=$TOKENS --mix=$MIX --levels=3)
stage pretrain "$STEPS" --vit="$OUT/vit/align" pretrain.py "${rows[@]}" ${DATA:+--data="$DATA"} \
    --own_question --lr="$(rate 4e-3)" --save_every=1000

# 3. Supervised fine-tuning. Look at: `mtp1`, `held_out`.
stage sft "$(share 0.25)" --init="$OUT/pretrain" pretrain.py "${rows[@]}" \
    ${SFT_DATA:+--data="$SFT_DATA"} --curriculum=0 --think=0.5 --mtp_share=1 \
    --lr="$(rate 1.5e-3)" --save_every=1000

# 4. RL: 16 tasks a rank and step, played 8 times each, samples at most two steps old. Look at:
#    `reward`, `stale`, and `waited` and `idle` for PLAYERS.
stage rl "$(share 0.02)" --init="$OUT/sft" rl.py --mix="$CATEGORIES" --levels=3 --group=8 \
    --prompts=$((RANKS * PROMPTS)) --row_tokens=$TOKENS --rollout_ranks="$PLAYERS" --slots=$SLOTS \
    --max_staleness=2 --max_new=$REPLY --context=4096 --lr="$(rate 8e-4)" --eval_every=0
}

if [ "$PLAN" ]; then
    echo "Size $SIZE on $RANKS $ON, STEPS=$STEPS. Every figure is computed by a model of the"
    echo "machine; only the time that drawing takes is measured, on this CPU."
    recipe | total
    exit
fi
mkdir -p "$OUT"
HEAD=${HEAD:-$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)}
recipe

# 5. The examination, on one GPU of the first node: `sample.py eval` is one process.
[ -f "$OUT/rl.json" ] || "$PYTHON" sample.py eval --ckpt="$OUT/rl" --mix="$CATEGORIES" --levels=3 \
    --slots=256 --count="${COUNT:-100}" --out="$OUT/rl.json"
"$PYTHON" -m lab.report "$OUT/rl"
exit
}
