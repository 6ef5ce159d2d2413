"""The recipe file of `python -m keras_laid.distill`, and its checks."""

import dataclasses
import difflib
import pathlib
import tomllib
import types
import typing
from typing import Any
from typing import TypeVar

from keras_laid.typing import PathLike

Table = TypeVar("Table")


@dataclasses.dataclass(frozen=True)
class Data:
    """The table `[data]`: the prompts of training.

    Attributes:
        examples: String, path of a CSV or JSONL table, as of
            `keras_laid.haystacks.read_examples`.
        sizes: List of integers: how many images, or documents, a prompt holds.
        root: Optional string, the folder that paths of images are relative to.
            Defaults to the table's own.
        prompts: Optional integer, the number of prompts in an epoch. Defaults
            to one for each example.
        batch_size: Integer, prompts in a batch. Defaults to `8`.
        window: Optional integer, in images: positions are stretched over so
            long a window. Defaults to none.
        teacher_images: Optional integer, the number of images that the teacher
            reads. Defaults to those of the student.
        max_length: Optional integer, the most tokens of text in a prompt.
            Defaults to no bound.
    """

    examples: str
    sizes: list[int]
    root: str | None = None
    prompts: int | None = None
    batch_size: int = 8
    window: int | None = None
    teacher_images: int | None = None
    max_length: int | None = None


@dataclasses.dataclass(frozen=True)
class Training:
    """The table `[training]`.

    Attributes:
        epochs: Integer. Defaults to `10`.
        learning_rate: Float, the largest learning rate of the student. Defaults
            to `1e-5`.
        warmup: Float in `[0, 1]`, the share of steps until that rate. Defaults
            to `0.05`.
        weight_decay: Float. Defaults to `0.01`.
        gains: Boolean, whether the student gets a trainable gain on each rotary
            frequency, at 10 times the learning rate. Defaults to `true`.
        rematerialize: Boolean, whether the student's blocks run again in the
            backward pass, to save memory. Defaults to `false`.
        linear_memory: Boolean, whether attention is computed without whole
            maps. Defaults to `false`.
        tensorboard: Boolean, whether logs for TensorBoard are written, for
            which TensorFlow must be installed. Defaults to `false`.
    """

    epochs: int = 10
    learning_rate: float = 1e-5
    warmup: float = 0.05
    weight_decay: float = 0.01
    gains: bool = True
    rematerialize: bool = False
    linear_memory: bool = False
    tensorboard: bool = False


@dataclasses.dataclass(frozen=True)
class Terms:
    """The table `[terms]`: the weights of the loss.

    Attributes:
        retrieval_weight: Float. Defaults to `1.0`.
        attention_weight: Float. Defaults to `0.0`.
        logits_weight: Float. Defaults to `1.0`.
        supervised_weight: Float. Defaults to `1.0`. Prompts without a response
            have no label and do not count.
        strength: Float, how much more the most distant images count. Defaults
            to `4.0`.
    """

    retrieval_weight: float = 1.0
    attention_weight: float = 0.0
    logits_weight: float = 1.0
    supervised_weight: float = 1.0
    strength: float = 4.0


@dataclasses.dataclass(frozen=True)
class Evaluation:
    """The table `[evaluation]`, which may be left out.

    Attributes:
        examples: String, path of a table of examples with responses.
        sizes: List of integers: how many images a haystack holds.
        root: Optional string, the folder that paths of images are relative to.
            Defaults to the table's own.
        questions: Integer, questions at each size. Defaults to `256`.
        rule: String, `"contains"` or `"exact"`, as in
            `keras_laid.haystacks.score`. Defaults to `"contains"`.
        max_answer_tokens: Integer, tokens of an answer. Defaults to `16`.
    """

    examples: str
    sizes: list[int]
    root: str | None = None
    questions: int = 256
    rule: str = "contains"
    max_answer_tokens: int = 16


@dataclasses.dataclass(frozen=True)
class Recipe:
    """A pair of presets, data, and how to train.

    Attributes:
        teacher: String, a preset of KerasHub by name or folder.
        student: String, a preset of KerasHub by name or folder.
        output: String, the folder that everything is written to.
        data: `Data`.
        training: `Training`.
        terms: `Terms`.
        evaluation: `Evaluation`, or `None`.
        seed: Integer. Defaults to `0`.
        dtype: Optional string, such as `"bfloat16"`, the dtype of both models.
            Defaults to that of the presets.
    """

    teacher: str
    student: str
    output: str
    data: Data
    training: Training = Training()
    terms: Terms = Terms()
    evaluation: Evaluation | None = None
    seed: int = 0
    dtype: str | None = None


def read_recipe(path: PathLike) -> Recipe:
    """Reads a recipe and checks its keys and types.

    Relative paths in it, of tables and folders, are relative to its own
    folder.

    Args:
        path: A TOML file.

    Returns:
        A `Recipe`, with whole paths.

    Raises:
        FileNotFoundError: If there is no such file.
        ValueError: If the file is not TOML, a key is unknown or missing, or a
            value has another type.
    """
    path = pathlib.Path(path)
    try:
        values = tomllib.loads(path.read_text(encoding="utf-8"))
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise ValueError(
            f"A recipe must be a TOML file. Received: {path}, {error}"
        ) from error
    recipe = make_table(Recipe, values, path.name)
    return with_whole_paths(recipe, path.parent.resolve())


def make_table(kind: type[Table], values: dict[str, Any], where: str) -> Table:
    """A dataclass of a table of the file."""
    hints = typing.get_type_hints(kind)
    for key in values:
        if key not in hints:
            near = difflib.get_close_matches(key, hints, n=1)
            advice = f" Did you mean {near[0]!r}?" if near else ""
            raise ValueError(
                f"{where} must have only the keys {sorted(hints)}. Received: "
                f"{key!r}.{advice}"
            )
    fields = dataclasses.fields(kind)  # type: ignore[arg-type]
    missing = [
        field.name
        for field in fields
        if field.default is dataclasses.MISSING and field.name not in values
    ]
    if missing:
        raise ValueError(
            f"{where} must have the keys {missing}. Received: {sorted(values)}"
        )
    made = {
        key: checked(value, hints[key], f"{where}, `{key}`")
        for key, value in values.items()
    }
    return kind(**made)


def checked(value: Any, hint: Any, where: str) -> Any:
    """A value of the type that a field has."""
    if isinstance(hint, types.UnionType):  # Or `None`, which TOML lacks.
        hint, _ = typing.get_args(hint)
    if isinstance(hint, type) and dataclasses.is_dataclass(hint):
        if not isinstance(value, dict):
            raise ValueError(
                f"{where} must be a table. Received: {value!r:.80}"
            )
        return make_table(hint, value, f"[{where.split('`')[1]}]")
    if typing.get_origin(hint) is list:
        if not isinstance(value, list):
            raise ValueError(
                f"{where} must be a list of integers. Received: {value!r:.80}"
            )
        (inner,) = typing.get_args(hint)
        return [checked(each, inner, where) for each in value]
    allowed = (int, float) if hint is float else (hint,)
    if not isinstance(value, allowed) or (
        isinstance(value, bool) and hint is not bool
    ):
        raise ValueError(
            f"{where} must be of type {hint.__name__}. Received: {value!r:.80}"
        )
    return hint(value)


def with_whole_paths(recipe: Recipe, folder: pathlib.Path) -> Recipe:
    """Paths below the recipe's folder, and presets where they are folders."""

    def whole(path: str) -> str:
        return str(folder / path)

    def preset(name: str) -> str:
        return whole(name) if (folder / name).is_dir() else name

    def whole_table(table: Any) -> Any:
        if table is None:
            return None
        root = None if table.root is None else whole(table.root)
        examples = whole(table.examples)
        return dataclasses.replace(table, examples=examples, root=root)

    return dataclasses.replace(
        recipe,
        teacher=preset(recipe.teacher),
        student=preset(recipe.student),
        output=whole(recipe.output),
        data=whole_table(recipe.data),
        evaluation=whole_table(recipe.evaluation),
    )
