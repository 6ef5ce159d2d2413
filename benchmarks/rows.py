"""Rows of results, to which several processes may append."""

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
    """Rows of a benchmark whose columns equal the wanted values, as text."""
    return [
        row
        for row in read_rows(RESULTS / f"{name}.csv")
        if all(row[key] == str(value) for key, value in wanted.items())
    ]


def only(name, **wanted):
    """The only row whose columns equal the wanted values."""
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
    """Appends a row, under a lock: several processes may share the work."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a", newline="") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        writer = csv.DictWriter(file, list(row))
        if not file.tell():
            writer.writeheader()
        writer.writerow(row)


def is_done(path, row, names):
    """Whether the file has a row with the same values in columns `names`."""
    key = [str(row[name]) for name in names]
    return key in [[old[name] for name in names] for old in read_rows(path)]


def commit():
    """The current commit, marked if files other than results are changed."""
    name = git("rev-parse", "--short=10", "HEAD")
    changed = git("status", "--porcelain", "--", ".", f":(exclude){COMMITTED}")
    return f"{name}-dirty" if changed else name


def git(*arguments):
    return subprocess.run(
        ["git", *arguments], check=True, capture_output=True, text=True
    ).stdout.strip()


def versions():
    """Versions, backend and machine, as columns of a row."""
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
