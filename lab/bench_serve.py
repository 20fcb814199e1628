"""Our server beside transformers' `generate` behind the same protocol: `python -m lab.bench serve`.

Two processes serve the same checkpoint (--ckpt), each with one thread: serve.py, and serve.py with
another engine, transformers' GLM-OCR, which generates one request after the other. It does so
because its own continuous batching does not support pictures. The client of both is this process.

Both sides get the same greedy requests, whose replies all have LENGTHS tokens, from one client that
waits for each reply, and from SIDE_BY_SIDE clients at once. Then requests with a picture arrive
while all slots but one are busy with long replies. How long does the first token take, in steps of
the running batch? And by how many tokens do the running replies grow in the meantime? One, by the
step that was going on when the request came, and one by the step that reads the prompt and brings
the first token: more than two would say that the request has waited for other steps.
"""
import lib  # first of all, before torch: see lib/__init__.py

import base64
import contextlib
import io
import itertools
import json
import os
import random
import selectors
import socket
import statistics
import subprocess
import sys
import threading
import time
from collections import deque
from concurrent.futures import ThreadPoolExecutor
from http.client import HTTPConnection
from queue import SimpleQueue
from types import SimpleNamespace

import torch

import gym
import serve
from engine import Result
from lab.bench_case import case_of_speeds, case_of_times
from lib.cli import cli, main, UserError
from lib.common import ROOT
from tasks.base import IMAGE, Task
from tokenizer import tokenizer_of

STARTING = 120          # seconds that a server may take to start
SIDE_BY_SIDE = 16
CKPT = "ckpt/gym"       # what is served without --ckpt
AIM = 4.0               # tokens a second of SIDE_BY_SIDE requests at once over one at a time
KINDS = {"text": ("text_code",), "pictures": ("scene_to_json", "ocr_document")}
LENGTHS = {"text": 24, "pictures": 48}      # tokens of a reply, which is cut there
LONG, NEW = "ui_to_code", "gui_click"       # what fills the batch; what arrives then
ARRIVALS = 20           # a round
CHAT = "/v1/chat/completions"


# ---- a server in a process of its own -----------------------------------------------------------

@contextlib.contextmanager
def server_process(*words):
    """`python words` until the end of the block, with a free port: yields an object with `port`,
    `process` and `lines`, what it has printed. Raises UserError if it doesn't begin to serve."""
    process = subprocess.Popen(
        [sys.executable, *words, "--port=0"], cwd=ROOT, stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT, text=True, env=os.environ | {"OMP_NUM_THREADS": "1"})
    lines, ready = [], threading.Event()

    def read():
        for line in process.stdout:
            lines.append(line.rstrip())
            if " is ready" in line:
                ready.set()
        ready.set()             # it has ended

    threading.Thread(target=read, daemon=True).start()
    try:
        ready.wait(STARTING)
        address = next((line.split()[0] for line in lines if " is ready" in line), None)
        if not address:
            said = lines[-1] if lines else "it is silent"
            raise UserError(f"{' '.join(words)} does not serve: {said}")
        yield SimpleNamespace(port=int(address.rpartition(":")[2]), process=process, lines=lines)
    finally:
        process.terminate()
        try:
            process.wait(20)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()


class PeerEngine:
    """What serve.py needs of an Engine, done by transformers: greedy, one request after the
    other, a token a step. No client leaves in this comparison, so there is no `abort`."""

    def __init__(self, model, *slots, **options):
        from lab.bench import padded, peer
        parameter = next(model.parameters())
        self.config, self.padded = model.config, padded
        self.hw = SimpleNamespace(device=parameter.device, dtype=parameter.dtype)
        self.theirs = peer(model, self.hw).eval()
        self.stops = sorted(tokenizer_of(model.config).stops)
        self.numbers, self.waiting, self.running, self.replies = itertools.count(), deque(), [], {}
        self.box: SimpleQueue = SimpleQueue()   # tokens of the running request; None: its end

    def submit(self, request) -> int:
        number = next(self.numbers)
        self.waiting.append((number, request))
        self.replies[number] = []
        return number

    def so_far(self, number: int) -> list[int]:
        return self.replies[number]

    def step(self) -> list[Result]:
        """Wait for the next token of the running request."""
        if not self.running:
            self.running = [self.waiting.popleft()]
            threading.Thread(target=self._generate, args=self.running[0][1:], daemon=True).start()
        token, (number, request) = self.box.get(), self.running[0]
        if isinstance(token, Exception):
            raise token
        if token is not None:
            self.replies[number].append(token)
            return []
        self.running, ids = [], self.replies.pop(number)
        return [Result(number, ids, "stop" if ids[-1] in self.stops else "length", [], [])]

    @torch.no_grad()
    def _generate(self, request):
        # What `generate` calls with the ids of the prompt first, then with each new token.
        prompt = iter([True])
        streamer = SimpleNamespace(end=lambda: None, put=lambda ids: next(prompt, False)
                                   or self.box.put(ids.item()))
        try:
            self.theirs.generate(**self._inputs(request), streamer=streamer, do_sample=False,
                                 max_new_tokens=request.max_new, eos_token_id=self.stops)
            self.box.put(None)
        except Exception as error:
            self.box.put(error)

    def _inputs(self, request) -> dict:
        inputs = self.padded([request.prompt], self.config, self.hw)
        del inputs["labels"]
        return inputs


# ---- requests -----------------------------------------------------------------------------------

def data_uri(image) -> str:
    file = io.BytesIO()
    image.save(file, "png")
    return "data:image/png;base64," + base64.b64encode(file.getvalue()).decode()


def question(task: Task, max_new: int, **fields) -> dict:
    """The body of a request for Chat Completions: the first question of a task of the gym."""
    message = gym.demonstrate(task)[0][0]
    parts = [{"type": "image_url", "image_url": {"url": data_uri(image)}}
             for image in message.images]
    parts.append({"type": "text", "text": message.text.replace(IMAGE, "")})
    return {"model": "nanoglm-v", "messages": [{"role": "user", "content": parts}],
            "max_tokens": max_new, **fields}


def post(connection: HTTPConnection, body: dict) -> dict:
    """The answer to a request. Raises UserError where it is an error."""
    connection.request("POST", CHAT, json.dumps(body), {"Content-Type": "application/json"})
    response = connection.getresponse()
    answer = json.loads(response.read())
    if response.status != 200:
        raise UserError(f"the server answers {response.status}: {answer}")
    return answer


def first_piece(connection: HTTPConnection, body: dict) -> float:
    """Seconds until the first text of a streamed reply; the rest is read as well."""
    began, seconds = time.perf_counter(), None
    connection.request("POST", CHAT, json.dumps(body | {"stream": True}),
                       {"Content-Type": "application/json"})
    for line in connection.getresponse():
        if seconds is None and line.startswith(b"data: {"):
            if any(choice["delta"].get("content") for choice in json.loads(line[6:])["choices"]):
                seconds = time.perf_counter() - began
    if seconds is None:
        raise UserError("a reply has no text")
    return seconds


def together(port: int, work, bodies: list) -> list:
    """work(connection, body) for all bodies at once."""
    def one(body):
        with contextlib.closing(HTTPConnection("127.0.0.1", port, timeout=600)) as connection:
            return work(connection, body)

    with ThreadPoolExecutor(len(bodies)) as pool:
        return list(pool.map(one, bodies))


def in_turn(port: int, work, bodies: list) -> list:
    with contextlib.closing(HTTPConnection("127.0.0.1", port, timeout=600)) as connection:
        return [work(connection, body) for body in bodies]


def text_of(answer: dict) -> str:
    return answer["choices"][0]["message"]["content"]


def equally_long(port: int, kind: str, seed: int) -> list[dict]:
    """SIDE_BY_SIDE requests whose replies have LENGTHS[kind] tokens."""
    found = []
    for i in range(10 * SIDE_BY_SIDE):
        name = KINDS[kind][i % len(KINDS[kind])]
        body = question(Task(name, seed + i, 1), LENGTHS[kind])
        usage = in_turn(port, post, [body])[0]["usage"]
        if usage["completion_tokens"] == LENGTHS[kind]:
            found.append(body)
            if len(found) == SIDE_BY_SIDE:
                return found
    raise UserError(f"too few replies of this checkpoint are as long as {LENGTHS[kind]} tokens")


# ---- speed --------------------------------------------------------------------------------------

def speed(ports: dict, kind: str, args) -> dict:
    """Tokens a second of both servers, for one request at a time and for all at once."""
    bodies = equally_long(ports["ours"], kind, args.seed)
    texts = [[text_of(answer) for answer in together(port, post, bodies)]
             for port in ports.values()]
    equal = sum(a == b for a, b in zip(*texts))
    print(f"{kind}: {equal} of {len(bodies)} replies of both sides are equal")
    rates = {(side, order): [] for side in ports for order in (in_turn, together)}
    for _ in range(args.rounds):
        for side, order in rates:
            began = time.perf_counter()
            order(ports[side], post, bodies)
            rates[side, order].append(len(bodies) * LENGTHS[kind] / (time.perf_counter() - began))
    one, many = "one at a time", f"{SIDE_BY_SIDE} at once"
    return {
        f"{kind}, {one}": case_of_speeds(rates["ours", in_turn], rates["theirs", in_turn],
                                         ("serve.py", "generate"), aim=None, equal=equal),
        f"{kind}, {many}": case_of_speeds(rates["ours", together], rates["theirs", together],
                                          ("serve.py", "generate"), aim=None),
        f"{kind}, {many} over {one}": case_of_speeds(
            rates["ours", together], rates["ours", in_turn],
            (f"serve.py, {many}", f"serve.py, {one}"), aim=AIM)}


def first_tokens(ports: dict, args) -> dict:
    """Seconds until the first text, where SIDE_BY_SIDE requests come at once."""
    bodies = [question(Task(NEW, args.seed + i, 1), 16) for i in range(SIDE_BY_SIDE)]
    found = {side: [] for side in ports}
    for _ in range(args.rounds):
        for side, port in ports.items():
            found[side].append(statistics.mean(together(port, first_piece, bodies)))
    return case_of_times({"generate": found["theirs"], "serve.py": found["ours"]},
                         "mean of the requests")


# ---- a new request at a running batch -----------------------------------------------------------

class Streams(threading.Thread):
    """Long replies that are streamed, read by one thread. times: of each reply, when its events
    have arrived."""

    def __init__(self, port: int, bodies: list):
        super().__init__(daemon=True)
        self.times = [[] for _ in bodies]
        self.selector, self.ended, self.left = selectors.DefaultSelector(), False, False
        for times, body in zip(self.times, bodies):
            data = json.dumps(body | {"stream": True}).encode()
            connection = socket.create_connection(("127.0.0.1", port))
            connection.sendall(f"POST {CHAT} HTTP/1.1\r\nHost: localhost\r\nContent-Type: "
                               f"application/json\r\nContent-Length: {len(data)}\r\n\r\n".encode()
                               + data)
            self.selector.register(connection, selectors.EVENT_READ, times)

    def run(self):
        while not self.left:
            for key, _ in self.selector.select(0.1):
                now = time.perf_counter()
                try:
                    data = key.fileobj.recv(2 ** 16)
                except ConnectionError:         # the server has died
                    data = b""
                self.ended = self.ended or not data or b"[DONE]" in data
                key.data.extend([now] * data.count(b"data: {"))
        for key in list(self.selector.get_map().values()):
            key.fileobj.close()         # so the server drops what is left of the replies

    def grown(self, since: float, until: float) -> int:
        """By how many events the fastest of the replies has grown."""
        return max(sum(since < t < until for t in list(times)) for times in self.times)


def begins_with_text(port: int, seed: int) -> list[dict]:
    """ARRIVALS requests for one token, which is text: a client sees no box mark."""
    bodies = (question(Task(NEW, seed + i, 1), 1) for i in range(50 * ARRIVALS))
    return list(itertools.islice((body for body in bodies
                                  if text_of(in_turn(port, post, [body])[0])), ARRIVALS))


def arrivals(port: int, args) -> dict:
    """Requests that come while SIDE_BY_SIDE - 1 long replies are generated."""
    waits, steps, grown = [], [], []
    rng, bodies = random.Random(args.seed), begins_with_text(port, args.seed)
    for _ in range(args.rounds):
        streams = Streams(port, [question(Task(LONG, args.seed + i, 1), 1024)
                                 for i in range(SIDE_BY_SIDE - 1)])
        streams.start()
        try:
            while not streams.ended and min(map(len, streams.times)) < 20:
                time.sleep(0.01)
            began = time.perf_counter()
            time.sleep(0.3)
            step = (time.perf_counter() - began) / max(1, streams.grown(began, time.perf_counter()))
            for body in bodies:
                time.sleep(rng.uniform(1, 3) * step)
                began = time.perf_counter()
                seconds = in_turn(port, first_piece, [body])[0]
                if streams.ended:
                    break
                waits.append(seconds)
                steps.append(step)
                grown.append(streams.grown(began, began + seconds))
        finally:
            streams.left = True
            streams.join()
    if not waits:
        raise UserError("the long replies of this checkpoint are too short for this")
    verdict = "reached" if statistics.median(grown) <= 2 else "missed"
    print(f"{len(waits)} requests came at a running batch; until their first token its replies "
          f"grew by {statistics.median(grown):g} tokens (at most {max(grown)})  aim 2: {verdict}")
    return case_of_times({"a step of the batch": [1000 * s for s in steps],
                          "first token": [1000 * s for s in waits]}, "ms", grown=grown)


def measure(args, hw) -> dict:
    """All cases, as lab.bench prints them."""
    options = [f"--ckpt={args.ckpt or CKPT}", f"--device={hw.device.type}",
               f"--dtype={str(hw.dtype)[6:]}", f"--slots={SIDE_BY_SIDE}"]
    cases = {}
    with server_process("serve.py", *options) as ours, \
            server_process("-m", "lab.bench_serve", *options) as theirs:
        ports = {"ours": ours.port, "theirs": theirs.port}
        for kind in KINDS:
            cases |= speed(ports, kind, args)
        cases[f"seconds until the first text, {SIDE_BY_SIDE} at once"] = first_tokens(ports, args)
        cases[f"a request at a batch of {SIDE_BY_SIDE - 1}, ms"] = arrivals(ours.port, args)
    return {"cases": cases}


def entry():
    """The server of the other side, with the options of serve.py."""
    serve.Engine = PeerEngine
    serve.run(cli(serve.Args, about=__doc__))


if __name__ == "__main__":
    main(entry)
