"""Streams, worker processes, packing, batches, and picture files of every kind."""
import atexit
import functools
import json
import multiprocessing
import os
import select
import signal
import subprocess
import sys
import threading
import weakref

import numpy as np
import pytest
from PIL import Image

import gym
from conftest import odd_config, random_document
from data import (collate, document, Document, one_turn, pack_rows, Packer, parse_mix, sight,
                  Stream, task_pixels, unit_of)
from lib.cli import UserError
from lib.common import ROOT
from lib.images import open_image, resize
from lib.loader import SampleLoader
from model import sized
from tasks.base import IMAGE, Message, Task
from tokenizer import Tokenizer

TINY = sized("tiny")
DEFAULT = parse_mix("gym:8,text:1,code:1", sight(TINY))
TOKENS = Tokenizer(TINY.n_ranks)


def stream(mix=DEFAULT, seed=0, **options) -> Stream:
    return Stream(TINY, mix, seed, **options)


def same(a, b) -> bool:
    """Two documents, or two samples of several, are equal."""
    if isinstance(a, list):
        return len(a) == len(b) and all(map(same, a, b))
    return (np.array_equal(a.ids, b.ids) and np.array_equal(a.weights, b.weights)
            and a.source == b.source and len(a.images) == len(b.images)
            and all(map(np.array_equal, a.images, b.images)))


# ---- streams and worker processes ---------------------------------------------------------------

def test_a_sample_depends_on_seed_and_index_only():
    one, two = stream(levels=3), stream(levels=3)
    forward, backward = ([s(i) for i in order] for s, order in
                         ((one, range(20)), (two, reversed(range(20)))))
    assert all(map(same, forward, reversed(backward)))
    assert not any(same(forward[i], forward[i + 1]) for i in range(19))
    assert sum(same(a, stream(seed=1, levels=3)(i)) for i, a in enumerate(forward)) == 0


@pytest.mark.slow
def test_workers_make_the_same_samples_and_survive_the_first_ctrl_c():
    """Two processes, bursts of 16, some samples skipped as after a resume; at first one burst at a
    time, then the next while the last is used. A terminal sends Ctrl-C to all processes of a run,
    and the trainer may need samples before it saves; the second Ctrl-C ends the workers."""
    before = set(multiprocessing.active_children())
    heard = signal.signal(signal.SIGINT, signal.default_int_handler)
    alone, loader = stream(), SampleLoader(stream(), workers=2, burst=16)
    try:
        assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
        first, second = set(multiprocessing.active_children()) - before
        os.kill(first.pid, signal.SIGINT)           # while it starts
        for i in [3, 5, *range(20, 60)]:
            loader.overlap = i > 40
            assert same(loader(i), alone(i)), i
        loader.overlap = False
        os.kill(second.pid, signal.SIGINT)          # while it waits
        assert same(loader(100), alone(100))
        os.kill(second.pid, signal.SIGINT)
        second.join()
    finally:
        signal.signal(signal.SIGINT, heard)
        loader.close()


class Bulky:
    """A stream whose samples fill a pipe several times over."""

    def __call__(self, i):
        return np.full(20_000 * (1 + i % 3), i)


@pytest.mark.slow
def test_a_request_while_the_burst_before_is_on_its_way():
    loader = SampleLoader(Bulky(), workers=2, burst=4, overlap=True)
    try:
        for i in range(0, 3000, 50):
            made = loader(i)
            assert len(made) == 20_000 * (1 + i % 3) and (made == i).all()
    finally:
        loader.close()


class Broken:
    """A stream with a sample 5 that can't be made."""

    def __init__(self, how, mark=None):
        self.how, self.mark = how, mark

    def __call__(self, i):
        if i == 5:
            self.how(self.mark)
        return i


def refuse(mark):
    raise ValueError("it is cursed. Advice.")


def die_once(mark):
    if not mark.exists():
        mark.touch()
        os.kill(os.getpid(), signal.SIGKILL)


def die(mark):
    os._exit(1)


@pytest.fixture
def quick_workers(monkeypatch):
    """Fork the one worker of a test, which saves it three seconds of imports."""
    forking = multiprocessing.get_context("fork")
    monkeypatch.setattr(multiprocessing, "get_context", lambda _: forking)


@pytest.mark.parametrize("workers", [0, 1])
def test_a_sample_that_cant_be_made_is_named(workers, quick_workers, capfd):
    """In one line, as a UserError, so that the run saves; the traceback is on stderr."""
    loader = SampleLoader(Broken(refuse), workers, burst=4)
    try:
        assert [loader(i) for i in range(4)] == [0, 1, 2, 3]
        for _ in range(2):  # asked again, it fails again
            with pytest.raises(UserError, match="^sample 5 can't be .*ValueError: it is cursed$"):
                loader(5)
        assert loader(6) == 6
    finally:
        loader.close()
    assert "in refuse" in capfd.readouterr().err


def test_an_error_in_a_category_names_the_task(monkeypatch, capfd):
    monkeypatch.setattr(gym, "demonstrate", lambda *_, **parts: refuse(None))
    with pytest.raises(UserError, match="^sample 3 can't be made: ValueError: it is cursed$"):
        SampleLoader(stream(parse_mix("point")))(3)
    assert "while drawing Task(category='point', seed=" in capfd.readouterr().err


def test_a_killed_worker_is_started_again(tmp_path, quick_workers, capfd):
    """As the kernel kills it when memory runs out. Requests that wait behind are asked again."""
    loader = SampleLoader(Broken(die_once, tmp_path / "mark"), workers=1, burst=4)
    try:
        assert loader(0) == 0
        loader._request(4)
        assert [loader(i) for i in range(8, 12)] == [8, 9, 10, 11]
        assert [loader(i) for i in range(4, 8)] == [4, 5, 6, 7]
    finally:
        loader.close()
    [line] = capfd.readouterr().err.splitlines()
    assert "has died (exit code -9" in line and line.endswith("started again")


def test_a_worker_that_dies_again_and_again_is_a_user_error(quick_workers, capfd):
    loader = SampleLoader(Broken(die), workers=1, burst=4)
    try:
        with pytest.raises(UserError, match=r"samples 4 and on .* \(exit code 1; .* three times"):
            loader(4)
    finally:
        loader.close()
    assert capfd.readouterr().err.count("started again") == 2


def test_closed_loaders_leave_nothing(monkeypatch):
    """No threads, no processes, no files, no reference that keeps them and their samples. A worker
    that is still starting, or draws, is ended as well."""
    def count():
        return (threading.active_count(), len(multiprocessing.active_children()),
                len(os.listdir("/dev/fd")))
    SampleLoader(stream(), workers=1).close()       # starts what Python keeps for all processes
    before, registered = count(), []
    monkeypatch.setattr(atexit, "register", registered.append)
    for _ in range(5):
        loader = SampleLoader(stream(), workers=2, overlap=True)
        loader._request(0)
        alive = weakref.ref(loader)
        loader.close()
        del loader
        assert alive() is None and count() == before and not registered


class Endless:
    """A stream that says that it draws, and draws for ever (half a minute)."""

    def __init__(self, fifo):
        self.fifo = fifo

    def __call__(self, i):
        signal.alarm(30)
        with open(self.fifo, "wb", buffering=0) as file:
            file.write(b"!")
            while True:
                pass


def test_a_worker_ends_when_its_trainer_is_killed(tmp_path, quick_workers):
    """With SIGKILL, in the middle of a sample: the pipe that it holds open is closed."""
    os.mkfifo(tmp_path / "fifo")
    trainer = os.fork()
    if not trainer:
        try:
            SampleLoader(Endless(tmp_path / "fifo"), workers=1)(0)
        finally:
            os._exit(1)
    with open(tmp_path / "fifo", "rb", buffering=0) as file:
        assert file.read(1) == b"!"
        os.kill(trainer, signal.SIGKILL)
        os.waitpid(trainer, 0)
        ended, _, _ = select.select([file], [], [], 20)
        assert ended and file.read(1) == b""


def test_mixture_shares_follow_the_weights():
    some = stream(parse_mix("gui_form:6,text:3,code:1,point:0"))
    sources = [some(i)[0].source for i in range(600)]
    shares = np.bincount(sources, minlength=4) / 600
    assert np.abs(shares - [0.6, 0.3, 0.1, 0]).max() < 0.06 and shares[3] == 0


def test_gym_means_every_category():
    mix = dict(parse_mix("gym:8,text"))
    assert list(mix) == [*gym.names(), "text"] and mix["text"] == 1
    assert sum(mix.values()) == pytest.approx(9) and len({mix[n] for n in gym.names()}) == 1


def test_the_weights_of_a_name_given_twice_are_added():
    mix = parse_mix("point:2,gym,point", sight(TINY))
    own = 1 / len(gym.names(sight(TINY)))
    assert dict(mix)["point"] == pytest.approx(3 + own) and len(mix) == len(dict(mix))


def test_levels_begin_with_the_easy_one(monkeypatch):
    tasks, demonstrate = [], gym.demonstrate
    monkeypatch.setattr(gym, "demonstrate",
                        lambda task, *_, **parts: tasks.append(task) or demonstrate(task))
    some = stream(parse_mix("gui_form"), levels=3, easy_samples=20, split="test")
    for i in range(60):
        some(i)
    assert {t.level for t in tasks[:20]} == {0} and {t.level for t in tasks[20:]} == {0, 1, 2}
    assert {t.split for t in tasks} == {"test"} and len({t.seed for t in tasks}) == 60


def test_parts_show_screens_but_never_an_episode():
    some = stream(parse_mix("gui_form"), parts=("gui_form",))
    for i in range(20):
        for d in some(i):
            said = TOKENS.decode(d.ids[d.ids < TOKENS.n_ranks].tolist())
            assert "Tick " in said and "Press OK" not in said
    for name in ("counter", "text", "point"):
        with pytest.raises(UserError, match=f"no questions about the screens of '{name}'"):
            stream(parse_mix("gui_form,text,point"), parts=(name,))
    with pytest.raises(UserError, match="gui_form, which is no part of --mix"):
        stream(parse_mix("point"), parts=("gui_form",))


def test_the_test_split_differs_from_the_training_split():
    mix = parse_mix("gym", sight(TINY))
    train, test = stream(mix), stream(mix, split="test")
    assert not any(same(train(i), test(i)) for i in range(12))


def test_one_turn_of_a_dialogue_brings_the_pictures_along():
    talk = gym.demonstrate(Task("point", 3))[0]
    for turn in range(len(talk) // 2):
        question, reply = one_turn(talk, turn)
        assert question.images == talk[0].images and question.text.count("<|image|>") == 1
        assert question.text.endswith(talk[2 * turn].text) and reply == talk[2 * turn + 1]
    some = stream(parse_mix("point"))
    samples = [some(i) for i in range(200)]
    turns = [(made[0].ids == TOKENS.special["<|assistant|>"]).sum() for made in samples]
    assert 0.9 < np.mean(np.array(turns) == 1) < 0.99       # the rest are whole dialogues


def test_questions_about_one_picture_share_its_pixels():
    """Up to three documents of different words and one picture; the encoder sees it once."""
    some, several = stream(parse_mix("point,gui_form")), 0
    for i in range(40):
        made = some(i)
        assert 1 <= len(made) <= 3 and len({d.ids.tobytes() for d in made}) == len(made)
        assert all(d.images is made[0].images for d in made)
        several += len(made) > 1
        batch = collate(made + made[:1], TINY)
        assert len(batch.grids) == 1 and len(batch.patches) == 64
        assert batch.visual.tolist() == [*range(16)] * (len(made) + 1)
    assert several > 25


def test_the_own_question_of_a_picture_is_always_among_those_asked():
    mix = parse_mix("shape_attr,ocr_line")
    some, own = stream(mix), stream(mix, own_question=True)
    asked = 0
    for i in range(60):
        rng = np.random.default_rng([own.seed, i])
        name = mix[int(np.searchsorted(own.edges, rng.random(), "right"))][0]
        question = own._conversations(rng, name, i)[0][0].text.replace(IMAGE, "")
        prompts = [[TOKENS.decode(d.ids) for d in made] for made in (some(i), own(i))]
        assert question in prompts[1][0] and len(prompts[0]) == len(prompts[1])
        asked += any(question in prompt for prompt in prompts[0])
    assert asked < 60       # without the option it is one of three out of up to five


def test_gym_means_what_the_model_can_see():
    """A model sees a category if a picture of `task_pixels` fits into its visual tokens."""
    assert sight(TINY) == 64 and "chart_read" not in dict(parse_mix("gym", 64))
    assert set(gym.names(64)) < set(gym.names()) == set(dict(parse_mix("gym")))
    for config in (*map(sized, ("tiny", "mini", "small", "base")), *map(odd_config, range(3))):
        seen = [name for name in gym.names()
                if (task_pixels(name, config) / unit_of(config)) ** 2 <= config.max_tokens]
        assert gym.names(sight(config)) == seen


def test_a_category_that_the_model_cant_see_is_refused():
    """By each size that it is given, where a named picture would have been made smaller."""
    assert parse_mix("doc_qa:2", sight(sized("mini"))) == (("doc_qa", 2.0),)
    with pytest.raises(UserError, match="^--mix names doc_qa, .* of 256 pixels; .* sees 64, and"):
        parse_mix("gym,doc_qa", sight(TINY))


def test_every_size_of_model_has_as_many_visual_tokens():
    mix = parse_mix("point,gui_click")
    for size, side in (("tiny", 64), ("mini", 64), ("small", 112), ("base", 112)):
        config = sized(size)
        [made, *_] = Stream(config, mix)(0)
        assert (made.ids == config.image_token_id).sum() == 16
        assert [image.shape for image in made.images] == [(side, side, 3)]
    small = sized("small")
    assert task_pixels("doc_qa", TINY) == 256 and task_pixels("doc_qa", small) == 448
    assert [task_pixels("point", small, asked) for asked in (1, 64, 100)] == [64, 84, 112]
    [made, *_] = Stream(small, mix, pixels=200)(0)
    assert made.images[0].shape == (224, 224, 3)
    for config, most in ((TINY, 64), (small, 896), (sized("base"), 1024)):
        with pytest.raises(UserError, match=f"--pixels={most + 1} is more .* see: {most}"):
            Stream(config, mix, pixels=most + 1)


@pytest.mark.parametrize("mix", ["point:inf", "point:nan", "point:-1", "point:-inf", ",", "",
                                 "point:0", "point:1e308,text:1e308", "point:many", "point:1e400"])
def test_wrong_weights_are_refused(mix):
    with pytest.raises(UserError, match="^--mix takes [^\n]*$"):
        parse_mix(mix)


def test_the_atlas_is_a_source_of_text():
    [made] = stream(parse_mix("atlas"))(3)
    assert TOKENS.decode(made.ids.tolist()).strip().endswith(".") and not made.images


def test_only_replies_are_learnt():
    tokens = Tokenizer(TINY.n_ranks)
    picture = Image.new("RGB", (64, 64), "red")
    made = document([Message("user", "<|image|>What?", (picture,)), Message("assistant", "Red.")],
                    tokens, TINY)
    assert tokens.decode(made.ids[made.weights > 0]) == "Red.<|user|>"
    assert (made.ids == tokens.image).sum() == 16 and made.images[0].shape == (64, 64, 3)


# ---- packing ------------------------------------------------------------------------------------

def lengths(i: int) -> list[Document]:
    """Sample i: its own number, 1 to 90 times, in one document or two."""
    n = int(np.random.default_rng(i).integers(1, 91))
    whole = Document(np.full(n, i, np.int32), np.ones(n, np.float32))
    half = Document(whole.ids[:n // 2], whole.weights[:n // 2])
    return [half, half] if i % 3 == 0 and n > 1 else [whole]


def contents(row) -> list[int]:
    """The samples in a row, each once."""
    return list(dict.fromkeys(int(made.ids[0]) for made in row))


def test_packing_loses_and_doubles_nothing():
    packer = Packer(lengths, room=100, window=16)
    rows = [packer.row() for _ in range(200)]
    assert all(0 < sum(len(d.ids) for d in row) <= 100 for row in rows)
    seen = sorted(i for row in rows for i in contents(row))
    waiting = packer.state()["waiting"]
    assert sorted(seen + waiting) == list(range(packer.next)) and len(waiting) < 16


def test_the_oldest_goes_first():
    packer = Packer(lengths, room=100, window=16)
    for _ in range(50):
        oldest = packer.state()["waiting"][:1]
        assert contents(packer.row())[:1] == oldest or not oldest


def test_packing_goes_on_from_its_state():
    packer = Packer(lengths, room=80, window=16)  # some don't fit and are skipped
    for _ in range(20):
        packer.row()
    state = json.loads(json.dumps(packer.state()))
    other = Packer(lengths, room=80, window=16, state=state)
    for _ in range(20):
        assert contents(packer.row()) == contents(other.row())
    assert packer.state() == other.state() and packer.skipped > 0


@pytest.mark.parametrize("room", [2048, 4096, 16384, 32768])
def test_little_is_padded_however_long_a_row_is(room):
    """The samples of a real mixture, drawn once and repeated: drawing them is what takes long."""
    packer = Packer(lambda i: drawn()[i % len(drawn())], room)
    count = max(4, 80_000 // room)
    used = [sum(len(d.ids) for d in packer.row()) for _ in range(count)]
    assert 1 - sum(used) / (count * room) < 0.03
    # What waits: two rows' tokens and the last sample, or 64 samples.
    waiting = [sum(len(d.ids) for d in sample) for _, sample, _ in packer.waiting]
    assert sum(waiting) < 2 * room + 1000 or len(waiting) < 64


@functools.cache
def drawn() -> list[list[Document]]:
    made = stream(levels=2, easy_samples=200)
    return [made(i) for i in range(400)]


@pytest.mark.parametrize("room,count", [(2048, 128), (16384, 256)])
@pytest.mark.parametrize("ranks", [2, 4, 7])
def test_rows_are_as_many_on_each_rank(room, count, ranks):
    """As the update of RL deals them out. The longest rank has at most a tenth more than the mean;
    with full rows it has twice as much in the worst of these cases."""
    rng = np.random.default_rng(0)
    documents = [Document(np.full(n, 1, np.int32), np.ones(n, np.float32))
                 for n in rng.integers(60, 400, count)]
    rows = pack_rows(documents, room, ranks)
    used = [sum(len(d.ids) for d in row) for row in rows]
    assert max(used) <= room and sum(used) == sum(len(d.ids) for d in documents)
    assert max(sum(used[rank::ranks]) for rank in range(ranks)) < 1.1 * sum(used) / ranks
    assert max(map(len, pack_rows(documents[:1], room, ranks))) == 1 and not pack_rows([], 9, ranks)


# ---- batches ------------------------------------------------------------------------------------

def test_the_worked_example_of_the_docstring():
    picture = Image.new("RGB", (32, 32), "red")
    messages = [Message("user", "<|image|>Red?", (picture,)), Message("assistant", "yes")]
    made = document(messages, TOKENS, TINY)
    assert [TOKENS.decode([i]) for i in made.ids.tolist()] == [
        "[gMASK]", "<sop>", "<|user|>", "\n", "<|begin_of_image|>", *["<|image|>"] * 4,
        "<|end_of_image|>", "Re", "d", "?", "<|assistant|>", "\n", "<think>", "</think>", "\n",
        "y", "es", "<|user|>"]
    assert len(made.ids) == 21 and made.weights.tolist() == [0] * 18 + [1] * 3
    batch = collate([made, made], TINY, room=48)
    assert batch.cu_seqlens.tolist() == [0, 21, 42, 48]
    assert batch.patches.shape == (16, 1, 192) and batch.grids.tolist() == [[1, 4, 4]]
    assert batch.visual.tolist() == [0, 1, 2, 3] * 2
    assert batch.tokens[42:].tolist() == [TOKENS.special["<|endoftext|>"]] * 6



def test_a_batch_by_its_parts():
    config = odd_config()
    parts = [random_document(config, sizes, seed=i) for i, sizes in
             enumerate([((4, 6), (2, 2)), (), ((2, 4),)])]
    parts[1].extras["advantage"] = np.full(len(parts[1].ids), 2, np.float32)
    sizes = [len(p.ids) for p in parts]
    batch = collate(parts, config, room=100)
    assert batch.cu_seqlens.tolist() == [0, *np.cumsum(sizes), 100]
    assert batch.tokens[:sum(sizes)].tolist() == [i for p in parts for i in p.ids]
    assert batch.grids.tolist() == [[1, 4, 6], [1, 2, 2], [1, 2, 4]] and len(batch.patches) == 36
    assert batch.source.tolist() == [0, 0, 0, -1]
    starts = batch.cu_seqlens[:-1].long()
    assert (batch.weights[starts] == 0).all() and (batch.positions[:, starts] == 0).all()
    assert batch.weights.sum() == sum(sizes) - 3
    assert (batch.tokens[sum(sizes):] == config.n_ranks).all()
    assert batch.extras["advantage"].sum() == 2 * sizes[1]


@pytest.mark.parametrize("harm", ["image", "token"])
def test_pictures_and_image_tokens_must_agree(harm):
    config = odd_config()
    made = random_document(config)
    if harm == "image":
        made.images.pop()
    else:
        made.ids[0] = config.image_token_id
    with pytest.raises(ValueError, match="image tokens for"):
        collate([made], config)


# ---- picture files ------------------------------------------------------------------------------

def colour(image, x=2, y=2) -> tuple:
    assert image.mode == "RGB"
    return image.getpixel((x, y))


def near(a, b, most=12) -> bool:
    return max(abs(x - y) for x, y in zip(a, b, strict=True)) <= most


@pytest.mark.parametrize("name", ["a.png", "a.jpg", "a.gif", "a.webp", "a.bmp", "a.tiff"])
def test_plain_pictures(tmp_path, name):
    Image.new("RGB", (9, 5), (200, 30, 60)).save(tmp_path / name)
    image = open_image(tmp_path / name)
    assert image.size == (9, 5) and near(colour(image), (200, 30, 60))


def test_transparency_becomes_white(tmp_path):
    picture = Image.new("RGBA", (8, 8), (255, 0, 0, 255))
    picture.paste((0, 0, 0, 0), (0, 0, 4, 8))
    picture.paste((0, 0, 0, 128), (4, 4, 8, 8))
    picture.save(tmp_path / "rgba.png")
    grey = Image.new("LA", (8, 8), (0, 0))
    grey.save(tmp_path / "la.png")
    palette = Image.new("P", (8, 8), 1)
    palette.putpalette([10, 20, 30, 40, 50, 60])
    palette.save(tmp_path / "p.png", transparency=1)
    seen = open_image(tmp_path / "rgba.png")
    assert colour(seen) == (255, 255, 255) and colour(seen, 6) == (255, 0, 0)
    assert near(colour(seen, 6, 6), (127, 127, 127))
    assert colour(open_image(tmp_path / "la.png")) == (255, 255, 255)
    assert colour(open_image(tmp_path / "p.png")) == (255, 255, 255)


def test_palettes_and_cmyk_and_one_bit(tmp_path):
    palette = Image.new("P", (8, 8), 1)
    palette.putpalette([10, 20, 30, 40, 50, 60])
    palette.save(tmp_path / "p.png")
    Image.new("CMYK", (8, 8), (0, 255, 255, 0)).save(tmp_path / "cmyk.jpg")
    Image.new("1", (8, 8), 1).save(tmp_path / "1.png")
    assert colour(open_image(tmp_path / "p.png")) == (40, 50, 60)
    assert near(colour(open_image(tmp_path / "cmyk.jpg")), (255, 0, 0), 30)
    assert colour(open_image(tmp_path / "1.png")) == (255, 255, 255)


@pytest.mark.parametrize("name", ["deep.png", "deep.tiff"])
def test_sixteen_bits_become_eight(tmp_path, name):
    values = np.arange(64, dtype=np.uint16).reshape(8, 8) * 1024
    Image.fromarray(values).save(tmp_path / name)
    image = open_image(tmp_path / name)
    for x, y in ((0, 0), (3, 2), (7, 7)):
        assert near(colour(image, x, y), (int(values[y, x]) >> 8,) * 3, 1)


def test_a_turned_photo_is_turned_upright(tmp_path):
    picture = Image.new("RGB", (16, 8), "white")
    picture.paste("red", (0, 0, 8, 8))
    exif = Image.Exif()
    exif[0x0112] = 6  # to be shown a quarter turn clockwise
    picture.save(tmp_path / "turned.jpg", exif=exif)
    image = open_image(tmp_path / "turned.jpg")
    assert image.size == (8, 16)
    assert near(colour(image, 4, 3), (255, 0, 0), 30) and near(colour(image, 4, 12), (255,) * 3, 30)


def refused(path) -> str:
    with pytest.raises(UserError) as error:
        open_image(path)
    assert "\n" not in str(error.value)
    return str(error.value)


def test_files_that_are_no_pictures_are_refused(tmp_path):
    (tmp_path / "empty.png").write_bytes(b"")
    (tmp_path / "text.png").write_text("I am a picture\n")
    assert "it is empty" in refused(tmp_path / "empty.png")
    assert "can't be read as a picture" in refused(tmp_path / "text.png")
    assert "no picture at" in refused(tmp_path / "missing.png")
    assert "no picture at" in refused(tmp_path)


@pytest.mark.parametrize("kind", ["png", "jpg", "gif", "bmp", "tiff", "webp", "ico", "ppm", "tga"])
def test_damaged_pictures_are_refused_or_read(tmp_path, kind):
    """Cut off at any byte, or with any byte changed: a picture or one clear line."""
    noise = np.random.default_rng(0).integers(0, 256, (16, 16, 3)).astype(np.uint8)
    path = tmp_path / f"a.{kind}"
    Image.fromarray(noise).save(path)
    whole = path.read_bytes()
    refusals = 0
    for at in sorted({*range(0, min(len(whole), 120)), *range(0, len(whole), 37)}):
        for data in (whole[:at], whole[:at] + bytes([whole[at] ^ 0xFF]) + whole[at + 1:]):
            path.write_bytes(data)
            try:
                assert open_image(path).mode == "RGB"
            except UserError as error:
                refusals += 1
                assert "\n" not in str(error)
    assert refusals > 10


def test_nothing_is_printed_about_odd_metadata(tmp_path):
    """In a process of its own, as pytest has filters of its own for warnings."""
    path = tmp_path / "odd.jpg"
    Image.new("RGB", (8, 8)).save(path, exif=b"Exif\0\0II*\0\x08\0\0\0\x05\0\x12\x01")
    ours = f"import lib; from lib.images import open_image; open_image({str(path)!r})"
    plain = f"from PIL import Image; Image.open({str(path)!r}).getexif()"
    for program, warned in ((plain, True), (ours, False)):
        done = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True,
                              text=True, timeout=100)
        assert done.returncode == 0 and ("UserWarning" in done.stderr) == warned, done.stderr


@pytest.mark.filterwarnings("ignore:Image size")
@pytest.mark.parametrize("most", [60, 20])
def test_a_bomb_is_not_unpacked(tmp_path, monkeypatch, most):
    """Pillow warns above the limit and raises above twice the limit; we refuse both."""
    Image.new("RGB", (10, 10)).save(tmp_path / "bomb.png")
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", most)
    assert f"over {most} pixels" in refused(tmp_path / "bomb.png")


def test_a_ribbon_is_refused():
    with pytest.raises(UserError, match="5000x1 pixels") as error:
        resize(Image.new("RGB", (5000, 1)), TINY)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("w,h", [(1, 1), (1, 150), (3000, 2000), (64, 64), (70, 33)])
def test_any_other_size_fits_the_model(w, h):
    pixels = resize(Image.new("RGB", (w, h), (9, 8, 7)), TINY)
    unit = TINY.vision.patch_size * 2
    rows, columns = pixels.shape[0] / unit, pixels.shape[1] / unit
    assert rows % 1 == columns % 1 == 0 and TINY.min_tokens <= rows * columns <= TINY.max_tokens
    assert pixels.dtype == np.uint8 and (pixels == (9, 8, 7)).all()
