"""Prompts that tell the passwords of ten people and ask for one of them."""

import numpy as np

PEOPLE = (
    "Anna Bob Clara David Emma Frank George Helen Ivan Julia Kevin Laura Mark "
    "Nina Oscar Paul Rosa Steve Tom Vera"
).split()
# Each password is one token.
PASSWORDS = (
    "tiger dog cat horse fish bear wolf lion bird snake mouse cow sheep frog "
    "duck goat fox eagle whale rabbit"
).split()
FACTS = 10


def passwords(tokenizer, seed, batch=16, start=()):
    """Inputs with segments and needles, and the tokens of the answers.

    Args:
        tokenizer: `keras_hub.tokenizers.Tokenizer`.
        seed: Integer, the seed of people, passwords and the person asked about.
        batch: Integer, the number of prompts. Defaults to `16`.
        start: Sequence of integers, ids of the tokens that begin each prompt.
            Defaults to `()`.
    """
    rng = np.random.default_rng(seed)
    prompts, needles, answers = [], [], []
    # Neither the first token, which many heads attend, nor the question is in a
    # segment.
    numbers = [0, *range(1, FACTS + 1), 0]
    for _ in range(batch):
        people, words = (
            rng.permutation(names)[:FACTS] for names in (PEOPLE, PASSWORDS)
        )
        facts = [
            f"The password of {person} is {word}.\n"
            for person, word in zip(people, words, strict=True)
        ]
        needle = rng.integers(FACTS)
        asked = f"he password of {people[needle]}"
        texts = [
            "Here is a list of passwords.\n",
            *facts,
            f"Question: What is t{asked}?\nAnswer: T{asked} is",
        ]
        parts = [np.asarray(tokenizer(text)) for text in texts]
        parts[0] = np.concatenate([np.array(start, "int32"), parts[0]])
        prompts.append(parts)
        needles.append(needle)
        (answer,) = np.asarray(tokenizer(f" {words[needle]}"))
        answers.append(answer)
    segments = [
        np.repeat(numbers, [len(part) for part in parts]) for parts in prompts
    ]
    inputs = {
        "token_ids": padded([np.concatenate(parts) for parts in prompts]),
        "padding_mask": padded([np.ones(len(each), int) for each in segments]),
        "segments": padded(segments),
        "needle": np.array(needles),
    }
    return inputs, np.array(answers)


def padded(rows):
    length = max(map(len, rows))
    return np.stack([np.pad(row, (0, length - len(row))) for row in rows])
