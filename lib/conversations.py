"""Records of own data as conversations: layouts of others in, `Message`s out.

Six layouts are recognised, each record by its fields:

    OpenAI messages      {"messages": [{"role": "user", "content": [
                              {"type": "image_url", "image_url": {"url": "cats/1.jpg"}},
                              {"type": "text", "text": "What is it?"}]},
                          {"role": "assistant", "content": "A cat."}]}
    LLaVA conversations  {"image": "cats/1.jpg", "conversations": [
                              {"from": "human", "value": "<image>\\nWhat is it?"},
                              {"from": "gpt", "value": "A cat."}]}
    nanoVLM texts        {"images": ["cats/1.jpg"], "texts": [
                              {"user": "What is it?", "assistant": "A cat."}]}
    questions            {"image": "cats/1.jpg", "question": "What is it?", "answer": "A cat."},
                         as `sample.py eval --data` takes them: lib/own_eval.py
    captions             {"image": "cats/1.jpg", "caption": "A cat."}, or x.jpg beside x.txt
    plain text           {"text": "..."} or {"content": "..."}, or a text file

A picture is named by its path, relative to the file, or by a data URI. A record may also list its
pictures in `image` or `images`, or have them beside it in a tar; the messages then mark their
places, by <image> in a text or by a part {"type": "image"} without a name. There must be as many
marks as pictures. Videos work alike (`video`, `videos`, <video>): a list of frames, or a GIF.

An assistant's `tool_calls` are written as Python calls (`call_text`), its `reasoning_content` as
<think>...</think>, and the loss on a message may have a `weight`. Other fields are ignored, also
OpenAI's `tools`: what the model should know about them belongs into the system message.

`openai_record` writes a conversation in the first layout, as `sample.py chat` saves it.

Nothing in a record is trusted: what can't be used raises BadRecord, whose kind is counted.
"""
import ast
import base64
import io
import json
import math
import re
from dataclasses import dataclass
from itertools import pairwise
from keyword import iskeyword
from string import ascii_uppercase

from PIL import Image

from lib.cli import UserError
from lib.images import BadRecord, Frames, Picture
from lib.scoring import BOXES, checked, letter_of
from lib.shards import Record
from tasks.base import IMAGE, Message, quoted
from tasks.verify import parse_python

OPENAI, LLAVA, NANOVLM = "OpenAI messages", "LLaVA conversations", "nanoVLM texts"
QUESTIONS, CAPTIONS, PLAIN = "questions", "captions", "plain text"

ROLES = {  # of OpenAI's messages and of LLaVA's, and what they are called here
    "system": "system", "developer": "system", "user": "user", "human": "user",
    "assistant": "assistant", "gpt": "assistant",
    "tool": "observation", "function": "observation", "observation": "observation"}
# The types of a part of a message, and the fields that may name its picture or video.
TEXT_PARTS = ("text", "input_text", "output_text")
IMAGE_PARTS = ("image", "image_url", "image_path", "input_image")
VIDEO_PARTS = ("video", "video_url")
NAMES = (*IMAGE_PARTS, *VIDEO_PARTS, "path", "url")


@dataclass
class Mark:
    """The place of a picture or a video in a message. name: which one, None for the next of those
    that the record lists; fps: frames a second of a video that is a list of frames."""
    kind: str               # image | video
    name: object = None
    fps: float = 1.0


# ---- recognising a record -----------------------------------------------------------------------

def layout_of(record: Record) -> str:
    """The name of a record's layout, by its fields. Raises BadRecord where there is none."""
    value = record.value or {}
    for field, layout in (("messages", OPENAI), ("conversations", LLAVA), ("texts", NANOVLM),
                          ("question", QUESTIONS)):
        if value.get(field) is not None:
            return layout
    if text_beside(record) is not None:
        return CAPTIONS if any(listed(record).values()) else PLAIN
    fields = ", ".join(map(str, value)) or "no fields"
    raise BadRecord("unknown layout", f"{fields[:80]}; lib/conversations.py lists the layouts")


def text_beside(record: Record) -> str | None:
    """The caption or the plain text of a record that is no conversation, None if it has none."""
    value = record.value or {}
    found = (record.text, value.get("caption"), value.get("text"), value.get("content"))
    return next((text for text in found if text is not None), None)


def plain_text(record: Record) -> str | None:
    """The text of a record that is plain text, from which stretches are learnt; None of others.
    Raises BadRecord if it is empty, or if the record has no layout that is known."""
    return text_of(text_beside(record)) if layout_of(record) == PLAIN else None


def conversation(record: Record, pairs: int = 16) -> list[Message]:
    """The messages of a record in any layout but plain text. Their images are `Picture`s, and
    `Frames` of videos, of which at most `pairs` pairs of frames are taken, evenly spaced.

    A caption is learnt as the answer to its picture, without a question: so it can't be mistaken
    for the answer to one. [O]
    Raises BadRecord where the record can't be trained on.
    """
    pictures = listed(record)
    turns = turns_of(record, pictures)
    named = any(isinstance(part, Mark) and part.name is not None
                for turn in turns for part in turn["content"])
    if named and not any((record.value or {}).get(field) for field in LISTS):
        pictures = {kind: [] for kind in pictures}      # those beside it are those that it names
    messages = [message_of(turn, pictures, record, pairs) for turn in turns]
    if left := sum(map(len, pictures.values())):
        raise BadRecord("image marks", f"{left} more pictures or videos than marks")
    messages = [m for m in messages if m.text or m.role != "system"]    # an empty one says nothing
    check_order(messages)
    return messages


def turns_of(record: Record, pictures: dict[str, list]) -> list[dict]:
    """The messages of a record, each as {"role": ..., "content": [texts and Marks], ...}."""
    layout, value = layout_of(record), record.value or {}
    first = [Mark(kind) for kind, names in pictures.items() for _ in names]     # all come first
    if layout == CAPTIONS:
        return [{"role": "user", "content": first},
                {"role": "assistant", "content": [text_of(text_beside(record))]}]
    if layout == QUESTIONS:
        return [{"role": "user", "content": [*first, asked(value)]},
                {"role": "assistant", "content": [right_reply(value)]}]
    if layout == NANOVLM:
        turns = [{"role": role, "content": [text_of(turn.get(role))]}
                 for turn in objects(value["texts"]) for role in ("user", "assistant")]
        turns[0]["content"] = [*first, *turns[0]["content"]]
        return turns
    # In a record of text alone, OpenAI's layout has no marks: <image> is a word there.
    marked = layout == LLAVA or any(pictures.values())
    turns = objects(value["messages" if layout == OPENAI else "conversations"])
    return [turn | {"content": parts_of(first_of(turn, "content", "value"), marked)}
            for turn in turns]


def check_order(messages: list[Message]):
    """Raise BadRecord unless every reply answers something, ends where the user or a tool speaks
    next, as generation does, and at least one message is learnt."""
    roles = [message.role for message in messages]
    if "assistant" not in roles:
        raise BadRecord("no reply", "no message of the assistant")
    if roles[0] == "assistant":
        raise BadRecord("wrong role order", "the assistant's message is the first")
    for role, following in pairwise(roles):
        if role == "assistant" and following not in ("user", "observation"):
            raise BadRecord("wrong role order", f"{following} after assistant")
    if not any(m.role == "assistant" if m.weight is None else m.weight for m in messages):
        raise BadRecord("nothing to learn", "all weights are 0")


# ---- questions with answers ---------------------------------------------------------------------

def asked(value: dict) -> str:
    """The text of a question; its choices, if it has any, stand below it, as "A. a cat"."""
    text, choices = value.get("question"), value.get("choices") or []
    if not isinstance(text, str) or not text.strip():
        raise BadRecord("no question", f"the question is {short(text)}")
    if not (isinstance(choices, list) and len(choices) != 1 and len(choices) <= 26
            and all(isinstance(choice, str) for choice in choices)):
        raise BadRecord("odd choices", "choices are a list of 2 to 26 texts")
    if choices != list(ascii_uppercase[:len(choices)]):     # letters only say how many there are
        text += "".join(f"\n{letter}. {choice}" for letter, choice in zip(ascii_uppercase, choices))
    return text


def answers_of(value: dict) -> list:
    """The right answers of a question as its metric takes them; without a metric they are texts."""
    metric, answers = value.get("metric") or "exact", first_of(value, "answers", "answer")
    try:
        return checked(metric, answers, value.get("choices") or [])
    except ValueError as error:
        raise BadRecord("odd answer", str(error)) from None


def right_reply(value: dict) -> str:
    """The first answer of a question as a reply: a text, the letter of a choice, a box, or the
    middle of a box that is to be hit."""
    answer, metric = answers_of(value)[0], value.get("metric")
    if metric == "choice":
        return letter_of(answer, value.get("choices") or [])
    if metric not in BOXES:
        return answer
    x0, y0, x1, y1 = map(round, answer)
    if metric == "iou":
        return f"[{x0}, {y0}, {x1}, {y1}]"
    return f"[{(x0 + x1) // 2}, {(y0 + y1) // 2}]"


# ---- fields, parts and marks --------------------------------------------------------------------

LISTS = {"images": "image", "image": "image", "videos": "video", "video": "video"}


def listed(record: Record) -> dict[str, list]:
    """{"image": names or Pictures, "video": names}: what the marks of a record stand for, in order.
    Where no field lists them, the pictures that lie beside it in a tar or a folder."""
    value, found = record.value or {}, {"image": [], "video": []}
    for field, kind in LISTS.items():
        names = value.get(field)
        if names is not None:
            found[kind] += names if isinstance(names, list) and field != "video" else [names]
    if not any(found.values()):
        found["image"] = list(record.pictures)
    return found


def objects(turns) -> list[dict]:
    """The messages of a record, which must be a list of objects."""
    if not isinstance(turns, list) or not turns:
        raise BadRecord("empty content", "no list of messages")
    for turn in turns:
        if not isinstance(turn, dict):
            raise BadRecord("not an object", f"a message is {short(turn)}")
    return turns


def first_of(fields: dict, *names):
    """The first of these fields that is there and not null."""
    return next((fields[name] for name in names if fields.get(name) is not None), None)


def text_of(text) -> str:
    """A text that must not be empty."""
    if not isinstance(text, str):
        raise BadRecord("empty content" if text is None else "not a text", short(text))
    if not text.strip():
        raise BadRecord("empty content", "a text without a letter")
    return text


def short(value) -> str:
    return repr(value)[:60]


def parts_of(content, marked: bool) -> list:
    """The content of a message as texts and Marks. marked: <image> and <video> in a text are marks;
    in a list of parts they never are, since there the parts show where the pictures are."""
    if content is None:
        return []
    if isinstance(content, str):
        pieces = re.split("(<image>|<video>)", content) if marked else [content]
        return [Mark(piece[1:-1]) if n % 2 else piece for n, piece in enumerate(pieces)]
    if not isinstance(content, list):
        raise BadRecord("not a text", f"the content of a message is {short(content)}")
    return [part_of(part) for part in content]


def part_of(part):
    """One part of a message as a text or a Mark."""
    if isinstance(part, str):
        return part
    if not isinstance(part, dict):
        raise BadRecord("not an object", f"a part of a message is {short(part)}")
    kind = part.get("type") or next((name for name in part if name in NAMES + TEXT_PARTS), None)
    if kind in TEXT_PARTS:
        text = part.get("text")
        if not isinstance(text, str):
            raise BadRecord("not a text", short(text))
        return text
    if kind not in IMAGE_PARTS + VIDEO_PARTS:
        raise BadRecord("unknown part", f"a part of type {short(kind)}")
    name, fps = first_of(part, *NAMES), first_of(part, "fps")
    if isinstance(name, dict) and "url" in name:        # OpenAI's {"url": ...}
        name = name["url"]
    if kind in IMAGE_PARTS:
        return Mark("image", name)
    return Mark("video", name, 1.0 if fps is None else number_of(fps, "fps"))


def number_of(value, what: str) -> float:
    """A finite number that is not negative."""
    if type(value) not in (int, float) or not 0 <= value < math.inf:
        raise BadRecord(f"wrong {what}", short(value))
    return float(value)


def message_of(turn: dict, pictures: dict, record: Record, pairs: int) -> Message:
    """One of `turns_of` as a Message. A Mark without a name takes the next of `pictures`."""
    role = first_of(turn, "role", "from")
    if not isinstance(role, str) or role not in ROLES:
        raise BadRecord("unknown role", short(role))
    role, weight = ROLES[role], turn.get("weight")
    weight = None if weight is None else number_of(weight, "weight")
    if role == "assistant":
        return Message(role, reply_of(turn), (), weight)
    text, said, images = "", "", []     # said: the text since the last picture
    for part in turn["content"]:
        if isinstance(part, str):
            said += part
            continue
        for image, after in images_for(part, pictures, record, pairs):
            text, said = text + plainly(said) + IMAGE, after
            images.append(image)
    text += plainly(said)
    if role == "user" and not text.strip():
        raise BadRecord("empty content", "a user's message")
    return Message(role, text, tuple(images), weight)


def plainly(text: str) -> str:
    """A text in which <|image|> is no mark of ours."""
    return text.replace(IMAGE, quoted(IMAGE))


def reply_of(turn: dict) -> str:
    """What the assistant writes: its thought, its text, its calls of tools, a line each."""
    if not all(isinstance(part, str) for part in turn["content"]):
        raise BadRecord("picture in a reply", "only text can be learnt")
    lines = ["".join(turn["content"])] if any(turn["content"]) else []
    for call in objects(turn["tool_calls"]) if turn.get("tool_calls") else ():
        call = call["function"] if isinstance(call.get("function"), dict) else call
        arguments = call.get("arguments")
        try:
            arguments = json.loads(arguments) if isinstance(arguments, str) else arguments
            lines.append(call_text(call.get("name"), arguments))
        except (ValueError, RecursionError) as error:
            raise BadRecord("damaged tool call", f"{short(call)}: {error}") from None
    reply = text_of("\n".join(lines))
    thought = first_of(turn, "reasoning_content")
    return reply if thought is None else f"<think>{text_of(thought)}</think>\n{reply}"


# ---- videos -------------------------------------------------------------------------------------

def images_for(mark: Mark, pictures: dict, record: Record, pairs: int) -> list[tuple]:
    """[(image, text after it), ...]: the picture of a Mark; or its video as pairs of frames, where
    the text after a pair is the time of its first frame [R: GLM-4.5V]."""
    name = mark.name
    if name is None:
        if not pictures[mark.kind]:
            raise BadRecord("image marks", f"more <{mark.kind}> than {mark.kind}s")
        name = pictures[mark.kind].pop(0)
    if mark.kind == "image":
        return [(picture_named(name, record), "")]
    if isinstance(name, list):
        frames = [picture_named(frame, record) for frame in name]
        times = [n / mark.fps if mark.fps else 0.0 for n in range(len(frames))]
    else:
        picture = picture_named(name, record)
        frames, times = picture.frames(), picture.times()
    if not frames:
        raise BadRecord("empty content", "a video without frames")
    couples = [(tuple(frames[n:n + 2]), times[n]) for n in range(0, len(frames), 2)]
    if len(couples) > pairs:        # evenly spaced, from the first to the last
        couples = [couples[n * (len(couples) - 1) // max(1, pairs - 1)] for n in range(pairs)]
    # The last frame of an odd number is shown twice.
    return [(Frames(couple if len(couple) == 2 else couple * 2, len(couples)),
             f"{seconds:.1f} seconds") for couple, seconds in couples]


def picture_named(name, record: Record) -> Picture:
    """The Picture of this name, or the Picture that `name` is already."""
    return name if isinstance(name, Picture) else record.find(name)


# ---- writing a record ---------------------------------------------------------------------------

def openai_record(messages) -> dict:
    """A conversation in OpenAI's layout, which `conversation` reads back. Pictures become data URIs
    of the files that they are from. Raises UserError where it holds a video."""
    roles = {"observation": "tool"}
    turns = []
    for message in messages:
        turn = {"role": roles.get(message.role, message.role), "content": message.text}
        thought = re.fullmatch(r"<think>(.*?\S.*?)</think>\n(.*\S.*)", message.text, re.DOTALL)
        if message.role == "assistant" and thought:
            turn |= {"reasoning_content": thought[1], "content": thought[2]}
        elif message.images:
            turn["content"] = content_parts(message)
        if message.weight is not None:
            turn["weight"] = message.weight
        turns.append(turn)
    return {"messages": turns}


def content_parts(message: Message) -> list[dict]:
    """A message with pictures as a list of parts."""
    first, *texts = message.text.split(IMAGE, len(message.images))
    parts = [{"type": "text", "text": first}]
    for image, text in zip(message.images, texts):
        parts.append({"type": "image_url", "image_url": {"url": data_uri(image)}})
        parts.append({"type": "text", "text": text})
    return [part for part in parts if part.get("text") != ""]


def data_uri(picture: Picture) -> str:
    """The file of a picture as data:image/png;base64,iVBOR..."""
    if isinstance(picture, Frames):
        raise UserError("a conversation with a video can't be written")
    with picture.file() as file:
        data = file.read()
    kind = Image.open(io.BytesIO(data)).get_format_mimetype()
    return f"data:{kind};base64,{base64.b64encode(data).decode()}"


# ---- calls of tools -----------------------------------------------------------------------------

def call_text(name: str, arguments: dict | list) -> str:
    """A call of a tool as the model writes it: Python's syntax, with literals only.

        call_text("search", {"query": "cats"})      search(query="cats")
        call_text("click", [412, 377])              click(412, 377)
        call_text("get", {"file-name": "a"})        get(**{"file-name": "a"})

    arguments: a JSON object, or an array where the arguments have no names, as in the gym. Texts
    have double quotes and JSON's escapes; true, false and null are written True, False and None.
    `parse_call` is the inverse; a call without arguments becomes one with an empty object. Raises
    ValueError where there is no such call.
    """
    if not isinstance(name, str) or not re.fullmatch(NAME, name):
        raise ValueError(f"{short(name)} is not the name of a tool")
    if isinstance(arguments, list):
        return f"{name}({', '.join(map(literal, arguments))})"
    if not isinstance(arguments, dict):
        raise ValueError("the arguments are neither an object nor an array")
    if all(key.isascii() and key.isidentifier() and not iskeyword(key) for key in arguments):
        return f"{name}({', '.join(f'{key}={literal(x)}' for key, x in arguments.items())})"
    return f"{name}(**{literal(arguments)})"


NAME = r"[A-Za-z_][A-Za-z0-9_.-]*"      # of a tool: OpenAI's names, and dotted ones


def literal(value) -> str:
    """A JSON value as a Python literal. Raises ValueError where it is none."""
    if isinstance(value, str):
        if any("\ud800" <= c <= "\udfff" for c in value):
            raise ValueError(f"{short(value)} has half of a surrogate pair")
        return json.dumps(value, ensure_ascii=False)
    if isinstance(value, list):
        return f"[{', '.join(map(literal, value))}]"
    if isinstance(value, dict) and all(isinstance(key, str) for key in value):
        return "{" + ", ".join(f"{literal(key)}: {literal(x)}" for key, x in value.items()) + "}"
    if value is None or type(value) in (bool, int) or type(value) is float and math.isfinite(value):
        return repr(value)
    raise ValueError(f"{short(value)} is not a value of JSON")


def parse_call(text: str) -> tuple[str, dict | list] | None:
    """(name, arguments) of a call that `call_text` may have written, None of any other text. It is
    read as a literal and never evaluated."""
    parts = re.fullmatch(rf"({NAME})(\(.*\))", text.strip(), re.DOTALL)
    try:
        call = parse_python("f" + parts[2], "eval").body if parts else None
        if not isinstance(call, ast.Call) or not isinstance(call.func, ast.Name):
            return None
        values = [ast.literal_eval(argument) for argument in call.args]
        named = {}
        for keyword in call.keywords:
            value = ast.literal_eval(keyword.value)
            named |= dict(**value) if keyword.arg is None else {keyword.arg: value}
        if values and named:        # JSON has no form for both at once
            return None
        call_text(parts[1], values or named)        # raises where a value is none of JSON's
        return parts[1], values or named
    except (SyntaxError, ValueError, TypeError, MemoryError, RecursionError):
        return None
