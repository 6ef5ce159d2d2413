"""Asks a model questions about haystacks, and counts its right answers."""

from collections.abc import Callable
from collections.abc import Iterable
from collections.abc import Sequence
from typing import Literal

import keras

from keras_laid.arguments import check_integer
from keras_laid.haystacks.asking import Asking
from keras_laid.haystacks.haystack import Haystack
from keras_laid.haystacks.results import HaystackResults
from keras_laid.haystacks.scoring import Rule
from keras_laid.typing import Images
from keras_laid.typing import PathLike


def evaluate_haystacks(
    model: keras.Model | Callable[[list[Images], list[str]], Sequence[str]],
    haystacks: Iterable[Haystack],
    through: Literal["logits", "choice", "generate"] = "logits",
    rule: Rule = "strict",
    prompt: str = "question",
    shown: Literal["all", "needles", "none"] = "all",
    max_answer_tokens: int = 8,
    tokens_per_batch: int = 8192,
    root: PathLike | None = None,
    output: PathLike | None = None,
    verbose: bool = True,
) -> HaystackResults:
    """Measures how often a model answers questions about haystacks right.

    A model can be asked in three ways:

    - `"logits"`: of the whole vocabulary, the most likely token after the
      prompt must be one that the right answer begins with.
    - `"choice"`: only the options of the question are compared; the right one
      must be the most likely to begin the answer.
    - `"generate"`: the model answers in words, greedily, and `rule` says
      whether they are right; see `keras_laid.haystacks.score`.

    Two reference lines tell what a score means: `shown="none"`, where a model
    can only guess, and `shown="needles"`, the best that it can do in any
    haystack.

    Nothing here is random: questions, images and their order are those of the
    haystacks, which are drawn with a seed. The order of the haystacks does not
    matter.

    Example:

    ```python
    haystacks = draw_haystacks(Digits("test"), 4096, sizes=(1, 10, 100))
    results = evaluate_haystacks(model, haystacks, output="runs/mine")
    effective_window(results.accuracy)
    ```

    Args:
        model: A `keras_hub.models.PaliGemmaCausalLM`, `Gemma3CausalLM`,
            `Gemma4CausalLM` or `Qwen3_5CausalLM` with a vision encoder, or a
            `keras_laid.MultiImagePaliGemmaCausalLM`, with its preprocessor; any
            other `keras_hub.models.CausalLM` with a preprocessor of text, for
            haystacks of documents; or a function of a list of images for each
            question (as the haystacks hold them) and a list of prompts, which
            returns a list of strings.
        haystacks: Iterable of `keras_laid.haystacks.Haystack`, of any sizes in
            any order: `draw_haystacks(...)`, `draw_text_haystacks(...)`,
            `question.haystack(rng)` of `read_questions`, or
            `Haystack.from_example(example)` of the dataset. No more than a
            batch of each size is held at a time. By `"logits"` and `"choice"`,
            a decoder of text reads documents once for all questions about them
            that follow each other, if its layers allow it: not with recurrent
            layers (Qwen 3.5), nor with Phi-3's frequencies for long contexts.
        through: `"logits"`, `"choice"` or `"generate"`, the only one for a
            function. Defaults to `"logits"`.
        rule: `"strict"`; or, with `through="generate"`, also `"official"`,
            the benchmark's own, by which "yes or no" is always right,
            `"exact"`, `"contains"`, `"contains_all"`, or a function of an
            answer and the expected one that returns a boolean; see
            `keras_laid.haystacks.score`.
            Defaults to `"strict"`.
        prompt: `"question"`, only the question; `"official"`, the benchmark's
            own prompt; or a string with `{question}` and maybe `{images}` in
            it, such as `"answer en {question}\\n"`. Images stand first unless
            it says where. Defaults to `"question"`.
        shown: `"all"` images; only the `"needles"`; or `"none"`: gray images
            in the place of all, so that prompts are as long as before. A
            function and a decoder of text get no images instead. Accuracy is
            by the size of the whole haystack in each case. Defaults to `"all"`.
        max_answer_tokens: Integer, for `through="generate"`. For Qwen 3.5 with
            images each token takes a pass over the prompt. Defaults to `8`.
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
            preprocessor or two options begin with the same token; if a question
            has no options where they are compared, or no needle where only
            needles are shown; if images have the wrong size or are not `uint8`;
            or if `output` holds answers of another model, or of the same one in
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
    asking = Asking(
        model, through, rule, prompt, shown, max_answer_tokens, root
    )
    check_integer("tokens_per_batch", tokens_per_batch)
    return asking.evaluate(haystacks, tokens_per_batch, output, verbose)
