"""Data that people have, as records: what is read, in which order, what is refused or counted."""
import base64
import io
import json
import os
import pickle
import tarfile
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from lib import images, index, records
from lib.cli import UserError
from lib.images import BadRecord, open_image, Picture
from lib.shards import open_shards, Record, shuffled


def picture(w=8, h=6, kind="png", **more) -> bytes:
    file = io.BytesIO()
    Image.new("RGB", (w, h), (200, 30, 60)).save(file, kind, **more)
    return file.getvalue()


def turned(orientation: int) -> dict:
    exif = Image.Exif()
    exif[0x0112] = orientation
    return {"exif": exif}


def write_tar(path: Path, files: list[tuple[str, bytes]]) -> Path:
    with tarfile.open(path, "w") as tar:
        for name, data in files:
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    return path


def pairs(count: int, first: int = 0) -> list[tuple[str, bytes]]:
    """Pictures of width 1, 2, ... with captions, for a tar."""
    return [file for i in range(first, first + count)
            for file in ((f"{i:06d}.png", picture(1 + i, 5)), (f"{i:06d}.txt", b"number %d" % i))]


def write_lines(path: Path, values) -> Path:
    path.write_text("".join(json.dumps(value) + "\n" for value in values), encoding="utf-8")
    return path


def kind_of(action) -> str:
    with pytest.raises(BadRecord) as error:
        action()
    assert "\n" not in str(error.value)
    return error.value.kind


def refusal(spec) -> str:
    with pytest.raises(UserError) as error:
        open_shards(str(spec))
    assert "\n" not in str(error.value)
    return str(error.value)


# ---- the order ----------------------------------------------------------------------------------

@pytest.mark.parametrize("n", [1, 2, 3, 5, 7, 16, 17, 99, 257])
def test_each_epoch_is_another_permutation(n):
    epochs = {}
    for seed in (0, 1, 2 ** 63 - 1):
        for epoch in range(3):
            order = [shuffled(seed, epoch * n + k, n) for k in range(n)]
            assert sorted(order) == list(range(n))
            epochs[seed, epoch] = tuple(order)
    if n > 10:
        assert len(set(epochs.values())) == len(epochs)


def test_the_order_looks_random():
    """Each number is about as often at each place, and neighbours are no neighbours afterwards."""
    n, epochs = 6, 1000
    counts = np.zeros((n, n))
    for i in range(n * epochs):
        counts[i % n, shuffled(5, i, n)] += 1
    chi2 = ((counts - epochs / n) ** 2 / (epochs / n)).sum()
    assert chi2 < 60            # with (n - 1)^2 = 25 degrees of freedom, one in 10,000 is above 60
    order = np.array([shuffled(0, i, 5000) for i in range(5000)])
    assert abs(np.corrcoef(order, np.arange(5000))[0, 1]) < 0.04
    assert abs(np.corrcoef(order[1:], order[:-1])[0, 1]) < 0.04
    assert (np.abs(np.diff(order)) == 1).sum() < 10


def test_large_numbers_stay_in_range():
    n = 10 ** 12 + 39
    assert len({shuffled(3, i, n) for i in range(1000)}) == 1000
    assert all(0 <= shuffled(2 ** 63 - 1, 10 ** 15 + i, n) < n for i in range(100))


def known_sizes(record) -> list:
    """The sizes of a record's pictures that its index knows."""
    return [picture.known_size for picture in record.pictures]


# ---- JSONL --------------------------------------------------------------------------------------

def test_lines_are_records(tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_bytes(b'\xef\xbb\xbf{"n": 0}\r\n\r\n   \n{"n": 1, "text": "\xe7\x8c\xab"}\n{"n": 2}')
    shards = open_shards(str(path))
    assert [shards[n].value["n"] for n in range(len(shards))] == [0, 1, 2]
    assert shards[1].value["text"] == "猫" and shards[1].where == "a.jsonl: line 4"
    assert shards.kind == "jsonl" and shards.notes == []
    with pytest.raises(IndexError):
        shards[3]


def test_a_list_of_objects_is_read_without_loading_it(tmp_path):
    values = [{"n": n, "text": 'a "]}[{" \\', "deep": [{"x": [n]}]} for n in range(7)]
    for indent in (None, 1):
        path = tmp_path / f"{indent}.json"
        path.write_text(json.dumps(values, indent=indent), encoding="utf-8")
        shards = open_shards(str(path))
        assert [shards[n].value for n in range(len(shards))] == values
        assert shards[6].where == f"{indent}.json: entry 7"
    whole = path.read_bytes()
    path.write_bytes(whole[:len(whole) - 20])
    shards = open_shards(str(path))
    assert len(shards) == 6 and shards.notes == [f"{path} is cut off after entry 6"]
    lines = write_lines(tmp_path / "lines.json", values)
    assert open_shards(str(lines))[3].value == values[3]
    (tmp_path / "one.json").write_text(json.dumps({"data": values}, indent=1))
    assert "neither a list of objects nor one object a line" in refusal(tmp_path / "one.json")


def test_bad_lines_are_counted_by_kind(tmp_path, monkeypatch):
    monkeypatch.setattr(records, "MOST_BYTES", 2 ** 20)
    bad = {b'[1, 2]': "not an object", b'"text"': "not an object", b'{"a": ': "not JSON",
           b'{"a": "\xff\xfe"}': "not UTF-8", b'{"a": "b\0"}': "NUL bytes", b"\0\0": "NUL bytes",
           b"[" * 100_000: "not JSON", b'{"a": %s}' % (b"1" * 5000): "not JSON",
           b'{"a": "' + b"x" * 2 ** 21 + b'"}': "huge line"}
    path = tmp_path / "bad.jsonl"
    path.write_bytes(b"\n".join([*bad, b'{"good": 1}']) + b"\n")
    shards = open_shards(str(path))
    assert len(shards) == len(bad) + 1 and shards[len(bad)].value == {"good": 1}
    for n, kind in enumerate(bad.values()):
        assert kind_of(lambda n=n: shards[n]) == kind
        assert f"bad.jsonl: line {n + 1}" in str(pytest.raises(BadRecord, shards.__getitem__,
                                                               n).value)


def test_pictures_that_a_line_names(tmp_path):
    (tmp_path / "images").mkdir()
    (tmp_path / "images" / "CAT.JPG").write_bytes(picture(7, 3, "jpeg"))
    record = Record("a.jsonl: line 1", {}, folder=tmp_path)
    uri = "data:image/png;base64," + base64.b64encode(picture(9, 4)).decode()
    assert record.find("images/CAT.JPG").size == (7, 3)
    assert record.find(str(tmp_path / "images" / "CAT.JPG")).size == (7, 3)
    assert record.find(uri).size == record.find(uri).open().size == (9, 4)
    assert record.find({"bytes": picture(2, 4), "path": "x"}).size == (2, 4)
    assert record.find({"bytes": None, "path": "images/CAT.JPG"}).size == (7, 3)
    for wrong in (None, "", 7, [], {}, {"bytes": None}, b""):
        assert kind_of(lambda: record.find(wrong)) == "missing image"
    assert kind_of(lambda: record.find("images/dog.jpg").size) == "missing image"
    assert kind_of(lambda: record.find("images").open()) == "missing image"
    assert kind_of(lambda: record.find("https://example.org/a.jpg")) == "image on the web"
    assert kind_of(lambda: record.find("data:image/png;base64,!!")) == "damaged data URI"
    assert kind_of(lambda: record.find("data:image/svg+xml,<svg/>")) == "damaged data URI"
    assert kind_of(lambda: record.find("data:;base64,AAAA").open()) == "damaged picture"
    assert kind_of(lambda: record.find("a\0b").open()) == "damaged picture"


# ---- tars ---------------------------------------------------------------------------------------

def test_members_are_grouped_by_name_up_to_the_first_dot(tmp_path):
    path = write_tar(tmp_path / "a.tar", [
        ("d/._one.png", b"x"), (".hidden", b"x"), ("README", b"x"),
        ("d/one.10.PNG", picture(10)), ("d/one.2.png", picture(2)), ("d/one.json", b'{"a": 1}'),
        ("d/one.cls", b"3"), ("d/one.meta.json", b"{}"), ("two.jpg", picture(5)),
        ("two.txt", "\ufeff猫 \n".encode())])
    shards = open_shards(str(path))
    one, two = shards[0], shards[1]
    assert len(shards) == 2 and shards.kind == "tar"
    assert one.where == "a.tar: d/one" and one.value == {"a": 1} and one.text is None
    assert one.names == ["d/one.2.png", "d/one.10.PNG"]
    assert [p.size for p in one.pictures] == known_sizes(one) == [(2, 6), (10, 6)]
    for name in ("d/one.10.PNG", "one.10.PNG", "10.PNG", "somewhere/one.10.PNG"):
        assert one.find(name) is one.pictures[1]
    assert kind_of(lambda: one.find("two.jpg")) == "missing image"
    # Its name says JPEG, its bytes are a PNG; and it is read from the middle of the tar.
    assert two.text == "猫" and two.pictures[0].open().getpixel((0, 0)) == (200, 30, 60)


def test_names_that_come_again_are_other_records(tmp_path):
    path = write_tar(tmp_path / "a.tar", [*pairs(3), *pairs(3)])
    shards = open_shards(str(path))
    assert [shards[n].text for n in range(6)] == 2 * ["number 0", "number 1", "number 2"]
    # Not sorted, as `tar` packs a folder: files of a record need not follow one another.
    path = write_tar(tmp_path / "b.tar", sorted(pairs(3), key=lambda file: file[0][-3:]))
    shards = open_shards(str(path))
    assert [(shards[n].text, known_sizes(shards[n])) for n in range(3)] == [
        (f"number {n}", [(n + 1, 5)]) for n in range(3)]


@pytest.mark.parametrize("format", [tarfile.GNU_FORMAT, tarfile.PAX_FORMAT, tarfile.USTAR_FORMAT])
def test_long_names_and_other_letters(tmp_path, format):
    (tmp_path / "in").mkdir()
    name = "in/" + "猫x" * 40 if format != tarfile.USTAR_FORMAT else "in/cat"
    (tmp_path / f"{name}.png").write_bytes(picture())
    (tmp_path / f"{name}.txt").write_text("a cat", encoding="utf-8")
    with tarfile.open(tmp_path / "a.tar", "w", format=format) as tar:
        tar.add(tmp_path / "in", "in")
    record = open_shards(str(tmp_path / "a.tar"))[0]
    assert record.where == f"a.tar: {name}" and record.text == "a cat"
    assert record.pictures[0].open().size == (8, 6)


def test_names_in_another_encoding_can_be_logged(tmp_path):
    name = os.fsdecode(b"caf\xe9")
    path = write_tar(tmp_path / "a.tar", [(f"{name}.png", b"x"), (f"{name}.txt", b"a")])
    (tmp_path / "in").mkdir()
    for ending in ("png", "txt"):
        (tmp_path / "in" / f"{name}.{ending}").write_bytes(b"x")
    for spec in (path, tmp_path / "in"):
        record = open_shards(str(spec))[0]
        error = pytest.raises(BadRecord, record.pictures[0].open).value
        assert record.where.endswith("caf?") and "caf?.png" in str(error).encode().decode()
    assert str(BadRecord("kind", "two\nlines, \x1b[31m")) == "two lines, ?[31m"


def test_a_tar_is_cut_off_anywhere(tmp_path):
    """All whole records before the damage are read, and it is said."""
    path = write_tar(tmp_path / "a.tar", pairs(4))
    whole = path.read_bytes()
    for cut in range(0, 8 * 1024 + 1, 256):     # each of the 8 files has a header and a block
        path.write_bytes(whole[:cut])
        if cut < 768:       # the first picture has less than 256 bytes
            assert str(path) in refusal(path)
            continue
        shards = open_shards(str(path))
        texts = [shards[n].text for n in range(len(shards))]
        assert texts[:cut // 2048] == [f"number {n}" for n in range(cut // 2048)]
        assert len(shards.notes) == 1 and str(path) in shards.notes[0]
    path.write_bytes(whole[:2048] + b"\1" * 512 + whole[2560:])     # a damaged header
    shards = open_shards(str(path))
    assert [shards[n].text for n in range(len(shards))] == ["number 0"]
    assert "byte 2,048" in shards.notes[0]


@pytest.mark.parametrize("size", [-1, -512, -1024, -2048])
def test_a_size_in_a_tar_is_negative(tmp_path, size):
    """The file after the first record. To skip -1024 bytes is to read the same header for ever."""
    path = write_tar(tmp_path / "a.tar", pairs(2))
    info = tarfile.TarInfo("000001.png")
    info.size = size
    data = path.read_bytes()
    path.write_bytes(data[:2048] + info.tobuf(tarfile.GNU_FORMAT) + data[2560:])
    shards = open_shards(str(path))
    assert [shards[n].text for n in range(len(shards))] == ["number 0"]
    assert "the size of 000001.png is negative" in shards.notes[0]


def test_a_tar_has_thousands_of_long_names_before_a_file(tmp_path):
    """tarfile reads each such header within the call for the one before."""
    name = tarfile.TarInfo("././@LongLink")
    name.type, name.size = tarfile.GNUTYPE_LONGNAME, 5
    header = name.tobuf(tarfile.GNU_FORMAT) + b"a.txt".ljust(512, b"\0")
    path = write_tar(tmp_path / "a.tar", pairs(1))
    path.write_bytes(path.read_bytes()[:2048] + header * 2000)
    shards = open_shards(str(path))
    assert len(shards) == 1 and "recursion" in shards.notes[0]


def test_bad_members_are_counted_by_kind(tmp_path, monkeypatch):
    monkeypatch.setattr(records, "MOST_BYTES", 100)
    shards = open_shards(str(write_tar(tmp_path / "a.tar", [
        ("a.png", b"no picture"), ("a.txt", b"a"), ("b.png", b""), ("b.txt", b"b"),
        ("c.png", picture()[:50]), ("c.txt", b"c"), ("d.png", picture()), ("d.json", b"[1]"),
        ("e.png", picture()), ("e.txt", b"\xff"), ("f.png", picture()), ("f.txt", b"x" * 101)])))
    assert [known_sizes(shards[n]) for n in range(3)] == [[None], [None], [(8, 6)]]
    for n in range(3):
        assert kind_of(lambda n=n: shards[n].pictures[0].open()) == "damaged picture"
    assert "b.png can't be read as a picture: it is empty" in str(
        pytest.raises(BadRecord, shards[1].pictures[0].open).value)
    assert [kind_of(lambda n=n: shards[n]) for n in (3, 4, 5)] == [
        "not an object", "not UTF-8", "huge text"]


# ---- folders ------------------------------------------------------------------------------------

def test_a_folder_of_pictures(tmp_path):
    folder = tmp_path / "pets"
    (folder / "cats").mkdir(parents=True)
    for name, data in {"cats/A.JPG": picture(4), "cats/A.txt": b"a cat", "b.v2.png": picture(5),
                       "b.v2.TXT": b"b", "c.webp": picture(6), "c.json": b'{"image": "c.webp"}',
                       "alone.png": picture(), "alone too.txt": b"x", "._b.v2.png": b"x",
                       ".git": b"x"}.items():
        (folder / name).write_bytes(data)
    (folder / "link.png").symlink_to(folder / "nowhere.png")
    shards = open_shards(str(folder))
    assert shards.kind == "pictures" and len(shards) == 3
    assert {shards[n].where: known_sizes(shards[n]) for n in range(3)} == {
        "pets: cats/A": [(4, 6)], "pets: b.v2": [(5, 6)], "pets: c": [(6, 6)]}
    assert {shards[n].text for n in range(3)} == {"a cat", "b", None}
    assert shards.notes == [f"{folder}: 1 pictures have no .txt or .json of the same name"]
    (folder / "notes.md").write_text("not of the data")
    assert open_shards(str(folder)).digest == shards.digest
    record = next(shards[n] for n in range(3) if shards[n].value)
    assert record.find("c.webp").size == (6, 6) and record.find("alone.png").size == (8, 6)


def test_a_folder_of_text(tmp_path, monkeypatch):
    monkeypatch.setattr(records, "PIECE", 64)
    folder = tmp_path / "code"
    (folder / ".git").mkdir(parents=True)
    long = "".join(f"line {i} über\n" for i in range(40)) + "猫" * 300
    for name, data in {"a.py": b"print()\n", "long.md": long.encode(), "b.TXT": b"\xff",
                       "c.sh": b"a\0b", ".git/config.txt": b"x", "data.bin": b"x",
                       "no_letter_begins.c": 10 * (64 + 64 + 3) * b"\x80"}.items():
        (folder / name).write_bytes(data)
    shards = open_shards(str(folder))
    texts, kinds = {}, Counter()
    for n in range(len(shards)):
        try:
            record = shards[n]
            texts.setdefault(record.where.split(" from")[0], []).append(record.text)
            assert record.pictures == []
        except BadRecord as error:
            kinds[error.kind] += 1
    assert shards.kind == "text" and set(texts) == {"a.py", "long.md"}
    assert "".join(texts["long.md"]) == long and len(texts["long.md"]) > 10
    assert all(text.endswith("\n") for text in texts["long.md"][:5])
    assert kinds == {"not UTF-8": 1 + 10, "NUL bytes": 1}


def test_a_file_that_is_gone_is_a_record_that_cant_be_used(tmp_path):
    (tmp_path / "a.txt").write_text("a line\n")
    shards = open_shards(str(tmp_path))
    (tmp_path / "a.txt").unlink()
    assert kind_of(lambda: shards[0]) == "unreadable file"


def test_a_folder_of_shards(tmp_path):
    write_tar(tmp_path / "b.tar", pairs(2, 2))
    write_tar(tmp_path / "a.tar", pairs(2))
    assert [open_shards(str(tmp_path))[n].text for n in range(4)] == [
        f"number {n}" for n in range(4)]
    (tmp_path / "empty").mkdir()
    assert "neither shards nor pictures nor text" in refusal(tmp_path / "empty")


# ---- parquet ------------------------------------------------------------------------------------

def test_parquet(tmp_path):
    pytest.importorskip("pyarrow")
    import pyarrow
    import pyarrow.parquet
    rows = [{"images": [{"bytes": picture(1 + n, 3), "path": None}],
             "texts": [{"user": f"question {n}", "assistant": "answer"}]} for n in range(60)]
    for s in range(2):
        pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows[30 * s:30 * s + 30]),
                                    tmp_path / f"{s}.parquet", row_group_size=8)
    shards = open_shards(str(tmp_path / "{0..1}.parquet"))
    assert len(shards) == 60 and shards.kind == "parquet"
    for n in (0, 29, 30, 59):
        record = shards[n]
        assert record.value["texts"] == rows[n]["texts"]
        assert record.find(record.value["images"][0]).size == (1 + n, 3)
    assert shards[31].where == "1.parquet: row 1"
    # Every row once an epoch, and the rows of a group one after the other.
    train = shards.numbers("train")
    epochs = [[shards.order(0, e * len(train) + k) for k in range(len(train))] for e in range(2)]
    assert sorted(epochs[0]) == sorted(epochs[1]) == train.tolist() and epochs[0] != epochs[1]
    groups = [n // 30 * 4 + n % 30 // 8 for n in epochs[0]]
    assert sum(a != b for a, b in zip(groups, groups[1:])) == len(set(groups)) - 1
    assert pickle.loads(pickle.dumps(shards)).order(0, 77) == epochs[1][77 - len(train)]
    (tmp_path / "bad.parquet").write_bytes(b"PAR1 is not enough")
    assert "can't be read as parquet" in refusal(tmp_path / "bad.parquet")


def test_parquet_without_pyarrow(tmp_path, monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "pyarrow", None)
    (tmp_path / "a.parquet").write_bytes(b"PAR1")
    assert "pip install pyarrow" in refusal(tmp_path / "a.parquet")


# ---- several shards -----------------------------------------------------------------------------

def test_globs_ranges_and_lists(tmp_path):
    for s in range(12):
        write_lines(tmp_path / f"s-{s:03d}.jsonl", [{"n": 10 * s + k} for k in range(s % 3)])
    (tmp_path / "odd[1].jsonl").write_text('{"n": -1}\n')
    (tmp_path / "some.list").write_text("# shards\ns-{001..002}.jsonl\n\ns-004.jsonl\n")

    def read(spec):
        shards = open_shards(str(tmp_path / spec))
        return [shards[n].value["n"] for n in range(len(shards))]

    everything = [10 * s + k for s in range(12) for k in range(s % 3)]
    assert read("s-*.jsonl") == read("s-{000..011}.jsonl") == everything
    assert read("some.list") == [10, 20, 21, 40]
    assert read("odd[1].jsonl") == [-1]         # a file of this name goes before a pattern
    assert read("s-{001..001}.jsonl") == [10]
    (tmp_path / "poem.txt").write_text("Roses are red\n")
    write_tar(tmp_path / "s.tar", pairs(1))
    (tmp_path / "mixed.list").write_text("s.tar\ns-001.jsonl\n")
    (tmp_path / "nul.list").write_bytes(b"\0/*.tar\n")
    (tmp_path / "a.tar.gz").write_bytes(b"")
    for spec, said in {
            "t-*.jsonl": "matches no file", "s-{000..012}.jsonl": "s-012.jsonl is not there",
            "s-{5..4}.jsonl": "from 1 to 100,000", "s-{0..999999999}.jsonl": "from 1 to 100,000",
            "s-{0..99999999999999999999}.jsonl": "is not there", "nul.list": "null byte",
            "s-000.jsonl": "has no record", "missing.jsonl": "is not there", "s-00?.???": "no file",
            "poem.txt": "give its folder", "mixed.list": "several kinds",
            "a.tar.gz": "gunzip a.tar.gz", "odd[1].json": "no file"}.items():
        assert said in refusal(tmp_path / spec), spec
    (tmp_path / "model.bin").write_bytes(b"x")
    assert "files that end in '.bin'" in refusal(tmp_path / "model.bin")
    assert "is empty" in refusal(" ")


def test_one_record_in_fifty_is_held_out_by_its_content(tmp_path):
    values = [{"n": n} for n in range(500)]
    shards = open_shards(str(write_lines(tmp_path / "a.jsonl", [*values, *values])))
    test, train = shards.numbers("test"), shards.numbers("train")
    assert sorted([*test, *train]) == list(range(1000)) and 8 <= len(test) <= 40
    first, second = test[test < 500], test[test >= 500]
    assert (first + 500 == second).all()       # duplicates are on the same side
    other = open_shards(str(write_lines(tmp_path / "moved.jsonl", values[::-1])))
    assert sorted(499 - other.numbers("test")) == sorted(first)
    # In a tar the picture decides, in a folder as well: not a text that many have.
    folder = tmp_path / "folder"
    folder.mkdir()
    files = [(f"{n}.{kind}", data) for n in range(150)
             for kind, data in (("png", picture(1 + n)), ("txt", b"a stamp"))]
    for name, data in files:
        (folder / name).write_bytes(data)
    held = []
    for spec in (write_tar(tmp_path / "a.tar", files), folder):
        shards = open_shards(str(spec))
        held.append({shards[n].pictures[0].size for n in shards.numbers("test").tolist()})
    assert held[0] == held[1] and 1 <= len(held[0]) <= 9


def test_the_training_split_is_never_empty(tmp_path):
    held = next(n for n in range(10_000) if len(open_shards(str(write_lines(
        tmp_path / "a.jsonl", [{"n": n}, {"n": 0}]))).numbers("test")))
    shards = open_shards(str(write_lines(tmp_path / "b.jsonl", [{"n": held}])))
    assert shards.numbers("train").tolist() == [0] and len(shards.numbers("test")) == 0
    assert [shards.order(0, i) for i in range(3)] == [0, 0, 0]


def test_an_epoch_shows_each_record_once(tmp_path):
    shards = open_shards(str(write_lines(tmp_path / "a.jsonl", [{"n": n} for n in range(200)])))
    train = shards.numbers("train")
    order = [shards.order(7, i) for i in range(2 * len(train))]
    assert sorted(order[:len(train)]) == sorted(order[len(train):]) == train.tolist()
    assert order == [int(train[shuffled(7, i, len(train))]) for i in range(2 * len(train))]
    test = shards.numbers("test")
    assert {shards.order(7, i, "test") for i in range(len(test))} == set(test.tolist())
    assert sorted(shards.order(7, i, "all") for i in range(200)) == list(range(200))


# ---- the index ----------------------------------------------------------------------------------

def test_an_index_is_made_once_and_again_for_other_data(tmp_path, monkeypatch):
    made = []
    build = records.index_lines
    monkeypatch.setattr(records, "index_lines", lambda *a: made.append(a[0].name) or build(*a))
    path = write_lines(tmp_path / "a.jsonl", [{"n": n} for n in range(5)])
    place = tmp_path / "a.jsonl.nanoglmv-index"
    first = open_shards(str(path))
    assert open_shards(str(path)).digest == first.digest and made == ["a.jsonl"]
    write_lines(path, [{"n": n} for n in range(6)])
    assert len(open_shards(str(path))) == 6 and len(made) == 2
    os.utime(path, ns=(1, 1))
    assert len(open_shards(str(path))) == 6 and len(made) == 3
    whole = place.read_bytes()
    for damaged in (b"", b"{}\n", b"\xff\n", b"[]\n", whole[:50], whole[:-100],
                    whole.replace(b'"stamp": [%d' % index.VERSION, b'"stamp": [0')):
        place.write_bytes(damaged)
        assert len(open_shards(str(path))) == 6
        assert place.read_bytes() == whole
    assert len(made) == 10 and sorted(os.listdir(tmp_path)) == [path.name, place.name]
    assert open_shards(str(path)).digest != first.digest


def test_an_index_goes_elsewhere_where_the_data_can_not_be_written(tmp_path, monkeypatch):
    path = write_lines(tmp_path / "a.jsonl", [{"n": 1}])
    beside, write = path.with_name("a.jsonl.nanoglmv-index"), index.write_index

    def refuse(place, *rest):
        if place == beside:
            raise PermissionError("read-only")
        write(place, *rest)

    monkeypatch.setattr(index, "write_index", refuse)
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    assert open_shards(str(path))[0].value == {"n": 1} and not beside.exists()
    assert len(list((tmp_path / "home/.cache/nanoglmv").iterdir())) == 1
    monkeypatch.setattr(index, "index_lines", None, raising=False)
    assert open_shards(str(path))[0].value == {"n": 1}
    monkeypatch.setattr(index, "write_index", lambda *a: (_ for _ in ()).throw(OSError("full")))
    path.write_text('{"n": 2}\n\n')
    assert "no place to write the index" in refusal(path)


def test_shards_can_be_sent_to_another_process(tmp_path):
    write_tar(tmp_path / "a.tar", pairs(30))
    shards = open_shards(str(tmp_path / "a.tar"))
    sent = pickle.dumps(shards)
    assert len(sent) < 2000                     # the index is mapped there again, not copied
    again = pickle.loads(sent)
    assert again[7].text == "number 7" and again.order(3, 8) == shards.order(3, 8)
    assert again.digest == shards.digest
    got = pickle.loads(pickle.dumps(shards[7].pictures[0]))
    assert got.open().size == got.size == (8, 5)
    error = pickle.loads(pickle.dumps(BadRecord("a kind", "a detail")))
    assert error.kind == "a kind" and str(error) == "a detail"


# ---- pictures that are not decoded yet ----------------------------------------------------------

def spied(monkeypatch) -> list:
    """What is decoded from here on."""
    decoded, load = [], Image.Image.load
    for kind in (Image.Image, __import__("PIL.ImageFile").ImageFile.ImageFile):
        monkeypatch.setattr(kind, "load", lambda self, load=kind.load: decoded.append(1)
                            or load(self))
    return decoded


@pytest.mark.parametrize("kind", ["png", "jpeg", "tiff", "webp"])
@pytest.mark.parametrize("orientation", [1, 3, 5, 6, 7, 8])
def test_a_size_is_that_of_the_upright_picture(tmp_path, monkeypatch, kind, orientation):
    data = picture(40, 20, kind, **turned(orientation))
    path = tmp_path / f"a.{kind}"
    path.write_bytes(b"before" + data + b"after")
    expected = (20, 40) if orientation >= 5 else (40, 20)
    for source in (Picture(data), Picture(path, "member", 6, len(data))):
        decoded = spied(monkeypatch)
        assert source.size == expected and decoded == []
        assert source.open().size == expected and decoded != []


def test_a_picture_starts_no_program():
    """Pillow runs what is in an EPS file, whatever its name is, with Ghostscript."""
    eps = b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 8 6\n%%EndComments\nshowpage\n"
    assert Image.open(io.BytesIO(eps)).size == (8, 6)       # Pillow would take it
    assert kind_of(lambda: Picture(eps).size) == "damaged picture"
    assert kind_of(Picture(eps).open) == "damaged picture"


def test_only_the_header_of_a_stretch_is_read(tmp_path, monkeypatch):
    noise = np.random.default_rng(0).integers(0, 256, (300, 300, 3)).astype(np.uint8)
    read, read_part = [], images.read_part
    monkeypatch.setattr(images, "read_part", lambda *a: read.append(a[2]) or read_part(*a))
    for kind, most in (("png", 2 ** 16), ("tiff", 2 ** 20)):    # a TIFF's header may come last
        file = io.BytesIO()
        Image.fromarray(noise).save(file, kind)
        path, length = tmp_path / f"a.{kind}", len(file.getvalue())
        path.write_bytes(b"before" + file.getvalue() + b"after")
        assert Picture(path, "", 6, length).size == (300, 300) and length > 2 ** 17
        assert sum(read) <= most
        assert (np.asarray(Picture(path, "", 6, length).open()) == noise).all()
        read.clear()


def test_frames_of_a_gif(tmp_path):
    frames = [Image.new("RGB", (6, 4), colour) for colour in ("red", "lime", "blue")]
    file = io.BytesIO()
    frames[0].save(file, "gif", save_all=True, append_images=frames[1:], duration=100)
    shown = Picture(file.getvalue()).frames()
    assert [frame.open().getpixel((1, 1)) for frame in shown] == [
        (255, 0, 0), (0, 255, 0), (0, 0, 255)]
    still = Picture(picture())
    assert still.frames() == [still] and still.times() == [0.0]
    frames[0].save(file := io.BytesIO(), "tiff", save_all=True, append_images=frames[1:])
    pages = Picture(file.getvalue())
    assert pages.frames() == [pages] and pages.times() == [0.0]
    assert kind_of(Picture(b"GIF89a").frames) == "damaged picture"


def test_a_picture_is_named_in_messages(tmp_path):
    assert str(Picture(tmp_path / "a.png")) == str(tmp_path / "a.png")
    assert "a picture of 1,000 bytes can't be read" in str(
        pytest.raises(BadRecord, Picture(b"x" * 1000).open).value)
    with pytest.raises(UserError, match="no picture at"):
        open_image(tmp_path / "a.png")
