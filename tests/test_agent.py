"""The action language, the functions act and answer, and episodes that are watched."""
from types import SimpleNamespace

import numpy as np
import pytest
from PIL import Image, ImageSequence

import gym
import sample
from gym import Task
from lib.checkpoint import load_model
from lib.cli import cli, UserError
from lib.common import ROOT
from lib.evaluation import run_tasks
from lib.film import film, MARK, save_film, Shot, storyboard, Verdict, with_point
from lib.watch import Recorder, Watched
from tasks import phone, screens, tools
from tasks.actions import ACTIONS, known_goals, verbs_of
from tasks.base import IMAGE, recap
from tasks.verify import parse_action
from tokenizer import tokenizer_of

MANY_TURNS = [name for name, category in gym.CATEGORIES.items() if category.env.max_turns > 1]
EXAMPLES = {"coordinate": 500, "text": "Home"}      # a value of each kind, and a wrong one
WRONG = {"coordinate": 1000, "text": 2.5}


@pytest.fixture(scope="module")
def model():
    return load_model(ROOT / "ckpt" / "demo")


def written(name: str, *values) -> str:
    return f"{name}({', '.join(map(repr, values))})"


def played(task: Task, replies=None) -> Recorder:
    """An episode of the oracle, or of these replies."""
    env, recorder = gym.make(task), Recorder()
    episode = recorder.drive(env)
    next(episode)
    try:
        for reply in replies or env.oracle():
            episode.send(reply)
    except StopIteration:
        pass
    return recorder


# ---- the action language ------------------------------------------------------------------------

def accepted(category: str, call: str) -> bool:
    """Whether an environment takes a call as one of its own."""
    env = gym.make(Task(category, 0))
    env.reset()
    if hasattr(env, "device"):
        env.device.focus = "Title"      # type needs a field that was clicked on
    env.step(call)
    return not (env.actions[-1].startswith("?") if hasattr(env, "actions") else
                env.log[-1][0] == "?")


@pytest.mark.parametrize("category", ["gui_form", "gui_navigate", "gui_multi_app", "visual_tools",
                                      "text_tools", "image_mining"])
def test_environments_take_the_calls_of_the_table_and_no_others(category):
    for name, verb in ACTIONS.items():
        kinds = list(verb.arguments.values())
        right = [kind[0] if isinstance(kind, tuple) else EXAMPLES[kind] for kind in kinds]
        wrong = [WRONG.get(kind, "sideways") for kind in kinds]
        assert verb.fits(right) and not verb.fits([*right, 1])
        if category == "gui_form" and name == "done":       # it looks at the verb alone
            assert accepted(category, "done()")
            continue
        assert accepted(category, written(name, *right)) == (category in verb.categories)
        assert accepted(category, written(name)) == (
            category in verb.categories and verb.fits([]))
        if kinds:
            assert not verb.fits(wrong) and not accepted(category, written(name, *wrong))


def test_the_tables_of_the_gym_agree():
    for name, use in tools.USES.items():
        texts = ["text"] if '"' in use else ["coordinate"] * (use.count(",") + 1)
        assert [*ACTIONS[name].arguments.values()] == texts
    assert {*phone.USES} == {*verbs_of("gui_navigate")} == {*verbs_of("gui_next_action")}
    for category in ("visual_tools", "text_tools", "image_mining"):
        assert {*gym.CATEGORIES[category].env.tools} == {*verbs_of(category)}


@pytest.mark.parametrize("category", sorted({c for verb in ACTIONS.values()
                                             for c in verb.categories}))
def test_oracles_write_calls_of_the_table(category):
    for seed in range(5):
        for reply in gym.play_out(Task(category, seed, seed % 5))[1]:
            name, values = parse_action(reply)
            assert name in verbs_of(category) and ACTIONS[name].fits(values)


def test_gym_actions_prints_calls_and_wordings(capsys):
    gym.list_actions(gym.Actions())
    out = capsys.readouterr().out
    assert all(verb.usage in out and verb.does in out for verb in ACTIONS.values())
    assert screens.FORM_GOALS[0] in out and screens.FORM_GOALS[-1] not in out   # it is held out
    assert IMAGE in out and max(map(len, out.splitlines())) <= 100


@pytest.mark.parametrize("category", ["gui_form", "gui_click"])
def test_goals_of_training_have_the_wordings_that_are_printed(category):
    (forms,) = known_goals(category)
    starts = {form.partition("{")[0] for form in forms}
    goals = [gym.make(Task(category, seed, 2)).reset().text for seed in range(30)]
    assert all(any(goal.removeprefix(IMAGE).startswith(start) for start in starts)
               for goal in goals)


# ---- act and answer -----------------------------------------------------------------------------

@pytest.mark.parametrize("seed", range(1_000_000, 1_000_003))
def test_act_plays_as_the_gym_does(model, seed):
    task = Task("gui_form", seed, 0, "test")
    watched, env, history = Watched(model, tokenizer_of(model.config), task), gym.make(task), []
    list(watched.play())
    obs = env.reset()
    while obs:
        action = sample.act(model, obs.images[0], env.goal, history)
        history.append(action)
        obs = env.step(action.raw).obs
    assert list(map(str, history)) == [shot.action for shot in watched.recorder.shots]
    assert env.evidence() == watched.evidence


@pytest.mark.parametrize("raw,kind,arguments,point,text", [
    ("click(0, 999)", "click", (0, 999), (0, 319), "click(0, 999)"),
    ("click( 500,500 )", "click", (500, 500), (320, 160), "click(500, 500)"),
    ("zoom(1, 2)", "zoom", (1, 2), (0, 0), "zoom(1, 2)"),
    ("crop(0, 0, 100, 100)", "crop", (0, 0, 100, 100), None, "crop(0, 0, 100, 100)"),
    ("type('a \"b\"')", "type", ('a "b"',), None, 'type("a \\"b\\"")'),
    ("done()", "done", (), None, "done()"),
    ("click(1000, 5)", "none", (), None, "?"), ("click(1)", "none", (), None, "?"),
    ("jump(1)", "none", (), None, "?"), ("a red star", "none", (), None, "?")])
def test_a_reply_becomes_an_action(raw, kind, arguments, point, text, monkeypatch):
    monkeypatch.setattr(sample, "reply_to", lambda *args, **options: SimpleNamespace(
        raw=raw, thought="Hm."))
    action = sample.act(None, Image.new("RGB", (640, 320)), "Click OK.")
    assert action == sample.Action(kind, arguments, point, "Hm.", raw) and str(action) == text


def test_the_prompt_of_act_is_that_of_the_gym(model, monkeypatch):
    asked = []
    monkeypatch.setattr(sample, "reply_to", lambda model, text, images, **options: asked.append(
        (text, images[0].size, options)) or SimpleNamespace(raw="done()", thought=""))
    earlier = [sample.Action("click", (1, 2)), sample.Action("none"), "back()", "<|image|>"]
    sample.act(model, Image.new("RGB", (64, 64)), "Tick A.", earlier, max_new=7)
    lines = ["click(1, 2)", "?", "back()", "<|image|>"]
    assert asked == [(recap("Tick A.", lines), (64, 64), {"form": "action", "max_new": 7})]
    assert asked[0][0].count(IMAGE) == 1        # what stands in an action is no picture


def test_pictures_of_all_kinds_are_taken(model, tmp_path):
    obs = gym.make(Task("gui_click", 3)).reset()
    picture, goal = obs.images[0], obs.text.removeprefix(IMAGE)
    picture.save(tmp_path / "screen.png")
    shown = [picture, tmp_path / "screen.png", str(tmp_path / "screen.png"), np.asarray(picture),
             picture.convert("RGBA")]
    actions = [sample.act(model, one, goal) for one in shown]
    assert actions[0].kind == "click" and actions == [actions[0]] * len(shown)


def test_answer(model):
    found = sample.answer(model, ROOT / "docs" / "example.png", "What color is the diamond?")
    assert (found.text, found.finish, found.thought) == ("pink", "stop", "")
    assert found.raw == "<|begin_of_box|>pink<|end_of_box|>"
    boxed = sample.answer(model, [ROOT / "docs" / "example.png"], "List all.", form="integer")
    assert boxed.text.isdigit()


def test_a_thought_leaves_room_for_an_action(model):
    """This model has not learnt to think: it ends its turn in the thought."""
    picture = gym.make(Task("gui_click", 3)).reset().images[0]
    action = sample.act(model, picture, "Click OK.", think=20)
    assert action.kind in ACTIONS and parse_action(action.raw)


@pytest.mark.parametrize("image,options,message", [
    ("nowhere.png", {}, "no picture at nowhere.png"), (7, {}, "a picture is a Pillow image"),
    (np.zeros((4, 4), np.float32), {}, "of uint8, not"),
    (np.zeros((4, 0, 3), np.uint8), {}, "no pixels"),
    (None, {"max_new": 0}, "max_new is an integer from 1"), (None, {"think": -1}, "think is an"),
    (None, {"seed": 2 ** 64}, "seed is an"), (None, {"temperature": -1.0}, "a temperature from 0"),
    (None, {"form": "song"}, "there is no form 'song'"), (None, {"goal": 3}, "a goal as a text"),
    (None, {"history": "back()"}, "as a list"), (None, {"goal": "x " * 9000}, "leaves no room")])
def test_bad_input_of_act(model, image, options, message):
    image = Image.new("RGB", (64, 64)) if image is None else image
    with pytest.raises(UserError, match=message):
        sample.act(model, image, **{"goal": "Click OK."} | options)


# ---- an episode that is watched -----------------------------------------------------------------

@pytest.mark.parametrize("category", [
    "gui_form", pytest.param("text_tools", marks=pytest.mark.slow)])
def test_what_is_watched_is_what_eval_plays(model, category):
    """The same tokens, so the same reward, in both layouts."""
    tokens = tokenizer_of(model.config)
    for seed in (1_000_000, 1_000_007)[:1 + (category == "gui_form")]:
        watched = Watched(model, tokens, Task(category, seed, 0, "test"))
        shots, settings = list(watched.play()), watched.settings
        (episode,) = run_tasks(model, tokens, [watched.episode.task], 1, settings.context,
                               settings.max_new)
        assert watched.episode.score == episode.score and episode.score.error is None
        assert [d.ids.tolist() for d in watched.episode.documents] == [
            d.ids.tolist() for d in episode.documents]
        assert len(shots) == len(watched.recorder.shots) > 1


def test_a_form_holds_and_turns_are_limited(model):
    tokens = tokenizer_of(model.config)
    watched = Watched(model, tokens, Task("text_tools", 1_000_001, 0, "test"), "action", turns=2)
    shots = list(watched.play())
    assert 0 < len(shots) <= 2 and watched.episode.score.error is None
    assert all(parse_action(shot.action)[0] in verbs_of("text_tools") for shot in shots)


@pytest.mark.parametrize("task,options,message", [
    (Task("gui_frm", 0), {}, "did you mean gui_form"),
    (Task("gui_navigate", 0), {}, "needs pictures of 128"),
    (Task("shape_attr", 0), {"form": "action"}, "replies are calls"),
    (Task("gui_form", 0), {"form": "click", "think": 5}, "without --think")])
def test_what_cannot_be_watched(model, task, options, message):
    with pytest.raises(UserError, match=message):
        Watched(model, tokenizer_of(model.config), task, **options)


def test_what_came_of_an_action():
    results = [shot.result for shot in played(Task("gui_multi_app", 0, 1), [
        'open("Shop")', "back(1)", 'remember("7")', "sing", 'answer("7")']).shots]
    assert results == ["the screen changed", "back takes nothing", "the screen stays as it was",
                       "no such action", "the episode ends"]
    shots = played(Task("visual_tools", 0), ["zoom(500, 500)", 'calc("1+1")', "zoom(1, 1)"]).shots
    assert [shot.result for shot in shots[:2]] == ["a picture of 128x128 pixels", "2"]
    assert shots[1].text == "" and shots[2].text == "2"
    board = shots[0].pictures[0]        # a point after a zoom is on the whole picture
    assert shots[2].mark == (1, 1) and shots[2].marked is board


@pytest.mark.parametrize("category", [
    name if name in ("gui_form", "visual_tools") else pytest.param(name, marks=pytest.mark.slow)
    for name in MANY_TURNS])
def test_every_category_of_many_turns_becomes_a_film(category, tmp_path):
    recorder = played(Task(category, 2, 2, "test"))
    episode = recorder.goal, category, recorder.shots, Verdict(True, "reward 1.00")
    pictures = film(*episode)
    assert len({picture.size for picture, _ in pictures}) == 1
    assert len(pictures) > len(recorder.shots) > 1
    save_film(pictures, tmp_path / "a.gif")
    with Image.open(tmp_path / "a.gif") as gif:
        times = [frame.info["duration"] for frame in ImageSequence.Iterator(gif)]
    assert sum(times) == sum(milliseconds for _, milliseconds in pictures)
    marked = any(shot.mark for shot in recorder.shots)
    strip = storyboard(*episode)
    assert (MARK in {color for _, color in strip.getcolors(1 << 24)}) == marked
    assert strip.width <= 1700


def test_a_click_is_drawn_where_it_hits():
    screen = Image.new("RGB", (64, 32))
    shot = Shot([screen], action="click(750, 250)", mark=(750, 250), marked=screen)
    *_, (last, _) = film("Click.", "", [shot], Verdict(False, "reward 0.00"))
    ys, xs = np.nonzero((np.asarray(last)[:, :14 + 320] == MARK).all(-1))   # 14: the margin
    assert abs(xs.mean() - 14 - 750 / 999 * 320) < 4 and abs(ys.mean() - 14 - 40) < 4
    large = with_point(Image.new("RGB", (2000, 1000)), (1500, 250))
    ys, xs = np.nonzero((np.asarray(large) == MARK).all(-1))
    assert large.size == (2000, 1000) and xs.min() < 1500 < xs.max() and ys.min() < 250 < ys.max()


def test_the_film_in_docs_is_what_the_command_makes(tmp_path, capsys):
    sample.agent(cli(sample.Agent, [f"--out={tmp_path}/agent"]))
    out = capsys.readouterr().out
    assert "Tick A. Press OK.\n  1  click(375, 375)" in out and "success: reward 1.00" in out
    for name in ("agent.gif", "agent.png"):
        with Image.open(tmp_path / name) as new, Image.open(ROOT / "docs" / name) as shipped:
            assert new.n_frames == shipped.n_frames if name == "agent.gif" else True
            for ours, theirs in zip(ImageSequence.Iterator(new), ImageSequence.Iterator(shipped)):
                assert np.array_equal(ours.convert("RGB"), theirs.convert("RGB"))
    assert (ROOT / "docs" / "agent.gif").stat().st_size < 200_000


def test_an_action_on_a_picture_of_ones_own(tmp_path, capsys):
    obs = gym.make(Task("gui_click", 3)).reset()
    obs.images[0].resize((640, 640)).save(tmp_path / "screen.png")
    goal = obs.text.removeprefix(IMAGE)
    sample.agent(cli(sample.Agent, [f"--screenshot={tmp_path}/screen.png", f"--goal={goal}",
                                    f"--out={tmp_path}/point"]))
    out = capsys.readouterr().out
    assert out.startswith("click(") and "of 640x640" in out
    with Image.open(tmp_path / "point.png") as drawn:
        assert drawn.size == (640, 640)
    for words, message in (("--goal=x", "--goal is for"), ("--screenshot=x", "needs a --goal")):
        with pytest.raises(UserError, match=message):
            sample.agent(cli(sample.Agent, [words]))
