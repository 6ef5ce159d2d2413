"""Results of mutation testing, from its rows.

A mutant counts only while its module still has the line that it changes: a try
on code that was removed says nothing about the present code.
"""

import functools
import pathlib

from benchmarks import rows
from benchmarks.markdown import markdown_table

PATH = rows.RESULTS.absolute() / "mutation_testing.csv"
PACKAGE = pathlib.Path(__file__).parents[1] / "keras_laid"
# Columns that identify a mutant.
IDENTITY = ("seed", "module", "operator", "occurrence", "before")


def read(**wanted):
    """The rows of each mutant with the wanted values, oldest first."""
    found = {}
    for row in rows.read_rows(PATH):
        as_wanted = all(row[name] == str(wanted[name]) for name in wanted)
        if as_wanted and row["before"] in lines_of(row["module"]):
            identity = tuple(row[name] for name in IDENTITY)
            found.setdefault(identity, []).append(row)
    return list(found.values())


# Modules whose code has moved since they were tried, and where it is now.
MOVED = {
    "ops/attention_divergence/tiles": ["ops/fused_attention/tiles"],
    "ops/attention_divergence/triton": [
        "ops/attention_divergence/triton",
        "ops/attention_divergence/triton_kernels",
        "ops/fused_attention/triton",
    ],
    "ops/attention_output/triton": [
        "ops/attention_output/triton",
        "ops/fused_attention/triton",
    ],
    "ops/attention_divergence/pallas": [
        "ops/attention_divergence/pallas",
        "ops/fused_attention/pallas",
    ],
    "ops/fused": ["ops/fused_attention/availability"],
    "haystacks/builder": ["haystacks/builder", "haystacks/builder_config"],
    "haystacks/evaluation": ["haystacks/asking", "haystacks/evaluation"],
    "haystacks/sampling": [
        "haystacks/drawing",
        "haystacks/haystack",
        "haystacks/sampling",
    ],
}


@functools.cache
def lines_of(module):
    """The lines of a module, or of the modules that its code moved to."""
    return {
        line.strip()
        for name in MOVED.get(module, [module])
        for line in (PACKAGE / f"{name}.py").read_text().splitlines()
    }


def is_killed(mutant):
    """Whether a test failed in any try, on any backend."""
    return any(row["outcome"] == "killed" for row in mutant)


def reason(mutant):
    """Why no test notices the mutant, or `None` if no reason is listed."""
    return REASONS.get((mutant[0]["module"], mutant[0]["after"]))


def mutation_testing():
    """How many of each sample's mutants the tests notice."""
    lines = []
    samples = {(row["package"], row["seed"]) for row, *_ in read()}
    for package, seed in sorted(samples):
        found = read(package=package, seed=seed)
        killed = sum(map(is_killed, found))
        total = found[-1][0]["mutants"]
        lines.append(
            [
                f"`{package}`",
                seed,
                f"{int(total):,}",
                len(found),
                killed,
                f"{killed / len(found):.0%}",
            ]
        )
    header = ["", "seed", "mutants", "tried", "killed", "share"]
    return markdown_table(header, lines)


def mutation_survivors():
    """The mutants that no test notices, and why."""
    lines = [
        f"- `{row['module']}`: `{row['before']}` becomes `{row['after']}`: "
        f"{reason([row, *others])}."
        for row, *others in read()
        if not is_killed([row, *others])
    ]
    return "\n".join(sorted(lines))


TABLES = {
    "mutation_testing": mutation_testing,
    "mutation_survivors": mutation_survivors,
}

# Why no test notices a mutant, by its module and its changed line.
REASONS = {
    (
        "ops/attention_divergence/triton",
        "LEAST = tl.constexpr(- 1e+30)",
    ): "1e30 + 1 is 1e30",
    (
        "ops/attention_divergence/triton",
        "unit = tl.where(unit > -1.0, power, 0.0)",
    ): "a strength of 0 becomes 1e-30, which weighs nothing",
    (
        "ops/attention_divergence/triton",
        "difference = tl.where(allowed, difference, -1.0)",
    ): "it is multiplied by an attention of 0",
    (
        "ops/attention_divergence/pallas",
        "if form.exponent != 0.0:",
    ): "a power of 1 changes nothing, and takes time",
    (
        "ops/attention_divergence/tiles",
        "(128, 0, Tiles(64, 64, 4, 4, in_registers=True)),",
    ): "how many loads run ahead, which was measured",
    (
        "ops/attention_divergence/tiles",
        "(128, -1, Tiles(64, 64, 4, 3, in_registers=True)),",
    ): "no count is less than 0",
    (
        "ops/attention_output/triton",
        "if part != -1 or form.window is not None:",
    ): "a range without a tile where there is no window",
    (
        "ops/attention_output/triton",
        "query, key, value, output, normalizer = ctx.saved_tensors",
    ): "torch calls it through the class",
    (
        "ops/attention_output/chunked",
        "share = ops.maximum(logits / attention.soft_cap, - 2.0)",
    ): "it is multiplied by an attention of 0",
    (
        "layers/head_mixer",
        "return ops.softmax(ops.convert_to_tensor(self.mixing_logits), axis=1)",
    ): "there are two axes",
    (
        "haystacks/plots",
        "axes.tick_params(length= -1)",
    ): "how a picture looks",
    (
        "haystacks/effective_window",
        "RESAMPLES = 2001",
    ): "how finely an interval is found",
    (
        "haystacks/builder",
        'return {"train": 1601, "validation": 160, "test": 800}',
    ): "how many questions there are where none are asked for",
    (
        "haystacks/answer_log",
        "if len(whole) <= len(content):",
    ): "a file is cut to the length that it has",
    (
        "haystacks/openmoji",
        'name = f"openmoji-{side}px-'
        '{hashlib.sha256(key).hexdigest()[: 15]}.npy"',
    ): "how long a file's name is",
    (
        "haystacks/builder",
        "file, image_format, quality= 96, compress_level=1",
    ): "how large a file is",
}
