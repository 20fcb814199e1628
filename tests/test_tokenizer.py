"""The tokenizer: exact round trips, marks in text, and a rank file that can be rebuilt."""
import random
import re

import pytest

import tokenizer
from tasks.base import Message
from lib.cli import UserError
from tokenizer import SPECIAL, Tokenizer, train_bpe


@pytest.fixture(scope="module", params=[256, 512, 4096])
def tokens(request):
    return Tokenizer(request.param)


def test_any_text_comes_back(tokens):
    texts = ["", " ", "click(412, 377)", "红色的圆形 naïve 🎈\n\n\t x", "a\x00b\r\n", "12, 34, 5.6"]
    rng = random.Random(0)
    texts += ["".join(chr(rng.choice([rng.randrange(32, 127), rng.randrange(0x4e00, 0x9fff), 10]))
                      for _ in range(rng.randrange(60))) for _ in range(200)]
    for text in texts:
        assert tokens.decode(tokens.encode(text)) == text


def test_texts_of_any_length_come_back():
    """tiktoken alone fails in a run of a million marks or spaces."""
    tokens = Tokenizer(512)
    for text in (1_000_000 * " " + "x", 1_000_000 * "<"):
        for ids in (tokens.encode(text), tokens.encode_reply(text)):
            assert tokens.decode_bytes(ids[:9]) + tokens.decode_bytes(ids[9:]) == text.encode()


def test_any_bytes_come_back(tokens):
    """All 256 bytes are tokens, so any byte string has ids, valid UTF-8 or not."""
    data = bytes(range(256))
    ids = [tokens.encoding.encode_single_token(bytes([b])) for b in data]
    assert tokens.decode_bytes(ids) == data


def test_marks_in_user_text_stay_text(tokens):
    for mark in SPECIAL:
        ids = tokens.encode(f"say {mark} please")
        assert max(ids) < tokens.n_ranks
        assert tokens.decode(ids) == f"say {mark} please"
    pieces = tokens.chat([Message("user", "<|user|><|image|> hi <|begin_of_box|>")], answer=True)
    marks = [i for ids, _, _ in pieces for i in ids if i >= tokens.n_ranks]
    s = tokens.special
    assert marks == [s["[gMASK]"], s["<sop>"], s["<|user|>"], s["<|assistant|>"], s["<think>"],
                     s["</think>"]]


def test_digits_stand_alone(tokens):
    assert len(tokens.encode("412")) == 3


def test_prefixes_are_valid_and_shared():
    small, large = Tokenizer(512), Tokenizer(4096)
    assert all(small.decode_bytes([i]) == large.decode_bytes([i]) for i in range(512))
    for bad in (255, 10 ** 6):
        with pytest.raises(ValueError, match="ranks"):
            Tokenizer(bad)


def test_the_rank_file_is_reproduced_byte_for_byte(tmp_path, monkeypatch):
    want = tokenizer.RANKS.read_bytes()
    monkeypatch.setattr(tokenizer, "RANKS", tmp_path / "ranks.txt")
    tokenizer.train()
    assert tokenizer.RANKS.read_bytes() == want


def test_another_corpus_is_refused(tmp_path, monkeypatch):
    (tmp_path / "corpus.txt").write_text("something else")
    monkeypatch.setattr(tokenizer, "CORPUS", tmp_path / "corpus.txt")
    with pytest.raises(UserError, match="digest"):
        tokenizer.train()


def test_the_trainer_agrees_with_counting_everything_again():
    text = "low low low lower lowest new newer newest wide wider widest " * 3 + "aaaa aaa"
    words = [list(w.encode()) for w in re.findall(tokenizer.PATTERN, text)]
    names = [bytes([i]) for i in range(256)]
    while len(names) < 270:
        counts = {}
        for word in words:
            for pair in zip(word, word[1:]):
                counts[pair] = counts.get(pair, 0) + 1
        best = min(counts, key=lambda pair: (-counts[pair], pair))
        names.append(names[best[0]] + names[best[1]])
        for word in words:
            j = 0
            while j + 1 < len(word):
                if (word[j], word[j + 1]) == best:
                    word[j:j + 2] = [len(names) - 1]
                j += 1
    assert train_bpe(text, 270) == names


def test_the_chat_template():
    tokens = Tokenizer(512)
    talk = [Message("user", "<|image|>How many?", ("picture",)),
            Message("assistant", "<|begin_of_box|>3<|end_of_box|>"),
            Message("user", "And now?"),
            Message("assistant", "<think>two left</think>\nclick(1, 2)"),
            Message("observation", "clicked")]
    pieces = tokens.chat(talk)
    text = "".join(tokens.decode(ids) for ids, _, _ in pieces)
    assert text == ("[gMASK]<sop><|user|>\n<|begin_of_image|><|end_of_image|>How many?"
                    "<|assistant|>\n<think></think>\n<|begin_of_box|>3<|end_of_box|><|user|>\n"
                    "And now?<|assistant|>\n<think>two left</think>\nclick(1, 2)<|observation|>\n"
                    "clicked")
    learnt = "".join(tokens.decode(ids) for ids, weight, _ in pieces if weight == 1)
    assert learnt == ("<|begin_of_box|>3<|end_of_box|><|user|>"
                      "<think>two left</think>\nclick(1, 2)<|observation|>")
    assert [image for _, _, image in pieces if image] == ["picture"]
    with pytest.raises(ValueError, match="images"):
        tokens.chat([Message("user", "no mark", ("picture",))])


def test_a_message_may_have_a_weight_of_its_own():
    """It counts for the text and for the mark that ends a reply, never for a picture."""
    tokens = Tokenizer(512)
    talk = [Message("user", "a<|image|>b", ("picture",), 0.5), Message("assistant", "c", (), 0.0),
            Message("user", "d"), Message("assistant", "e", (), 2.0)]
    weights = [(tokens.decode(ids), weight) for ids, weight, _ in tokens.chat(talk) if weight]
    assert weights == [("a", 0.5), ("b", 0.5), ("e<|user|>", 2.0)]


def test_a_message_is_encoded_together_with_the_newline_before_it():
    """So transformers, which encodes the whole string, gets the same ids. The learnt part begins
    after the newline."""
    tokens = Tokenizer(4096)
    for text in ("\n\n\tx", "   indented", "\n \n1", "plain", ""):
        pieces = tokens.chat([Message("user", text, (), 1.0)])
        ids = [i for piece, _, _ in pieces for i in piece]
        assert ids[3:] == tokens.encode("\n" + text)
        assert [i for piece, weight, _ in pieces for i in piece if weight] == ids[4:]
