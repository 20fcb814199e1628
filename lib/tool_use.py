"""Tools and calls of tools: JSON in the protocols on one side, what the model reads and writes on
the other. This is the only place where the two meet.

**A call** is written as the gym writes its actions, in Python's syntax, the arguments in the order
in which the tool's schema lists its properties. Where one is missing in the middle, all are named:

    {"name": "click", "arguments": {"x": 412, "y": 377}}        click(412, 377)
    {"name": "find", "arguments": {"limit": 3}}                 find(limit=3)

Points are integers in 0-999 of the picture's width and height, never pixels. A call is parsed and
never evaluated. A reply may be text and then calls, one a line; calls of tools that were not
declared, and calls with arguments that the tool does not have, stay text.

**What the prompt says about tools.** Actions on screens (tasks/actions.py) are calls that the model
knows from training: the prompt says nothing about them. Where there is any other tool, the first
question gets the line that the gym writes below its own ones, with names and arguments only:

    One call a turn: find("word", limit), open("name").

**A call that must be made** (tool_choice) is held to the tool's name and to the types of its
arguments, their enums and which of them are required; ranges, patterns and formats in the schema
are the tool's own business (`loosened`).

**Folding.** On screens the model was trained on one picture at a time: the newest screen, the goal,
and the calls before it as lines (tasks.base.recap). The protocols have a growing conversation
instead: goal with a picture, call, result with a picture, call, ... If all tools are actions on
screens and there is a picture, the conversation is folded into the form of the gym [C, O]:

- the picture is the newest one of the conversation;
- the goal is the text of the newest message of the user that has any;
- the lines are the calls since then. In place of a call that failed stands "? " and what its result
  says; a result's text counts for nothing otherwise. A reply without a call gives "?".

**A picture as a result.** A message of the user that has pictures and no text, right after a
result, is part of this result: OpenAI's own results are only text.

**Thoughts** of replies before the user's newest message are left out, as GLM's template does [R].
"""
import json
from dataclasses import dataclass, field, replace

from lib.conversations import call_text, parse_call, plainly
from tasks.actions import ACTIONS, SCREENS
from tasks.base import IMAGE, Message, recap
from tasks.tools import USES


@dataclass(frozen=True)
class Tool:
    """A tool that a reply may call. parameters: the JSON schema of its arguments, an object."""
    name: str
    description: str = ""
    parameters: dict = field(default_factory=dict)

    @property
    def arguments(self) -> tuple[str, ...]:
        """The names of the arguments in the order in which they are written."""
        return tuple(self.parameters.get("properties") or ())


@dataclass(frozen=True)
class Call:
    """A call of a tool; arguments is an object of JSON. id: the protocol's name for this call."""
    name: str
    arguments: dict
    id: str = ""


@dataclass(frozen=True)
class Entry:
    """A message as the protocols have it; its text has one `<|image|>` for each image.

    role: system | user | assistant | observation (the result of a tool). Of a reply: thought and
    calls. Of a result: answers, the id of its call, and whether the call failed.
    place: where it is in the request, for errors.
    """
    role: str
    text: str = ""
    images: tuple = ()
    thought: str = ""
    calls: tuple[Call, ...] = ()
    answers: str = ""
    failed: bool = False
    place: str = ""

    @property
    def words(self) -> str:
        """The text without the marks of pictures."""
        return self.text.replace(IMAGE, "").strip()


# ---- calls --------------------------------------------------------------------------------------

def write_call(call: Call, tools) -> str:
    """A call as the model writes it. Raises ValueError where there is no such call."""
    order = next((tool.arguments for tool in tools if tool.name == call.name), ())
    if tuple(call.arguments) and set(call.arguments) == set(order[:len(call.arguments)]):
        return call_text(call.name, [call.arguments[name] for name in order[:len(call.arguments)]])
    return call_text(call.name, call.arguments)


def read_call(text: str, tools) -> Call | None:
    """The call of one of the tools that a text is, None of any other text."""
    tool = next((tool for tool in tools if text.strip().startswith(f"{tool.name}(")), None)
    found = parse_call(text) if tool else None
    if not found:
        return None
    name, arguments = found
    if isinstance(arguments, list):
        if len(arguments) > len(tool.arguments):
            return None
        arguments = dict(zip(tool.arguments, arguments))
    return Call(name, arguments) if set(arguments) <= set(tool.arguments) else None


def read_reply(text: str, tools) -> tuple[str, list[Call]]:
    """(text, calls) of a reply: the calls are its last lines. Without one, the text is all."""
    lines, calls = text.rstrip().split("\n"), []
    while lines and (call := read_call(lines[-1], tools)):
        calls.insert(0, call)
        lines.pop()
    return ("\n".join(lines).rstrip(), calls) if calls else (text, [])


class CallStream:
    """A growing reply, of which text that may still become a call is held back."""

    def __init__(self, tools):
        self.tools = tools
        self.text, self.shown = "", 0

    def add(self, new: str) -> str:
        """Take a new piece of text; returns the text that can be shown now."""
        self.text += new
        return self._show(self._certain())

    def end(self) -> tuple[str, list[Call]]:
        """At the end of the reply: (the text that was held back and is no call, the calls)."""
        text, calls = read_reply(self.text, self.tools)
        return self._show(len(text)), calls

    def _show(self, end: int) -> str:
        new, self.shown = self.text[self.shown:end], max(self.shown, end)
        return new

    def _certain(self) -> int:
        """Up to where the text is no call, however it goes on; white space may precede one."""
        if not self.tools:
            return len(self.text)
        lines = self.text.rstrip().split("\n")
        if self._may_become_call(lines[-1].lstrip()):
            lines.pop()
            while lines and read_call(lines[-1], self.tools):
                lines.pop()
        return len("\n".join(lines).rstrip())

    def _may_become_call(self, line: str) -> bool:
        names = [f"{tool.name}(" for tool in self.tools]
        return any(line.startswith(name) or name.startswith(line) for name in names)


TYPES = ("type", "properties", "required", "items", "enum", "const", "anyOf")


def loosened(tools) -> list[Tool]:
    """The tools, of whose schemas only the words in TYPES are left."""
    return [replace(tool, parameters=loose(tool.parameters)) for tool in tools]


def loose(schema):
    if not isinstance(schema, dict):
        return schema
    kept = {word: schema[word] for word in TYPES if word in schema}
    if "enum" in kept or "const" in kept:
        return {word: kept[word] for word in ("enum", "const") if word in kept}
    if isinstance(kept.get("properties"), dict):
        kept["properties"] = {name: loose(one) for name, one in kept["properties"].items()}
    if "items" in kept:
        kept["items"] = loose(kept["items"])
    if isinstance(kept.get("anyOf"), list):
        return {"anyOf": [loose(one) for one in kept["anyOf"]]}
    return kept


# ---- messages -----------------------------------------------------------------------------------

def messages_of(entries: list[Entry], tools) -> list[Message]:
    """A conversation as the model reads it. Raises ValueError where a call can't be written."""
    entries = with_shown_results(entries)
    if tools and all(map(is_screen_action, tools)):
        if folded := fold(entries, tools):
            return folded
    elif tools:
        entries = with_usage(entries, tools)
    newest = max((n for n, entry in enumerate(entries) if entry.role == "user"), default=0)
    return [Message("assistant", reply_text(entry, tools, thought=n > newest))
            if entry.role == "assistant" else Message(entry.role, entry.text, entry.images)
            for n, entry in enumerate(entries)]


def reply_text(entry: Entry, tools, thought: bool) -> str:
    """A reply of the conversation as the model wrote it."""
    lines = [entry.text] if entry.text else []
    lines += [write_call(call, tools) for call in entry.calls]
    before = f"<think>{entry.thought}</think>\n" if thought and entry.thought else ""
    return before + "\n".join(lines)


def with_shown_results(entries: list[Entry]) -> list[Entry]:
    """The entries, of which pictures without text after a result have become part of it."""
    joined = []
    for entry in entries:
        shows = entry.role == "user" and entry.images and not entry.words
        if shows and joined and joined[-1].role == "observation":
            result = joined.pop()
            entry = replace(result, text=result.text + IMAGE * len(entry.images),
                            images=result.images + entry.images)
        joined.append(entry)
    return joined


def with_usage(entries: list[Entry], tools) -> list[Entry]:
    """The entries, of which the first of the user says how to call the tools, unless it does."""
    n = next((n for n, entry in enumerate(entries) if entry.role == "user"), None)
    if n is None or USAGE in entries[n].text:
        return entries
    line = usage_line(tools, bool(entries[n].images))
    return [*entries[:n], replace(entries[n], text=f"{entries[n].text}\n{line}"), *entries[n + 1:]]


# ---- what the model knows -----------------------------------------------------------------------

USAGE = "One call a turn"       # how the gym's line about tools begins


def is_known(tool: Tool) -> bool:
    """Whether a tool is an action of the gym: one of its verbs, with as many arguments."""
    verb = ACTIONS.get(tool.name)
    return bool(verb) and (len(tool.arguments) == len(verb.arguments)
                           or verb.optional and not tool.arguments)


def is_screen_action(tool: Tool) -> bool:
    """Whether a tool is an action on a screen, which the model knows by its name."""
    return is_known(tool) and bool(set(ACTIONS[tool.name].categories) & set(SCREENS))


def usage_line(tools, picture: bool) -> str:
    """The line about tools below a question. picture: whether the question has one."""
    kinds = [kind for tool in tools if is_known(tool)
             for kind in ACTIONS[tool.name].arguments.values()]
    points = picture and "coordinate" in kinds
    where = ", points in 0-999 of the last whole picture" if points else ""
    return plainly(f"{USAGE}{where}: {', '.join(map(usage, tools))}.")


def usage(tool: Tool) -> str:
    """How a call looks: the gym's own words for its tools, find("word", limit) for others."""
    if is_known(tool) and tool.name in USES:
        return f"{tool.name}({USES[tool.name]})"
    return f"{tool.name}({', '.join(shown_argument(tool, name) for name in tool.arguments)})"


def shown_argument(tool: Tool, name: str) -> str:
    schema = tool.parameters["properties"][name]
    is_text = isinstance(schema, dict) and schema.get("type") == "string"
    return json.dumps(name) if is_text else name


# ---- folding ------------------------------------------------------------------------------------

def fold(entries: list[Entry], tools) -> list[Message] | None:
    """The conversation in the form of the gym's screens, after the system's messages: one message
    with the newest picture, the goal and the calls since then. None if there is no goal or no
    picture."""
    goals = [n for n, entry in enumerate(entries) if entry.role == "user" and entry.words]
    pictures = [image for entry in entries for image in entry.images]
    if not goals or not pictures:
        return None
    lines, failed = [], {e.answers: e.words for e in entries if e.failed}
    for entry in entries[goals[-1]:]:
        if entry.role != "assistant":
            continue
        for call in entry.calls:
            complaint = failed.get(call.id)
            lines.append(write_call(call, tools) if complaint is None else
                         f"? {complaint.removeprefix('?').strip()}".strip())
        if not entry.calls:
            lines.append("?")
    system = [Message("system", entry.text) for entry in entries if entry.role == "system"]
    goal = recap(entries[goals[-1]].words, lines)
    return [*system, Message("user", goal, (pictures[-1],))]
