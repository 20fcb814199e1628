"""OpenAI's Chat Completions: requests and replies. lib/api.py says how serve.py uses this.

Read: model, messages, max_tokens or max_completion_tokens, temperature, top_p, seed, stop, stream,
stream_options, tools, tool_choice, parallel_tool_calls, response_format, reasoning_effort.

Ours differs from the service in this:

- Without `temperature` a reply is greedy, as everywhere in this repository; the service samples at
  1. Without `seed` a sampled reply differs each time. top_p 0 always takes the most likely token.
- max_tokens may be more than there is room for; the reply then ends with "length".
- `reasoning_effort` gives the model tokens for a thought before the reply (EFFORTS), at most half
  of max_tokens; without it, it does not think. The thought comes as `reasoning_content`, as other
  servers of open models have it.
- A tool's result may have pictures among its parts, and so may the user's message right after it.
- The model must be able to go on from a conversation: see `check_entries` in lib/api.py.
- `tools` that may be called and a `response_format` of JSON exclude each other.

Ignored, whatever they hold: IGNORED below and, in a message, `name`, `annotations`, the `detail` of
a picture, and what the official client adds to replies (`index`, `parsed`, `parsed_arguments`).
Fields that would change the reply but are not built must ask for nothing; all others are refused.
"""
import json
import secrets

from lib.api import (ApiError, bad, Chat, check_model, check_tools, conversation, data_uri_picture,
                     event, Fields, form_of_call, form_of_json, joined, Limits, LONGEST_STOP,
                     named_tool, read_model, read_tool)
from lib.tool_use import Call, CallStream, Entry, read_reply
from lib.turns import ReplySettings, Turn

# What they say changes no reply of this server.
IGNORED = ("user", "metadata", "store", "service_tier", "safety_identifier", "prompt_cache_key",
           "prompt_cache_options", "prompt_cache_retention", "verbosity", "prediction")
# How much of Limits.max_think a thought may have.
EFFORTS = {"none": 0, "minimal": 0, "low": 0.25, "medium": 0.5, "high": 1, "xhigh": 1, "max": 1}
ROLES = {"system": "system", "developer": "system", "user": "user", "assistant": "assistant",
         "tool": "observation"}


class OpenAI:
    """The protocol for one model, whose tokenizer this is."""

    def __init__(self, tokens):
        self.tokens = tokens

    # ---- requests ---------------------------------------------------------------------------

    def read(self, body: dict, limits: Limits) -> Chat:
        """The request in the body of POST /v1/chat/completions."""
        f = Fields(body)
        model = read_model(f, limits)
        entries = [self._entry(message, limits)
                   for message in f.objects("messages", limits.max_messages, need=True)]
        declared = [self._tool(tool) for tool in f.objects("tools", limits.max_tools)]
        check_tools(declared)
        tools, call_form = self._tool_choice(f, declared, limits)
        json_form = self._json_form(f, limits)
        if json_form and tools:
            raise bad("response_format", "JSON and tools that may be called exclude each other "
                      "here", "unsupported_parameter")
        stream, options = f.truth("stream"), f.object("stream_options")
        usage = False
        if options:
            if not stream:
                raise bad("stream_options", "only where `stream` is true")
            usage = options.truth("include_usage")
            options.ignore("include_obfuscation")
            options.end()
        one_call = not f.truth("parallel_tool_calls", True)
        effort = EFFORTS[f.word("reasoning_effort", EFFORTS, "none")]
        max_new = min(self._max_new(f, limits), limits.max_new)
        think = min(int(effort * limits.max_think), max_new // 2)
        settings = ReplySettings(
            max_new=max_new - think, think=think,
            temperature=f.number("temperature", 0, 2, 0),
            top_p=f.number("top_p", 0, 1, 1),
            seed=f.integer("seed", -2 ** 63, 2 ** 63 - 1, secrets.randbits(63)),
            form=call_form or json_form, stop=self._stop(f))
        f.ignore(*IGNORED)
        self._refuse_unbuilt(f)
        f.end()
        return Chat(model, conversation(entries, declared, limits), settings, tools, stream,
                    one_call, usage)

    def _refuse_unbuilt(self, f: Fields):
        f.refuse("only one reply is given", "n", unless=[1])
        f.refuse("log-probabilities are not given", "logprobs", "top_logprobs", unless=[False, 0])
        f.refuse("not built", "frequency_penalty", "presence_penalty", unless=[0])
        f.refuse("not built", "logit_bias", unless=[{}])
        f.refuse("only text is given", "modalities", unless=[["text"]])
        f.refuse("only text is given", "audio")
        f.refuse("not built; `tools` are", "functions", "function_call")
        f.refuse("not built", "web_search_options", "moderation")

    def _max_new(self, f: Fields, limits: Limits) -> int:
        old = f.integer("max_tokens", 1)
        new = f.integer("max_completion_tokens", 1)
        if old and new:
            raise bad("max_tokens", "not together with max_completion_tokens")
        return old or new or limits.max_new

    def _stop(self, f: Fields) -> tuple[str, ...]:
        stop = f.take("stop", (str, list), "a text or a list of texts", [])
        stop = [stop] if isinstance(stop, str) else stop
        if len(stop) > 4 or not all(
                isinstance(text, str) and 0 < len(text) <= LONGEST_STOP for text in stop):
            raise bad("stop", f"must be at most 4 texts of 1 to {LONGEST_STOP} characters")
        return tuple(stop)

    def _tool(self, f: Fields):
        f.word("type", ["function"], need=True)
        function = f.object("function", need=True)
        tool = read_tool(function, "parameters")
        function.ignore("strict")
        function.end()
        f.end()
        return tool

    def _tool_choice(self, f: Fields, declared, limits: Limits):
        """(the tools that the reply may call, the form that it must have if it must call one)."""
        choice = f.take("tool_choice", (str, dict), "a word or an object", "auto")
        if choice == "none":
            return (), None
        if choice == "auto":
            return tuple(declared), None
        if not declared:
            raise bad("tool_choice", "there are no tools")
        if isinstance(choice, dict):
            wanted = f.object("tool_choice")
            wanted.word("type", ["function"], need=True)
            function = wanted.object("function", need=True)
            name = function.text("name", need=True)
            function.end()
            wanted.end()
            may = [named_tool(name, declared, function.at("name"))]
        elif choice == "required":
            may = declared
        else:
            raise bad("tool_choice", "must be none, auto, required, or an object that names a tool")
        return tuple(declared), form_of_call(self.tokens, may, limits)

    def _json_form(self, f: Fields, limits: Limits):
        wanted = f.object("response_format")
        if not wanted:
            return None
        kind = wanted.word("type", ["text", "json_object", "json_schema"], need=True)
        schema, path = None, "response_format"
        if kind == "json_schema":
            details = wanted.object("json_schema", need=True)
            schema = details.take("schema", dict, "a JSON schema", need=True)
            details.ignore("name", "description", "strict")
            details.end()
            path = details.at("schema")
        wanted.end()
        if kind == "text":
            return None
        return form_of_json(self.tokens, schema, path, limits)

    # ---- messages ---------------------------------------------------------------------------

    def _entry(self, f: Fields, limits: Limits) -> Entry:
        """A message of the conversation."""
        role = ROLES[f.word("role", ROLES, need=True)]
        pictures = role in ("user", "observation")
        text, images = joined(self._parts(f, pictures, limits))
        f.ignore("name")
        thought, calls, answers = "", (), ""
        if role == "assistant":
            thought = f.text("reasoning_content")
            calls = tuple(self._call(call) for call in f.objects("tool_calls", limits.max_tools))
            f.ignore("annotations", "parsed")
            f.refuse("only text is read", "audio", "function_call")
            text = text or f.text("refusal")
            f.ignore("refusal")
            if "content" not in f.value and not calls:
                raise bad(f.at("content"), "a reply has a content or tool_calls",
                          "missing_required_parameter")
        elif role == "observation":
            answers = f.text("tool_call_id", need=True)
        f.end()
        return Entry(role, text, images, thought, calls, answers, text.startswith("?"), f.path)

    def _parts(self, f: Fields, pictures: bool, limits: Limits) -> list:
        """The texts and the pictures in the content of a message."""
        content = f.take("content", (str, list), "a text or a list of parts", "")
        if isinstance(content, str):
            return [content]
        return [self._part(part, pictures) for part in f.objects("content", limits.max_messages)]

    def _part(self, f: Fields, pictures: bool):
        kinds = ["text", "image_url"] if pictures else ["text", "refusal"]
        kind = f.word("type", kinds, need=True)
        if kind != "image_url":
            part = f.text(kind, need=True)
        else:
            image = f.object("image_url", need=True)
            part = data_uri_picture(image.text("url", need=True), image.at("url"))
            image.ignore("detail")
            image.end()
        f.ignore("prompt_cache_breakpoint")
        f.end()
        return part

    def _call(self, f: Fields) -> Call:
        name_of_call = f.text("id", need=True)
        f.word("type", ["function"], "function")
        f.ignore("index")
        function = f.object("function", need=True)
        name, written = function.text("name", need=True), function.text("arguments")
        function.ignore("parsed_arguments")
        function.end()
        f.end()
        try:
            arguments = json.loads(written or "{}")
        except (ValueError, RecursionError):
            arguments = None
        if not isinstance(arguments, dict):
            raise bad(function.at("arguments"), "must be an object of JSON, as a text")
        return Call(name, arguments, name_of_call)

    # ---- replies ----------------------------------------------------------------------------

    def whole(self, chat: Chat, turn: Turn) -> dict:
        """The answer to a request that is not streamed."""
        text, calls = read_reply(turn.text, chat.tools)
        calls = calls[:1] if chat.one_call else calls
        message = {"role": "assistant", "content": text or (None if calls else ""), "refusal": None}
        if turn.thought:
            message["reasoning_content"] = turn.thought
        if calls:
            message["tool_calls"] = [call_object(call) for call in calls]
        choice = {"index": 0, "message": message, "logprobs": None,
                  "finish_reason": finish_reason(turn, calls)}
        return {"id": new_id("chatcmpl"), "object": "chat.completion", "created": chat.created,
                "model": chat.model, "choices": [choice], "usage": usage_of(turn)}

    def stream(self, chat: Chat) -> "Events":
        """The answer to a request that is streamed."""
        return Events(chat)

    def error(self, error: ApiError) -> dict:
        return error_object(error)

    def models(self, limits: Limits) -> dict:
        """The answer to GET /v1/models."""
        return {"object": "list", "data": [self.model(name, limits) for name in limits.names]}

    def model(self, name: str, limits: Limits) -> dict:
        """The answer to GET /v1/models/NAME."""
        check_model(name, limits)
        return {"id": name, "object": "model", "created": 0, "owned_by": "nanoglm-v"}


class Events:
    """A reply as events: a first one with the role, pieces of thought and text, calls as a whole,
    the reason why it ended, [DONE]. Each method returns the bytes to send."""

    def __init__(self, chat: Chat):
        self.chat, self.calls = chat, CallStream(chat.tools)
        self.id = new_id("chatcmpl")

    def begin(self, turn: Turn) -> bytes:
        return self._chunk({"role": "assistant", "content": ""})

    def piece(self, kind: str, text: str) -> bytes:
        if kind == "thought":
            return self._chunk({"reasoning_content": text})
        return self._text(self.calls.add(text))

    def end(self, turn: Turn) -> bytes:
        text, calls = self.calls.end()
        calls = calls[:1] if self.chat.one_call else calls
        sent = self._text(text)
        for n, call in enumerate(calls):
            sent += self._chunk({"tool_calls": [{"index": n, **call_object(call)}]})
        sent += self._chunk({}, finish_reason(turn, calls))
        if self.chat.usage:
            sent += self._data(choices=[], usage=usage_of(turn))
        return sent + event("[DONE]")

    def fail(self, error: ApiError) -> bytes:
        return event(error_object(error))

    def _text(self, text: str) -> bytes:
        return self._chunk({"content": text}) if text else b""

    def _chunk(self, delta: dict, reason: str | None = None) -> bytes:
        choice = {"index": 0, "delta": delta, "logprobs": None, "finish_reason": reason}
        usage = {"usage": None} if self.chat.usage else {}
        return self._data(choices=[choice], **usage)

    def _data(self, **fields) -> bytes:
        return event({"id": self.id, "object": "chat.completion.chunk",
                      "created": self.chat.created, "model": self.chat.model, **fields})


def new_id(prefix: str) -> str:
    return f"{prefix}-{secrets.token_hex(12)}"


def call_object(call: Call) -> dict:
    return {"id": new_id("call"), "type": "function",
            "function": {"name": call.name,
                         "arguments": json.dumps(call.arguments, ensure_ascii=False)}}


def finish_reason(turn: Turn, calls) -> str:
    if calls:
        return "tool_calls"
    return "length" if turn.finish in ("length", "context") else "stop"


def usage_of(turn: Turn) -> dict:
    prompt, reply = turn.prompt_tokens, len(turn.ids)
    return {"prompt_tokens": prompt, "completion_tokens": reply, "total_tokens": prompt + reply}


def error_object(error: ApiError) -> dict:
    kinds = {401: "authentication_error", 403: "permission_error", 429: "rate_limit_error"}
    kind = "server_error" if error.status >= 500 else "invalid_request_error"
    return {"error": {"message": error.message, "type": kinds.get(error.status, kind),
                      "param": error.param or None, "code": error.kind or None}}
