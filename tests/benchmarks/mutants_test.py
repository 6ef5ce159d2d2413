"""Outcomes of mutants, as read from the rows of mutation testing."""

import pytest

from benchmarks import mutants
from benchmarks import rows

BEFORE = "def attention_divergence("  # A line that is in the module.


@pytest.fixture
def append(tmp_path, monkeypatch):
    monkeypatch.setattr(mutants, "PATH", tmp_path / "rows.csv")

    def append(outcome, backend="torch", occurrence=0, before=BEFORE, seed=0):
        row = dict(
            seed=seed,
            module="ops/attention_divergence/__init__",
            operator="AddNot",
            occurrence=occurrence,
            before=before,
            backend=backend,
            outcome=outcome,
        )
        rows.append_row(mutants.PATH, row)

    return append


def test_one_row_is_enough_to_be_killed(append):
    append("survived")
    append("survived", occurrence=1)
    append("killed", backend="jax")
    killed, alive = mutants.read()
    assert mutants.is_killed(killed)
    assert not mutants.is_killed(alive)


def test_lines_that_are_no_more_do_not_count(append):
    append("survived", before="def attention_of_old(")
    append("killed", seed=1)
    [mutant] = mutants.read(seed=1)
    assert mutants.read() == [mutant]
    assert mutants.read(seed=0) == []


def test_every_survivor_has_a_reason_and_every_reason_a_survivor():
    survivors = [m for m in mutants.read() if not mutants.is_killed(m)]
    assert all(map(mutants.reason, survivors))
    given = {mutants.reason(mutant) for mutant in survivors}
    assert given == {*mutants.REASONS.values()}
