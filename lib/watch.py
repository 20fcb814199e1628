"""Play one task of the gym turn by turn, to be watched: `sample.py agent`.

    watched = Watched(task, settings)
    for shot in watched.play(engine): ...       # lib.film.Shot, one a turn
    watched.episode.score

The tokens are those of lib/rollout.py, so the model plays as it does in `sample.py eval`.
"""
from dataclasses import replace

import gym
from engine import Engine
from lib.episodes import Episode
from lib.film import Shot
from lib.forms import Form
from lib.rollout import Rollout, RolloutSettings
from tasks.actions import ACTIONS
from tasks.base import IMAGE, Message, Task
from tasks.verify import boxed, parse_action, without_thought

PARTS = ("zoom", "crop", "search_image")    # calls after which no whole picture is shown


class Watched(Rollout):
    """A Rollout that keeps what happens in each turn. form: of the replies; turns: the most that
    are played, 0: as many as the task allows."""

    def __init__(self, task: Task, settings: RolloutSettings, form: Form | None = None, turns=0):
        super().__init__(Episode(task, 0, 0), settings)
        self.form, self.turns = form, turns
        self.shots: list[Shot] = []     # of the turns that have ended
        self.goal = ""                  # the first line of the first message

    def play(self, engine: Engine):
        """Yield each turn's Shot when it has ended; then the episode has its score."""
        request = self.advance()
        while request:
            engine.submit(request)
            results, before = [], len(self.shots)
            while not results:
                results = engine.step()
            request = self.advance(results[0])
            yield from self.shots[before:]
        if self.evidence is not None:
            self.finish(gym.Rewards().score(self.episode.task, self.evidence))

    def _request(self, max_new: int, thinking: bool):
        request = super()._request(max_new, thinking)
        return request and replace(request, form=self.form)

    def drive(self, env):
        """As gym.drive, and keep a Shot of each turn."""
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
        """A turn as a Shot, without its result."""
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
