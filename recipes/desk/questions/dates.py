"""Questions about delivery dates. A reply shows short calendar arithmetic and writes ISO dates."""

from __future__ import annotations

from calendar import monthrange
from datetime import date, timedelta
from random import Random

from recipes.desk.example import Draft, between, order_id, pick
from recipes.desk.questions.words import CITIES, DAYS, MONTHS, SERVICES, THINGS, WEEKDAYS

ARRIVE = (
    "Order {o} was shipped on {d} and takes {n} days. When does it arrive?",
    "The {i} left our warehouse on {d}. Delivery takes {n} days. On which date does it arrive?",
    "Shipped {d}, delivery time {n} days. Which date is that?",
    "When will order {o} arrive if it is sent on {d} and needs {n} days?",
    "What is the delivery date: sent on {d}, {n} days to {c}?",
    "Which date is {n} days after {d}?",
    "{d} plus {n} days?",
)
BETWEEN = (
    "Order {o} was placed on {d} and arrived on {e}. How many days did it take?",
    "How many days are there from {d} to {e}?",
    "The {i} was shipped on {d} and delivered on {e}. How many days is that?",
)
WORKDAYS = (
    "Order {o} ships on {w} {d} and takes {n} working days. When does it arrive?",
    "The {i} leaves on {w} {d}. Delivery takes {n} business days. Which date is that?",
    "{w} {d} plus {n} working days (Monday to Friday)?",
    "Sent on {w}, {d}, with {n} business days to {c}. When will it be delivered?",
)


def delivery(level: int, rng: Random) -> Draft:
    """Levels: up to 14 days; up to 60 days, and days between dates; working days; one of several orders; up
    to 200 days, or days between far dates; working days with holidays."""
    day = date(between(rng, 2023, 2031), 1, 1) + timedelta(between(rng, 0, 364))
    if level == 1:
        return _arrive(rng, day, between(rng, 1, 14))
    if level == 2:
        return _span(rng, day) if rng.random() < 0.3 else _arrive(rng, day, between(rng, 10, 60))
    if level == 3:
        return _workdays(rng, day) if rng.random() < 0.8 else _span(rng, day)
    if level == 4:
        return _by_service(rng, day)
    if level == 5:
        return _span(rng, day, 70, 200) if rng.random() < 0.5 else _arrive(rng, day, between(rng, 70, 200))
    return _with_holidays(rng, day)


def written(rng: Random, day: date) -> str:
    """A date as people write it. Day and month are never ambiguous."""
    match between(rng, 0, 4):
        case 0:
            return f"{day.day} {MONTHS[day.month - 1]} {day.year}"
        case 1:
            return f"{MONTHS[day.month - 1]} {day.day}, {day.year}"
        case _:
            return day.isoformat()


def following(year: int, month: int) -> tuple[int, int]:
    """The next month and its year."""
    return (year + 1, 1) if month == 12 else (year, month + 1)


def forward(day: date, days: int) -> tuple[list[str], date]:
    """The working of `day + days`: the sum, minus the length of each month until it fits."""
    total = day.day + days
    steps = [f"{day.day} + {days} = {total}"]
    year, month = day.year, day.month
    while total > (length := monthrange(year, month)[1]):
        steps.append(f"{MONTHS[month - 1]} {year} has {length} days: {total} - {length} = {total - length}")
        total -= length
        year, month = following(year, month)
    return steps, date(year, month, total)


def _arrive(rng: Random, day: date, days: int) -> Draft:
    steps, end = forward(day, days)
    text = pick(rng, ARRIVE).format(
        o=order_id(rng), d=written(rng, day), n=days, i=pick(rng, THINGS), c=pick(rng, CITIES)
    )
    return Draft(text, "\n".join([*steps, end.isoformat()]), f"arrive {day} {days}")


def _span(rng: Random, day: date, least: int = 2, most: int = 70) -> Draft:
    end = day + timedelta(between(rng, least, most))
    steps: list[str] = []
    if (day.year, day.month) == (end.year, end.month):
        steps.append(f"{end.day} - {day.day} = {(end - day).days}")
    else:
        length = monthrange(day.year, day.month)[1]
        total = length - day.day
        steps.append(f"{MONTHS[day.month - 1]} {day.year}: {length} - {day.day} = {total}")
        year, month = following(day.year, day.month)
        while (year, month) != (end.year, end.month):
            length = monthrange(year, month)[1]
            steps.append(f"{MONTHS[month - 1]} {year}: {total} + {length} = {total + length}")
            total += length
            year, month = following(year, month)
        steps.append(f"{MONTHS[month - 1]} {year}: {total} + {end.day} = {total + end.day}")
    text = pick(rng, BETWEEN).format(
        o=order_id(rng), d=written(rng, day), e=written(rng, end), i=pick(rng, THINGS)
    )
    said = tuple("\n".join([*steps, f"{(end - day).days} {unit}"]) for unit in DAYS)
    return Draft(text, said[0], f"span {day} {end}", said=said)


def workdays(day: date, days: int, holidays: frozenset[date] = frozenset()) -> tuple[str, date]:
    """Counts working days one by one: `1 Mon 30, 2 Tue 31, 3 Wed 1 April`."""
    steps: list[str] = []
    count, month = 0, day.month
    while count < days:
        day += timedelta(1)
        if day.weekday() >= 5 or day in holidays:
            continue
        count += 1
        name = "" if day.month == month else f" {MONTHS[day.month - 1]}"
        month = day.month
        steps.append(f"{count} {WEEKDAYS[day.weekday()][0][:3]} {day.day}{name}")
    return ", ".join(steps), day


def _workdays(rng: Random, day: date) -> Draft:
    day -= timedelta(max(0, day.weekday() - 4))
    days = between(rng, 2, 9)
    steps, end = workdays(day, days)
    text = pick(rng, WORKDAYS).format(
        o=order_id(rng),
        w=WEEKDAYS[day.weekday()][0],
        d=written(rng, day),
        n=days,
        i=pick(rng, THINGS),
        c=pick(rng, CITIES),
    )
    return Draft(text, f"{steps}\n{end.isoformat()}", f"work {day} {days}")


def _with_holidays(rng: Random, day: date) -> Draft:
    """Working days that holidays interrupt."""
    day -= timedelta(max(0, day.weekday() - 4))
    days = between(rng, 10, 25)
    free = frozenset(day + timedelta(place) for place in rng.sample(range(1, 2 * days), between(rng, 3, 6)))
    steps, end = workdays(day, days, free)
    text = pick(rng, WORKDAYS).format(
        o=order_id(rng),
        w=WEEKDAYS[day.weekday()][0],
        d=written(rng, day),
        n=days,
        i=pick(rng, THINGS),
        c=pick(rng, CITIES),
    )
    listed = ", ".join(f"{each.day} {MONTHS[each.month - 1]}" for each in sorted(free))
    key = f"holidays {day} {days} {listed}"
    return Draft(f"{text} Holidays: {listed}.", f"{steps}\n{end.isoformat()}", key)


def _by_service(rng: Random, day: date) -> Draft:
    times = {service: between(rng, 1, 20) for service in rng.sample(SERVICES, 3)}
    notes = [f"{service}: {count} days" for service, count in times.items()]
    rows: list[tuple[str, date, str]] = []
    for _ in range(between(rng, 3, 6)):
        rows.append((order_id(rng), day + timedelta(between(rng, -40, 40)), pick(rng, tuple(times))))
    lines = [f"Order {order}, shipped {sent.isoformat()}, service {service}" for order, sent, service in rows]
    order, sent, service = pick(rng, rows)
    steps, end = forward(sent, times[service])
    ask = pick(
        rng, ("When does order {} arrive?", "What is the delivery date of {}?", "On which date will {} come?")
    )
    return Draft(
        ask.format(order),
        "\n".join([f"{sent.isoformat()}, {service}, {times[service]} days", *steps, end.isoformat()]),
        f"service {order} {sent} {service} {times[service]}",
        "Delivery times:\n" + "\n".join(notes) + "\n\nOrders:\n" + "\n".join(lines),
    )
