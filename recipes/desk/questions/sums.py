"""Questions with arithmetic: totals, refunds, currency conversion. A reply shows short working.

Money is in cents. Each line of working is one step that a small model can do from the digits before.
"""

from __future__ import annotations

from itertools import pairwise
from random import Random

from recipes.desk.example import Draft, between, money, order_id, pick
from recipes.desk.questions.orders import person, records, show
from recipes.desk.questions.words import CURRENCIES, THINGS, UNITS

TOTAL = (
    "What is the total?",
    "How much is that in total?",
    "Please add up the amounts.",
    "What does everything cost together?",
    "Calculate the total.",
    "What is the sum?",
    "What do I have to pay in total?",
)
OPEN = (
    "The customer bought ",
    "The order contains ",
    "On the invoice: ",
    "Basket: ",
    "I ordered ",
    "Items: ",
)


PLUS = ("What is {} + {}?", "How much is {} plus {}?", "{} + {} = ?", "Add {} and {}.", "{} + {}", "{}+{}")
LESS = ("What is {} - {}?", "How much is {} minus {}?", "{} - {} = ?", "{} - {}", "{}-{}")
TIMES = ("What is {} x {}?", "How much is {} times {}?", "{} * {}", "{} x {} = ?", "What is {} * {}?")


def added(amounts: list[int], first: int = 0) -> tuple[list[str], int]:
    """Running sums, one step for each number: `12.50 + 7.25 = 19.75`."""
    steps: list[str] = []
    total = first or amounts[0]
    for amount in amounts if first else amounts[1:]:
        steps.append(f"{money(total)} + {money(amount)} = {money(total + amount)}")
        total += amount
    return steps, total


def plain(cents: int) -> str:
    """`1250` -> `12.5`."""
    return money(cents).rstrip("0").rstrip(".")


def total(level: int, rng: Random) -> Draft:
    """Levels: two amounts; three; quantities and a voucher; the orders of one of several customers;
    quantities and a discount in per cent; quantities of two digits, each multiplied in one step."""
    if level == 1:
        return _plain_sum(rng) if rng.random() < 0.15 else _basket(rng, 2, 5000)
    if level == 2:
        return _basket(rng, 3, 10000)
    if level == 3:
        return _quantities(rng)
    if level == 4:
        return _customer_total(rng)
    return _discounted(level, rng)


def _plain_sum(rng: Random) -> Draft:
    high = pick(rng, (9, 99, 999))
    left, right = between(rng, 0, high), between(rng, 0, high)
    kind = rng.random()
    if kind < 0.25:
        left, right = max(left, right), min(left, right)
        key = f"difference {left} {right}" if left > 9 else ""
        return Draft(pick(rng, LESS).format(left, right), _work(left, "-", right, left - right), key)
    if kind < 0.4:
        right = between(rng, 2, 9)
        key = f"product {left} {right}" if left > 12 else ""
        return Draft(pick(rng, TIMES).format(left, right), _work(left, "x", right, left * right), key)
    if kind < 0.7:
        left, right = between(rng, 10, 5000), between(rng, 10, 5000)
        shown = [money(cents) if rng.random() < 0.7 else plain(cents) for cents in (left, right)]
        work = _work(money(left), "+", money(right), money(left + right))
        return Draft(pick(rng, PLUS).format(*shown), work, f"decimals {min(left, right)} {max(left, right)}")
    key = f"sum {min(left, right)} {max(left, right)}" if max(left, right) > 9 else ""
    return Draft(pick(rng, PLUS).format(left, right), _work(left, "+", right, left + right), key)


def _work(left: int | str, sign: str, right: int | str, result: int | str) -> str:
    return f"{left} {sign} {right} = {result}\n{result}"


def _basket(rng: Random, count: int, high: int) -> Draft:
    currency = pick(rng, CURRENCIES)
    amounts = [between(rng, 50, high) for _ in range(count)]
    form = pick(rng, ("{} {} {}", "{} {} {}", "a {} for {} {}", "{} at {} {}", "one {}: {} {}"))
    names = rng.sample(THINGS, count)
    things = [form.format(thing, money(cents), currency) for thing, cents in zip(names, amounts, strict=True)]
    steps, result = added(amounts)
    ask = pick(rng, TOTAL)
    match between(rng, 0, 3):
        case 0:
            listed = ", ".join(things) if rng.random() < 0.5 else f"{', '.join(things[:-1])} and {things[-1]}"
            question = f"{pick(rng, OPEN)}{listed}. {ask}"
        case 1:
            question = f"{ask}\n" + "\n".join(f"- {thing}" for thing in things)
        case 2:
            question = f"{ask} {'; '.join(things)}"
        case _:
            question = f"Order {order_id(rng)}\n" + "\n".join(things) + f"\n{ask}"
    return Draft(question, _reply(steps, result, currency), "total " + " ".join(map(money, sorted(amounts))))


def _reply(steps: list[str], result: int, unit: str) -> str:
    return "\n".join([*steps, f"{money(result)} {unit}"])


def _quantities(rng: Random) -> Draft:
    currency = pick(rng, CURRENCIES)
    lines = [
        (between(rng, 2, 9), between(rng, 50, 5000), thing)
        for thing in rng.sample(THINGS, between(rng, 2, 4))
    ]
    steps = [f"{count} x {money(cents)} = {money(count * cents)}" for count, cents, _ in lines]
    sums, result = added([count * cents for count, cents, _ in lines])
    steps += sums
    listed = [f"{count} x {thing} at {money(cents)} {currency}" for count, cents, thing in lines]
    question = f"{pick(rng, OPEN)}{', '.join(listed)}."
    if rng.random() < 0.4:
        voucher = between(rng, 100, min(2000, result - 1))
        question += f" There is a voucher of {money(voucher)} {currency}."
        steps.append(f"{money(result)} - {money(voucher)} = {money(result - voucher)}")
        result -= voucher
    key = "total " + " ".join(f"{count}x{money(cents)}" for count, cents, _ in sorted(lines))
    return Draft(f"{question} {pick(rng, TOTAL)}", _reply(steps, result, currency), key)


def _discounted(level: int, rng: Random) -> Draft:
    """Lines of a basket, less a discount in per cent. At level 6 quantities have two digits."""
    currency = pick(rng, CURRENCIES)
    lines: list[tuple[int, int, str]] = []
    for thing in rng.sample(THINGS, between(rng, 3, 4)):
        if level == 5:
            lines.append((between(rng, 2, 9), between(rng, 5, 999) * 10, thing))
        else:
            lines.append((between(rng, 11, 99), between(rng, 2, 99) * pick(rng, (10, 50, 100)), thing))
    steps = [f"{count} x {money(cents)} = {money(count * cents)}" for count, cents, _ in lines]
    sums, result = added([count * cents for count, cents, _ in lines])
    steps += sums
    listed = [f"{count} x {thing} at {money(cents)} {currency}" for count, cents, thing in lines]
    question = f"{pick(rng, OPEN)}{', '.join(listed)}."
    tens = between(rng, 1, 4)
    question += f" There is a discount of {tens}0 %."
    steps += part(result, tens)
    less = result // 10 * tens
    steps.append(f"{money(result)} - {money(less)} = {money(result - less)}")
    result -= less
    if level == 6:
        sent = between(rng, 2, 19) * 50
        question += f" Shipping is {money(sent)} {currency}."
        steps.append(f"{money(result)} + {money(sent)} = {money(result + sent)}")
        result += sent
    key = f"discounted {tens} " + " ".join(f"{count}x{money(cents)}" for count, cents, _ in sorted(lines))
    return Draft(f"{question} {pick(rng, TOTAL)}", _reply(steps, result, currency), key)


def _customer_total(rng: Random) -> Draft:
    rows = records(rng, between(rng, 6, 10), ("customer", "item", "price"))
    name = person(rng)
    for row in rng.sample(rows, between(rng, 2, 4)):
        row["customer"] = name
    hits = [row for row in rows if row["customer"] == name]
    currency = hits[0]["price"].split()[1]
    amounts = [round(float(row["price"].split()[0]) * 100) for row in hits]
    steps, result = added(amounts)
    steps.insert(0, ", ".join(map(money, amounts)))
    ask = pick(
        rng,
        ("What is the total of {}'s orders?", "Add up all orders of {}.", "How much did {} spend in all?"),
    )
    return Draft(
        ask.format(name),
        _reply(steps, result, currency),
        f"total {name} {' '.join(map(money, amounts))}",
        show(rng, rows, table=True),
    )


def refund(level: int, rng: Random) -> Draft:
    """Levels: a price minus a fee; two items minus a fee; a percentage; a policy by days, with records; two
    orders under the policy; four, minus a fee, each share in one step."""
    if level <= 2:
        return _less_fee(rng, level)
    if level == 3:
        return _per_cent(rng)
    return _by_policy(rng) if level == 4 else _several_by_policy(level, rng)


def _less_fee(rng: Random, level: int) -> Draft:
    currency = pick(rng, CURRENCIES)
    prices = [between(rng, 600, 9999) for _ in range(level)]
    fee = between(rng, 50, min(2000, sum(prices) - 1))
    steps, whole = added(prices) if level > 1 else ([], prices[0])
    steps.append(f"{money(whole)} - {money(fee)} = {money(whole - fee)}")
    cost = " and ".join(
        f"the {thing} for {money(cents)} {currency}"
        for thing, cents in zip(rng.sample(THINGS, level), prices, strict=True)
    )
    fees = pick(rng, ("restocking fee", "return fee", "handling fee", "shipping fee"))
    text = pick(
        rng,
        (
            "{n} returns {c}. We keep a {f} of {m}. What is the refund?",
            "Refund for {c}, less a {f} of {m}?",
            "I am sending back {c}. The {f} is {m}. How much do I get back?",
            "Calculate the refund: {c}, {f} {m}.",
            "The {f} is {m}. {n} bought {c} and returned everything. How much is refunded?",
        ),
    ).format(n=person(rng), c=cost, f=fees, m=f"{money(fee)} {currency}")
    key = f"refund {' '.join(map(money, sorted(prices)))} {money(fee)}"
    return Draft(text, _reply(steps, whole - fee, currency), key)


def part(cents: int, tens: int) -> list[str]:
    """Working for `tens` tenths of an amount that is a whole number of tenths."""
    steps = [f"10 % of {money(cents)} = {money(cents // 10)}"]
    if tens > 1:
        steps.append(f"{tens} x {money(cents // 10)} = {money(cents // 10 * tens)}")
    return steps


def _per_cent(rng: Random) -> Draft:
    currency = pick(rng, CURRENCIES)
    cents, tens = between(rng, 50, 1999) * 10, between(rng, 1, 9)
    steps, result = part(cents, tens), cents // 10 * tens
    thing, amount = pick(rng, THINGS), f"{money(cents)} {currency}"
    if rng.random() < 0.3:
        steps.append(f"{money(cents)} - {money(result)} = {money(cents - result)}")
        result = cents - result
        text = f"The {thing} cost {amount}. We keep {tens}0 % and refund the rest. How much is the refund?"
    else:
        text = pick(
            rng,
            (
                f"We refund {tens}0 % of the price of the {thing}, which cost {amount}. What is the refund?",
                f"What is a refund of {tens}0 % on {amount}?",
                f"The {thing} for {amount} arrived scratched. We give {tens}0 % back. How much is that?",
                f"Refund {tens}0 % of {amount}.",
            ),
        )
    return Draft(text, _reply(steps, result, currency), f"per cent {money(cents)} {tens}")


def _by_policy(rng: Random) -> Draft:
    rows = records(rng, between(rng, 2, 5), ("customer", "item", "price"))
    for row in rows:
        amount, currency = row["price"].split()
        row["price"] = f"{amount[:-1]}0 {currency}"
    row = pick(rng, rows)
    first = between(rng, 7, 30)
    second, tens, days = first + between(rng, 10, 60), between(rng, 1, 8), between(rng, 1, 110)
    amount, currency = row["price"].split()
    cents = round(float(amount) * 100)
    if days <= first:
        steps, result = [f"{days} <= {first}: 100 %"], cents
    elif days <= second:
        steps, result = [f"{first} < {days} <= {second}: {tens}0 %", *part(cents, tens)], cents // 10 * tens
    else:
        steps, result = [f"{days} > {second}: 0 %"], 0
    policy = f"Refund policy: up to {first} days 100 %, up to {second} days {tens}0 %, later nothing.\n"
    ask = pick(
        rng,
        (
            "Order {o} is returned after {d} days. What is the refund?",
            "Refund for {o}, returned after {d} days?",
        ),
    ).format(o=row["order"], d=days)
    steps.insert(0, f"price {amount}")
    key = f"policy {row['order']} {amount} {days} {first} {second}"
    return Draft(ask, _reply(steps, result, currency), key, policy + show(rng, rows, table=False))


def _several_by_policy(level: int, rng: Random) -> Draft:
    """Several orders of one customer come back after different times."""
    rows = records(rng, between(rng, *((4, 6), (8, 12))[level - 5]), ("customer", "item", "price"))
    currency = rows[0]["price"].split()[1]
    for row in rows:
        row["price"] = f"{row['price'].split()[0][:-1]}0 {currency}"
    first = between(rng, 7, 30)
    second, tens = first + between(rng, 10, 60), between(rng, 1, 8)
    steps: list[str] = []
    parts: list[int] = []
    asked: list[str] = []
    for row in rng.sample(rows, 2 if level == 5 else 4):
        days = between(rng, 1, second + 20)
        amount = row["price"].split()[0]
        cents = round(float(amount) * 100)
        asked.append(f"{row['order']} after {days} days")
        steps.append(f"price {amount}")
        if days <= first:
            steps.append(f"{days} <= {first}: 100 %")
            parts.append(cents)
        elif days <= second:
            steps.append(f"{first} < {days} <= {second}: {tens}0 %")
            # At level 6 the share is one step.
            result = money(cents // 10 * tens)
            steps += part(cents, tens) if level == 5 else [f"{tens}0 % of {money(cents)} = {result}"]
            parts.append(cents // 10 * tens)
        else:
            steps.append(f"{days} > {second}: 0 %")
            parts.append(0)
    sums, result = added(parts)
    steps += sums
    names = f"{', '.join(asked[:-1])} and {asked[-1]}"
    ask = pick(rng, ("What is the refund for {} in all?", "Returned: {}. How much do we refund?")).format(
        names
    )
    if level == 6 and result > 500:
        fee = between(rng, 1, 9) * 50
        ask += f" We keep a fee of {money(fee)} {currency}."
        steps.append(f"{money(result)} - {money(fee)} = {money(result - fee)}")
        result -= fee
    policy = f"Refund policy: up to {first} days 100 %, up to {second} days {tens}0 %, later nothing.\n"
    key = f"policies {' '.join(asked)} {' '.join(map(money, parts))} {first} {second} {tens}"
    return Draft(ask, _reply(steps, result, currency), key, policy + show(rng, rows, table=False))


CONVERT = (
    "Convert {a} {u} to {v}. 1 {u} = {r} {v}.",
    "How much is {a} {u} in {v} at a rate of {r}?",
    "What are {a} {u} in {v} if 1 {u} is {r} {v}?",
    "1 {u} = {r} {v}. How many {v} are {a} {u}?",
    "Rate: 1 {u} = {r} {v}. Please convert {a} {u}.",
    "{a} {u} in {v}? The rate is {r}.",
    "The rate is {r} {v} per {u}. Convert {a} {u} into {v}.",
)


def product(amount: int, rate: int) -> tuple[list[str], int]:
    """Working for amount (cents) x rate (hundredths) by the digits of the rate, and the result in cents."""
    steps: list[str] = []
    parts: list[int] = []
    shown = money(amount) if amount % 100 else str(amount // 100)
    for weight in (1000, 100, 10, 1):
        digit = rate // weight % 10 * weight
        if digit:
            parts.append(amount * digit // 100)
            factor = str(digit // 100) if weight >= 100 else money(digit).rstrip("0")
            steps.append(f"{shown} x {factor} = {money(parts[-1])}")
    if len(parts) > 1:
        sums, result = added(parts)
        return steps + sums, result
    return steps, parts[0]


def convert(level: int, rng: Random) -> Draft:
    """Levels: an amount of 2 digits by 1.2; by 1.23; 3 digits by 1.23; an order's price, or two rates; 4
    digits by 12.34; 3 digits by two rates of several that are listed, the first in one step."""
    if level == 4:
        return _convert_twice(rng) if rng.random() < 0.5 else _convert_price(rng)
    if level == 6:
        return _convert_along(rng)
    bounds = ((2, 99), (2, 99), (100, 999), (0, 0), (1000, 9999))[level - 1]
    amount = between(rng, *bounds)
    rate = between(rng, 2, 39) * 10 if level == 1 else between(rng, 11, 499)
    if level == 5:
        rate = between(rng, 1000, 4999)
    unit, target = _units(rng)
    steps, result = product(amount * 100, rate)
    shown = _rate(rng, rate)
    text = pick(rng, CONVERT).format(a=amount, u=unit, v=target, r=shown)
    return Draft(text, _reply(steps, result, target), f"convert {amount} {rate}")


def _units(rng: Random) -> tuple[str, str]:
    if rng.random() < 0.4:
        return pick(rng, UNITS)
    first, second = rng.sample(CURRENCIES, 2)
    return first, second


def _rate(rng: Random, rate: int) -> str:
    """`120` -> `1.2` or `1.20`. The reply always leaves out the trailing zero."""
    return plain(rate) if rng.random() < 0.7 else money(rate)


def _convert_twice(rng: Random) -> Draft:
    first, second, third = rng.sample(CURRENCIES, 3)
    amount, rate, other = between(rng, 2, 99), between(rng, 2, 39) * 10, between(rng, 2, 29) * 10
    steps, middle = product(amount * 100, rate)
    more, result = product(middle, other)
    rates = [f"1 {first} = {_rate(rng, rate)} {second}", f"1 {second} = {_rate(rng, other)} {third}"]
    rng.shuffle(rates)
    text = f"{rates[0]}, {rates[1]}. Convert {amount} {first} to {third}."
    key = f"twice {amount} {rate} {other}"
    return Draft(text, _reply([*steps, f"{money(middle)} {second}", *more], result, third), key)


def _convert_along(rng: Random) -> Draft:
    """From one currency to another by way of a third. The rates are among others."""
    names = rng.sample(CURRENCIES, between(rng, 5, 7))
    rates = {pair: between(rng, 2, 39) * 10 for pair in pairwise(names)}
    start = between(rng, 0, len(names) - 3)
    first, second, third = names[start : start + 3]
    amount = between(rng, 100, 999)
    rate, other = rates[first, second], rates[second, third]
    middle = amount * rate
    more, result = product(middle, other)
    lines = [f"1 {left} = {_rate(rng, each)} {right}" for (left, right), each in rates.items()]
    rng.shuffle(lines)
    ask = pick(
        rng, ("Convert {a} {u} to {v}.", "How much is {a} {u} in {v}?", "What are {a} {u} in {v}?")
    ).format(a=amount, u=first, v=third)
    steps = [
        f"1 {first} = {plain(rate)} {second}",
        f"{amount} x {plain(rate)} = {money(middle)}",
        f"1 {second} = {plain(other)} {third}",
        *more,
    ]
    key = f"along {amount} {rate} {other}"
    return Draft(ask, _reply(steps, result, third), key, "Rates:\n" + "\n".join(lines))


def _convert_price(rng: Random) -> Draft:
    rows = records(rng, between(rng, 2, 5), ("customer", "item", "price"))
    row = pick(rng, rows)
    currency = row["price"].split()[1]
    for each in rows:
        each["price"] = f"{money(between(rng, 20, 1999) * 10)} {currency}"
    targets = rng.sample([c for c in CURRENCIES if c != currency], 3)
    rates = {target: between(rng, 2, 39) * 10 for target in targets}
    line = pick(rng, ("{c} to {t}: {r}", "{t}: {r}", "1 {c} = {r} {t}"))
    table = "\n".join(line.format(c=currency, t=to, r=_rate(rng, rate)) for to, rate in rates.items())
    target = pick(rng, targets)
    amount = row["price"].split()[0]
    steps, result = product(round(float(amount) * 100), rates[target])
    ask = pick(
        rng, ("What is the price of order {o} in {t}?", "How much is {o} in {t}?", "Price of {o} in {t}?")
    )
    steps.insert(0, f"price {amount}, rate {plain(rates[target])}")
    key = f"price {row['order']} {amount} {rates[target]}"
    return Draft(
        ask.format(o=row["order"], t=target),
        _reply(steps, result, target),
        key,
        f"Rates:\n{table}\n\n{show(rng, rows, table=False)}",
    )
