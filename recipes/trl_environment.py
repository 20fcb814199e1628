"""Our categories inside TRL: with `GRPOTrainer(..., environment_factory=GymTask)` each rollout has
an environment of its own, whose public methods are the model's tools. Needs `pip install trl`.

    rows = [{"prompt": [{"role": "user", "content": "Reply by the tool.\\n"}],
             "category": "counting", "seed": seed} for seed in range(1000)]
    GRPOTrainer(model, args=GRPOConfig(...), train_dataset=Dataset.from_list(rows),
                environment_factory=GymTask).train()
"""
import gym


class GymTask:
    """`reset` takes a row of the dataset; `act` is the only tool; our verifier gives the reward."""

    def reset(self, category: str, seed: int, level: int = 0, **_) -> list[dict]:
        self._task = gym.Task(category, seed, level)
        self._env, self._rewards = gym.make(self._task), gym.Rewards()
        return self._blocks(self._env.reset())

    def act(self, reply: str) -> list[dict]:
        """
        Answer the question, or take the next action.

        Args:
            reply: The answer between its box marks, or an action such as click(412, 377).
        """
        step = self._env.step(reply)
        return self._blocks(step.obs) if step.obs else [{"type": "text", "text": "The end."}]

    def get_reward(self) -> float | None:
        score = self._rewards.score(self._task, self._env.evidence())
        return None if score.error else score.reward        # None: TRL leaves the sample out

    def _blocks(self, obs):
        texts = [{"type": "text", "text": text} for text in obs.text.split(gym.IMAGE)]
        images = [{"type": "image", "image": image} for image in obs.images]
        mixed = [block for pair in zip(texts, [*images, None]) for block in pair]
        return [block for block in mixed if block and block.get("text") != ""]
