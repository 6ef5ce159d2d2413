"""Makes a stored teacher from log probabilities that a server wrote."""

import functools
import pathlib
from typing import Any
from typing import Literal

import keras

from keras_laid.arguments import check_choice
from keras_laid.arguments import check_integer
from keras_laid.arguments import check_path
from keras_laid.distillation import checks
from keras_laid.distillation import stored_teacher
from keras_laid.distillation.description import Description
from keras_laid.distillation.log_probabilities import LogProbabilities
from keras_laid.distillation.shards import Batch
from keras_laid.distillation.shards import check_batches
from keras_laid.distillation.shards import record
from keras_laid.distillation.shards import write_store
from keras_laid.distillation.stored_teacher import StoredTeacher
from keras_laid.typing import PathLike


def store_log_probabilities(
    path: PathLike,
    data: keras.utils.PyDataset,
    folder: PathLike,
    student: keras.Model,
    field: Literal["logprobs", "prompt_logprobs"] = "logprobs",
    top_k: int = 20,
    epochs: int = 1,
    batches_per_shard: int = 64,
) -> StoredTeacher:
    """Writes a store for a teacher that ran elsewhere, such as on vLLM.

    The file has a line of JSON for each example of the data, in their order.
    The tokens of a line must be those that `sample_weight` marks: the same
    number, and each equal to its label in `y` where the label is 0 or more. A
    line has one of these forms:

    - a chat completion, with `choices[0].logprobs.content[i].top_logprobs`;
    - what vLLM writes, with `logprobs` and `token_ids`, or `prompt_logprobs`
      and `prompt_token_ids`, in the line itself or in `choices[0]`: a
      dictionary for each token, from ids to `{"logprob": ...}`;
    - one of these in `response.body`, as batch APIs write it. `custom_id` is
      then the number of the example, from 0.

    The `top_k` largest log probabilities of a token are stored, and all other
    tokens count as one, see `keras_laid.ops.TopLogits`. Log probabilities of
    -9999 or less stand for masked or unlikely tokens, which count among the
    others. So does a string in `top_logprobs` that is not a single token of the
    student, such as a part of a character. Each string of the response itself
    must be a single token, unless `token_ids` gives the tokens.

    The store has logits only: no attention and no retrieval heads. They are at
    temperature 1, and `NextTokens` must have this temperature too. The file
    does not show whether a server divided logits by a temperature or masked
    some of them: vLLM does neither with its default
    `logprobs_mode="raw_logprobs"`.

    Args:
        path: Path of the JSONL file.
        data: A `keras.utils.PyDataset`, as of `keras_laid.store_teacher`.
        folder: Path of a folder for only this store, which is made if missing.
        student: A `keras_hub.models.CausalLM` that reads the data and has the
            teacher's vocabulary. The tokenizer of its preprocessor turns
            strings into tokens.
        field: `"logprobs"` for tokens that the server generated, or
            `"prompt_logprobs"` for a response that was the end of the prompt.
            Defaults to `"logprobs"`.
        top_k: Integer, the number of log probabilities stored for each token.
            Servers may give one more, that of the token itself. Defaults to
            `20`, the most that servers give by default.
        epochs: Integer, the number of epochs to store, each with the lines of
            the file. Defaults to `1`, for data that are the same in every
            epoch.
        batches_per_shard: Integer, the number of batches in a file of the
            store. Defaults to `64`.

    Returns:
        A `keras_laid.StoredTeacher`.

    Raises:
        TypeError: If an argument is of another kind.
        FileNotFoundError: If there is no such file.
        ValueError: If an argument is out of range, the folder holds another
            store, or a line is refused, whose row is named: if it is broken, is
            missing or one too many; if its tokens are not the labels, or no
            tokens of the student; if a log probability is NaN or above 0, or
            probabilities sum to more than 1; or if a token has less than
            `top_k`.

    Example:

    ```python
    keras_laid.store_log_probabilities(
        "answers.jsonl", haystacks, "runs/server", student
    )
    teacher = keras_laid.StoredTeacher("runs/server")
    distiller = keras_laid.DistanceWeightedAttentionDistillation(
        teacher=teacher, student=student, retrieval_weight=0
    )
    distiller.compile(optimizer=keras.optimizers.AdamW(1e-5))
    distiller.fit(teacher.targets_for(haystacks))
    ```

    Reference:
     - [vLLM](https://github.com/vllm-project/vllm), `vllm/outputs.py` of commit
       003d3ee and `vllm/entrypoints/openai/chat_completion/protocol.py` of
       commit 002032e; [openai-python](https://github.com/openai/openai-python),
       `src/openai/types/chat/chat_completion_token_logprob.py` of commit
       3e9e851.
    """
    check_path("path", path)
    path = pathlib.Path(path)
    if not path.is_file():
        raise FileNotFoundError(
            "`path` must be a JSONL file of log probabilities. Received: "
            f"path={str(path)!r}, which is not a file"
        )
    stored_teacher.check_data(data)
    check_path("folder", folder)
    checks.check_task("student", student)
    check_choice("field", field, ("logprobs", "prompt_logprobs"))
    for name, value in (
        ("top_k", top_k),
        ("epochs", epochs),
        ("batches_per_shard", batches_per_shard),
    ):
        check_integer(name, value)
    # Of the teacher, only the vocabulary is known.
    description = Description.from_model(student)
    settings: dict[str, Any] = dict(
        layers=[],
        rows="text",
        top_k=top_k,
        vocabulary_size=description.vocabulary_size,
        temperature=1.0,
        epochs=epochs,
        batches=epochs * len(data),
        batches_per_shard=batches_per_shard,
        retrieval_heads=[],
        field=field,
    )
    check_batches(settings, data)
    stored_teacher.file_formats()
    settings["teacher"] = stored_teacher.checksum(path)
    lines = LogProbabilities(path, field, student)
    return write_store(
        student,
        functools.partial(records, lines, top_k),
        data,
        folder,
        settings,
        description,
    )


def records(
    lines: LogProbabilities, top_k: int, batch: Batch
) -> tuple[list[bytes], int]:
    """The examples of a batch as bytes, and how many tokens they have."""
    end = batch.first + len(batch.y)
    if batch.is_last and end < len(lines):
        raise ValueError(
            "There must be a line for each example. Received: "
            f"{lines.path.name} with {len(lines)} lines, for {end} examples"
        )
    examples = []
    for number, (labels, marked) in enumerate(
        zip(batch.y, batch.marked, strict=True), batch.first
    ):
        arrays = lines.top_logits(number, labels[marked], top_k)
        names = stored_teacher.TOP_LOGITS
        examples.append(record(dict(zip(names, arrays, strict=True))))
    return examples, batch.marked.size
