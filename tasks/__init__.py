"""The task categories, one class each; `gym.py` makes, drives and scores them."""
from .base import Env, Message, Obs, OneShot, Step, Task
from .scenes import Counting, Point, ShapeAttr
from .screens import GuiClick, GuiForm
from .text import OcrLine

CATEGORIES = {
    "shape_attr": ShapeAttr,
    "counting": Counting,
    "ocr_line": OcrLine,
    "point": Point,
    "gui_click": GuiClick,
    "gui_form": GuiForm,
}
