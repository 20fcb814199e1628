"""What the two protocols of serve.py share: a request that has been read, its limits, its errors.

lib/openai_api.py and lib/anthropic_api.py each have a class with these methods; serve.py needs no
other:

    protocol = OpenAI(tokens, config)                   or Anthropic(tokens, config)
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

Whatever is wrong with a request raises ApiError.
"""
from dataclasses import dataclass, field

from lib.images import BadRecord
from lib.tool_use import Tool
from lib.turns import ReplySettings, Turn
from tasks.base import Message

MODEL = "nanoglm-v"         # a name to which every served model answers


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
    max_think: int = 256        # tokens of a thought, likewise
    max_images: int = 16        # pictures in a request
    max_pixels: int = 2 ** 24   # of one picture, by its header, before it is decoded
    max_messages: int = 1000
    max_tools: int = 128
    max_depth: int = 32         # of lists and objects inside one another


@dataclass
class Chat:
    """A request of either protocol, as the model is asked it."""
    model: str                              # the name by which it was asked for
    messages: list[Message]
    settings: ReplySettings
    tools: tuple[Tool, ...] = ()            # those that the reply may call
    stream: bool = False                    # whether to send events as the reply grows
    options: dict = field(default_factory=dict)     # what the protocol itself remembers


def start(chat: Chat, tokens, config, limits: Limits) -> Turn:
    """The reply to a request, ready to be generated. Raises ApiError if a picture is damaged or
    the prompt leaves no room for a reply."""
    try:
        turn = Turn(chat.messages, chat.settings, tokens, config)
    except BadRecord as error:
        raise ApiError(400, "invalid_image", str(error), "messages") from None
    length = len(turn.request.prompt.ids)
    if length >= limits.context:
        raise ApiError(400, "context_length_exceeded", "prompt is too long: "
                       f"{length} tokens >= {limits.context} maximum", "messages")
    return turn
