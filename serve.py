"""Serve a model at http://127.0.0.1:8000: the protocols of OpenAI and Anthropic, a page to try it.

    python serve.py                             ckpt/gym; Ctrl-C or SIGTERM ends it
    python serve.py --ckpt=out/pretrain --port=9000 --slots=32 --drafts=3
    NANOGLMV_API_KEY=secret python serve.py --host=0.0.0.0      for other machines, with a key

    GET  /                            a page: drop a picture, ask, see the click
    POST /v1/chat/completions         OpenAI Chat Completions      lib/openai_api.py
    POST /v1/messages                 Anthropic Messages           lib/anthropic_api.py
    POST /v1/messages/count_tokens    tokens of a prompt
    GET  /v1/models, /v1/models/ID    what is served
    GET  /health                      requests that run and wait, tokens a second

    curl localhost:8000/health
    PICTURE=$(base64 < docs/example.png | tr -d '\\n')
    curl localhost:8000/v1/chat/completions -H 'Content-Type: application/json' -d '{
      "model": "nanoglm-v", "messages": [{"role": "user", "content": [
        {"type": "image_url", "image_url": {"url": "data:image/png;base64,'$PICTURE'"}},
        {"type": "text", "text": "What color is the diamond?"}]}]}'

Agent frameworks find the server by environment variables; without --api_key any key will do:

    OPENAI_BASE_URL=http://127.0.0.1:8000/v1  OPENAI_API_KEY=any
    ANTHROPIC_BASE_URL=http://127.0.0.1:8000  ANTHROPIC_API_KEY=any  ANTHROPIC_MODEL=nanoglm-v

A model of a few million parameters does there what it was trained on: it clicks on screens like the
gym's and answers the questions that it knows. It does not follow the instructions of a framework.

How it works. Each connection has a thread, which reads requests (lib/web.py) and makes a Turn of
each (lib/api.py). One more thread owns the engine: between two steps it takes new turns, so that
the first token of a new request comes within one step of the running batch, and after each step it
hands out the new tokens. The server opens no file and no address that a request names.
"""
import lib  # first of all, before torch: see lib/__init__.py

import contextlib
import hmac
import ipaddress
import json
import os
import re
import signal
import threading
import time
from collections import deque
from dataclasses import dataclass, field, replace
from itertools import chain
from queue import Empty, SimpleQueue
from typing import Annotated
from urllib.parse import unquote

from engine import Engine
from lib import web
from lib.anthropic_api import Anthropic
from lib.api import ApiError, Limits, MODEL, parse_body, start
from lib.checkpoint import load_model
from lib.cli import (cli, Device, Drafts, Dtype, main, Natural, Positive, Range, UserError)
from lib.common import first_sentence, ROOT, setup
from lib.openai_api import OpenAI
from lib.runs import find_checkpoint
from lib.turns import Turn
from tokenizer import tokenizer_of

PAGE = ROOT / "lib" / "page.html"
LOOK = 0.1              # seconds until a thread that waits looks whether its client has left [O]
MOST_VALUES = 200_000   # in the JSON of a request: each takes far more memory than its text [O]


# ---- options ------------------------------------------------------------------------------------

@dataclass
class Args:
    ckpt: str = ""                # checkpoint or run folder; default: ckpt/gym
    name: str = ""                # of the model, for clients; default: the folder's
    host: str = "127.0.0.1"       # address to listen at; 0.0.0.0: all addresses of this machine
    port: Annotated[int, Range(0, 65535)] = 8000    # to listen at; 0: a free one
    api_key: str = ""             # that clients must send; NANOGLMV_API_KEY hides it from `ps`
    slots: Annotated[int, Range(1, 4096)] = 16      # requests that are generated side by side
    waiting: Natural = 64         # requests that may wait for a slot; more are refused
    context: Annotated[int, Range(2)] = 4096        # tokens of a prompt and its reply at most
    max_new: Positive = 1024      # tokens of a reply at most
    drafts: Drafts = 0            # tokens that the MTP head drafts in a step; same replies in fp32
    max_body: Positive = 2 ** 24  # bytes of a request
    max_pixels: Positive = 2 ** 24  # pixels of a picture
    connections: Annotated[int, Range(1, 4096)] = 128   # clients that are connected at most
    timeout: Annotated[float, Range(0.05, 86_400)] = 30.0   # seconds to send a request, or to read
    grace: Annotated[float, Range(0, 86_400)] = 5.0     # seconds that replies get after SIGTERM
    device: Device = "auto"       # auto, cpu, cuda or mps
    dtype: Dtype = "auto"         # auto, float32 or bfloat16


# ---- the engine's thread ------------------------------------------------------------------------

@dataclass(eq=False)
class Job:
    """A reply on its way. What the engine's thread puts into `outbox`: lists of new pieces, as
    Turn.read gives them, an empty one as soon as the engine has taken the request; at the end None
    or an ApiError. left: nobody waits for it any more."""
    turn: Turn
    outbox: SimpleQueue = field(default_factory=SimpleQueue)
    left: bool = False
    seen: int = 0               # tokens of its present request, which may be the one of its thought


class EngineThread(threading.Thread):
    """Owns the engine: takes jobs, steps, hands out new tokens.

    make() gives an engine, at first and again when one has failed. waiting: jobs that may wait for
    a slot.
    """

    def __init__(self, make, slots: int, waiting: int, say):
        super().__init__(daemon=True)
        self.make, self.say, self.engine = make, say, make()
        self.places = threading.BoundedSemaphore(slots + waiting)
        self.inbox: SimpleQueue = SimpleQueue()
        self.jobs: dict[int, Job] = {}      # by the number that the engine has given to each
        self.lock = threading.Lock()        # no job may come into the inbox after the stop
        self.stopping = self.aborting = False
        self.made = 0                       # tokens
        self.speeds = deque(maxlen=100)     # (tokens, seconds) of the last steps

    # ---- called by other threads ------------------------------------------------------------

    def submit(self, turn: Turn) -> Job:
        """Queue a turn. Raises ApiError where too many wait, or the server is being stopped."""
        with self.lock:
            if self.stopping:
                raise stopped()
            if not self.places.acquire(blocking=False):
                raise ApiError(429, "overloaded", "too many requests are waiting: try again later")
            job = Job(turn)
            self.inbox.put(job)
        return job

    def stop(self, grace: float):
        """Take no more jobs, let those that there are end within `grace` seconds, abort the rest,
        and end the thread."""
        with self.lock:
            self.stopping = True
            self.inbox.put(None)            # wakes the thread
        self.join(grace)
        self.aborting = True
        self.join()

    def figures(self) -> dict:
        """Requests that run and wait, and the speed of the last steps."""
        speeds, engine = self.speeds.copy(), self.engine    # the engine's thread changes both
        tokens, seconds = sum(t for t, _ in speeds), sum(s for _, s in speeds)
        running = len(engine.running) if engine else 0
        waiting = max(0, len(self.jobs) + self.inbox.qsize() - running)
        return {"running": running, "waiting": waiting,
                "tokens_per_second": round(tokens / seconds, 1) if seconds else 0.0}

    # ---- the loop ---------------------------------------------------------------------------

    def run(self):
        """Step until `stop` is called and all jobs have ended."""
        while self.jobs or not (self.stopping and self.inbox.empty()):
            try:
                self._drop()
                self._take()
                if self.jobs:
                    self._step()
            except Exception as error:
                self._give_up(error)

    def _drop(self):
        """Drop the jobs that nobody waits for."""
        for number, job in list(self.jobs.items()):
            if job.left or self.aborting:
                self.engine.abort(number)
                self._end(number, stopped())

    def _take(self):
        """Give new jobs to the engine. Waits for one where there is none."""
        with contextlib.suppress(Empty):
            while True:
                job = self.inbox.get(block=not self.jobs and not self.stopping)
                if job:         # None comes from `stop`, to end the wait
                    self._enter(job)

    def _enter(self, job: Job):
        """Give a job to the engine; one that it refuses ends at once."""
        error = stopped()
        try:
            if not (job.left or self.aborting):
                self.engine = self.engine or self.make()
                self.jobs[self.engine.submit(job.turn.request)] = job
                return job.outbox.put([])
        except UserError as reason:
            error = ApiError(400, "invalid_request", str(reason))
        except Exception as reason:
            error = self._failed(reason, 1)
        job.outbox.put(error)
        self.places.release()

    def _end(self, number: int, last: ApiError | None = None):
        self.jobs.pop(number).outbox.put(last)
        self.places.release()

    def _step(self):
        """A step of the engine, and its new tokens to those who wait for them."""
        began, before = time.perf_counter(), self.made
        for result in self.engine.step():
            self._hand_out(result.id, result.ids, result)
        for number in list(self.jobs):
            self._hand_out(number, self.engine.so_far(number))
        self.speeds.append((self.made - before, time.perf_counter() - began))

    def _hand_out(self, number: int, ids: list[int], result=None):
        """Put the new pieces of a reply into its outbox. result: its request has ended."""
        job = self.jobs[number]
        self.made, job.seen = self.made + len(ids) - job.seen, len(ids)
        if pieces := job.turn.read(ids, ended=bool(result)):
            job.outbox.put(pieces)
        if not result:
            return
        request = job.turn.advance(result)
        if request is None:
            return self._end(number)
        try:
            reply = self.engine.submit(request)     # the thought is written, now comes the reply
        except UserError:                           # for which the thought has left no room
            job.turn.finish, job.turn.done = "context", True
            return self._end(number)
        self.jobs[reply], job.seen = self.jobs.pop(number), 0

    def _give_up(self, error: Exception):
        """The engine has failed: all its jobs end, and the next one gets a new engine."""
        self.engine = None
        last = self._failed(error, len(self.jobs))
        for number in list(self.jobs):
            self._end(number, last)

    def _failed(self, error: Exception, count: int) -> ApiError:
        """Print what has gone wrong; returns the error that the clients get."""
        self.say(f"the engine has failed, and {count} requests with it: {web.place_of(error)}: "
                 f"{first_sentence(error)}")
        return ApiError(500, "server_error", "the model's engine has failed; the server goes on")


def stopped() -> ApiError:
    return ApiError(503, "stopping", "the server is being stopped")


# ---- a connection -------------------------------------------------------------------------------

class Handler(web.Handler):
    """Answers requests, each connection in a thread of its own."""
    job: Job | None = None      # of the present request

    def check(self):
        """Refuse a request by its head alone: an unknown path, a wrong method, no key."""
        self.route = unquote(self.path.partition("?")[0])
        methods = {method for method, path in ROUTES if self.route == path}
        if self.route.startswith("/v1/models/"):
            methods = {"GET"}
        if not methods:
            raise web.Refused(404, f"there is no {self.route[:100]!r} here")
        if "GET" in methods:
            methods.add("HEAD")
        if self.command not in methods | {"OPTIONS"}:
            raise web.Refused(405, f"{self.route} takes {' or '.join(sorted(methods))}")
        if self.route.startswith("/v1/") and not self.has_key():
            raise web.Refused(401, "a valid API key is missing: Authorization: Bearer KEY, or "
                              "x-api-key: KEY")

    def has_key(self) -> bool:
        """Whether the client has sent the key, compared in a time that does not depend on it."""
        key, sent = self.server.app.key, self.headers.get("x-api-key", "")
        if not sent:
            sent = re.sub("^bearer ", "", self.headers.get("Authorization", ""), flags=re.I)
        return not key or hmac.compare_digest(sent.strip().encode("latin-1"), key.encode())

    def answer(self, body: bytes):
        try:
            if self.command == "OPTIONS":
                self.send(200, b"")     # no Access-Control headers: nothing for other websites
            elif self.route.startswith("/v1/models/"):
                name = self.route.removeprefix("/v1/models/")
                self.send_json(self.protocol().model(name, self.server.app.limits))
            else:
                ROUTES["GET" if self.command == "HEAD" else self.command, self.route](self, body)
        except ApiError as error:
            self.fail(error)

    def protocol(self):
        """The protocol that the client speaks, by the path or by a header of Anthropic's."""
        app, path = self.server.app, self.path or ""
        theirs = path.startswith("/v1/messages") or self.headers and (
            "anthropic-version" in self.headers and path.startswith("/v1/models"))
        return app.anthropic if theirs else app.openai

    def refuse(self, error: web.Refused):
        self.fail(ApiError(error.status, KINDS.get(error.status, "invalid_request"), error.message))

    def fail(self, error: ApiError):
        """Answer with an error, in the form of the protocol."""
        protocol, headers = self.protocol(), {}
        if error.kind in ("overloaded", "stopping"):
            headers["Retry_After"] = 1
        if error.kind == "overloaded" and protocol is self.server.app.anthropic:
            # Anthropic's 429 says that this client asks too often, its 529 that too many ask.
            error = ApiError(529, error.kind, error.message)
        self.send(error.status, json.dumps(protocol.error(error)).encode(), **headers)

    def send_json(self, value: dict):
        self.send(200, json.dumps(value, ensure_ascii=False).encode())

    # ---- what the routes do -----------------------------------------------------------------

    def page(self, body):
        page = PAGE.read_bytes()
        self.send(200, page, "text/html; charset=utf-8",
                  Content_Security_Policy=web.page_policy(page))

    def health(self, body):
        app = self.server.app
        state = "stopping" if app.worker.stopping else "ok"
        self.send_json({"status": state, "model": app.limits.names[0], **app.worker.figures()})

    def models(self, body):
        self.send_json(self.protocol().models(self.server.app.limits))

    def count_tokens(self, body):
        self.send_json(self.protocol().count(self.read_json(body), self.server.app.limits))

    def reply(self, body):
        """The next reply of a conversation, whole or as a stream of events."""
        app, protocol = self.server.app, self.protocol()
        chat = protocol.read(self.read_json(body), app.limits)
        turn = start(chat, app.tokens, app.config, app.limits)
        job = self.job = app.worker.submit(turn)
        try:
            if chat.stream:
                self.stream(chat, job)
            else:
                for _ in self.pieces(job):
                    pass
                self.send_json(protocol.whole(chat, turn))
        finally:
            job.left = True

    def read_json(self, body: bytes) -> dict:
        """The object of JSON in a body. Raises ApiError."""
        kind = self.headers.get_content_type()
        if "Content-Type" in self.headers and kind != "application/json":
            raise ApiError(415, "invalid_request", "the body must be JSON, with Content-Type: "
                           f"application/json, not {kind[:60]}")
        if body.count(b",") > MOST_VALUES:
            raise ApiError(413, "request_too_large", f"the JSON has over {MOST_VALUES:,} values")
        return parse_body(body, self.server.app.limits)

    def stream(self, chat, job: Job):
        """Send the events of a reply as it grows."""
        events, pieces = self.protocol().stream(chat), self.pieces(job)
        first = next(pieces)            # the engine has taken it: until here it may be refused
        self.begin_parts(200, "text/event-stream", Cache_Control="no-cache")
        self.send_part(events.begin(job.turn))
        try:
            for new in chain([first], pieces):
                self.send_part(b"".join(events.piece(*piece) for piece in new))
            self.send_part(events.end(job.turn))
        except ApiError as error:       # the status has been sent already
            self.send_part(events.fail(error))
        self.end_parts()

    def pieces(self, job: Job):
        """The new pieces of a reply, in lists, until it ends. Raises ApiError where it fails, and
        ClientLeft as soon as nobody waits for it any more."""
        while True:
            found = wait_for_all(job.outbox, LOOK)
            if self.client_left():
                raise web.ClientLeft
            lists = [item for item in found if isinstance(item, list)]
            if lists:
                yield list(chain(*lists))
            if found and isinstance(found[-1], ApiError):
                raise found[-1]
            if found and found[-1] is None:
                return

    def note(self, seconds: float):
        """One line a request, without anything that it holds."""
        line = f"{self.command} {ascii(self.path.partition('?')[0])[1:-1][:100]}"
        line += f" {self.status}{' left' if self.left else ''}"
        if self.job:
            turn = self.job.turn
            line += f", {turn.prompt_tokens} tokens in, {len(turn.ids) or self.job.seen} out"
        self.server.say(f"{line}, {seconds:.2f} s")
        self.job = None


def wait_for_all(box: SimpleQueue, seconds: float) -> list:
    """Everything that a queue holds, after waiting at most `seconds` for the first of it."""
    found = []
    with contextlib.suppress(Empty):
        found.append(box.get(timeout=seconds))
        while True:
            found.append(box.get_nowait())
    return found


KINDS = {401: "invalid_api_key", 403: "forbidden", 404: "not_found", 405: "method_not_allowed",
         408: "timeout", 413: "request_too_large", 500: "server_error"}
ROUTES = {("GET", "/"): Handler.page, ("GET", "/health"): Handler.health,
          ("GET", "/v1/models"): Handler.models,
          ("POST", "/v1/chat/completions"): Handler.reply,
          ("POST", "/v1/messages"): Handler.reply,
          ("POST", "/v1/messages/count_tokens"): Handler.count_tokens}


# ---- start and stop -----------------------------------------------------------------------------

class Server:
    """A model at an address. Raises UserError where nobody can listen there."""

    def __init__(self, model, args: Args, names: tuple[str, ...] = (MODEL,), say=print):
        self.config, self.tokens = model.config, tokenizer_of(model.config)
        context = min(args.context, model.config.text.max_position_embeddings)
        self.limits = Limits(names, context, args.max_new, max_pixels=args.max_pixels)
        self.openai = OpenAI(self.tokens)
        self.anthropic = Anthropic(self.tokens, self.config)
        self.key = args.api_key
        limits = web.WebLimits(args.connections, args.timeout, body=args.max_body,
                               hosts=own_names(args.host))
        try:
            self.web = web.Server((args.host, args.port), Handler, limits, say)
        except (OSError, TypeError) as error:       # a TypeError for names that can't be encoded
            why = getattr(error, "strerror", "no such name")
            raise UserError(f"can't listen at {args.host}, port {args.port}: {why}; "
                            "--port takes another one, 0 a free one") from None
        self.web.app = self             # where a Handler finds it
        self.worker = EngineThread(
            lambda: Engine(model, args.slots, context, args.drafts, say=say),
            args.slots, args.waiting, say)
        host, port = self.web.server_address[:2]
        self.url = f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"

    def start(self):
        self.worker.start()
        threading.Thread(target=self.web.serve_forever, args=(0.1,), daemon=True).start()

    def stop(self, grace: float = 0.0):
        """Accept nobody any more, let running replies end within `grace` seconds, abort the rest,
        and send the last answers."""
        self.web.shutdown()
        self.web.server_close()
        self.web.close_idle()
        self.worker.stop(grace)
        self.web.wait_until_closed(1.0)


def own_names(host: str) -> tuple[str, ...]:
    """The names of this machine for programs that run on it. Empty, so that any name will do, where
    other machines may ask as well: nobody here knows how they call it."""
    try:
        only_here = ipaddress.ip_address(host).is_loopback
    except ValueError:
        only_here = host == "localhost"
    return ("localhost", "127.0.0.1", "::1", host) if only_here else ()


@contextlib.contextmanager
def running(model, **options):
    """A server in this process, for tests and recipes: `with serve.running(model) as url:`.
    options: fields of Args; the port is a free one."""
    server = Server(model, Args(**{"port": 0} | options), say=lambda line: None)
    server.start()
    try:
        yield server.url
    finally:
        server.stop()


def run(args: Args):
    """Serve until a signal comes."""
    hw = setup(args.device, args.dtype, generates=True)
    folder = find_checkpoint(args.ckpt or ROOT / "ckpt" / "gym")
    model = load_model(folder, hw.device, hw.dtype)
    args = replace(args, api_key=args.api_key or os.environ.get("NANOGLMV_API_KEY", ""))
    names = dict.fromkeys([args.name or folder.resolve().name, MODEL])
    server = Server(model, args, tuple(names), say)
    print(introduction(server, args, hw, model), flush=True)
    serve(server, args.grace)


def introduction(server: Server, args: Args, hw, model) -> str:
    """What whoever starts the server should know."""
    millions = sum(p.numel() for p in model.parameters()) / 1e6
    key = "KEY" if server.key else "any"
    lines = [f"{hw.description}",
             f"{', '.join(server.limits.names)}: {millions:.1f}M parameters, {args.slots} slots of "
             f"{server.limits.context:,} tokens",
             f"OPENAI_BASE_URL={server.url}/v1  OPENAI_API_KEY={key}",
             f"ANTHROPIC_BASE_URL={server.url}  ANTHROPIC_API_KEY={key}  ANTHROPIC_MODEL={MODEL}",
             "It can do what it was trained on and nothing else: it will not follow the "
             "instructions of an agent framework.",
             f"{server.url} is ready; Ctrl-C ends it"]
    if not (server.key or server.web.limits.hosts):
        lines.insert(-1, "Whoever reaches this machine may ask: NANOGLMV_API_KEY sets a key")
    return "\n".join(lines)


def serve(server: Server, grace: float):
    """Serve until SIGINT or SIGTERM; replies that are running then get `grace` seconds to end. A
    second signal ends the process at once."""
    received: SimpleQueue = SimpleQueue()

    def receive(number, frame):
        for which in (signal.SIGINT, signal.SIGTERM):
            signal.signal(which, signal.SIG_DFL)
        received.put(number)

    for which in (signal.SIGINT, signal.SIGTERM):
        signal.signal(which, receive)
    server.start()
    received.get()
    say(f"stopping: running replies have {grace:g} seconds to end; a second signal ends them")
    server.stop(grace)


def say(line: str):
    """Print a line at once and in one piece, since many threads print."""
    with contextlib.suppress(OSError):      # `| head`: nobody reads it
        print(line + "\n", end="", flush=True)


# Exercises. Delete the body, write it again, run the test, or `python -m lab.grade NAME`.
# 1. EngineThread._take: when may it wait, and when must it not?
#    pytest tests/test_serve.py -k "take_waits or within_a_step or stopping"; 20 minutes.
# 2. Handler.pieces: a client that leaves frees its slot, in the middle of its reply or before it.
#    pytest tests/test_serve.py -k client_that_leaves; 20 minutes.
# 3. Server.process_request in lib/web.py: who has to leave when all connections are taken?
#    pytest tests/test_serve.py -k "silent or more_requests"; 30 minutes.

if __name__ == "__main__":
    main(lambda: run(cli(Args, about=__doc__)))
