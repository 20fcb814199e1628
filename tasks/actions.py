"""The action language: every call that a model of the gym can write, as one table.

    ACTIONS["click"].arguments      {"x": "coordinate", "y": "coordinate"}
    ACTIONS["scroll"].usage         scroll("up" | "down")
    verbs_of("gui_form")            ("click", "done")

An action is written as a Python call with literal arguments, one a turn: click(412, 377). It is
parsed and never evaluated (verify.parse_action). The environments decide by themselves what they
accept; tests/test_agent.py compares them with this table. `gym.py actions` prints it.
"""
from dataclasses import dataclass

from . import agent, screens, webdev

PHONE = ("gui_navigate", "gui_multi_app", "gui_next_action")
SCREENS = ("gui_click", "gui_form", *PHONE)
X_Y = {"x": "coordinate", "y": "coordinate"}
BOX = {"x0": "coordinate", "y0": "coordinate", "x1": "coordinate", "y1": "coordinate"}


@dataclass(frozen=True)
class Verb:
    """One verb of the action language.

    arguments: {name: kind} in the order in which they are written; the names are only for people
    and for protocols that name arguments. A kind is "coordinate", an integer from 0 to 999;
    "text", a string; or a tuple of words, one of which it is. optional: whether the call may also
    have no arguments at all.
    """
    name: str
    arguments: dict
    does: str
    categories: tuple
    optional: bool = False

    @property
    def usage(self) -> str:
        """How a call looks: click(x, y), open("name"), done() or done("infeasible")."""
        shown = [" | ".join(f'"{word}"' for word in kind) if isinstance(kind, tuple) else
                 f'"{name}"' if kind == "text" else name for name, kind in self.arguments.items()]
        call = f"{self.name}({', '.join(shown)})"
        return f"{self.name}() or {call}" if self.optional else call

    def fits(self, values: list) -> bool:
        """Whether these are arguments of this verb, all of the right kind."""
        if self.optional and not values:
            return True
        kinds = self.arguments.values()
        return len(values) == len(kinds) and all(map(is_of_kind, values, kinds))


def is_of_kind(value, kind) -> bool:
    """Whether a value is an argument of this kind, see Verb."""
    if kind == "coordinate":
        return type(value) is int and 0 <= value <= 999
    return type(value) is str and (kind == "text" or value in kind)


ACTIONS = {verb.name: verb for verb in (
    # on screens: a fresh prompt every turn
    Verb("click", X_Y, "press what is at this point of the screen", SCREENS),
    Verb("scroll", {"direction": ("up", "down")}, "scroll the page by nearly a screen", PHONE),
    Verb("type", {"text": "text"}, "write into the field that was clicked on", PHONE),
    Verb("back", {}, "go to the page above", PHONE),
    Verb("remember", {"text": "text"}, "keep a short text among the earlier actions", PHONE),
    Verb("done", {"outcome": ("infeasible",)}, "end: the goal is reached, or it can't be",
         ("gui_form", *PHONE), optional=True),
    # on screens and with tools
    Verb("open", {"name": "text"}, "open an app of the phone, or a page of the library",
         (*PHONE, "text_tools", "image_mining")),
    Verb("answer", {"text": "text"}, "end with this answer",
         (*PHONE, "visual_tools", "text_tools", "image_mining")),
    # with tools: one growing conversation
    Verb("zoom", X_Y, "see the part around a point, four times as large",
         ("visual_tools", "image_mining")),
    Verb("crop", BOX, "see this part, enlarged", ("visual_tools", "image_mining")),
    Verb("draw_point", X_Y, "mark a point in the picture", ("visual_tools",)),
    Verb("draw_box", BOX, "draw a box in the picture", ("visual_tools",)),
    Verb("calc", {"sum": "text"}, "the result of a sum such as 2*(3+4)",
         ("visual_tools", "text_tools")),
    Verb("search_text", {"words": "text"}, "the names of the pages that fit these words",
         ("text_tools", "image_mining")),
    Verb("search_image", BOX, "emblems like the one in this part of the picture",
         ("image_mining",)))}


# How goals are worded, with {} for what they are about: tuples of forms that mean the same.
# Categories that are missing here word theirs in one way.
GOALS = {"gui_click": [screens.GOALS], "gui_form": [screens.FORM_GOALS],
         "gui_navigate": [agent.SET, agent.TURN], "gui_multi_app": [*agent.GOALS.values()],
         "gui_critic": [agent.REMEMBER], "ui_to_code": [webdev.UiToCode.questions]}


def verbs_of(category: str) -> tuple[str, ...]:
    """The verbs that a category of the gym takes; none where its replies are no actions."""
    return tuple(name for name, verb in ACTIONS.items() if category in verb.categories)


def known_goals(category: str) -> list[tuple[str, ...]]:
    """The wordings of GOALS that occur in training: of four or more, `base.worded` holds out the
    last one."""
    return [forms[:-1] if len(forms) >= 4 else forms for forms in GOALS.get(category, ())]
