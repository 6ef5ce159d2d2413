"""Asks a model questions about haystacks, and counts what it gets right."""

import pathlib
import string
from collections.abc import Callable
from collections.abc import Iterable
from collections.abc import Sequence
from collections.abc import Sized
from typing import Any
from typing import Literal

import keras
import numpy as np
from tqdm import tqdm

from keras_laid.arguments import check_choice
from keras_laid.arguments import check_integer
from keras_laid.arguments import check_kind
from keras_laid.arguments import check_path
from keras_laid.backbones.image_prompts import ImagePrompts
from keras_laid.haystacks.answer_log import AnswerLog
from keras_laid.haystacks.coco import read_image
from keras_laid.haystacks.questions import ANSWERS
from keras_laid.haystacks.questions import PROMPTS
from keras_laid.haystacks.questions import RULES
from keras_laid.haystacks.questions import complies
from keras_laid.haystacks.questions import score
from keras_laid.haystacks.results import HaystackResults
from keras_laid.haystacks.sampling import Haystack
from keras_laid.typing import Images
from keras_laid.typing import PathLike

WAYS = ("logits", "choice", "generate")
TEXT_LENGTH = 32  # About how many tokens a question takes.


def evaluate_haystacks(
    model: keras.Model | Callable[[list[Images], list[str]], Sequence[str]],
    haystacks: Iterable[Haystack],
    through: Literal["logits", "choice", "generate"] = "logits",
    rule: Literal["strict", "official"] = "strict",
    prompt: str = "question",
    max_answer_tokens: int = 8,
    tokens_per_batch: int = 8192,
    root: PathLike | None = None,
    output: PathLike | None = None,
    verbose: bool = True,
) -> HaystackResults:
    """Measures how often a model answers questions about haystacks rightly.

    A model can be asked in three ways:

    - `"logits"`: of the whole vocabulary, the most likely token after the
      prompt must be the one that the right answer begins with.
    - `"choice"`: only yes and no are compared; the right one must be more
      likely to begin the answer.
    - `"generate"`: it answers in words, greedily, and `rule` says which are
      right; see `keras_laid.haystacks.score`.

    Nothing here is random: questions, images and their order are those of the
    haystacks, which are drawn with a seed. Their order does not matter.

    Example:

    ```python
    haystacks = draw_haystacks(Digits("test"), 4096, sizes=(1, 10, 100))
    results = evaluate_haystacks(model, haystacks, output="runs/mine")
    effective_window(results.accuracy)
    ```

    Args:
        model: A `keras_hub.models.PaliGemmaCausalLM`, a
            `keras_laid.MultiImagePaliGemmaCausalLM` or a
            `keras_hub.models.Gemma3CausalLM`, with its preprocessor; or a
            function of a list of images for each question (as the haystacks
            hold them) and a list of prompts, which returns a list of strings.
        haystacks: Iterable of `keras_laid.haystacks.Haystack`, of any sizes in
            any order: `draw_haystacks(...)`, `question.haystack(rng)` of
            `read_questions`, or `Haystack.from_example(example)` of the
            dataset. No more than a batch of each size is held at a time.
        through: `"logits"`, `"choice"` or `"generate"`, the only one for a
            function. Defaults to `"logits"`.
        rule: `"strict"`, or `"official"`, only with `through="generate"`, the
            benchmark's own, by which "yes or no" is always right. Defaults to
            `"strict"`.
        prompt: `"question"`, only the question; `"official"`, the benchmark's
            own prompt; or a string with `{question}` and maybe `{images}` in
            it, such as `"answer en {question}\\n"`. Images stand first unless
            it says where. Defaults to `"question"`.
        max_answer_tokens: Integer, for `through="generate"`. Defaults to `8`.
        tokens_per_batch: Integer, about how many tokens of images and text one
            batch holds; at least one question. Defaults to `8192`.
        root: Folder that paths are relative to, for haystacks of paths.
        output: Optional folder. `answers.jsonl` gets a line for each question
            as soon as it is answered; called again with the same folder, the
            questions answered already are skipped. At the end come
            `results.csv`, `results.json`, `accuracy.png` and `positions.png`.
            `settings.json` says what the answers depend on: how the model was
            asked, its class, config, scopes such as `keras_laid.yarn`, every
            bit of its weights, its preprocessor, and `root`. To hash weights
            takes 0.7 s a gigabyte on one core, 4 s for the 6 GB of a model of
            3B parameters in bfloat16 (8 s on PyTorch, which hands them over as
            float32), and a copy of them to the host, one variable at a time. A
            function is taken to be the same one. Without `output` nothing is
            hashed.
        verbose: Boolean, whether to show a progress bar.

    Returns:
        A `keras_laid.haystacks.HaystackResults`.

    Raises:
        ValueError: If an argument is none of those above; if there are no
            haystacks; if the family of the model is unknown, the model has no
            preprocessor or its answers cannot be told apart by their first
            token; if images have the wrong size or are not `uint8`; or if
            `output` holds answers of another model, or of the same one in
            other scopes, of another preprocessor or from another `root`, to
            other questions or asked otherwise, or files that are not as written
            here. A refused call leaves what is in `output` as it is.
        TypeError: If an argument, a haystack or what a function returns is of
            another kind.
        NotADirectoryError: If `output` is a file.

    Reference:
     - [Wu et al., 2025](https://arxiv.org/abs/2407.13766). The official prompt
       is that of `solvers/base_solver.py`, the official rule that of
       `run_eval` in `utils.py`, both of
       https://github.com/visual-haystacks/vhs_benchmark, commit 1a9abb5. It
       takes the order of images from an unseeded generator; here they are
       shuffled when haystacks are drawn.
    """
    asking = Asking(model, through, rule, prompt, max_answer_tokens, root)
    check_integer("tokens_per_batch", tokens_per_batch)
    return asking.evaluate(haystacks, tokens_per_batch, output, verbose)


def check_asking(
    through: str = "logits",
    rule: str = "strict",
    prompt: str = "question",
    max_answer_tokens: int = 8,
    root: PathLike | None = None,
) -> None:
    """Refuses arguments of `evaluate_haystacks`, whatever the model."""
    check_choice("through", through, WAYS)
    check_choice("rule", rule, RULES)
    if rule == "official" and through != "generate":
        raise ValueError(
            "The official rule reads words, which only `through="
            f"'generate'` makes. Received: rule={rule!r}, "
            f"through={through!r}. Pass `through='generate'`, or leave "
            "out `rule`."
        )
    check_kind("prompt", prompt, str, "a string")
    names = _names_in(PROMPTS.get(prompt, prompt))
    if names not in (["question"], ["images", "question"]):
        raise ValueError(
            f"`prompt` must be one of {tuple(PROMPTS)}, or hold '{{question}}' "
            "once and at most one '{images}', no other braces. Received: "
            f"prompt={prompt!r:.80}. Write '{{{{' for a brace."
        )
    check_integer("max_answer_tokens", max_answer_tokens)
    if root is not None:
        check_path("root", root)


def check_iterable(haystacks: object) -> None:
    # Python reads what has either.
    if not any(hasattr(haystacks, n) for n in ("__iter__", "__getitem__")):
        raise TypeError(
            "`haystacks` must be an iterable of `keras_laid.haystacks.Haystack`"
            f"s. Received: haystacks of type {type(haystacks).__name__}"
        )


def _names_in(template: str) -> list[str] | None:
    """The names in braces, sorted; `None` where braces do not match."""
    try:
        parts = list(string.Formatter().parse(template))
    except ValueError:
        return None
    return sorted(
        f"{name}{spec}{conversion or ''}"
        for _, name, spec, conversion in parts
        if name is not None
    )


class Asking:
    """A model and a way to ask it; see `evaluate_haystacks`."""

    def __init__(
        self,
        model: keras.Model | Callable[[list[Images], list[str]], Sequence[str]],
        through: Literal["logits", "choice", "generate"] = "logits",
        rule: Literal["strict", "official"] = "strict",
        prompt: str = "question",
        max_answer_tokens: int = 8,
        root: PathLike | None = None,
    ) -> None:
        check_asking(through, rule, prompt, max_answer_tokens, root)
        self.template = PROMPTS.get(prompt, prompt)
        self.through = through
        self.rule = rule
        self.max_answer_tokens = max_answer_tokens
        self.root = root
        self.function, self.prompts = None, None
        if callable(model) and not isinstance(model, (keras.Model, type)):
            if through != "generate":
                raise ValueError(
                    "A function answers in words. Received: a function and "
                    f"through={through!r}. Pass `through='generate'`."
                )
            self.function = model
        else:
            self.prompts = ImagePrompts(model)
            self.first_tokens = self._first_tokens()

    def evaluate(
        self,
        haystacks: Iterable[Haystack],
        tokens_per_batch: int,
        output: PathLike | None,
        verbose: bool,
    ) -> HaystackResults:
        """Asks all, each size in batches of its own."""
        check_iterable(haystacks)
        settings = self.settings()
        if output is not None:  # All weights are read for it.
            settings |= self.origin()
        log = AnswerLog(output, settings)
        # From a size to numbered haystacks.
        waiting: dict[int, list[tuple[int, Haystack]]] = {}
        filled = set()  # Sizes of which a whole batch has been asked.
        total = len(haystacks) if isinstance(haystacks, Sized) else None
        if total is not None:  # Before others are asked.
            log.check_all(range(total))
        numbered = enumerate(haystacks)
        with tqdm(
            desc="haystacks", total=total, disable=not verbose
        ) as progress:

            def ask(batch: list[tuple[int, Haystack]], rows: int) -> None:
                log.add(self._ask(batch, rows))
                progress.update(len(batch))

            for index, haystack in numbered:
                if not isinstance(haystack, Haystack):
                    raise TypeError(
                        "`haystacks` must hold `keras_laid.haystacks.Haystack`"
                        f"s. Received: {type(haystack).__name__} at position "
                        f"{index}. "
                        "Make them with `Haystack.from_example` or "
                        "`question.haystack`."
                    )
                if log.has(index, haystack):
                    progress.update()
                    continue
                size = len(haystack.images)
                rows = self._rows(size, tokens_per_batch)
                batch = waiting.setdefault(size, [])
                batch.append((index, haystack))
                if len(batch) == rows:
                    ask(waiting.pop(size), rows)
                    filled.add(size)
            for size, batch in sorted(waiting.items()):
                # As many rows as before, so that nothing is compiled again.
                rows = self._rows(size, tokens_per_batch)
                ask(batch, rows if size in filled else len(batch))
        results = HaystackResults(log.records(), log.settings)
        if output is not None:
            results.save(output)
        return results

    def settings(self) -> dict[str, Any]:
        """How the model is asked."""
        settings: dict[str, Any] = {
            "through": self.through,
            "rule": self.rule,
            "prompt": self.template,
        }
        if self.through == "generate":
            settings["max_answer_tokens"] = int(self.max_answer_tokens)
        return settings

    def origin(self) -> dict[str, Any]:
        """The model, and the folder of photographs, that answers come from."""
        origin: dict[str, Any] = {}
        if self.prompts is not None:
            origin["model"] = self.prompts.fingerprint()
        if self.root is not None:
            origin["root"] = str(pathlib.Path(self.root).resolve())
        return origin

    def _rows(self, size: int, tokens_per_batch: int) -> int:
        image_length = self.prompts.image_length if self.prompts else 256
        return max(1, tokens_per_batch // (size * image_length + TEXT_LENGTH))

    def _ask(
        self, batch: list[tuple[int, Haystack]], rows: int
    ) -> list[dict[str, Any]]:
        """Answers a batch of haystacks of one size: a list of records."""
        haystacks = [haystack for _, haystack in batch]
        size = len(haystacks[0].images)
        if self.function is not None:
            texts = [
                self.template.format(images="", question=haystack.question)
                for haystack in haystacks
            ]
            images: Any = [haystack.images for haystack in haystacks]
            returned = self.function(images, texts)
            # A single string would be one answer a letter.
            answers = [] if returned is None else [*returned]
            if isinstance(returned, (str, type(None))) or not all(
                isinstance(answer, str) for answer in answers
            ):
                raise TypeError(
                    "The function must return a list of strings. Received: "
                    f"{returned!r:.80}"
                )
            if len(answers) != len(texts):
                raise ValueError(
                    "The function must return one answer a prompt. Received: "
                    f"{len(answers)} answers to {len(texts)} prompts."
                )
            judged = self._judge_words(answers, haystacks)
        else:
            padded = haystacks + haystacks[-1:] * (rows - len(haystacks))
            images = [self._images(h.images) for h in padded]
            shapes = {np.shape(image) for each in images for image in each}
            if len(shapes) > 1:
                raise ValueError(
                    "A model needs images of one size. Received: images of "
                    f"shapes {sorted(shapes)}. Make them of one size, or pass "
                    "a function of images and prompts."
                )
            images = np.stack(images)
            texts = [
                self.prompts.fill(self.template, size, question=h.question)
                for h in padded
            ]
            judged = self._judge(images, texts, haystacks)
        return [
            AnswerLog.record(index, haystack, *verdict)
            for (index, haystack), verdict in zip(batch, judged, strict=True)
        ]

    def _judge(
        self, images: np.ndarray, texts: list[str], haystacks: list[Haystack]
    ) -> list[tuple[str, bool, bool | None]]:
        """A model's answer, whether it is right, and whether it complies.

        `images` and `texts` may have more rows than there are haystacks.
        """
        if self.through == "generate":
            answers = self.prompts.generate(
                images, texts, self.max_answer_tokens
            )
            return self._judge_words(answers[: len(haystacks)], haystacks)
        logits = self.prompts.first_logits(images, texts)[: len(haystacks)]
        if self.through == "choice":
            yes, no = (
                np.logaddexp.reduce(logits[:, sorted(self.first_tokens[a])], 1)
                for a in ANSWERS
            )
            answers = np.where(yes > no, "yes", "no").tolist()
            return [
                (answer, answer == haystack.answer, None)
                for answer, haystack in zip(answers, haystacks, strict=True)
            ]
        either = set().union(*self.first_tokens.values())
        return [
            (
                self.prompts.text(token),
                token in self.first_tokens[haystack.answer],
                token in either,
            )
            for token, haystack in zip(
                logits.argmax(axis=1).tolist(), haystacks, strict=True
            )
        ]

    def _judge_words(
        self, answers: list[str], haystacks: list[Haystack]
    ) -> list[tuple[str, bool, bool | None]]:
        return [
            (
                answer,
                score(answer, haystack.answer, self.rule),
                complies(answer, self.rule),
            )
            for answer, haystack in zip(answers, haystacks, strict=True)
        ]

    def _images(self, images: Images) -> np.ndarray:
        if not isinstance(images[0], str):
            return images
        if self.root is None:
            raise ValueError(
                "`root` must be given for haystacks of paths. Received: "
                f"root=None and images[0]={images[0]!r}. Pass the folder that "
                "the paths are relative to."
            )
        height, _ = self.prompts.image_size
        return np.stack([read_image(self.root, p, height) for p in images])

    def _first_tokens(self) -> dict[str, set[int]]:
        tokens = {word: self.prompts.first_tokens(word) for word in ANSWERS}
        if tokens["yes"] & tokens["no"]:
            raise ValueError(
                "Yes and no must begin with different tokens. Received: a "
                f"tokenizer with {tokens}. Pass `through='generate'`."
            )
        return tokens
