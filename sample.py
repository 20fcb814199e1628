"""Using a model: ask it, chat with it, or evaluate it on the gym or on questions of your own.

    python sample.py ask                                 lists the questions that it was trained on
    python sample.py ask --ckpt=ckpt/demo --image=docs/example.png "What color is the diamond?"
    python sample.py ask --image=docs/example.png "List all." --temperature=0.7
    python sample.py ask --ckpt=ckpt/demo --image=docs/example.png "List all." --drafts=3
                                                         speculative decoding
    python sample.py ask --ckpt=FOLDER --image=page.png "Text Recognition:" --max_new=2048
                                                         GLM-OCR's folder, as it is released
    echo "List all." | python sample.py ask --image=docs/example.png -      a question from a pipe
    python sample.py ask --image=- "List all." --json < docs/example.png    a picture; JSON out
    python sample.py ask --image=docs/example.png "Point at the diamond." --form=point
    python sample.py chat                                a conversation; /help lists its commands
    python sample.py agent                               an episode: terminal, GIF and PNG
    python sample.py agent --screenshot=FILE --goal="Click OK."     one action on your picture
    python sample.py eval --count=300                    held-out tasks of what it was trained on
    python sample.py eval --ckpt=out/pretrain --mix=point,gui_click --levels=3
    python sample.py eval --mix=gym --levels=5 --passes=8          all categories and levels; pass@8
    python sample.py eval --ckpt=ckpt/demo --ckpt=out/pretrain --mix=point    compared, paired
    python sample.py eval --ckpt=ckpt/demo --harness=plain,history,tools,verify
                                                         ways to ask an agent: lib/harness.py
    python sample.py eval --data=FILE.jsonl              your own questions: see lib/own_eval.py

Without --ckpt the model in ckpt/gym is used: 3.3M parameters, trained on all 36 categories of the
gym, see ckpt/gym/README.md. It knows what the gym draws and the wordings that `ask` lists, and
nothing else: to a photo or a question in other words it gives some answer, which means nothing.
--ckpt=ckpt/demo is the demo's: 1.0M parameters, six categories at level 0.
"""
import lib  # first of all, before torch: see lib/__init__.py

import json
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path
from textwrap import indent
from typing import Annotated, Literal

import gym
from engine import Engine
from lib.card import list_questions, seen, trained_on, write_card
from lib.checkpoint import load_model
from lib.cli import (Count, Device, Drafts, Dtype, main, Natural, NonNegative, Positive, Range,
                     run_verb, Seed, Share, UserError)
from lib.common import ROOT, setup, write_json
from lib.conversations import call_text
from lib.evaluation import comparison, evaluate, known_tasks, show, show_summary
from lib.film import film, save_film, storyboard, Verdict, with_point
from lib.forms import named_form
from lib.harness import evaluate_harnesses, read_harnesses
from lib.images import any_image, open_image, Picture, resize
from lib.own_eval import evaluate_file, show_figures
from lib.records import decode
from lib.runs import find_checkpoint
from lib.summary import not_played, summary
from lib.terminal import (CONTROL, Conversation, introduction, note, note_end, note_unlike,
                          read_all, Screen, talk)
from lib.turns import engine_for, play, ReplySettings, Turn
from lib.watch import Watched
from tasks.actions import ACTIONS
from tasks.base import IMAGE, Message, recap
from tasks.verify import parse_action
from tokenizer import tokenizer_of

SHIPPED = ROOT / "ckpt" / "gym"     # the checkpoint that is used without --ckpt


def load(ckpt: str, device: str, dtype: str):
    """Model, tokenizer and hardware for a checkpoint or run folder, the shipped one if `ckpt` is
    empty. Raises UserError if there is none, or if it comes without a tokenizer."""
    hw = setup(device, dtype, generates=True)
    folder = find_checkpoint(ckpt or SHIPPED)
    model = load_model(folder, hw.device, hw.dtype)
    return model, tokenizer_of(model.config), hw


# ---- act and answer: what a program calls --------------------------------------------------------

@dataclass(frozen=True)
class Action:
    """One action of the model. kind: a verb of tasks/actions.py, or "none" where the reply is no
    call of one. point: the place that click, zoom and draw_point name, (x, y) in pixels of the
    caller's picture. raw: the reply as it was written."""
    kind: str
    arguments: tuple = ()
    point: tuple[int, int] | None = None
    thought: str = ""
    raw: str = ""

    def __str__(self):
        """The call as it was written, click(412, 377); ? for none, as in the gym's history."""
        return "?" if self.kind == "none" else call_text(self.kind, list(self.arguments))


@dataclass(frozen=True)
class Answer:
    """The reply to a question. raw: with its special tokens; finish: as lib.turns.Turn has it."""
    text: str
    thought: str
    raw: str
    finish: str


def act(model, image, goal: str, history=(), *, form="action", **options) -> Action:
    """The model's next action on a screen.

        model = load_model("ckpt/demo")
        first = act(model, "screen.png", "Tick A. Press OK.")
        print(first, first.point)               # click(375, 375) (24, 24)
        second = act(model, next_screen, "Tick A. Press OK.", history=[first])

    image: a Pillow image, a path, or an array of uint8. history: the earlier actions, as Actions or
    as texts. The prompt is that of the gym's screens: picture, goal, a line for each earlier action
    (tasks.base.recap); `python gym.py actions` prints the calls and the wordings of goals.

    A coordinate c in 0-999 names the pixel in which c / 999 of the side lies, c * side / 999
    rounded down; 999 is the last pixel. form: what the reply must look like (lib/forms.py), by
    default a call; None: anything. options: max_new, temperature, top_p, seed, think, prefix, as
    in ReplySettings. Raises UserError on bad input.
    """
    if not isinstance(goal, str) or isinstance(history, str):
        raise UserError("act takes a goal as a text, and the earlier actions as a list")
    image = any_image(image)
    lines = [str(action) for action in history]
    turn = reply_to(model, recap(goal, lines), [image], form=form, **{"max_new": 64} | options)
    name, values = parse_action(turn.raw) or ("none", [])
    if name not in ACTIONS or not ACTIONS[name].fits(values):
        return Action("none", (), None, turn.thought, turn.raw)
    point = None
    if [*ACTIONS[name].arguments.values()] == ["coordinate"] * 2:
        point = tuple(min(side - 1, c * side // 999) for c, side in zip(values, image.size))
    return Action(name, tuple(values), point, turn.thought, turn.raw)


def answer(model, images, question: str, *, form=None, **options) -> Answer:
    """The model's reply to a question about one picture or several.

        answer(model, "docs/example.png", "What color is the diamond?").text        # pink

    images: one picture or a list, each as `act` takes it; [] for a question about none. form and
    options: as in `act`. Raises UserError on bad input.
    """
    images = images if isinstance(images, (list, tuple)) else [images]
    images = [any_image(image) for image in images]
    turn = reply_to(model, IMAGE * len(images) + question, images, form=form, **options)
    return Answer(turn.text.strip(), turn.thought, turn.raw, turn.finish)


def reply_to(model, text: str, images: list, form, **options) -> Turn:
    """The reply to one message. form: a Form, the name of one, or None."""
    tokens = tokenizer_of(model.config)
    form = named_form(form, tokens) if isinstance(form, str) else form
    settings = ReplySettings(form=form, **options)
    for name, least in (("max_new", 1), ("think", 0), ("seed", 0)):
        value = getattr(settings, name)
        if not isinstance(value, int) or not least <= value < 2 ** 63:
            raise UserError(f"{name} is an integer from {least} on, not {value!r}")
    turn = Turn([Message("user", text, tuple(images))], settings, tokens, model.config)
    return play(engine_for(model, turn), turn)


# ---- ask ----------------------------------------------------------------------------------------

@dataclass
class Ask:
    question: str = ""            # also as a bare word; without it, the known ones are listed;
                                  # "-" reads it from standard input
    image: list[str] = field(default_factory=list)  # a picture file; may be given several times;
                                  # "-" is standard input
    ckpt: str = ""                # checkpoint or run folder; default: ckpt/gym
    max_new: Positive = 128       # tokens at most in the answer
    temperature: NonNegative = 0.0  # of sampling; 0 always takes the most likely token
    top_p: Share = 1.0            # sample from the most likely tokens, up to this probability
    seed: Seed = 0                # of sampling
    drafts: Drafts = 0            # tokens that the MTP head drafts in a step; same answer in fp32
    think: Natural = 0            # tokens that it may think for before the answer; 0: not at all
    prefix: str = ""              # what the answer begins with, such as "click("
    form: str = ""                # what it must look like: action, click, box, point, integer,
                                  # text or json
    json: bool = False            # print one JSON object: the reply and facts about it
    device: Device = "auto"       # auto, cpu, cuda or mps
    dtype: Dtype = "auto"         # auto, float32 or bfloat16


def ask(args: Ask):
    """Print the answer to a question about pictures, and to stderr what the model was given and its
    thought. What is unlike its training is named there, too: to what it has not seen a model gives
    some answer, which means nothing."""
    question, images = asked(args)
    model, tokens, hw = load(args.ckpt, args.device, args.dtype)
    folder = find_checkpoint(args.ckpt or SHIPPED)
    if not question.strip():
        if images or args.json or args.question == "-":
            raise UserError('nothing asked: python sample.py ask --image=FILE "question"')
        return list_questions(folder, model.config)
    message = Message("user", "<|image|>" * len(images) + question, images)
    turn = Turn([message], settings_of(args, tokens), tokens, model.config)
    for path, shown in zip(args.image, turn.prompt.images):
        name = "the picture" if path == "-" else path
        note(f"{name} is seen at {shown.shape[1]}x{shown.shape[0]} pixels")
    unlike = note_unlike(seen(folder, model.config), question, turn.prompt.images)
    engine = engine_for(model, turn, args.drafts, say=note)
    if args.json:
        print(json.dumps(as_json(play(engine, turn), engine, unlike)))
    else:
        screen = Screen(readable(args.prefix))
        play(engine, turn, screen.show)
        screen.end()
    if not turn.text.strip():
        note("there was no reply")
    note_end(turn, model.config.text.max_position_embeddings)
    if engine.drafts:
        note(f"{engine.tokens / max(1, engine.steps):.2f} tokens a step")


def asked(args: Ask) -> tuple[str, tuple]:
    """The question and the pictures of the options, one of which may come from standard input."""
    if args.image.count("-") + (args.question == "-") > 1:
        raise UserError("standard input holds either the question or one picture, not both")
    question, images, name = args.question, [], "standard input"
    for path in args.image:
        if path == "-":
            images.append(Picture(read_all(sys.stdin.buffer, name), name).open())
        else:
            images.append(open_image(path))
    if question == "-":
        question = decode(read_all(sys.stdin.buffer, name), name).strip()
    return question, tuple(images)


def settings_of(args, tokens) -> ReplySettings:
    """How to reply, by the options of `ask` and `chat`. Raises UserError on an unknown form."""
    form = named_form(args.form, tokens) if args.form else None
    return ReplySettings(args.max_new, args.temperature, args.top_p, args.seed, args.think,
                         getattr(args, "prefix", ""), form)


def as_json(turn: Turn, engine: Engine, unlike: list[str] | None) -> dict:
    """What `ask --json` prints. unlike: differences to the training, None where it is unknown."""
    rate = engine.tokens / engine.steps if engine.steps else None   # the first token takes no step
    return {"reply": (readable(turn.settings.prefix) + turn.text).strip(), "raw": turn.raw,
            "thought": turn.thought, "finish": turn.finish, "prompt_tokens": turn.prompt_tokens,
            "reply_tokens": len(turn.ids), "tokens_a_step": rate and round(rate, 3),
            "unlike_training": unlike}


def readable(reply: str) -> str:
    """A reply without the special tokens around and inside it."""
    for mark in ("<|begin_of_box|>", "<|end_of_box|>", "<|user|>", "<|observation|>",
                 "<|endoftext|>"):
        reply = reply.replace(mark, "")
    return reply.strip()


# ---- chat ---------------------------------------------------------------------------------------

@dataclass
class Chat:
    ckpt: str = ""                # checkpoint or run folder; default: ckpt/gym
    max_new: Positive = 256       # tokens at most in a reply
    temperature: NonNegative = 0.0  # of sampling; 0 always takes the most likely token
    top_p: Share = 1.0            # sample from the most likely tokens, up to this probability
    seed: Seed = 0                # of sampling; each further reply has the next seed
    drafts: Drafts = 0            # tokens that the MTP head drafts in a step; same reply in fp32
    think: Natural = 0            # tokens that it may think for before a reply; see also /think
    form: str = ""                # what replies must look like: action, click, box, point, integer,
                                  # text or json
    device: Device = "auto"       # auto, cpu, cuda or mps
    dtype: Dtype = "auto"         # auto, float32 or bfloat16


def chat(args: Chat, lines=None, terminal: bool | None = None):
    """Talk with the model about pictures: each line is a message, or a command such as /image FILE.
    /help lists the commands. Without a terminal the lines of standard input are taken, and only the
    replies are printed on stdout."""
    model, tokens, hw = load(args.ckpt, args.device, args.dtype)
    settings = settings_of(args, tokens)
    trained = seen(find_checkpoint(args.ckpt or SHIPPED), model.config)
    note(introduction(args.ckpt or "ckpt/gym", model, trained))
    talk(Conversation(model, settings, args.drafts, trained), lines, terminal)


# ---- agent --------------------------------------------------------------------------------------

AgentForm = Literal["auto", "action", "click", "none"]


@dataclass
class Agent:
    task: str = "gui_form"        # the category, also as a bare word; agents' have several turns
    level: Annotated[int, Range(0, 4)] = 0  # 0 (easy) to 4
    seed: Seed = 1_000_000        # which instance
    split: Literal["test", "train"] = "test"  # test: held-out factors; or train
    ckpt: str = ""                # checkpoint or run folder; default: ckpt/demo
    screenshot: str = ""          # a picture of yours, for one action in place of a task
    goal: str = ""                # what to do on it, in the wordings of `gym.py actions`
    form: AgentForm = "auto"      # action, click: only calls; auto: only on a screenshot; none
    turns: Natural = 0            # at most; 0: as many as the task allows
    think: Natural = 0            # tokens that it may think for in each turn; 0: not at all
    temperature: NonNegative = 0.0  # of sampling; 0 always takes the most likely token
    sample: Seed = 0              # seed of sampling
    out: str = ""                 # GIF and PNG without their suffix; default: out/agent/NAME
    device: Device = "auto"       # auto, cpu, cuda or mps
    dtype: Dtype = "auto"         # auto, float32 or bfloat16


def agent(args: Agent):
    """Watch the model do a task of the gym: each turn on the terminal, all of them as a film (GIF)
    and side by side (PNG). Or let it act once on a picture of yours, and see where it points:

    python sample.py agent
    python sample.py agent --screenshot=screen.png --goal="Click OK."
    """
    if args.goal and not args.screenshot:
        raise UserError("--goal is for a --screenshot: a task has its own")
    if args.screenshot:
        return act_once(args)
    ckpt = args.ckpt or "ckpt/demo"
    model, tokens, hw = load(args.ckpt or ROOT / ckpt, args.device, args.dtype)
    task = gym.Task(args.task, args.seed, args.level, args.split)
    form = "" if args.form in ("auto", "none") else args.form
    watched = Watched(model, tokens, task, form, args.turns, args.think, args.temperature,
                      args.sample)
    label = f"{args.task}, level {args.level}, {args.split} seed {args.seed}, {ckpt}"
    print(label)
    for number, shot in enumerate(watched.play(), 1):
        if number == 1:
            print(on_terminal(watched.recorder.goal))
        if shot.thought:
            print(indent(on_terminal(shot.thought), "     thought: "))
        said, result = on_terminal(shot.action), on_terminal(shot.result)
        if "\n" in said:        # a call of several lines: the result comes below it
            said, result = said.replace("\n", "\n     "), "\n     " + result
        print(f"{number:>3}  {said:<28}  {result}", flush=True)
    score = watched.episode.score
    end = Verdict(score.solved, score.error or f"reward {score.reward:.2f}")
    parts = ", ".join(f"{name} {value:.2f}" for name, value in score.parts.items())
    print(f"{end} ({parts})" if parts else end)
    if watched.recorder.shots:
        out = output_path(args.out or f"out/agent/{args.task}")
        episode = watched.recorder.goal, label, watched.recorder.shots, end
        save_film(film(*episode), f"{out}.gif")
        storyboard(*episode).save(f"{out}.png")
        print(f"{out}.gif and {out}.png")


def act_once(args: Agent):
    """Print the model's action on a picture of the user's, and draw the point that it names."""
    if not args.goal.strip():
        raise UserError('--screenshot needs a --goal="...": what should be done there?')
    image, ckpt = open_image(args.screenshot), args.ckpt or ROOT / "ckpt" / "demo"
    model, tokens, hw = load(ckpt, args.device, args.dtype)
    seen_image = resize(image, model.config)
    note(f"{args.screenshot} is seen at {seen_image.shape[1]}x{seen_image.shape[0]} pixels")
    note_unlike(seen(find_checkpoint(ckpt), model.config), args.goal, [seen_image])
    form = {"auto": "action", "none": None}.get(args.form, args.form)
    action = act(model, image, args.goal, form=form, think=args.think, seed=args.sample,
                 temperature=args.temperature)
    if action.thought:
        print(f"thought: {on_terminal(action.thought)}")
    if action.kind == "none":
        print(f"no action: {on_terminal(action.raw)}")
    else:
        print(on_terminal(str(action)))
    if action.point:
        out = output_path(args.out or f"out/agent/{Path(args.screenshot).stem}")
        with_point(image, action.point).save(f"{out}.png")
        print(f"pixel {action.point[0]}, {action.point[1]} of {image.width}x{image.height}: "
              f"{out}.png")


def output_path(out: str) -> str:
    """A path without suffix, whose folder exists."""
    Path(out).parent.mkdir(parents=True, exist_ok=True)
    return out


def on_terminal(text: str) -> str:
    """A model's text without what a terminal might obey."""
    return CONTROL.sub("\ufffd", text)


# ---- eval ---------------------------------------------------------------------------------------

@dataclass
class Eval:
    ckpt: list[str] = field(default_factory=list)  # default ckpt/gym; more than one: compare
    data: str = ""                # file of own questions, see lib/own_eval.py; default: the gym's
    mix: str = ""                 # categories; default: those that it was trained on
    levels: Annotated[int, Range(0, 5)] = 0  # tasks of levels 0..levels-1; 0: as it was trained
    count: Count = 200            # tasks a category
    passes: Annotated[int, Range(0, 1000)] = 0  # samples a task for pass@k, at temperature 1; 0: no
    drafts: Drafts = 0            # tokens that the MTP head drafts; shows how many a step gives
    harness: str = ""             # plain, history, tools, verify: compare them, lib/harness.py
    pixels: Natural = 0           # side of the pictures; 0: the least that suits the patches
    split: Literal["test", "train"] = "test"  # test: held-out seeds and factors; or train
    seed: Seed = 1_000_000        # of the first task; the next one has the next seed
    slots: Positive = 64          # conversations generated side by side
    context: Natural = 0          # tokens of a conversation; 0: as tasks or questions need
    max_new: Natural = 0          # tokens a reply may have; 0: as tasks need, or 256 for --data
    card: str = ""                # folder of the same weights that gets a card and report.json
    out: str = ""                 # file for the figures; default: out/eval.json or, for
                                  # --data=X.jsonl, out/eval_X/eval.json
    device: Device = "auto"       # auto, cpu, cuda or mps
    dtype: Dtype = "auto"         # auto, float32 or bfloat16


def evaluation(args: Eval):
    """Evaluate a checkpoint, print the table and write it to --out; --card: a card too. Several
    checkpoints are compared on the same tasks, and with --harness several ways to ask one. With
    --data the questions are those of a file. `python -m lab.report FOLDER` makes a page of the
    folder with the figures."""
    ckpts = [ckpt for text in args.ckpt for ckpt in text.split(",") if ckpt.strip()] or [""]
    if len(ckpts) > 1 and (args.data or args.card or args.harness or len({*ckpts}) < len(ckpts)):
        raise UserError("several of --ckpt must differ, and take no --data, --card or --harness")
    if args.data:
        return own_evaluation(args, ckpts[0])
    if args.card and not (Path(args.card) / "model.safetensors").exists():
        raise UserError(f"--card={args.card} holds no weights that a card could describe")
    harnesses = read_harnesses(args.harness)
    if harnesses and (args.card or args.passes or args.drafts):
        raise UserError("--harness takes no --card, --passes or --drafts")
    folders = [find_checkpoint(ckpt or SHIPPED) for ckpt in ckpts]
    mix, levels, source = known_tasks(folders, args.mix, args.levels)
    if not args.mix:
        print(f"what it was trained on, by {source}: {mix}")
    played = {"levels": levels} | {name: getattr(args, name) for name in (
        "count", "split", "seed", "slots", "pixels", "context", "max_new")}
    began, tables = time.time(), {}
    for ckpt in ckpts:
        model, tokens, hw = load(ckpt, args.device, args.dtype)
        name = ckpt or "ckpt/gym"
        print(f"{name}, {hw.description}")
        if harnesses:
            tables = evaluate_harnesses(model, tokens, mix, harnesses, **played)
        else:
            tables[name] = evaluate(model, tokens, mix, **played, passes=args.passes,
                                    drafts=args.drafts)
            show(tables[name])
    facts = {"ckpt": name if len(ckpts) == 1 else ckpts, "split": args.split, "levels": levels,
             "seed": args.seed, "hardware": hw.description}
    if harnesses or len(ckpts) > 1:
        facts |= comparison(tables, "history" if "history" in harnesses else next(iter(tables)))
    else:                                   # one checkpoint: `name` is its name
        show_summary(tables[name])
        facts |= {"trained_levels": trained_on(folders[0])[1], "table": tables[name],
                  "summary": summary(tables[name]), "not_played": not_played(tables[name])}
    out = args.out or "out/eval.json"
    write_json(out, facts)
    if args.card:
        write_card(Path(args.card), model, seen(folders[0], model.config), facts)
    print(f"{levels} level{'s' * (levels > 1)} in {time.time() - began:.0f} s; the figures are in "
          f"{out}" + f", the card is {args.card}/README.md" * bool(args.card))


def own_evaluation(args: Eval, ckpt: str):
    """Evaluate a checkpoint on the questions of --data."""
    for name in ("mix", "levels", "count", "passes", "drafts", "harness", "pixels", "split",
                 "seed", "card"):
        if getattr(args, name) != getattr(Eval, name):
            raise UserError(f"--{name} is about the gym's tasks, and --data takes their place")
    model, tokens, hw = load(ckpt, args.device, args.dtype)
    print(hw.description)
    began, name = time.time(), Path(args.data).stem
    out = Path(args.out or f"out/eval_{name}/eval.json")
    found = evaluate_file(model, tokens, args.data, out.parent / "pictures", args.slots,
                          args.context, args.max_new or 256)
    show_figures(found)
    write_json(out, {"title": f"{Path(args.data).name}, answered by {ckpt or 'ckpt/gym'}",
                     "data": args.data, "ckpt": ckpt or "ckpt/gym",
                     "hardware": hw.description, **found})
    print(f"{found['all']['n']:,} questions in {time.time() - began:.0f} s; the figures are in "
          f"{out}, and `python -m lab.report {out.parent}` makes a page of them")


# ---- the command line ---------------------------------------------------------------------------

VERBS = {"ask": (Ask, ask, "question"), "chat": (Chat, chat, None),
         "agent": (Agent, agent, "task"),
         "eval": (Eval, evaluation, None)}


if __name__ == "__main__":
    main(lambda: run_verb(VERBS, __doc__))
