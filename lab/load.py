"""Minutes of mixed load on a server: does it answer everything, rightly, and stay as it is?

    python -m lab.load                      ten minutes
    python -m lab.load --minutes=1 --clients=4 --ckpt=ckpt/demo

Starts serve.py in a process of its own, on loopback; Linux only, as its memory is read from /proc.
First each good request of `good_requests` gets its answer while nothing else runs. Then for some
minutes
- half of the clients send good requests, whole and streamed, and compare with that answer;
- the others, at random: leave in the middle of a request or of a reply; send what must be refused
  (`bad_requests`); read a stream in small pieces, slowly; or connect and say nothing.

Afterwards the server must be alive and have nothing that runs or waits; its log may not speak of a
failure; all good requests must have been answered rightly and all bad ones refused by a status of
4xx and an object with `error`; and its memory must be flat: the mean of the last quarter of the
time at most GROWTH above the mean of the second, or FEW_MB if that is more. The first quarter is
left out, since caches fill then.
"""
import lib  # first of all, before torch: see lib/__init__.py

import base64
import contextlib
import json
import random
import re
import socket
import statistics
import struct
import threading
import time
import zlib
from collections import Counter
from dataclasses import dataclass
from http.client import HTTPConnection
from pathlib import Path
from typing import Annotated

from lab.bench_serve import CHAT, CKPT, question, server_process
from lib.cli import cli, main, Natural, Positive, Range, Seed, UserError
from lib.common import write_json
from tasks.base import Task

MESSAGES = "/v1/messages"
GROWTH, FEW_MB = 0.05, 16
PATIENCE = 3                # seconds that the server gives a client to send its request
PATIENT = 300               # seconds that a client waits for an answer
CLICK = {"type": "object", "required": ["x", "y"],
         "properties": {"x": {"type": "integer"}, "y": {"type": "integer"}}}
ANIMAL = {"type": "object", "required": ["legs"], "additionalProperties": False,
          "properties": {"legs": {"enum": ["two", "four"]}}}


@dataclass
class Args:
    ckpt: str = ""             # checkpoint folder; default: ckpt/gym
    minutes: Annotated[float, Range(0.05, 600)] = 10.0
    clients: Annotated[int, Range(2, 64)] = 12      # that send requests at once
    pause: Natural = 50        # milliseconds between two things that a client does, on average
    slots: Positive = 8        # of the server
    seed: Seed = 0             # of what the clients do
    out: str = "out/load"      # folder of the JSON


# ---- requests -----------------------------------------------------------------------------------

def claude(body: dict, **fields) -> dict:
    """A request for Chat Completions as one for Messages, with other fields beside."""
    messages = json.loads(json.dumps(body["messages"]))
    for message in messages:
        for part in message["content"]:
            if part["type"] == "image_url":
                data = part.pop("image_url")["url"].partition(",")[2]
                part |= {"type": "image", "source": {"type": "base64", "media_type": "image/png",
                                                     "data": data}}
    return {"model": body["model"], "max_tokens": body["max_tokens"], "messages": messages,
            **fields}


def good_requests() -> list[tuple[str, dict]]:
    """(path, body) of requests whose answers never change: greedy, or sampled with a seed."""
    text, code = (question(Task("text_code", 1, 1), n) for n in (48, 16))
    read, scene = (question(Task(name, 2, 1), 64) for name in ("ocr_document", "scene_to_json"))
    film, form = question(Task("video_events", 1, 1), 16), question(Task("gui_form", 3, 1), 32)
    page = question(Task("ui_to_code", 1, 1), 400)
    tool = {"type": "function", "function": {"name": "click", "parameters": CLICK}}
    call = {"id": "call_1", "type": "function",
            "function": {"name": "click", "arguments": '{"x": 500, "y": 500}'}}
    second = [*form["messages"], {"role": "assistant", "content": None, "tool_calls": [call]},
              {"role": "tool", "tool_call_id": "call_1", "content": "clicked"}]
    schema = {"type": "json_schema", "json_schema": {"name": "animal", "schema": ANIMAL}}
    theirs = {"name": "click", "input_schema": CLICK}
    return [*((CHAT, body) for body in (
                text, read, scene, film, form, page, code | {"stop": ["return", ":"]},
                text | {"temperature": 1, "top_p": 0.9, "seed": 7},
                form | {"reasoning_effort": "low"}, form | {"response_format": schema},
                form | {"tools": [tool]}, form | {"tools": [tool], "tool_choice": "required"},
                form | {"tools": [tool], "messages": second})),
            *((MESSAGES, body) for body in (
                claude(text), claude(read), claude(film), claude(page),
                claude(code, stop_sequences=["return"]), claude(form, system="You are careful."),
                claude(form, tools=[theirs], tool_choice={"type": "any"}),
                claude(form, thinking={"type": "enabled", "budget_tokens": 16})))]


def bad_requests() -> list[bytes]:
    """Whole requests that must be refused, as bytes."""
    fine = question(Task("gui_form", 3, 1), 8)
    said = [{"role": "user", "content": "Hello"}]

    def shows(url: str) -> dict:
        picture = {"type": "image_url", "image_url": {"url": url}}
        return fine | {"messages": [{"role": "user", "content": [picture]}]}

    bodies = [
        (CHAT, fine | change) for change in (
            {"model": "gpt-9"}, {"max_tokens": 0}, {"max_tokens": -1}, {"top_p": 2}, {"n": 2},
            {"temperature": "hot"}, {"seed": 2 ** 64}, {"colour": "red"}, {"messages": []},
            {"messages": "Hello"}, {"messages": [*said, {"role": "assistant", "content": "Hi"}]},
            {"messages": [*said, {"role": "tool", "tool_call_id": "x", "content": "done"}]},
            {"messages": [{"role": "user", "content": "word " * 9000}]},
            {"response_format": {"type": "poem"}}, {"tools": [{"type": "function"}]})]
    bodies += [(CHAT, shows(url)) for url in (
        "http://127.0.0.1:1/x.png", "file:///etc/passwd", "data:image/png;base64,AAAA",
        "data:image/png;base64,%%%", bomb())]
    bodies += [(MESSAGES, claude(fine) | change) for change in (
        {"max_tokens": 0}, {"top_k": 5}, {"system": 3}, {"thinking": {"type": "enabled"}},
        {"messages": [{"role": "assistant", "content": "Hi"}]})]
    found = [raw(path, json.dumps(body).encode()) for path, body in bodies]
    found += [raw(CHAT, data) for data in (b"", b"{", b"[1, 2]", b"\xff\xfe", b"[" * 100_000)]
    found += [raw("/v1/nothing", b"{}"), raw("/health", b"{}"),
              raw(CHAT, b"{}", "text/plain"), raw(CHAT, b"{}", length="1000000000"),
              raw(CHAT, b"{}", length="-1"), raw(CHAT, b"{}", length="two"),
              b"GET /health HTTP/1.1\r\nHost: x\r\n" + b"A: b\r\n" * 20_000 + b"\r\n",
              b"GET /health HTTP/1.1\r\nHost: evil.example\r\n\r\n",
              b"nonsense\r\n\r\n"]
    return found


def bomb() -> str:
    """A PNG of few bytes that says it has 60,000 x 60,000 pixels."""
    def chunk(kind: bytes, data: bytes) -> bytes:
        return (struct.pack(">I", len(data)) + kind + data
                + struct.pack(">I", zlib.crc32(kind + data)))

    size = struct.pack(">IIBBBBB", 60_000, 60_000, 8, 2, 0, 0, 0)
    data = (b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", size)
            + chunk(b"IDAT", zlib.compress(bytes(100_000))) + chunk(b"IEND", b""))
    return "data:image/png;base64," + base64.b64encode(data).decode()


def raw(path: str, data: bytes, kind: str = "application/json", length: str = "") -> bytes:
    return (f"POST {path} HTTP/1.1\r\nHost: 127.0.0.1\r\nContent-Type: {kind}\r\n"
            f"Content-Length: {length or len(data)}\r\n\r\n").encode() + data


# ---- answers ------------------------------------------------------------------------------------

def content_of(answer: dict) -> tuple[str, str]:
    """(text, calls as text) of an answer of either protocol that came in one piece."""
    if "choices" in answer:
        message = answer["choices"][0]["message"]
        calls = [call["function"] for call in message.get("tool_calls", [])]
        return message["content"] or "", "".join(c["name"] + c["arguments"] for c in calls)
    blocks = answer["content"]
    calls = [block for block in blocks if block["type"] == "tool_use"]
    return ("".join(block["text"] for block in blocks if block["type"] == "text"),
            "".join(call["name"] + json.dumps(call["input"]) for call in calls))


def content_of_events(lines) -> tuple[str, str]:
    """The same of a stream. Raises UserError if it has an error, or no end."""
    text, calls, ended = "", "", False
    for line in lines:
        line = line.decode().strip()
        if not line.startswith("data: ") or (data := line[6:]) == "[DONE]":
            continue
        event = json.loads(data)
        if "error" in event:
            raise UserError(f"an error in the stream: {event['error']}")
        for choice in event.get("choices", []):
            delta = choice["delta"]
            text += delta.get("content") or ""
            for call in delta.get("tool_calls", []):
                calls += call["function"].get("name") or ""
                calls += call["function"].get("arguments") or ""
            ended = ended or choice["finish_reason"] is not None
        calls += event.get("content_block", {}).get("name", "")
        delta = event.get("delta", {})
        text, calls = text + delta.get("text", ""), calls + delta.get("partial_json", "")
        ended = ended or event.get("type") == "message_stop"
    if not ended:
        raise UserError("a stream has no end")
    return text, calls


# ---- what clients do ----------------------------------------------------------------------------

class Load:
    """Clients of a server, each in a thread, until `until`. counts: by what they did; wrong: what
    has gone wrong, one line each."""

    def __init__(self, port: int, args: Args):
        self.port, self.args = port, args
        self.good, self.bad = good_requests(), bad_requests()
        self.expected = [self.ask(i) for i in range(len(self.good))]
        self.counts, self.wrong, self.lock = Counter(), [], threading.Lock()

    def run(self, seconds: float, watch):
        """Load the server for some seconds; watch() is called twice a second, and the load ends
        early where it returns False."""
        self.until = time.monotonic() + seconds
        clients = [threading.Thread(target=self.client, args=(i,), daemon=True)
                   for i in range(self.args.clients)]
        for client in clients:
            client.start()
        while time.monotonic() < self.until and watch():
            time.sleep(0.5)
        self.until = 0.0        # the clients end, also where the server has ended first
        for client in clients:
            client.join(PATIENT)
            if client.is_alive():
                self.wrong.append("a client still waits for its answer")

    def client(self, number: int):
        rng = random.Random(f"{self.args.seed} {number}")
        trouble = (self.leave, self.be_refused, self.be_refused, self.read_slowly, self.be_silent)
        while time.monotonic() < self.until:
            work = self.be_answered if number % 2 == 0 else rng.choice(trouble)
            try:
                work(rng)
            except Exception as error:      # it is noted, and the client goes on
                with self.lock:
                    self.wrong.append(f"{work.__name__}: {type(error).__name__}: {error}")
            with self.lock:
                self.counts[work.__name__] += 1
            time.sleep(rng.expovariate(1) * self.args.pause / 1000)

    def connect(self):
        return contextlib.closing(HTTPConnection("127.0.0.1", self.port, timeout=PATIENT))

    def socket(self):
        return contextlib.closing(
            socket.create_connection(("127.0.0.1", self.port), timeout=PATIENT))

    def ask(self, i: int, stream: bool = False) -> tuple[str, str]:
        """The content of the answer to good request i."""
        path, body = self.good[i]
        with self.connect() as connection:
            connection.request("POST", path, json.dumps(body | {"stream": stream}),
                               {"Content-Type": "application/json"})
            response = connection.getresponse()
            if response.status != 200:
                raise UserError(f"{response.status} for good request {i}: {response.read()!r}")
            return content_of_events(response) if stream else content_of(json.load(response))

    def check(self, i: int, content: tuple[str, str]):
        if content != self.expected[i]:
            raise UserError(f"request {i} is answered by {content}, alone by {self.expected[i]}")

    def be_answered(self, rng):
        i = rng.randrange(len(self.good))
        self.check(i, self.ask(i, stream=rng.random() < 0.5))

    def leave(self, rng):
        """Close the connection in the middle of the request, or after some of the reply."""
        path, body = rng.choice(self.good)
        data = raw(path, json.dumps(body | {"stream": rng.random() < 0.7}).encode())
        with self.socket() as connection:
            if rng.random() < 0.3:
                connection.sendall(data[:rng.randrange(len(data))])
            else:
                connection.sendall(data)
                connection.settimeout(rng.expovariate(10) + 0.001)
                with contextlib.suppress(TimeoutError):
                    connection.recv(rng.randrange(1, 5000))

    def be_refused(self, rng):
        request = rng.choice(self.bad)
        with self.socket() as connection:
            with contextlib.suppress(ConnectionError):      # it may close before it has read all
                connection.sendall(request)
            answer = b""
            with contextlib.suppress(ConnectionResetError):
                while b"\r\n\r\n" not in answer or not answer.rstrip().endswith(b"}"):
                    data = connection.recv(2 ** 16)
                    if not data:
                        break
                    answer += data
        if not (re.match(rb"HTTP/1.[01] 4\d\d ", answer) and b'"error"' in answer):
            raise UserError(f"{request[:60]!r}... is answered by {answer[:200]!r}")

    def read_slowly(self, rng):
        """Read a stream in small pieces; all of it must come."""
        i = rng.choice([i for i, (path, _) in enumerate(self.good) if path == CHAT])
        data, answer = raw(CHAT, json.dumps(self.good[i][1] | {"stream": True}).encode()), b""
        with self.socket() as connection:
            connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 2048)
            connection.sendall(data)
            while b"0\r\n\r\n" not in answer[-1200:]:
                piece = connection.recv(1024)
                if not piece:
                    break
                answer += piece
                time.sleep(0.01)
        # Each event was sent as one chunk, so that its line is whole.
        self.check(i, content_of_events(answer.split(b"\n")))

    def be_silent(self, rng):
        """Say nothing, or half of a head; the server must end the connection."""
        with self.socket() as connection:
            connection.sendall(rng.choice([b"", b"POST ", raw(CHAT, b"")[:60]]))
            connection.settimeout(PATIENCE + 20)
            while connection.recv(2 ** 16):
                pass


# ---- the report ---------------------------------------------------------------------------------

def megabytes(process) -> float | None:
    """The memory that a process holds; None where it has ended."""
    status = Path(f"/proc/{process.pid}/status").read_text(encoding="utf-8")
    found = re.search(r"VmRSS:\s*(\d+)", status)
    return int(found[1]) / 1024 if found else None


def growth(memory: list[float]) -> tuple[float, float]:
    """Mean memory in the second and in the last quarter of the time."""
    quarter = len(memory) // 4
    return statistics.mean(memory[quarter:2 * quarter]), statistics.mean(memory[-quarter:])


def becomes_idle(load: Load) -> dict:
    """The state of the server as soon as nothing runs and waits there, or after 30 seconds."""
    until = time.monotonic() + 30
    while True:
        with load.connect() as connection:
            connection.request("GET", "/health")
            state = json.load(connection.getresponse())
        if state["running"] == state["waiting"] == 0 or time.monotonic() > until:
            return state
        time.sleep(0.1)


def run(args: Args) -> dict:
    """Load the server, print what was found and write it to out/load/load.json."""
    memory = []

    def watch() -> bool:
        held = megabytes(server.process)
        memory.extend([] if held is None else [held])
        return held is not None

    with server_process("serve.py", f"--ckpt={args.ckpt or CKPT}", f"--slots={args.slots}",
                        f"--timeout={PATIENCE}") as server:
        load = Load(server.port, args)
        print(f"{len(load.good)} good requests, {len(load.bad)} bad ones", flush=True)
        load.run(60 * args.minutes, watch)
        alive = server.process.poll() is None
        state = becomes_idle(load) if alive else {"running": 0, "waiting": 0}
    wrong = load.wrong
    if not alive or server.process.returncode != 0:
        wrong.insert(0, f"the server has ended with code {server.process.returncode}")
    if state["running"] or state["waiting"]:
        wrong.append(f"requests are stuck: {state}")
    wrong += [f"in its log: {line}" for line in server.lines
              if re.search("Traceback|Error|failed", line)]
    for name, count in load.counts.most_common():
        print(f"{name:<12} {count:>8,}")
    if alive:
        before, after = growth(memory)
        if after > before + max(GROWTH * before, FEW_MB):
            wrong.append(f"memory has grown from {before:.0f} to {after:.0f} MB")
        print(f"memory of the server: {before:.0f} MB in the second quarter of the time, "
              f"{after:.0f} in the last, {max(memory):.0f} at most")
    for line in wrong[:10]:
        print(line)
    result = {"minutes": args.minutes, "counts": load.counts, "wrong": wrong, "memory": memory}
    write_json(Path(args.out) / "load.json", result)
    if wrong:
        raise UserError(f"things have gone wrong under load ({len(wrong)}): see "
                        f"{args.out}/load.json")
    return result


if __name__ == "__main__":
    main(lambda: run(cli(Args, about=__doc__)))
