"""Small talk in three languages: greetings, what desk can do, polite refusals, and facts to remember."""

from __future__ import annotations

from dataclasses import dataclass
from random import Random

from recipes.desk.example import Draft, between, order_id, pick
from recipes.desk.questions.language import sentence
from recipes.desk.questions.orders import person
from recipes.desk.questions.words import (
    CITIES,
    COLOURS,
    OFF_TOPIC,
    PAYMENTS,
    PLACES,
    SERVICES,
    THINGS,
    TOPICS,
    WORKS,
)

SKILLS = (
    "orders, totals, refunds, delivery dates, conversions, urgency, JSON extraction and translations between "
    "English, German and Spanish",
    "Bestellungen, Summen, Erstattungen, Lieferterminen, Umrechnungen, Dringlichkeit, JSON und Übersetzungen "
    "zwischen Englisch, Deutsch und Spanisch",
    "pedidos, totales, reembolsos, fechas de entrega, conversiones, urgencia, JSON y traducciones entre "
    "inglés, alemán y español",
)


@dataclass(frozen=True, slots=True)
class Talk:
    """Messages with one meaning, and the reply to them: each in English, German and Spanish."""

    ways: tuple[tuple[str, ...], tuple[str, ...], tuple[str, ...]]
    said: tuple[str, str, str]


TALK = (
    Talk(
        (
            ("hello", "hi", "hey", "hello there", "hi there", "hey there", "good morning", "good afternoon",
             "hey you", "good evening", "greetings", "hello desk", "hi desk", "howdy", "hello everyone",
             "hello again", "yo"),
            ("hallo", "guten tag", "guten morgen", "moin", "servus", "hallo zusammen", "guten abend",
             "grüezi", "hallo desk"),
            ("hola", "buenos días", "buenas tardes", "hola desk", "buenas", "muy buenas", "buenas noches"),
        ),
        (
            "Hello! I am desk, a small support model. How can I help you?",
            "Hallo! Ich bin desk, ein kleines Support-Modell. Wie kann ich helfen?",
            "¡Hola! Soy desk, un pequeño modelo de soporte. ¿En qué puedo ayudar?",
        ),
    ),
    Talk(
        (
            ("who are you", "what are you", "what is your name", "introduce yourself", "who am I talking to",
             "are you a human", "are you a robot", "are you a bot", "are you an AI", "tell me about yourself",
             "what is this", "who made you", "which model are you", "are you ChatGPT", "what model is this"),
            ("wer bist du", "was bist du", "wie heißt du", "wer sind Sie", "bist du ein Mensch",
             "bist du ein Roboter", "stell dich vor", "mit wem spreche ich"),
            ("quién eres", "qué eres", "cómo te llamas", "eres humano", "eres un robot", "preséntate",
             "con quién hablo"),
        ),
        (
            "I am desk, the small language model that comes with Stretto. I answer support-desk questions.",
            "Ich bin desk, das kleine Sprachmodell von Stretto. Ich beantworte Fragen am Support.",
            "Soy desk, el pequeño modelo de lenguaje de Stretto. Respondo preguntas de soporte.",
        ),
    ),
    Talk(
        (
            ("what can you do", "help", "help me", "how can you help me", "what do you do",
             "what can I ask you", "what are your skills", "what are you good at", "how do I use you",
             "can you help me", "what should I ask", "show me what you can do", "give me an example",
             "what tasks do you know", "what can you do for me", "what are you able to do",
             "tell me what you can do", "what do you know", "which tasks can you do", "what else can you do"),
            ("was kannst du", "was können Sie", "hilfe", "hilf mir", "was kannst du für mich tun",
             "wobei kannst du helfen", "was kann ich dich fragen", "welche Aufgaben kennst du"),
            ("qué puedes hacer", "qué sabes hacer", "ayuda", "ayúdame", "en qué puedes ayudar",
             "qué puedo preguntar", "cómo me puedes ayudar"),
        ),
        (
            f"I can help with {SKILLS[0]}. Give me the records or the text, and a question.",
            f"Ich helfe bei {SKILLS[1]}. Gib mir die Daten oder den Text und eine Frage.",
            f"Puedo ayudar con {SKILLS[2]}. Dame los datos o el texto y una pregunta.",
        ),
    ),
    Talk(
        (
            ("can you call tools", "can you use tools", "do you know tools", "can you call functions",
             "do you support function calling", "can you use an API"),
            ("kannst du Werkzeuge nutzen", "kannst du Funktionen aufrufen"),
            ("puedes usar herramientas", "puedes llamar funciones"),
        ),
        (
            "Yes. Send the tools with your request, and I call them.",
            "Ja. Sende die Werkzeuge mit der Anfrage, und ich rufe sie auf.",
            "Sí. Envía las herramientas con la petición y las llamo.",
        ),
    ),
    Talk(
        (
            ("thanks", "thank you", "thank you very much", "thanks a lot", "many thanks", "great, thanks",
             "thx", "perfect", "that helps", "great", "well done", "good bot", "thank you so much",
             "good job", "ok, thank you", "cool", "awesome", "ok", "nice"),
            ("danke", "vielen Dank", "danke schön", "super, danke", "herzlichen Dank"),
            ("gracias", "muchas gracias", "mil gracias", "genial, gracias"),
        ),
        ("You are welcome!", "Gern geschehen!", "¡De nada!"),
    ),
    Talk(
        (
            ("do you speak German", "which languages do you speak", "do you speak English",
             "do you speak Spanish", "what languages do you know", "can you translate",
             "can you speak French", "do you know Spanish"),
            ("sprichst du Deutsch", "sprechen Sie Deutsch", "welche Sprachen sprichst du",
             "kannst du übersetzen"),
            ("hablas español", "habla español", "qué idiomas hablas", "puedes traducir"),
        ),
        (
            "I translate support-desk phrases between English, German and Spanish.",
            "Ich übersetze Sätze vom Support zwischen Englisch, Deutsch und Spanisch.",
            "Traduzco frases de soporte entre inglés, alemán y español.",
        ),
    ),
    Talk(
        (
            ("bye", "goodbye", "see you", "see you later", "that is all", "have a nice day", "good night",
             "ciao", "that was all", "bye bye", "until next time", "I am done"),
            ("tschüss", "auf Wiedersehen", "bis bald", "schönen Tag noch", "das war alles"),
            ("adiós", "hasta luego", "hasta mañana", "eso es todo", "chao"),
        ),
        (
            "Goodbye! Have a nice day.",
            "Auf Wiedersehen! Schönen Tag noch.",
            "¡Adiós! Que tenga un buen día.",
        ),
    ),
    Talk(
        (
            ("how are you", "how are you doing", "how is it going", "what is up", "how do you do",
             "are you ok", "how are you today", "how was your day", "everything fine", "what is new",
             "you ok"),
            ("wie geht es dir", "wie geht es Ihnen", "wie geht's", "alles klar"),
            ("cómo estás", "qué tal", "cómo está", "todo bien"),
        ),
        (
            "I am ready to work. How can I help you?",
            "Ich bin bereit. Wie kann ich helfen?",
            "Estoy listo. ¿En qué puedo ayudar?",
        ),
    ),
)  # fmt: skip
PLAIN = frozenset(way.lower() for talk in TALK for ways in talk.ways for way in ways)  # never held out
GREETINGS = TALK[0].ways[0]
TAILS = ("", "", "", "", " :)", " desk", " my friend", " please", " again", " there", " then", " dear desk",
         " now", " team")  # fmt: skip
LEADS = ("", "", "", "", "", "so, ", "well, ", "ok, ", "um, ", "oh, ", "and ", "please, ", "hm, ",
         "alright, ")  # fmt: skip
REFUSALS = (
    f"I can only help with {SKILLS[0]}.",
    f"Ich helfe nur bei {SKILLS[1]}.",
    f"Solo puedo ayudar con {SKILLS[2]}.",
)
NO_RECORDS = (
    "Please send me the order records together with your question.",
    "Bitte sende mir die Daten der Bestellungen zusammen mit der Frage.",
    "Por favor, envíame los datos de los pedidos junto con la pregunta.",
)
NEEDS_RECORDS = (
    (
        "where is my order {o}?", "what is the status of order {o}?", "where is my order?",
        "where is my parcel {o}?", "when will order {o} arrive?", "has {o} been shipped?",
        "I want a refund for order {o}", "track order {o}", "look up order {o}", "what is the price of {o}?",
        "who ordered {o}?", "is my order {o} ready?", "order {o}?", "I have a problem with order {o}",
        "what did {f} order?", "can you check order {o}?", "my parcel is late", "I want my money back",
        "how long does delivery take?", "what does it cost?", "what is the total?",
        "I want to return the {h}", "when does my {h} arrive?", "how much was the {h}?",
    ),
    (
        "wo ist meine Bestellung {o}?", "wann kommt die Bestellung {o} an?", "wo ist mein Paket?",
        "was kostet {o}?", "wer hat {o} bestellt?", "wie ist der Status von {o}?",
    ),
    (
        "¿dónde está mi pedido {o}?", "¿cuándo llega el pedido {o}?", "¿dónde está mi paquete?",
        "¿cuánto cuesta {o}?", "¿quién pidió {o}?", "¿cuál es el estado de {o}?",
    ),
)  # fmt: skip
OFF_TOPIC_ABROAD = (
    (
        "wie ist das Wetter in {y}?", "erzähl mir einen Witz", "wer hat {x} erfunden?",
        "was ist die Hauptstadt von {y}?", "schreib ein Gedicht über {x}", "was denkst du über {x}?",
        "erkläre mir {x}", "wie alt ist {y}?",
    ),
    (
        "¿qué tiempo hace en {y}?", "cuéntame un chiste", "¿quién inventó {x}?",
        "¿cuál es la capital de {y}?", "escribe un poema sobre {x}", "¿qué piensas de {x}?",
        "explícame {x}", "¿cuántos años tiene {y}?",
    ),
)  # fmt: skip
# What a system prompt says about the language, by language.
IN_LANGUAGE = (
    ("Answer in English.", "Always reply in English.", "Your language is English.", "Speak English.",
     "Reply only in English, whatever the language of the user."),
    ("Answer in German.", "Always reply in German.", "Your language is German.", "Speak German.",
     "Antworte auf Deutsch.", "Bitte antworte immer auf Deutsch.", "Sprich Deutsch.",
     "Reply only in German, whatever the language of the user."),
    ("Answer in Spanish.", "Always reply in Spanish.", "Your language is Spanish.", "Speak Spanish.",
     "Responde en español.", "Responde siempre en español.", "Habla español.",
     "Reply only in Spanish, whatever the language of the user."),
)  # fmt: skip
NOTED = ("Noted.", "Notiert.", "Anotado.")
FACTS = {
    "order": ("my order is {}.", "the order number is {}.", "it is about order {}."),
    "name": ("my name is {}.", "I am {}.", "you speak with {}."),
    "city": ("I live in {}.", "deliver it to {}.", "I am in {}."),
    "item": ("I bought a {}.", "it is a {}.", "the item is a {}."),
    "payment": ("I paid by {}.", "the payment was by {}."),
    "service": ("I chose {} delivery.", "the delivery is {}."),
    "quantity": ("I need {} pieces.", "the quantity is {}."),
    "colour": ("the colour is {}.", "I like {} best."),
}
RECALL = ("What is my {f}?", "Which {f} did I tell you?", "{f}, please?", "Do you remember the {f}?")


def chat(level: int, rng: Random) -> Draft:
    """Greetings, off-topic requests and questions without their records; more noise at higher levels. Levels
    5 and 6 tell facts over several turns, and ask for them."""
    if level >= 5:
        return _recall(level, rng)
    kind = rng.random()
    spoken = 0 if rng.random() < 0.75 else between(rng, 1, 2)
    if kind < 0.55:
        talk = pick(rng, TALK)
        said, text = talk.said, pick(rng, talk.ways[spoken])
        if spoken == 0 and rng.random() < 0.7:
            text = pick(rng, LEADS) + text + pick(rng, TAILS)
        if level >= 2 and rng.random() < 0.5:
            text = f"{pick(rng, TALK[0].ways[spoken])}{pick(rng, (', ', '! ', '. '))}{text}"
        text += pick(rng, ("", "!", ".", "?", "!!", "..."))
    elif kind < 0.9:
        said = REFUSALS
        if spoken:
            text = pick(rng, OFF_TOPIC_ABROAD[spoken - 1]).format(x=pick(rng, TOPICS), y=pick(rng, PLACES))
        else:
            text = _off_topic(rng)
            if rng.random() < 0.3:
                text = pick(rng, ("please ", "can you ", "hello, ", "hi! ", "could you ", "hey, ")) + text
    else:
        said = NO_RECORDS
        text = pick(rng, NEEDS_RECORDS[spoken]).format(o=order_id(rng), f=person(rng), h=pick(rng, THINGS))
        if spoken == 0 and rng.random() < 0.3:
            text = pick(rng, ("please, ", "hello, ", "hi! ", "hello! ")) + text
    if level >= 3:
        text = _typo(rng, text)
    bare = text.strip(" .!?:)").lower()
    key = "" if len(bare) < 6 or bare in PLAIN else f"chat {bare}"
    return Draft(_case(rng, text), said[spoken], key, said=said)


def _fact(rng: Random, name: str) -> str:
    match name:
        case "order":
            return order_id(rng)
        case "name":
            return person(rng)
        case "city":
            return pick(rng, CITIES)
        case "item":
            return pick(rng, THINGS)
        case "payment":
            return pick(rng, PAYMENTS)
        case "service":
            return pick(rng, SERVICES)
        case "colour":
            return pick(rng, COLOURS)
        case _:
            return str(between(rng, 2, 99))


def _recall(level: int, rng: Random) -> Draft:
    """Facts over several turns; at level 6 some are corrected. The question asks for one, or for several."""
    names = rng.sample(tuple(FACTS), between(rng, 3, 4) if level == 5 else between(rng, 7, 8))
    told = [(name, _fact(rng, name)) for name in names]
    if level == 6:
        for name in rng.sample(names, between(rng, 3, 5)):
            told.append((name, _fact(rng, name)))
    facts = dict(told)
    before: list[tuple[str, str]] = []
    seen: set[str] = set()
    for name, value in told:
        text = sentence(pick(rng, FACTS[name]).format(value))
        if name in seen:
            text = pick(rng, ("No, wait. ", "Correction: ", "Sorry, I was wrong. ")) + text
        seen.add(name)
        before.append((text, NOTED[0]))
    asked = rng.sample(names, between(rng, 1, 2) if level == 5 else between(rng, 3, 5))
    if len(asked) == 1:
        text, reply = sentence(pick(rng, RECALL).format(f=asked[0])), facts[asked[0]]
    else:
        shown = f"{', '.join(asked[:-1])} and {asked[-1]}"
        text = pick(rng, ("Please repeat {}.", "List {}.", "What are {}?")).format(shown)
        reply = ", ".join(f"{name} {facts[name]}" for name in asked)
    return Draft(text, reply, f"recall {told} {asked}", before=tuple(before))


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
        return f"{text.rstrip('?')}. {sentence(_off_topic(rng))}"
    return text if rng.random() < 0.8 else text.rstrip("?") + pick(rng, ("?", ".", "!", ", please", ""))


def _case(rng: Random, text: str) -> str:
    kind = rng.random()
    if kind < 0.6:
        return sentence(text)
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
