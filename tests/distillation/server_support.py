"""Log probabilities of a model, written as servers write them."""

import json

import numpy as np
from keras import ops

from keras_laid.backbones.forward import forward


def log_probabilities(model, x):
    """Those of all tokens, of shape `(batch, length, vocabulary)`."""
    logits = ops.convert_to_numpy(forward(model, x)[0].logits())
    logits = logits.astype("float64")
    logits -= logits.max(axis=-1, keepdims=True)
    logits -= np.log(np.exp(logits).sum(axis=-1, keepdims=True))
    return logits.astype("float32")


def responses(model, data):
    """Ids and log probabilities of the marked tokens of each example."""
    for index in range(len(data)):
        x, y, sample_weight = data[index]
        for labels, marked, values in zip(
            y, sample_weight > 0, log_probabilities(model, x), strict=True
        ):
            yield labels[marked].tolist(), values[marked]


def random_responses(data, vocabulary):
    """The same with random log probabilities."""
    rng = np.random.default_rng(0)
    for index in range(len(data)):
        _, y, sample_weight = data[index]
        for labels, marked in zip(y, sample_weight > 0, strict=True):
            values = rng.standard_normal((marked.sum(), vocabulary))
            total = np.log(np.exp(values).sum(axis=-1, keepdims=True))
            yield labels[marked].tolist(), values - total


def by_ids(ids, values, k):
    """As vLLM: the token itself, and the k largest."""
    return [
        {
            str(token): {
                "logprob": float(row[token]),
                "rank": int((row > row[token]).sum()) + 1,
                "decoded_token": None,
            }
            for token in dict.fromkeys([own, *np.argsort(-row)[:k].tolist()])
        }
        for own, row in zip(ids, values, strict=True)
    ]


def generated(ids, values, k, tokenizer):
    """As `CompletionOutput` of vLLM."""
    return {"index": 0, "token_ids": ids, "logprobs": by_ids(ids, values, k)}


def scored(ids, values, k, tokenizer):
    """As a completion of vLLM whose prompt ends with the response."""
    choice = {
        "index": 0,
        "logprobs": None,
        "prompt_token_ids": [2, 5, *ids],
        "prompt_logprobs": [None, {}, *by_ids(ids, values, k)],
    }
    return {"id": "cmpl-1", "choices": [choice]}


def as_text(token, tokenizer):
    """A token as a chat completion has it."""
    string = tokenizer.id_to_token(token).replace("▁", " ")
    return {"token": string, "bytes": list(string.encode())}


def as_id(token, tokenizer):
    """The same with `return_tokens_as_token_ids` of vLLM."""
    string = f"token_id:{token}"
    return {"token": string, "bytes": list(string.encode())}


def chat(ids, values, k, tokenizer, written=as_text):
    """As a chat completion, with the k largest."""
    content = [
        written(own, tokenizer)
        | {
            "logprob": float(row[own]),
            "top_logprobs": [
                written(token, tokenizer) | {"logprob": float(row[token])}
                for token in np.argsort(-row)[:k].tolist()
            ],
        }
        for own, row in zip(ids, values, strict=True)
    ]
    choice = {"index": 0, "logprobs": {"content": content, "refusal": None}}
    return {"object": "chat.completion", "choices": [choice]}


def chat_of_ids(ids, values, k, tokenizer):
    return chat(ids, values, k, tokenizer, as_id)


def write(path, lines):
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return path
