"""Breaks the code in one place at a time, and counts what the tests notice.

    pip install -c constraints.txt -e ".[benchmarks]"
    export KERAS_BACKEND=torch
    python -m benchmarks.mutation_testing --package ops --count 150

Draws a seeded sample of cosmic-ray's mutants of a package, and tries each in a
clone of the last commit, against the tests of its module. Appends rows to
`benchmarks/results/mutation_testing.csv`. Mutants that already have a row on
this backend, or that were killed on another, are skipped. With `--again` no
sample is drawn: the mutants of the seed that survived are tried again, once for
each commit, except for those that have a reason in `mutants.py`.
"""

import argparse
import ast
import contextlib
import functools
import multiprocessing
import os
import pathlib
import random
import signal
import sys

import keras
import tqdm
from cosmic_ray.ast import ast_nodes
from cosmic_ray.ast import get_ast_from_path
from cosmic_ray.mutating import mutate_code
from cosmic_ray.mutating import use_mutation
from cosmic_ray.plugins import get_operator
from cosmic_ray.work_item import MutationSpec

from benchmarks import mutants
from benchmarks import rows

PACKAGE = pathlib.Path("keras_laid")  # In the clone.
CLONE = pathlib.Path("runs/mutation_testing").absolute()
TIMEOUT = 900  # Seconds; a mutant that takes longer counts as killed.
# Modules that every test needs, imported once: each try runs in a fork.
PRELOADED = [
    "hypothesis",
    "keras_hub",
    "matplotlib.pyplot",
    "pytest",
    "sklearn",
]
# One replacement for each operator: further ones nearly always raise, and would
# only increase the share of killed mutants.
OPERATORS = [
    "AddNot",
    "ExceptionReplacer",
    "NumberReplacer",
    "RemoveDecorator",
    "ReplaceAndWithOr",
    "ReplaceBinaryOperator_Add_Sub",
    "ReplaceBinaryOperator_BitAnd_BitOr",
    "ReplaceBinaryOperator_BitOr_BitAnd",
    "ReplaceBinaryOperator_Div_Mul",
    "ReplaceBinaryOperator_FloorDiv_Mul",
    "ReplaceBinaryOperator_Mod_Mul",
    "ReplaceBinaryOperator_Mul_Div",
    "ReplaceBinaryOperator_Pow_Mul",
    "ReplaceBinaryOperator_Sub_Add",
    "ReplaceBreakWithContinue",
    "ReplaceComparisonOperator_Eq_NotEq",
    "ReplaceComparisonOperator_GtE_Gt",
    "ReplaceComparisonOperator_Gt_GtE",
    "ReplaceComparisonOperator_IsNot_Is",
    "ReplaceComparisonOperator_Is_IsNot",
    "ReplaceComparisonOperator_LtE_Lt",
    "ReplaceComparisonOperator_Lt_LtE",
    "ReplaceComparisonOperator_NotEq_Eq",
    "ReplaceContinueWithBreak",
    "ReplaceFalseWithTrue",
    "ReplaceOrWithAnd",
    "ReplaceTrueWithFalse",
    "ReplaceUnaryOperator_Delete_Not",
    "ReplaceUnaryOperator_Delete_USub",
    "ZeroIterationForLoop",
]
# Tests by the start of a module's path, the first that fits.
TILES = "tests/ops/tiles_test.py"
DIVERGENCE = "tests/ops/attention_divergence_test.py"
# The tests that notice most. They run before those that take minutes.
VALUES = [
    f"{DIVERGENCE}::test_each_tile_of_rows_has_a_program",
    f"{DIVERGENCE}::test_weak_weights_are_the_oracles",
    f"{DIVERGENCE}::test_tiles_of_any_form_are_the_oracles",
    f"{DIVERGENCE}::test_value_and_gradients_are_the_oracles",
]
OUTPUT = "tests/ops/attention_output_test.py"
# A compiler refuses code that an interpreter runs. Last, since it is slowest.
COMPILED = "tests/ops/compiled_test.py -m extra_large"
LOGITS = "tests/ops/logits_divergence_test.py"
SIGNATURES = "tests/signatures_test.py"
OF_OPS = [
    "tests/ops/chunked_test.py",
    SIGNATURES,
    "tests/bad_input/ops_test.py",
    "tests/numerics_test.py",
]
TESTS = {
    "ops/fused_attention/triton": [TILES, *VALUES, DIVERGENCE, COMPILED],
    "ops/fused_attention/pallas": [*VALUES, DIVERGENCE],
    "ops/fused_attention/tiles": [TILES, DIVERGENCE],
    "ops/fused_attention": [DIVERGENCE, OUTPUT],
    "ops/attention_divergence/triton": [
        TILES,
        *VALUES,
        DIVERGENCE,
        COMPILED,
    ],
    "ops/attention_divergence/pallas": [*VALUES, DIVERGENCE],
    "ops/attention_divergence": [DIVERGENCE, *OF_OPS],
    "ops/attention_output/triton": [OUTPUT, COMPILED],
    "ops/attention_output": [OUTPUT, *OF_OPS],
    "ops/segment_attention": ["tests/ops/segment_attention_test.py", *OF_OPS],
    "ops/retrieval_divergence": [
        "tests/ops/retrieval_divergence_test.py",
        *OF_OPS,
    ],
    "ops/attention": [OUTPUT, DIVERGENCE, *OF_OPS],
    "ops/row_blocks": ["tests/ops/row_blocks_test.py", OUTPUT, DIVERGENCE],
    "ops/logits_divergence": [LOGITS, *OF_OPS],
    "ops/top_logits": [
        LOGITS,
        *OF_OPS,
        "tests/distillation/stored_teacher_test.py",
    ],
    "ops/unembedding": [
        LOGITS,
        *OF_OPS,
        "tests/backbones/unembedding_test.py",
    ],
    "ops": ["tests/ops", *OF_OPS],
    "layers": [
        SIGNATURES,
        "tests/layers",
        "tests/bad_input/layers_test.py",
        "tests/backbones/gain_modulation_test.py",
        "tests/numerics_test.py",
        "tests/saving",
    ],
    "haystacks/__init__": ["tests/haystacks/builder_test.py"],
    "haystacks/plots": ["tests/haystacks/evaluation_test.py"],
    "haystacks": [
        SIGNATURES,
        "tests/haystacks",
        "tests/bad_input/haystacks_test.py",
        "tests/bad_input/files_test.py",
    ],
}


def mutants_of(path):
    """Every mutant of a module, except of annotations, which never run."""
    tree = get_ast_from_path(path)
    annotated = positions_of_annotations(path.read_text())
    for name in OPERATORS:
        name = f"core/{name}"
        operator = get_operator(name)()
        positions = (
            position
            for node in ast_nodes(tree)
            for position in operator.mutation_positions(node)
        )
        for occurrence, (start, end) in enumerate(positions):
            if not any(first <= start < last for first, last in annotated):
                yield MutationSpec(path, name, occurrence, start, end)


def positions_of_annotations(source):
    annotations = []
    for node in ast.walk(ast.parse(source)):
        annotations.append(getattr(node, "annotation", None))
        annotations.append(getattr(node, "returns", None))
    return [
        ((each.lineno, each.col_offset), (each.end_lineno, each.end_col_offset))
        for each in annotations
        if each is not None
    ]


def run_tests(tests):
    """Runs tests, then ends this process with the exit code of pytest."""
    os.setsid()
    sys.path.insert(0, str(CLONE))
    sys.dont_write_bytecode = True
    import pytest

    with open(os.devnull, "w") as quiet, contextlib.redirect_stdout(quiet):
        code = pytest.main(["-qx", "-p", "no:cacheprovider", *tests.split()])
    os._exit(code)


def tests_of(module):
    """Tests of a module, its own first: they most likely notice a mutant."""
    own = [f"tests/{module}_test.py"]
    others = next(p for start, p in TESTS.items() if module.startswith(start))
    return [*filter(os.path.exists, own), *others]


def passes(tests):
    context = multiprocessing.get_context("forkserver")
    process = context.Process(target=run_tests, args=(tests,))
    process.start()
    process.join(TIMEOUT)
    if process.is_alive():
        os.killpg(process.pid, signal.SIGKILL)
        process.join()
    return process.exitcode == 0


@functools.cache
def check_unbroken(tests):
    if not passes(tests):
        raise ValueError(
            f"Unbroken code must pass its tests. Received: {tests}"
        )


def is_noticed(mutant, suites):
    for tests in suites:
        check_unbroken(tests)
        with use_mutation(
            mutant.module_path, operator_of(mutant), mutant.occurrence
        ):
            if not passes(tests):
                return True
    return False


def operator_of(mutant):
    return get_operator(mutant.operator_name)()


def line_of(mutant):
    """The line that a mutant changes, before the change."""
    lines = mutant.module_path.read_text().splitlines()
    return lines[mutant.start_pos[0] - 1].strip()


def row_of(mutant):
    """Columns that identify a mutant, and the line that it makes."""
    changed = mutate_code(
        mutant.module_path.read_text(), operator_of(mutant), mutant.occurrence
    )
    line = mutant.start_pos[0]
    module = mutant.module_path.relative_to(PACKAGE).with_suffix("")
    return dict(
        module=str(module),
        line=line,
        operator=mutant.operator_name.removeprefix("core/"),
        occurrence=mutant.occurrence,
        before=line_of(mutant),
        after=changed.splitlines()[line - 1].strip(),
    )


def draw(found, package, seed, count):
    """A sample, each mutant with its row."""
    sample = random.Random(seed).sample(found, min(count, len(found)))
    sizes = dict(package=package, seed=seed, mutants=len(found))
    return [(mutant, sizes | row_of(mutant)) for mutant in sample]


def survivors(found, package, seed):
    """Survivors of earlier rows, each with where it is in the code now."""
    for tried in mutants.read(package=package, seed=seed):
        if not (mutants.is_killed(tried) or mutants.reason(tried)):
            yield find(found, tried[0]), tried[0]


def find(found, row):
    """The nearest mutant that makes the same change to the same line."""
    same = [
        mutant
        for mutant in found
        if mutant.module_path == PACKAGE / f"{row['module']}.py"
        and mutant.operator_name == f"core/{row['operator']}"
        and line_of(mutant) == row["before"]
        and row_of(mutant)["after"] == row["after"]
    ]
    line = int(row["line"])
    return min(same, key=lambda mutant: abs(mutant.start_pos[0] - line))


def is_done(row, again):
    """Whether it was killed on any backend, or tried on this one.

    With `again`, tries on this backend count only if they are of this commit.
    """
    tried = (*mutants.IDENTITY, "backend", *(["commit"] if again else []))
    killed = dict(row, outcome="killed")
    return rows.is_done(mutants.PATH, row, tried) or rows.is_done(
        mutants.PATH, killed, (*mutants.IDENTITY, "outcome")
    )


def main():
    parser = argparse.ArgumentParser(
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument(
        "--package", required=True, choices=("ops", "layers", "haystacks")
    )
    which = parser.add_mutually_exclusive_group(required=True)
    which.add_argument("--count", type=int)
    which.add_argument("--again", action="store_true")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    commit = rows.commit().removesuffix("-dirty")  # Of the clone.
    if not CLONE.exists():
        rows.git("clone", "--quiet", "--shared", ".", str(CLONE))
    os.chdir(CLONE)
    rows.git("fetch", "--quiet")
    rows.git("checkout", "--quiet", "--force", commit)
    # Read when Triton is imported.
    os.environ.setdefault("TRITON_INTERPRET", "1")
    os.environ["PYTHONPATH"] = str(CLONE)  # Processes of tests read it.
    multiprocessing.set_forkserver_preload(PRELOADED)

    found = [
        mutant
        for module in sorted((PACKAGE / args.package).rglob("*.py"))
        for mutant in mutants_of(module)
    ]
    chosen = args.package, args.seed
    sample = (
        list(survivors(found, *chosen))
        if args.again
        else draw(found, *chosen, args.count)
    )
    where = dict(
        backend=keras.backend.backend(), commit=commit, machine=rows.machine()
    )
    for mutant, row in tqdm.tqdm(sample):
        row = row | where
        if is_done(row, args.again):
            continue
        noticed = is_noticed(mutant, tests_of(row["module"]))
        row["outcome"] = "killed" if noticed else "survived"
        rows.append_row(mutants.PATH, row)


if __name__ == "__main__":
    main()
