"""The laboratory: what the notebooks draw and measure, recipes, and the papers' rules.

The method itself is in opd.py.  `import lab` gives the names below; on the command line:

    python notebooks/lab check CONFIG.json --teacher NAME    # will this teacher teach this student?
    python notebooks/lab report runs/NAME                    # report.md, report.json, report.png
    python notebooks/lab compare SPEC.json --seeds 5         # methods side by side, over seeds
    python notebooks/lab train --method RULE --steps 40      # by a paper's rule
    python notebooks/lab tables                              # tiny_configs/evidence/README.md
    python notebooks/lab figures                             # notebooks/figures
"""

# ruff: noqa: E402, F401
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
if str(ROOT) not in sys.path:
    sys.path.insert(0, str(ROOT))  # for `import opd`

from . import fig02
from .course import CAST, cast
from .diagrams import (
    FIGURES,
    animate,
    arrow,
    board,
    box,
    strip,
)
from .experiments import (
    EDITION,
    TUNING_SEEDS,
    best_rates,
    build,
    compare,
    config_of,
    evidence,
    fields_of,
    gigaflop,
    grid_of,
    in_processes,
    load_spec,
    results_file,
    run_one,
    summary_of,
)
from .geometry import (
    auroc,
    coherence,
    entropy_of,
    foresight,
    gradient_moments,
    gradient_noise,
    kl_by_position,
    matrices,
    norm_scaled,
    spectrum,
    subspace_alignment,
    top_share,
    update_geometry,
    weights_of,
)
from .plots import (
    BLUE,
    GREEN,
    GREY,
    ORANGE,
    PINK,
    RED,
    SKY,
    cost_to,
    draw_report,
    interval,
    markdown_table,
    plot_comparison,
    plot_metrics,
    read_rows,
    rows_of,
    show_tokens,
    style,
    words,
)
from .recipes import (
    aligned_prompts,
    cold_start,
    continuation_advantage,
    continue_rollout,
    heads,
    memory_estimate,
    prompt_pool,
    teacher_prefix,
    with_recipe,
)
from .reports import (
    CHECKLIST,
    UNKNOWN,
    Verdict,
    check,
    checklist,
    diagnosed,
    provenance,
    report,
    same_model,
    self_check,
)
from .rules import (
    RULES,
    divergence_advantage,
    entropy_gate,
    position_weights,
    prune_weights,
    tilted_teacher,
    train,
)
from .trees import Tree, positions_of, through_eos

FIGURES |= fig02.FIGURES
