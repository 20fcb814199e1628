"""Using a model: ask it about pictures, or measure it on the gym.

    python sample.py ask --image=photo.png "What color is the circle?"
    python sample.py ask --image=a.png --image=b.jpg "Which one is red?" --temperature=0.7
    python sample.py ask --image=photo.png "Read the text." --drafts=3      speculative decoding
    python sample.py eval --count=300                    held-out tasks of what it was trained on
    python sample.py eval --ckpt=out/pretrain --mix=point,gui_click --levels=3

Without --ckpt the demo's checkpoint in ckpt/ answers: 1.0M parameters trained for minutes on
64-pixel drawings of shapes, characters and buttons. It knows nothing else.
"""
import lib  # first of all, before torch: see lib/__init__.py

import json
import math
import sys
import time
from dataclasses import dataclass, field

from tqdm import tqdm

import gym
from data import document, parse_mix, sight
from engine import Engine, Request
from lib.checkpoint import load_model
from lib.cli import cli, main, UserError
from lib.common import find_checkpoint, ROOT, setup, write_json
from lib.images import open_image
from lib.rollout import Episode, Policy, rollout
from tasks.base import Message, Task
from tokenizer import Tokenizer

DEMO = ROOT / "ckpt" / "demo"


def load(ckpt: str, device: str, dtype: str):
    """The model of a checkpoint (default: the demo's) with its tokenizer."""
    hw = setup(device, dtype)
    folder = find_checkpoint(ckpt or DEMO)
    model = load_model(folder, hw.device, hw.dtype)
    if not model.config.n_ranks:
        raise UserError(f"{folder} comes with another tokenizer than ours: its weights load, but "
                        "it can't be asked here")
    return model, Tokenizer(model.config.n_ranks), hw


# ---- ask --------------------------------------------------------------------------------------

@dataclass
class Ask:
    question: str = ""            # what to ask; also as a bare word on the command line
    image: list[str] = field(default_factory=list)  # a picture file; may be given several times
    ckpt: str = ""                # checkpoint or run folder; default: the demo's
    max_new: int = 128            # tokens at most in the answer
    temperature: float = 0.0      # 0 takes the most likely token each time
    top_p: float = 1.0            # keep the most likely tokens up to this probability
    seed: int = 0                 # of the drawing, where temperature is above 0
    drafts: int = 0               # tokens that the MTP head guesses ahead; same answer in float32
    device: str = "auto"          # auto, cpu, cuda or mps
    dtype: str = "auto"           # auto, float32 or bfloat16


def ask(args: Ask):
    if args.drafts < 0:
        raise UserError(f"--drafts takes 0 or more, not {args.drafts}")
    if not args.question.strip():
        raise UserError('nothing asked: python sample.py ask --image=FILE "question"')
    images = tuple(open_image(path) for path in args.image)
    model, tokens, hw = load(args.ckpt, args.device, args.dtype)
    message = Message("user", "<|image|>" * len(images) + args.question, images)
    prompt = document([message], tokens, model.config, answer=True)
    for path, seen in zip(args.image, prompt.images):
        print(f"{path} is seen at {seen.shape[1]}x{seen.shape[0]} pixels", file=sys.stderr)
    limit = model.config.text.max_position_embeddings
    context = min(limit, len(prompt.ids) + args.max_new + 1)
    engine = Engine(model, 1, context, args.drafts, say=lambda line: print(line, file=sys.stderr))
    engine.submit(Request(prompt, args.max_new, args.temperature, args.top_p, args.seed))
    results = []
    while engine.busy:
        results += engine.step()
    print(readable(tokens.decode(results[0].ids)))
    if engine.drafts:
        print(f"{engine.tokens / max(1, engine.steps):.2f} tokens a step", file=sys.stderr)


def readable(reply: str) -> str:
    """A reply without the marks that only machines need."""
    for mark in ("<|begin_of_box|>", "<|end_of_box|>", "<|user|>", "<|observation|>",
                 "<|endoftext|>"):
        reply = reply.replace(mark, "")
    return reply.strip()


# ---- eval -------------------------------------------------------------------------------------

@dataclass
class Eval:
    ckpt: str = ""                # checkpoint or run folder; default: the demo's
    mix: str = ""                 # categories; default: those in the checkpoint's report, or gym
    levels: int = 1               # tasks come from levels 0..levels-1, in turn
    count: int = 200              # tasks a category
    split: str = "test"           # test: held-out seeds and factors; train: as in training
    seed: int = 1_000_000         # first task seed
    slots: int = 64               # conversations generated side by side
    out: str = "out/eval.json"    # where the figures go
    device: str = "auto"          # auto, cpu, cuda or mps
    dtype: str = "auto"           # auto, float32 or bfloat16


def play(model, tokens, tasks, slots: int = 64, context: int = 512, blank: bool = False,
         bar=None) -> list[Episode]:
    """Let the model do `tasks`, greedily, all of them side by side; in the order given.

    blank: every picture is replaced by plain grey of the same size.
    """
    engine = Engine(model, slots, context)
    engine.stops.add(tokens.image)          # there are no pixels for it
    policy = Policy(tokens, model.config, context, 48, temperature=0.0, blank=blank)
    orders = [Episode(task, i, 0) for i, task in enumerate(tasks)]
    return rollout(engine, orders, policy, gym.Rewards(), bar)


def interval(share: float, n: int) -> tuple[float, float]:
    """Wilson's 95% interval of a share seen in n trials."""
    z = 1.96
    middle = (share + z * z / (2 * n)) / (1 + z * z / n)
    half = z / (1 + z * z / n) * math.sqrt(share * (1 - share) / n + z * z / (4 * n * n))
    return max(0.0, middle - half), min(1.0, middle + half)


def evaluate(model, tokens, mix="gym", levels=2, count=200, split="test", seed=1_000_000,
             slots=64) -> dict:
    """{category: accuracy, low, high (95%), blank, chance, reward, errors, n}.

    Accuracy is the share of full rewards. `blank`: the same model and tasks, the picture grey.
    """
    names = [name for name, _ in parse_mix(mix, sight(model.config))]
    if not names:
        raise UserError("--mix names no category")
    unknown = [name for name in names if name not in gym.names()]
    if unknown:
        raise UserError(f"there is no category '{unknown[0]}'; `python gym.py list` shows them")
    table = {}
    bar = tqdm(total=2 * count * len(names), desc="eval", disable=not sys.stderr.isatty())
    for name in names:
        tasks = [Task(name, seed + i, i % levels, split) for i in range(count)]
        bar.set_postfix_str(name)
        seen, unseen = (play(model, tokens, tasks, slots, blank=blank, bar=bar)
                        for blank in (False, True))
        valid = [p for p in seen if p.score.error is None]
        right = sum(p.score.reward > 0.999 for p in valid) / max(1, len(valid))
        low, high = interval(right, max(1, len(valid)))
        chance = sum(type(gym.make(t)).chance(t.level) for t in tasks) / count
        table[name] = {
            "accuracy": right, "low": low, "high": high,
            "blank": sum(p.score.reward > 0.999 for p in unseen) / count, "chance": chance,
            "reward": sum(p.score.reward for p in valid) / max(1, len(valid)),
            "errors": len(seen) - len(valid), "n": count}
    bar.close()
    return table


def show(table: dict):
    print(f"{'category':<17}{'accuracy':>9}  {'95% interval':<14}{'blank':>6}{'chance':>8}{'n':>6}")
    for name, row in table.items():
        print(f"{name:<17}{row['accuracy']:>9.1%}  {row['low']:>5.1%}-{row['high']:<7.1%}"
              f"{row['blank']:>7.1%}{row['chance']:>8.1%}{row['n']:>6}"
              + (f"  {row['errors']} not counted: errors" if row["errors"] else ""))
    mean = sum(row["accuracy"] for row in table.values()) / len(table)
    print(f"{'mean':<17}{mean:>9.1%}")


def evaluation(args: Eval):
    if min(args.count, args.slots) < 1 or not 1 <= args.levels <= 5 or args.seed < 0:
        raise UserError("--count and --slots take 1 or more, --levels 1 to 5, --seed 0 or more")
    model, tokens, hw = load(args.ckpt, args.device, args.dtype)
    print(hw.description)
    own = find_checkpoint(args.ckpt or DEMO) / "report.json"
    trained = json.loads(own.read_text())["table"] if own.exists() else ["gym"]
    began = time.time()
    table = evaluate(model, tokens, args.mix or ",".join(trained), args.levels, args.count,
                     args.split, args.seed, args.slots)
    show(table)
    write_json(args.out, {"ckpt": args.ckpt or "ckpt/demo", "split": args.split,
                          "levels": args.levels, "seed": args.seed, "table": table})
    print(f"{time.time() - began:.0f} s; figures in {args.out}")


def entry():
    verbs = {"ask": (Ask, ask, "question"), "eval": (Eval, evaluation, None)}
    words = sys.argv[1:]
    if not words or words[0] not in verbs:
        if words and words[0] not in ("--help", "-h"):
            raise UserError(f"'{words[0]}' is not one of {', '.join(verbs)}")
        print(__doc__ + "\nVerbs: ask, eval; `python sample.py VERB --help` lists its options.")
        return
    config, act, positional = verbs[words[0]]
    act(cli(config, words[1:], __doc__, positional))


if __name__ == "__main__":
    main(entry)
