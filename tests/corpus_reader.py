"""Answers the corpus's questions by reading the text with patterns: independent of the generator."""

import re

VERBS = "hid|left|put|kept|stored|found|saw|dropped|placed|lost|locked"
PLACE = [
    rf"\w+ (?:{VERBS}) the (?P<k>\w+) in the (?P<v>\w+)\.",
    r"The (?P<k>\w+) (?:is|stood|was) in the (?P<v>\w+)(?: all day)?\.",
    r"You can find the (?P<k>\w+) in the (?P<v>\w+)\.",
    r"\w+ (?:carried|moved) the (?P<k>\w+) to the (?P<v>\w+)\.",
    r"Look for the (?P<k>\w+) in the (?P<v>\w+)\.",
]
STORY = {
    "Where is the (\\w+)\\?": ("The {k} is in the {v}.", PLACE),
    "What colour is the (\\w+)\\?": (
        "The {k} is {v}.",
        [
            r"\w+ painted the (?P<k>\w+) (?P<v>\w+)\.",
            r"The (?P<k>\w+) (?:was|looked|turned|is)(?: bright)? (?P<v>\w+)\.",
            r"\w+ made the (?P<k>\w+) dark (?P<v>\w+)\.",
            r"Everyone knew the (?P<k>\w+) was (?P<v>\w+)\.",
        ],
    ),
    "What is the work of (\\w+)\\?": (
        "{k} is a {v}.",
        [
            r"(?P<k>\w+) (?:is|works as|became|was|wanted to be) an? (?:good |old )?(?P<v>\w+)\.",
            r"They call (?P<k>\w+) the (?P<v>\w+)\.",
            r"Everyone knew (?P<k>\w+) as a (?P<v>\w+)\.",
        ],
    ),
    "Where does (\\w+) live\\?": (
        "{k} lives in {v}.",
        [
            r"(?P<k>\w+) (?:lives in|moved to|has a house in|came from|never left|was born in) (?P<v>\w+)\.",
            r"The home of (?P<k>\w+) is (?P<v>\w+)\.",
        ],
    ),
    "Which animal does (\\w+) have\\?": (
        "{k} has a {v}.",
        [
            r"(?P<k>\w+) (?:has|keeps|owns|found|bought|plays with|feeds) (?:a|the)"
            r" (?:small |young )?(?P<v>\w+)\.",
        ],
    ),
    "What does (\\w+) like\\?": (
        "{k} likes {v}.",
        [
            r"(?P<k>\w+) (?:likes|often eats|asked for|made some|loves|wants more) (?P<v>\w+)\.",
            r"For (?P<k>\w+) the best meal is (?P<v>\w+)\.",
        ],
    ),
}


def answer_from_text(kind: str, prompt: str) -> str:
    """The answer a careful reader gives to the question at the end of the prompt."""
    return _READERS[kind](prompt)


def _ledger(prompt: str) -> str:
    body, key = re.fullmatch(r"Ledger: (.*)\. Q: (\w+)\?", prompt).groups()
    pairs = dict(pair.split() for pair in body.split("; "))
    assert len(pairs) == body.count(";") + 1, "a key is given twice"
    return f"A: {key} {pairs[key]}."


def _two_hop(prompt: str) -> str:
    body, key = re.fullmatch(r"Chain: (.*)\. Q: (\w+)\?", prompt).groups()
    pairs = dict(pair.split() for pair in body.split("; "))
    return f"A: {key} {pairs[key]} {pairs[pairs[key]]}."


def _recall(prompt: str) -> str:
    body, keys = re.fullmatch(r"Ledger: (.*)\. Q: ([\w, ]+)\?", prompt).groups()
    pairs = dict(pair.split() for pair in body.split("; "))
    return "A: " + "; ".join(f"{key} {pairs[key]}" for key in keys.split(", ")) + "."


def _last_told(text: str, key: str, forms: list[str]) -> str | None:
    """The value that the last fitting sentence gives the key."""
    found = [
        (match.start(), match["v"])
        for form in forms
        for match in re.finditer(rf"(?:^|(?<=[. ])){form}", text)
        if match["k"] == key
    ]
    return max(found)[1] if found else None


def _story(prompt: str) -> str:
    ask = next(ask for ask in STORY if re.search(ask + "$", prompt))
    answer, forms = STORY[ask]
    question = re.search(ask + "$", prompt)
    return answer.format(k=question[1], v=_last_told(prompt[: question.start()], question[1], forms))


def _facts_of(text: str, keys: str) -> list[tuple[str, str, str]]:
    """(plain sentence, key, value) for each of the keys; every key has one fact."""
    facts = []
    for key in keys.split(", "):
        values = [(answer, key, _last_told(text, key, forms)) for answer, forms in STORY.values()]
        told = [fact for fact in values if fact[2]]
        assert len(told) == 1, (key, told)
        facts += told
    return facts


def _retell(prompt: str) -> str:
    text, keys = re.fullmatch(r"(.*) Tell of ([\w, ]+)\.", prompt).groups()
    return " ".join(answer.format(k=k, v=v) for answer, k, v in _facts_of(text, keys))


def _extract(prompt: str) -> str:
    text, keys = re.fullmatch(r"(.*) Q: ([\w, ]+)\?", prompt).groups()
    return "A: " + "; ".join(f"{k} {v}" for _, k, v in _facts_of(text, keys)) + "."


def _passkey(prompt: str) -> str:
    (key,) = re.findall(r"Remember that the passkey is (\w+ \w+)\.", prompt)
    return f"The passkey is {key}."


def _arithmetic(prompt: str) -> str:
    a, sign, b = re.fullmatch(r"What is (\d+)([+-])(\d+)\?", prompt).groups()
    return f"{a}{sign}{b}={int(a) + int(b) if sign == '+' else int(a) - int(b)}."


def _counting(prompt: str) -> str:
    beads, colour = re.fullmatch(r"Beads: (.*)\. How many are (\w+)\?", prompt).groups()
    return f"There are {beads.split().count(colour)} that are {colour}."


def _spelling(prompt: str) -> str:
    first, second = re.fullmatch(r"Spell (\w+) and (\w+)\.", prompt).groups()
    return f"The letters are {' '.join(first)} and {' '.join(second)}."


_READERS = {
    "ledger": _ledger,
    "recall": _recall,
    "retell": _retell,
    "extract": _extract,
    "two_hop": _two_hop,
    "facts": _story,
    "plain_facts": _story,
    "moves": _story,
    "passkey": _passkey,
    "arithmetic": _arithmetic,
    "counting": _counting,
    "spelling": _spelling,
}
