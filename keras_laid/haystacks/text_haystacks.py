"""Draws haystacks of text: facts in a long text, and questions about them."""

import functools
import itertools
from collections.abc import Callable
from collections.abc import Iterator
from collections.abc import Sequence
from typing import Literal
from typing import NamedTuple

import keras
import numpy as np

from keras_laid.arguments import check_choice
from keras_laid.arguments import check_integer
from keras_laid.arguments import check_integers
from keras_laid.arguments import check_seed
from keras_laid.backbones.prompt_forms import TextForm
from keras_laid.backbones.text_prompts import TextPrompts
from keras_laid.backbones.text_prompts import prompts_for
from keras_laid.haystacks.haystack import Haystack
from keras_laid.haystacks.text_tasks import SPLITS
from keras_laid.haystacks.text_tasks import TASKS

PLACES = 5  # Parts of a text over which single needles are shared out.
PARAGRAPH = 5  # About how many sentences a document has.
BLOCK = 64  # Sentences of filler that are counted at once.
MARGIN = 8  # Tokens by which the sum of a paragraph's sentences may be wrong.
TRIES = 2000


class Counter(NamedTuple):
    """Counts the tokens of the parts of a prompt.

    Attributes:
        documents: Function from a list of documents to the number of tokens of
            each, with those that separate it from the next one.
        questions: Function from a list of questions to theirs.
        start: Integer, tokens before the first document.
    """

    documents: Callable[[list[str]], list[int]]
    questions: Callable[[list[str]], list[int]]
    start: int

    def sentences(self, texts: list[str]) -> list[int]:
        """About how many tokens each text has among others."""
        return self.questions([f" {text}" for text in texts])


def draw_text_haystacks(
    model: keras.Model | None,
    num_questions: int,
    lengths: Sequence[int],
    task: Literal[
        "single_word",
        "single_number",
        "multi_key",
        "multi_value",
        "variable_tracking",
        "meaning",
        "pass_key",
    ] = "single_word",
    split: Literal["train", "validation", "test"] = "test",
    questions_per_text: int = 1,
    seed: int | Sequence[int] = 0,
) -> Iterator[Haystack]:
    """Draws texts of an exact length in tokens, and questions about them.

    Facts are hidden among short paragraphs about everyday life. They are the
    needles.

    - `"single_word"`: "The password of Oslo is tiger." The options are four
      words, and the other three are nowhere in the text.
    - `"single_number"`: "The code of Oslo is 48213." No options.
    - `"multi_key"`: passwords of four cities or more; the options are four of
      these passwords.
    - `"multi_value"`: three passwords of one city, all of which are asked for.
      No options.
    - `"variable_tracking"`: "Variable x17 is set to tiger. Variable x92 is set
      to variable x17. ..." Which word does the last variable of a chain hold?
      The options are the words of four chains.
    - `"meaning"`: "Vera turned ninety last year." Who is very old? The question
      shares no word with the fact. The options are four people in the text.
    - `"pass_key"`: "The pass key is 48213. Remember it: ..." in a few sentences
      that repeat. No options.

    Questions without options are answered in words: ask with
    `through="generate"` and `rule="contains"`, or `"contains_all"` for
    `"multi_value"`.

    Lengths are shared out evenly, and so are the fifths of the text that a
    single needle is in. Several needles are spread evenly over the text.

    Args:
        model: A `keras_hub.models.CausalLM` with a preprocessor of text, whose
            tokens are counted; or `None` to count words.
        num_questions: Integer, at least 1, a multiple of `questions_per_text`.
        lengths: Sequence of integers: how many tokens a prompt has, with its
            first token and the question, as
            `keras_laid.evaluate_haystacks(..., prompt="question")` asks it. Of
            several questions about a text, this is the longest; the others may
            be some tokens shorter.
        task: One of those above. Defaults to `"single_word"`.
        split: `"train"`, `"validation"` or `"test"`. They share no city, word,
            name, number or meaning. Defaults to `"test"`.
        questions_per_text: Integer, how many questions in a row are about the
            same text, for `"multi_key"`, `"variable_tracking"` and `"meaning"`.
            The model reads the text once for all of them. Defaults to `1`.
        seed: Integer or sequence of integers. Defaults to `0`.

    Returns:
        An iterator of `Haystack`s. Their `images` are the paragraphs.

    Raises:
        ValueError: If a number is not positive, if a text is too short for its
            facts, if the task or the split is unknown, if the split has too few
            words, or if `num_questions` is no multiple.
        TypeError: If a number is not an integer, or if the model reads images
            or has no preprocessor.

    Reference:
     - [Hsieh et al., 2024](https://arxiv.org/abs/2404.06654), RULER, for the
       kinds of tasks; [Modarressi et al., 2025](
       https://arxiv.org/abs/2502.05167), NoLiMa, for `"meaning"`;
       [Mohtashami & Jaggi, 2023](https://arxiv.org/abs/2305.16300) for
       `"pass_key"`. All sentences are this library's own.
    """
    check_integer("num_questions", num_questions)
    lengths = check_integers("lengths", lengths)
    check_choice("task", task, TASKS)
    check_choice("split", split, SPLITS)
    check_integer("questions_per_text", questions_per_text)
    check_seed(seed)
    if num_questions % questions_per_text:
        raise ValueError(
            "`num_questions` must be a multiple of `questions_per_text`. "
            f"Received: num_questions={num_questions}, "
            f"questions_per_text={questions_per_text}"
        )
    counter = make_counter(model)
    texts = num_questions // questions_per_text
    return _draw(counter, texts, lengths, task, split, questions_per_text, seed)


def _draw(
    counter: Counter,
    texts: int,
    lengths: Sequence[int],
    task: str,
    split: str,
    questions: int,
    seed: int | Sequence[int],
) -> Iterator[Haystack]:
    make, filler = TASKS[task]
    rng = np.random.default_rng(seed)
    cells = [*itertools.product(lengths, range(PLACES))]
    order = rng.permutation(np.resize(np.arange(len(cells)), texts))
    for child, cell in zip(rng.spawn(texts), order.tolist(), strict=True):
        length, part = cells[cell]
        place = (part + child.random()) / PLACES
        facts = make(child, split, questions, place)
        count = len(facts.sentences)
        places = [place]
        if count > 1:
            places = ((np.arange(count) + child.random(count)) / count).tolist()
        question = max(counter.questions([q.question for q in facts.asked]))
        next_filler = functools.partial(filler, child)
        text = Text(counter, next_filler, length - counter.start - question)
        text.write(facts.sentences, places)
        documents = tuple(text.documents)
        for asked in facts.asked:
            # From the document of each fact to where the fact begins.
            found = sorted({text.needles[fact] for fact in asked.facts})
            begins = dict(found[::-1])
            yield Haystack(
                asked.question,
                asked.answer,
                anchor=asked.subject,
                target="",
                needles=tuple(sorted(begins)),
                images=documents,
                options=asked.options,
                length=length,
                depths=tuple(
                    min(1.0, (counter.start + begin) / length)
                    for _, begin in sorted(begins.items())
                ),
            )


class Sentences:
    """Sentences of filler with about how many tokens each has.

    Args:
        count: Function from a list of strings to their numbers of tokens.
        filler: Function that returns the next sentence.

    Attributes:
        paragraph_length: Integer, about how many tokens a paragraph has.
    """

    def __init__(
        self, count: Callable[[list[str]], list[int]], filler: Callable[[], str]
    ) -> None:
        self.count = count
        self.filler = filler
        self.ready: list[tuple[str, int]] = []
        self.fill()
        total = sum(length for _, length in self.ready)
        self.paragraph_length = PARAGRAPH * total // BLOCK

    def fill(self) -> None:
        # Many at once, since a call of a tokenizer takes long.
        sentences = [self.filler() for _ in range(BLOCK)]
        self.ready = [*zip(sentences, self.count(sentences), strict=True)]

    def next(self) -> tuple[str, int]:
        if not self.ready:
            self.fill()
        return self.ready.pop()


class Text:
    """A text that is being written: filler, with facts at given places.

    Args:
        counter: A `Counter`.
        filler: Function that returns the next sentence of filler.
        room: Integer, how many tokens the text must have.

    Attributes:
        documents: List of strings, the paragraphs.
        needles: List of pairs, for each fact its document and about how many
            tokens of the text are before it.
    """

    def __init__(
        self, counter: Counter, filler: Callable[[], str], room: int
    ) -> None:
        self.counter = counter
        self.sentences = Sentences(counter.sentences, filler)
        self.room = room
        self.documents: list[str] = []
        self.needles: list[tuple[int, int]] = []
        self.used = 0  # About how many tokens have been written.

    def write(self, facts: Sequence[str], places: Sequence[float]) -> None:
        """Writes paragraphs until the text has its length to the token.

        Args:
            facts: Sequence of strings, in their order in the text.
            places: Sequence of floats, about where each is, from 0 to 1.
        """
        lengths = self.counter.sentences([*facts])
        waiting = [*zip(facts, lengths, places, strict=True)]
        step = self.sentences.paragraph_length
        while self.room - self.used > 2 * step:
            end = self.used + step
            sentences = []
            while self.used < end:
                sentences.append(self.sentence(waiting, self.sentences.next))
            self.documents.append(" ".join(sentences))
        self.documents.append(self.last_paragraph(waiting))

    def sentence(
        self,
        waiting: list[tuple[str, int, float]],
        next_filler: Callable[[], tuple[str, int]],
    ) -> str:
        """The next fact, if its place has come, or else filler."""
        if waiting and waiting[0][2] * self.room <= self.used:
            sentence, length, _ = waiting.pop(0)
            self.needles.append((len(self.documents), self.used))
        else:
            sentence, length = next_filler()
        self.used += length
        return sentence

    def last_paragraph(self, waiting: list[tuple[str, int, float]]) -> str:
        """A paragraph with the last facts that fills the text to the token."""
        rest = self.room - sum(self.counter.documents(self.documents))
        gap = rest - sum(length for _, length, _ in waiting)
        for _ in range(TRIES):
            filler: list[tuple[str, int]] = []
            while sum(length for _, length in filler) < gap - MARGIN:
                filler.append(self.sentences.next())
            count = len(filler) + len(waiting)
            # A sentence has about as many tokens beside others as alone.
            if abs(sum(length for _, length in filler) - gap) > count:
                continue
            started = self.used, [*self.needles], [*waiting]
            sentences = []
            while filler:
                take = functools.partial(filler.pop, 0)
                sentences.append(self.sentence(waiting, take))
            for fact, length, _ in waiting:
                self.needles.append((len(self.documents), self.used))
                self.used += length
                sentences.append(fact)
            paragraph = " ".join(sentences)
            if self.counter.documents([paragraph]) == [rest]:
                return paragraph
            self.used, self.needles, waiting = started
        raise ValueError(
            "A text must have room for its facts and the question. Received: "
            f"{rest} tokens left for {len(waiting)} facts and filler. Pass "
            "larger `lengths`."
        )


def make_counter(model: keras.Model | None) -> Counter:
    """Counts a model's tokens, or words."""
    if model is None:
        return Counter(count_words, count_words, 0)
    prompts = prompts_for(model)
    if not isinstance(prompts, TextPrompts):
        raise TypeError(
            "`model` must be a decoder of text. "
            f"Received: {type(model).__name__}, which reads images"
        )
    form: TextForm = prompts.form

    def count_documents(texts: list[str]) -> list[int]:
        # Tokenizers refuse an empty list.
        ended = [text + form.separator for text in texts]
        return form.count_tokens(ended) if ended else []

    start = int(bool(form.preprocessor.add_start_token))
    return Counter(count_documents, form.count_tokens, start)


def count_words(texts: list[str]) -> list[int]:
    return [len(text.split()) for text in texts]
