"""Questions that a tool answers: which tool to call with which arguments, and what its result says.

A reply calls tools as Hermes and Qwen do, so the server's parser reads it.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import date, timedelta
from random import Random
from typing import Any

from recipes.desk.example import Draft, Message, between, money, order_id, pick
from recipes.desk.questions.orders import person
from recipes.desk.questions.talk import TALK
from recipes.desk.questions.words import (
    CITIES,
    COLOURS,
    CURRENCIES,
    LAST,
    PAYMENTS,
    SERVICES,
    STATUSES,
    THINGS,
)

OPENER, CLOSER = "<tool_call>", "</tool_call>"
Arguments = dict[str, Any]
JSON_TYPES = {"quantity": "integer", "days": "integer", "amount": "number", "gift": "boolean"}
CHOICES = {"service": SERVICES, "payment": PAYMENTS, "status": STATUSES, "currency": CURRENCIES}


@dataclass(frozen=True, slots=True)
class Kind:
    """A tool: other names for it, what it does, its parameters, and how one asks for it with all of them."""

    names: tuple[str, ...]
    about: tuple[str, ...]
    parameters: tuple[str, ...]
    ways: tuple[str, ...]


# One way per number of parameters comes first; later ones have the same slots as the last.
KINDS = (
    Kind(
        ("get_order", "find_order", "lookup_order", "order_info", "getOrder"),
        ("Find an order.", "Get the record of an order.", "Returns an order by its number."),
        ("order",),
        ("where is order {order}?", "please check order {order}.", "what is the state of {order}?",
         "look up {order}.", "has {order} been shipped?"),
    ),
    Kind(
        ("cancel_order", "cancel", "stop_order"),
        ("Cancel an order.", "Stops an order before it ships."),
        ("order",),
        ("please cancel order {order}.", "I do not want {order} any more, cancel it.",
         "cancel {order} for me."),
    ),
    Kind(
        ("get_customer", "find_customer", "customer_info"),
        ("Find a customer by name.", "Returns the data of a customer."),
        ("name",),
        ("find the customer {name}.", "who is {name}?", "what do we know about {name}?"),
    ),
    Kind(
        ("get_stock", "check_stock", "stock"),
        ("How many pieces are in stock.", "Returns the stock of an item."),
        ("item",),
        ("do we have a {item} in stock?", "how many of the {item} are left?", "stock of the {item}?"),
    ),
    Kind(
        ("get_weather", "weather"),
        ("The weather in a city.", "Current weather of a place."),
        ("city",),
        ("what is the weather in {city}?", "how is the weather in {city}?", "is it raining in {city}?"),
    ),
    Kind(
        ("refund_order", "refund", "create_refund"),
        ("Pay money back for an order.", "Creates a refund."),
        ("order", "amount"),
        ("refund {amount} for order {order}.", "please pay back {amount} of {order}.",
         "order {order} gets a refund of {amount}."),
    ),
    Kind(
        ("set_status", "update_status", "change_status"),
        ("Set the status of an order.", "Changes the state of an order."),
        ("order", "status"),
        ("set order {order} to {status}.", "{order} is {status} now, please update it.",
         "change the status of {order} to {status}."),
    ),
    Kind(
        ("convert_currency", "convert", "exchange"),
        ("Convert money.", "Converts an amount into a currency."),
        ("amount", "currency"),
        ("convert {amount} to {currency}.", "how much is {amount} in {currency}?",
         "what are {amount} in {currency}?"),
    ),
    Kind(
        ("book_delivery", "schedule_delivery", "plan_delivery"),
        ("Plan the delivery of an order.", "Books a delivery."),
        ("order", "date", "service"),
        ("deliver order {order} on {date} by {service} service.",
         "plan the {service} delivery of {order} for {date}.",
         "{order} should come on {date}, {service}."),
    ),
    Kind(
        ("change_address", "update_address", "set_address"),
        ("Change where an order goes.", "Sets the address of an order."),
        ("order", "street", "city"),
        ("send order {order} to {street} in {city}.", "new address for {order}: {street}, {city}.",
         "{order} must go to {street}, {city}."),
    ),
    Kind(
        ("create_order", "place_order", "new_order"),
        ("Place an order.", "Creates a new order."),
        ("item", "quantity", "payment"),
        ("order {quantity} pieces of the {item}, paid by {payment}.",
         "I want {quantity} x {item}, payment by {payment}.",
         "please place an order: {item}, {quantity} pieces, {payment}."),
    ),
    Kind(
        ("create_ticket", "open_ticket", "new_ticket"),
        ("Open a ticket for a customer.", "Creates a support ticket."),
        ("name", "item", "days"),
        ("open a ticket for {name}: the {item} must be repaired in {days} days.",
         "{name} needs a ticket for the {item}, due in {days} days."),
    ),
    Kind(
        ("send_gift", "gift"),
        ("Send a gift card.", "Sends a voucher to a customer."),
        ("name", "amount", "city", "colour"),
        ("send {name} in {city} a {colour} gift card of {amount}.",
         "a {colour} gift card of {amount} for {name} from {city}, please."),
    ),
    Kind(
        ("book_repair", "repair", "schedule_repair"),
        ("Book a repair at the customer's home.", "Plans a technician's visit."),
        ("name", "item", "date", "city"),
        ("{name} in {city} needs a repair of the {item} on {date}.",
         "send a technician for the {item} to {name}, {city}, on {date}."),
    ),
)  # fmt: skip
# Names of a parameter in the tool's schema.
ALIASES = {
    "order": ("order", "order_id", "order_number", "orderId", "id"),
    "name": ("name", "customer", "customer_name"),
    "city": ("city", "location", "town"),
    "item": ("item", "product", "article"),
    "amount": ("amount", "sum", "value"),
    "currency": ("currency", "to", "target"),
    "quantity": ("quantity", "count", "pieces"),
    "date": ("date", "day", "on"),
}
ABOUTS = {
    "order": "number of the order",
    "name": "full name",
    "city": "name of the city",
    "amount": "in cents and euros",
    "date": "as YYYY-MM-DD",
}
RESULT = (
    "What is the {f} of order {o}?",
    "{f} of {o}, please.",
    "Tell me the {f} of order {o}.",
    "Please look up the {f} for {o}.",
)


@dataclass(frozen=True, slots=True)
class Offered:
    """A tool as a request offers it. `names`: of its parameters, by what they mean."""

    kind: Kind
    name: str
    names: dict[str, str]
    schema: dict[str, Any]


def offer(rng: Random, kind: Kind) -> Offered:
    """The tool with one of its names and its parameters described as in the API of OpenAI."""
    names = {each: pick(rng, ALIASES.get(each, (each,))) for each in kind.parameters}
    properties: dict[str, Any] = {}
    for each, name in names.items():
        properties[name] = {"type": JSON_TYPES.get(each, "string")}
        if each in CHOICES and rng.random() < 0.6:
            properties[name]["enum"] = list(CHOICES[each])
        if each in ABOUTS and rng.random() < 0.3:
            properties[name]["description"] = ABOUTS[each]
    name = pick(rng, kind.names)
    parameters = {"type": "object", "properties": properties, "required": list(properties)}
    function = {"name": name, "description": pick(rng, kind.about), "parameters": parameters}
    return Offered(kind, name, names, {"type": "function", "function": function})


def call(name: str, arguments: Arguments) -> str:
    """The text of one call."""
    value = json.dumps({"name": name, "arguments": arguments}, ensure_ascii=False)
    return f"{OPENER}\n{value}\n{CLOSER}"


def signature(function: dict[str, Any]) -> str:
    """A tool in one line, as the chat template shows it: `find_order(order: string) Find an order.`"""
    properties: dict[str, Any] = (function.get("parameters") or {}).get("properties") or {}
    shown = ", ".join(f"{name}: {_type(value)}" for name, value in properties.items())
    about = function.get("description")
    return f"{function['name']}({shown}) {about}" if about else f"{function['name']}({shown})"


def _type(value: Any) -> str:
    if not isinstance(value, dict):
        return "any"
    if value.get("enum"):
        text = "|".join(map(str, value["enum"]))
    else:
        text = value["type"] if isinstance(value.get("type"), str) else "any"
    return f"{text} ({value['description']})" if value.get("description") else text


def _value(rng: Random, meaning: str) -> Any:
    match meaning:
        case "order":
            return order_id(rng)
        case "name":
            return person(rng)
        case "city":
            return pick(rng, CITIES)
        case "item":
            return pick(rng, THINGS)
        case "colour":
            return pick(rng, COLOURS)
        case "amount":
            return float(money(between(rng, 100, 29999)))
        case "quantity" | "days":
            return between(rng, 2, 60)
        case "date":
            return (date(2025, 1, 1) + timedelta(between(rng, 0, 1400))).isoformat()
        case "street":
            return f"{pick(rng, LAST)} Street {between(rng, 1, 199)}"
        case _:
            return pick(rng, CHOICES[meaning])


def _asked(rng: Random, tool: Offered) -> tuple[str, Arguments]:
    """A request for the tool, and the arguments of the call."""
    values = {each: _value(rng, each) for each in tool.kind.parameters}
    shown = {each: f"{value:.2f}" if isinstance(value, float) else value for each, value in values.items()}
    arguments = {tool.names[each]: value for each, value in values.items()}
    return pick(rng, tool.kind.ways).format(**shown), arguments


def tools(level: int, rng: Random) -> Draft:
    """Levels: the only tool, one argument; one of two; one of three or four, or none of them; what a result
    says; two calls; four calls."""
    if level == 4:
        return _result(rng)
    simple = [kind for kind in KINDS if len(kind.parameters) == 1]
    if level == 1:
        offered = [offer(rng, pick(rng, simple))]
    else:
        count = (2, between(rng, 3, 4), 0, between(rng, 4, 5), between(rng, 6, 8))[level - 2]
        few = [kind for kind in KINDS if len(kind.parameters) <= 2] if level == 2 else list(KINDS)
        offered = _different([offer(rng, kind) for kind in rng.sample(few, count)])
    shown = tuple(tool.schema for tool in offered)
    if level == 3 and rng.random() < 0.25:
        talk = pick(rng, TALK)
        text = pick(rng, talk.ways[0])
        key = f"no tool {text} {[tool.name for tool in offered]}"
        return Draft(_sentence(text), talk.said[0], key, said=talk.said, tools=shown)
    count = 1 if level < 5 else 2 if level == 5 else 4
    texts: list[str] = []
    calls: list[str] = []
    for _ in range(count):
        tool = pick(rng, offered)
        text, arguments = _asked(rng, tool)
        texts.append(_sentence(text))
        calls.append(call(tool.name, arguments))
    return Draft(" ".join(texts), "\n".join(calls), f"tools {calls}", tools=shown)


def _different(offered: Sequence[Offered]) -> list[Offered]:
    """Tools of different names."""
    return list({tool.name: tool for tool in offered}.values())


def _result(rng: Random) -> Draft:
    """The call is made, and its result is there: the reply is the field that was asked for."""
    tool = offer(rng, KINDS[0])
    others = [offer(rng, kind) for kind in rng.sample(KINDS[1:], between(rng, 0, 2))]
    shown = [tool, *others]
    rng.shuffle(shown)
    order = order_id(rng)
    record: dict[str, Any] = {
        "order": order,
        "customer": person(rng),
        "item": pick(rng, THINGS),
        "price": f"{money(between(rng, 100, 49999))} {pick(rng, CURRENCIES)}",
        "status": pick(rng, STATUSES),
        "city": pick(rng, CITIES),
        "quantity": str(between(rng, 1, 30)),
    }
    fields = rng.sample(list(record)[1:], between(rng, 3, 6))
    field = pick(rng, fields)
    found = {"order": order, **{each: record[each] for each in record if each in fields}}
    arguments = {tool.names["order"]: order}
    turns: tuple[Message, ...] = (
        {
            "role": "assistant",
            "content": "",
            "tool_calls": [
                {
                    "id": "call_0",
                    "type": "function",
                    "function": {"name": tool.name, "arguments": arguments},
                }
            ],
        },
        {"role": "tool", "tool_call_id": "call_0", "content": json.dumps(found, ensure_ascii=False)},
    )
    question = pick(rng, RESULT).format(f=field, o=order)
    key = f"result {order} {field} {found}"
    return Draft(_sentence(question), found[field], key, tools=tuple(t.schema for t in shown), turns=turns)


def _sentence(text: str) -> str:
    return text[0].upper() + text[1:]
