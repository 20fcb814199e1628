"""Pictures with captions: their forms, languages, what is held out, and what can't be used."""
import base64
import io
import json
import tarfile
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from lib.captions import Captions, Pictures
from lib.cli import UserError
from lib.images import BadRecord
from lib.pairs import choose_pair, open_pairs, Skipped
from model import sized

LINES = "thing {}\nde.utf8=Ding\nzh_CN.utf8=东西\nzh-TW.utf8=東西\n"


def png(shade: int, size=(20, 30)) -> bytes:
    file = io.BytesIO()
    Image.new("RGB", size, (shade, 0, 0)).save(file, "png")
    return file.getvalue()


def folder(path: Path, count: int = 12) -> Path:
    path.mkdir(parents=True)
    for i in range(count):
        (path / f"n{i}.png").write_bytes(png(4 * i))
        (path / f"n{i}.txt").write_text(LINES.format(i), encoding="utf-8")
    return path


def jsonl(path: Path, values: list) -> str:
    text = "".join(json.dumps(value, ensure_ascii=False) + "\n" for value in values)
    path.write_text(text, encoding="utf-8")
    return str(path)


def tar(path: Path, members: dict) -> str:
    with tarfile.open(path, "w") as file:
        for name, data in members.items():
            info = tarfile.TarInfo(name)
            info.size = len(data)
            file.addfile(info, io.BytesIO(data))
    return str(path)


# ---- forms and languages ------------------------------------------------------------------------

def test_a_folder_has_captions_by_line_and_the_names_of_its_folders(tmp_path):
    folder(tmp_path / "animals" / "cats")
    (tmp_path / "animals/lone.png").write_bytes(png(9))
    pairs = open_pairs(str(tmp_path / "animals" / "cats"))
    assert pairs.read(0)[1] == ["thing 0", "东西", "東西"] and len(pairs.shards) == 12
    above = open_pairs(str(tmp_path), "zh")
    assert above.read(0)[1] == [
        "thing 0", "东西", "東西", "animals cats: thing 0", "animals cats: 东西",
        "animals cats: 東西", *["animals cats"] * 3]
    assert open_pairs(str(tmp_path), "all").read(0)[1][:2] == ["thing 0", "Ding"]
    note, = above.shards.notes
    assert "1 pictures have no .txt or .json of the same name" in note


def test_one_name_in_five_of_a_folder_is_held_out(tmp_path):
    folder(tmp_path / "a", 60)
    folder(tmp_path / "b", 60)
    pairs = open_pairs(str(tmp_path))
    train, test = ([pairs.shards[n].names[0] for n in pairs.numbers(split)]
                   for split in ("train", "test"))
    assert len(train) + len(test) == 120 and 10 <= len(test) <= 40
    assert not {Path(name).stem for name in train} & {Path(name).stem for name in test}


FORMS = [
    ({"caption": "thing"}, ["thing"]),
    ({"captions": ["one", "two ", ""]}, ["one", "two"]),
    ({"text": {"en": "thing", "zh-CN": ["东西", "物"], "de": "Ding"}}, ["thing", "东西", "物"]),
    ({"caption": {"fr": "chose"}, "text": "not read"}, []),
    ({"caption": None, "text": "a column of another row is null"},
     ["a column of another row is null"]),
    ({"caption": 7}, []), ({"caption": {"en": {"deep": "thing"}}}, []), ({}, [])]


@pytest.mark.parametrize("fields,captions", FORMS)
def test_captions_of_an_object(tmp_path, fields, captions):
    (tmp_path / "a.png").write_bytes(png(0))
    uri = "data:image/png;base64," + base64.b64encode(png(1)).decode()
    for image in ("a.png", uri, ["a.png", "b.png"]):
        pairs = open_pairs(jsonl(tmp_path / f"{len(image)}.jsonl", [{"image": image, **fields}]))
        if captions:
            picture, found = pairs.read(0)
            assert picture.size == (20, 30) and found == captions
        else:
            with pytest.raises(BadRecord, match="has none in en,zh"):
                pairs.read(0)


def test_tars_hold_texts_or_objects(tmp_path):
    values = {"0.json": json.dumps({"caption": {"en": "three", "zh": "三"}}).encode()}
    tar(tmp_path / "a-0.tar", {"0.png": png(3), **values})
    tar(tmp_path / "a-1.tar", {f"{i}.{end}": data for i in range(200) for end, data in (
        ("png", png(i)), ("txt", LINES.format(i).encode()))})
    pairs = open_pairs(str(tmp_path / "a-*.tar"))
    assert pairs.read(0)[1] == ["three", "三"] and pairs.read(8)[1][0] == "thing 7"
    assert np.asarray(pairs.read(8)[0])[0, 0].tolist() == [7, 0, 0]
    test = pairs.numbers("test")        # one in fifty, by content
    assert 0 < len(test) < 20 and not set(test) & set(pairs.numbers("train"))


# ---- order --------------------------------------------------------------------------------------

def test_each_epoch_shows_each_pair_once(tmp_path):
    pairs = open_pairs(str(folder(tmp_path / "a", 40)))
    n = len(pairs.training)
    for epoch in range(3):
        drawn = [pairs.order(1, i) for i in range(epoch * n, epoch * n + n)]
        assert sorted(drawn) == pairs.training.tolist() and drawn != sorted(drawn)
    assert [pairs.order(1, i) for i in range(n)] != [pairs.order(2, i) for i in range(n)]
    config = sized("tiny")
    for stream in (Captions(config, (64,), 4, pairs=str(tmp_path / "a")),
                   Pictures(config, 64, pairs=str(tmp_path / "a"))):
        assert all(np.array_equal(stream(i).image, stream(i).image) for i in range(9))


# ---- what can't be used -------------------------------------------------------------------------

BAD = {"no caption": ({"a.txt": b"de.utf8=Ding", "a.png": png(0)}, "has none in en,zh"),
       "not UTF-8": ({"a.txt": "café".encode("latin-1"), "a.png": png(0)}, "is not UTF-8"),
       "damaged picture": ({"a.txt": b"thing", "a.png": b"no picture"}, "can't be read"),
       "long strip": ({"a.txt": b"thing", "a.png": png(0, (2000, 8))}, "is 2000 x 8 pixels")}


@pytest.mark.parametrize("kind", BAD)
def test_another_pair_is_drawn_and_the_kind_is_counted(tmp_path, kind):
    for name, data in (BAD[kind][0] | {"b.txt": b"\xef\xbb\xbfgood", "b.png": png(0)}).items():
        (tmp_path / name).write_bytes(data)
    pairs, said = open_pairs(str(tmp_path)), []
    skipped = Skipped(said.append)
    stream = Captions(sized("tiny"), (64,), 4, pairs=str(tmp_path))
    assert {choose_pair(np.random.default_rng(i), pairs, 0)[1] for i in range(9)} == {"good"}
    skipped.note([stream(i) for i in range(20)])
    skipped.summary()
    assert set(skipped.kinds) == {kind} and 5 <= skipped.kinds[kind]
    assert len(said) == 2 and BAD[kind][1] in said[0]
    assert said[1] == f"skipped {skipped.kinds[kind]} in all: {skipped.kinds[kind]} times {kind}"


def test_pictures_that_are_missing_end_the_run(tmp_path):
    pairs = open_pairs(jsonl(tmp_path / "a.jsonl", 9 * [{"image": "gone.png", "text": "thing"}]))
    with pytest.raises(UserError, match="20 pairs in a row can't be .*no picture at .*gone.png"):
        choose_pair(np.random.default_rng(0), pairs, 0)


def test_a_folder_without_pairs_or_with_held_out_ones_alone_is_one_line(tmp_path):
    (tmp_path / "a.png").write_bytes(png(0))
    with pytest.raises(UserError, match="have no .txt or .json of the same name"):
        open_pairs(str(tmp_path))
    for end, data in (("png", png(0)), ("txt", b"thing")):
        (tmp_path / f"n5.{end}").write_bytes(data)
    with pytest.raises(UserError, match="all of its 1 pairs are held out"):
        open_pairs(str(tmp_path))
