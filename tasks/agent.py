"""Tasks on the phone of phone.py, from reading a switch to errands through several apps: the
paper's hierarchy of element perception, grounding, single actions and trajectories [C].

The model sees only the current screen. What it reads on one screen and needs on a later one it has
to write down: remember("37") changes nothing on the phone, but from then on the prompt lists it
among the earlier actions. [O]
"""
import json
from copy import deepcopy

from .base import box, click, Env, IMAGE, Obs, OneShot, pick, recap, Step, worded
from .draw import Canvas
from .grounding import BOX
from .phone import appearance, control, Device, FORMS, plain_text, random_device, ROW, TEXT
from .verify import inside, parse_action, plain
from .words import CONTROLS, DAYS, invent, NAMES, some, some_of, THINGS

# How a user may word a goal; level 0 has the first of each, but two of TURN.
TURN = ("turn {} {}", "switch {} {}", "turn {1} {0}", "switch {1} {0}", "set {} to {}",
        "make sure that {} is {}")
SET = ("set {} to {}", "change {} to {}", "switch {} to {}", "put {} on {}", "choose {1} for {0}")
GOALS = {                       # of GuiMultiApp, by kind and app
    "ask Shop": (
        "What does {label} cost in Shop?", "How much is {label} in Shop?",
        "What is the price of {label} in Shop?", "Look up the price of {label} in Shop.",
        "Tell me what {label} costs in Shop."),
    "ask Notes": (
        "What does the note {label} say?", "What is in the note {label}?",
        "Read me the note {label}.", "What have I written in the note {label}?",
        "Tell me what the note {label} says."),
    "ask Calendar": (
        "Which day is {label} in Calendar?", "On which day is {label} in Calendar?",
        "When is {label} in Calendar?", "Look up the day of {label} in Calendar.",
        "Tell me the day of {label} in Calendar."),
    "set Notes": (
        "Set {name} in {page} to what the note {label} says.",
        "Change {name} in {page} to the value in the note {label}.",
        "The note {label} says what to set {name} in {page} to. Do it.",
        "Look in the note {label} and set {name} in {page} to its value.",
        "Read the note {label}, then put {name} in {page} on that value."),
    "cart Notes": (
        "Put what the note {label} names into the cart of Shop.",
        "Add to the cart of Shop what the note {label} names.",
        "The note {label} names a thing. Put it into the cart of Shop.",
        "Look in the note {label} and put what it names into the cart of Shop.",
        "Read the note {label}, then add what it names to the cart of Shop."),
    "write Shop": (
        "Write a note {note} with the price of {label}.",
        "Make a note {note} that says what {label} costs.",
        "Look up the price of {label} and write it into a new note {note}.",
        "I need a note {note} with the price of {label}.",
        "Find out what {label} costs and note it down as {note}."),
    "date Notes": (
        "Enter {event} in Calendar for the day in the note {label}.",
        "Add {event} to Calendar on the day that the note {label} names.",
        "The note {label} names a day. Enter {event} in Calendar for it.",
        "Look in the note {label} and enter {event} in Calendar for its day.",
        "Read the note {label}, then put {event} on its day in Calendar.")}
# Questions about a page of settings, by the kind of the control.
IS_ON = ("Is {} on?", "Is {} turned on?", "Is {} switched on?", "Is the switch {} on?",
         "Tell me whether {} is on.")
IS_TICKED = ("Is {} ticked?", "Is {} checked?", "Is the box {} ticked?", "Is there a tick at {}?",
             "Tell me whether {} is ticked.")
WHICH_TAB = ("Which tab is open?", "What is the open tab?", "Which tab is selected?",
             "Name the open tab.", "Tell me which tab is open.")
WHAT_VALUE = ("What is {} set to?", "What is the value of {}?", "Which value does {} have?",
              "Read the value of {}.", "Tell me what {} is set to.")
HOW_MANY_ON = ("How many switches are on?", "Count the switches that are on.",
               "How many switches are turned on?", "What is the number of switches that are on?",
               "Tell me how many switches are on.")
ASKS = {"switch": IS_ON, "check": IS_TICKED, "tabs": WHICH_TAB}
# The question about a recorded errand.
CRITIC = ("One action is wrong. Which, and is it misread, mis-target or wrong-next?",
          "Which action is wrong, and is it misread, mis-target or wrong-next?",
          "Find the wrong action. Is it misread, mis-target or wrong-next?",
          "There is one mistake. At which action, and is it misread, mis-target or wrong-next?",
          "Name the wrong action and its kind: misread, mis-target or wrong-next.")
REMEMBER = ("Remember {}", "Look up and remember {}", "Keep in mind {}", "Find and remember {}",
            "Learn {}")


class GuidedDevice(Device):
    """A device, and the oracle's next step on it: (equally good actions, the reason in words)."""

    def tap(self, label: str, choice=None) -> str:
        """The click on the element with this label and choice."""
        return click(next(s[0] for s in self.spots() if s[1:3] == (label, choice)))

    def random_click(self, rng) -> str:
        """A click on a random element."""
        spots = self.spots()
        return click(pick(rng, spots)[0]) if spots else "back()"

    def toward(self, app: str, path: list, label: str) -> tuple[list[str], str] | None:
        """The next step on the way to a row, or None if the row is visible or does not exist."""
        if self.app != app:
            taps = [self.tap(app)] if self.app == "Home" else []
            return [*taps, f'open("{app}")'], f"{label} is in {app}."
        if path[:len(self.path)] != self.path:
            return ["back()"], f"{label} is not under {self.path[-1]}."
        name = [*path, label][len(self.path)]
        # a row that does not exist (place 99) is searched for down to the end of the page
        place = next((i for i, row in enumerate(self.rows()) if row.label == name), 99)
        up = place < self.scroll
        if up or place >= self.scroll + self.visible and self.scroll < self.lowest():
            return [f'scroll("{"up" if up else "down"}")'], f"{name} is not in sight."
        if place < 99 and len(self.path) < len(path):
            return [self.tap(name)], f"{label} is under {name}."
        return None

    def hit(self, app: str, path: list, spots: list, why: str, text="") -> tuple[list[str], str]:
        """The next step to a page, or, on it, to click on these (label, choice) or type text."""
        return self.toward(app, path, spots[0][0]) or (
            [f'type("{text}")'] if text else [self.tap(*spot) for spot in spots], why)

    def step_to(self, gold: dict, first=()) -> tuple[list[str], str] | None:
        """The next step that makes the data more like `gold`, those of `first` first; or None."""
        words, data, controls = self.world["words"], self.data, self.world["controls"]
        for key in [*first, *gold["Settings"]]:
            want, (*path, name) = gold["Settings"][key], key.split("/")
            if data["Settings"][key] != want:
                shown = want if type(want) is not bool else ("off", "on")[want]
                spot = (name, want if controls[key][0] == "slider" else None)
                if controls[key][0] == "choice":
                    path, spot = [*path, name], (want, None)
                return self.hit("Settings", path, [spot], f"{name} should be {shown}.")
        for app in ("Shop", *FORMS):
            extra = [one for one in data[app] if one not in gold[app]]
            missing = [one for one in gold[app] if one not in data[app]]
            if app == "Shop" and extra + missing:
                item, label = (extra + missing)[0], "Remove" if extra else words["add"]
                return self.hit(app, [item], [(label, None)], f"{label}: {item}.")
            if extra:                       # before adding, since titles must be unique
                title = extra[0][0]
                return self.hit(app, [title], [(words["delete"], None)], f"{title} must go.")
            if missing:
                unset = {name: text for name, text in zip(FORMS[app], missing[0])
                         if self.draft[name] != text}
                spots = [(name, text if name == "Day" else None) for name, text in unset.items()]
                why = next((f"The {name} is {unset[name]}." for name in unset), "All is in.")
                return self.hit(app, [words["new"]], spots or [(words["save"], None)], why,
                                unset.get(self.focus))
        return None


class Errand(Env):
    """A goal on the device. First the things in `lookups` are to be looked up, each (app, path,
    label, value), with the value None for something that does not exist; then the data must become
    equal to `due`. A subclass sets both in `plan`, which returns the goal in words."""
    family, tier, verifier, layout, max_turns = "agent", 3, "STATE", "segment", 40
    min_pixels = 128

    def begin(self):
        """Set up everything but the picture. From level 2 on the errand starts on a random page and
        dialogs may open, whose Yes changes a setting that should stay."""
        self.actions, self.kept, self.seen, self.answer, self.end = [], [], set(), None, None
        self.lookups, self.first, self.start = [], [], ("Home", [])
        self.asked, self.aim = None, "done"
        rng = self.rng
        world, data = random_device(rng, self.heldout, self.level)
        self.due, self.before = deepcopy(data), deepcopy(data["Settings"])
        self.goal = self.plan(world, data)
        page = pick(rng, list(world["tree"])[1:]).split("/")
        starts = [self.start, ("Settings", page), ("Notes", pick(rng, data["Notes"])[:1])]
        start = pick(rng, starts) if self.level >= 2 else self.start
        off = [key for key, value in data["Settings"].items()
               if value is self.due["Settings"][key] is False]
        turns = some_of(rng, range(1, 5), (0, 0, 1, 1, 2)[self.level])
        world["popups"] = dict(zip(turns, some_of(rng, off, 2)))
        self.device = GuidedDevice(world, data, *start)
        self.wanted = {**Device(world, self.due).outcome(), "answer": self.asked, "end": self.aim}

    def reset(self):
        self.begin()
        return self.observe()

    def observe(self):
        """The current screen with the goal and the actions so far -> observation."""
        return Obs(recap(self.goal, self.actions), [self.device.draw(self.pixels)])

    def over(self):
        """Whether the model ended the episode, or the turns ran out."""
        return self.end is not None or len(self.actions) >= self.max_turns

    def take(self, text):
        """Carry out a reply. An error message is added to the history instead of the action."""
        name, args = parse_action(text) or ("", [])
        complaint = None
        if name == "done" and args in ([], ["infeasible"]):
            self.end = args[0] if args else "done"
        elif name == "answer" and len(args) == 1 and type(args[0]) in (str, int):
            self.answer, self.end = plain(str(args[0])), "answer"
        elif name == "remember" and plain_text(args):
            self.kept.append(args[0])
        else:
            complaint = self.device.act(name, args)
        self.actions.append(f"? {complaint}" if complaint else
                            f"{name}({', '.join(map(json.dumps, args))})")

    def step(self, text):
        if not self.over():
            self.take(str(text))
        over = self.over()
        return Step(None if over else self.observe(), over, over and self.end is None)

    def evidence(self):
        state = {**self.device.outcome(), "answer": self.answer, "end": self.end}
        return {"state": deepcopy(state), "gold": self.wanted, "log": list(self.actions)}

    def next_actions(self) -> tuple[list[str], str]:
        """(the equally good next actions, the oracle's own first; the reason in words)."""
        device = self.device
        if device.popup:
            away = next(word for _, word, agrees in device.dialog() if not agrees)
            return [device.tap(away)], "A dialog is in the way."
        if self.aim != "done" and (repair := device.step_to(self.due)):
            return repair                   # undo a change: this errand must not change anything
        missing = [lookup for lookup in self.lookups if lookup[-1] not in self.kept]
        for app, path, label, value in missing:
            if way := device.toward(app, path, label):
                return way
            if value is None:
                return ['done("infeasible")'], f"There is no {label}."
            verb = "remember" if self.asked is None else "answer"
            return [f'{verb}("{value}")'], f"{[label, *path][-1]} says {value}."
        for key in self.first:              # also look at a setting that is right already
            *path, name = key.split("/")
            if key not in self.seen and (way := device.toward("Settings", path, name)):
                return way
            self.seen.add(key)
            if device.data["Settings"][key] != self.due["Settings"][key]:
                break
        return device.step_to(self.due, self.first) or (["done()"], "All is as it should be.")

    def oracle(self):
        while not self.over():
            ways, self.why = self.next_actions()
            yield ways[0]

    def glance(self, rng):
        """Clicks at random, and ends with the first value that it sees or the first change."""
        device = self.device
        if device.data["Settings"] != self.before:
            return "done()"
        seen = [row.value for _, row in device.in_sight() if row.kind in ("link", "fact")]
        if seen and device.app in ("Shop", "Calendar", "Notes" if device.path else ""):
            return f'answer("{pick(rng, seen)}")'
        return device.random_click(rng)


class GuiNavigate(Errand):
    """Change one or two settings; the second one may already be right."""
    blind = (0.1, 0.05, 0.02, 0.01, 0.01)    # one or two clicks are right by luck

    def plan(self, world, data):
        rng, goals = self.rng, []
        self.first = some_of(rng, list(world["controls"]), (1, 1, 1, 2, 2)[self.level])
        for i, key in enumerate(self.first):
            now, (*page, name) = data["Settings"][key], ["Settings", *key.split("/")]
            others = [c for c in world["controls"][key][1] or (False, True) if c != now]
            want = now if i and rng.integers(3) == 0 else pick(rng, others)
            self.due["Settings"][key] = want
            switched = type(want) is bool
            what = worded(rng, TURN if switched else SET, self.level).format(
                name, ("off", "on")[want] if switched else want)
            goals.append(f"{what} in {' > '.join(page)}")
        self.start, goal = ("Settings", []), ", then ".join(goals)
        return f"{goal[0].upper()}{goal[1:]}."


class GuiMultiApp(Errand):
    """Read something in one app and use it in another. One errand in five is infeasible, because
    something does not exist; then nothing may change."""
    kinds = ("ask", "ask set", "set cart", "cart write date", "cart write date")
    blind = (0.2,) * 5          # done("infeasible"), unseen

    def plan(self, world, data):
        rng, due = self.rng, self.due
        kind, lacking = pick(rng, self.kinds[self.level].split()), rng.integers(5) == 0
        app = {"ask": pick(rng, ("Shop", *FORMS)), "write": "Shop"}.get(kind, "Notes")
        known = [*world["items"].items()] if app == "Shop" else data[app]
        which = int(rng.integers(len(known)))
        label, value = known[which]
        # names that exist and names that do not: of notes, of a thing in the shop, of an event
        free, wares = (some(rng, words, 99, self.heldout) for words in (NAMES, THINGS))
        unused, note = [name for name in free if name not in dict(data["Notes"])][:2]
        unsold = next(n for ware in wares if (n := ware.capitalize()) not in world["items"])
        unmet = lacking and kind == "cart" and rng.integers(2) == 0
        while (event := invent(rng, self.heldout)) in dict(data["Calendar"]):
            pass
        day, ware = pick(rng, DAYS[:5]), unsold if unmet else pick(rng, list(world["items"]))
        sliders = [(key, n) for key, (sort, choices) in world["controls"].items()
                   if sort == "slider" for n in choices if n != data["Settings"][key]]
        key, want = pick(rng, sliders or [("", 0)])
        value = {"set": str(want), "cart": ware, "date": day}.get(kind, value)
        if app == "Notes":
            data["Notes"][which][1] = due["Notes"][which][1] = value
        if lacking and not unmet:
            label, value = {"Shop": unsold, "Notes": unused, "Calendar": event}[app], None
        elif kind == "ask":
            self.asked = plain(str(value))
        elif kind == "set":
            due["Settings"][key] = want
        elif not lacking:
            into, entry = {"cart": ("Shop", ware), "date": ("Calendar", [event, day]),
                           "write": ("Notes", [note, str(value)])}[kind]
            due[into].append(entry)
        self.lookups = [(app, [label], "Text", value) if app == "Notes" and value else
                        (app, [], label, value and str(value))]
        self.lookups += [("Shop", [], ware, None)] if unmet else []
        self.start = ("Home", []) if self.level else (app, [])
        self.aim = "infeasible" if lacking else "answer" if kind == "ask" else "done"
        *page, name = ["Settings", *key.split("/")]
        return worded(rng, GOALS[f"{kind} {app}"], self.level, 1).format(
            label=label, name=name, page=" > ".join(page), note=note, event=event)


class WidgetState(OneShot):
    """Read a switch, check box, slider, tab or choice; at level 4 also count what is on."""
    family, tier, verifier, min_pixels = "perception", 0, "EX", 128
    blind = (0.5, 0.5, 0.4, 0.3, 0.27)
    kinds = (("switch",), ("switch", "check"), ("switch", "check", "slider"),
             ("switch", "check", "slider", "choice"), ("switch", "slider", "slider", "choice"))

    def make(self):
        rng, rows = self.rng, (2, 4, 5, 6, 7)[self.level]
        world, data = random_device(rng, self.heldout, 0)
        if self.level:
            world.update(appearance(rng, self.heldout, self.level, rows))
        names = some(rng, CONTROLS, rows, self.heldout)
        settings = {name: control(rng, self.kinds[self.level]) for name in names}
        if self.level >= 3:
            _, tabs, _ = control(rng, ("choice",))
            settings[names[0]] = ("tabs", tabs, pick(rng, tabs))
        world["tree"] = {"": some_of(rng, names)}
        world["controls"] = {name: setting[:2] for name, setting in settings.items()}
        data["Settings"] = {name: value for name, (_, _, value) in settings.items()}
        asked = [(worded(rng, ASKS.get(kind, WHAT_VALUE), self.level, 1).format(name),
                  ("no", "yes")[value] if type(value) is bool else str(value))
                 for name, (kind, _, value) in some_of(rng, list(settings.items()))]
        if self.level == 4:
            on = sum(kind == "switch" and value for kind, _, value in settings.values())
            asked.insert(int(rng.integers(3)), (worded(rng, HOW_MANY_ON, 4), str(on)))
        (question, gold), *more = asked[:5]
        self.more = [(question, box(answer)) for question, answer in more]
        self.shown = [answer for _, answer in asked[:5]]
        return Obs(IMAGE + question, [Device(world, data, "Settings").draw(self.pixels)]), gold


class UiGround(OneShot):
    """Give the box of a row, a button or a single control on any screen."""
    family, tier, verifier, min_pixels = "perception", 1, "IOU", 128
    blind = (0.25, 0.2, 0.15, 0.12, 0.12)

    def make(self):
        rng, level = self.rng, self.level
        world, data = random_device(rng, self.heldout, level)
        app = pick(rng, ("Home", "Shop", "Notes", "Calendar", *3 * ("Settings",))[level >= 2:])
        path = pick(rng, list(world["tree"])[1:]).split("/") if app == "Settings" else []
        if app in FORMS and rng.integers(4) == 0:
            path = [world["words"]["new"]]
        device = Device(world, data, app, path)
        for _ in range(int(rng.integers(3))):
            device.act("scroll", ["down"])
        if level < 2 and rng.integers(8) == 0:
            device.popup = pick(rng, list(world["controls"]))
        marks = [(worded(rng, BOX, level, 5).format(name), [*map(round, area)])
                 for name, area in device.named()]
        self.shown = [area for _, area in marks]
        (question, gold), *more = some_of(rng, marks, 5)
        self.more = [(question, box(area)) for question, area in more]
        return Obs(IMAGE + question, [device.draw(self.pixels)]), gold


class GuiNextAction(OneShot):
    """Choose the next action in one turn of an errand, from the goal, the actions so far and the
    screen. The reward is the product over the parts of the action: verb, place, text. [R]"""
    family, tier, verifier, min_pixels = "agent", 2, "HIT", 128
    blind = (0.35, 0.2, 0.2, 0.2, 0.2)

    def make(self):
        errand = (GuiMultiApp if self.level and self.task.seed % 2 else GuiNavigate)(self.task)
        errand.begin()
        total = 0
        while not errand.over():
            ways, why = errand.next_actions()
            # turns whose action follows from the goal and the history alone are chosen rarely
            told = errand.device.popup or ways[0].startswith(("type", "open", "done()"))
            total += (weight := 0.1 if told else 1)
            if errand.rng.random() * total < weight:        # a weighted choice in one pass
                obs, self.right, self.why = errand.observe(), ways, why
                self.spots = [spot[0] for spot in errand.device.spots()]
            errand.take(ways[0])
        gold = {}
        for name, args in map(parse_action, self.right):
            hit = [area for area in self.spots if name == "click" and inside(args, area)][:1]
            gold.setdefault(name, []).extend(hit or [str(args[0]) if args else ""])
        return obs, gold

    def reply(self, gold):
        return self.right[0]

    def glance(self, rng):
        return click(pick(rng, self.spots)) if self.spots else "back()"


class GuiCritic(OneShot, Errand):
    """Find the wrong action in a recorded errand. Each screen has the next action in its margin (as
    text in the prompt, it would give the answer away). One of them is wrong: "misread" remembers
    another value than the screen shows, "mis-target" clicks on the wrong thing, "wrong-next" is of
    the wrong kind. The recording goes on with the right action. [O]"""
    tier, verifier, layout, max_turns = 2, "EX", "append", 1
    longest, blind = (4, 6, 6, 8, 8), (0.2, 0.12, 0.12, 0.1, 0.1)

    def plan(self, world, data):
        lookups = [("Shop", [item], "Price", str(price)) for item, price in world["items"].items()]
        lookups += [(app, [title], FORMS[app][1], text)
                    for app in FORMS for title, text in data[app]]
        # all values differ, because a value that is already remembered is not read again
        unlike = {lookup[3]: lookup for lookup in some_of(self.rng, lookups)}
        self.lookups = [*unlike.values()][:(1, 2, 2, 3, 3)[self.level]]
        world["margin"] = 1
        things = ", then ".join(
            f"the {what.lower()} of {path[0]} in {app}" for app, path, what, _ in self.lookups)
        return worded(self.rng, REMEMBER, self.level, 1).format(things)

    def make(self):
        self.begin()
        screens, actions, self.slips = [], [], []
        while self.end is None and len(screens) < self.longest[self.level]:
            ways, why = self.next_actions()
            screens.append(self.device.draw(self.pixels))
            actions.append(ways[0])
            self.slips += [(kind, len(screens), wrong, f"{why} So {ways[0]}, not {wrong}.")
                           for kind, wrong in self.wrong(ways)]
            self.take(ways[0])
        kind, turn, actions[turn - 1], self.why = pick(self.rng, self.slips)
        width, height = self.device.size
        y = height - ROW if self.device.world["bar"] == "top" else 0
        for screen, action in zip(screens, actions):
            canvas, (verb, args) = Canvas.on(screen, self.pixels), parse_action(action)
            canvas.plate(0, y, width, ROW, (255, 226, 130), 0)
            canvas.word(action, 2, y + ROW / 2, (0, 0, 0), TEXT)
            if verb == "click":             # a ring around the place
                across, down = args[0] * width / 999, args[1] * height / 999
                ring = canvas.at(across - 3, down - 3, across + 3, down + 3)
                canvas.pen.ellipse(ring, None, (255, 0, 170), canvas.px(1))
        ask = worded(self.rng, CRITIC, self.level, 1)
        return Obs(f"{IMAGE * len(screens)}{self.goal}. {ask}", screens), f"{turn}, {kind}"

    def wrong(self, ways):
        """[(kind, action)]: the possible mistakes in this turn."""
        rng, device, (verb, args) = self.rng, self.device, parse_action(ways[0])
        others = {"back()", 'scroll("down")', "done()", f'open("{device.world["apps"][0]}")'}
        found = [("wrong-next", pick(rng, sorted(others - set(ways))))]
        spots = [spot for area, *_ in device.spots() if (spot := click(area)) not in ways]
        if verb == "click" and spots:
            found.append(("mis-target", pick(rng, spots)))
        if verb == "remember":
            read, items = args[0], list(device.world["items"])
            like = (DAYS[:5] if read in DAYS else items if not read.isdigit() else
                    [str(abs(int(read) + move)) for move in (-10, -1, 1, 10)])
            found.append(("misread", f'remember("{pick(rng, [v for v in like if v != read])}")'))
        return found

    def glance(self, rng):
        """Recognises a misread value, which takes no knowledge of the goal; else guesses."""
        kind, turn, *_ = pick(rng, [s for s in self.slips if s[0] != "misread"])
        return box(self.gold if self.gold.endswith("misread") else f"{turn}, {kind}")
