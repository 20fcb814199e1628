"""The task categories, one class each; `gym.py` makes, drives and scores them."""
from .base import Env, Message, Obs, OneShot, Step, Task
from .charts import ChartArith, ChartRead
from .scenes import Counting, Point, ShapeAttr
from .screens import GuiClick, GuiForm
from .text import OcrLine
from .world import WorldKnowledge

CATEGORIES = {
    "shape_attr": ShapeAttr,
    "counting": Counting,
    "ocr_line": OcrLine,
    "chart_read": ChartRead,
    "point": Point,
    "chart_arith": ChartArith,
    "world_knowledge": WorldKnowledge,
    "gui_click": GuiClick,
    "gui_form": GuiForm,
}
