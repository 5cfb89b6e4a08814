"""Questions about words: how urgent a message is, and desk phrases in three languages."""

from __future__ import annotations

from random import Random

from recipes.desk.example import Draft, between, money, order_id, pick
from recipes.desk.questions.orders import person
from recipes.desk.questions.words import (
    CITIES,
    COLOURS,
    CURRENCIES,
    FIRST,
    FIXED,
    ITEMS,
    LANGUAGES,
    NOUNS,
    PHRASES,
    STATEMENTS,
    SYSTEMS,
    THINGS,
    URGENCY,
    VERBS,
    WEEKDAYS,
)

RATE = (
    "How urgent is this message? Answer low, medium, high or critical.\n\n{m}",
    "Classify the urgency (low, medium, high, critical): {m}",
    "{m}\n\nHow urgent is this ticket?",
    "Urgency of this message: {m}",
    "Rate the urgency of this ticket as low, medium, high or critical.\n{m}",
    'What is the urgency of "{m}"?',
)
CALM = (
    "hello desk team.", "I hope you are well.", "thank you in advance.", "kind regards, {f}",
    "I live in {c}.",
    "my order number is {o}.", "this is {f}.", "I wrote to you on {d}.", "best wishes from {c}.",
)  # fmt: skip
SOLVED = (
    "last week I wrote: {s} This is solved now.",
    "on {d} I told you: {s} That is repaired, thank you.",
    "my earlier message said: {s} Please ignore it.",
)


def filled(rng: Random, text: str) -> str:
    """A statement with its slots filled."""
    return text.format(
        k=pick(rng, COLOURS),
        h=pick(rng, THINGS),
        d=pick(rng, WEEKDAYS)[0],
        n=between(rng, 2, 30),
        o=order_id(rng),
        m=f"{money(between(rng, 500, 29999))} {pick(rng, CURRENCIES)}",
        v=pick(rng, VERBS),
        s=pick(rng, SYSTEMS),
        c=pick(rng, CITIES),
        f=pick(rng, FIRST),
    )


def urgency(level: int, rng: Random) -> Draft:
    """Levels: one statement; two, the more urgent counts; some already solved; rules with numbers; a list of
    tickets; a longer list of tickets that also tell of what is solved."""
    if level >= 5:
        return _tickets(level, rng)
    if level == 4 and rng.random() < 0.6:
        return _by_rules(rng)
    grades = [between(rng, 0, 3) for _ in range((1, 2, between(rng, 2, 3), between(rng, 3, 4))[level - 1])]
    stated = [filled(rng, pick(rng, STATEMENTS[grade])) for grade in grades]
    parts = stated + [filled(rng, text) for text in rng.sample(CALM, between(rng, 0, level))]
    if level >= 3:
        old = filled(rng, pick(rng, STATEMENTS[between(rng, 0, 3)]))
        parts.append(pick(rng, SOLVED).format(s=sentence(old), d=pick(rng, WEEKDAYS)[0]))
    rng.shuffle(parts)
    text = " ".join(map(sentence, parts))
    return Draft(pick(rng, RATE).format(m=text), URGENCY[max(grades)], "urgency " + " ".join(sorted(stated)))


TICKETS = (
    "How urgent is each of these tickets? Answer low, medium, high or critical for each.",
    "Rate the urgency of each ticket (low, medium, high, critical), in order.",
    "Urgency of every ticket, please, separated by commas:",
)


def _tickets(level: int, rng: Random) -> Draft:
    """Several tickets. The reply is the grade of each, in their order."""
    lines: list[str] = []
    grades: list[str] = []
    told: list[str] = []
    for number in range(1, (between(rng, 3, 4) if level == 5 else between(rng, 7, 11)) + 1):
        several = [between(rng, 0, 3) for _ in range(1 if level == 5 else between(rng, 1, 2))]
        parts = [filled(rng, pick(rng, STATEMENTS[grade])) for grade in several]
        told += parts
        grades.append(URGENCY[max(several)])
        if level == 6 and rng.random() < 0.4:
            old = filled(rng, pick(rng, STATEMENTS[between(rng, 0, 3)]))
            parts.append(pick(rng, SOLVED).format(s=sentence(old), d=pick(rng, WEEKDAYS)[0]))
        if rng.random() < 0.4:
            parts.append(filled(rng, pick(rng, CALM)))
        rng.shuffle(parts)
        lines.append(f"{number}. {' '.join(map(sentence, parts))}")
    text = "\n".join(lines)
    ask = pick(rng, TICKETS)
    question = f"{ask}\n{text}" if rng.random() < 0.7 else f"{text}\n\n{ask}"
    return Draft(question, ", ".join(grades), "tickets " + " ".join(told))


def sentence(text: str) -> str:
    return text[0].upper() + text[1:]


def _by_rules(rng: Random) -> Draft:
    high = between(rng, 20, 300)
    medium = between(rng, 3, high // 2)
    critical = high * between(rng, 2, 9)
    users = pick(rng, (between(rng, 1, medium), between(rng, medium, high), between(rng, high, 2 * critical)))
    kind = next(
        (URGENCY[place] for place, bound in ((3, critical), (2, high), (1, medium)) if users > bound),
        URGENCY[0],
    )
    notes = (
        f"Urgency rules: more than {critical} users affected is critical, more than {high} is high, "
        f"more than {medium} is medium, otherwise low."
    )
    text = pick(
        rng, ("{n} users cannot {v}.", "{s} fails for {n} users.", "It affects {n} users: we cannot {v}.")
    )
    text = sentence(text.format(n=users, v=pick(rng, VERBS), s=pick(rng, SYSTEMS)))
    return Draft(pick(rng, RATE).format(m=text), kind, f"rules {critical} {high} {medium} {users}", notes)


INTO = (
    "Translate into {t}: {x}",
    "Translate to {t}: {x}",
    'How do you say "{x}" in {t}?',
    "{x}\n\nTranslate this into {t}.",
    "Please translate this {s} text into {t}:\n{x}",
    "{s} to {t}: {x}",
    "What is the {t} translation of: {x}",
    "In {t}, please: {x}",
    "Translate '{x}' to {t}",
    'Translate "{x}" into {t}.',
    "{x} in {t}?",
    "What does '{x}' mean in {t}?",
)


def phrase(rng: Random) -> tuple[str, ...]:
    """One phrase with its slots filled, in the order of LANGUAGES."""
    row = pick(rng, PHRASES)
    item, day = pick(rng, ITEMS), pick(rng, WEEKDAYS)
    shared = {
        "o": order_id(rng),
        "n": between(rng, 2, 30),
        "m": f"{money(between(rng, 100, 29999))} {pick(rng, CURRENCIES)}",
        "c": pick(rng, CITIES),
        "t": f"{between(rng, 7, 20)}:{pick(rng, ('00', '15', '30', '45'))}",
        "p": between(rng, 1, 18) * 5,
        "f": person(rng),
    }
    subjects = (item[0], item[1], item[3])
    objects = (item[0], item[2], item[3])
    return tuple(
        text.format(**shared, d=day[place], i=subjects[place], I=sentence(subjects[place]), a=objects[place])
        for place, text in enumerate(row)
    )


def translate(level: int, rng: Random) -> Draft:
    """Levels: one phrase or word; two; three; four to six; seven or eight; up to eleven in two languages."""
    source, target = rng.sample(range(3), 2)
    if level == 1 and rng.random() < 0.2:
        return _vocabulary(rng, source, target)
    counts = (1, 2, 3, between(rng, 4, 6), between(rng, 7, 8), between(rng, 9, 11))
    said = [phrase(rng) for _ in range(counts[level - 1])]
    key = "translate " + " ".join(row[0] for row in said)
    texts = [" ".join(row[place] for row in said) for place in (source, target)]
    if level == 6:
        return _translate_mixed(rng, said, target, key)
    question = pick(rng, INTO).format(s=LANGUAGES[source], t=LANGUAGES[target], x=texts[0])
    return Draft(question, texts[1], key)


def _translate_mixed(rng: Random, said: list[tuple[str, ...]], target: int, key: str) -> Draft:
    """Phrases in the two languages that are not the target, in turns of chance."""
    others = [place for place in range(3) if place != target]
    text = " ".join(row[pick(rng, others)] for row in said)
    ask = pick(rng, ("Translate everything into {t}: {x}", "{x}\n\nAll of this in {t}, please.")).format(
        t=LANGUAGES[target], x=text
    )
    return Draft(ask, " ".join(row[target] for row in said), key)


def _vocabulary(rng: Random, source: int, target: int) -> Draft:
    row = pick(rng, FIXED) if rng.random() < 0.6 else pick(rng, NOUNS)
    text = row[source]
    if rng.random() < 0.5:
        text = text.strip("¡!¿?.")
    if rng.random() < 0.3:
        text = text.lower()
    return Draft(pick(rng, INTO).format(s=LANGUAGES[source], t=LANGUAGES[target], x=text), row[target], "")
