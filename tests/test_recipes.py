"""The recipes: our categories as others' environments. Skipped where their packages are missing."""
import inspect

import pytest
from recipes.trl_environment import GymTask

import gym
from gym import make, Task
from tasks.base import box

NAMES = ("counting", "gui_form", "text_tools", "video_events")


@pytest.mark.parametrize("name", NAMES)
def test_gymnasium(name):
    checker = pytest.importorskip("gymnasium.utils.env_checker")
    from recipes.gymnasium_env import GymEnv
    env = GymEnv(name, level=1)
    checker.check_env(env, skip_render_check=True)
    env.reset(seed=3)
    for reply in env.env.oracle():
        seen, reward, done, truncated, info = env.step(reply)
        assert env.observation_space.contains(seen) and reward == done and not truncated
    assert done and info == {"error": None}


@pytest.mark.parametrize("name", NAMES)
def test_trl(name):
    """What TRL 1.16 asks of an environment: it calls reset with a row of the data set, offers the
    public methods as tools, and takes lists of blocks for what a tool gives back."""
    env, task = GymTask(), Task(name, 3, 1)
    blocks = env.reset(prompt=[], category=name, seed=3, level=1)
    obs = make(task).reset()
    assert [b["image"].tobytes() for b in blocks if b["type"] == "image"] == [
        image.tobytes() for image in obs.images]
    assert "".join(b.get("text", gym.IMAGE) for b in blocks) == obs.text
    for reply in env._env.oracle():
        assert all(b["type"] in ("text", "image") for b in env.act(reply))
    assert env.get_reward() == 1
    env.reset(category=name, seed=4)                # instances are used again
    assert env.get_reward() == 0 and env.act(box("?"))


def test_trl_finds_one_tool_and_can_describe_it():
    utils = pytest.importorskip("transformers.utils")
    public = [name for name, _ in inspect.getmembers(GymTask, inspect.isfunction) if name[0] != "_"]
    assert public == ["act", "get_reward", "reset"]
    schema = utils.get_json_schema(GymTask().act)["function"]
    assert schema["name"] == "act" and list(schema["parameters"]["properties"]) == ["reply"]
