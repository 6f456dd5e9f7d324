"""The vocabulary of the small world.

Every entry is one common word: the BPE of a small tokenizer then holds each " word" as a single token, so
that recalling a value is one step of attention and not a chain of them. Classes are disjoint.
"""


def _words(text: str) -> tuple[str, ...]:
    return tuple(text.split())


NAMES = _words(
    """
    Amos Anna Ben Carl Clara Dora Edith Emil Eva Felix Finn Greta Hana Hugo Ida Iris Ivan Jack Jane
    Jonas Kate Kurt Lena Leo Lily Lucy Mara Marc Mia Milo Nina Noah Nora Olga Oscar Otto Paul Petra Rosa
    Ruth Sam Sara Simon Tess Theo Tom Vera Walter
    """
)
OBJECTS = _words(
    """
    basket bell book bottle box brush candle clock coin cup drum flute hammer hat kettle key knife lamp
    lantern letter map mirror needle pencil ribbon ring rope scarf spoon violin whistle wheel
    """
)
PLACES = _words(
    """
    attic bakery barn boat castle cave cellar chapel church field forest garage garden harbor hotel
    kitchen library market mill museum office school shed stable station tent theater tower tunnel
    valley village workshop
    """
)
JOBS = _words(
    """
    baker barber carpenter cook dancer doctor driver farmer fisher gardener guard hunter judge miller
    nurse painter pilot potter priest sailor singer smith tailor teacher
    """
)
TOWNS = _words(
    """
    Avon Bergen Cairo Delhi Dover Genoa Lima London Lyon Malta Milan Oslo Paris Porto Prague Quebec Riga
    Rome Seoul Tokyo Turin Vienna Warsaw York
    """
)
COLOURS = _words(
    """
    black blue brown gray green orange pink purple red silver white yellow
    """
)
ANIMALS = _words(
    """
    cat cow crow dog duck fox goat hen horse mouse parrot pig pony rabbit sheep wolf
    """
)
FOODS = _words(
    """
    apples beans bread cake cheese eggs fish honey milk nuts pears pie plums rice soup tea
    """
)

CLASSES = {
    "names": NAMES,
    "objects": OBJECTS,
    "places": PLACES,
    "jobs": JOBS,
    "towns": TOWNS,
    "colours": COLOURS,
    "animals": ANIMALS,
    "foods": FOODS,
}

# Words that are spelled, letter by letter.
SPELLED = tuple(word.lower() for group in CLASSES.values() for word in group)

FILLER = tuple(
    f"{subject} {verb} {end}."
    for subject, verbs, ends in (
        ("The wind", ("was", "felt"), ("cold", "warm", "calm", "strong")),
        ("The road", ("was", "looked"), ("long", "dry", "empty", "wet")),
        ("The evening", ("was", "came"), ("quiet", "slow", "late", "early")),
        (
            "People",
            ("talked", "laughed", "waited", "sang"),
            ("for a while", "all day", "until night", "together"),
        ),
        ("The old clock tower", ("rang", "stood"), ("at noon", "all day", "far away", "as before")),
        ("Rain", ("fell", "came"), ("all day", "at night", "for a while", "again")),
        ("The children", ("played", "slept", "ran"), ("outside", "until night", "together", "again")),
        ("Nothing", ("happened", "changed"), ("for a while", "that day", "after that", "again")),
    )
    for verb in verbs
    for end in ends
)
