"""Anthropic's Messages: requests and replies. lib/api.py says how serve.py uses this.

Read: model, messages, max_tokens, system, stop_sequences, stream, thinking, tools, tool_choice,
output_config.format, temperature, top_p.

Ours differs from the service in this:

- Without `temperature` a reply is greedy, as everywhere in this repository; the service samples at
  1. top_p 0 always takes the most likely token.
- max_tokens may be more than there is room for; the reply then ends with max_tokens, or with
  model_context_window_exceeded. 0 is refused: there is no cache of prompts that it could fill.
- thinking of type "enabled" gives the model `budget_tokens` for a thought before the reply, which
  may also be fewer than 1,024. With every other type it does not think. Signatures of thoughts mean
  nothing here and are not checked.
- A last message of the assistant is the beginning of the reply, of which calls are then not read.
- The model must be able to go on from a conversation: see `check_entries` in lib/api.py.
- Tools are those with an input_schema. Tools that the service runs or describes itself are refused.
- `tools` that may be called and an output_config.format exclude each other.

Ignored, whatever they hold: IGNORED below, output_config.effort and task_budget, and what blocks
say about caches and citations (IGNORED_IN_BLOCKS). All others are refused. No beta, in a header or
in the address, changes how a request is read.
"""
import json
import secrets
from itertools import groupby

from data import document
from lib.api import (ApiError, bad, Chat, check_length, check_model, check_tools, conversation,
                     event, Fields, FORMATS, form_of_call, form_of_json, joined, Limits,
                     LONGEST_STOP, named_tool, picture, read_model, read_tool, refusing)
from lib.tool_use import Call, CallStream, Entry, read_reply
from lib.turns import ReplySettings, Turn

# What they say changes no reply of this server. Claude Code sends several of them.
IGNORED = ("metadata", "service_tier", "cache_control", "context_management", "diagnostics",
           "inference_geo", "speed", "user_profile_id", "workspace_id", "billing_policy",
           "anthropic_version", "anthropic_beta", "betas")
IGNORED_IN_BLOCKS = ("cache_control", "citations", "caller", "toolset_name", "transformations")
IGNORED_IN_TOOLS = ("cache_control", "strict", "defer_loading", "eager_input_streaming",
                    "input_examples", "allowed_callers")
SIGNATURE = "nanoglm-v"     # of every thought: clients want one
BLOCKS = {                  # what a message of each role may hold
    "system": ["text"], "user": ["text", "image", "tool_result"],
    "assistant": ["text", "tool_use", "thinking", "redacted_thinking"]}
MOST_STOPS = 64
MOST_COUNTED = 2 ** 20      # characters of which tokens are counted


class Anthropic:
    """The protocol for one model, whose tokenizer and Config these are."""

    def __init__(self, tokens, config):
        self.tokens, self.config = tokens, config

    # ---- requests ---------------------------------------------------------------------------

    def read(self, body: dict, limits: Limits) -> Chat:
        """The request in the body of POST /v1/messages."""
        f = Fields(body, dotted=True)
        model = read_model(f, limits)
        entries, prefix = self._entries(f, limits)
        declared = [self._tool(tool) for tool in f.objects("tools", limits.max_tools)]
        check_tools(declared)
        tools, call_form, one_call = self._tool_choice(f, declared, limits)
        json_form = self._json_form(f, limits)
        if json_form and tools:
            raise bad("output_config.format", "JSON and tools that may be called exclude each "
                      "other here", "unsupported_parameter")
        max_new = f.integer("max_tokens", 1, need=True)
        think = min(self._think(f, max_new), limits.max_think)
        if think and prefix:
            raise bad("thinking", "not together with a beginning of the reply")
        settings = ReplySettings(
            max_new=min(max_new - think, limits.max_new), think=think,
            temperature=f.number("temperature", 0, 1, 0), top_p=f.number("top_p", 0, 1, 1),
            seed=secrets.randbits(63), prefix=prefix, form=call_form or json_form,
            stop=f.texts("stop_sequences", MOST_STOPS, LONGEST_STOP))
        stream = f.truth("stream")
        f.ignore(*IGNORED)
        f.refuse("not built: leave it out", "top_k", "container", "compaction", "fallbacks",
                 "fallback_credit_token", "thread")
        f.refuse("not built", "mcp_servers", unless=[[]])
        f.end()
        return Chat(model, conversation(entries, declared, limits), settings,
                    () if prefix else tools, stream, one_call)

    def count(self, body: dict, limits: Limits) -> dict:
        """The answer to POST /v1/messages/count_tokens."""
        chat = self.read({"max_tokens": 10 ** 9, **body}, limits)     # it is no field of theirs
        check_length(chat, MOST_COUNTED)
        with refusing():
            prompt = document(chat.messages, self.tokens, self.config, answer=True, lazy=True)
        return {"input_tokens": len(prompt.ids)}

    def _think(self, f: Fields, max_new: int) -> int:
        """The tokens that a thought may have."""
        thinking = f.object("thinking")
        if not thinking:
            return 0
        kinds = ["enabled", "disabled", "adaptive", "between_tools"]
        kind = thinking.word("type", kinds, need=True)
        thinking.ignore("display")
        budget = thinking.integer("budget_tokens", 1, need=kind == "enabled")
        thinking.end()
        if kind != "enabled":
            return 0
        if budget >= max_new:
            raise bad(thinking.at("budget_tokens"), "must be less than max_tokens")
        return budget

    def _tool(self, f: Fields):
        f.word("type", ["custom"], "custom")
        f.take("input_schema", need=True)
        tool = read_tool(f, "input_schema")
        f.ignore(*IGNORED_IN_TOOLS)
        f.end()
        return tool

    def _tool_choice(self, f: Fields, declared, limits: Limits):
        """(the tools that the reply may call, the form that it must have if it must call one,
        whether it may call one at most)."""
        choice = f.object("tool_choice")
        if not choice:
            return tuple(declared), None, False
        kind = choice.word("type", ["auto", "any", "tool", "none"], need=True)
        name = choice.text("name", need=True) if kind == "tool" else ""
        one_call = choice.truth("disable_parallel_tool_use")
        choice.end()
        if kind == "none":
            return (), None, one_call
        if not declared:
            raise bad("tool_choice", "there are no tools")
        if kind == "auto":
            return tuple(declared), None, one_call
        may = [named_tool(name, declared, choice.at("name"))] if name else declared
        form = form_of_call(self.tokens, may, limits)
        return tuple(declared), form, one_call

    def _json_form(self, f: Fields, limits: Limits):
        wanted = f.object("output_config")
        if not wanted:
            return None
        wanted.ignore("effort", "task_budget")
        details = wanted.object("format")
        wanted.end()
        if not details:
            return None
        details.word("type", ["json_schema"], need=True)
        schema = details.take("schema", dict, "a JSON schema", need=True)
        details.end()
        return form_of_json(self.tokens, schema, details.at("schema"), limits)

    # ---- messages ---------------------------------------------------------------------------

    def _entries(self, f: Fields, limits: Limits) -> tuple[list[Entry], str]:
        """The conversation, and the beginning of the reply where the last message is one."""
        entries = []
        system, _ = joined(self._blocks(f, "system", "system", limits)[0])
        if system:
            entries.append(Entry("system", system, place="system"))
        for message in f.objects("messages", limits.max_messages, need=True):
            entries += self._message(message, limits)
        entries = combined(entries)
        if not entries or entries[-1].role != "assistant" or entries[-1].calls:
            return entries, ""
        *entries, last = entries
        if last.text != last.text.rstrip() or not last.text:
            raise bad(last.place, "the beginning of the reply must be a text that does not end "
                      "with white space")
        return entries, last.text

    def _message(self, f: Fields, limits: Limits) -> list[Entry]:
        """One message: first the results of tools, then what else it says."""
        role = f.word("role", BLOCKS, need=True)
        parts, results, calls, thought = self._blocks(f, "content", role, limits)
        f.end()
        text, images = joined(parts)
        if results and not parts:
            return results
        return [*results, Entry(role, text, images, thought, tuple(calls), place=f.path)]

    def _blocks(self, f: Fields, name: str, role: str, limits: Limits) -> tuple:
        """(texts and Pictures, results, calls, thought) of the blocks in a field."""
        content = f.take(name, (str, list), "a text or a list of blocks", "", role != "system")
        parts, results, calls, thought = [], [], [], ""
        if isinstance(content, str):
            return [content], results, calls, thought
        for block in f.objects(name, limits.max_messages):
            kind = block.word("type", BLOCKS[role], need=True)
            block.ignore(*IGNORED_IN_BLOCKS)
            if kind == "text":
                parts.append(block.text("text", need=True))
            elif kind == "image":
                parts.append(self._image(block))
            elif kind == "tool_result":
                results.append(self._result(block, limits))
            elif kind == "tool_use":
                calls.append(Call(block.text("name", need=True),
                                  block.take("input", dict, "an object", need=True),
                                  block.text("id", need=True)))
            elif kind == "thinking":
                thought += block.text("thinking")
                block.ignore("signature")
            else:
                block.ignore("data")        # of a thought that can't be read
            block.end()
        return parts, results, calls, thought

    def _result(self, f: Fields, limits: Limits) -> Entry:
        content = f.take("content", (str, list), "a text or a list of blocks", "")
        parts = [content] if isinstance(content, str) else []
        for block in [] if parts else f.objects("content", limits.max_messages):
            kind = block.word("type", ["text", "image"], need=True)
            block.ignore(*IGNORED_IN_BLOCKS)
            parts.append(block.text("text", need=True) if kind == "text" else
                         self._image(block))
            block.end()
        text, images = joined(parts)
        failed = f.truth("is_error") or text.startswith("?")
        return Entry("observation", text, images, answers=f.text("tool_use_id", need=True),
                     failed=failed, place=f.path)

    def _image(self, f: Fields):
        source = f.object("source", need=True)
        if source.text("type", need=True) != "base64":
            raise bad(source.at("type"), "must be base64: this server fetches no pictures",
                      "invalid_image_url")
        found = picture(source.text("data", need=True), source.at("data"))
        kinds = [f"image/{name.lower()}" for name in FORMATS.values()]
        source.word("media_type", kinds, need=True)
        source.end()
        return found

    # ---- replies ----------------------------------------------------------------------------

    def whole(self, chat: Chat, turn: Turn) -> dict:
        """The answer to a request that is not streamed."""
        text, calls = read_reply(turn.text, chat.tools)
        calls = calls[:1] if chat.one_call else calls
        content = []
        if turn.thought:
            content.append({"type": "thinking", "thinking": turn.thought, "signature": SIGNATURE})
        if text:
            content.append({"type": "text", "text": text})
        content += [{**call_block(call), "input": call.arguments} for call in calls]
        return message_object(chat) | ending(turn, calls) | {
            "content": content, "usage": usage_of(turn)}

    def stream(self, chat: Chat) -> "Events":
        """The answer to a request that is streamed."""
        return Events(chat)

    def error(self, error: ApiError) -> dict:
        return error_object(error)

    def models(self, limits: Limits) -> dict:
        """The answer to GET /v1/models."""
        names = limits.names
        return {"data": [self.model(name, limits) for name in names], "has_more": False,
                "first_id": names[0], "last_id": names[-1]}

    def model(self, name: str, limits: Limits) -> dict:
        """The answer to GET /v1/models/NAME."""
        check_model(name, limits)
        return {"type": "model", "id": name, "display_name": name,
                "created_at": "1970-01-01T00:00:00Z", "lifecycle": "active",
                "max_input_tokens": limits.context, "max_tokens": limits.max_new}


def combined(entries: list[Entry]) -> list[Entry]:
    """The conversation, of which messages of the user or of the assistant that follow on one
    another are one, as the service does it."""
    found = []
    for role, group in groupby(entries, key=lambda entry: entry.role):
        several = list(group)
        if role in ("user", "assistant") and len(several) > 1:
            several = [Entry(role, "\n".join(entry.text for entry in several if entry.text),
                             tuple(image for entry in several for image in entry.images),
                             "".join(entry.thought for entry in several),
                             tuple(call for entry in several for call in entry.calls),
                             place=several[0].place)]
        found += several
    return found


class Events:
    """A reply as events: message_start, a block after another, message_delta, message_stop. Each
    method returns the bytes to send."""

    def __init__(self, chat: Chat):
        self.chat, self.calls = chat, CallStream(chat.tools)
        self.block, self.open = -1, ""      # number and type of the block that is being sent

    def begin(self, turn: Turn) -> bytes:
        message = message_object(self.chat) | {
            "content": [], "stop_reason": None, "stop_sequence": None,
            "usage": usage_of(turn) | {"output_tokens": 0}}
        return _event("message_start", message=message) + _event("ping")

    def piece(self, kind: str, text: str) -> bytes:
        if kind == "thought":
            start = {"type": "thinking", "thinking": "", "signature": ""}
            return self._open(start) + self._delta("thinking_delta", thinking=text)
        return self._text(self.calls.add(text))

    def end(self, turn: Turn) -> bytes:
        text, calls = self.calls.end()
        calls = calls[:1] if self.chat.one_call else calls
        sent = self._text(text)
        for call in calls:
            sent += self._close() + self._open({**call_block(call), "input": {}})
            arguments = json.dumps(call.arguments, ensure_ascii=False)
            sent += self._delta("input_json_delta", partial_json=arguments)
        sent += self._close()
        sent += _event("message_delta", delta=ending(turn, calls), usage=usage_of(turn))
        return sent + _event("message_stop")

    def fail(self, error: ApiError) -> bytes:
        return event(error_object(error), "error")

    def _text(self, text: str) -> bytes:
        if not text:
            return b""
        return self._open({"type": "text", "text": ""}) + self._delta("text_delta", text=text)

    def _open(self, block: dict) -> bytes:
        """Begin a block, unless the one that is being sent is of this type."""
        if self.open == block["type"]:
            return b""
        closing = self._close()
        self.block, self.open = self.block + 1, block["type"]
        return closing + _event("content_block_start", index=self.block, content_block=block)

    def _close(self) -> bytes:
        if not self.open:
            return b""
        signed = b""
        if self.open == "thinking":
            signed = self._delta("signature_delta", signature=SIGNATURE)
        self.open = ""
        return signed + _event("content_block_stop", index=self.block)

    def _delta(self, kind: str, **fields) -> bytes:
        return _event("content_block_delta", index=self.block, delta={"type": kind, **fields})


def _event(kind: str, **fields) -> bytes:
    return event({"type": kind, **fields}, kind)


def message_object(chat: Chat) -> dict:
    """What both forms of an answer have in common."""
    return {"id": f"msg_{secrets.token_hex(12)}", "type": "message", "role": "assistant",
            "model": chat.model}


def call_block(call: Call) -> dict:
    return {"type": "tool_use", "id": f"toolu_{secrets.token_hex(12)}", "name": call.name}


def ending(turn: Turn, calls) -> dict:
    """Why the reply ended."""
    reasons = {"stop": "end_turn", "length": "max_tokens", "stop text": "stop_sequence",
               "context": "model_context_window_exceeded"}
    return {"stop_reason": "tool_use" if calls else reasons[turn.finish],
            "stop_sequence": None if calls else turn.stopped or None}


def usage_of(turn: Turn) -> dict:
    return {"input_tokens": turn.prompt_tokens, "output_tokens": len(turn.ids),
            "cache_creation_input_tokens": 0, "cache_read_input_tokens": 0}


KINDS = {401: "authentication_error", 403: "permission_error", 404: "not_found_error",
         413: "request_too_large", 429: "rate_limit_error", 503: "overloaded_error",
         504: "timeout_error", 529: "overloaded_error"}


def error_object(error: ApiError) -> dict:
    kind = "api_error" if error.status >= 500 else "invalid_request_error"
    return {"type": "error",
            "error": {"type": KINDS.get(error.status, kind), "message": error.message}}
