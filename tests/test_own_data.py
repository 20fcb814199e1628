"""Own data in the mixture: order, what is skipped and how that is told, held-out loss, resume."""
import base64
import io
import json
import multiprocessing
import pickle
import tarfile
from collections import Counter

import numpy as np
import pytest
from PIL import Image
from test_pretrain import after_step, alike, SMALL, state_of

import pretrain
from data import Packer, parse_data, Stream
from lib import common
from lib.batch import collate
from lib.checkpoint import load_tensors
from lib.cli import UserError
from lib.images import Unread
from lib.loader import SampleLoader
from lib.runs import checkpoints
from model import sized
from tokenizer import Tokenizer

TINY = sized("tiny")
TOKENS = Tokenizer(TINY.n_ranks)


def asked(picture: str, answer: str, question: str = "Which?") -> dict:
    content = [{"type": "image_url", "image_url": {"url": picture}},
               {"type": "text", "text": question}]
    return {"messages": [{"role": "user", "content": content},
                         {"role": "assistant", "content": answer}]}


def write_lines(path, lines) -> str:
    """A JSONL file of objects, and of texts as they are; returns its path."""
    path.parent.mkdir(exist_ok=True)
    texts = (line if isinstance(line, str) else json.dumps(line) for line in lines)
    path.write_text("\n".join(texts) + "\n", encoding="utf-8")
    return str(path)


def png(color="red", size=(32, 32), mode="RGB") -> bytes:
    file = io.BytesIO()
    Image.new(mode, size, color).save(file, "png")
    return file.getvalue()


@pytest.fixture
def folder(tmp_path):
    (tmp_path / "a.png").write_bytes(png())
    return tmp_path


def stream(spec: str, mix: tuple = (), **options) -> Stream:
    own, weights = parse_data(str(spec))
    return Stream(TINY, (*weights.items(), *mix), options.pop("seed", 0), own=own, **options)


def reply(document) -> str:
    """What is learnt from a document."""
    return TOKENS.decode(document.ids[document.weights > 0]).removesuffix("<|user|>")


# ---- sources of the mixture ---------------------------------------------------------------------

def test_data_are_named_by_their_files(folder):
    for name in ("cats.jsonl", "text.jsonl", "more/cats.jsonl", "A b-c.jsonl"):
        write_lines(folder / name, [asked("a.png", "yes")])
    paths = "cats.jsonl:2", "text.jsonl", "more/cats.jsonl:0.5", "A b-c.jsonl:1e-3"
    own, weights = parse_data(",".join(f"{folder}/{path}" for path in paths))
    assert weights == {"cats": 2, "text_2": 1, "cats_2": 0.5, "A_b_c": 0.001}
    assert [data.name for data in own] == list(weights)
    assert own[0].description() == "cats: 1 records, 0 of them held out, OpenAI messages"


@pytest.mark.parametrize("suffix,words", [
    (":x", "--data takes FILE:weight"), (":-1", "weights from 0 on"), (":nan", "weights from 0 on"),
    (":inf", "weights from 0 on"), (":0", "finite sum above 0; theirs is 0"),
    (",nowhere", "nowhere"), (".gone", "gone"), ("*.tar", "matches no file")])
def test_wrong_data_is_one_line(folder, suffix, words):
    path = write_lines(folder / "own.jsonl", [asked("a.png", "yes")])
    with pytest.raises(UserError, match=words) as error:
        stream(path + suffix)
    assert "\n" not in str(error.value)


def test_each_record_is_seen_once_an_epoch(folder):
    path = write_lines(folder / "own.jsonl", [asked("a.png", f"n{n}") for n in range(120)])
    some = stream(path)
    count, = (data.count for data in some.own)
    assert 100 < count < 120                # one in fifty is held out
    epochs = [[reply(some(i)[0]) for i in range(e * count, (e + 1) * count)] for e in range(2)]
    assert set(epochs[0]) == set(epochs[1]) and len(set(epochs[0])) == count
    assert epochs[0] != epochs[1]
    test = [data for data, in [parse_data(path, "test")[0]]][0]
    held = {reply(Stream(TINY, (("own", 1),), own=(test,))(i)[0]) for i in range(test.count)}
    assert len(held) == 120 - count and not held & set(epochs[0])
    again = pickle.loads(pickle.dumps(stream(path)))        # as a worker process gets it
    assert [reply(again(i)[0]) for i in range(20)] == epochs[0][:20]
    other = stream(path, seed=1)
    assert [reply(other(i)[0]) for i in range(20)] != epochs[0][:20]


def test_own_data_beside_the_gym(folder):
    path = write_lines(folder / "own.jsonl", [asked("a.png", "mine")] * 3)
    some = stream(path + ":3", (("point", 1.0), ("text", 0.0)))
    sources = Counter(some(i)[0].source for i in range(80))
    assert sources.keys() == {0, 1} and 40 < sources[0] < 75
    batch = collate([d for i in range(8) for d in some(i)], TINY)
    assert set(batch.source.tolist()) == {0, 1}


def test_long_texts_are_learnt_in_stretches(folder):
    lines = "".join(f"line {n}\n" for n in range(3000))
    path = write_lines(folder / "notes.jsonl", [{"text": lines}, {"text": "short"},
                                                {"text": "x" * 50_000}, {"text": "字" * 5000}])
    some, starts = stream(path, own_tokens=64), set()
    for i in range(60):
        [made] = some(i)
        assert 2 < len(made.ids) <= 64 and (made.weights[2:] == 1).all()
        text = TOKENS.decode(made.ids[2:])
        assert text == "short" or len(made.ids) == 64 or lines.endswith(text)
        starts |= {text.partition("\n")[0]} if text.startswith("line") else set()
    assert len(starts) > 8


def test_unread_pictures_have_the_shapes_and_pixels_of_read_ones(folder):
    for name, size in (("a", (32, 32)), ("b", (100, 40)), ("c", (640, 480))):
        noise = np.random.default_rng(0).integers(0, 256, (*size[::-1], 3), np.uint8)
        Image.fromarray(noise).save(folder / f"{name}.png")
    video = asked("", "moves")
    video["messages"][0]["content"][0] = {"type": "video", "video": ["a.png", "b.png"]}
    path = write_lines(folder / "own.jsonl", [asked(f"{n}.png", n) for n in "abc"] + [video])
    for i in range(8):
        [read], [unread] = stream(path)(i), stream(path, lazy=True)(i)
        assert (read.ids == unread.ids).all() and isinstance(unread.images[0], Unread)
        assert read.images[0].shape == unread.images[0].shape
        assert (read.images[0] == np.asarray(pickle.loads(pickle.dumps(unread.images[0])))).all()
    whole = (folder / "c.png").read_bytes()
    (folder / "c.png").write_bytes(whole[:len(whole) // 2])
    [late] = [stream(path, lazy=True)(i)[0].images[0] for i in range(4)
              if reply(stream(path, lazy=True)(i)[0]) == "c"]
    assert (np.asarray(late) == 128).all() and "c.png" in late.damage


# ---- what can't be used -------------------------------------------------------------------------

GOOD = [asked("a.png", "yes")] * 3
ROBOT = {"messages": [{"role": "user", "content": "x"}, {"role": "robot", "content": "y"}]}
TWO_MARKS = {"image": "a.png", "conversations": [{"from": "human", "value": "<image><image>"},
                                                 {"from": "gpt", "value": "y"}]}


@pytest.mark.parametrize("kind,line", [
    ("missing image", asked("gone.png", "y")), ("damaged picture", asked("fake.png", "y")),
    ("not an object", "[1, 2]"), ("not JSON", "{"), ("unknown role", ROBOT),
    ("image marks", TWO_MARKS), ("long strip", asked("strip.png", "y")),
    ("damaged data URI", asked("data:image/png;base64,!", "y")),
    ("image on the web", asked("https://example.com/a.png", "y"))])
def test_a_bad_record_is_passed_over_counted_and_named(folder, kind, line):
    (folder / "fake.png").write_text("no picture")
    (folder / "strip.png").write_bytes(png(size=(500, 1)))
    said = []
    packer = Packer(stream(write_lines(folder / "own.jsonl", [*GOOD, line])), 256, say=said.append)
    packer.batch()
    assert packer.state()["passed"].keys() == {kind} and packer.passed[kind] > 3
    [line] = said
    assert line.startswith(f"skipped: {kind} (own.jsonl: line 4") and "\n" not in line
    assert packer.skipped == 0


def test_counts_are_the_same_with_workers_and_after_a_resume(folder, monkeypatch):
    path = write_lines(folder / "own.jsonl", [*GOOD, "[1]", ROBOT, asked("gone.png", "y")])
    alone = Packer(stream(path), 128, say=lambda _: None)
    rows = [list(map(reply, alone.row())) for _ in range(6)]
    forking = multiprocessing.get_context("fork")       # quicker than to import all again
    monkeypatch.setattr(multiprocessing, "get_context", lambda _: forking)
    loader = SampleLoader(stream(path), workers=2, burst=16)
    try:
        some = Packer(loader, 128, say=lambda _: None)
        for _ in range(3):
            some.row()
        some, said = Packer(loader, 128, state=some.state(), say=print), []
        some.say = said.append
        again = [list(map(reply, some.row())) for _ in range(3)]
    finally:
        loader.close()
    assert again == rows[3:] and some.state() == alone.state() and sum(some.passed.values()) > 20
    assert said == []       # the first examples were named before


def test_held_out_records_are_used_once_and_bad_ones_left_out(folder):
    """Also where the only held-out record can't be used: that must not end a run."""
    lines = ["[]", asked("a.png", "one"), ROBOT, asked("a.png", "x" * 500), asked("a.png", "two"),
             asked("gone.png", "x")]
    path = write_lines(folder / "own.jsonl", lines)
    some, [[data], _] = stream(path), parse_data(path, "all")
    assert sorted(map(reply, some.once(data, 256, 10_000))) == ["one", "two"]
    assert len(some.once(data, 256, 10)) == 1
    [[data], _] = parse_data(write_lines(folder / "bad.jsonl", ["[]"]), "all")
    assert some.once(data, 256, 1000) == []


def test_one_good_record_is_enough_and_none_is_the_end(folder):
    path = write_lines(folder / "own.jsonl", [*GOOD[:1], *["[]"] * 9])
    assert [reply(stream(path)(i)[0]) for i in range(12)] == ["yes"] * 12
    path = write_lines(folder / "own.jsonl", ["[]"] * 9)
    with pytest.raises(UserError, match="^own: 18 records in a row .* last: not an object: own.js"):
        stream(path)(0)


@pytest.mark.parametrize("name,mode", [("B.PNG", "RGB"), ("c.jpg", "CMYK"), ("d.png", "I;16"),
                                       ("e.Jpeg", "L"), ("f.gif", "P"), ("g.tiff", "RGB")])
def test_pictures_of_any_kind_are_trained_on(folder, name, mode):
    Image.new(mode, (48, 32), 9 if mode == "P" else None).save(folder / name)
    [made] = stream(write_lines(folder / "own.jsonl", [asked(name, "yes")]))(0)
    assert made.images[0].shape == (32, 48, 3) and made.passed == ()


def test_a_picture_with_broken_metadata_is_trained_on(folder):
    image = Image.new("RGB", (32, 32), "red")
    exif = image.getexif()
    exif[0x0112] = 6
    image.save(folder / "b.jpg", exif=exif)
    data = bytearray((folder / "b.jpg").read_bytes())
    place = data.index(b"Exif") + 6
    data[place:place + 20] = b"\xff\x17" * 10
    (folder / "b.jpg").write_bytes(data)
    [made] = stream(write_lines(folder / "own.jsonl", [asked("b.jpg", "yes")]))(0)
    assert made.images[0].shape == (32, 32, 3) and made.passed == ()


def test_a_mark_in_a_question_is_text(folder):
    path = write_lines(folder / "own.jsonl", [asked("a.png", "yes", "A <|image|>, <|user|>?")])
    [made] = stream(path)(0)
    assert (made.ids == TOKENS.image).sum() == 4 and len(made.images) == 1
    assert len(collate([made], TINY).visual) == 4


def write_tar(path, members) -> str:
    with tarfile.open(path, "w") as tar:
        for name, data in members:
            entry = tarfile.TarInfo(name)
            entry.size = len(data)
            tar.addfile(entry, io.BytesIO(data))
    return str(path)


def test_a_tar_with_dots_upper_case_and_a_cut_end(folder):
    members = []
    for n in range(30):
        talk = {"conversations": [{"from": "human", "value": "<image>?"},
                                  {"from": "gpt", "value": f"n{n}"}]}
        members += [(f"._{n:03}.PNG", b"\0\5\x16\7"), (f"{n:03}.PNG", png()),
                    (f"{n:03}.json", json.dumps(talk).encode())]
    path = write_tar(folder / "shard.tar", members)
    some = stream(path)
    assert some.own[0].description().endswith("LLaVA conversations")
    seen = {reply(some(i)[0]) for i in range(some.own[0].count)}
    assert len(seen) == some.own[0].count > 25 and not any(some(i)[0].passed for i in range(30))
    cut = folder / "cut.tar"
    cut.write_bytes((folder / "shard.tar").read_bytes()[:40_000])
    some = stream(cut)
    [note] = some.own[0].shards.notes
    assert note.startswith(f"{cut}: it ")
    assert 3 < len({reply(some(i)[0]) for i in range(60)}) < 20


# ---- through pretrain.py ------------------------------------------------------------------------

def train(out, **changes) -> list[dict]:
    pretrain.run(pretrain.Args(**{**SMALL, "rows": 1, "mtp": 0, "out": str(out), **changes}))
    return common.read_log(out / "log.jsonl")


@pytest.fixture
def colors(folder):
    """40 pictures of four colours, as JSONL with data URIs; two lines are bad."""
    lines = []
    for n in range(40):
        color = ("red", "green", "blue", "white")[n % 4]
        uri = "data:image/png;base64," + base64.b64encode(png(color, (32 + n, 32))).decode()
        lines.append(asked(uri, color, f"Colour {n}?"))
    return write_lines(folder / "colors.jsonl", [*lines, "[]", asked("gone.png", "x")])


def test_a_run_stopped_amid_the_data_resumes_bit_for_bit(folder, colors, monkeypatch, capsys):
    """With a worker then, and beside the gym; what was skipped is counted on."""
    mixed = {"data": colors + ":2", "mix": "point", "steps": 4, "save_every": 9}
    whole = train(folder / "whole", **mixed)
    with monkeypatch.context() as patch:
        after_step(patch, lambda step: step == 2 and common.signal.raise_signal(15))
        with pytest.raises(KeyboardInterrupt):
            train(folder / "parts", **mixed)
    forking = multiprocessing.get_context("fork")
    monkeypatch.setattr(multiprocessing, "get_context", lambda _: forking)
    monkeypatch.setattr(pretrain, "SampleLoader",
                        lambda stream, workers, *_, **options: SampleLoader(stream, workers, 16))
    parts = train(folder / "parts", **mixed, resume=True, workers=1)
    assert [x["loss"] for x in parts] == [x["loss"] for x in whole] and len(whole) == 4
    a, b = (folder / run / "step_000004" for run in ("whole", "parts"))
    assert alike(load_tensors(a), load_tensors(b))
    assert alike(state_of(a)["position"], state_of(b)["position"])
    assert whole[-1]["skipped"] == parts[-1]["skipped"] > 1
    assert sum(state_of(a)["position"]["passed"].values()) == whole[-1]["skipped"]
    said = capsys.readouterr().out
    assert "colors: 42 records, " in said and "skipped in all: " in said
    write_lines(folder / "colors.jsonl", GOOD)
    with pytest.raises(UserError, match="^--data has changed since .*parts was saved") as error:
        train(folder / "parts", **mixed | {"steps": 5}, resume=True)
    assert "\n" not in str(error.value)


def test_held_out_losses_by_source(folder, colors, capsys):
    val = write_lines(folder / "val.jsonl", GOOD)
    log = train(folder / "run", data=colors, mix="point", val=val, steps=1, eval_every=1)
    found = {key: value for key, value in log[0].items() if key.startswith("held_out")}
    assert found.keys() == {"held_out", "held_out_gym", "held_out_val"}
    assert min(found["held_out_gym"], found["held_out_val"]) < found["held_out"] < max(
        found["held_out_gym"], found["held_out_val"])
    assert "colors: 42 records, OpenAI messages" in capsys.readouterr().out     # all are trained on
    log = train(folder / "alone", data=val, steps=1, eval_every=1)
    assert not any(key.startswith("held_out") for key in log[0])
    assert "val has no held-out record to use: --val=FILE would give" in capsys.readouterr().out
    kept = json.loads((folder / "alone/config.json").read_text())
    assert (kept["data"], kept["mix"]) == (val, "")


def test_ranks_with_other_shards_are_refused(folder, colors, monkeypatch):
    monkeypatch.setattr(common, "of_all_ranks", lambda number: [number, number + 1])
    with pytest.raises(UserError, match="^--data: ranks see different files .* the same shards$"):
        train(folder / "run", data=colors)


@pytest.mark.parametrize("harm,words", [
    (lambda p: p.rename(p.with_suffix(".jsonx")), "'.jsonx' can't be read"),
    (lambda p: p.write_text(""), "no record"), (lambda p: p.unlink(), "is not there"),
    (lambda p: p.write_text("5\n" * 9), "9 records|18 records in a row can't be used")])
def test_data_with_nothing_to_learn_end_a_run_at_once(folder, colors, harm, words):
    path = folder / "colors.jsonl"
    harm(path)
    found = path if path.exists() or words == "is not there" else path.with_suffix(".jsonx")
    with pytest.raises(UserError, match=words) as error:
        train(folder / "run", data=str(found))
    assert "\n" not in str(error.value) and not checkpoints(folder / "run")


@pytest.mark.slow
def test_a_plan_with_own_data(folder, colors, capsys):
    train_args = {**SMALL, "data": colors, "plan": True, "out": str(folder / "run")}
    pretrain.run(pretrain.Args(**train_args))
    assert "ms a sample" in capsys.readouterr().out and not (folder / "run").exists()
