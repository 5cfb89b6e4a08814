"""vLLM's `/tokenize` and `/detokenize`: the token ids that a prompt has here, and the text of token ids."""

from __future__ import annotations

from functools import partial

from msgspec import json
from starlette.responses import Response

from stretto.errors import InvalidRequest
from stretto.protocol.limits import check_json
from stretto.protocol.openai import ChatRequest
from stretto.protocol.parsing import JSON, parse
from stretto.protocol.vllm import Detokenized, DetokenizeRequest, Tokenized, TokenizeRequest
from stretto.server.objectives import DEFAULT
from stretto.server.state import Call
from stretto.text import messages
from stretto.text.prompts import check_token_ids
from stretto.text.tokenizer import TextModel

TOKENIZE = json.Decoder(TokenizeRequest)
DETOKENIZE = json.Decoder(DetokenizeRequest)


async def tokenize(call: Call) -> None:
    """Answers with the token ids of a text, or of a chat as its template writes it. Raises StrettoError."""
    request = parse(TOKENIZE, call.body)
    call.label(request.model, DEFAULT)
    model = call.server.model(request.model)
    if (request.prompt is None) == (request.messages is None):
        raise InvalidRequest(
            "send a text in $.prompt or a chat in $.messages, and not both", param="$.prompt"
        )
    ids = await call.server.run_text(call, partial(_ids, request, model.text))
    spelt = [model.text.tokenizer.id_to_token(id) or "" for id in ids] if request.return_token_strs else None
    answer = Tokenized(count=len(ids), max_model_len=model.info.context, tokens=ids, token_strs=spelt)
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
    await call.respond(Response(json.encode(Detokenized(text)), media_type=JSON))


def _ids(request: TokenizeRequest, text: TextModel) -> list[int]:
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
