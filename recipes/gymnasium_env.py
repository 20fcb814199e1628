"""Our categories as a Gymnasium environment: an action is text, an observation is text and a
picture, and the reward comes with the last step. Needs `pip install gymnasium`."""
import string

import gymnasium
import numpy as np
from gymnasium import spaces
from PIL import ImageOps

import gym
from tasks.draw import strip

TEXT = {"min_length": 0, "charset": string.printable}


class GymEnv(gymnasium.Env):
    """One category; the seed of `reset` is the task's seed. All pictures are padded to one size."""
    action_space = spaces.Text(4000, **TEXT)
    observation_space = spaces.Dict({"text": spaces.Text(20_000, **TEXT),
                                     "image": spaces.Box(0, 255, (512, 512, 3), np.uint8)})

    def __init__(self, category: str, level: int = 0, split: str = "train"):
        self.kind, self.rewards = (category, level, split), gym.Rewards()

    def reset(self, seed=None, options=None):
        super().reset(seed=seed)
        number = int(self.np_random.integers(2 ** 31)) if seed is None else seed
        self.task = gym.Task(self.kind[0], number, *self.kind[1:])
        self.env = gym.make(self.task)
        return self.observation(self.env.reset()), {}

    def observation(self, obs):
        picture = ImageOps.pad(strip(obs.images if obs else []), (512, 512), color="white")
        return {"text": obs.text if obs else "", "image": np.asarray(picture)}

    def step(self, action):
        # Gymnasium requires a number: an error is a reward of nan here, named in the info.
        step = self.env.step(action)
        score = self.rewards.score(self.task, self.env.evidence()) if step.done else gym.Score(0.0)
        return (self.observation(step.obs), score.reward, step.done and not step.truncated,
                step.truncated, {"error": score.error})
