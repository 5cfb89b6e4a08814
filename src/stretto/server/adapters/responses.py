"""OpenAI's `/v1/responses` over the pipeline of chats: a request becomes a chat, an answer becomes items."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass
from hashlib import blake2b

from msgspec import Struct, json, structs
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

from stretto.errors import InvalidRequest
from stretto.http.request import refuse_stream
from stretto.protocol.limits import LIMITS
from stretto.protocol.openai import (
    ChatRequest,
    ChosenFunction,
    ChosenTool,
    Function,
    Generation,
    JsonSchemaFormat,
    Message,
    NamedSchema,
    ResponseFormat,
    SystemMessage,
    TextFormat,
    Tool,
)
from stretto.protocol.parsing import JSON, parse
from stretto.protocol.relay import KeptResponseId
from stretto.protocol.responses import (
    DeletedResponse,
    FlatChoice,
    FlatSchemaFormat,
    FlatTool,
    InputItem,
    ReasoningOptions,
    ResponseObject,
    ResponseRequest,
    TextOptions,
)
from stretto.server.adapters.naming import fields_named, renamed
from stretto.server.adapters.response_events import EventWriter
from stretto.server.adapters.response_items import ItemConversation
from stretto.server.adapters.response_store import KeptResponse, ResponseStore
from stretto.server.generation import run
from stretto.server.state import Call, Server
from stretto.server.validation import AnswerSpec, check_chat


class KeptItems(Struct, frozen=True):
    """The part of a kept answer that a later request may refer to."""

    output: list[InputItem]


DECODER = json.Decoder(ResponseRequest)
KEPT_ITEMS = json.Decoder(KeptItems)
ITEMS = json.Decoder(list[InputItem])
KEPT = json.Decoder(KeptResponseId)
PATH = "/v1/responses"
DIFFERENT = {"max_tokens", "n", "store", "stream_options", "response_format"}
SAME = [name for name in Generation.__struct_fields__ if name not in DIFFERENT]
PREVIOUS = "$.previous_response_id"
NAMES = (
    ("$.messages", "$.input"),
    ("$.max_tokens", "$.max_output_tokens"),
    ("$.max_completion_tokens", "$.max_output_tokens"),
    ("lower max_tokens", "lower max_output_tokens"),
    ("$.reasoning_effort", "$.reasoning.effort"),
    ("$.response_format.json_schema", "$.text.format"),
    ("$.response_format", "$.text.format"),
    ("$.tool_choice.function", "$.tool_choice"),
    (".function.parameters", ".parameters"),
    (".function.strict", ".strict"),
    (".function.name", ".name"),
)


@dataclass(frozen=True, slots=True)
class Responses:
    """The handlers of `/v1/responses` and of the answers that the store keeps."""

    server: Server
    store: ResponseStore

    def routes(self) -> list[Route]:
        """The routes of kept answers."""
        path = PATH + "/{id}"
        return [Route(path, self.retrieve, methods=["GET"]), Route(path, self.delete, methods=["DELETE"])]

    async def create(self, call: Call) -> None:
        """Answers one request. Raises StrettoError, in the words of this API."""
        request = parse(DECODER, call.body)
        items, history = self._items(request, call.tenant)
        conversation = conversation_of(request, items, history)
        with fields_named([*conversation.names(), *NAMES]):
            await self._answer(call, request, chat_of(request, conversation.messages), items)

    async def retrieve(self, request: Request) -> Response:
        """A kept answer. Raises UnknownResponse, and UnsupportedField if it is wanted as a stream."""
        refuse_stream(request.query_params)
        return self._kept(request.path_params["id"], self.server.tenant(request.headers))

    async def delete(self, request: Request) -> Response:
        """Drops a kept answer."""
        return self._deleted(request.path_params["id"], self.server.tenant(request.headers))

    async def retrieve_relayed(self, call: Call) -> None:
        """A kept answer, for a gateway. Raises UnknownResponse."""
        await call.respond(self._kept(parse(KEPT, call.body).id, call.tenant))

    async def delete_relayed(self, call: Call) -> None:
        """Drops a kept answer, for a gateway. Raises UnknownResponse."""
        await call.respond(self._deleted(parse(KEPT, call.body).id, call.tenant))

    def _kept(self, id: str, tenant: str) -> Response:
        return Response(self.store.get(id, tenant, f"{PATH}/{id}").answer, media_type=JSON)

    def _deleted(self, id: str, tenant: str) -> Response:
        self.store.delete(id, tenant, f"{PATH}/{id}")
        return Response(json.encode(DeletedResponse(id=id)), media_type=JSON)

    def _items(self, request: ResponseRequest, tenant: str) -> tuple[list[InputItem], int]:
        """All items, and how many of them the store had. Raises UnknownResponse, and InvalidRequest for too
        many items."""
        items: list[InputItem] = []
        if request.previous_response_id is not None:
            items = ITEMS.decode(self.store.get(request.previous_response_id, tenant, PREVIOUS).conversation)
        history = len(items)
        if isinstance(request.input, str):
            items.append(InputItem(role="user", content=request.input))
        else:
            items += [self._referred(item, at, tenant) for at, item in enumerate(request.input)]
        if len(items) > LIMITS["messages"].most:
            raise LIMITS["messages"].error("$.input", len(items))
        return items, history

    def _referred(self, item: InputItem, at: int, tenant: str) -> InputItem:
        """The item, or the one that it refers to. Raises UnknownResponse if no kept answer has that one."""
        if not item.refers:
            return item
        path = f"$.input[{at}].id"
        if item.id is None:
            raise InvalidRequest(f"{path} is missing", param=path)
        answer = KEPT_ITEMS.decode(self.store.holding(item.id, tenant, path).answer)
        return next(each for each in answer.output if each.id == item.id)  # the store says that it is there

    async def _answer(
        self, call: Call, request: ResponseRequest, chat: ChatRequest, items: list[InputItem]
    ) -> None:
        keeps = self.store.on and request.store is not False
        streamed = bool(request.stream)
        id = f"{self.server.store_id}{blake2b(call.nonce.encode(), digest_size=12).hexdigest()}"
        if call.continuation is not None:
            id = call.continuation.id
        call.feedback_ids = call.exchange.id, id

        def done(response: ResponseObject) -> None:
            if keeps:
                conversation = json.encode([*items, *response.output])
                ids = tuple(item.id for item in response.output)
                self.store.put(
                    response.id, KeptResponse(call.tenant, json.encode(response), conversation, ids)
                )

        def writer_of(spec: AnswerSpec, tier: str) -> EventWriter:
            created = int(time.time()) if call.continuation is None else call.continuation.created
            response = response_of(request, spec, tier, keeps)
            response = structs.replace(response, id=id, created_at=created)
            relaxed = [renamed(path, NAMES) for path in spec.relaxed]
            writer = EventWriter(response, done, streamed=streamed, relaxed=relaxed)
            call.error_event = writer.failed
            return writer

        await run(call, chat, check_chat, writer_of)


def conversation_of(request: ResponseRequest, items: Sequence[InputItem], history: int) -> ItemConversation:
    """The messages of a request. The first `history` items come from the store. Raises InvalidRequest."""
    found = ItemConversation()
    if request.instructions is not None:
        found.messages.append(SystemMessage(content=request.instructions))
        found.places["$.messages[0]"] = "$.instructions"
    for at, item in enumerate(items):
        path = PREVIOUS if at < history else f"$.input[{at - history}]"
        found.add(item, "$.input" if isinstance(request.input, str) and at == history else path)
    found.end_answer()
    if not found.messages:
        raise InvalidRequest("$.input is empty: send a text or items", param="$.input")
    return found


def chat_of(request: ResponseRequest, messages: list[Message]) -> ChatRequest:
    """The chat request that asks for the same answer."""
    choice = request.tool_choice
    if isinstance(choice, FlatChoice):
        choice = ChosenTool(type="function", function=ChosenFunction(name=choice.name))
    return ChatRequest(
        messages=messages,
        max_completion_tokens=request.max_output_tokens,
        response_format=_format(request),
        tools=[_tool(tool) for tool in request.tools or ()] or None,
        tool_choice=choice,
        parallel_tool_calls=request.parallel_tool_calls,
        reasoning_effort=None if request.reasoning is None else request.reasoning.effort,
        chat_template_kwargs=request.chat_template_kwargs,
        **{name: getattr(request, name) for name in SAME},
    )


def response_of(request: ResponseRequest, spec: AnswerSpec, tier: str, kept: bool) -> ResponseObject:
    """The answer to a request before anything is generated, without its id and its time."""
    text = request.text or TextOptions()
    return ResponseObject(
        id="",
        created_at=0,
        model=spec.model.name,
        instructions=request.instructions,
        previous_response_id=request.previous_response_id,
        tools=request.tools or [],
        tool_choice=request.tool_choice or "auto",
        parallel_tool_calls=request.parallel_tool_calls is not False,
        text=structs.replace(text, format=text.format or TextFormat()),
        reasoning=request.reasoning or ReasoningOptions(),
        max_output_tokens=request.max_output_tokens,
        temperature=spec.sampling.temperature,
        top_p=spec.sampling.top_p,
        store=kept,
        metadata=request.metadata or {},
        user=request.user,
        service_tier=tier,
    )


def _format(request: ResponseRequest) -> ResponseFormat | None:
    form = None if request.text is None else request.text.format
    if isinstance(form, FlatSchemaFormat):
        return JsonSchemaFormat(json_schema=NamedSchema(**structs.asdict(form)))
    return form


def _tool(tool: FlatTool) -> Tool:
    function = Function(
        name=tool.name, description=tool.description, parameters=tool.parameters, strict=tool.strict
    )
    return Tool(type="function", function=function)
