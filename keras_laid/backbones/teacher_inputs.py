"""Inputs that only the teacher reads, where they differ from the student's.

A batch may have an entry `"teacher"`, a dictionary. Without `"token_ids"` in
it, its entries replace those of the student: `{"positions": ...}` gives the
teacher its own positions. With `"token_ids"`, it holds all inputs of another
prompt with the same response, and `"aligned"`: for each of the student's
tokens, the index of the teacher's token that is followed by the same one.
"""

from collections.abc import Mapping
from typing import Any

import numpy as np
from keras import ops

from keras_laid.arguments import check_dtype
from keras_laid.arguments import check_shape
from keras_laid.ops.unembedding import Unembedding

TEACHER = "teacher"
ALIGNED = "aligned"


def aligned_tokens(
    sample_weight: np.ndarray, teacher_sample_weight: np.ndarray
) -> np.ndarray:
    """The teacher's token for each of the student's, in two prompts.

    Marked tokens correspond in their order: the first to the first, and so on.

    Args:
        sample_weight: Array of shape `(batch, length)`, greater than 0 at the
            marked tokens of the student's prompts.
        teacher_sample_weight: Array of shape `(batch, teacher_length)`, the
            same for the teacher's prompts.

    Returns:
        An `int32` array of shape `(batch, length)`, indices of the teacher's
        tokens, for the entry `"aligned"` of the teacher's inputs. At tokens
        that are not marked the index has no meaning.

    Raises:
        ValueError: If the two prompts of an example do not have as many marked
            tokens.
    """
    marked, teacher_marked = sample_weight > 0, teacher_sample_weight > 0
    counts, others = marked.sum(axis=1), teacher_marked.sum(axis=1)
    differ = np.flatnonzero(counts != others)
    if len(differ):
        row = differ[0]
        raise ValueError(
            "Both prompts of an example must have as many marked tokens. "
            f"Received: {counts[row]} for the student and {others[row]} for "
            f"the teacher in row {row}. Give both the same response."
        )
    first_ones = np.argsort(~teacher_marked, axis=1, kind="stable")
    rank = np.maximum(np.cumsum(marked, axis=1) - 1, 0)
    rank = np.minimum(rank, first_ones.shape[1] - 1)
    return np.take_along_axis(first_ones, rank, axis=1).astype("int32")


def reads_other_prompt(x: Mapping[str, Any]) -> bool:
    """Whether the teacher's prompts have other tokens than the student's."""
    return "token_ids" in x.get(TEACHER, {})


def inputs_of_teacher(x: Mapping[str, Any]) -> dict[str, Any]:
    """A batch's inputs as the teacher reads them."""
    own = dict(x.get(TEACHER, {}))
    own.pop(ALIGNED, None)
    if reads_other_prompt(x):
        return own
    return {name: x[name] for name in x if name != TEACHER} | own


def at_students_tokens(
    tokens: Unembedding, x: Mapping[str, Any]
) -> Unembedding:
    """The teacher's logits, one for each of the student's tokens."""
    if not reads_other_prompt(x):
        return tokens
    index = ops.cast(x[TEACHER][ALIGNED], "int32")[:, :, None]
    return tokens.map_tokens(
        lambda each: ops.take_along_axis(each, index, axis=1)
    )


def check_teacher_inputs(x: Mapping[str, Any]) -> None:
    """Refuses an entry `"teacher"` of another form, by its shapes."""
    own = x.get(TEACHER, {})
    if not isinstance(own, Mapping):
        raise TypeError(
            f"`x[{TEACHER!r}]` must be a dictionary of the inputs that only "
            f"the teacher reads. Received: {type(own).__name__}"
        )
    if reads_other_prompt(x) != (ALIGNED in own):
        raise ValueError(
            f"`x[{TEACHER!r}]` must have both 'token_ids' and {ALIGNED!r}, for "
            "another prompt, or neither of them. Received: "
            f"{sorted(own)}. Make {ALIGNED!r} with "
            "`keras_laid.haystacks.aligned_tokens`."
        )
    if ALIGNED in own:
        batch, length = x["token_ids"].shape
        name = f"x[{TEACHER!r}][{ALIGNED!r}]"
        check_shape(name, own[ALIGNED], batch=batch, length=length)
        check_dtype(name, own[ALIGNED], "int")


def check_none(x: Mapping[str, Any]) -> None:
    """Refuses inputs of the teacher's own, for a stored teacher."""
    if TEACHER in x:
        raise ValueError(
            "A stored teacher reads nothing: its targets are those of the "
            f"student's inputs. Received: inputs with {sorted(x)}. Leave out "
            f"{TEACHER!r}, or use the teacher itself."
        )
