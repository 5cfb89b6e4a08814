"""Whether two questions can have the same answer, by their words. Pure.

Every word and stop counts, except in a closed list of ways to put a question. Numbers, names, dates, units,
negations, comparisons, directions, modals, pronouns and symbols are hard: where they differ, in kind or in
order, so may the answer, however alike the texts are. English; in other languages every word counts.
"""

from __future__ import annotations

import re
from typing import Literal, NamedTuple

Likeness = Literal["same words", "other words"]
LONGEST = 2000  # characters of a question that is compared

RECORDS = "order ticket invoice booking shipment case account".split()
RECORD = rf"(?:{'|'.join(RECORDS)}) (?:[A-Za-z]+-?)?\d[\w-]*"
MEASURES = r"(?:price|cost|status|quantity|size|weight|length|height|width|colou?r|age)"
# What a request for a fact asks for. A request for other things is no question: find, give, show me the cat.
FACT = rf"(?=the (?:[\w-]+ ){{1,2}}(?:of|for) {RECORD}|the {MEASURES} of\b)"
OPEN = r"(?=(?:what|which|who|whose|when|where|why|if|whether)\b)"
# Politeness, and ways to ask for a fact. They are taken out only at the edges, and only in front of what they
# can ask for: elsewhere, `please` may be what is asked about, or a verb.
FRAMES = re.compile(
    r"^(?:(?:hi|hello|hey)(?: there| desk)?|good (?:morning|afternoon|evening))\s*[,.!]\s*(?=\S+ \S+ \S)"
    r"|^please\b,?\s*(?=\w)(?!(?:me|my|you|your|him|his|her|them|their|us|our|the|a|an|every\w+)\b)"
    r"|(?<=[.?!])\s*(?:please|thanks|thank you)[.!]*$|,\s*please[.!?]*$"
    rf"|^(?:(?:can|could|would|will) you\s+(?:please\s+)?)?(?:(?:tell|show|give) me|look up|find)\s+{FACT}"
    rf"|^(?:(?:can|could|would|will) you\s+(?:please\s+)?)?tell me\s+{OPEN}"
    rf"|^i need\s+{FACT}|^(?:do you know|i (?:would like|want|need) to know)\s+{OPEN}",
    re.IGNORECASE,
)
# Where words are asked about, any of them may be what is asked about; in a short text, what it points at too.
ABOUT_WORDS = re.compile(
    r"\b(?:says?|said|saying|spell\w*|pronounc\w*|translat\w*|transcri\w*|repeat\w*|mean\w*|languages?|quot\w*"
    r"|greet\w*|written|letters?|vowels?|syllables?|words?|rhym\w*|revers\w*)\b",
    re.IGNORECASE,
)
POINTING = re.compile(
    r"\b(?:it|that|this|these|those|above|below|following|next|last|sing|s[au]ng|songs?|titles?)\b",
    re.IGNORECASE,
)
SHORT = 100  # characters
# One form for the ways to ask for what something has. `of` and `have` say the same of few things: a picture
# of Ann is not the one that she has.
WHAT_OF = re.compile(r"^(?:what is )?the ((?:[\w-]+ ){1,3})of\b", re.IGNORECASE)
WHAT_IT_HAS = re.compile(
    rf"^(?:what|which) ({MEASURES}) (?:does|do) (.+) have|^(?:what|which) ([\w-]+) does ({RECORD}) have"
    rf"|^(?:what|which) ([\w-]+) is recorded for ({RECORD})|^(?:what is )?the ([\w-]+) for ({RECORD})",
    re.IGNORECASE,
)
# Words that mean something else with a capital letter. Those in capitals alone are told apart too: US, us.
CASED = frozenset("may march will mark polish turkey china bill rose hope grace august job nice".split())
# An action on something, not a state: how I look is not how to look.
HOW_TO = re.compile(
    r"^how (?:(?:do|can) i|to)\b(?! (?:look|feel|know|see|hear|find|think|want|need|love|like|have|do)\b)"
    r"(?= \w+(?: \w+)? (?:my|the|a|an|this|that|these|those|our|your)\b)",
    re.IGNORECASE,
)
SHORT_FORMS = (
    (re.compile(r"\bcan['\u2019]t\b|\bcannot\b", re.IGNORECASE), "can not"),
    (re.compile(r"\bwon['\u2019]t\b", re.IGNORECASE), "will not"),
    (re.compile(r"n['\u2019]t\b", re.IGNORECASE), " not"),
    (re.compile(r"\b(what|who|where|when|how|that|it|there)['\u2019]s\b", re.IGNORECASE), r"\1 is"),
    (re.compile(r"['\u2019]re\b", re.IGNORECASE), " are"),
    (re.compile(r"['\u2019]ll\b", re.IGNORECASE), " will"),
    (re.compile(r"\bi['\u2019]m\b", re.IGNORECASE), "i am"),
)
NUMBERS = "zero one two three four five six seven eight nine ten eleven twelve".split()
SAME = {
    **{word: "buy" for word in ("bought", "purchase", "purchased")},
    **{word: str(number) for number, word in enumerate(NUMBERS)},
}
KINDS = ("who", "whom", "whose", "when", "where", "why", "how", "what", "which")
AUXILIARIES = frozenset(
    "is are am was were do does did has have had can could will would should may must".split()
)
# With which sentences begin in capitals whatever they mean.
OPENING = AUXILIARIES | {*KINDS, *"the a an i my your to in on if and but there it".split()}
HARD = frozenset(
    (
        # negation and exception
        "no not never none nothing nobody nowhere neither nor without except excluding unless lack "
        "lacks fail fails "
        # comparison and quantity
        "more less most least fewer fewest than as same different other another better best worse "
        "worst bigger biggest smaller smallest larger largest higher highest lower lowest cheaper "
        "cheapest longer longest shorter shortest older oldest newer newest earlier earliest later "
        "latest faster fastest slower slowest first second third last next previous both all any "
        "every each some only half twice double minimum maximum min max average total sum count many "
        "much few several or and but of for do does has have "
        # direction, place and time
        "from to into onto before after until till since by within during between over under above "
        "below against through via in on at up down out off with today tomorrow yesterday now ago "
        "always sometimes often again monday tuesday wednesday thursday friday saturday sunday "
        "january february march april june july august september october november december spring "
        "summer autumn winter "
        # condition, modality and person
        "if when whether while because was were did had been be will would can could should may might "
        "must shall i me my mine you your yours he him his she her hers it its we us our ours they "
        "them their theirs this that these those who whom whose where why how "
        # units
        "second seconds minute minutes hour hours day days week weeks month months year years century "
        "mm cm m km inch inches foot feet yard yards mile miles mg g kg gram grams kilo kilos "
        "kilogram kilograms ton tons tonne tonnes ounce ounces oz pound pounds lb lbs ml l litre "
        "litres liter liters gallon gallons pint pints cup cups c f k celsius fahrenheit kelvin "
        "degree degrees percent euro euros eur dollar dollars usd gbp chf yen jpy sek pln mxn cent "
        "cents watt watts kw kwh volt volts joule joules hz khz mhz ghz bit bits byte bytes kb mb gb "
        "tb am pm dozen hundred thousand million billion true false yes "
    ).split()
)
TOKEN = re.compile(
    r"(?:(?<=\s)|^)[-+]?\d(?:[\w.,:/%-]*\w)?%?|\d+%?"  # numbers, dates, times
    r"|[^\W\d_][\w'\u2019-]*[\w]|[^\W_]"  # words, and ids like A-17
    r"|\n[ \t]*"  # what begins a line, as in a program
    r"|[^\w\s]|_"  # symbols and stops
)
GROUPS = re.compile(r"(?<![\w.,(\[{])([1-9]\d{0,2}(?:,\d{3})+)(?![\w,]|\.\d)")
SENTENCE_ENDS = frozenset('.!?:"\u201c')


class Words(NamedTuple):
    """A question, read. `kind`: what it asks for; `content`: the words that count; `hard`: those among them
    that must be equal."""

    kind: str
    content: tuple[str, ...]
    hard: tuple[str, ...]


def read(text: str) -> Words | None:
    """The words of a question; None for a text that is too long, or has none."""
    if len(text) > LONGEST:
        return None
    bare = text.strip()
    for pattern, long in SHORT_FORMS:
        bare = pattern.sub(long, bare)
    if not (ABOUT_WORDS.search(bare) or (len(bare) < SHORT and POINTING.search(bare))):
        for _ in range(4):  # a greeting, a request, a please and thanks may follow each other
            bare = FRAMES.sub("", bare).strip()
    asks = bare.endswith("?")
    bare, kind = _framed(_unended(bare))
    content, hard = list[str](), list[str]()
    for number, match in enumerate(TOKEN.finditer(bare)):
        word = match[0]
        plain = word.lower() if content and content[-1] in RECORDS else _plain(bare, match)
        if number == 0 and not kind:
            kind = _kind(plain)
            if plain == kind:
                continue
        content.append(plain)
        if _is_named(bare, match) or _is_hard(plain, word):
            hard.append(plain)
    if not any(each[0].isalnum() for each in content):
        return None
    if asks and not kind:  # a statement may be a question, or not
        content.append("?")
        hard.append("?")
    return Words(kind, tuple(content), tuple(hard))


def _unended(bare: str) -> str:
    """The text without the stops at its end; `5!` and `n!` are no shouts."""
    bare = bare.rstrip(".? \n")
    return bare[:-1] if bare.endswith("!") and len(bare) > 2 and bare[-3:-1].isalpha() else bare


def _framed(bare: str) -> tuple[str, str]:
    """What is asked about, and the kind of the question if its beginning tells."""
    if (how_to := HOW_TO.match(bare)) is not None:
        return bare[how_to.end() :], "how to"
    bare = GROUPS.sub(lambda match: match[1].replace(",", ""), bare)
    if (has := WHAT_IT_HAS.fullmatch(bare)) is not None:
        what, of = [part for part in has.groups() if part is not None]
    elif (asked := WHAT_OF.match(bare)) is not None:
        what, of = asked[1].strip(), bare[asked.end() :].strip()
    else:
        return bare, ""
    return f"{'price' if what.lower() == 'cost' else what} of {of}", "what of"


def _plain(text: str, match: re.Match[str]) -> str:
    """A word as it is compared: without the capital letter that says nothing."""
    word = match[0]
    plain = word.lower().replace("\u2019", "'")
    plain = SAME.get(plain, plain)
    if word.islower() or plain == "i" or not word[0].isalnum():
        return plain
    if any(map(str.isdigit, word)) or any(map(str.isupper, word[1:])):
        return word  # 5M and 5m, US and us, pH and PH
    if _begins(text, match.start()):
        return plain if plain in OPENING else word
    return word if len(word) == 1 or plain in CASED else plain


def likeness(one: Words, other: Words) -> Likeness | None:
    """How alike two questions are; None when a word differs that can change the answer."""
    if one.kind != other.kind or one.hard != other.hard:
        return None
    return "same words" if one.content == other.content else "other words"


def _kind(first: str) -> str:
    """What a question asks for, by its first word."""
    if first in AUXILIARIES:
        return f"yes or no: {first}"
    return first if first in KINDS else ""


def _begins(text: str, at: int) -> bool:
    """Whether a sentence begins there, so that a capital letter says nothing."""
    before = at
    while before and text[before - 1].isspace():
        before -= 1
    return not before or text[before - 1] in SENTENCE_ENDS or "\n" in text[before:at]


def _is_named(text: str, match: re.Match[str]) -> bool:
    """Whether a capital letter makes it a name."""
    return match[0][0].isupper() and not _begins(text, match.start())


def _is_hard(plain: str, word: str) -> bool:
    """Whether a word is hard wherever it stands."""
    letters = plain.replace("'", "").replace("-", "")
    return (
        plain in HARD
        or plain.casefold() in HARD
        or not letters.isalpha()
        or len(word) == 1
        or any(map(str.isupper, word[1:]))
    )
