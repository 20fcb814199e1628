"""Figures of an evaluation: pass@k, means over categories, differences, drafts, and harnesses."""
import itertools
import json
from collections import Counter

import numpy as np
import pytest

import gym
import sample
from lab import report
from lib import card, evaluation, harness, summary
from lib.checkpoint import load_model, save_model
from lib.cli import UserError
from lib.episodes import Episode
from lib.rollout import RolloutSettings
from lib.scoring import interval, mean_interval, paired_difference
from model import GLMV, sized
from rl import DEMO
from tasks.actions import SCREENS, verbs_of
from tasks.base import click, Task
from tasks.rewards import pass_at_k
from tasks.verify import parse_action
from tokenizer import tokenizer_of


@pytest.fixture(scope="module")
def demo():
    model = load_model(DEMO)
    return model, tokenizer_of(model.config)


# ---- estimates and their intervals --------------------------------------------------------------

@pytest.mark.parametrize("n", [1, 4, 6])
def test_pass_at_k_is_the_mean_over_all_choices_of_k_samples(n):
    for right in range(n + 1):
        samples = [True] * right + [False] * (n - right)
        for k in range(1, n + 1):
            draws = [any(drawn) for drawn in itertools.combinations(samples, k)]
            assert pass_at_k(right, n, k) == pytest.approx(np.mean(draws))


def test_the_interval_of_a_difference_holds_the_truth_in_95_of_100_cases():
    """Two models on the same 60 tasks: the first solves 70%, the second 80% of these and 30% of
    the others, so the true difference is -5 points."""
    rng, held = np.random.default_rng(0), []
    for _ in range(2000):
        first = rng.random(60) < 0.7
        second = rng.random(60) < np.where(first, 0.8, 0.3)
        _, low, high = paired_difference(first, second)
        held.append(low <= -0.05 <= high)
    assert 0.94 < np.mean(held) < 0.98


def test_a_difference_of_equal_models_is_not_certain():
    assert paired_difference([True, False], [False, True])[0] == 0
    value, low, high = paired_difference([True] * 200, [True] * 200)
    assert value == 0 and -0.011 < low < 0 < high < 0.011
    assert paired_difference([True] * 60, [False] * 60)[:2] == (-1, -1)
    with pytest.raises(ValueError):
        paired_difference([True], [True, False])


def test_the_interval_of_a_mean_holds_the_truth_in_95_of_100_cases():
    """Of four categories, two of which are nearly always solved, or never."""
    rng, truth, n, held = np.random.default_rng(0), np.array([0.99, 0.5, 0.2, 0.01]), 50, []
    for _ in range(2000):
        shares = rng.binomial(n, truth) / n
        _, low, high = mean_interval([(share, *interval(share, n)) for share in shares])
        held.append(low <= truth.mean() <= high)
    assert 0.94 < np.mean(held) < 0.98
    assert mean_interval([(0.5, 0.3, 0.8)]) == pytest.approx((0.5, 0.3, 0.8))


def scored(*rewards) -> list[Episode]:
    """Episodes of one task; None is an error."""
    task = Task("point", 0)
    return [Episode(task, 0, i, score=gym.Score(reward) if reward is not None else
                    gym.Score(float("nan"), {}, "gone")) for i, reward in enumerate(rewards)]


def test_pass_at_k_of_a_category():
    """Errors are left out, and so is a task with fewer than k other samples."""
    found = evaluation.pass_figures([scored(1, 0, 0), scored(0, 0, 0), scored(1, None, None)])
    assert list(found) == ["1", "2", "3"]
    assert found["1"]["value"] == pytest.approx((1 / 3 + 0 + 1) / 3)
    assert found["2"]["value"] == pytest.approx((2 / 3 + 0) / 2)
    assert found["3"]["value"] == 0.5
    assert (found["3"]["low"], found["3"]["high"]) == interval(0.5, 2)
    assert evaluation.pass_figures([scored(None)]) == {}
    assert list(evaluation.pass_figures([scored(*[0] * 8)])) == ["1", "2", "4", "8"]


# ---- groups of categories -----------------------------------------------------------------------

def test_composites_are_of_categories_that_exist_and_each_belongs_to_one():
    parts = [part for parts in summary.COMPOSITES.values() for part in parts]
    assert len(summary.COMPOSITES) == 4 and set(parts) <= set(gym.names())
    assert len(parts) == len(set(parts))
    for name, parts in summary.COMPOSITES.items():
        for part in parts:
            images = gym.make(Task(part, 3)).reset().images
            assert bool(images) == (name != "text alone"), part


def row_of(accuracy, n=100, blank=0.0, chance=0.1, solved=""):
    low, high = interval(accuracy, n)
    return dict(accuracy=accuracy, low=low, high=high, blank=blank, chance=chance, solved=solved,
                replies=1.0)


def test_means_by_family_tier_and_composite():
    table = {"text_code": row_of(0.2), "text_tools": row_of(0.6), "point": row_of(0.35, blank=0.2),
             "visual_tools": row_of(0.5)}
    found = summary.summary(table)
    assert list(found["composite"]) == ["text alone"]
    assert found["composite"]["text alone"]["accuracy"] == pytest.approx(0.4)
    assert list(found["family"]) == ["perception", "reasoning", "agent"]
    assert found["family"]["agent"]["accuracy"] == pytest.approx(0.55)
    assert found["tier"].keys() == {"1 grounding", "2 one action", "3 trajectory"}
    assert found["all"]["mean"]["categories"] == 4 and found["all"]["mean"]["ahead"] == 2
    missing = summary.not_played(table)
    assert missing["tools for seeing"] == ["image_mining"] and "text alone" not in missing


def test_a_comparison_is_of_tasks_that_both_have_played():
    """x is an error. A group's difference is the mean of its categories'; what one table lacks is
    left out."""
    tables = {"a": {"point": row_of(0.5, 4, solved="1100"),
                    "counting": row_of(0.5, 4, solved="11x0"), "dice": {}},
              "b": {"point": row_of(1, 4, solved="1111"),
                    "counting": row_of(0, 4, solved="0011")}}
    found = summary.compare(tables, "a")
    assert list(found) == ["point", "counting", "mean"]
    assert "difference" not in found["point"]["a"]
    assert found["point"]["b"]["difference"][0] == 0.5
    assert found["counting"]["b"]["difference"][0] == pytest.approx(-1 / 3)
    value, low, high = found["mean"]["b"]["difference"]
    assert value == pytest.approx((0.5 - 1 / 3) / 2) and low < value < high
    assert summary.percentages(found, "a")["point"] == {"a, %": 50, "b, %": 100, "b - a": 50}
    tables["b"]["counting"]["solved"] = "xx1x"
    found = summary.compare(tables, "a")
    assert "difference" not in found["counting"]["b"] and "difference" not in found["mean"]["b"]
    assert evaluation.difference_cell(found["counting"]["b"]).strip() == "-"
    with pytest.raises(ValueError):
        summary.difference(row_of(0, solved="00"), row_of(0, solved="0"))


def test_a_card_has_a_bar_for_each_composite_that_was_played():
    table = {"text_code": row_of(0.5), "text_tools": row_of(1.0), "point": row_of(0.1)}
    bars = [line for line in card.composite_lines(table) if "|" in line]
    assert len(bars) == 1 and bars[0].startswith(f"text alone       |{'#' * 30}{' ' * 10}| 75 [")
    del table["text_code"]
    assert card.composite_lines(table) == []


# ---- with a model -------------------------------------------------------------------------------

def test_drafts_give_more_tokens_a_step_and_the_same_replies(demo):
    tasks, replies = [Task("point", i, 0, "test") for i in range(6)], []
    for drafts in (0, 3):
        steps = Counter()
        played = evaluation.run_tasks(*demo, tasks, drafts=drafts, steps=steps)
        replies.append([e.replies(demo[1]) for e in played])
        rate = steps["tokens"] / steps["steps"]
        assert rate == 1 if not drafts else rate > 2
    assert replies[0] == replies[1]
    assert evaluation.reply_figures(played, demo[1])["replies"] == 1
    assert 10 < evaluation.reply_figures(played, demo[1])["reply_tokens"] < 14


def test_tasks_without_pictures_are_not_played_with_grey_ones(demo, monkeypatch):
    """Both would be the same, and a model could never be ahead of itself."""
    model, tokens = demo
    blank, play = [], evaluation.run_tasks

    def played(model, tokens, tasks, *options, **more):
        blank.append((tasks[0].category, options[3]))
        episodes = play(model, tokens, tasks, *options, **more)
        for episode in episodes:
            episode.score = gym.Score(1.0)
        return episodes

    monkeypatch.setattr(evaluation, "run_tasks", played)
    table = evaluation.evaluate(model, tokens, "text_code,point", 1, 2, context=300, max_new=4)
    assert blank == [("text_code", False), ("point", False), ("point", True)]
    assert (table["text_code"]["blank"], table["point"]["blank"]) == (0, 1)
    assert summary.ahead(table["text_code"]) and not summary.ahead(table["point"])


def test_samples_of_a_task_differ_and_follow_each_other(demo):
    tasks = [Task("counting", i, 2, "test") for i in range(3)]
    played = evaluation.run_tasks(*demo, tasks, samples=8)
    assert [e.task for e in played] == [task for task in tasks for _ in range(8)]
    replies = [str(e.replies(demo[1])) for e in played]
    assert max(len({*replies[i:i + 8]}) for i in (0, 8, 16)) > 1
    table = evaluation.evaluate(*demo, "counting", 1, 4, passes=4, drafts=3)
    row = table["counting"]
    assert row["pass"]["1"]["value"] <= row["pass"]["2"]["value"] <= row["pass"]["4"]["value"]
    assert len(row["solved"]) == 4 and row["tokens_a_step"] > 1


@pytest.fixture
def runs(tmp_path):
    """Two run folders with the same weights, trained on other categories and levels."""
    for name, mix, levels in (("one", "counting,point,text", 2), ("two", "point,gui_click", 3)):
        save_model(GLMV(sized("tiny")), tmp_path / name / "step_000001")
        (tmp_path / name / "config.json").write_text(json.dumps({"mix": mix, "levels": levels}))
    return [str(tmp_path / "one"), str(tmp_path / "two")]


def test_two_checkpoints_are_compared_on_what_both_were_trained_on(runs, tmp_path, capsys):
    out = tmp_path / "eval/eval.json"
    options = dict(count=4, context=256, max_new=4, device="cpu", dtype="float32", out=str(out))
    sample.evaluation(sample.Eval(ckpt=[",".join(runs)], **options))
    found, said = json.loads(out.read_text()), capsys.readouterr().out
    assert list(found["tables"]) == runs and found["levels"] == 2
    assert found["tables"][runs[0]].keys() == {"point"}
    assert found["compared"]["point"][runs[1]]["difference"][0] == 0
    assert f"minus {runs[0]}" in said and "+0.0 [" in said
    assert "point" in report.write(out.parent).read_text()
    sample.evaluation(sample.Eval(ckpt=runs[:1], **options))
    found, said = json.loads(out.read_text()), capsys.readouterr().out
    assert found["table"].keys() == {"counting", "point"}
    assert found["summary"]["all"]["mean"]["categories"] == 2
    assert found["not_played"]["text alone"] == ["text_code", "text_tools"]
    assert "text alone       left out, since not played: text_code, text_tools" in said
    page = report.write(out.parent).read_text()
    assert "Held-out tasks" in page and "Means over categories" in page and "1 grounding" in page


@pytest.mark.parametrize("options,words", [
    (dict(data="own.jsonl"), "take no --data"), (dict(card="x"), "take no --data"),
    (dict(harness="plain"), "take no --data"), (dict(ckpt=["a", "a"]), "must differ"),
    (dict(ckpt=["a"], harness="plain,fast"), "--harness takes plain, history, tools, verify"),
    (dict(ckpt=["a"], harness=","), "--harness takes plain"),
    (dict(ckpt=["a"], harness="plain", passes=2), "--harness takes no --card, --passes"),
    (dict(ckpt=["a"], data="own.jsonl", passes=2), "--passes is about the gym's tasks")])
def test_options_that_do_not_go_together_are_one_line(options, words):
    with pytest.raises(UserError, match=words):
        sample.evaluation(sample.Eval(**{"ckpt": ["a,b"], **options}))


def test_checkpoints_with_nothing_in_common(runs, tmp_path):
    (tmp_path / "two/config.json").write_text('{"mix": "gui_click", "levels": 1}')
    with pytest.raises(UserError, match="only nothing that all have in common: give --mix"):
        evaluation.known_tasks([tmp_path / name / "step_000001" for name in ("one", "two")], "", 0)


# ---- harnesses ----------------------------------------------------------------------------------

class Shut:
    """An environment of which only what the agent may see can be used."""
    def __init__(self, env):
        self.reset, self.step, self.evidence = env.reset, env.step, env.evidence


class Player:
    """Plays one task under a harness, reply by reply. prompt: what the model is asked now."""

    def __init__(self, task, name):
        self.env = gym.make(task)
        self.rollout = harness.HarnessRollout(None, None, name)
        self.driver, self.evidence = self.rollout.drive(Shut(self.env)), None
        self.prompt = next(self.driver)[0].text

    def say(self, reply):
        try:
            self.prompt = self.driver.send(reply)[0].text
        except StopIteration as end:
            self.prompt, self.evidence = None, end.value

    def oracle(self):
        return next(self.env.oracle())


@pytest.mark.parametrize("category", SCREENS)
def test_history_is_what_the_gym_shows_and_plain_is_its_first_line(category):
    for seed in range(4):
        task = Task(category, seed, 2)
        env, players = gym.make(task), [Player(task, name) for name in ("history", "plain")]
        driver = gym.drive(env)
        messages, replies = next(driver), iter(["type('x')", "click(3, 998)", *[None] * 99])
        while True:
            text = messages[0].text
            assert [player.prompt for player in players] == [text, text.split("\n")[0]]
            reply = next(replies) or next(env.oracle())
            for player in players:
                player.say(reply)
            try:
                messages = driver.send(reply)
            except StopIteration as end:
                assert [player.evidence for player in players] == [end.value] * 2
                break


def form(name="verify", seed=1):
    """A Player of a form, a click that does nothing, and the goal as it is asked."""
    player = Player(Task("gui_form", seed, 1), name)
    empty = next(f"click({x}, {y})" for y in range(0, 999, 20) for x in range(0, 999, 20)
                 if not any(a - 60 <= x <= c + 60 and b - 60 <= y <= d + 60
                            for a, b, c, d in player.env.areas.values()))
    return player, empty, player.prompt


def test_verify_asks_again_after_a_click_that_changed_nothing():
    """With the same prompt, at temperature 1; the same click is not carried out twice; the history
    has only what changed something."""
    player, empty, goal = form()
    assert not player.rollout.again
    player.say(empty)
    assert player.prompt == goal and player.rollout.again and player.env.actions == [empty]
    x, y = parse_action(empty)[1]
    player.say(f"click({x + 20}, {y})")
    assert player.prompt == goal and player.rollout.again and player.env.actions == [empty]
    right = player.oracle()
    player.say(right)
    assert player.prompt == f"{goal}\n{right}" and not player.rollout.again
    assert player.env.actions == [empty, right]
    while player.prompt:
        player.say(player.oracle())
    assert player.evidence["state"] == player.evidence["gold"]


@pytest.mark.parametrize("wrong", ['type("x")', "nonsense", "click(5)"])
def test_verify_asks_again_after_a_refusal(wrong):
    player, _, goal = form()
    player.say(wrong)
    assert player.prompt == goal and player.rollout.again and player.env.actions == ["?"]


def test_verify_gives_up_after_some_tries_and_goes_on_with_the_history():
    player, empty, goal = form()
    for _ in range(harness.RETRIES):
        assert player.prompt == goal
        player.say(empty)
    player.say(empty)
    assert player.prompt == f"{goal}\n{empty}" and not player.rollout.again
    assert player.env.actions == [empty] * 2            # only the first and the last one


@pytest.mark.parametrize("name", ["plain", "history", "tools"])
def test_other_harnesses_do_not_ask_again(name):
    player, empty, goal = form(name)
    player.say(empty)
    assert not player.rollout.again and (player.prompt == goal) == (name == "plain")


def test_what_was_remembered_is_no_failure():
    """remember("5") changes no pixel, and is kept in the prompt; a repeated back() is one."""
    player = Player(Task("gui_multi_app", 3, 1), "verify")
    goal = player.prompt
    player.say('remember("5")')
    assert player.prompt == f'{goal}\nremember("5")' and not player.rollout.again
    player.say("remember(5)")                           # refused: it is no text
    assert player.prompt == f'{goal}\nremember("5")' and player.rollout.again


def test_same_actions():
    near, far = "click(420, 377)", "click(412, 477)"
    assert harness.same_action("click(412, 377)", near)
    assert not harness.same_action("click(412, 377)", far)
    assert harness.same_action("back()", "back( )") and harness.same_action("odd", "odd")
    assert not harness.same_action('type("a")', 'type("b")')
    assert not harness.same_action("odd", "back()")


def test_requests_are_constrained_and_warm_where_they_should_be(demo):
    settings = RolloutSettings(demo[1], demo[0].config, 512, 48, temperature=0.0)
    form = harness.action_form(demo[1], verbs_of("gui_form"))
    player = harness.HarnessRollout(Episode(Task("gui_form", 0), 0, 0), settings, "verify", form)
    request = player.advance()
    assert (request.form, request.temperature) == (form, 0.0)
    player.again = True
    assert player._request(48, False).temperature == 1.0
    assert player._request(48, False).seed != request.seed


def test_harnesses_side_by_side(demo, tmp_path):
    """`history` is the usual evaluation; a task of one action is the same with and without the
    earlier ones, of which it has none."""
    found = harness.evaluate_harnesses(*demo, "gui_form,counting,gui_click", harness.HARNESSES,
                                       count=3)
    assert list(found) == list(harness.HARNESSES)
    usual = evaluation.evaluate(*demo, "gui_form,gui_click", 1, 3)
    for name, row in usual.items():
        assert {key: found["history"][name][key] for key in ("solved", "replies", "accuracy")} == {
            key: row[key] for key in ("solved", "replies", "accuracy")}
    assert found["plain"]["gui_click"] == found["history"]["gui_click"]
    assert found["verify"]["gui_click"] == found["tools"]["gui_click"]
    with pytest.raises(UserError, match="counting has none of them"):
        harness.evaluate_harnesses(*demo, "counting", ["plain"])
