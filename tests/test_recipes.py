"""The recipes: our categories as others' environments, others' questions in our form. Skipped where
their packages are missing."""
import importlib
import inspect
import io
import json

import pytest
from PIL import Image
from recipes import mmstar, ocrbench, screenspot
from recipes.trl_environment import GymTask

import gym
import serve
from gym import make, Task
from lib.checkpoint import load_model
from lib.cli import UserError
from lib.common import ROOT
from lib.own_eval import read_questions
from lib.scoring import score
from model import sized
from sample import act
from tasks.base import box
from tokenizer import Tokenizer

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


@pytest.mark.slow
@pytest.mark.parametrize("package", ["openai", "anthropic"])
def test_a_client_plays_a_form_with_tools(package, monkeypatch, capsys):
    """Through the server, with the shipped demo: as in the gym, click by click."""
    pytest.importorskip(package)
    recipe = importlib.import_module(f"recipes.{package}_tools")
    model = load_model(ROOT / "ckpt" / "demo")
    with serve.running(model, api_key="k") as url:
        monkeypatch.setenv("OPENAI_BASE_URL", f"{url}/v1")
        monkeypatch.setenv("ANTHROPIC_BASE_URL", url)
        monkeypatch.setenv("OPENAI_API_KEY", "k")
        monkeypatch.setenv("ANTHROPIC_API_KEY", "k")
        rewards = [recipe.play(seed) for seed in (3, 5)]
    said = capsys.readouterr().out.splitlines()
    env, history = make(Task("gui_form", 3, 0, "test")), []
    obs = env.reset()
    assert rewards == [1, 1] and said[0] == env.goal and said[3] == "  reward 1"
    for line in said[1:3]:
        history.append(act(model, obs.images[0], env.goal, history))
        assert line.strip() == str(history[-1])
        obs = env.step(str(history[-1])).obs


# ---- public questions ---------------------------------------------------------------------------

def picture(width: int, height: int) -> bytes:
    file = io.BytesIO()
    Image.new("RGB", (width, height), "teal").save(file, "JPEG")
    return file.getvalue()


def converted(folder) -> list:
    """The questions of a converted file; none may be skipped."""
    questions, skipped = read_questions(str(folder / "questions.jsonl"), Tokenizer(512),
                                        sized("tiny"), 400)
    assert not skipped
    return questions


def test_mmstar(tmp_path):
    """The columns are those of the data card; pictures as bytes, or as the hub's {bytes, path}."""
    parquet = pytest.importorskip("pyarrow.parquet")
    pyarrow = pytest.importorskip("pyarrow")
    meta = {"source": "MMBench", "split": "val", "image_path": "images/0.jpg"}
    rows = [{"index": 7, "question": "What is it?\nOptions: A: a dog, B: a cat, C: none", "answer":
             "B", "category": "coarse perception", "l2_category": "image topic", "meta_info": meta},
            {"index": 9, "question": "How many?", "answer": "D", "category": "math",
             "l2_category": "geometry", "meta_info": meta}]
    for kind, image in (("bytes", picture(64, 64)),
                        ("hub", {"bytes": picture(64, 64), "path": None})):
        file, out = tmp_path / f"{kind}.parquet", tmp_path / kind
        parquet.write_table(pyarrow.Table.from_pylist([row | {"image": image} for row in rows]),
                            file)
        mmstar.convert(str(file), str(out))
        first, second = converted(out)
        assert [q.group for q in (first, second)] == ["coarse perception", "math"]
        assert (first.choices, second.choices) == (list("ABC"), list("ABCD"))
        assert first.text.endswith("C: none\nAnswer with the letter of the right option.")
        assert score("choice", "B: a cat", first.answers, first.choices) == 1
        assert (out / "pictures/0.jpg").read_bytes() == picture(64, 64)
    assert mmstar.letters("Choices:\n(A) 5\n(B) 6") == ["A", "B"]
    parquet.write_table(pyarrow.table({"question": ["?"]}), tmp_path / "other.parquet")
    for recipe, name in ((mmstar, "answer"), (ocrbench, "answer")):
        with pytest.raises(UserError, match=f"has no column {name}"):
            recipe.convert(str(tmp_path / "other.parquet"), str(tmp_path / "o"))


def test_ocrbench(tmp_path):
    parquet = pytest.importorskip("pyarrow.parquet")
    pyarrow = pytest.importorskip("pyarrow")
    image = {"bytes": picture(96, 32), "path": None}
    parquet.write_table(pyarrow.Table.from_pylist([
        {"dataset": "IIIT5K", "question": "what is written in the image?", "answer": ["CHAIN"],
         "question_type": "Regular Text Recognition", "image": image},
        {"dataset": "HME100k", "question": "Write it in LaTeX.", "answer": ["\\frac { 1 } { 2 }\n"],
         "question_type": "Handwritten Mathematical Expression Recognition", "image": image}]),
        tmp_path / "test-00000-of-00001.parquet")
    ocrbench.convert(str(tmp_path / "test-*.parquet"), str(tmp_path / "out"))
    word, formula = converted(tmp_path / "out")
    assert word.group == "Regular Text Recognition" and len(word.prompt.images) == 1
    assert score(word.metric, 'It says "Chain".', word.answers) == 1
    assert score(formula.metric, "$\\frac{1}{2}$", formula.answers) == 1


def test_screenspot(tmp_path):
    (tmp_path / "screenspotv2_image").mkdir()
    (tmp_path / "screenspotv2_image/pc_1.png").write_bytes(picture(200, 100))
    for platform, bbox in (("desktop", [20, 10, 40, 20]), ("web", [150, 50, 60, 50])):
        (tmp_path / f"screenspot_{platform}_v2.json").write_text(json.dumps([{
            "img_filename": "pc_1.png", "bbox": bbox, "instruction": "close this window",
            "data_type": "icon", "data_source": "windows"}]))
    screenspot.convert(str(tmp_path))
    desktop, web = converted(tmp_path)
    assert (desktop.group, web.group) == ("desktop", "web")
    assert desktop.answers == [[99.9, 99.9, 299.7, 299.7]]      # a tenth to three tenths of 999
    assert web.answers == [[749.2, 499.5, 999, 999]]            # cut at the picture's edge
    assert desktop.text.startswith("close this window\n")
    assert score("point-in-box", "click(200, 200)", desktop.answers) == 1
    for odd in ({"bbox": [1, 2]}, {"bbox": [1, 2, 3, "4"]}, {"img_filename": None}):
        entry = {"img_filename": "pc_1.png", "bbox": [1, 2, 3, 4], "instruction": "close", **odd}
        (tmp_path / "screenspot_web_v2.json").write_text(json.dumps([entry]))
        with pytest.raises(UserError, match="is not of ScreenSpot-v2"):
            screenspot.convert(str(tmp_path))
    with pytest.raises(UserError, match="has no screenspot_mobile"):
        screenspot.convert(str(tmp_path / "screenspotv2_image"))
