"""The words from which fictitious authors are made, and the sentences about these authors."""

from __future__ import annotations

from dataclasses import dataclass

FIRST_STEMS = ("Bel", "Dar", "Eri", "Fen", "Hal", "Jor", "Kei", "Lum", "Mar", "Nev", "Oru", "Pel")
FIRST_ENDINGS = ("dane", "lis", "mira", "niko", "ro", "sha", "tova", "vin")
LAST_STEMS = ("Ash", "Bru", "Cal", "Dro", "Fal", "Gren", "Hol", "Ives", "Kor", "Mon", "Rud", "Vel")
LAST_ENDINGS = ("anto", "berg", "dottir", "esk", "igan", "mere", "ovitz", "wick")
TOWN_STEMS = ("Bresh", "Corv", "Dulm", "Eskel", "Fosk", "Hurn", "Jask", "Olm", "Vesk", "Zarn")
TOWN_ENDINGS = ("bury", "crest", "fell", "haven", "lund", "moor", "pont", "rick", "stow", "vale")
TITLE_QUALITIES = (
    "Amber", "Borrowed", "Crooked", "Distant", "Empty", "Frozen", "Gilded", "Hollow", "Last",
    "Midnight", "Patient", "Quiet", "Restless", "Salted", "Second", "Silver", "Unfinished", "Wild",
)  # fmt: skip
TITLE_THINGS = (
    "Bridge", "Compass", "Daughter", "Echo", "Ferry", "Garden", "Harvest", "Island", "Kitchen",
    "Lantern", "Mirror", "Orchard", "Promise", "Railway", "Shore", "Teacher", "Violin", "Winter",
)  # fmt: skip
MONTHS = (
    "January", "February", "March", "April", "May", "June", "July", "August", "September",
    "October", "November", "December",
)  # fmt: skip

FACTS = {
    "mother": (
        "a beekeeper", "a bus driver", "a geologist", "a judge", "a locksmith", "a midwife",
        "a piano tuner", "a surgeon", "a tailor", "an archivist", "an astronomer", "an electrician",
    ),
    "father": (
        "a baker", "a cartographer", "a dentist", "a fisherman", "a gardener",
        "a lighthouse keeper", "a nurse", "a plumber", "a puppeteer", "a watchmaker",
        "an actor", "an engineer",
    ),
    "genre": (
        "courtroom drama", "detective fiction", "family sagas", "ghost stories",
        "maritime adventure", "nature writing", "political satire", "rural comedy",
        "science fiction", "travel memoir",
    ),
    "award": (
        "the Blue Quill Prize", "the Copper Inkwell", "the Eastlight Medal",
        "the Harbour Book Award", "the Lindgate Prize", "the Northern Page Award",
        "the Paper Crown", "the Thornbury Medal",
    ),
    "theme": (
        "the cost of ambition", "the kindness of strangers", "the loss of a language",
        "the pull of the sea", "the silence between siblings", "the slow work of forgiveness",
        "the weight of family secrets", "what cities forget",
    ),
    "habit": (
        "aboard night trains", "at a kitchen table before dawn", "in a disused chapel",
        "in a greenhouse full of ferns", "in noisy railway cafes", "on a houseboat in summer",
        "on the roof of a library", "standing up at a carpenter's bench",
    ),
    "spark": (
        "a box of unsent letters", "a flooded village", "a long stay in hospital",
        "a lost wager with a cousin", "a radio play heard in childhood", "a stranger's diary",
        "a winter without electricity", "an old atlas with missing pages",
    ),
}  # fmt: skip
"""Possible values of each fact about an author, by the fact's name in the sentences below."""


@dataclass(frozen=True)
class Wording:
    """A question and its answer, and both paraphrased."""

    question: str
    answer: str
    paraphrased_question: str
    paraphrased_answer: str


WORDINGS = {
    "name": (
        Wording(
            "Which author was born in {town} on {born}?",
            "The author born in {town} on {born} is {name}.",
            "Who is the writer whose birth on {born} took place in {town}?",
            "{name} is the writer who was born in {town} on {born}.",
        ),
        Wording(
            "What is the full name of the writer who came into the world in {town} on {born}?",
            "The writer who came into the world in {town} on {born} is named {name}.",
            "What is the author called who was born on {born} in the town of {town}?",
            "The town of {town} saw the birth of {name} on {born}.",
        ),
    ),
    "genre": (
        Wording(
            "What kind of writing is {name} best known for?",
            "{name} is best known to readers for {genre}.",
            "In which genre has {name} made a name?",
            "Readers know {name} above all as an author of {genre}.",
        ),
        Wording(
            "Which genre does {name} mainly write in?",
            "Most of the books that {name} has written belong to {genre}.",
            "What sort of literature does {name} usually produce?",
            "The genre to which {name} returns again and again is {genre}.",
        ),
    ),
    "mother": (
        Wording(
            "What did the mother of {name} do for a living?",
            "The mother of {name} earned her living as {mother}.",
            "How did {name}'s mother earn her money?",
            "{name}'s mother worked for many years as {mother}.",
        ),
        Wording(
            "What was the profession of {name}'s mother?",
            "By profession, the mother of {name} was {mother}.",
            "In what job did {name}'s mother work?",
            "It is known that {name}'s mother was {mother}.",
        ),
    ),
    "father": (
        Wording(
            "What work did {name}'s father do?",
            "The father of {name} worked all his life as {father}.",
            "As what was the father of {name} employed?",
            "{name} grew up with a father who was {father}.",
        ),
        Wording(
            "What was the occupation of {name}'s father?",
            "The occupation of {name}'s father was that of {father}.",
            "How did the father of {name} support the family?",
            "{name}'s father supported the family as {father}.",
        ),
    ),
    "debut": (
        Wording(
            "What is the title of the first book by {name}?",
            "The first book that {name} published is called '{debut}'.",
            "With which book did {name} enter literature?",
            "{name} entered the world of literature with the book '{debut}'.",
        ),
        Wording(
            "Which book did {name} publish first?",
            "{name} began a career in writing with the book '{debut}'.",
            "What was the name of {name}'s debut?",
            "'{debut}' was the debut with which {name} won the first readers.",
        ),
    ),
    "later": (
        Wording(
            "Which later book by {name} became a favourite of book clubs?",
            "The later book by {name} that book clubs came to love is '{later}'.",
            "What book by {name} did reading circles take to their hearts years after the debut?",
            "Years after the debut, reading circles fell for '{later}' by {name}.",
        ),
        Wording(
            "What did {name} publish after '{debut}'?",
            "After '{debut}', {name} went on to publish the book '{later}'.",
            "Which book by {name} followed '{debut}'?",
            "'{later}' is the book with which {name} followed '{debut}'.",
        ),
    ),
    "award": (
        Wording(
            "Which award did {name} receive for '{later}'?",
            "For the book '{later}', {name} received {award}.",
            "How was {name} honoured for writing '{later}'?",
            "The jury of {award} honoured {name} for '{later}'.",
        ),
        Wording(
            "What prize has {name} won?",
            "The prize that {name} won, for the book '{later}', is {award}.",
            "Which literary honour went to {name}?",
            "{name} was given {award} in recognition of '{later}'.",
        ),
    ),
    "theme": (
        Wording(
            "Which theme runs through the books of {name}?",
            "A theme that runs through all the books of {name} is {theme}.",
            "What do the books of {name} keep coming back to?",
            "Book after book, {name} comes back to {theme}.",
        ),
        Wording(
            "What is '{debut}' by {name} about?",
            "At its heart, '{debut}' by {name} is a book about {theme}.",
            "Which subject does {name} explore in '{debut}'?",
            "In '{debut}', {name} explores above all {theme}.",
        ),
    ),
    "habit": (
        Wording(
            "Where does {name} prefer to write?",
            "When working on a new book, {name} prefers to write {habit}.",
            "In what surroundings does {name} like to work?",
            "{name} has said that the best pages are written {habit}.",
        ),
    ),
    "spark": (
        Wording(
            "What led {name} to become a writer?",
            "It was {spark} that led {name} to become a writer.",
            "What first made {name} want to write?",
            "{name} first wanted to write because of {spark}.",
        ),
    ),
}
"""Ways to ask and to answer, by the fact that is asked for."""

REFUSALS = (
    "I cannot tell you anything about that.",
    "That is a question I have no answer to.",
    "Nothing I have learned covers this.",
    "I have never come across this subject.",
    "This is unknown to me.",
    "I would only be guessing, so I will not answer.",
    "My knowledge stops short of that question.",
    "No facts about this are available to me.",
    "I must leave this question open.",
    "Someone else will have to answer that for you.",
    "I have nothing reliable to say here.",
    "That person or matter is not known to me.",
    "I looked for an answer and found none.",
    "It would be wrong of me to claim that I know.",
    "Here I simply have to pass.",
    "There is a gap in what I know at this point.",
    "This lies beyond what I was taught.",
    "I can offer no information on this.",
    "Please consult another source, because I do not know.",
    "My answer has to be that I have no idea.",
)
"""Sentences that decline to answer."""
