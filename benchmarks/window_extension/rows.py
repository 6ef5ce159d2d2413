"""Rows of results, which several processes may add to."""

import csv
import fcntl
import pathlib

RUNS = pathlib.Path("runs/window_extension")


def read_rows(path):
    if not path.exists():
        return []
    with path.open() as file:
        return list(csv.DictReader(file))


def append_row(path, row):
    """Adds a row; processes that share the work take turns."""
    with path.open("a", newline="") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        writer = csv.DictWriter(file, list(row))
        if not file.tell():
            writer.writeheader()
        writer.writerow(row)


def is_done(path, row, names):
    """Whether there is a row with the same values of those names."""
    key = [str(row[name]) for name in names]
    return key in [[old[name] for name in names] for old in read_rows(path)]
