# What runs/one_gpu.sh and runs/nodes.sh share: real data, teachers, and the sum of a plan.
#
# Both recipes need nothing but the gym, which draws its tasks, and they train on real data as well
# if these variables name some:
#
#   DATA      conversations, text and code for pretraining: files, globs or folders with commas
#             between them, and after a colon how often each is chosen      pretrain.py --data
#   SFT_DATA  the same for fine-tuning; default: DATA                       pretrain.py --data
#   PAIRS     pictures with captions for the tower: a file, glob or folder  train_vit.py --pairs
#   SEMANTIC  folder of SigLIP2, the tower's teacher for meaning            --semantic_teacher
#   TEXTURE   folder of DINOv3 or DINOv2, the one for texture               --texture_teacher
#
# RL plays in the gym alone: it needs verifiers, and a data set has none.
#
# Public data in the form in which Hugging Face's hub holds them, with the sizes and licences that
# stored copies of their cards stated: look again before you fetch. No run of ours has used them. A
# collection's licence does not replace those of its parts.
#
#   HuggingFaceM4/FineVision      185 sets of questions about pictures: 24M samples, 5 TB, a folder
#                                 each. Every set has its own licence. parquet, columns `images` and
#                                 `texts`. DATA, SFT_DATA
#   its folder aguvis-stage-1     screens and where to click: 459,000 samples, 228 GB. Look at how
#                                 it writes places: smolagents' version as shares of 1, the gym as
#                                 numbers up to 999
#   lmms-lab/LLaVA-OneVision-Data  instructions in English and Chinese: several million samples.
#                                 Apache-2.0. parquet, columns `image` and `conversations`.
#                                 DATA, SFT_DATA
#   HuggingFaceFW/fineweb-edu     web pages worth learning from; its folder sample/10BT: 10 billion
#                                 tokens, about 29 GB. ODC-By. parquet, column `text`. DATA
#   bigcode/starcoderdata         code in 86 languages: 250 billion tokens, 783 GB, a folder each.
#                                 Each file's own licence, and terms that you accept on the hub.
#                                 parquet, column `content`. DATA
#   pixparse/cc12m-wds            pictures of the web and their alt texts: 11.0M pairs in 2,176 tars
#                                 of 0.5 GB. Conceptual 12M's own licence. webdataset. PAIRS
#   UCSC-VLAA/Recap-DataComp-1B   1.24 billion links with long captions by a model: 433 GB.
#                                 CC-BY-4.0 for links and captions, not for pictures. parquet; the
#                                 package img2dataset fetches the pictures into tars. PAIRS
#   google/siglip2-so400m-patch14-384        4.5 GB. Apache-2.0. SEMANTIC
#   facebook/dinov3-vitl16-pretrain-lvd1689m Meta's DINOv3 licence, accepted on the hub. TEXTURE
#   facebook/dinov2-large         Apache-2.0. TEXTURE
#
# The hub's own program fetches them (`pip install huggingface_hub`). A few parts are enough for one
# GPU: half an hour at `small` reads 0.4 billion tokens.
#
#   for part in chartqa textvqa ocrvqa aguvis-stage-1; do
#       hf download HuggingFaceM4/FineVision --repo-type dataset --include "$part/*" \
#           --local-dir data/finevision
#   done
#   hf download HuggingFaceFW/fineweb-edu --repo-type dataset --include "sample/10BT/*" \
#       --local-dir data/fineweb
#   hf download bigcode/starcoderdata --repo-type dataset --include "python/*" \
#       --local-dir data/code
#   hf download pixparse/cc12m-wds --repo-type dataset --include "cc12m-train-00*.tar" \
#       --local-dir data/cc12m
#   hf download google/siglip2-so400m-patch14-384 --local-dir data/siglip2
#   hf download facebook/dinov2-large --local-dir data/dinov2
#
# Then, in the shell that starts a recipe:
#
#   export DATA='data/finevision/*/*.parquet:10,data/fineweb/sample/10BT/*.parquet:3'
#   export DATA+=',data/code/python/*.parquet:2' SFT_DATA='data/finevision/*/*.parquet:10'
#   export PAIRS='data/cc12m/*.tar' SEMANTIC=data/siglip2 TEXTURE=data/dinov2
#
# Parquet needs pyarrow (requirements-peers.txt). An index of each file is made when it is first
# read, beside it. What can't be used is skipped, counted and named in the log.

PLAN=
if [ "${1:-}" = --plan ]; then PLAN=1; shift; fi
PYTHON=${PYTHON:-.venv/bin/python} CATEGORIES=${CATEGORIES:-gym}
DATA=${DATA:-} SFT_DATA=${SFT_DATA:-$DATA} PAIRS=${PAIRS:-}
SEMANTIC=${SEMANTIC:-} TEXTURE=${TEXTURE:-}

# What is drawn. Beside real data, whose weights above add up to 15, the gym is a quarter of the
# samples: clicks, tools and tasks of several turns come from it, and RL plays in it. Plain text and
# code then come from DATA. The weights are our choice; no run has tested them.
MIX=gym:16,atlas:1,text:1,code:1
[ -z "$DATA" ] || MIX=gym:5

# total: passes a plan on, and adds up its stages.
total() {
    awk '{ print } /^time/ { hours += $2 } /^price/ { gsub(/[$,]/, ""); price += $2 }
        END { printf "\nin all      %.2f h, $%.2f (computed)\n", hours, price }'
}
