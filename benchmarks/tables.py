"""Every table of the project's texts, by the name of its marks.

Each benchmark has a dictionary `TABLES` from names of tables to the functions
that make them from its rows.
"""

from benchmarks import attention_divergence
from benchmarks import guide_runs
from benchmarks import logits_divergence
from benchmarks import memory_plan
from benchmarks import mutants
from benchmarks import preset_scores
from benchmarks import text_windows
from benchmarks import training_step
from benchmarks.window_extension import tables as study

BENCHMARKS = (
    attention_divergence,
    guide_runs,
    logits_divergence,
    memory_plan,
    mutants,
    preset_scores,
    text_windows,
    training_step,
)


def make_tables():
    """A dictionary from names to tables in Markdown."""
    tables = study.make_tables()
    for benchmark in BENCHMARKS:
        tables |= {name: make() for name, make in benchmark.TABLES.items()}
    return tables
