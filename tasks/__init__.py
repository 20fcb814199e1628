"""The 36 task categories, each registered once, in the table CATEGORIES.

An entry names the class of the environment, the verifiers that score its evidence, and how their
scores are combined. Environments never import this table, and verifiers never import an
environment, so either side can be changed without the other. tasks/README.md shows how to add a
category of your own.
"""
from dataclasses import dataclass

from . import (agent, atlas, charts, documents, geometry, grounding, interpreter, programs, puzzles,
               scenes, screens, text, tools, verify, webdev)
from .base import Env, Message, Obs, OneShot, Step, Task

__all__ = ["CATEGORIES", "Category", "Env", "Message", "Obs", "OneShot", "Step", "Task"]


@dataclass(frozen=True)
class Category:
    """One entry of the table.

    env: the class of the environments. verifiers: {name of the part: verifier or (verifier,
    weight)}; a verifier is a function from evidence to a score in [0, 1], or a question for the
    model judge, which is skipped where there is no judge. combine: "mean" (weighted), "product",
    or "gate" (the weighted mean of the other parts, and 0 unless the first part is 1).
    """
    env: type[Env]
    verifiers: dict
    combine: str = "mean"

    def parts(self) -> dict[str, tuple]:
        """{name of the part: (verifier or question, weight)}, with the default weight of 1."""
        return {name: part if isinstance(part, tuple) else (part, 1)
                for name, part in self.verifiers.items()}


CATEGORIES = {
    "shape_attr": Category(scenes.ShapeAttr, {"answer": verify.exact}),
    "counting": Category(scenes.Counting, {"answer": verify.number}),
    "ocr_line": Category(text.OcrLine, {"text": verify.edit}),
    "ocr_document": Category(documents.OcrDocument, {"text": verify.edit, "order": verify.reading}),
    "table_read": Category(documents.TableRead, {"answer": verify.exact}),
    "chart_read": Category(charts.ChartRead, {"number": verify.value}),
    "ground_box": Category(grounding.GroundBox, {"overlap": verify.hit_box}),
    "ground_multi": Category(grounding.GroundMulti, {"boxes": verify.match_boxes}),
    "point": Category(scenes.Point, {"hit": verify.hit_point}),
    "ui_ground": Category(agent.UiGround, {"box": verify.hit_box}),
    "widget_state": Category(agent.WidgetState, {"answer": verify.exact}),
    "spot_diff": Category(grounding.SpotDiff, {"boxes": verify.match_boxes}),
    "video_events": Category(grounding.VideoEvents, {"answer": verify.moment}),
    "scene_to_json": Category(grounding.SceneToJson, {
        "things": (verify.match_things, 9),
        "fluency": ("Is it tidy and fluent, said once and in plain words, without anything left "
                    "over?", 1)}),
    "geometry": Category(geometry.Geometry, {"number": verify.number}),
    "chart_arith": Category(charts.ChartArith, {"answer": verify.value}),
    "doc_qa": Category(documents.DocQa, {"cited": verify.cited}),
    "interleaved_qa": Category(documents.InterleavedQa, {"answer": verify.exact}),
    "spatial_relation": Category(grounding.SpatialRelation, {"answer": verify.exact}),
    "map_route": Category(puzzles.MapRoute, {"route": verify.route}),
    "matrix_puzzle": Category(puzzles.MatrixPuzzle, {"choice": verify.exact}),
    "grid_logic": Category(puzzles.GridLogic, {"grid": verify.grid}),
    "code_output": Category(programs.CodeOutput, {"answer": verify.exact}),
    "world_knowledge": Category(atlas.WorldKnowledge, {"answer": verify.exact}),
    "text_code": Category(programs.TextCode, {"cases": interpreter.solves}),
    "gui_click": Category(screens.GuiClick, {
        "verb": verify.verb, "hit": verify.hit_click}, combine="product"),
    "gui_next_action": Category(agent.GuiNextAction, {
        "verb": verify.key_verb, "place": verify.key_place, "text": verify.key_text},
        combine="product"),
    "gui_form": Category(screens.GuiForm, {"state": verify.state}),
    "gui_navigate": Category(agent.GuiNavigate, {"state": verify.state}),
    "gui_multi_app": Category(agent.GuiMultiApp, {"state": verify.state}),
    "gui_critic": Category(agent.GuiCritic, {"answer": verify.exact}),
    "ui_to_code": Category(webdev.UiToCode, {
        "look": (webdev.appearance, 4), "works": webdev.workings}),
    "ui_polish": Category(webdev.UiPolish, {
        "closer": webdev.closer, "kept": webdev.kept}, combine="product"),
    "visual_tools": Category(tools.VisualTools, {"answer": verify.answered}),
    "text_tools": Category(tools.TextTools, {"answer": verify.answered}),
    "image_mining": Category(tools.ImageMining, {
        "seen": verify.saw_everything, "answer": verify.answered}, combine="gate"),
}
