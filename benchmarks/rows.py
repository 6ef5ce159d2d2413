"""Rows of results, which several processes may add to, and where they ran."""

import csv
import fcntl
import os
import pathlib
import platform
import subprocess

import keras
import keras_hub

import keras_laid

BACKENDS = {"jax": "JAX", "tensorflow": "TensorFlow", "torch": "PyTorch"}
COMMITTED = pathlib.Path(__file__).parent / "results"
RESULTS = pathlib.Path(os.environ.get("RESULTS", COMMITTED))


def read_rows(path):
    if not path.exists():
        return []
    with path.open() as file:
        return list(csv.DictReader(file))


def read(name, **wanted):
    """Rows of a benchmark whose columns have the values wanted, as text."""
    return [
        row
        for row in read_rows(RESULTS / f"{name}.csv")
        if all(row[key] == str(value) for key, value in wanted.items())
    ]


def only(name, **wanted):
    """The one row there is."""
    found = read(name, **wanted)
    if len(found) != 1:
        raise ValueError(
            f"`{name}.csv` must have one row of {wanted}. "
            f"Received: {len(found)} rows."
        )
    return found[0]


def ratio(column, row, other):
    return float(row[column]) / float(other[column])


def append_row(path, row):
    """Adds a row; processes that share the work take turns."""
    path.parent.mkdir(parents=True, exist_ok=True)
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


def commit():
    """The commit that runs, marked where code is changed, results apart."""
    name = git("rev-parse", "--short=10", "HEAD")
    changed = git("status", "--porcelain", "--", ".", f":(exclude){COMMITTED}")
    return f"{name}-dirty" if changed else name


def git(*arguments):
    return subprocess.run(
        ["git", *arguments], check=True, capture_output=True, text=True
    ).stdout.strip()


def versions():
    """What ran and where, as columns of a row."""
    return dict(
        keras_laid=keras_laid.__version__,
        keras=keras.__version__,
        keras_hub=keras_hub.__version__,
        backend=keras.backend.backend(),
        machine=machine(),
    )


def machine():
    lines = pathlib.Path("/proc/cpuinfo").read_text().splitlines()
    names = [
        line.split(":")[1].strip() for line in lines if "model name" in line
    ]
    return f"{len(names)} x {names[0]}, {platform.system()}"
