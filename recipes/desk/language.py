"""Questions about words: how urgent a message is, desk phrases in three languages, and small talk."""

from __future__ import annotations

from random import Random

from recipes.desk.example import Draft, between, money, order_id, pick
from recipes.desk.orders import person
from recipes.desk.words import (
    CITIES,
    COLOURS,
    CURRENCIES,
    FIRST,
    FIXED,
    ITEMS,
    LANGUAGES,
    NOUNS,
    OFF_TOPIC,
    PHRASES,
    PLACES,
    STATEMENTS,
    SYSTEMS,
    THINGS,
    TOPICS,
    URGENCY,
    VERBS,
    WEEKDAYS,
    WORKS,
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
    """Levels: one statement; two, the more urgent counts; some already solved; rules with numbers."""
    if level == 4 and rng.random() < 0.6:
        return _by_rules(rng)
    grades = [between(rng, 0, 3) for _ in range((1, 2, between(rng, 2, 3), between(rng, 3, 4))[level - 1])]
    stated = [filled(rng, pick(rng, STATEMENTS[grade])) for grade in grades]
    parts = stated + [filled(rng, text) for text in rng.sample(CALM, between(rng, 0, level))]
    if level >= 3:
        old = filled(rng, pick(rng, STATEMENTS[between(rng, 0, 3)]))
        parts.append(pick(rng, SOLVED).format(s=_sentence(old), d=pick(rng, WEEKDAYS)[0]))
    rng.shuffle(parts)
    text = " ".join(map(_sentence, parts))
    return Draft(pick(rng, RATE).format(m=text), URGENCY[max(grades)], "urgency " + " ".join(sorted(stated)))


def _sentence(text: str) -> str:
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
    text = _sentence(text.format(n=users, v=pick(rng, VERBS), s=pick(rng, SYSTEMS)))
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
        text.format(**shared, d=day[place], i=subjects[place], I=_sentence(subjects[place]), a=objects[place])
        for place, text in enumerate(row)
    )


def translate(level: int, rng: Random) -> Draft:
    """Levels: one phrase or word; two; three; four to six."""
    source, target = rng.sample(range(3), 2)
    if level == 1 and rng.random() < 0.2:
        return _vocabulary(rng, source, target)
    said = [phrase(rng) for _ in range((1, 2, 3, between(rng, 4, 6))[level - 1])]
    key = "translate " + " ".join(row[0] for row in said)
    texts = [" ".join(row[place] for row in said) for place in (source, target)]
    question = pick(rng, INTO).format(s=LANGUAGES[source], t=LANGUAGES[target], x=texts[0])
    return Draft(question, texts[1], key)


def _vocabulary(rng: Random, source: int, target: int) -> Draft:
    row = pick(rng, FIXED) if rng.random() < 0.6 else pick(rng, NOUNS)
    text = row[source]
    if rng.random() < 0.5:
        text = text.strip("¡!¿?.")
    if rng.random() < 0.3:
        text = text.lower()
    return Draft(pick(rng, INTO).format(s=LANGUAGES[source], t=LANGUAGES[target], x=text), row[target], "")


SKILLS = (
    "orders, totals, refunds, delivery dates, conversions, urgency, JSON extraction and translations between "
    "English, German and Spanish"
)
# (messages with one meaning, the reply to them)
TALK: tuple[tuple[tuple[str, ...], str], ...] = (
    (
        ("hello", "hi", "hey", "hello there", "hi there", "hey there", "good morning",
         "good afternoon", "hey you",
         "good evening", "greetings", "hello desk", "hi desk", "howdy", "hello everyone",
         "hello again", "yo"),
        "Hello! I am desk, a small support model. How can I help you?",
    ),
    (
        ("hallo", "guten tag", "guten morgen", "moin", "servus", "hallo zusammen", "guten abend", "grüezi"),
        "Hallo! Ich bin desk, ein kleines Support-Modell. Wie kann ich helfen?",
    ),
    (
        ("hola", "buenos días", "buenas tardes", "hola desk", "buenas", "muy buenas", "buenas noches"),
        "¡Hola! Soy desk, un pequeño modelo de soporte. ¿En qué puedo ayudar?",
    ),
    (
        ("who are you", "what are you", "what is your name", "introduce yourself", "who am I talking to",
         "are you a human", "are you a robot", "are you a bot", "are you an AI", "tell me about yourself",
         "what is this", "who made you", "which model are you", "are you ChatGPT", "what model is this"),
        "I am desk, the small language model that comes with Stretto. I answer support-desk questions.",
    ),
    (
        ("what can you do", "help", "help me", "how can you help me", "what do you do", "what can I ask you",
         "what are your skills", "what are you good at", "how do I use you", "can you help me",
         "what should I ask",
         "show me what you can do", "give me an example", "what tasks do you know", "what can you do for me"),
        f"I can help with {SKILLS}. Give me the records or the text, and a question.",
    ),
    (
        ("thanks", "thank you", "thank you very much", "thanks a lot", "many thanks", "great, thanks",
         "thx", "perfect",
         "that helps", "great", "well done", "good bot", "thank you so much", "good job",
         "ok, thank you", "cool", "awesome", "ok", "nice", "danke",
         "gracias"),
        "You are welcome!",
    ),
    (
        ("do you speak German", "which languages do you speak", "do you speak English",
        "do you speak Spanish",
         "sprichst du Deutsch", "hablas español", "what languages do you know", "can you translate",
         "sprechen Sie Deutsch", "habla español", "can you speak French", "do you know Spanish"),
        "I translate support-desk phrases between English, German and Spanish.",
    ),
    (
        ("bye", "goodbye", "see you", "see you later", "that is all", "have a nice day", "good night",
         "ciao", "tschüss",
         "that was all", "bye bye", "adiós", "until next time", "I am done", "auf Wiedersehen"),
        "Goodbye! Have a nice day.",
    ),
    (
        ("how are you", "how are you doing", "how is it going", "what is up", "how do you do", "are you ok",
         "how are you today", "how was your day", "everything fine", "what is new", "you ok"),
        "I am ready to work. How can I help you?",
    ),
)  # fmt: skip
PLAIN = frozenset(way.lower() for ways, _ in TALK for way in ways)  # vocabulary: never held out
TAILS = (
    "",
    "",
    "",
    "",
    " :)",
    " desk",
    " my friend",
    " please",
    " again",
    " there",
    " then",
    " dear desk",
    " now",
    " team",
)
LEADS = (
    "",
    "",
    "",
    "",
    "",
    "so, ",
    "well, ",
    "ok, ",
    "um, ",
    "oh, ",
    "and ",
    "please, ",
    "hm, ",
    "alright, ",
)
REFUSAL = f"I can only help with {SKILLS}."
NO_RECORDS = "Please send me the order records together with your question."
NEEDS_RECORDS = (
    "where is my order {o}?", "what is the status of order {o}?", "where is my order?",
    "where is my parcel {o}?",
    "when will order {o} arrive?", "has {o} been shipped?", "I want a refund for order {o}",
    "track order {o}",
    "look up order {o}", "what is the price of {o}?", "who ordered {o}?", "is my order {o} ready?",
    "order {o}?",
    "I have a problem with order {o}", "what did {f} order?", "can you check order {o}?", "my parcel is late",
    "I want my money back", "how long does delivery take?", "what does it cost?", "what is the total?",
    "I want to return the {h}", "when does my {h} arrive?", "how much was the {h}?",
)  # fmt: skip


def chat(level: int, rng: Random) -> Draft:
    """Greetings, off-topic requests and questions without their records; more noise at higher levels."""
    kind = rng.random()
    if kind < 0.55:
        ways, reply = pick(rng, TALK)
        text = pick(rng, ways)
        if rng.random() < 0.7:
            text = pick(rng, LEADS) + text + pick(rng, TAILS)
        if level >= 2 and rng.random() < 0.5:
            text = f"{pick(rng, TALK[0][0])}{pick(rng, (', ', '! ', '. '))}{text}"
        text += pick(rng, ("", "!", ".", "?", "!!", "..."))
    elif kind < 0.9:
        text, reply = _off_topic(rng), REFUSAL
        if rng.random() < 0.3:
            text = pick(rng, ("please ", "can you ", "hello, ", "hi! ", "could you ", "hey, ")) + text
    else:
        reply = NO_RECORDS
        text = pick(rng, NEEDS_RECORDS).format(o=order_id(rng), f=person(rng), h=pick(rng, THINGS))
        if rng.random() < 0.3:
            text = pick(rng, ("please, ", "hello, ", "hi! ", "hello! ")) + text
    if level >= 3:
        text = _typo(rng, text)
    bare = text.strip(" .!?:)").lower()
    key = "" if len(bare) < 6 or bare in PLAIN else f"chat {bare}"
    return Draft(_case(rng, text), reply, key)


def _off_topic(rng: Random) -> str:
    if rng.random() < 0.12:
        letters = "abcdefghijklmnopqrstuvwxyz"
        words = [
            "".join(pick(rng, letters) for _ in range(between(rng, 4, 9))) for _ in range(between(rng, 1, 4))
        ]
        return " ".join(words)
    text = pick(rng, OFF_TOPIC).format(
        w=pick(rng, WORKS),
        x=pick(rng, TOPICS),
        y=pick(rng, PLACES),
        z=pick(rng, PLACES),
        n=between(rng, 2, 99),
    )
    if rng.random() < 0.15:
        return f"{text.rstrip('?')}. {_sentence(_off_topic(rng))}"
    return text if rng.random() < 0.8 else text.rstrip("?") + pick(rng, ("?", ".", "!", ", please", ""))


def _case(rng: Random, text: str) -> str:
    kind = rng.random()
    if kind < 0.6:
        return _sentence(text)
    return text.upper() if kind > 0.97 else text


def _typo(rng: Random, text: str) -> str:
    """One letter dropped, doubled or swapped with its neighbour."""
    place = between(rng, 0, max(0, len(text) - 2))
    match between(rng, 0, 2):
        case 0:
            return text[:place] + text[place + 1 :]
        case 1:
            return text[:place] + text[place] + text[place:]
        case _:
            return text[:place] + text[place + 1 : place + 2] + text[place] + text[place + 2 :]
