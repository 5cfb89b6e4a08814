"""Questions about order records that the prompt shows: look up a field, count, extract to JSON."""

from __future__ import annotations

import json
from itertools import pairwise
from random import Random

from recipes.desk.example import Draft, between, money, order_id, pick
from recipes.desk.questions.words import (
    CITIES,
    COLOURS,
    CURRENCIES,
    FIRST,
    LAST,
    PAYMENTS,
    SERVICES,
    STATUSES,
    THINGS,
)

FIELDS = ("customer", "item", "price", "status", "city", "payment", "service", "quantity")
ASK = (
    "What is the {f} of order {o}?",
    "Which {f} does order {o} have?",
    "Tell me the {f} of {o}.",
    "{o}: {f}?",
    "Please look up the {f} for order {o}.",
    "I need the {f} of order {o}, please.",
    "What {f} is recorded for order {o}?",
    "Find the {f} of order {o}.",
)
ASK_BY_NAME = (
    "What is the {f} of {n}'s order?",
    "{n} is asking: what is the {f} of my order?",
    "Look up the {f} for the customer {n}.",
    "Customer {n}: {f}?",
)
ASK_BY_ITEM = (
    "What is the {f} of the order with the {i}?",
    "Somebody ordered the {i}. What is the {f}?",
    "Look up the {f} for the {i}.",
)
ASK_WHO = (
    "Who placed order {o}?",
    "Who ordered {o}?",
    "Whose order is {o}?",
    "Which customer has order {o}?",
)
ASK_WHO_ITEM = ("Who ordered the {i}?", "Who bought the {i}?", "Which customer ordered the {i}?")
ASK_ORDER = ("Which order did {n} place?", "What is the order number of {n}?", "Find the order of {n}.")
ASK_ITEM_ORDER = ("Which order contains the {i}?", "What is the order number for the {i}?")
FOLLOW = (
    "And the {f}?",
    "And its {f}?",
    "What about the {f}?",
    "Thanks. And the {f}?",
    "Now the {f}, please.",
)
COUNT = (
    "How many orders are {s}?",
    "Count the orders with status {s}.",
    "How many orders have the status {s}?",
)
HEADS = (
    "",
    "Orders:\n",
    "Order records:\n",
    "Here are the records.\n",
    "Records:\n",
    "These are our orders:\n",
)

NO_SUCH_ORDER = (
    "There is no order {} in the records.",
    "In den Daten gibt es keine Bestellung {}.",
    "No hay ningún pedido {} en los datos.",
)
FOLLOW_ON = (
    "Order {} was replaced, perhaps more than once. Which order is the last?",
    "Follow the replacements of {}. Where do they end?",
    "Which order finally replaces {}?",
)

Record = dict[str, str]


def person(rng: Random) -> str:
    """A full name, now and then a first name alone."""
    if rng.random() < 0.06:
        return pick(rng, FIRST)
    return f"{pick(rng, FIRST)} {pick(rng, LAST)}"


def records(rng: Random, count: int, fields: tuple[str, ...]) -> list[Record]:
    """`count` orders; order number, customer and item are unique, so each of them identifies an order."""
    currency = pick(rng, CURRENCIES)
    rows: list[Record] = []
    whole: set[str] = set()
    words: set[str] = set()
    while len(rows) < count:
        row: Record = {"order": _near(rng, rows)}
        for field in fields:
            row[field] = _value(rng, field, currency)
        names = {row["order"], row.get("customer", row["order"]), row.get("item", row["order"])}
        parts = {part for name in names for part in name.split()}
        # With "lamp" beside "blue lamp", a question about the lamp would be ambiguous.
        if whole.isdisjoint(names | parts) and words.isdisjoint(names):
            whole |= names
            words |= parts
            rows.append(row)
    return rows


def _near(rng: Random, rows: list[Record]) -> str:
    """A new order number. Sometimes it differs in one digit from an order that exists."""
    if not rows or rng.random() > 0.2:
        return order_id(rng)
    number = pick(rng, rows)["order"]
    place = len(number) - between(rng, 1, 2)
    return number[:place] + str(between(rng, 0, 9)) + number[place + 1 :]


def _value(rng: Random, field: str, currency: str) -> str:
    match field:
        case "customer":
            return person(rng)
        case "item":
            return f"{pick(rng, COLOURS)} {pick(rng, THINGS)}" if rng.random() < 0.85 else pick(rng, THINGS)
        case "price":
            return f"{money(between(rng, 100, 49999))} {currency}"
        case "order":
            return order_id(rng)
        case "status":
            return pick(rng, STATUSES)
        case "city":
            return pick(rng, CITIES)
        case "payment":
            return pick(rng, PAYMENTS)
        case "service":
            return pick(rng, SERVICES)
        case _:
            return str(between(rng, 1, 30))


def show(rng: Random, rows: list[Record], table: bool) -> str:
    """The records as text in one of several layouts. Each record begins on a new line."""
    style = between(rng, 0, 5 if table else 3)
    fields = list(rows[0])
    lines: list[str] = []
    if style == 4:
        lines.append(",".join(fields))
    elif style == 5:
        lines.append(" | ".join(fields))
    for row in rows:
        match style:
            case 0:
                lines.append("Order " + ", ".join(f"{k} {v}" if k != "order" else v for k, v in row.items()))
            case 1:
                lines.append("\n".join(f"{k}: {v}" for k, v in row.items()) + "\n")
            case 2:
                lines.append(" | ".join(f"{k}: {v}" for k, v in row.items()))
            case 3:
                lines.append(json.dumps(row))
            case 4:
                lines.append(",".join(row.values()))
            case _:
                lines.append(" | ".join(row.values()))
    return pick(rng, HEADS) + "\n".join(lines).rstrip("\n")


def some(rng: Random, rows: tuple[str, ...], count: int) -> tuple[str, ...]:
    """`count` of the rows, in their own order."""
    chosen = set(rng.sample(range(len(rows)), count))
    return tuple(row for place, row in enumerate(rows) if place in chosen)


def lookup(level: int, rng: Random) -> Draft:
    """Levels: read a field of one of 2, 4, 8 or up to 34 records; from 2 also follow-ups, then counts.

    Levels 5 and 6 take several steps: a chain of replacements, the dearest order, a sum over some orders.
    """
    if level >= 5:
        return pick(rng, (_chain, _chain, _extreme, _sum_of_some))(level, rng)
    if rng.random() < (0.25, 0.12, 0.1, 0.1)[level - 1]:
        return _list(level, rng)
    many = between(rng, 12, 24) if rng.random() < 0.9 else between(rng, 25, 34)
    count = (1 if rng.random() < 0.2 else 2, between(rng, 3, 4), between(rng, 6, 8), many)[level - 1]
    width = (between(rng, 2, 4), between(rng, 3, 5), between(rng, 4, 6), between(rng, 4, 6))[level - 1]
    fields = some(rng, FIELDS, width)
    if "customer" not in fields and rng.random() < 0.5:
        fields = ("customer", *fields)
    rows = records(rng, count, fields)
    notes = show(rng, rows, table=level > 2)
    stem = " ".join(row["order"] for row in rows)
    kind = rng.random()
    if "status" in fields and kind < 0.2 and 6 <= count <= 16:
        return _count(rng, rows, f"count {stem}", notes)
    if level >= 2 and kind > 0.93:
        number = _near(rng, rows)
        if all(row["order"] != number for row in rows):
            question = pick(rng, ASK).format(f=pick(rng, fields), o=number)
            said = tuple(text.format(number) for text in NO_SUCH_ORDER)
            return Draft(question, said[0], f"none {stem} {number}", notes, said=said)
    row = pick(rng, rows)
    field = pick(rng, fields)
    before: tuple[tuple[str, str], ...] = ()
    if level >= 2 and 0.8 < kind <= 0.93:
        first = pick(rng, fields)
        before = ((pick(rng, ASK).format(f=first, o=row["order"]), row[first]),)
        return Draft(
            pick(rng, FOLLOW).format(f=field), row[field], f"{stem} {row['order']} {field}", notes, before
        )
    question, reply = _ask(rng, row, field, level)
    return Draft(question, reply, f"{stem} {row['order']} {field}", notes)


def _count(rng: Random, rows: list[Record], key: str, notes: str) -> Draft:
    """The working goes through the orders with a running count: `A-17 paid, B-20 shipped 1, ...`."""
    status = pick(rng, rows)["status"] if rng.random() < 0.8 else pick(rng, STATUSES)
    walk: list[str] = []
    hits = 0
    for row in rows:
        hits += row["status"] == status
        walk.append(f"{row['order']} {row['status']}" + (f" {hits}" if row["status"] == status else ""))
    return Draft(pick(rng, COUNT).format(s=status), f"{', '.join(walk)}\n{hits}", f"{key} {status}", notes)


def _ask(rng: Random, row: Record, field: str, level: int) -> tuple[str, str]:
    """A question about a field, by order number, customer or item.

    A record begins with order, customer and item. To find an earlier field from a
    later one is much harder for a causal model, so such questions begin at level 3.
    """
    kind = rng.random() / (0.4 if level == 1 else 0.6)
    back = level >= 3
    name, item = row.get("customer"), row.get("item")
    if name and field != "customer" and kind < (0.6 if item else 1.0):
        if back and kind < 0.1:
            return pick(rng, ASK_ORDER).format(n=name), row["order"]
        return pick(rng, ASK_BY_NAME).format(n=name, f=field), row[field]
    if item and field != "item" and kind < 1.0 and (back or field != "customer"):
        if back and kind < 0.7:
            return pick(rng, ASK_ITEM_ORDER).format(i=item), row["order"]
        ways = ASK_WHO_ITEM if field == "customer" and rng.random() < 0.5 else ASK_BY_ITEM
        return pick(rng, ways).format(i=item, f=field), row[field]
    if field == "customer" and rng.random() < 0.5:
        return pick(rng, ASK_WHO).format(o=row["order"]), row[field]
    return pick(rng, ASK).format(f=field, o=row["order"]), row[field]


def _chain(level: int, rng: Random) -> Draft:
    """Orders that replace one another. The working names each order on the way to the last."""
    hops = between(rng, 2, 4) if level == 5 else between(rng, 5, 11)
    rows = records(rng, between(rng, *((8, 14), (20, 36))[level - 5]), ())
    names = [row["order"] for row in rows]
    order = rng.sample(names, len(names))
    way = order[: hops + 1]
    follows = dict(pairwise(way))
    others = order[hops + 1 :]
    # The others form chains of their own, so that not every replaced order is on the way.
    for first, last in pairwise(others):
        if rng.random() < 0.7:
            follows[first] = last
    lines = [f"{name} -> {follows.get(name, 'final')}" for name in names]
    notes = pick(rng, ("Replacements:\n", "Replaced orders (old -> new):\n")) + "\n".join(lines)
    reply = f"{', '.join(way)}\n{way[-1]}"
    return Draft(pick(rng, FOLLOW_ON).format(way[0]), reply, f"chain {' '.join(way)}", notes)


def _extreme(level: int, rng: Random) -> Draft:
    """The dearest or cheapest order. The working names each order that is dearer than all before it."""
    rows = records(rng, between(rng, *((6, 10), (14, 24))[level - 5]), ("customer", "item", "price", "city"))
    field = pick(rng, ("order", "customer", "item", "city"))
    dearest = rng.random() < 0.5
    walk: list[str] = []
    best, found = 0.0, rows[0]
    for row in rows:
        price = float(row["price"].split()[0])
        if not walk or (price > best if dearest else price < best):
            best, found = price, row
            walk.append(f"{row['order']} {row['price'].split()[0]}")
    ask = pick(
        rng,
        ("What is the {f} of the {x} order?", "Find the {x} order. What is its {f}?", "{x} order: {f}?"),
    )
    question = ask.format(f="number" if field == "order" else field, x="dearest" if dearest else "cheapest")
    key = f"extreme {dearest} {field} " + " ".join(f"{row['order']} {row['price']}" for row in rows)
    return Draft(
        question[0].upper() + question[1:],
        f"{', '.join(walk)}\n{found[field]}",
        key,
        show(rng, rows, table=True),
    )


def _sum_of_some(level: int, rng: Random) -> Draft:
    """The number of pieces in the orders with one status. The working has a running sum."""
    rows = records(rng, between(rng, *((6, 10), (14, 24))[level - 5]), ("item", "quantity", "status"))
    status = pick(rng, rows)["status"]
    for row in rng.sample(rows, len(rows) // 3):
        row["status"] = status
    walk: list[str] = []
    total = 0
    for row in rows:
        if row["status"] == status:
            total += int(row["quantity"])
            walk.append(f"{row['order']} {row['quantity']} {total}")
    ask = pick(
        rng,
        (
            "How many pieces are in the orders with status {}?",
            "Add up the quantity of all orders that are {}.",
            "What is the total quantity of the orders which are {}?",
        ),
    )
    key = f"pieces {status} " + " ".join(f"{row['order']} {row['quantity']}" for row in rows)
    return Draft(ask.format(status), f"{', '.join(walk)}\n{total}", key, show(rng, rows, table=True))


# What is listed, by what, and how one asks for it.
LISTS = (
    ("price", "item", ("How much is the {}?", "What does the {} cost?", "Price of the {}?", "{}: price?")),
    (
        "city",
        "customer",
        ("Where does {} live?", "In which city is {}?", "{}: city?", "What is the city of {}?"),
    ),
    ("phone", "customer", ("What is the phone number of {}?", "Phone number of {}?", "How can I call {}?")),
    ("status", "order", ("What is the status of {}?", "{}: status?", "Status of order {}?")),
    (
        "quantity",
        "item",
        ("What is the stock of the {}?", "Stock of the {}?", "How many of the {} are there?"),
    ),
    ("order", "customer", ("Which order did {} place?", "Order of {}?", "What did {} order?")),
    ("customer", "order", ("Who placed order {}?", "Who ordered {}?", "Whose order is {}?")),
)


def _list(level: int, rng: Random) -> Draft:
    """A list of keys and values: prices, addresses, stock. Each key stands right before its value."""
    field, by, ways = pick(rng, LISTS)
    count = (between(rng, 2, 4), between(rng, 5, 8), between(rng, 9, 14), between(rng, 15, 30))[level - 1]
    keys = [row[by] for row in records(rng, count, (by,) if by != "order" else ())]
    currency = pick(rng, CURRENCIES)
    values = [
        json.loads(_fact(rng, field)) if field == "phone" else _value(rng, field, currency) for _ in keys
    ]
    sign, start = pick(rng, (": ", " - ", " | ", " = ", ", ")), pick(rng, ("", "", "- ", "* "))
    notes = "\n".join(f"{start}{key}{sign}{value}" for key, value in zip(keys, values, strict=True))
    place = between(rng, 0, count - 1)
    question = pick(rng, ways).format(keys[place])
    return Draft(question, values[place], f"list {field} {' '.join(keys)} {keys[place]}", notes)


TELL = {
    "order": (
        "my order is {}.",
        "it is about order {}.",
        "the order number is {}.",
        "I write about order {}.",
    ),
    "customer": ("I am {}.", "my name is {}.", "this is {} speaking.", "{} here."),
    "item": ("I bought the {}.", "the {} does not work.", "the {} arrived today.", "please check the {}."),
    "city": ("I live in {}.", "please deliver to {}.", "my address is in {}.", "I am writing from {}."),
    "amount": ("I paid {}.", "the price was {}.", "you charged me {}.", "the invoice says {}."),
    "email": ("write to {} please.", "my address is {}.", "answer me at {} please.", "my mail is {}."),
    "phone": ("call me on {}.", "my number is {}.", "my phone is {}.", "reach me on {}."),
    "quantity": ("I need {} pieces.", "there were {} boxes.", "I got {} of them.", "please send {} units."),
}
# Other names for a fact in a question.
ALIASES = {
    "order": ("order", "order", "order_number", "order_id"),
    "customer": ("customer", "customer", "name"),
    "amount": ("amount", "amount", "price"),
    "item": ("item", "item", "product"),
}
NOISE = (
    "the weather was bad that day.", "I have been a customer for years.", "please help me.",
    "I hope you are well.",
    "my neighbour said I should write.", "thank you for your time.", "this is my second message.",
    "sorry for that.",
)  # fmt: skip
EXTRACT = (
    "Extract {k} as JSON",
    "Return {k} as a JSON object",
    "Give me {k} in JSON",
    "Turn this message into JSON with {k}",
    "Read the message and write JSON with {k}",
)


def extract(level: int, rng: Random) -> Draft:
    """Levels: a message to JSON with 2 keys; more keys and noise; missing keys as null; a list of lines.

    Levels 5 and 6 have more lines, and lines that are corrected further on.
    """
    if level >= 5:
        return _extract_corrected(level, rng)
    if level == 4 and rng.random() < 0.6:
        return _extract_lines(rng)
    wanted = (2, between(rng, 3, 4), between(rng, 4, 5), between(rng, 5, 7))[level - 1]
    keys = rng.sample(tuple(TELL), wanted)
    values = {key: _fact(rng, key) for key in keys}
    others = [key for key in TELL if key not in values]
    spare = rng.sample(others, min(len(others), (0, 1, 1, 1)[level - 1]))
    told = [(key, values[key]) for key in keys] + [(key, _fact(rng, key)) for key in spare]
    if level >= 3 and rng.random() < 0.6:
        gone = pick(rng, keys)
        values[gone] = "null"
        told = [pair for pair in told if pair[0] != gone]
    parts = [pick(rng, TELL[key]).format(json.loads(value)) for key, value in told]
    parts += rng.sample(NOISE, (between(rng, 0, 1), 1, 2, 3)[level - 1])
    rng.shuffle(parts)
    names = [pick(rng, ALIASES[key]) if key in ALIASES else key for key in keys]
    reply = "{" + ", ".join(f'"{name}": {values[key]}' for name, key in zip(names, keys, strict=True)) + "}"
    return Draft(_extract_question(rng, names, parts), reply, f"{' '.join(keys)} {sorted(values.items())}")


def _fact(rng: Random, key: str) -> str:
    """A value as JSON."""
    match key:
        case "order":
            return f'"{order_id(rng)}"'
        case "email":
            name = f"{pick(rng, FIRST)}.{pick(rng, LAST)}".lower()
            return f'"{name}{between(rng, 1, 99)}@example.{pick(rng, ("com", "org", "net"))}"'
        case "phone":
            return f'"0{between(rng, 10, 99)} {between(rng, 10000, 9999999)}"'
        case "amount":
            return f'"{money(between(rng, 100, 49999))} {pick(rng, CURRENCIES)}"'
        case "quantity":
            return str(between(rng, 2, 99))
        case _:
            return f'"{_value(rng, key, "")}"'


def _extract_question(rng: Random, keys: list[str], parts: list[str]) -> str:
    text = " ".join(part[0].upper() + part[1:] for part in parts)
    names = f"{', '.join(keys[:-1])} and {keys[-1]}" if rng.random() < 0.7 else ", ".join(keys)
    ask = pick(rng, EXTRACT).format(k=names)
    match between(rng, 0, 2):
        case 0:
            return f"{ask}: {text}"
        case 1:
            return f"{ask}.\n\n{text}"
        case _:
            return f"{text}\n\n{ask}."


def _extract_lines(rng: Random) -> Draft:
    lines = [(pick(rng, THINGS), between(rng, 2, 20)) for _ in range(between(rng, 2, 4))]
    order, name = order_id(rng), person(rng)
    text = ", ".join(f"{count} x {thing}" for thing, count in lines)
    parts = [
        pick(rng, TELL["order"]).format(order),
        f"I ordered {text}.",
        pick(rng, TELL["customer"]).format(name),
    ]
    parts.append(pick(rng, NOISE))
    rng.shuffle(parts)
    value = {"order": order, "customer": name, "lines": [{"item": t, "quantity": n} for t, n in lines]}
    question = _extract_question(rng, ["order", "customer", "lines (item and quantity)"], parts)
    return Draft(question, json.dumps(value), f"lines {order} {name} {text}")


def _extract_corrected(level: int, rng: Random) -> Draft:
    """Lines of an order, some of which a later sentence changes or removes."""
    things = rng.sample(THINGS, between(rng, 4, 5) if level == 5 else between(rng, 7, 10))
    counts = {thing: between(rng, 2, 20) for thing in things}
    said = ", ".join(f"{count} x {thing}" for thing, count in counts.items())
    parts = [f"I ordered {said}."]
    changed = rng.sample(things, between(rng, 1, 2) if level == 5 else between(rng, 3, 4))
    for thing in changed:
        if rng.random() < 0.4:
            parts.append(pick(rng, ("please leave out the {}.", "without the {}, sorry.")).format(thing))
            del counts[thing]
        else:
            counts[thing] = between(rng, 2, 20)
            again = pick(
                rng, ("sorry, I meant {} x {}.", "make it {} x {} please.", "I need {} x {} instead.")
            )
            parts.append(again.format(counts[thing], thing))
    order, name = order_id(rng), person(rng)
    start = [pick(rng, TELL["order"]).format(order), pick(rng, TELL["customer"]).format(name)]
    rng.shuffle(start)
    parts = [*start, *parts, *rng.sample(NOISE, level - 4)]
    value = {
        "order": order,
        "customer": name,
        "lines": [{"item": thing, "quantity": count} for thing, count in counts.items()],
    }
    question = _extract_question(rng, ["order", "customer", "lines (item and quantity)"], parts)
    return Draft(question, json.dumps(value), f"corrected {order} {name} {said} {sorted(counts.items())}")
