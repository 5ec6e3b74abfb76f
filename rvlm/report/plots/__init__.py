"""The figures, all in one style.

Every function takes plain arrays and returns a matplotlib ``Figure`` that is already as wide as a paper's column
(`COLUMN_IN`) or page (`PAGE_IN`). A title is a sentence, axes carry units, colour never speaks alone, and the same action
dimension or policy structure has the same colour everywhere (`dimension_color`, `structure_color`).

Modules:
    style: sizes, fonts and colours of all figures.
    charts: estimates and curves with intervals.
    rates: success rates, and titles that name a winner only where the intervals do.
    losses: loss curves.
    motion: actions over time, distributions, the path of the hand.
    images: film strips, galleries, overlays, players.
    tokens: token sequences by role, and attention masks.
    diagnosis: results of diagnostic checks, their evidence, failures by kind.
    memory: memory of training against GPUs, planned against measured.
    learning_and_search: continual learning and hyperparameter search.
"""

from rvlm.report.plots.charts import error_by_bins, estimates, lines
from rvlm.report.plots.diagnosis import diagnosis, evidence, failures
from rvlm.report.plots.images import (
    Frames,
    attention_overlay,
    explore,
    filmstrip,
    gallery,
    grounding_overlay,
    mp4,
    observation,
    player,
)
from rvlm.report.plots.learning_and_search import forgetting_matrices, parallel_coordinates
from rvlm.report.plots.losses import compare_losses, loss_curves, smoothed
from rvlm.report.plots.memory import memory_bars, planned_and_measured
from rvlm.report.plots.motion import action_curves, hand_path, histograms
from rvlm.report.plots.rates import error_against_success, rates_by_group, success_bars, verdict_title
from rvlm.report.plots.style import (
    COLUMN_IN,
    DIMENSIONS,
    FAILURE,
    NEUTRAL,
    PAGE_IN,
    PALETTE,
    STRUCTURE_NAMES,
    SUCCESS,
    dimension_color,
    structure_color,
    style,
    unit_in_brackets,
)
from rvlm.report.plots.tokens import TOKEN_COLORS, attention_masks, token_map

__all__ = [
    "COLUMN_IN",
    "DIMENSIONS",
    "FAILURE",
    "NEUTRAL",
    "PAGE_IN",
    "PALETTE",
    "STRUCTURE_NAMES",
    "SUCCESS",
    "TOKEN_COLORS",
    "Frames",
    "action_curves",
    "attention_masks",
    "attention_overlay",
    "compare_losses",
    "diagnosis",
    "dimension_color",
    "error_against_success",
    "error_by_bins",
    "estimates",
    "evidence",
    "explore",
    "failures",
    "filmstrip",
    "forgetting_matrices",
    "gallery",
    "grounding_overlay",
    "hand_path",
    "histograms",
    "lines",
    "loss_curves",
    "memory_bars",
    "mp4",
    "observation",
    "parallel_coordinates",
    "planned_and_measured",
    "player",
    "rates_by_group",
    "smoothed",
    "structure_color",
    "style",
    "success_bars",
    "token_map",
    "unit_in_brackets",
    "verdict_title",
]
