"""The task categories, one class each; `gym.py` makes, drives and scores them."""
from .agent import (GuiCritic, GuiMultiApp, GuiNavigate, GuiNextAction, UiGround,
                    WidgetState)
from .base import Env, Message, Obs, OneShot, Step, Task
from .charts import ChartArith, ChartRead
from .documents import DocQa, InterleavedQa, OcrDocument, TableRead
from .geometry import Geometry
from .grounding import (GroundBox, GroundMulti, SceneToJson, SpatialRelation, SpotDiff,
                        VideoEvents)
from .programs import CodeOutput, TextCode
from .puzzles import GridLogic, MapRoute, MatrixPuzzle
from .scenes import Counting, Point, ShapeAttr
from .screens import GuiClick, GuiForm
from .text import OcrLine
from .tools import ImageMining, TextTools, VisualTools
from .webdev import UiPolish, UiToCode
from .world import WorldKnowledge

CATEGORIES = {
    "shape_attr": ShapeAttr,
    "counting": Counting,
    "ocr_line": OcrLine,
    "ocr_document": OcrDocument,
    "table_read": TableRead,
    "chart_read": ChartRead,
    "ground_box": GroundBox,
    "ground_multi": GroundMulti,
    "point": Point,
    "ui_ground": UiGround,
    "widget_state": WidgetState,
    "spot_diff": SpotDiff,
    "video_events": VideoEvents,
    "scene_to_json": SceneToJson,
    "geometry": Geometry,
    "chart_arith": ChartArith,
    "doc_qa": DocQa,
    "interleaved_qa": InterleavedQa,
    "spatial_relation": SpatialRelation,
    "map_route": MapRoute,
    "matrix_puzzle": MatrixPuzzle,
    "grid_logic": GridLogic,
    "code_output": CodeOutput,
    "world_knowledge": WorldKnowledge,
    "text_code": TextCode,
    "gui_click": GuiClick,
    "gui_next_action": GuiNextAction,
    "gui_form": GuiForm,
    "gui_navigate": GuiNavigate,
    "gui_multi_app": GuiMultiApp,
    "gui_critic": GuiCritic,
    "ui_to_code": UiToCode,
    "ui_polish": UiPolish,
    "visual_tools": VisualTools,
    "text_tools": TextTools,
    "image_mining": ImageMining,
}
