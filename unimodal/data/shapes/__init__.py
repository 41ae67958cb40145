"""An endless world of rendered scenes that is known exactly: scenes, captions, questions, edits, prompts."""

from unimodal.data.shapes.captions import captioned, random_scene
from unimodal.data.shapes.edits import Edit, built, edited
from unimodal.data.shapes.prompts import PROMPT_TASKS, prompts, render_prompt
from unimodal.data.shapes.questions import Question, asked
from unimodal.data.shapes.recognise import recognise
from unimodal.data.shapes.render import BACKGROUND, COLOURS, SHAPES, coverage, render, visible
from unimodal.data.shapes.source import SHAPES_KINDS, ShapesKind, ShapesSource
from unimodal.data.shapes.world import HELD_OUT, RELATIONS, Scene, Split, Thing, arrange, held_out, relations, valid

__all__ = [
    "BACKGROUND", "COLOURS", "HELD_OUT", "PROMPT_TASKS", "RELATIONS", "SHAPES", "SHAPES_KINDS", "Edit", "Question",
    "Scene", "ShapesKind", "ShapesSource", "Split", "Thing", "arrange", "asked", "built", "captioned", "coverage",
    "edited", "held_out", "prompts", "random_scene", "recognise", "relations", "render", "render_prompt", "valid", "visible",
]  # fmt: skip
