"""A task of `gui_form` for tool loops: the model calls `click` or `done`, and the result of a call
is the next screen. openai_tools.py and anthropic_tools.py play it."""
import base64
import io

import gym
from lib.conversations import call_text

PLACES = {"click": ("x", "y"), "done": ()}      # of each tool, in 0-999 of the screen
SCHEMAS = {name: {"type": "object", "properties": dict.fromkeys(places, {"type": "integer"}),
                  "required": list(places)} for name, places in PLACES.items()}


class FormGame:
    """One held-out task of level 0. The reward is computed here, by our gym."""

    def __init__(self, seed: int):
        self.task = gym.Task("gui_form", seed, 0, "test")
        self.env = gym.make(self.task)
        self.last = gym.Step(self.env.reset(), False)
        self.goal, self.reward = self.env.goal, None
        print(self.goal)

    @property
    def screen(self) -> str:
        """What the screen shows now, as base64 of a PNG; "" when the task is over."""
        if self.over:
            return ""
        self.last.obs.images[0].save(file := io.BytesIO(), "PNG")
        return base64.b64encode(file.getvalue()).decode()

    def call(self, name: str, arguments: dict):
        """Take the call of a tool."""
        self.take(call_text(name, [arguments.get(place) for place in PLACES.get(name, ())]))

    def take(self, reply: str):
        """Take a reply and print it; at the end also the reward."""
        print(f"  {reply}")
        self.last = self.env.step(reply)
        if self.over:
            self.reward = gym.Rewards().score(self.task, self.env.evidence()).reward
            print(f"  reward {self.reward:g}")

    @property
    def over(self) -> bool:
        return self.last.done
