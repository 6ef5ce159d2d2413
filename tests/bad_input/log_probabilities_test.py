"""Files of log probabilities that are refused, and the row that is named."""

import copy
import json

import keras
import pytest

from keras_laid import store_log_probabilities
from tests.bad_input.files_support import INF
from tests.bad_input.files_support import NAN
from tests.bad_input.files_support import wrong
from tests.distillation import server_support
from tests.support import Batches
from tests.support import make_haystacks
from tests.support import make_multi_image
from tests.support import make_preprocessor

TOP_K = 3
SIZE = 34  # Of the vocabulary.
ROW = "lines.jsonl, row 2, example 1: "


@pytest.fixture(scope="module")
def student():
    return make_multi_image(None, make_preprocessor())


@pytest.fixture(scope="module")
def data(student):
    return make_haystacks(student.preprocessor, 2, (1,), batch_size=2)


@pytest.fixture(scope="module")
def lines(student, data):
    """Two right lines of each shape."""
    tokenizer = student.preprocessor.tokenizer
    given = list(server_support.random_responses(data, SIZE))
    return {
        shape: [
            getattr(server_support, shape)(*each, TOP_K, tokenizer)
            for each in given
        ]
        for shape in ("generated", "scored", "chat", "chat_of_ids")
    }


def store(lines, haystacks, model, **kwargs):
    arguments = dict(path=lines, data=haystacks, student=model, top_k=TOP_K)
    arguments["folder"] = lines.parent / "store"
    return store_log_probabilities(**arguments | kwargs)


def put(*keys):
    """A change: the last of `keys` is put where the others lead."""

    def change(line):
        *path, last, value = keys
        for key in path:
            line = line[key]
        line[last] = value(line[last]) if callable(value) else value

    return change


def first(**entry):
    """A change of the entry of a token's own."""

    def change(entries):
        key, *others = entries
        changed = {key: {**entries[key], **entry}}
        return changed | {other: entries[other] for other in others}

    return change


def renamed(name):
    """A change of the id of the last of a token's entries."""
    return lambda entries: dict(
        [*list(entries.items())[:-1], (name, [*entries.values()][-1])]
    )


def without_own(entries):
    return dict([*entries.items()][1:])


CONTENT = ("choices", 0, "logprobs", "content")
TOP = (*CONTENT, 0, "top_logprobs")
UNKNOWN = {"token": "\ufffd", "bytes": [239, 191, 189]}
BATCH = {"custom_id": "1", "response": {"body": {}}, "error": None}

CHANGED = [
    *[
        wrong(
            f"a log probability of {value!r}",
            ("generated", put("logprobs", 0, first(logprob=value))),
            rf"`logprob` must be (in \[-inf, 0\]|a number).*logprob={value!r}",
        )
        for value in (0.5, NAN, INF, "-1", None, True)
    ],
    *[
        wrong(
            f"a log probability of {value!r} in a chat",
            ("chat", put(*TOP, 1, "logprob", value)),
            rf"`logprob` must be in \[-inf, 0\].*logprob={value!r}",
        )
        for value in (1e-6, NAN)
    ],
    wrong(
        "logits",
        ("generated", put("logprobs", 1, first(logprob=-0.01))),
        "must sum to 1 at most. Received: 1.* at place 1. .*not for logits",
    ),
    wrong(
        "a token less",
        ("generated", put("logprobs", lambda values: values[:-1])),
        "log probabilities for each of `token_ids`. Received: 2 tokens",
    ),
    wrong(
        "a token less in all",
        (
            "generated",
            lambda line: [line[k].pop() for k in ("logprobs", "token_ids")],
        ),
        "with the end token if it is marked. Received: 1 tokens, where 2",
    ),
    wrong(
        "a token less of a chat",
        ("chat", put(*CONTENT, lambda content: content[:1])),
        "must have the tokens that `sample_weight` marks.*1 tokens, where 2",
    ),
    wrong(
        "a prompt shorter than the response",
        (
            "scored",
            lambda line: line["choices"][0].update(
                prompt_token_ids=[2, 1], prompt_logprobs=[None, {"1": MINUS_1}]
            ),
        ),
        "must have the tokens that `sample_weight` marks.*1 tokens, where 2",
    ),
    *[
        wrong(
            f"no {name} of {shape}",
            (shape, put(*path, name, None)),
            f"`{name}` must be a list of integers. .*=None. .*return_token_ids",
        )
        for shape, path, name in (
            ("generated", (), "token_ids"),
            ("scored", ("choices", 0), "prompt_token_ids"),
        )
    ],
    *[
        wrong(
            f"logprobs={value!r}",
            ("chat", put("choices", 0, "logprobs", value)),
            "`logprobs` must be a list, as vLLM writes it, or a dictionary",
        )
        for value in (None, {"content": None}, {"tokens": ["yes"]})
    ],
    wrong(
        "no prompt_logprobs",
        ("scored", put("choices", 0, "prompt_logprobs", None)),
        "log probabilities for each of `prompt_token_ids`.*None",
    ),
    wrong(
        "a token of None",
        ("generated", put("logprobs", 0, None)),
        r"`logprobs\[0\]` must be a dictionary from ids",
    ),
    wrong(
        "a plain number for each id",
        ("generated", put("logprobs", 0, {"5": -1.0})),
        "must be a dictionary with `logprob`. Received: an entry of type float",
    ),
    wrong(
        "no log probability of the token",
        ("generated", put("logprobs", 0, without_own)),
        r"must include its own. Received: those of \[.*\] for token \d",
    ),
    wrong(
        "another response",
        ("generated", put("token_ids", 1, 0), put("logprobs", 1, {"0": {}})),
        "must be",
    ),
    wrong(
        "another token",
        ("chat_of_ids", put(*CONTENT, 1, "token", "token_id:0")),
        "tokens that are the labels. Received: token 0 at place 1, where the "
        "label is 1. Lines must be in the order",
    ),
    wrong(
        "a string of another token",
        ("chat", put(*CONTENT, 0, "bytes", list(b" two?"))),
        r"tokens that are the labels. Received: token \d+ at place 0",
    ),
    wrong(
        "a response that no single token has",
        ("chat", lambda line: entry(line, CONTENT, 0).update(UNKNOWN)),
        "Received: the string of no single token at place 0.*token_id:7",
    ),
    *[
        wrong(
            f"an id of {name!r}",
            ("generated", put("logprobs", 0, renamed(name))),
            f"An id must be from 0 to {SIZE - 1}, a token of the student. "
            f"Received: {name!r}",
        )
        for name in (str(SIZE), "-1", "yes", "")
    ],
    wrong(
        "an id outside of the vocabulary in a chat",
        ("chat_of_ids", put(*TOP, 0, "token", f"token_id:{SIZE}")),
        f"An id must be from 0 to {SIZE - 1}",
    ),
    wrong(
        "a token twice",
        ("chat_of_ids", lambda line: repeat(entry(line, TOP))),
        r"`top_logprobs` must have each token once. .*token \d+ again, as 'tok",
    ),
    *[
        wrong(
            f"bytes={value!r}",
            ("chat", put(*TOP, 0, "bytes", value)),
            "`bytes` must be a list of integers from 0 to 255, or null",
        )
        for value in (" yes", [256], [0.5])
    ],
    wrong(
        "a token without a string",
        ("chat", put(*TOP, 0, "token", 5)),
        "`token` must be a string. Received: token of type int",
    ),
    wrong(
        "no top_logprobs",
        ("chat", put(*TOP, None)),
        "`top_logprobs` must be a list",
    ),
    wrong(
        "a token that is no dictionary",
        ("chat", put(*CONTENT, 0, " yes")),
        "`content` must be a list of dictionaries",
    ),
    wrong(
        "too few",
        ("chat", put(*TOP, lambda top: top[:-1])),
        "must have `top_k` log probabilities. Received: top_k=3, and 2 at "
        "place 0, besides 0 that are masked and 0 of strings",
    ),
    wrong(
        "too few that are not masked",
        ("chat", put(*TOP, 2, "logprob", -9999.0)),
        "and 2 at place 0, besides 1 that are masked and 0 of",
    ),
    wrong(
        "too few whose strings are known",
        ("chat", lambda line: entry(line, TOP, 0).update(UNKNOWN)),
        r"and 2 at place 0, besides 0 that are masked and 1 of .*\['�'\]",
    ),
    wrong(
        "two responses",
        ("chat", put("choices", lambda choices: choices * 2)),
        "`choices` must be a list of one dictionary. .*Ask the server for `n=1",
    ),
    wrong(
        "the answer to another request",
        ("chat", lambda line: line.update(BATCH, custom_id="0")),
        "`custom_id` must be the number of the example, from 0.*Sort",
    ),
    wrong(
        "a request that failed",
        ("chat", lambda line: line.update(BATCH, response=None)),
        "`response` must be a dictionary, that of a request that was answered",
    ),
    wrong(
        "an answer without a body",
        ("chat", lambda line: line.update(BATCH, response={"body": None})),
        "`body` must be a dictionary",
    ),
]
MINUS_1 = {"logprob": -1.0}


def entry(line, path, *more):
    for key in (*path, *more):
        line = line[key]
    return line


def repeat(entries):
    entries[1]["token"] = entries[0]["token"]


@pytest.mark.parametrize(("call", "words", "error"), CHANGED)
def test_a_changed_line_is_refused(
    call, words, error, lines, data, student, tmp_path
):
    shape, *changes = call
    changed = copy.deepcopy(lines[shape])
    for change in changes:
        change(changed[1])
    path = server_support.write(tmp_path / "lines.jsonl", changed)
    field = "prompt_logprobs" if shape == "scored" else "logprobs"
    with pytest.raises(error, match=f"(?s){ROW}.*{words}"):
        store(path, data, student, field=field)


@pytest.mark.parametrize(
    ("content", "words", "error"),
    [
        wrong("a line cut short", b'{"a": [1, ', f"{ROW}A line must be JSON"),
        wrong("no UTF-8", b'{"a": "\xff"}', f"{ROW}A line must be JSON"),
        wrong("deep nesting", b"[" * 100_000, f"{ROW}.*recursion"),
        wrong("a list", b"[1]", f"{ROW}`a line` must be a dictionary"),
        wrong("nothing", b"\n", "lines.jsonl with 1 lines, none for example 1"),
    ],
)
def test_a_broken_line_is_refused(
    content, words, error, lines, data, student, tmp_path
):
    whole = json.dumps(lines["chat"][0]).encode()
    path = tmp_path / "lines.jsonl"
    path.write_bytes(whole + b"\n" + content)
    with pytest.raises(error, match=words):
        store(path, data, student)


def test_a_line_too_many_is_refused(lines, data, student, tmp_path):
    path = server_support.write(tmp_path / "lines.jsonl", lines["chat"] * 2)
    with pytest.raises(ValueError, match="with 4 lines, for 2 examples"):
        store(path, data, student)


def test_lines_in_another_order_are_refused(lines, data, student, tmp_path):
    """Of which one answer is yes, and one no."""
    path = tmp_path / "lines.jsonl"
    server_support.write(path, lines["generated"][::-1])
    with pytest.raises(ValueError, match="row 1, .*tokens that are the labels"):
        store(path, data, student)


@pytest.mark.parametrize(
    ("changes", "words", "error"),
    [
        wrong("no path", dict(path=None), "`path` must be a path", TypeError),
        wrong(
            "no file",
            dict(path="nowhere.jsonl"),
            "`path` must be a JSONL file.*'nowhere.jsonl'",
            FileNotFoundError,
        ),
        wrong("no folder", dict(folder=1), "`folder` must be", TypeError),
        wrong(
            "a list of batches",
            dict(data=[]),
            "`data` must be a `keras.utils.PyDataset`",
            TypeError,
        ),
        wrong("no data", dict(data=Batches()), "at least one batch"),
        wrong(
            "a student without logits",
            dict(student=keras.layers.Dense(1)),
            "`student` must be a task with logits",
        ),
        wrong(
            "another field",
            dict(field="top_logprobs"),
            "`field` must be one of .*'prompt_logprobs'",
        ),
        *[
            wrong(f"{name}=0", {name: 0}, f"`{name}` must be at least 1")
            for name in ("top_k", "epochs", "batches_per_shard")
        ],
        wrong("a share", dict(top_k=0.5), "must be an integer", TypeError),
        wrong(
            "more than there are",
            dict(top_k=TOP_K + 1),
            "must have `top_k` log probabilities. Received: top_k=4, and 3",
        ),
        wrong(
            "the prompt's, which are not there",
            dict(field="prompt_logprobs"),
            "`prompt_token_ids` must be a list of integers",
        ),
    ],
)
def test_arguments_are_refused(
    changes, words, error, lines, data, student, tmp_path
):
    path = server_support.write(tmp_path / "lines.jsonl", lines["chat"])
    with pytest.raises(error, match=words):
        store(path, data, student, **changes)


def test_epochs_that_are_all_the_same_are_refused(
    lines, data, student, tmp_path
):
    path = server_support.write(tmp_path / "lines.jsonl", lines["chat"])
    with pytest.raises(ValueError, match="`epochs` must be 1 for data without"):
        store(path, Batches(data[0]), student, epochs=2)


def test_strings_need_a_tokenizer(lines, data, tmp_path):
    student = make_multi_image(vocabulary_size=SIZE)
    path = server_support.write(tmp_path / "lines.jsonl", lines["chat"])
    with pytest.raises(
        ValueError, match="row 1.* None. Ask the server for ids"
    ):
        store(path, data, student)
