"""Asks a model about haystacks, and judges its answers."""

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
from keras_laid.backbones.image_prompts import TEXT_LENGTH
from keras_laid.backbones.text_prompts import prompts_for
from keras_laid.haystacks.answer_log import AnswerLog
from keras_laid.haystacks.coco import read_image
from keras_laid.haystacks.haystack import Haystack
from keras_laid.haystacks.questions import PROMPTS
from keras_laid.haystacks.results import HaystackResults
from keras_laid.haystacks.scoring import Rule
from keras_laid.haystacks.scoring import check_rule
from keras_laid.haystacks.scoring import check_rule_for
from keras_laid.haystacks.scoring import complies
from keras_laid.haystacks.scoring import rule_name
from keras_laid.haystacks.scoring import score
from keras_laid.typing import Images
from keras_laid.typing import PathLike

WAYS = ("logits", "choice", "generate")
SHOWN = ("all", "needles", "none")
GRAY = 128
IMAGE_LENGTH = 256  # About how many tokens an image takes, for a function.

# An answer, whether it is right, and whether it is an option at all.
Verdict = tuple[str, bool, bool | None]


def check_asking(
    through: str = "logits",
    rule: Rule = "strict",
    prompt: str = "question",
    shown: str = "all",
    max_answer_tokens: int = 8,
    root: PathLike | None = None,
) -> None:
    """Refuses arguments of `evaluate_haystacks`, whatever the model."""
    check_choice("through", through, WAYS)
    check_rule(rule)
    if rule != "strict" and through != "generate":
        raise ValueError(
            "Only the strict rule is defined for logits; the others read "
            "words, which only `through='generate'` makes. Received: "
            f"rule={rule!r}, through={through!r}. Pass `through='generate'`, "
            "or leave out `rule`."
        )
    check_kind("prompt", prompt, str, "a string")
    names = _names_in(PROMPTS.get(prompt, prompt))
    if names not in (["question"], ["images", "question"]):
        raise ValueError(
            f"`prompt` must be one of {tuple(PROMPTS)}, or hold '{{question}}' "
            "once and at most one '{images}', no other braces. Received: "
            f"prompt={prompt!r:.80}. Write '{{{{' for a brace."
        )
    check_choice("shown", shown, SHOWN)
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
        rule: Rule = "strict",
        prompt: str = "question",
        shown: Literal["all", "needles", "none"] = "all",
        max_answer_tokens: int = 8,
        root: PathLike | None = None,
    ) -> None:
        check_asking(through, rule, prompt, shown, max_answer_tokens, root)
        self.template = PROMPTS.get(prompt, prompt)
        self.through = through
        self.rule = rule
        self.shown = shown
        self.max_answer_tokens = max_answer_tokens
        self.root = root
        self.function, self.prompts = None, None
        # From a possible answer to the tokens that it can begin with.
        self._first_tokens: dict[str, set[int]] = {}
        if callable(model) and not isinstance(model, (keras.Model, type)):
            if through != "generate":
                raise ValueError(
                    "A function answers in words. Received: a function and "
                    f"through={through!r}. Pass `through='generate'`."
                )
            self.function = model
        else:
            self.prompts = prompts_for(model)

    def evaluate(
        self,
        haystacks: Iterable[Haystack],
        tokens_per_batch: int,
        output: PathLike | None,
        verbose: bool,
    ) -> HaystackResults:
        """Asks all questions, those with equally many images in batches."""
        check_iterable(haystacks)
        settings = self.settings()
        if output is not None:  # All weights are read for it.
            settings |= self.origin()
        log = AnswerLog(output, settings)
        # From a number of images and a length to numbered haystacks.
        waiting: dict[tuple[int, int], list[tuple[int, Haystack]]] = {}
        filled = set()  # Of which a full batch was asked.
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
                self._check(index, haystack)
                if log.has(index, haystack):
                    progress.update()
                    continue
                kind = self._kind(haystack)
                rows = max(1, tokens_per_batch // kind[1])
                batch = waiting.setdefault(kind, [])
                if self._shares and len(texts_of(batch, haystack)) > rows:
                    ask(batch, rows)
                    filled.add(kind)
                    batch = waiting[kind] = []
                batch.append((index, haystack))
                if not self._shares and len(batch) == rows:
                    ask(waiting.pop(kind), rows)
                    filled.add(kind)
            for kind, batch in sorted(waiting.items()):
                # As many rows as before, so that nothing is compiled again.
                rows = max(1, tokens_per_batch // kind[1])
                ask(batch, rows if kind in filled else len(batch))
        results = HaystackResults(log.records(), log.settings)
        if output is not None:
            results.save(output)
        return results

    def settings(self) -> dict[str, Any]:
        """How the model is asked."""
        settings: dict[str, Any] = {
            "through": self.through,
            "rule": rule_name(self.rule),
            "prompt": self.template,
            "shown": self.shown,
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

    def _check(self, index: int, haystack: object) -> None:
        """Refuses an object that is no haystack, or cannot be asked about."""
        if not isinstance(haystack, Haystack):
            raise TypeError(
                "`haystacks` must hold `keras_laid.haystacks.Haystack`"
                f"s. Received: {type(haystack).__name__} at position {index}. "
                "Make them with `Haystack.from_example` or "
                "`question.haystack`."
            )
        if (
            self.prompts is not None
            and not self.prompts.takes_images
            and not all(isinstance(each, str) for each in haystack.images)
        ):
            raise TypeError(
                "A decoder of text must be asked about documents. Received: "
                f"haystack {index} with arrays as its images. Pass strings."
            )
        if self.shown == "needles" and not haystack.needles:
            raise ValueError(
                "Only haystacks with needles can be shown as their needles. "
                f"Received: shown='needles' and haystack {index} without any. "
                "Leave it out, or pass another `shown`."
            )
        if self.through == "generate":
            check_rule_for(self.rule, haystack.options)
        elif haystack.options is not None:
            self._check_first_tokens(haystack.options)
        elif self.through == "choice":
            raise ValueError(
                "`through='choice'` compares the options of a question. "
                f"Received: haystack {index} with options=None. Pass "
                "`through='generate'`, or give it options."
            )

    def _check_first_tokens(self, options: tuple[str, ...]) -> None:
        tokens = {option: self._tokens_of(option) for option in options}
        if len(set().union(*tokens.values())) < sum(map(len, tokens.values())):
            raise ValueError(
                "The options of a question must begin with different tokens. "
                f"Received: a tokenizer with {tokens}. Name the options by "
                "letters in the question, or pass `through='generate'`."
            )

    def _tokens_of(self, answer: str) -> set[int]:
        if answer not in self._first_tokens:
            self._first_tokens[answer] = self.prompts.first_tokens(answer)
        return self._first_tokens[answer]

    def _shown_images(self, haystack: Haystack) -> Images:
        """The images, or documents, that the model reads."""
        if self.shown == "needles":
            return [haystack.images[needle] for needle in haystack.needles]
        if self.shown == "none" and self._replaces_by_nothing:
            return []
        return haystack.images

    @property
    def _shares(self) -> bool:
        """Whether questions about the same documents share a pass.

        Then a batch is as many documents as fit, with all their questions.
        """
        return (
            self.prompts is not None
            and self.prompts.reads_once
            and self.through != "generate"
        )

    @property
    def _replaces_by_nothing(self) -> bool:
        """Whether images that are not shown leave no gray one in their place.

        A function and a decoder of text can do without any.
        """
        return self.prompts is None or not self.prompts.takes_images

    def _kind(self, haystack: Haystack) -> tuple[int, int]:
        """Number of images and length, which haystacks of a batch share."""
        images = self._shown_images(haystack)
        if self.prompts is None:
            return len(images), len(images) * IMAGE_LENGTH + TEXT_LENGTH
        prompt = self._prompt(haystack, len(images))
        return len(images), self.prompts.length(images, prompt)

    def _prompt(self, haystack: Haystack, images: int) -> str:
        return self.prompts.fill(
            self.template, images, question=haystack.question
        )

    def _ask(
        self, batch: list[tuple[int, Haystack]], rows: int
    ) -> list[dict[str, Any]]:
        """Answers haystacks with equally many images: a list of records."""
        haystacks = [haystack for _, haystack in batch]
        if self.function is not None:
            judged = self._judge_words(self._call(haystacks), haystacks)
        else:
            judged = self._ask_model(haystacks, rows)
        return [
            AnswerLog.record(index, haystack, *verdict)
            for (index, haystack), verdict in zip(batch, judged, strict=True)
        ]

    def _call(self, haystacks: list[Haystack]) -> list[str]:
        """Answers of a user's function."""
        texts = [
            self.template.format(images="", question=haystack.question)
            for haystack in haystacks
        ]
        images: list[Any] = [self._shown_images(h) for h in haystacks]
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
        return answers

    def _ask_model(self, haystacks: list[Haystack], rows: int) -> list[Verdict]:
        """Verdicts on a model's answers, in a batch padded to `rows` rows."""
        padded = haystacks + haystacks[-1:] * (rows - len(haystacks))
        images: Any = [self._shown_images(h) for h in padded]
        texts = [
            self._prompt(haystack, len(shown))
            for haystack, shown in zip(padded, images, strict=True)
        ]
        if self.prompts.takes_images:
            images = self._stacked(images)
        if self.through == "generate":
            answers = self.prompts.generate(
                images, texts, self.max_answer_tokens
            )
            return self._judge_words(answers[: len(haystacks)], haystacks)
        logits = self.prompts.first_logits(images, texts)[: len(haystacks)]
        judge = self._judge_choice
        if self.through == "logits":
            judge = self._judge_token
        return [judge(*each) for each in zip(logits, haystacks, strict=True)]

    def _judge_choice(self, logits: np.ndarray, haystack: Haystack) -> Verdict:
        """By logits of shape `(vocabulary,)`, the most likely option."""
        likely = [
            np.logaddexp.reduce(logits[sorted(self._tokens_of(option))])
            for option in haystack.options
        ]
        answer = haystack.options[int(np.argmax(likely))]
        return answer, answer == haystack.answer, None

    def _judge_token(self, logits: np.ndarray, haystack: Haystack) -> Verdict:
        """By logits of shape `(vocabulary,)`, the most likely token."""
        token = int(logits.argmax())
        complied = None
        if haystack.options is not None:
            known = map(self._tokens_of, haystack.options)
            complied = any(token in tokens for tokens in known)
        right = token in self._tokens_of(haystack.answer)
        return self.prompts.text(token), right, complied

    def _judge_words(
        self, answers: list[str], haystacks: list[Haystack]
    ) -> list[Verdict]:
        return [
            (
                answer,
                score(answer, haystack.answer, self.rule, haystack.options),
                complies(answer, self.rule, haystack.options),
            )
            for answer, haystack in zip(answers, haystacks, strict=True)
        ]

    def _stacked(self, images: list[Images]) -> np.ndarray:
        """Images of prompts as an array; gray ones if none are shown."""
        loaded = [self._load(each) for each in images]
        shapes = {np.shape(image) for each in loaded for image in each}
        if len(shapes) > 1:
            raise ValueError(
                "A model needs images of one size. Received: images of "
                f"shapes {sorted(shapes)}. Make them of one size, or pass "
                "a function of images and prompts."
            )
        stacked = np.stack(loaded)
        if self.shown == "none":
            return np.full_like(stacked, GRAY)
        return stacked

    def _load(self, images: Images) -> Images:
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


def texts_of(
    batch: Sequence[tuple[int, Haystack]], another: Haystack
) -> set[tuple[str, ...]]:
    """The different documents of haystacks of text."""
    return {tuple(h.images) for h in (*(each for _, each in batch), another)}
