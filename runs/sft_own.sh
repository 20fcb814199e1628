#!/usr/bin/env bash
# Fine-tune a shipped model on your own questions about pictures; ask it others before and after.
#
#   bash runs/sft_own.sh FILE.jsonl                       into out/sft_own: a minute of one core
#   bash runs/sft_own.sh FILE.jsonl out/cats TEST.jsonl   the questions of TEST are the others
#   CKPT=ckpt/gym TRAIN=lora:16 STEPS=300 LR=1e-3 bash runs/sft_own.sh FILE.jsonl
#
# A line of FILE, with paths that are relative to it; lib/own_eval.py lists the metrics:
#
#   {"images": ["cats/1.png"], "question": "What is it?", "answers": ["a cat"], "metric": "exact"}
#
# Without TEST, one picture in five is held out with all of its questions, by its name: FILE is
# written in two parts, FILE.train.jsonl and FILE.test.jsonl, which lie beside it. Conversations,
# captions, tars and folders (lib/conversations.py, lib/shards.py) train as well, if TEST is given;
# where TEST is no file of questions, only its loss is shown.
set -euo pipefail
{   # bash reads all of a block before it runs it: the file may be edited while the run goes on
[ $# -gt 0 ] || { echo "usage: bash runs/sft_own.sh FILE.jsonl [OUT [TEST.jsonl]]" >&2; exit 2; }
absolute() { case $1 in /*) echo "$1" ;; *) echo "$PWD/$1" ;; esac; }
FILE=$(absolute "$1") OUT=$(absolute "${2:-out/sft_own}") TEST=${3:+$(absolute "$3")}
CKPT=${CKPT:+$(absolute "$CKPT")}
cd "$(dirname "$0")/.."
CKPT=${CKPT:-ckpt/demo} PYTHON=${PYTHON:-.venv/bin/python}

if [ -z "$TEST" ]; then
    case $FILE in *.jsonl) ;; *) echo "$FILE is no .jsonl file: give TEST, too" >&2; exit 2 ;; esac
    $PYTHON - "$FILE" <<'END'
import json, pathlib, sys
from tasks.base import held

path, parts = pathlib.Path(sys.argv[1]), {"train": [], "test": []}
for line in path.read_text(encoding="utf-8").splitlines():
    try:
        value = json.loads(line)
        name = json.dumps(value.get("images") or value.get("image") or value)
    except (ValueError, AttributeError):    # pretrain.py counts it, and says why
        name = "damaged"
    parts["test" if held(name) else "train"].append(line)
for part, lines in parts.items():
    path.with_suffix(f".{part}.jsonl").write_text("\n".join(lines) + "\n", encoding="utf-8")
    print(f"{len(lines)} lines in {path.with_suffix(f'.{part}.jsonl')}")
END
    TEST=${FILE%.*}.test.jsonl FILE=${FILE%.*}.train.jsonl
fi

# examine NAME CHECKPOINT: the answers to TEST, and those to grey pictures, into OUT/NAME/eval.json.
examine() {
    if grep -qs '"question"' "$TEST"; then
        echo "$1:"
        $PYTHON sample.py eval --ckpt="$2" --data="$TEST" --max_new=64 --out="$OUT/$1/eval.json"
    fi
}

examine before "$CKPT"

# The rate and the number of steps suit the smallest model and some dozens of pictures; it forgets
# what it was shipped for. Where `held_out`, the loss of TEST, rises again, STEPS are too many. A
# larger model wants a lower rate, and TRAIN=lora:16 if it shall keep what it knows.
$PYTHON pretrain.py --init="$CKPT" --data="$FILE" --val="$TEST" --steps="${STEPS:-60}" --rows=1 \
    --lr="${LR:-3e-3}" --warmup=5 --train="${TRAIN:-all}" --mtp=0 --workers=0 --log_every=10 \
    --eval_every=10 --out="$OUT/sft"

examine after "$OUT/sft"
$PYTHON -m lab.report "$OUT/after"
exit
}
