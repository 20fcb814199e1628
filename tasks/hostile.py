"""Replies that try to break an environment or a verifier, for tests and for fault campaigns.

Whatever a model writes must end in a score: nothing may raise, hang or take much memory. The
replies here are broken forms of right ones (a right reply reaches further into a parser than
random characters do) and forms that have caused faults in programs of this kind.
"""
import re
from functools import lru_cache

from tokenizer import SPECIAL

from .base import box, pick, Task
from .driver import play_out
from .verify import BEGIN, END

NUMBERS = ("0", "-1", "0.01", "1000", "1e9", "1e400", "-0", "nan", "inf", "True", "0x" + "f" * 300,
           "9" * 350, "9" * 3900, "1_0", "1j", "10**9**9", "\u0663", "\u00b2")
MARKUP = ("<", "</", "<!", "<![", "<![x", "<!--", "<!DOCTYPE", "<?", "</p", "<p", "<p a='", "<a b=",
          "&", "&#0;", "&#x110000;", "&#xd800;", "&lt;|image|&gt;", "<![<|image|>", "<style>a{",
          "<style>", "{", "}", "<table>", "<tr>", "<td>", "<details>", "<summary>", "<li>")
TEXTS = (*SPECIAL, *NUMBERS, *MARKUP, BEGIN, END, "", " ", "\0", "\ud800", "\udcff", "\u202e",
         "\ufeff", "\u200b", "\U0001f388", "\u0130", "\r\n", "\\", "\\ud800", "'", '"', "'''", "%s",
         "{}", "{0}", "(" * 300, "[" * 3000, "-" * 3000, "{" * 3000, "not " * 900, "f(" * 90,
         "a" * 3900, "a " * 1900, " " * 3900 + "x", ",1" * 1900, "/" * 3000, "\n" * 3000,
         "x" * 100_000, "<style>" + "a" * 3800 + "</style>", "<p>" + "a b" * 1300)
VERBS = """click type scroll open back remember answer done edit crop zoom draw_box draw_point
search_text search_image calc exec""".split()
STYLES = """width height gap border border-radius font-size flex margin padding margin-left color
background display flex-direction justify-content align-items text-align line-height letter-spacing
position""".split()
VALUES = [*NUMBERS[:9], *"""0px 0.01px 0.1px 0.99px 1px 70px 999.99px -5px nanpx 1e9px 0% 99% #fff
          #12 #zzzzzz red flex none inline inline-block center right flex-end space-between row
          column""".split(), "9px solid #000", "999px 0 0 999px"]
TAGS = "p div table tr td details summary li input img button label b h1 a x style".split()
LINES = ("while True: pass", "return 9**9**9", "return [0] * 10**9", "return 'a' * 10**12",
         "return sum(range(10**15))", "return 'a' in range(10**15)", "return '%1000000000d' % 1",
         "return '{:>999999999}'.format(1)", "x = [1]\n x[0] = x\n return x", "import os",
         "return do()", "return chr(55296)", "return ().__class__", "return int('9' * 200) ** 60",
         "return [[y for y in range(200)] for x in range(200)]", "x: int = 1", "lambda: 0", "raise",
         "return 'x'.replace('', 'y' * 200).replace('', 'z' * 200)", "return sorted(1)", "global x",
         "for x in iter(int, 1): pass", "try: 1\n except: 2", "return " + "-" * 1500 + "1",
         "return " + "(" * 180 + ")" * 180, "return " + "1 + " * 900 + "1", "async def f(): 1")


@lru_cache(maxsize=64)
def right_replies(name: str) -> list[str]:
    """The oracle's replies to a few tasks of a category."""
    return [reply for level in range(5) for reply in play_out(Task(name, level, level))[1]]


def hostile_page(rng) -> str:
    """A page with random tags, most of them left open, and random styles."""
    html = "<body>"
    for _ in range(1 + int(rng.integers(30))):
        style = ";".join(f"{pick(rng, STYLES)}:{pick(rng, VALUES)}" for _ in range(3))
        tag = pick(rng, TAGS)
        html += f"<{tag} style='{style}'>{pick(rng, ('words', 'more', pick(rng, TEXTS)[:30]))}"
        html += f"</{pick(rng, (tag, tag, pick(rng, TAGS)))}>" if rng.integers(2) else ""
    return html


def hostile_call(rng) -> str:
    """A call of a known or unknown action with arguments of any kind."""
    arguments = [text if rng.integers(2) else repr(text) for text in
                 (pick(rng, TEXTS if rng.integers(2) else NUMBERS) for _ in range(rng.integers(5)))]
    return f"{pick(rng, VERBS)}({', '.join(arguments)})"


def hostile_reply(rng, name: str) -> str:
    """A random reply to the category `name` that is meant to break something.

    rng: a numpy Generator; the same state gives the same reply. About half of the replies are the
    oracle's own with a change; the others are pages, calls, programs, and parts of TEXTS.
    """
    right, text = pick(rng, right_replies(name)), pick(rng, TEXTS)
    i, j = sorted(rng.integers(0, len(right) + 1, 2).tolist())
    match int(rng.integers(12)):
        case 0: return right[:i] + text + right[i:]
        case 1: return right[:i] + text + right[j:]
        case 2: return right[:j] + right[i:]
        case 3: return re.sub(r"\d+", lambda found: pick(rng, (found[0], *NUMBERS)), right)
        case 4: return right * int(rng.integers(2, 50))
        case 5: return right.removesuffix(END) + text
        case 6: return box(text)
        case 7: return text
        case 8: return hostile_call(rng)
        case 9: return box("\n".join(hostile_call(rng) for _ in range(4)))
        case 10 if "def " not in right: return box(hostile_page(rng))
        case 11 if name.startswith("ui_"): return box(hostile_page(rng))
        case _:
            head = re.search(r"def .*:\n", right)
            return box((head[0] if head else "def f(x):\n") + " " + pick(rng, LINES))
