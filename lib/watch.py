"""Play one task of the gym turn by turn, to be watched: `sample.py agent`.

    watched = Watched(model, tokens, Task("gui_form", 1_000_000, split="test"))
    for shot in watched.play(): ...         # lib.film.Shot, one a turn
    watched.episode.score

The tokens are those of lib/rollout.py, so the model plays as it does in `sample.py eval`.
"""
from dataclasses import replace

import gym
from data import sight, task_pixels
from engine import Engine
from lib.cli import UserError
from lib.episodes import Episode
from lib.evaluation import budget
from lib.film import Shot
from lib.forms import action_form, Form
from lib.rollout import Rollout, RolloutSettings
from tasks.actions import ACTIONS, verbs_of
from tasks.base import IMAGE, Message, Task
from tasks.verify import boxed, parse_action, without_thought

PARTS = ("zoom", "crop", "search_image")    # calls after which no whole picture is shown


class Recorder:
    """Runs an episode as gym.drive does, and keeps what happens.

    shots: of the turns that have ended; goal: the first line of the first message. turns: the most
    that are played, 0: as many as the task allows.
    """

    def __init__(self, turns: int = 0):
        self.turns, self.shots, self.goal = turns, [], ""

    def drive(self, env):
        """The generator that plays the episode; it takes replies and returns the evidence."""
        episode = gym.drive(env)
        messages, whole = next(episode), None   # whole: the picture that coordinates refer to
        self.goal = shown_text(messages[0]).partition("\n")[0]
        while True:
            shown = messages[-1]
            reply = yield messages
            whole = whole_picture(shown, self.shots, whole)
            shot = self.shot(shown, reply, whole, env)
            try:
                messages = episode.send(reply)
                shot.result = outcome(env, shown, messages[-1])
            except StopIteration as end:
                shot.result = "the episode ends"
                self.shots.append(shot)
                return end.value
            self.shots.append(shot)
            if len(self.shots) == self.turns:
                shot.result += "; no more turns"
                return env.evidence()

    def shot(self, shown: Message, reply: str, whole, env) -> Shot:
        """A turn as a Shot, without its result. whole: the picture that coordinates refer to."""
        text = shown_text(shown)
        if not self.shots or env.layout == "segment":   # the goal, and in a segment the history,
            text = text.partition("\n")[2] if env.layout == "append" else ""    # stand elsewhere
        said = without_thought(reply) or reply.strip()
        thought = reply.rpartition("</think>")[0].replace("<think>", "").strip()
        name, values = parse_action(reply) or ("", [])
        verb = ACTIONS.get(name)
        mark = ()
        if whole is not None and verb and "coordinate" in verb.arguments.values():
            mark = tuple(values) if verb.fits(values) else ()
        return Shot(list(shown.images), text, boxed(said) or said, "", thought, mark, whole)


class Watched(Rollout):
    """A Rollout whose turns are recorded.

    form: "" or, for tasks whose replies are calls, "action" or "click": replies have this form.
    turns: the most that are played, 0: as many as the task allows. think: tokens of a thought in
    each turn; seed: of sampling, where the temperature is above 0. Raises UserError where the model
    can't play the task like this.
    """

    def __init__(self, model, tokens, task: Task, form="", turns=0, think=0, temperature=0.0,
                 seed=0):
        gym.check_task(task)
        config, env = model.config, gym.CATEGORIES[task.category].env
        if env.min_pixels > sight(config):
            raise UserError(f"{task.category} needs pictures of {env.min_pixels} pixels, and this "
                            f"model sees {sight(config)}; --ckpt=ckpt/gym sees more")
        task = replace(task, pixels=task_pixels(task.category, config, task.pixels))
        # As much room as in an evaluation on tasks of this kind.
        kind = [replace(task, seed=task.seed + i) for i in range(24)]
        context, max_new = budget(kind, tokens, config)
        if think:
            context += (think + 8) * env.max_turns      # 8: </think> and line breaks
        context = min(context, config.text.max_position_embeddings)
        super().__init__(Episode(task, 0, 0), RolloutSettings(
            tokens, config, context, max_new, think, seed, temperature))
        self.engine = Engine(model, 1, context)
        self.engine.stops.add(tokens.image)     # a visual slot in a reply would have no pixels
        self.form = self.form_of(form, task.category) if form else None
        self.recorder = Recorder(turns)

    def form_of(self, name: str, category: str) -> Form:
        """The form of this name for the replies of a category."""
        verbs = ("click",) if name == "click" else verbs_of(category)
        if self.settings.think or not set(verbs) & set(verbs_of(category)):
            raise UserError(f"--form={name} is for tasks whose replies are calls, without --think")
        return action_form(self.settings.tokens, verbs)

    def play(self):
        """Yield each turn's Shot when it has ended; then the episode has its score."""
        request = self.advance()
        while request:
            self.engine.submit(request)
            results, before = [], len(self.recorder.shots)
            while not results:
                results = self.engine.step()
            request = self.advance(results[0])
            yield from self.recorder.shots[before:]
        if self.evidence is not None:
            self.finish(gym.Rewards().score(self.episode.task, self.evidence))

    def _request(self, max_new: int, thinking: bool):
        request = super()._request(max_new, thinking)
        return request and replace(request, form=self.form)

    def drive(self, env):
        return self.recorder.drive(env)


def shown_text(message: Message) -> str:
    return message.text.replace(IMAGE, "").strip()


def whole_picture(shown: Message, shots: list[Shot], before):
    """The picture that the coordinates of the next action refer to, given the one before it: the
    newest picture that is no part of another one; None where there is none."""
    name, _ = shots and parse_action(shots[-1].action) or ("", [])
    return shown.images[0] if shown.images and name not in PARTS else before


def outcome(env, shown: Message, following: Message) -> str:
    """What came of an action, by what is shown before and after it."""
    text = shown_text(following)
    if env.layout == "append":
        seen = [f"a picture of {image.width}x{image.height} pixels" for image in following.images]
        return "; ".join(filter(None, (text.replace("\n", " "), *seen)))
    last = text.rpartition("\n")[2]
    if last.startswith("?"):
        return last[1:].strip() or "no action that this task takes"
    same = [i.tobytes() for i in shown.images] == [i.tobytes() for i in following.images]
    return "the screen stays as it was" if same else "the screen changed"
