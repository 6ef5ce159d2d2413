"""Breaks the code in one place at a time, and counts what the tests notice.

    pip install -c constraints.txt -e ".[benchmarks]"
    python -m benchmarks.mutation_testing --package ops --count 150

A seeded sample of cosmic-ray's mutants of a package is tried in a clone of the
last commit, each against the tests of its module, on one backend after the
other until a test fails. Rows go to `benchmarks/results/mutation_testing.csv`;
mutants that have one are passed over.
"""

import argparse
import ast
import os
import pathlib
import random
import shlex
import sys

import tqdm
from cosmic_ray.ast import ast_nodes
from cosmic_ray.ast import get_ast_from_path
from cosmic_ray.mutating import mutate_and_test
from cosmic_ray.plugins import get_operator
from cosmic_ray.work_item import MutationSpec

from benchmarks import rows

PATH = rows.RESULTS / "mutation_testing.csv"
CLONE = pathlib.Path("runs/mutation_testing").absolute()
SEED = 0
TIMEOUT = 900  # Seconds; a mutant that takes longer counts as killed.
KEY = ("module", "operator", "occurrence", "commit")
# One way to break each thing: the further replacements of the same operator
# nearly always raise, and would only make the share of the killed larger.
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
# Backends and tests by the start of a module's path, the first that fits.
DIVERGENCE = "tests/ops/attention_divergence_test.py"
OUTPUT = "tests/ops/attention_output_test.py"
LOGITS = "tests/ops/logits_divergence_test.py"
BAD_INPUT = "tests/bad_input/ops_test.py tests/numerics_test.py"
ALL = "torch jax tensorflow"
TESTS = {
    "ops/attention_divergence/triton": ("torch", DIVERGENCE),
    "ops/attention_divergence/pallas": ("jax", DIVERGENCE),
    "ops/attention_divergence": (ALL, f"{DIVERGENCE} {BAD_INPUT}"),
    "ops/attention_output": (ALL, f"{OUTPUT} {BAD_INPUT}"),
    "ops/attention": (ALL, f"{OUTPUT} {DIVERGENCE} {BAD_INPUT}"),
    "ops/row_blocks": (ALL, f"{OUTPUT} {DIVERGENCE}"),
    "ops/logits_divergence": (ALL, f"{LOGITS} {BAD_INPUT}"),
    "ops/top_logits": (
        ALL,
        f"{LOGITS} {BAD_INPUT} tests/distillation/stored_teacher_test.py",
    ),
    "ops/unembedding": (
        ALL,
        f"{LOGITS} {BAD_INPUT} tests/backbones/unembedding_test.py",
    ),
    "ops": (ALL, f"tests/ops {BAD_INPUT}"),
    "layers": (
        ALL,
        "tests/layers tests/bad_input/layers_test.py tests/saving "
        "tests/numerics_test.py tests/backbones/gain_modulation_test.py",
    ),
    "haystacks": (
        "tensorflow",
        "tests/haystacks tests/bad_input/haystacks_test.py "
        "tests/bad_input/files_test.py",
    ),
}


def mutants(path):
    """Every mutant of a module, but of annotations, which nothing runs."""
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


def test_command(module):
    backends, tests = next(
        value for start, value in TESTS.items() if module.startswith(start)
    )
    python = shlex.quote(sys.executable)
    runs = [
        f"KERAS_BACKEND={backend} {python} -m pytest -qx {tests}"
        for backend in backends.split()
    ]
    return shlex.join(["sh", "-c", " && ".join(runs)])


def main():
    parser = argparse.ArgumentParser(
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument(
        "--package", required=True, choices=("ops", "layers", "haystacks")
    )
    parser.add_argument("--count", type=int, required=True)
    args = parser.parse_args()
    commit = rows.commit()
    root = pathlib.Path.cwd()
    if not CLONE.exists():
        rows.git("clone", "--quiet", "--shared", ".", str(CLONE))
    os.chdir(CLONE)
    rows.git("fetch", "--quiet")
    rows.git("checkout", "--quiet", "--force", commit.removesuffix("-dirty"))
    os.environ["PYTHONPATH"] = str(CLONE)

    package = pathlib.Path("keras_laid")
    found = [
        mutant
        for path in sorted((package / args.package).rglob("*.py"))
        for mutant in mutants(path)
    ]
    sample = random.Random(SEED).sample(found, min(args.count, len(found)))
    for mutant in tqdm.tqdm(sample):
        module = str(mutant.module_path.relative_to(package).with_suffix(""))
        row = dict(
            package=args.package,
            mutants=len(found),
            module=module,
            line=mutant.start_pos[0],
            operator=mutant.operator_name.removeprefix("core/"),
            occurrence=mutant.occurrence,
            commit=commit,
        )
        path = root / PATH
        if rows.is_done(path, row, KEY):
            continue
        result = mutate_and_test([mutant], test_command(module), TIMEOUT)
        row["outcome"] = result.test_outcome.value
        row["change"] = changed_lines(result.diff)
        rows.append_row(path, row)


def changed_lines(diff):
    """The lines before and after, of a unified diff."""
    lines = [
        line
        for line in (diff or "").splitlines()
        if line[:1] in ("-", "+") and line[:3] not in ("---", "+++")
    ]
    return " ".join(" ".join(line.split()) for line in lines)


if __name__ == "__main__":
    main()
