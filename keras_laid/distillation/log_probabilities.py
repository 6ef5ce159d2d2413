"""Reads log probabilities of next tokens, as servers write them, strictly."""

import json
import math
import pathlib
from collections.abc import Sequence
from typing import Any
from typing import Literal
from typing import NamedTuple

import keras
import numpy as np

from keras_laid.arguments import check_kind
from keras_laid.arguments import check_number
from keras_laid.arguments import is_integer
from keras_laid.backbones.decoder import backbone_of
from keras_laid.backbones.token_strings import TokenStrings
from keras_laid.ops.top_logits import NOTHING

# In place of the log probability of a token that is masked or unlikely.
MASKED = -9999.0
# How far a sum of rounded probabilities may be above 1.
ROUNDING = 1e-3
# What vLLM writes before an id, in place of a token's string.
TOKEN_ID = "token_id:"
ASK_FOR_IDS = (
    "Ask the server for ids, in vLLM by `return_tokens_as_token_ids`: "
    "'token_id:7' in place of a string."
)


class NextToken(NamedTuple):
    """What a server wrote about one token of a response.

    Attributes:
        token: Integer, or `None` where no single token has its string.
        log_probabilities: Dictionary from token to log probability.
        unknown: List of strings that no single token has.
    """

    token: int | None
    log_probabilities: dict[int, float]
    unknown: Sequence[str] = ()


class LogProbabilities:
    """The lines of a JSONL file, each with the response to one prompt.

    Args:
        path: `pathlib.Path` of the file.
        field: `"logprobs"` or `"prompt_logprobs"`.
        student: The model whose tokens they are.
    """

    def __init__(
        self,
        path: pathlib.Path,
        field: Literal["logprobs", "prompt_logprobs"],
        student: keras.Model,
    ) -> None:
        self.path = path
        self.field = field
        self.vocabulary = backbone_of(student).vocabulary_size
        self.preprocessor = student.preprocessor
        self._strings: TokenStrings | None = None
        self._lines = []  # The number of each line, and where it begins.
        with path.open("rb") as file:
            start = 0
            for number, line in enumerate(file, 1):
                if line.strip():
                    self._lines.append((number, start))
                start += len(line)

    def __len__(self) -> int:
        return len(self._lines)

    def top_logits(
        self, example: int, labels: np.ndarray, count: int
    ) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """The largest log probabilities of each token of a response.

        Args:
            example: Integer, the number of the prompt.
            labels: Integer array of shape `(tokens,)`, what the tokens must
                be; where one is less than 0, any.
            count: Integer, how many log probabilities of each token.

        Returns:
            Arrays as of `keras_laid.ops.TopLogits`, without a batch axis:
            logits, index and others.

        Raises:
            ValueError: If the line is missing or not what a server writes, if
                its tokens are not the labels, or if a token has too few log
                probabilities.
        """
        if example >= len(self):
            raise ValueError(
                "There must be a line for each example. Received: "
                f"{self.path.name} with {len(self)} lines, none for example "
                f"{example}"
            )
        number, start = self._lines[example]
        with self.path.open("rb") as file:
            file.seek(start)
            line = file.readline()
        try:
            tokens = self.read(line, example, len(labels))
            check_labels([each.token for each in tokens], labels)
            return largest(tokens, count)
        except (TypeError, ValueError, RecursionError) as error:
            raise ValueError(
                f"{self.path.name}, row {number}, example {example}: {error}"
            ) from error

    def read(self, line: bytes, example: int, count: int) -> list[NextToken]:
        """The tokens of a line; of those of a prompt, the last `count`."""
        try:
            content = json.loads(line)
        except ValueError as error:  # Of JSON and of UTF-8.
            raise ValueError(
                f"A line must be JSON. Received: {line!r:.80}, {error}"
            ) from error
        fields = fields_of(content, example)
        values: Any = fields.get(self.field)
        if self.field == "prompt_logprobs":
            ids = token_ids(fields, "prompt_token_ids", values)
            # The first token of a prompt has no log probabilities.
            first = max(1, len(ids) - count)
            return self.by_ids(ids[first:], values[first:])
        if isinstance(values, list):
            return self.by_ids(token_ids(fields, "token_ids", values), values)
        if isinstance(values, dict) and isinstance(values.get("content"), list):
            tokens = [self.by_strings(each) for each in values["content"]]
            if fields.get("token_ids") is None:
                return tokens
            ids = token_ids(fields, "token_ids", tokens)
            return [
                each._replace(token=token)
                for token, each in zip(ids, tokens, strict=True)
            ]
        raise ValueError(
            "`logprobs` must be a list, as vLLM writes it, or a dictionary "
            "with a list `content`, as in a chat completion. Received: "
            f"logprobs={values!r:.80}. Ask the server for log probabilities."
        )

    def by_ids(
        self, ids: Sequence[int], values: Sequence[Any]
    ) -> list[NextToken]:
        """Tokens, each with a dictionary from ids to log probabilities."""
        tokens = []
        for place, (token, entries) in enumerate(zip(ids, values, strict=True)):
            words = "a dictionary from ids to log probabilities"
            check_kind(f"{self.field}[{place}]", entries, dict, words)
            found = {
                self.checked_id(key): log_probability(entry)
                for key, entry in entries.items()
            }
            if token not in found:
                raise ValueError(
                    "The log probabilities of a token must include its own. "
                    f"Received: those of {sorted(found)!s:.80} for token "
                    f"{token}"
                )
            tokens.append(NextToken(token, found))
        return tokens

    def by_strings(self, entry: Any) -> NextToken:
        """A token of a chat completion."""
        check_kind("content", entry, dict, "a list of dictionaries")
        top: Any = entry.get("top_logprobs")
        check_kind("top_logprobs", top, list, "a list")
        found: dict[int, float] = {}
        unknown = []
        for each in top:
            value = log_probability(each)
            token = self.id_of(each)
            if token is None:
                unknown.append(each["token"])
            elif token in found:
                raise ValueError(
                    "`top_logprobs` must have each token once. Received: token "
                    f"{token} again, as {each['token']!r}. {ASK_FOR_IDS}"
                )
            else:
                found[token] = value
        return NextToken(self.id_of(entry), found, unknown)

    def id_of(self, entry: dict[str, Any]) -> int | None:
        """The token with this written form, or `None`."""
        string: Any = entry.get("token")
        written = entry.get("bytes")
        check_kind("token", string, str, "a string")
        if string.startswith(TOKEN_ID):
            return self.checked_id(string.removeprefix(TOKEN_ID))
        if self._strings is None:
            self._strings = TokenStrings(
                self.preprocessor and self.preprocessor.tokenizer
            )
        if written is None:
            return self._strings.find(string.encode(errors="replace"))
        if not isinstance(written, list) or not all(
            is_integer(byte) and 0 <= byte < 256 for byte in written
        ):
            raise ValueError(
                "`bytes` must be a list of integers from 0 to 255, or null. "
                f"Received: bytes={written!r:.80}"
            )
        return self._strings.find(bytes(written))

    def checked_id(self, key: str) -> int:
        token = int(key) if key.isdecimal() else -1
        if not 0 <= token < self.vocabulary:
            raise ValueError(
                f"An id must be from 0 to {self.vocabulary - 1}, a token of "
                f"the student. Received: {key!r:.80}"
            )
        return token


def fields_of(content: Any, example: int) -> dict[str, Any]:
    """The fields of a line about the response, in any of its forms."""
    check_kind("a line", content, dict, "a dictionary")
    if "custom_id" in content:  # Of a batch API.
        if content["custom_id"] != str(example):
            raise ValueError(
                "`custom_id` must be the number of the example, from 0: a "
                "batch may be answered in any order. Received: "
                f"custom_id={content['custom_id']!r:.80}. Sort the lines."
            )
        words = "a dictionary, that of a request that was answered"
        check_kind("response", content.get("response"), dict, words)
        content = content["response"].get("body")
        check_kind("body", content, dict, words)
    if "choices" not in content:
        return content
    choices = content["choices"]
    if not isinstance(choices, list) or [*map(type, choices)] != [dict]:
        raise ValueError(
            "`choices` must be a list of one dictionary. Received: "
            f"choices={choices!r:.80}. Ask the server for `n=1`."
        )
    # vLLM writes the fields of the prompt in either place.
    return content | {k: v for k, v in choices[0].items() if v is not None}


def token_ids(fields: dict[str, Any], name: str, values: Any) -> list[int]:
    """Ids of tokens, as many as there are log probabilities."""
    ids = fields.get(name)
    if not isinstance(ids, list) or not all(map(is_integer, ids)):
        raise ValueError(
            f"`{name}` must be a list of integers. Received: {name}="
            f"{ids!r:.80}. Ask the server for it, in vLLM by "
            "`return_token_ids`."
        )
    if not isinstance(values, list) or len(values) != len(ids):
        raise ValueError(
            f"There must be log probabilities for each of `{name}`. Received: "
            f"{len(ids)} tokens, and log probabilities {values!r:.80}"
        )
    return ids


def log_probability(entry: Any) -> float:
    check_kind("an entry", entry, dict, "a dictionary with `logprob`")
    check_number("logprob", entry.get("logprob"), "[-inf, 0]")
    return float(entry["logprob"])


def check_labels(tokens: Sequence[int | None], labels: np.ndarray) -> None:
    """Refuses tokens that are not the labels; those less than 0 are any."""
    if len(tokens) != len(labels):
        raise ValueError(
            "A response must have the tokens that `sample_weight` marks, with "
            f"the end token if it is marked. Received: {len(tokens)} tokens, "
            f"where {len(labels)} are marked"
        )
    for place, (token, label) in enumerate(zip(tokens, labels, strict=True)):
        if label >= 0 and token != label:
            received = "the string of no single token"
            if token is not None:
                received = f"token {token}"
            raise ValueError(
                "A response must have the tokens that are the labels. "
                f"Received: {received} at place {place}, where the label is "
                f"{label}. Lines must be in the order of the data. "
                f"{ASK_FOR_IDS}"
            )


def largest(
    tokens: Sequence[NextToken], count: int
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Logits, index and others, as of `keras_laid.ops.TopLogits`."""
    logits = np.zeros((len(tokens), count), "float64")
    index = np.zeros((len(tokens), count), "int32")
    for place, each in enumerate(tokens):
        known = {
            token: value
            for token, value in each.log_probabilities.items()
            if value > MASKED
        }
        total = sum(map(math.exp, known.values()))
        if total > 1 + ROUNDING:
            raise ValueError(
                "The probabilities of a token must sum to 1 at most. Received: "
                f"{total} at place {place}. Ask the server for log "
                "probabilities, and not for logits."
            )
        if len(known) < count:
            masked = len(each.log_probabilities) - len(known)
            raise ValueError(
                f"Each token must have `top_k` log probabilities. Received: "
                f"top_k={count}, and {len(known)} at place {place}, besides "
                f"{masked} that are masked and {len(each.unknown)} of strings "
                f"of no single token, {each.unknown!r:.80}. Pass a smaller "
                "`top_k`, or ask the server for more."
            )
        # As `keras.ops.top_k` orders them.
        order = sorted(known, key=lambda token: (-known[token], token))
        index[place] = order[:count]
        logits[place] = [known[token] for token in order[:count]]
    rest = 1 - np.exp(logits).sum(axis=1, keepdims=True)
    others = np.where(rest > 0, np.log(np.maximum(rest, 1e-30)), NOTHING)
    # Both are at temperature 1.
    others = np.repeat(others, 2, axis=1)
    return logits.astype("float32"), index, others.astype("float32")
