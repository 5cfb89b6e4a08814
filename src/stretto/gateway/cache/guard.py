"""Whether two questions can have the same answer, by their words. Pure.

Every word counts except a closed list of words by which a question is put. Numbers, names, dates, units,
negations, comparisons, directions, modals, pronouns and symbols are hard: where they differ, in kind or in
order, so may the answer, however alike the texts are. English; in other languages every word counts.
"""

from __future__ import annotations

import re
from typing import Literal, NamedTuple

Likeness = Literal["same words", "other words"]
LONGEST = 2000  # characters of a question that is compared

# Politeness and the ways to ask for a fact: they are taken out before the words are compared.
FRAMES = re.compile(
    r"^(?:(?:hi|hello|hey)(?: there| desk)?|good (?:morning|afternoon|evening))\s*[,.!]\s*"
    r"|\b(?:please|thanks|thank you)\b\s*[,.!]*"
    r"|^(?:(?:can|could|would|will) you\s+)?(?:tell|show|give) me\s+"
    r"|^(?:(?:can|could|would|will) you\s+)?(?:look up|find)\s+"
    r"|^do you know\s+|^i (?:would like|want|need) to know\s+|^i need\s+(?=the\b)",
    re.IGNORECASE,
)
# Words that mean something else with a capital letter. Those in capitals alone are told apart too: US, us.
CASED = frozenset("may march will mark polish turkey china bill rose hope grace august job nice".split())
HOW_TO = re.compile(r"^how (?:do|can|could|should) (?:i|we|you|one)\b|^how to\b", re.IGNORECASE)
SHORT_FORMS = (
    (re.compile(r"\bcan['\u2019]?t\b|\bcannot\b", re.IGNORECASE), "can not"),
    (re.compile(r"\bwon['\u2019]t\b", re.IGNORECASE), "will not"),
    (re.compile(r"n['\u2019]t\b", re.IGNORECASE), " not"),
    (re.compile(r"\b(what|who|where|when|how|that|it|there)['\u2019]s\b", re.IGNORECASE), r"\1 is"),
    (re.compile(r"['\u2019]re\b", re.IGNORECASE), " are"),
    (re.compile(r"['\u2019]ll\b", re.IGNORECASE), " will"),
    (re.compile(r"\bi['\u2019]m\b", re.IGNORECASE), "i am"),
)
# Words that carry nothing of what is asked once the kind of the question is known.
CARRIERS = frozenset("a an the is are do does have has of for what which recorded".split())
NUMBERS = "zero one two three four five six seven eight nine ten eleven twelve".split()
SAME = {
    **{word: "buy" for word in ("bought", "purchase", "purchased")},
    **{word: "price" for word in ("cost", "costs")},
    **{word: str(number) for number, word in enumerate(NUMBERS)},
}
KINDS = ("who", "whom", "whose", "when", "where", "why", "how", "what", "which")
AUXILIARIES = frozenset(
    "is are am was were do does did has have had can could will would should may must".split()
)
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
        "much few several or and but "
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
    r"|[^\w\s.,;:!?]|_"  # symbols
)
GROUPS = re.compile(r"(?<=\d),(?=\d{3}(?:\D|$))")
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
    for _ in range(3):  # a greeting, a request and a please may follow each other
        bare = FRAMES.sub("", bare).strip()
    how_to = HOW_TO.match(bare)
    bare = GROUPS.sub("", bare[how_to.end() :] if how_to else bare)
    kind, content, hard = "how to" if how_to else "", list[str](), list[str]()
    for number, match in enumerate(TOKEN.finditer(bare)):
        word = match[0]
        plain = word.casefold().replace("\u2019", "'")
        if number == 0 and not how_to:
            kind = _kind(plain)
        named = word[0].isupper() and not _begins(bare, match.start())
        if (plain in CARRIERS and not named) or (number == 0 and plain == kind):
            continue
        plain = SAME.get(plain, plain)
        if word.isalpha() and ((len(word) > 1 and word.isupper()) or (named and plain in CASED)):
            plain = word
        content.append(plain)
        if named or _is_hard(plain, word):
            hard.append(plain)
    if not content:
        return None
    return Words(kind, tuple(content), tuple(hard))


def likeness(one: Words, other: Words) -> Likeness | None:
    """How alike two questions are; None when a word differs that can change the answer."""
    if one.kind != other.kind or one.hard != other.hard:
        return None
    return "same words" if one.content == other.content else "other words"


def _kind(first: str) -> str:
    """What a question asks for, by its first word. A fact may be asked for with `what` or with no word."""
    if first in ("what", "which"):
        return ""
    if first in AUXILIARIES:
        return f"yes or no: {'do' if first in ('do', 'does') else first}"
    return first if first in KINDS else ""


def _begins(text: str, at: int) -> bool:
    """Whether a sentence begins there, so that a capital letter says nothing."""
    before = at
    while before and text[before - 1].isspace():
        before -= 1
    return not before or text[before - 1] in SENTENCE_ENDS or "\n" in text[before:at]


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
