"""Entries of MM-NIAH and MMLongBench."""

import json

ANSWERS = {
    "retrieval-text": "oak",
    "retrieval-image": 1,
    "counting-text": [1, 2],
    "counting-image": [0, 3],
    "reasoning-text": "two",
    "reasoning-image": 1,
}
CHOICES = ["a/a.jpg", "a/b.jpg"]
PARAGRAPHS = [
    {"type": "text", "text": "A park."},
    {"type": "image", "text": "<image>"},
]


def write_lines(path, *entries):
    lines = [json.dumps(entry) + "\n" for entry in entries]
    path.write_text("".join(lines))
    return path


def niah_entry(task="retrieval-text", meta=None, **values):
    """An entry of MM-NIAH."""
    choices = (
        CHOICES if task in ("retrieval-image", "reasoning-image") else None
    )
    return {
        "id": 0,
        "images_list": ["obelics/1.jpg"],
        "context": "A park. <image> The tree is an oak.",
        "question": "Which tree?",
        "answer": ANSWERS[task],
        "meta": {
            "placed_depth": 0.25,
            "context_length": 1023,
            "choices": None,
            "choices_image_path": choices,
            **(meta or {}),
        },
        **values,
    }


def long_bench_entry(task="vh_single", **values):
    """An entry of MMLongBench."""
    if task.startswith("vh"):
        return {
            "id": "x1",
            "ctxs": ["coco/1.jpg", "coco/2.jpg"],
            "question": "For the image with a cat, is there a dog?",
            "answer": "Yes",
            **values,
        }
    entry = {
        "id": "x1",
        "ctxs": PARAGRAPHS,
        "question": "Which tree?",
        "answer": ANSWERS[task],
        "image_list": ["mm-niah/1.jpg"],
    }
    if task == "counting-image":
        entry["question"] = "How often is <image> in each image?"
        entry["needle_image_list"] = ["mm-niah/2.jpg"]
    elif task.endswith("image"):
        entry["choices_image"] = CHOICES
    return {**entry, **values}
