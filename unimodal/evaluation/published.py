"""Scores that papers and their authors print, each with where it stands. None of them was measured here.

The same model differs from table to table, and rewritten prompts score higher than the official ones: both are kept apart.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from unimodal.metrics.geneval import TASKS


@dataclass(frozen=True)
class Published:
    """One row of somebody's table.

    Attributes:
        model: its name there.
        scores: task -> share of right images, 0..1, as printed; "overall" is the printed mean.
        source: paper or page.
        rewritten: whether prompts were rewritten by a language model first.
        benchmark: whose scores they are.
    """

    model: str
    scores: Mapping[str, float] = field(default_factory=dict)
    source: str = ""
    rewritten: bool = False
    benchmark: str = "geneval"


def _row(model: str, tasks: str, overall: float, source: str, rewritten: bool = False) -> Published:
    """`tasks` is the printed line, in the order of `TASKS`; empty where only the mean is printed."""
    values = [float(value) for value in tasks.split("/")] if tasks else []
    scores = dict(zip(TASKS, values, strict=True)) if values else {}
    return Published(model, scores | {"overall": overall}, source, rewritten)


_GENEVAL = "GenEval's own README (djghosh13/geneval)"
_BAGEL = "BAGEL, table 5"
_RERUN = "TorchUMM, arXiv 2604.10784, rerun on the official prompts"

GENEVAL: Sequence[Published] = (
    _row("CLIP retrieval", "", 0.35, _GENEVAL),
    _row("minDALL-E", "", 0.23, _GENEVAL),
    _row("Stable Diffusion 1.5", ".97/.38/.35/.76/.04/.06", 0.43, _GENEVAL),
    _row("Stable Diffusion 2.1", ".98/.51/.44/.85/.07/.17", 0.50, _GENEVAL),
    _row("Stable Diffusion XL", ".98/.74/.39/.85/.15/.23", 0.55, _GENEVAL),
    _row("IF-XL", ".97/.74/.66/.81/.13/.35", 0.61, _GENEVAL),
    _row("Chameleon-34B", "", 0.39, _BAGEL),
    _row("Transfusion 7.3B", "", 0.63, "Transfusion"),
    _row("LlamaGen", ".71/.34/.21/.58/.07/.04", 0.32, "tables of Show-o2 and Janus"),
    _row("Emu3-Gen", ".98/.71/.34/.81/.17/.21", 0.54, "Emu3, BAGEL"),
    _row("Emu3-Gen", ".99/.81/.42/.80/.49/.45", 0.66, "Emu3, BAGEL", rewritten=True),
    _row("Show-o 1.3B, 256 px", ".95/.52/.49/.82/.11/.28", 0.53, "Show-o"),
    _row("Show-o 1.3B, 512 px", ".98/.80/.66/.84/.31/.50", 0.68, "Show-o, BAGEL"),
    _row("Show-o2 1.5B", ".99/.86/.55/.86/.46/.63", 0.73, "Show-o2, tables 5 and 6", rewritten=True),
    _row("Show-o2 7B", "1.00/.87/.58/.92/.52/.62", 0.76, "Show-o2, tables 5 and 6", rewritten=True),
    _row("Janus 1.3B", ".97/.68/.30/.84/.46/.42", 0.61, "Janus"),
    _row("JanusFlow 1.3B", ".97/.59/.45/.83/.53/.42", 0.63, "JanusFlow"),
    _row("Janus-Pro-1B", ".98/.82/.51/.89/.65/.56", 0.73, "Janus-Pro"),
    _row("Janus-Pro-7B", ".99/.89/.59/.90/.79/.66", 0.80, "Janus-Pro"),
    _row("MetaQuery-B", "", 0.74, "MetaQuery's README", rewritten=True),
    _row("MetaQuery-L", "", 0.78, "MetaQuery's README", rewritten=True),
    _row("MetaQuery-XL", "", 0.80, "MetaQuery's README", rewritten=True),
    _row("BLIP3-o 4B", "", 0.81, "BLIP3-o", rewritten=True),
    _row("BLIP3-o 8B", "", 0.84, "BLIP3-o", rewritten=True),
    _row("BAGEL 7B-MoT", ".99/.94/.81/.88/.64/.63", 0.82, _BAGEL),
    _row("BAGEL 7B-MoT", ".98/.95/.84/.95/.78/.77", 0.88, _BAGEL, rewritten=True),
    _row("OmniGen2", "1.00/.95/.64/.88/.55/.76", 0.80, "OmniGen2"),
    _row("OmniGen2", ".99/.96/.74/.98/.71/.75", 0.86, "OmniGen2", rewritten=True),
    _row("Mogao-7B", "1.00/.97/.83/.93/.84/.80", 0.89, "LightFusion's table", rewritten=True),
    _row("LightFusion", "1.00/.97/.93/.94/.79/.81", 0.91, "LightFusion, tables 1 to 5", rewritten=True),
    _row("UniWorld-V1", "", 0.80, "UniWorld"),
    _row("UniWorld-V1", "", 0.84, "UniWorld", rewritten=True),
    _row("Ovis-U1", "", 0.89, "Ovis-U1"),
    _row("X-Omni", "", 0.83, "X-Omni", rewritten=True),
    _row("Qwen-Image", "", 0.87, "Qwen-Image"),
    _row("Qwen-Image, after reinforcement learning", "", 0.91, "Qwen-Image"),
    _row("Stable Diffusion 3 medium", ".99/.94/.72/.89/.33/.60", 0.74, "BAGEL"),
    _row("Stable Diffusion 3, depth 24", ".98/.74/.63/.67/.34/.36", 0.62, "Stable Diffusion 3"),
    _row("Stable Diffusion 3.5 medium", ".98/.78/.50/.81/.24/.52", 0.63, "Flow-GRPO, table 1"),
    _row("Stable Diffusion 3.5 large", ".98/.89/.73/.83/.34/.47", 0.71, "Flow-GRPO, table 1"),
    _row("Stable Diffusion 3.5 medium, Flow-GRPO", "1.00/.99/.95/.92/.99/.86", 0.95, "Flow-GRPO, table 1"),
    _row("BAGEL 7B-MoT", "", 0.7881, _RERUN),
    _row("Janus-Pro-7B", "", 0.7892, _RERUN),
    _row("Show-o2", "", 0.5987, _RERUN),
    _row("OmniGen2", "", 0.7853, _RERUN),
    _row("BLIP3-o", "", 0.8136, _RERUN),
    _row("TokenFlow", "", 0.5221, _RERUN),
    _row("Janus", "", 0.4004, _RERUN),
    _row("JanusFlow", "", 0.4999, _RERUN),
)
"""GenEval, in the order of the sources."""
