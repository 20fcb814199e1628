"""Model and harness: the same weights on the screens of the gym, asked in four ways.

    plain      each prompt has the goal and the current screen
    history    and the earlier actions, as in training
    tools      and the reply can only be an action that the category knows (lib/forms.py)
    verify     and where an action was refused, or changed no pixel, the model is asked again

The paper closes with the remark that model and harness make the agent together [C]; `sample.py eval
--harness` measures what each part of ours is worth. No harness uses what the agent could not see:
`verify` compares two screens and reads the environment's line about the action, which every later
prompt shows. It undoes nothing: an action that was carried out counts as a turn of the episode.

Where `verify` asks again, the prompt is the same as before, without a word about the failure, since
the model has never read one. So the reply is sampled at temperature 1, until it is another action
than those that failed on this screen, RETRIES times at most; then the last one counts like any
other. [O] A task of a single action ends with it, so there `verify` is the same as `tools`.
"""
import sys
from dataclasses import replace
from functools import partial

from tqdm import tqdm

from engine import Request
from lib.cli import UserError
from lib.evaluation import budget, figures, reply_figures, run_tasks, tasks_of
from lib.forms import action_form
from lib.rollout import Rollout
from lib.summary import outcome
from tasks.actions import SCREENS, verbs_of
from tasks.base import Message, Obs
from tasks.verify import is_point, parse_action

HARNESSES = ("plain", "history", "tools", "verify")
RETRIES = 8         # on one screen [O]
NEAR = 30           # clicks that are no farther apart are the same one, in 0-999 [O]
UNSEEN = ("remember",)      # verbs that change nothing on the screen


def same_action(reply: str, other: str) -> bool:
    """Whether two replies are the same action, or clicks on nearly the same point."""
    one, two = parse_action(reply), parse_action(other)
    if one is None or two is None:
        return reply == other
    if one[0] == two[0] and is_point(one[1]) and is_point(two[1]):
        return all(abs(a - b) <= NEAR for a, b in zip(one[1], two[1]))
    return one == two


def failed(before: Obs, after: Obs, reply: str) -> bool:
    """Whether an action came to nothing, by what the agent sees: the environment refused it, which
    the last line of the next observation says, or the screen is the same as before."""
    action = parse_action(reply)
    if action is None or after.text.rpartition("\n")[2].startswith("?"):
        return True
    same = [image.tobytes() for image in before.images] == [
        image.tobytes() for image in after.images]
    return same and action[0] not in UNSEEN


class HarnessRollout(Rollout):
    """A Rollout under one of the HARNESSES. form: of its replies, for `tools` and `verify`."""

    def __init__(self, episode, settings, harness: str, form=None):
        super().__init__(episode, settings)
        self.harness, self.form, self.again = harness, form, False

    def drive(self, env):
        """Like gym.drive: yields the messages to answer and receives the replies."""
        obs, failures, tries = env.reset(), [], 0
        goal, *actions = obs.text.split("\n")       # tasks/base.recap: one line each
        while obs is not None:
            lines = [goal] if self.harness == "plain" else [goal, *actions]
            self.again = bool(failures)
            reply = yield [Message("user", "\n".join(lines), tuple(obs.images))]
            if any(same_action(reply, other) for other in failures) and tries < RETRIES:
                tries += 1          # not carried out again
                continue
            after = env.step(reply).obs
            if (after and self.harness == "verify" and tries < RETRIES
                    and failed(obs, after, reply)):
                failures, tries = [*failures, reply], tries + 1
                obs = Obs(obs.text, after.images)
                continue
            actions += [after.text.rpartition("\n")[2]] if after else []
            obs, failures, tries = after, [], 0
        return env.evidence()

    def _request(self, max_new: int, thinking: bool) -> Request | None:
        request = super()._request(max_new, thinking)
        return request and replace(request, form=self.form,
                                   temperature=1.0 if self.again else request.temperature)


def evaluate_harnesses(model, tokens, mix, harnesses, levels=1, count=200, split="test",
                       seed=1_000_000, slots=64, pixels=0, context=0, max_new=0) -> dict:
    """{harness: {category: row}}: the same tasks of the screen categories in `mix`, greedily, under
    each of the harnesses. A row has the figures of lib/evaluation.py but `blank` and `by_level`.
    A category in which all tasks ended in errors is left out. Raises UserError if `mix`, names with
    commas, has no screen category."""
    names = [name for name in mix.split(",") if name in SCREENS]
    if not names:
        raise UserError(f"--harness is about {', '.join(SCREENS)}, and {mix} has none of them")
    tables = {harness: {} for harness in harnesses}
    bar = tqdm(total=count * len(names) * len(harnesses), desc="eval",
               disable=not sys.stderr.isatty())
    for name in names:
        tasks = tasks_of(name, model.config, levels, count, split, seed, pixels)
        most, reply = budget(tasks, tokens, model.config)
        form = action_form(tokens, verbs_of(name))
        for harness in harnesses:
            bar.set_postfix_str(f"{name}, {harness}")
            kind = partial(HarnessRollout, harness=harness,
                           form=form if harness in ("tools", "verify") else None)
            played = run_tasks(model, tokens, tasks, slots, context or most, max_new or reply,
                               bar=bar, kind=kind)
            if row := figures(tasks, played, played):
                del row["blank"]
                row["solved"] = "".join(outcome(e.score) for e in played)
                tables[harness][name] = row | reply_figures(played, tokens)
            else:
                print(f"{name}, {harness}: left out, as all tasks ended in errors, the first one "
                      f"in: {played[0].score.error}", file=sys.stderr)
    bar.close()
    return tables


def read_harnesses(text: str) -> list[str]:
    """The harnesses that an option names; [] if it is empty. Raises UserError on another word."""
    names = [name.strip() for name in text.split(",") if name.strip()]
    wrong = [name for name in names if name not in HARNESSES]
    if wrong or text and not names:
        raise UserError(f"--harness takes {', '.join(HARNESSES)} or several of them with commas, "
                        f"not '{text}'")
    return list(dict.fromkeys(names))
