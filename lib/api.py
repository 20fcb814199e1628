"""What the two protocols of serve.py share: a request that has been read, its limits, its errors.

lib/openai_api.py and lib/anthropic_api.py each have a class with these methods; serve.py needs no
other:

    body = parse_body(raw, limits)                      bytes -> a dict of JSON
    protocol = OpenAI(tokens)                           or Anthropic(tokens, config)
    chat = protocol.read(body, limits)                  a dict of JSON -> Chat
    turn = start(chat, tokens, config, limits)          Chat -> lib.turns.Turn, for the engine
    protocol.whole(chat, turn)                          a Turn that is done -> a dict of JSON
    protocol.error(error)                               ApiError -> a dict of JSON
    protocol.models(limits), protocol.model(name, limits)       what /v1/models answers

    events = protocol.stream(chat)                      the same reply as server-sent events:
    events.begin(turn)                                  each method returns bytes to send,
    events.piece(kind, text)                            b"" while nothing is to be sent yet;
    events.end(turn)                                    kind is "thought" or "text"
    events.fail(error)                                  instead of `end`, where something went wrong

Whatever is wrong with a request raises ApiError. A field that a protocol does not know is refused,
as the services themselves do; those that it knows and ignores are listed in its file.
"""
import base64
import contextlib
import json
import math
import re
import time
from dataclasses import dataclass, field

from lib import forms
from lib.cli import UserError
from lib.conversations import NAME, plainly
from lib.images import BadRecord, Picture
from lib.tool_use import Entry, is_known, loose, loosened, messages_of, Tool
from lib.turns import ReplySettings, Turn
from tasks.actions import ACTIONS
from tasks.base import IMAGE, Message

MODEL = "nanoglm-v"         # a name to which every served model answers
LONGEST_STOP = 200          # characters of a stop text, for which each step of a reply looks [O]


class ApiError(Exception):
    """A request that gets no reply. status: of HTTP; kind: a short name, OpenAI's `code`;
    param: the field that is wrong, such as "messages[2].content"."""

    def __init__(self, status: int, kind: str, message: str, param: str = ""):
        super().__init__(message)
        self.status, self.kind, self.message, self.param = status, kind, message, param


@dataclass(frozen=True)
class Limits:
    """What a request may ask for at most."""
    names: tuple[str, ...] = (MODEL,)   # of the model that is served
    context: int = 1024         # tokens of prompt and reply together
    max_new: int = 512          # tokens of a reply; a longer one that is asked for is cut there
    max_think: int = 256        # tokens of a thought; a longer one is cut there
    max_images: int = 16        # pictures in a request
    max_pixels: int = 2 ** 23   # of one picture, by its header, before it is decoded
    max_messages: int = 1000    # also the parts of one message
    max_tools: int = 128
    max_depth: int = 64         # of lists and objects inside one another
    max_schema: int = 600       # values in a schema that a reply is held to: more take too long
    max_schema_text: int = 30_000   # characters in all such schemas together


@dataclass
class Chat:
    """A request of either protocol, as the model is asked it."""
    model: str                              # the name by which it was asked for
    messages: list[Message]
    settings: ReplySettings
    tools: tuple[Tool, ...] = ()            # those that the reply may call
    stream: bool = False                    # whether to send events as the reply grows
    one_call: bool = False                  # whether the reply may call one tool at most
    usage: bool = True                      # whether the stream ends with the numbers of tokens
    created: int = field(default_factory=lambda: int(time.time()))     # seconds since 1970


# ---- JSON ---------------------------------------------------------------------------------------

def parse_body(raw: bytes, limits: Limits) -> dict:
    """The object of JSON that a body holds. Raises ApiError for anything else, and for numbers and
    texts that JSON does not allow: NaN, halves of a surrogate pair."""
    try:
        body = json.loads(raw.decode(), parse_constant=_no_number)
    except (ValueError, RecursionError) as error:       # UnicodeDecodeError is a ValueError
        why = "nested too deep" if isinstance(error, RecursionError) else str(error)
        raise ApiError(400, "invalid_json", f"the body is not valid JSON: {why}") from None
    if not isinstance(body, dict):
        raise ApiError(400, "invalid_json", "the body must be a JSON object")
    for value, depth in values_in(body):
        if depth > limits.max_depth:
            raise ApiError(400, "invalid_json",
                           f"the body is nested deeper than {limits.max_depth} levels")
        if isinstance(value, str):
            _check_text(value)
        elif isinstance(value, float) and not math.isfinite(value):     # 1e999
            raise ApiError(400, "invalid_json", "the body has a number that is too large")
    return body


def values_in(value):
    """Yield (value, depth) of a value of JSON and all values in it, keys included. Without
    recursion, since the depth is the sender's."""
    left = [(value, 0)]
    while left:
        value, depth = left.pop()
        yield value, depth
        if isinstance(value, dict):
            left += [(child, depth + 1) for pair in value.items() for child in pair]
        elif isinstance(value, list):
            left += [(child, depth + 1) for child in value]


def _no_number(name: str):
    raise ValueError(f"{name} is no number of JSON")


def _check_text(text: str):
    try:
        text.encode()
    except UnicodeEncodeError:
        raise ApiError(400, "invalid_json",
                       "the body has a text with half of a surrogate pair") from None


# ---- fields -------------------------------------------------------------------------------------

class Fields:
    """An object of a request, read field by field. null is the same as a field that is missing.

    path: where it is in the request; dotted: how the protocol writes that, messages.0.role or
    messages[0].role. `end` raises ApiError if there is a field that nobody has read.
    """

    def __init__(self, value: dict, path: str = "", dotted: bool = False):
        if not isinstance(value, dict):
            raise bad(path, f"must be an object, not {shown(value)}", "invalid_type")
        self.value, self.path, self.dotted, self.known = value, path, dotted, set()

    def at(self, name: str) -> str:
        """The path of a field, whose name may be anything."""
        return f"{self.path}.{name[:60]}" if self.path else name[:60]

    def take(self, name: str, kind=None, what: str = "", default=None, need: bool = False):
        """The value of a field, which must be of this type; `what` names the type. default: what a
        missing one is. need: it must be there."""
        self.known.add(name)
        value = self.value.get(name)
        if value is None:
            if need:
                raise bad(self.at(name), "this field is required", "missing_required_parameter")
            return default
        if kind and (not isinstance(value, kind) or isinstance(value, bool) and kind is not bool):
            raise bad(self.at(name), f"must be {what}, not {shown(value)}", "invalid_type")
        return value

    def text(self, name: str, default: str = "", need: bool = False) -> str:
        return self.take(name, str, "a text", default, need)

    def truth(self, name: str, default: bool = False) -> bool:
        return self.take(name, bool, "true or false", default)

    def number(self, name: str, low: float, high: float, default: float) -> float:
        value = self.take(name, (int, float), "a number", default)
        if not low <= value <= high:
            raise bad(self.at(name), f"must be from {low:g} to {high:g}, not {shown(value)}",
                      "out_of_range")
        return float(value)

    def integer(self, name: str, low: int, high: int | None = None, default=None, need=False):
        value = self.take(name, int, "an integer", default, need)
        if value is not None and not low <= value <= (value if high is None else high):
            wanted = f"at least {low}" if high is None else f"from {low} to {high}"
            raise bad(self.at(name), f"must be {wanted}, not {shown(value)}", "out_of_range")
        return value

    def word(self, name: str, words, default: str = "", need: bool = False) -> str:
        """A text that is one of these."""
        value = self.take(name, str, "a text", None, need)
        if value is None:
            return default
        if value not in words:
            raise bad(self.at(name), f"must be one of {', '.join(words)}, not {shown(value)}")
        return value

    def object(self, name: str, need: bool = False) -> "Fields | None":
        value = self.take(name, dict, "an object", None, need)
        return None if value is None else Fields(value, self.at(name), self.dotted)

    def objects(self, name: str, most: int, need: bool = False) -> list["Fields"]:
        """A list of objects."""
        values = self.take(name, list, "a list", [], need)
        if len(values) > most:
            raise bad(self.at(name), f"at most {most} are served, not {len(values)}", "too_many")
        form = "{}.{}" if self.dotted else "{}[{}]"
        return [Fields(value, form.format(self.at(name), n), self.dotted)
                for n, value in enumerate(values)]

    def texts(self, name: str, most: int, longest: int) -> tuple[str, ...]:
        """A list of texts of at most `longest` characters, none of them empty or white space."""
        values = self.take(name, list, "a list", [])
        if len(values) > most or not all(
                isinstance(v, str) and v.strip() and len(v) <= longest for v in values):
            raise bad(self.at(name), f"must be at most {most} texts of 1 to {longest} characters")
        return tuple(values)

    def ignore(self, *names: str):
        """These fields may hold anything."""
        self.known |= set(names)

    def refuse(self, why: str, *names: str, unless=()):
        """These fields are known, but must hold nothing, or one of the values in `unless`."""
        for name in names:
            value = self.take(name)
            if value is not None and not any(value is v or value == v for v in unless):
                raise bad(self.at(name), why, "unsupported_parameter")

    def end(self):
        for name in self.value:
            if name not in self.known:
                raise bad(self.at(name), "this field is unknown here", "unknown_parameter")


def bad(path: str, what: str, kind: str = "invalid_value") -> ApiError:
    """The error of a field that is wrong."""
    return ApiError(400, kind, f"{path}: {what}" if path else what, path)


def shown(value) -> str:
    """A value of the request in a message, not longer than 60 characters."""
    text = json.dumps(value, ensure_ascii=False)
    return text if len(text) <= 60 else text[:57] + "..."


# ---- the model, its tools, its pictures ---------------------------------------------------------

def read_model(fields: Fields, limits: Limits) -> str:
    """The name of the model, which must be one that is served."""
    name = fields.text("model", need=True)
    check_model(name, limits)
    return name


def check_model(name: str, limits: Limits):
    if name not in limits.names:
        raise ApiError(404, "model_not_found", f"the model {shown(name)} is not served here; "
                       f"there is {' and '.join(limits.names)}", "model")


def read_tool(fields: Fields, schema: str) -> Tool:
    """A tool. schema: the field that has the JSON schema of its arguments."""
    name = fields.text("name", need=True)
    if not re.fullmatch(NAME, name) or len(name) > 128:
        raise bad(fields.at("name"), f"{shown(name)} can't be written as a call: at most 128 "
                  "letters, digits, _, . and -, of which the first is a letter or _")
    parameters = fields.take(schema, dict, "a JSON schema", {})
    properties = parameters.get("properties")
    if parameters.get("type", "object") != "object" or not isinstance(properties or {}, dict):
        raise bad(fields.at(schema), "must be the schema of an object, with `properties`")
    return Tool(name, fields.text("description"), parameters)


def check_tools(tools: list[Tool]):
    names = [tool.name for tool in tools]
    if twice := {name for name in names if names.count(name) > 1}:
        raise bad("tools", f"two tools have the name {min(twice)}")


def named_tool(name: str, tools, path: str) -> Tool:
    """The tool that a reply must call."""
    found = next((tool for tool in tools if tool.name == name), None)
    if not found:
        raise bad(path, f"there is no tool {shown(name)}")
    return found


# The formats that both services take. Pillow reads many more, some by starting other programs.
FORMATS = {b"\x89PNG\r\n\x1a\n": "PNG", b"\xff\xd8\xff": "JPEG", b"GIF8": "GIF", b"RIFF": "WebP"}


def picture(data: str, path: str) -> Picture:
    """The picture in a text of base64. `check_picture` reads its header; it is decoded later."""
    try:
        raw = base64.b64decode(data, validate=True)
    except ValueError:
        raise bad(path, "this is not valid base64", "invalid_image") from None
    if not raw.startswith(tuple(FORMATS)):
        raise bad(path, f"this is no picture: {', '.join(FORMATS.values())} are read",
                  "invalid_image")
    return Picture(raw, path)


def check_picture(found: Picture, limits: Limits):
    """Raise ApiError if the header of a picture is damaged, or says that it is too large."""
    try:
        width, height = found.size
    except BadRecord as error:      # its text begins with the picture's name, the path
        raise ApiError(400, "invalid_image", str(error), found.name) from None
    if width * height > limits.max_pixels:
        raise bad(found.name, f"a picture of {width}x{height} pixels: at most "
                  f"{limits.max_pixels:,} pixels are read", "image_too_large")


def data_uri_picture(uri: str, path: str) -> Picture:
    """The picture in a data URI. An address of any other kind is refused: nothing is fetched."""
    head, _, data = uri.partition(",")
    if not head.startswith("data:") or not head.endswith(";base64"):
        raise bad(path, f"{shown(uri)} is no data URI (data:image/png;base64,...), and this server "
                  "fetches no pictures", "invalid_image_url")
    return picture(data, path)


# ---- the conversation ---------------------------------------------------------------------------

def joined(parts: list) -> tuple[str, tuple]:
    """The text and the pictures of a message, given its parts: texts and Pictures. Two texts next
    to each other are separated by a line break; empty ones don't count."""
    text, images, after_text = "", [], False
    for part in filter(None, parts):
        if isinstance(part, str):
            text += "\n" * after_text + plainly(part)
        else:
            text += IMAGE
            images.append(part)
        after_text = isinstance(part, str)
    return text, tuple(images)


def check_entries(entries: list[Entry], limits: Limits):
    """Raise ApiError unless the conversation is in an order that the model can answer: the user
    begins, a reply follows on something, each call has a result and each result a call."""
    images = [image for entry in entries for image in entry.images]
    if len(images) > limits.max_images:
        raise bad("messages", f"more than {limits.max_images} pictures", "too_many")
    for image in images:
        check_picture(image, limits)
    before, waiting, begun = None, {}, False
    for entry in entries:
        if entry.role != "observation" and waiting:
            raise bad(entry.place, f"the call {shown(min(waiting))} has no result before this")
        if entry.role == "observation":
            if not waiting.pop(entry.answers, None):
                raise bad(entry.place, f"this is the result of {shown(entry.answers)}, but the "
                          "reply before it has no such call, or it has its result already")
        elif entry.role == "assistant":
            if not begun or before == "assistant":
                raise bad(entry.place, "a reply must follow on a message of the user or a result")
            waiting = {call.id: call for call in entry.calls}
            if len(waiting) < len(entry.calls):
                raise bad(entry.place, "two calls have the same id")
        elif entry.role == "user" and not entry.words and not entry.images:
            raise bad(entry.place, "a message of the user must not be empty", "empty_content")
        begun = begun or entry.role == "user"
        before = entry.role
    if waiting:
        raise bad(entries[-1].place, f"the call {shown(min(waiting))} has no result")
    if not begun:
        raise bad("messages", "there is no message of the user")
    if entries[-1].role == "assistant":
        raise bad(entries[-1].place, "the last message must be of the user, or a result")


def conversation(entries: list[Entry], tools, limits: Limits) -> list[Message]:
    """The conversation as the model reads it, checked."""
    check_entries(entries, limits)
    try:
        return messages_of(entries, tools)
    except (ValueError, RecursionError) as error:
        raise bad("messages", f"a call can't be written: {error}") from None


def check_schemas(schemas: dict, path: str, limits: Limits):
    """Raise ApiError where schemas, {name: schema}, are too large, their remarks left out."""
    characters = 0
    for name, schema in schemas.items():
        values = [value for value, _ in values_in(loose(schema))]
        characters += sum(len(value) for value in values if isinstance(value, str))
        if len(values) > limits.max_schema or characters > limits.max_schema_text:
            raise bad(path, f"the schema of {name} is too large: {limits.max_schema} values and "
                      f"{limits.max_schema_text:,} characters at most", "unsupported_schema")


def form_of_call(tokens, tools, limits: Limits):
    """The form of a reply that must call one of these tools. Points of the gym's own actions are in
    0-999 then, whatever the schemas say."""
    check_schemas({tool.name: tool.parameters for tool in tools}, "tools", limits)
    same = [is_known(tool) and len(tool.arguments) == len(ACTIONS[tool.name].arguments)
            for tool in tools]
    try:
        if all(same):
            return forms.action_form(tokens, tuple(tool.name for tool in tools))
        return forms.call_form(tokens, loosened(tools))
    except UserError as error:
        raise bad("tools", str(error), "unsupported_schema") from None


def form_of_json(tokens, schema: dict | None, path: str, limits: Limits):
    """The form of a reply that must be JSON, of this schema if there is one."""
    check_schemas({"the reply": schema}, path, limits)
    try:
        return forms.json_form(tokens, schema)
    except UserError as error:
        raise bad(path, str(error), "unsupported_schema") from None


@contextlib.contextmanager
def refusing():
    """What a prompt can't be made of is an ApiError."""
    try:
        yield
    except BadRecord as error:
        raise ApiError(400, "invalid_image", str(error), "messages") from None
    except UserError as error:
        raise ApiError(400, "invalid_value", str(error)) from None


def check_length(chat: Chat, most: int):
    """Raise ApiError if the texts have more than `most` characters: to cut a text of many
    megabytes into tokens would take long."""
    length = sum(len(message.text) for message in chat.messages) + len(chat.settings.prefix)
    if length > most:
        raise ApiError(400, "context_length_exceeded", f"the prompt is too long: {length:,} "
                       f"characters, and {most:,} are too many in any case", "messages")


def check_room(length: int, limits: Limits):
    """Raise ApiError if a prompt of so many tokens leaves no room for a reply."""
    if length >= limits.context:
        raise ApiError(400, "context_length_exceeded", f"the prompt is too long: {length} tokens, "
                       f"and prompt and reply have {limits.context} together", "messages")


def start(chat: Chat, tokens, config, limits: Limits) -> Turn:
    """The reply to a request, ready to be generated. Raises ApiError if a picture is damaged or
    the prompt leaves no room for a reply."""
    check_length(chat, limits.context * max(map(len, tokens.words.values())))
    # First the beginning of the reply: a Turn has its form read it letter by letter.
    check_room(len(tokens.encode_reply(chat.settings.prefix)), limits)
    with refusing():
        turn = Turn(chat.messages, chat.settings, tokens, config)
    check_room(len(turn.request.prompt.ids), limits)
    return turn


# ---- server-sent events -------------------------------------------------------------------------

def event(data: dict | str, name: str = "") -> bytes:
    """One event, as bytes to send."""
    data = data if isinstance(data, str) else json.dumps(data, ensure_ascii=False)
    return (f"event: {name}\n" * bool(name) + f"data: {data}\n\n").encode()
