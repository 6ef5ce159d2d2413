"""Shared by the tables of wrong calls."""

import pytest

NAN, INF = float("nan"), float("inf")


def wrong(name, call, words, error=ValueError):
    """A row: a wrong call, words of its refusal and the exception's type."""
    return pytest.param(call, words, error, id=name)


def snapshot(folder):
    """A dictionary from paths below a folder to bytes; `None` for folders."""
    return {
        str(path.relative_to(folder)): path.read_bytes()
        if path.is_file()
        else None
        for path in folder.rglob("*")
    }
