"""What the rows of mutation testing say of each mutant.

A mutant counts as long as its module has the line that it changes: what was
tried on code that is no more says nothing of the code as it is.
"""

import functools
import pathlib

from benchmarks import rows

PATH = rows.RESULTS.absolute() / "mutation_testing.csv"
PACKAGE = pathlib.Path(__file__).parents[1] / "keras_laid"
# What tells mutants apart, as they were drawn.
IDENTITY = ("seed", "module", "operator", "occurrence", "before")


def read(**wanted):
    """The rows of each mutant, oldest first, whose columns are as wanted."""
    found = {}
    for row in rows.read_rows(PATH):
        as_wanted = all(row[name] == str(wanted[name]) for name in wanted)
        if as_wanted and row["before"] in lines_of(row["module"]):
            identity = tuple(row[name] for name in IDENTITY)
            found.setdefault(identity, []).append(row)
    return list(found.values())


@functools.cache
def lines_of(module):
    text = (PACKAGE / f"{module}.py").read_text()
    return {line.strip() for line in text.splitlines()}


def is_killed(mutant):
    """One row that says so, on any backend, is enough."""
    return any(row["outcome"] == "killed" for row in mutant)


def first_tries(mutant):
    """Its first row on each backend, before tests were written against it."""
    return {row["backend"]: row for row in reversed(mutant)}.values()
