"""serve.py and lib/web.py: limits, deadlines, clients that leave, one engine for many threads.

Most tests speak with the server by bytes on a socket, since clients never send what they try.
"""
import base64
import contextlib
import hashlib
import http.client
import json
import os
import random
import re
import select
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
from dataclasses import replace
from urllib.parse import urlsplit

import pytest
import torch

import serve
from engine import Engine
from lib import web
from lib.checkpoint import load_model
from lib.cli import UserError
from lib.common import ROOT
from lib.turns import play, ReplySettings, Turn
from tasks.base import Message
from tasks.draw import COLORS
from tokenizer import tokenizer_of

PATIENCE = 20       # seconds until a test that waits has failed
OPENAI, ANTHROPIC = "/v1/chat/completions", "/v1/messages"
ASK = {"model": "nanoglm-v", "messages": [{"role": "user", "content": "How many?"}],
       "max_tokens": 8}


@pytest.fixture(scope="module")
def model():
    return load_model(ROOT / "ckpt" / "demo")


@contextlib.contextmanager
def serving(model, **options):
    """A Server that runs; `server.lines` is what it has printed."""
    lines = []
    args = serve.Args(**{"port": 0, "slots": 2, "context": 256} | options)
    server = serve.Server(model, args, say=lines.append)
    server.lines = lines
    server.start()
    try:
        yield server
    finally:
        server.stop()
    assert not [line for line in lines if "has failed" in line or " failed: " in line]


@pytest.fixture(scope="module")
def server(model):
    with serving(model, slots=16, timeout=5.0) as server:
        yield server


class Client:
    """A connection to a server, byte by byte."""

    def __init__(self, server):
        address = urlsplit(server.url)
        self.socket = socket.create_connection((address.hostname, address.port), PATIENCE)
        self.file = self.socket.makefile("rb")

    def __enter__(self):
        return self

    def __exit__(self, *error):
        self.file.close()
        self.socket.close()

    def send(self, data: bytes):
        self.socket.sendall(data)

    def ask(self, body, path=OPENAI, **headers):
        self.send(request(body, path, **headers))
        return self.read()

    def read_head(self):
        """(status, headers) of an answer; (0, None) where the connection ends instead."""
        line = self.file.readline()
        if not line:
            return 0, None
        return int(line.split()[1]), http.client.parse_headers(self.file)

    def read_chunk(self) -> bytes:
        """A part of a stream; b"" at its end."""
        size = int(self.file.readline(), 16)
        return self.file.read(size + 2)[:size]

    def read(self, head_only=False):
        """(status, headers, body) of an answer."""
        status, headers = self.read_head()
        if not status or head_only:
            return status, headers, b""
        if headers.get("Transfer-Encoding") == "chunked":
            return status, headers, b"".join(iter(self.read_chunk, b""))
        return status, headers, self.file.read(int(headers["Content-Length"]))

    def has_been_answered(self, seconds: float) -> bool:
        return bool(select.select([self.socket], [], [], seconds)[0])


def request(body=None, path=OPENAI, method="POST", host="localhost", **headers) -> bytes:
    """The bytes of a request. headers: with _ for -; None leaves one out."""
    body = body if isinstance(body, bytes) else json.dumps(body).encode() if body else b""
    headers = {"Host": host, "Content_Type": "application/json",
               "Content_Length": len(body)} | headers
    lines = [f"{method} {path} HTTP/1.1"]
    lines += [f"{name.replace('_', '-')}: {value}" for name, value in headers.items()
              if value is not None]
    return "\r\n".join(lines).encode() + b"\r\n\r\n" + body


def once(server, data: bytes, **options):
    """The answer to these bytes on a connection of their own."""
    with Client(server) as client:
        client.send(data)
        return client.read(**options)


def message(answer) -> str:
    """The message of an answer in OpenAI's form of an error."""
    error = json.loads(answer[2])["error"]
    assert set(error) == {"message", "type", "param", "code"}
    return error["message"]


def text(answer) -> str:
    assert answer[0] == 200, answer
    return json.loads(answer[2])["choices"][0]["message"]["content"]


def wait_until(true):
    """Wait for something that another thread does."""
    until = time.monotonic() + PATIENCE
    while not true():
        assert time.monotonic() < until
        select.select([], [], [], 0.002)


class Gate:
    """Lets an engine that never stops make steps one at a time."""

    def __init__(self, server):
        self.permits, self.arrived = threading.Semaphore(0), threading.Semaphore(0)
        engine = server.worker.engine
        engine.stops, self.step, engine.step = set(), engine.step, self.gated

    def gated(self):
        self.arrived.release()
        assert self.permits.acquire(timeout=PATIENCE)
        return self.step()

    def wait(self):
        """Until the engine's thread is about to make a step."""
        assert self.arrived.acquire(timeout=PATIENCE)

    def open(self):
        self.permits.release(1000)


# ---- routes -------------------------------------------------------------------------------------

def test_the_page_health_and_models(server):
    status, headers, body = once(server, request(None, "/", "GET"))
    assert status == 200 and headers["Content-Type"].startswith("text/html") and b"<html" in body
    health = json.loads(once(server, request(None, "/health", "GET"))[2])
    assert health["status"] == "ok" and health["running"] == health["waiting"] == 0
    models = json.loads(once(server, request(None, "/v1/models", "GET"))[2])
    assert models["data"][0]["id"] == "nanoglm-v" and models["object"] == "list"
    theirs = once(server, request(None, "/v1/models", "GET", anthropic_version="2023-06-01"))
    assert json.loads(theirs[2])["data"][0]["type"] == "model"
    assert json.loads(once(server, request(None, "/v1/models/nanoglm-v", "GET"))[2])["id"]
    assert once(server, request(None, "/v1/models/gpt", "GET"))[0] == 404
    counted = once(server, request({k: ASK[k] for k in ("model", "messages")},
                                   "/v1/messages/count_tokens?beta=true"))
    assert json.loads(counted[2]) == {"input_tokens": 12}


def test_the_page_allows_only_its_own_script_and_style(server):
    """A browser compares these digests with what stands between the tags."""
    _, headers, page = once(server, request(None, "/", "GET"))
    page, policy = page.decode(), headers["Content-Security-Policy"]
    for tag in ("script", "style"):
        inside = page.split(f"<{tag}>")[1].split(f"</{tag}>")[0]
        digest = base64.b64encode(hashlib.sha256(inside.encode()).digest()).decode()
        assert f"{tag}-src 'sha256-{digest}'" in policy and page.count(f"<{tag}") == 1
    assert policy.startswith("default-src 'none';") and "unsafe" not in policy


def test_a_head_has_the_length_and_no_body(server):
    with Client(server) as client:
        client.send(request(None, "/", "HEAD"))
        status, headers, _ = client.read(head_only=True)
        assert status == 200 and int(headers["Content-Length"]) > 1000
        assert text(client.ask(ASK)) == "2"     # nothing of a body came before


def test_unknown_paths_and_methods_in_the_form_of_the_protocol(server):
    assert "no '/v2/nothing' here" in message(once(server, request(ASK, "/v2/nothing")))
    wrong = once(server, request(None, OPENAI, "GET"))
    assert wrong[0] == 405 and "takes POST" in message(wrong)
    assert once(server, request(None, "/", "BREW"))[0] == 405
    theirs = once(server, request(None, ANTHROPIC + "/nothing"))
    assert theirs[0] == 404 and json.loads(theirs[2])["type"] == "error"


def test_both_protocols_reply_whole_and_as_events(server):
    with Client(server) as client:
        whole = client.ask(ASK)
        assert text(whole) == "2"
        status, headers, body = client.ask(ASK | {"stream": True})
        assert headers["Content-Type"] == "text/event-stream" and b'"content": "2"' in body
        assert body.endswith(b"data: [DONE]\n\n")
        theirs = json.loads(client.ask(ASK, ANTHROPIC + "?beta=true")[2])
        assert theirs["content"] == [{"type": "text", "text": "2"}]
        body = client.ask(ASK | {"stream": True}, ANTHROPIC)[2]
        assert body.startswith(b"event: message_start") and b'"text": "2"' in body


def test_a_client_of_http_1_0_gets_the_stream_until_the_connection_ends(server):
    data = request(ASK | {"stream": True}).replace(b"HTTP/1.1", b"HTTP/1.0")
    with Client(server) as client:
        client.send(data)
        status, headers = client.read_head()
        assert status == 200 and "Transfer-Encoding" not in headers
        assert client.file.read().endswith(b"data: [DONE]\n\n")


@pytest.mark.skipif(not shutil.which("curl"), reason="curl is missing")
def test_the_curl_line_of_the_docstring(server):
    command = re.search(r"    PICTURE=.*?\n\n", serve.__doc__, re.DOTALL)[0]
    command = command.replace("localhost:8000", urlsplit(server.url).netloc)
    done = subprocess.run(["bash", "-c", command], cwd=ROOT, capture_output=True)
    answer = json.loads(done.stdout)
    assert answer["choices"][0]["message"]["content"] in COLORS
    assert answer["usage"]["prompt_tokens"] > 20        # it has a picture


# ---- many at once -------------------------------------------------------------------------------

def test_sixteen_at_once_are_what_one_at_a_time_is(server, model):
    """Also what `ask` gives, which has an engine of its own."""
    questions = [f"{a} {b}?" for a in ("How many shapes", "What color", "Where", "Read")
                 for b in ("are there", "is it", "is the red circle", "one")]
    bodies = [ASK | {"messages": [{"role": "user", "content": q}]} for q in questions]
    alone = [text(once(server, request(body))) for body in bodies]
    found = [None] * len(bodies)

    def ask(n):
        found[n] = text(once(server, request(bodies[n])))

    threads = [threading.Thread(target=ask, args=(n,)) for n in range(len(bodies))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(PATIENCE)
    assert found == alone and len(set(alone)) > 3
    turn = Turn([Message("user", questions[2])], ReplySettings(max_new=8), server.tokens,
                model.config)
    assert play(Engine(model, 1, 256), turn).text == alone[2]


def test_take_waits_only_where_there_is_nothing_else_to_do(model):
    """The thread is not started: the test calls its `_take`, and looks whether the call returns."""
    worker = serve.EngineThread(lambda: Engine(model, 2, 256), slots=2, waiting=2, say=print)

    def take(seconds):
        call = threading.Thread(target=worker._take, daemon=True)
        call.start()
        call.join(seconds)
        return call
    waiting = take(0.1)
    assert waiting.is_alive(), "without any job it must wait: a loop would take a whole core"
    turn = Turn([Message("user", "How many?")], ReplySettings(max_new=8),
                tokenizer_of(model.config), model.config)
    first = worker.submit(turn)
    assert first.outbox.get(timeout=PATIENCE) == [], "the engine has not got the job"
    waiting.join(PATIENCE)
    assert not waiting.is_alive(), "the job must be served now: no waiting for another"
    worker.submit(turn), worker.submit(turn)
    assert not take(PATIENCE).is_alive(), "while jobs are served it must not wait"
    assert len(worker.jobs) == 3, "all jobs in the inbox must be taken"
    worker.jobs.clear()
    worker.stopping = True
    assert not take(PATIENCE).is_alive(), "a server that is being stopped must not wait for jobs"


def test_a_new_request_gets_a_token_within_a_step(model):
    with serving(model) as server, Client(server) as first, Client(server) as second:
        gate, worker = Gate(server), server.worker
        first.send(request(ASK | {"max_tokens": 30}))
        gate.wait()
        gate.permits.release()
        gate.wait()                             # the first request runs; a step is being made
        second.send(request(ASK | {"max_tokens": 30}))
        wait_until(lambda: worker.inbox.qsize())
        gate.permits.release()
        gate.wait()                             # that step is over, the next one has the newcomer
        assert list(worker.jobs.values())[1].seen == 0
        gate.permits.release()
        gate.wait()
        assert list(worker.jobs.values())[1].seen >= 1
        gate.open()
        assert len(text(first.read())) and len(text(second.read()))


def test_too_many_waiting_requests_are_refused(model):
    with serving(model, slots=1, waiting=1) as server, contextlib.ExitStack() as stack:
        gate = Gate(server)
        clients = [stack.enter_context(Client(server)) for _ in range(2)]
        clients[0].send(request(ASK))
        gate.wait()
        clients[1].send(request(ASK))
        wait_until(lambda: server.worker.inbox.qsize())
        refused = once(server, request(ASK))
        assert refused[0] == 429 and refused[1]["Retry-After"] == "1"
        assert "too many requests" in message(refused)
        theirs = once(server, request(ASK, ANTHROPIC))
        assert theirs[0] == 529
        assert json.loads(theirs[2])["error"]["type"] == "overloaded_error"
        gate.open()
        assert [client.read()[0] for client in clients] == [200, 200]
        assert once(server, request(ASK))[0] == 200


def test_a_thought_that_leaves_no_room_ends_the_reply(model):
    with serving(model, context=40) as server:
        server.worker.engine.stops = set()
        asked, reasons = ASK | {"reasoning_effort": "high", "max_tokens": 2}, []
        for room in range(28, 31):
            server.limits = replace(server.limits, max_think=room)
            answer = json.loads(once(server, request(asked))[2])
            reasons.append(answer["choices"][0]["finish_reason"])
        assert reasons == ["length"] * 3 and not server.worker.jobs
        assert once(server, request(ASK))[0] == 200


# ---- clients that leave -------------------------------------------------------------------------

def test_a_client_that_leaves_in_mid_stream_frees_its_slot(model):
    with serving(model, slots=1, context=4096) as server:
        server.worker.engine.stops = set()
        endless = ASK | {"stream": True, "max_tokens": 4000}
        with Client(server) as client:
            client.send(request(endless))
            assert client.read_head()[0] == 200
            assert client.read_chunk() and client.read_chunk()
        assert once(server, request(ASK | {"max_tokens": 2}))[0] == 200
        assert not server.worker.jobs
        wait_until(lambda: any("200 left, 12 tokens in" in line for line in server.lines))


@pytest.mark.parametrize("stream", [False, True])
def test_a_client_that_leaves_while_it_waits_never_gets_a_slot(model, stream):
    with serving(model, slots=1) as server, Client(server) as first:
        gate, worker = Gate(server), server.worker
        first.send(request(ASK))
        gate.wait()
        with Client(server) as second:
            second.send(request(ASK | {"stream": stream}))
            wait_until(lambda: worker.inbox.qsize())
        wait_until(lambda: len(server.lines) == 1)      # its thread has noticed
        gate.open()
        assert first.read()[0] == 200
        wait_until(lambda: not worker.jobs)
        assert worker.engine.submitted == 1 and " 0 left" in server.lines[0]


class Flood(web.Handler):
    """Sends without an end."""
    left = threading.Event()

    def answer(self, body):
        try:
            self.begin_parts(200, "text/plain")
            while True:
                self.send_part(b"x" * 2 ** 16)
        except web.ClientLeft:
            Flood.left.set()
            raise


def test_a_client_that_does_not_read_is_dropped():
    server = web.Server(("127.0.0.1", 0), Flood, web.WebLimits(seconds=0.2))
    server.url = f"http://127.0.0.1:{server.server_port}"
    threading.Thread(target=server.serve_forever, args=(0.05,), daemon=True).start()
    with Client(server) as client:
        client.send(request(None, "/", "GET"))
        assert Flood.left.wait(PATIENCE)
        wait_until(lambda: not server.open)
    server.shutdown()
    server.server_close()


# ---- connections --------------------------------------------------------------------------------

def test_a_connection_takes_one_request_after_the_other(server):
    with Client(server) as client:
        client.send(request(ASK) + request(ASK | {"stream": True}) + request(None, "/health", "GET")
                    + b"\r\n" + request(ASK, Connection="close"))
        assert text(client.read()) == "2"
        assert client.read()[2].endswith(b"[DONE]\n\n")
        assert json.loads(client.read()[2])["status"] == "ok"
        status, headers, _ = client.read()
        assert status == 200 and headers["Connection"] == "close"
        assert client.read()[0] == 0


def test_connections_that_never_speak_are_closed(model):
    with serving(model, timeout=0.2) as server, Client(server) as silent, Client(server) as used:
        assert used.ask(ASK)[0] == 200
        assert silent.read()[0] == used.read()[0] == 0          # without a word
    assert len(server.lines) == 1


def test_silent_connections_keep_nobody_out(model):
    """Even if they have all the places; those that are served keep theirs."""
    with serving(model, connections=3) as server, contextlib.ExitStack() as stack:
        gate = Gate(server)
        served = stack.enter_context(Client(server))
        served.send(request(ASK))
        gate.wait()
        silent = [stack.enter_context(Client(server)) for _ in range(2)]
        wait_until(lambda: len(server.web.reading) == 2)
        silent[1].send(b"POST / HTTP/1.1\r\nHost: lo")
        assert once(server, request(None, "/health", "GET"))[0] == 200
        assert silent[0].read()[0] == 0 and not silent[1].has_been_answered(0)
        gate.open()
        assert served.read()[0] == 200


def test_more_requests_than_connections_are_refused(model):
    with serving(model, connections=2) as server, contextlib.ExitStack() as stack:
        gate = Gate(server)
        clients = [stack.enter_context(Client(server)) for _ in range(2)]
        for client in clients:
            client.send(request(ASK))
        gate.wait()
        # Both requests have been read: a connection that still reads would lose its place.
        wait_until(lambda: len(server.worker.jobs) + server.worker.inbox.qsize() == 2)
        with Client(server) as third:
            status, headers, _ = third.read()
            assert status == 503 and headers["Retry-After"] == "1"
        gate.open()
        assert [client.read()[0] for client in clients] == [200, 200]


@pytest.mark.parametrize("begin", [
    b"", request(ASK)[:60], request(ASK)[:-30],
    request(None, Content_Length=10 ** 6)], ids=["line", "head", "body", "long body"])
def test_a_request_that_comes_byte_by_byte_has_a_deadline(model, begin):
    """Each byte comes in time, but not all of them."""
    with serving(model, timeout=0.25) as server, Client(server) as client:
        client.send(begin)
        until = time.monotonic() + PATIENCE
        while not client.has_been_answered(0.02):
            client.send(b"x")
            assert time.monotonic() < until
        answer = client.read()
        assert answer[0] == 408 and "took too long" in message(answer)
        assert client.read()[0] == 0


# ---- what is refused before the JSON is read ----------------------------------------------------

@pytest.mark.parametrize("data", [
    request(ASK, **{f"X{n}": n for n in range(120)}), request(ASK, X="x" * 40_000),
    b"GET /" + b"x" * 100_000 + b" HTTP/1.1\r\n\r\n", b"GET / HTTP/1.1\r\n" + b"X: x\r\n" * 10_000],
    ids=["many", "long", "line", "flood"])
def test_floods_of_headers(server, data):
    answer = once(server, data)
    assert answer[0] == 431 and message(answer) and answer[1]["Connection"] == "close"


@pytest.mark.parametrize("length,status", [
    (10 ** 9, 413), (2 ** 24 + 1, 413), ("9" * 400, 413), (-1, 400), ("", 400), ("ten", 400),
    ("1_0", 400), ("+5", 400), ("²", 400), ("5, 5", 400), ("0x10", 400)])
def test_a_length_is_checked_before_anything_is_read(server, length, status):
    answer = once(server, request(None, Content_Length=length))
    assert answer[0] == status and message(answer) and answer[1]["Connection"] == "close"
    theirs = once(server, request(None, ANTHROPIC, Content_Length=length))
    assert theirs[0] == status and json.loads(theirs[2])["error"]["message"]


def test_a_body_that_is_too_long_gets_its_answer_although_it_is_sent(model):
    with serving(model, max_body=1000) as server, Client(server) as client:
        body = b"x" * 300_000
        client.send(request(body))
        assert client.read()[0] == 413


def test_two_lengths_and_chunks_are_refused(server):
    twice = request(ASK).replace(b"Host:", b"Content-Length: 3\r\nHost:")
    assert once(server, twice)[0] == 400
    chunked = request(None, Content_Length=None, Transfer_Encoding="chunked")
    assert once(server, chunked + b"0\r\n\r\n")[0] == 411


def test_a_client_may_ask_before_it_sends_its_body(server):
    data, body = request(ASK, Expect="100-continue"), json.dumps(ASK).encode()
    with Client(server) as client:
        client.send(data.removesuffix(body))
        assert client.read_head()[0] == 100
        client.send(body)
        assert text(client.read()) == "2"
    assert once(server, request(None, Content_Length=10 ** 9, Expect="100-continue"))[0] == 413


@pytest.mark.parametrize("path", [OPENAI, ANTHROPIC])
@pytest.mark.parametrize("body,status,said", [
    (b"", 400, "JSON"), (b"{", 400, "JSON"), (b"[1]", 400, "object"), (b"\xff\xfe", 400, "JSON"),
    (b'{"model": NaN}', 400, "NaN"), (b"[" * 100_000, 400, "nested"), (b"[[]," * 10 ** 6, 413, ""),
    (b'{"a": "\\ud800"}', 400, "surrogate"), (b"9" * 5000, 400, "JSON")])
def test_what_is_no_request(server, path, body, status, said):
    answer = once(server, request(body, path))
    assert answer[0] == status and said in json.loads(answer[2])["error"]["message"]


def test_the_type_of_the_content(server):
    for kind in ("text/plain", "application/x-www-form-urlencoded", "multipart/form-data; x=1"):
        answer = once(server, request(ASK, Content_Type=kind))
        assert answer[0] == 415 and kind.split(";")[0] in message(answer)
    for kind in ("application/json; charset=utf-8", "Application/JSON", None):
        assert once(server, request(ASK, Content_Type=kind))[0] == 200


def test_pages_of_other_websites_are_refused(server):
    port = urlsplit(server.url).port
    for origin in ("http://evil.example", "null", f"http://localhost:{port + 1}", "http://["):
        for method in ("POST", "OPTIONS"):
            answer = once(server, request(ASK, OPENAI, method, f"localhost:{port}", Origin=origin))
            assert answer[0] in (400, 403)
            assert not [name for name in answer[1] if name.startswith("Access-Control")]
    for host in ("evil.example", f"evil.example:{port}", "localhost.evil.example", "["):
        assert once(server, request(ASK, host=host))[0] in (400, 403)
    assert once(server, request(ASK, host=None))[0] == 400
    own = f"http://localhost:{port}"
    assert once(server, request(ASK, host=f"localhost:{port}", Origin=own))[0] == 200
    for host in ("127.0.0.1", f"[::1]:{port}", "LOCALHOST"):
        assert once(server, request(ASK, host=host))[0] == 200
    answer = once(server, request(None, OPENAI, "OPTIONS"))
    assert answer[0] == 200 and not [name for name in answer[1] if name.startswith("Access")]


def test_the_key(model):
    with serving(model, api_key="sésame-7") as server:
        for key in (None, "", "Bearer", "Bearer x", "sésame-7 x", "Basic sésame-7"):
            answer = once(server, request(ASK, Authorization=key))
            assert answer[0] == 401 and "API key" in message(answer)
        theirs = json.loads(once(server, request(ASK, ANTHROPIC, x_api_key="x"))[2])
        assert theirs["error"]["type"] == "authentication_error"
        assert once(server, request(ASK, Authorization="Bearer sésame-7"))[0] == 200
        assert once(server, request(ASK, ANTHROPIC, x_api_key="sésame-7"))[0] == 200
        assert once(server, request(None, "/v1/models", "GET"))[0] == 401
        assert once(server, request(None, "/health", "GET"))[0] == 200
        # A big body is refused before it is sent.
        assert once(server, request(None, Content_Length=10 ** 6))[0] == 401
        assert "same-7" not in "".join(server.lines)


def test_the_log_holds_nothing_of_a_request(model):
    with serving(model) as server:
        once(server, request(ASK | {"messages": [{"role": "user", "content": "Xyzzy?"}]},
                             OPENAI + "?key=Xyzzy", Authorization="Bearer Xyzzy"))
        once(server, request(None, "/v1/models/\x1b[31m", "GET"))
        wait_until(lambda: len(server.lines) == 2)
    assert server.lines[0].startswith("POST /v1/chat/completions 200, ")
    assert "tokens in" in server.lines[0] and "Xyzzy" not in "".join(server.lines)
    assert server.lines[1].isprintable() and "\n" not in "".join(server.lines)


# ---- failures -----------------------------------------------------------------------------------

@pytest.mark.parametrize("path", [OPENAI, ANTHROPIC])
def test_an_engine_that_fails_is_built_again(model, path):
    with serving(model) as server:
        worker = server.worker

        def fail():
            raise RuntimeError("out of\nluck. Try more")

        worker.engine.step = fail
        answer = once(server, request(ASK, path))
        assert answer[0] == 500 and "engine has failed" in json.loads(answer[2])["error"]["message"]
        failed = server.lines.pop(0)
        assert "out of" in failed and "1 requests" in failed and "\n" not in failed
        assert once(server, request(ASK, path))[0] == 200
        # In mid-stream the status has been sent already, so the error is an event.
        worker.engine.stops = set()
        steps = iter([worker.engine.step, worker.engine.step, fail])
        worker.engine.step = lambda: next(steps)()
        status, _, body = once(server, request(ASK | {"stream": True}, path))
        assert status == 200 and b"engine has failed" in body and b"[DONE]" not in body
        # And where no engine can be built, each request is told.
        make, worker.engine, worker.make = worker.make, None, fail
        assert once(server, request(ASK, path))[0] == 500
        worker.make = make
        assert once(server, request(ASK, path))[0] == 200
        server.lines[:] = [line for line in server.lines if "engine has failed" not in line]


def test_a_mistake_of_ours_is_a_line_and_a_500(model, monkeypatch):
    def fail(*args):
        raise KeyError("Xyzzy")

    with serving(model) as server:
        monkeypatch.setattr(server.openai, "read", fail)
        answer = once(server, request(ASK))
        assert answer[0] == 500 and "Xyzzy" not in message(answer)
        wait_until(lambda: len(server.lines) == 2)
        line = server.lines.pop(0)
        assert "POST failed: KeyError in test_serve.py, line" in line and "Xyzzy" not in line
        assert once(server, request(ASK, ANTHROPIC))[0] == 200


def mutated(rng: random.Random) -> bytes:
    """A request of which something is wrong, mostly."""
    data = bytearray(rng.choice([
        request(ASK), request(ASK | {"stream": True}, ANTHROPIC), request(None, "/health", "GET"),
        request(None, OPENAI, "OPTIONS"), b"", rng.randbytes(300)]))
    for _ in range(rng.choice([0, 1, 3, 30])):
        place = rng.randrange(len(data) + 1)
        change = rng.randrange(4)
        if change == 0:
            data[place:place] = rng.randbytes(rng.choice([1, 20]))
        elif change == 1:
            del data[place:place + rng.choice([1, 5, 100])]
        elif change == 2:
            data[place:place + 1] = rng.choice([b"\r\n", b"\n", b":", b" ", b"\0", b"\xff"])
        else:
            data[place:place] = data[:place]
    return bytes(data)


def test_no_bytes_break_the_server(model, capfd):
    rng = random.Random(1)
    with serving(model, slots=16, timeout=0.5, max_body=10_000) as server:
        for _ in range(300):
            with Client(server) as client, contextlib.suppress(ConnectionError):
                client.send(mutated(rng))
                if rng.random() < 0.5:
                    client.socket.shutdown(socket.SHUT_WR)
                    status, _ = client.read_head()
                    assert status in (0, 200, 400, 403, 404, 405, 408, 411, 413, 415, 431, 505)
        assert text(once(server, request(ASK))) == "2"
        wait_until(lambda: not server.worker.jobs)
    assert "Traceback" not in "".join(capfd.readouterr())


# ---- start and stop -----------------------------------------------------------------------------

def test_stopping_lets_replies_end(model):
    with serving(model) as server, Client(server) as client, Client(server) as idle:
        gate = Gate(server)
        client.send(request(ASK | {"stream": True}))
        gate.wait()
        threading.Thread(target=lambda: (wait_until(lambda: server.worker.stopping),
                                         gate.open())).start()
        server.stop(grace=PATIENCE)
        assert client.read()[2].endswith(b"[DONE]\n\n")
        assert idle.read()[0] == client.read()[0] == 0
        with pytest.raises(ConnectionError):
            Client(server)
        assert not server.worker.is_alive()


@pytest.mark.parametrize("stream", [False, True])
def test_stopping_aborts_what_takes_too_long(model, stream):
    with serving(model, context=4096) as server, Client(server) as client:
        server.worker.engine.stops = set()
        client.send(request(ASK | {"stream": stream, "max_tokens": 4000}))
        wait_until(lambda: server.worker.jobs)
        server.stop(grace=0.05)
        status, _, body = client.read()
        assert status == (200 if stream else 503) and b"is being stopped" in body
        assert not server.worker.is_alive() and not server.web.open


def test_what_can_not_be_served_is_one_line(model, server):
    port = urlsplit(server.url).port
    for options, said in (({"port": port}, f"port {port}: Address already in use"),
                          ({"host": "192.0.2.1"}, "can't listen at 192.0.2.1"),
                          ({"host": "no such host"}, "can't listen at no such host"),
                          ({"host": "ü" * 70}, "no such name")):
        with pytest.raises(UserError, match=said) as error:
            serve.Server(model, serve.Args(**{"port": 0} | options))
        assert "\n" not in str(error.value)
    with pytest.raises(UserError, match="no such folder"):
        serve.run(serve.Args(ckpt="nowhere"))


def test_names_of_this_machine():
    assert serve.own_names("0.0.0.0") == serve.own_names("192.168.0.7") == ()
    assert serve.own_names("pc.example") == ()
    assert "127.0.0.1" in serve.own_names("localhost") and "::1" in serve.own_names("127.0.0.1")
    assert "127.0.0.5" in serve.own_names("127.0.0.5")


def test_running_is_for_tests_and_recipes(model):
    before = threading.active_count()
    with serve.running(model, slots=1, context=64) as url:
        assert url.startswith("http://127.0.0.1:")
        with socket.create_connection((urlsplit(url).hostname, urlsplit(url).port)) as connection:
            connection.sendall(request(ASK, Connection="close"))
            assert b'"content": "2"' in connection.makefile("rb").read()
    assert threading.active_count() == before


@pytest.mark.slow
def test_the_script_ends_cleanly_at_sigterm():
    words = [sys.executable, "serve.py", "--ckpt=ckpt/demo", "--port=0", "--device=cpu"]
    process = subprocess.Popen(words, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
                               text=True, env=os.environ | {"NANOGLMV_API_KEY": "sesame"})
    try:
        lines = []
        while not lines or "is ready" not in lines[-1]:
            lines.append(process.stdout.readline())
            assert lines[-1], process.stderr.read()
        said = "".join(lines)
        url = lines[-1].split()[0]
        assert f"OPENAI_BASE_URL={url}/v1" in said and "1.0M parameters" in said
        assert "cpu in" in said and "demo, nanoglm-v" in said and "sesame" not in said
        here = type("Here", (), {"url": url})
        assert once(here, request(ASK))[0] == 401
        with Client(here) as client:
            assert text(client.ask(ASK | {"model": "demo"}, x_api_key="sesame")) == "2"
            process.send_signal(signal.SIGTERM)
            assert process.wait(PATIENCE) == 0
            assert client.read()[0] == 0
        assert "stopping" in process.stdout.read() and not process.stderr.read()
    finally:
        process.kill()
        process.communicate()
