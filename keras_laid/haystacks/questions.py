"""The wording of questions, most of it of the Visual Haystacks benchmark."""

from collections.abc import Sequence

ANSWERS = ("yes", "no")
LETTERS = ("A", "B", "C", "D")
# Prompts by name, with the question in them.
PROMPTS = {
    "question": "{question}",
    "official": "You are given a set of images. Please answer the following "
    "question in Yes or No: {question}",
}


def article(name: str) -> str:
    """`"a seven"`, `"an eight"`, `"a unicorn"`, `"an hourglass"`.

    By spelling, with one exception for each sound: `"an one"` is what the
    embedded presets were trained on.
    """
    vowel = name[0].lower() in "aeiou" and not name.startswith("uni")
    return f"{'an' if vowel or name.startswith('hour') else 'a'} {name}"


def question(anchor: str, target: str) -> str:
    """The question of the Visual Haystacks benchmark, with one needle."""
    return f"For the image with {article(anchor)}, is there {article(target)}?"


def multi_needle_question(anchor: str, target: str, quantifier: str) -> str:
    """The benchmark's question with several needles.

    Args:
        anchor: String, a name; every needle shows it.
        target: String, the name asked for.
        quantifier: `"all"` or `"any"` of the needles.

    Returns:
        A string.
    """
    return (
        f"For all images with {article(anchor)}, "
        f"do {quantifier} of them contain {article(target)}?"
    )


def present_question(anchor: str) -> str:
    """Asks whether any image shows something: yes or no."""
    return f"Is there an image with {article(anchor)}?"


def count_question(anchor: str) -> str:
    """Asks how many images show something; the answer is a number."""
    return (
        f"How many images show {article(anchor)}? Answer with a single number."
    )


def which_image_question(anchor: str, places: Sequence[int]) -> str:
    """Asks which of four images shows something; the answer is a letter.

    Args:
        anchor: String, a name.
        places: Sequence of four integers, positions of images from 0. The
            question counts from 1.

    Returns:
        A string.
    """
    options = ", ".join(
        f"{letter}: image {place + 1}"
        for letter, place in zip(LETTERS, places, strict=True)
    )
    return (
        f"Which image shows {article(anchor)}? {options}. "
        "Answer with a single letter."
    )
