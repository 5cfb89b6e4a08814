"""`/tokenize` and `/detokenize` of vLLM and llama.cpp: the ids that a prompt has here, and their text."""

from __future__ import annotations

from functools import partial
from typing import Any

from msgspec import json
from starlette.responses import Response

from stretto.errors import InvalidRequest, UnsupportedField
from stretto.protocol.limits import check_json
from stretto.protocol.openai import ChatRequest
from stretto.protocol.parsing import JSON, parse
from stretto.protocol.vllm import Detokenized, DetokenizeRequest, Tokenized, TokenizeRequest, TokenPiece
from stretto.server.objectives import DEFAULT
from stretto.server.state import Call
from stretto.text import messages
from stretto.text.prompts import check_token_ids
from stretto.text.tokenizer import TextModel

TOKENIZE = json.Decoder(TokenizeRequest)
DETOKENIZE = json.Decoder(DetokenizeRequest)
# By the field with the text: the fields that say how to read it, each with the value that changes nothing
# beside another text.
SOURCES: dict[str, dict[str, Any]] = {
    "prompt": {"add_special_tokens": False},
    "messages": {"tools": [], "add_generation_prompt": True, "chat_template_kwargs": {}},
    "content": {"add_special": None, "parse_special": True, "with_pieces": False},
}


async def tokenize(call: Call) -> None:
    """Answers with the token ids of a text, or of a chat as its template writes it. Raises StrettoError."""
    request = parse(TOKENIZE, call.body)
    call.label(request.model, DEFAULT)
    model = call.server.model(request.model)
    _check_source(request)
    ids = await call.server.run_text(call, partial(_ids, request, model.text))
    spelt = [model.text.tokenizer.id_to_token(id) or "" for id in ids] if request.return_token_strs else None
    answer = Tokenized(
        count=len(ids),
        max_model_len=model.info.context,
        tokens=[_piece(id, model.text) for id in ids] if request.with_pieces else [*ids],
        token_strs=spelt,
    )
    await call.respond(Response(json.encode(answer), media_type=JSON))


async def detokenize(call: Call) -> None:
    """Answers with the text of token ids. Raises StrettoError."""
    request = parse(DETOKENIZE, call.body)
    call.label(request.model, DEFAULT)
    model = call.server.model(request.model)
    if request.tokens:
        check_token_ids(request.tokens, model.info, "$.tokens")
    decode = partial(model.text.decode, request.tokens, special=True)
    text = await call.server.run_text(call, decode)
    await call.respond(Response(json.encode(Detokenized(prompt=text, content=text)), media_type=JSON))


def _check_source(request: TokenizeRequest) -> None:
    """Raises InvalidRequest unless there is one text, and UnsupportedField for what only another may have."""
    given = [name for name in SOURCES if getattr(request, name) is not None]
    if len(given) != 1:
        raise InvalidRequest(
            "send a text in $.prompt or $.content, or a chat in $.messages, and only one of them",
            param="$.prompt",
        )
    for source, options in SOURCES.items():
        for name, nothing in options.items():
            if source not in given and getattr(request, name) not in (None, nothing):
                raise UnsupportedField(
                    f"$.{name} is for $.{source}, not for $.{given[0]}; leave it out", param=f"$.{name}"
                )


def _ids(request: TokenizeRequest, text: TextModel) -> list[int]:
    if request.content is not None:
        return text.encode(request.content, special=bool(request.add_special))
    if request.messages is None:
        return text.encode(request.prompt or "", special=request.add_special_tokens is not False)
    chat = ChatRequest(
        messages=request.messages, tools=request.tools, chat_template_kwargs=request.chat_template_kwargs
    )
    if chat.chat_template_kwargs is not None:
        check_json(chat.chat_template_kwargs, "$.chat_template_kwargs")
    variables = messages.variables(chat, text)
    variables["add_generation_prompt"] = request.add_generation_prompt is not False
    shown = messages.calls(chat, text).shown
    return text.encode_rendered(text.render(messages.messages(chat, text), shown, variables))


def _piece(id: int, text: TextModel) -> TokenPiece:
    piece = text.pieces[id]
    try:
        return TokenPiece(id=id, piece=piece.decode() or text.tokenizer.id_to_token(id) or "")
    except UnicodeDecodeError:
        return TokenPiece(id=id, piece=list(piece))
