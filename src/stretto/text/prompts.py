"""Raw prompts -> token ids, and the checks that every prompt passes before it is sent to the engine.

The HTTP server and the Python API share these functions, so both refuse the same input in the same words.
"""

from __future__ import annotations

from collections.abc import Sequence

from stretto.errors import ContextExceeded, InvalidRequest
from stretto.text.tokenizer import TextModel
from stretto.types import ModelInfo, Sampling

RawPrompt = str | Sequence[int]


def encode_prompts(
    text: TextModel,
    prompts: Sequence[RawPrompt],
    info: ModelInfo,
    path: str,
    *,
    last: int | None = None,
    special: bool = True,
) -> list[tuple[int, ...]]:
    """The token ids of each prompt, or the last `last` of them. `path` names the field they came in.
    `special`: a text gets the tokenizer's own BOS or EOS.

    Raises InvalidRequest for an empty prompt or an unknown token id, ContextExceeded for a long one.
    """
    encoded: list[tuple[int, ...]] = []
    for index, prompt in enumerate(prompts):
        where = path if len(prompts) == 1 else f"{path}[{index}]"
        if isinstance(prompt, str):
            if last is None:
                check_size(prompt, text, info, where)
            prompt = text.encode(prompt, special=special)
        ids = tuple(prompt)[-last if last else 0 :]
        check_length(len(ids), 0, info, where)
        check_token_ids(ids, info, where)
        encoded.append(ids)
    return encoded


def check_size(prompt: str, text: TextModel, info: ModelInfo, path: str) -> None:
    """Raises ContextExceeded for a text whose size alone proves that it exceeds the context."""
    # A character has at most four bytes, and a token at least one.
    if 4 * len(prompt) > info.context and (least := text.least_tokens(prompt)) > info.context:
        raise ContextExceeded(
            f"{path} has {len(prompt)} characters, so at least {least} tokens, but {_maximum(info)} for"
            " prompt and answer together: send a shorter one",
            param=path,
        )


def check_token_ids(ids: Sequence[int], info: ModelInfo, path: str) -> None:
    """Raises InvalidRequest unless there is at least one id and each is a token of the model."""
    if not ids:
        raise InvalidRequest(f"{path} is empty: send at least one token", param=path)
    if min(ids) < 0 or max(ids) >= info.vocab:
        raise _unknown(next(id for id in ids if not 0 <= id < info.vocab), info, path)


def check_encoded(ids: Sequence[int], text: TextModel, info: ModelInfo, path: str) -> None:
    """The same for ids that the tokenizer made. If the model has them all, nobody looks at each."""
    if not ids or text.largest_id >= info.vocab:
        check_token_ids(ids, info, path)


def check_sampling_ids(sampling: Sampling, info: ModelInfo, root: str = "$.") -> None:
    """Raises InvalidRequest when `logit_bias` or `stop_token_ids` holds an id that is no token."""
    for id in sampling.logit_bias:
        if not 0 <= id < info.vocab:
            raise _unknown(id, info, f"{root}logit_bias")
    for index, id in enumerate(sampling.stop_token_ids):
        if not 0 <= id < info.vocab:
            raise _unknown(id, info, f"{root}stop_token_ids[{index}]")


def check_length(length: int, answer: int, info: ModelInfo, path: str) -> None:
    """Raises ContextExceeded when `length` tokens of prompt and `answer` of answer exceed the context."""
    if length + min(answer, 1) > info.context:
        raise ContextExceeded(
            f"{path} has {length} tokens, but {_maximum(info)} for prompt and answer together: send a shorter"
            " one",
            param=path,
        )
    if length + answer > info.context:
        raise ContextExceeded(
            f"the prompt has {length} tokens and the answer may have {answer}, but {_maximum(info)}: lower"
            f" max_tokens to {info.context - length}, or send a shorter prompt",
            param="$.max_tokens",
        )


def _unknown(id: int, info: ModelInfo, path: str) -> InvalidRequest:
    return InvalidRequest(
        f"{path}: the model has no token {id}; its ids are 0 to {info.vocab - 1}", param=path
    )


def _maximum(info: ModelInfo) -> str:
    """The limit in the words by which clients recognise this error."""
    return f"this model's maximum context length is {info.context} tokens"
