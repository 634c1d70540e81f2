#!/usr/bin/env python3
"""Write the English text that the tiny base model is trained on.

    python data/make_text.py [--characters N] [--seed N] > corpus.txt

Everything comes from two original sources: the table in things.txt (what things are, have and do)
and the templates below. No outside text is used. The same seed gives the same text.

A template is a line with two kinds of holes: [this|that] is one of the alternatives, {word} is
looked up first among the names bound for the document (its people, its things), then in LEXICON.
Documents are separated by an empty line; make_tiny.py turns that into <|endoftext|>.
"""
import argparse
import pathlib
import random
import re
import sys

THINGS = pathlib.Path(__file__).with_name("things.txt")

# ---------------------------------------------------------------------------- the table of things

IRREGULAR = {"has": "have", "is": "am", "was": "was", "does": "do", "goes": "go",
             "lies": "lie", "dies": "die", "ties": "tie"}
ADVERBS = {"never", "always", "often", "sometimes", "only"}


def base_form(verb):
    """tells -> tell, flies -> fly, catches -> catch; can, must, was stay as they are"""
    if verb in IRREGULAR:
        return IRREGULAR[verb]
    if verb.endswith("ies"):
        return verb[:-3] + "y"
    if re.search(r"(ss|sh|ch|x|zz|o)es$", verb):
        return verb[:-2]
    return verb[:-1] if verb.endswith("s") and not verb.endswith("ss") else verb


class Thing:
    def __init__(self, line):
        name, kind, place, made_of, use, phrases = (part.strip() for part in line.split("|"))
        self.name = name                                  # "a clock", "the sun", "rain"
        self.bare = re.sub(r"^(a|an|the) ", "", name)     # "clock"
        self.the = "the " + self.bare
        self.kind, self.place = kind, place
        self.made_of = None if made_of == "-" else made_of
        self.use = None if use == "-" else use
        self.phrases = [phrase.strip() for phrase in phrases.split(";")]

    def portable(self):
        """Something a person can carry, lose and give away."""
        return (self.name.startswith("a") and not self.animal()
                and re.match(r"an? (thing (for|to)|tool|small|toy|instrument|soft)", self.kind)
                and "travelling" not in self.kind
                and self.bare not in ("star", "seed", "piano", "swing"))

    def animal(self):
        return re.search(r"animal|bird|pet|insect|cat$", self.kind) and " of " not in self.kind


def read_things():
    lines = THINGS.read_text(encoding="utf-8").splitlines()
    return [Thing(line) for line in lines if line and not line.startswith("#")]


def first_person(phrase, verbs):
    """has its house on its back -> have my house on my back"""
    words = phrase.split()
    start = 1 if words[0] in ADVERBS else 0
    words[start] = base_form(words[start])
    text = " ".join(words)

    def coordinated(match):
        adverb, verb = match.group(2) or "", match.group(3)
        return match.group(1) + adverb + " " + (base_form(verb) if verb in verbs else verb)

    text = re.sub(r"\b(but|and)( never)? (\w+)", coordinated, text)
    text = re.sub(r"\bit (\w+s)\b", lambda m: "I " + base_form(m.group(1)), text)
    text = re.sub(r"\bitself\b", "myself", text)
    return re.sub(r"\bit\b", "me", re.sub(r"\bits\b", "my", text))


# ------------------------------------------------------------------------------------ the words

PEOPLE = [("Anna", "she"), ("Ben", "he"), ("Clara", "she"), ("David", "he"), ("Emma", "she"),
          ("Felix", "he"), ("Greta", "she"), ("Henry", "he"), ("Ida", "she"), ("Jack", "he"),
          ("Lena", "she"), ("Max", "he"), ("Mia", "she"), ("Noah", "he"), ("Olga", "she"),
          ("Paul", "he"), ("Rosa", "she"), ("Sam", "he"), ("Tina", "she"), ("Victor", "he")]
PRONOUNS = {"she": ("she", "her", "her"), "he": ("he", "him", "his")}

LEXICON = {key: value.split("|") for key, value in {
    "relative": "mother|father|brother|sister|grandmother|grandfather|aunt|uncle|cousin",
    "job": "farmer|baker|teacher|doctor|sailor|gardener|carpenter|postman|cook|fisherman|tailor",
    "place": "garden|kitchen|forest|market|park|school|old house|village|yard|station|cellar|field",
    "far": "by the river|near the sea|behind the hill|at the end of the road|in a small town|"
           "next to the forest|above a shop|in the mountains|on a farm|beside the old bridge",
    "weather": "It was a sunny day|It was raining|Snow was falling|A cold wind was blowing|"
               "It was foggy|The sky was gray|The sky was blue|It was warm and bright|"
               "Thunder rolled in the distance|The sun was shining|It was very hot",
    "day": "Monday|Tuesday|Wednesday|Thursday|Friday|Saturday|Sunday",
    "when": "One morning|One evening|One day|In the afternoon|Last winter|Last summer|"
            "Early in the morning|One night|On a cold day|After school|Before dinner|Yesterday",
    "season": "spring|summer|autumn|winter",
    "color": "red|blue|green|yellow|white|black|brown|gray|orange|pink",
    "size": "small|big|little|tiny|large|huge",
    "nice": "pretty|lovely|fine|good|beautiful|wonderful",
    "mood": "happy|sad|tired|angry|proud|hungry|afraid|surprised|bored|glad|quiet|thirsty",
    "glad": "happy|glad|proud|very happy|so glad|full of joy",
    "food": "bread|soup|cheese|cake|apples|eggs|honey|potatoes|rice|fish|salad",
    "drink": "tea|milk|water|juice|hot milk",
    "said": "said|answered|replied|called|whispered",
    "animal": "cat|dog|cow|horse|hen|duck|goat|rabbit|parrot|pig",
    "number": "two|three|four|five|six|seven|eight|ten|twelve",
    "softly": "slowly|quickly|carefully|quietly|gently|at once",
}.items()}


class Writer:
    """Expands templates with one random generator."""

    def __init__(self, seed):
        self.rng = random.Random(seed)
        self.things = read_things()
        self.portable = [thing for thing in self.things if thing.portable()]
        self.animals = [thing for thing in self.things if thing.animal()]
        self.useful = [thing for thing in self.things if thing.use]
        self.solid = [thing for thing in self.things if thing.made_of]
        self.verbs = {phrase.split()[0] for thing in self.things for phrase in thing.phrases}
        self.verbs |= {phrase.split()[1] for thing in self.things for phrase in thing.phrases
                       if phrase.split()[0] in ADVERBS}

    def pick(self, items):
        return items[self.rng.randrange(len(items))]

    def some(self, items, count):
        return self.rng.sample(items, min(count, len(items)))

    def me(self, phrase):
        return first_person(phrase, self.verbs)

    def fill(self, template, names=None):
        names = names or {}
        while True:
            text = re.sub(r"\[([^\[\]]*)\]", lambda m: self.pick(m.group(1).split("|")), template)
            text = re.sub(r"\{(\w+)\}", lambda m: names[m.group(1)] if m.group(1) in names
                          else self.pick(LEXICON[m.group(1)]), text)
            if text == template:
                return sentence_case(text)
            template = text

    def people(self):
        """Two people, bound as N he him his and M he2 him2 his2, a relative and someone's job."""
        (one, one_he), (two, two_he) = self.some(PEOPLE, 2)
        he, him, his = PRONOUNS[one_he]
        he2, him2, his2 = PRONOUNS[two_he]
        return {"N": one, "he": he, "him": him, "his": his,
                "M": two, "he2": he2, "him2": him2, "his2": his2,
                "relative": self.pick(LEXICON["relative"]), "job": self.pick(LEXICON["job"])}


def sentence_case(text):
    """A capital at the start, after a full stop, and at the start of a quotation; a(n)."""
    text = re.sub(r"\b(a|A) (?=[aeiou](?!ne\b|nit))", r"\1n ", text)
    return re.sub(r"(^\"?|[.!?] \"?|\n|: )([a-z])", lambda m: m.group(1) + m.group(2).upper(),
                  text)


# -------------------------------------------------------------------------- facts about one thing

def description(w):
    thing = w.pick(w.things)
    lines = []
    if w.rng.random() < 0.7:
        lines.append(f"{thing.name} is {thing.kind}.")
    facts = [f"it {phrase}." for phrase in w.some(thing.phrases, w.rng.randrange(2, 6))]
    if lines or w.rng.random() < 0.5:
        facts[0] = facts[0] if lines else f"{thing.name} {facts[0][3:]}"
    else:
        facts[0] = f"look at {thing.the}. " + facts[0]
    extra = [f"[you can find it|you see it|it is often] {thing.place}."]
    if thing.made_of:
        extra.append(f"it is made of {thing.made_of}.")
    if thing.use:
        extra.append(f"[people use it to|we need it to|you can use it to] {thing.use}.")
    lines += facts + w.some(extra, w.rng.randrange(len(extra) + 1))
    return w.fill(" ".join(lines))


def two_facts(w):
    thing = w.pick(w.things)
    one, two, three = w.some(thing.phrases, 3)
    return w.fill(w.pick([
        f"{thing.name} {one}. It {two} and {three}.",
        f"{thing.name} {one}, and it {two}.",
        f"everyone knows that {thing.name} {one}. It also {two}.",
        f"the {{job}} says that {thing.name} {one} and {two}.",
        f"{thing.name} {one} and {two}. That is why [we like it|people know it|we all know it].",
    ]))


def monologue(w):
    thing = w.pick(w.things)
    lines = [f"I {w.me(phrase)}." for phrase in w.some(thing.phrases, w.rng.randrange(3, 6))]
    if w.rng.random() < 0.5:
        return w.fill(f"I am {thing.name}. " + " ".join(lines))
    return w.fill(" ".join(lines) + f" I am {thing.name}.")


def guess(w, thing):
    """A question about a thing that does not name it, made from its phrases."""
    one, two, three = w.some(thing.phrases, 3)
    kind = re.sub(r"^an? ", "", thing.kind)
    question = w.pick([
        f"what {one}?", f"what {one} and {two}?", f"what is it that {one} and {two}?",
        f"it {one}. It {two}. What is it?", f"I {w.me(one)}. I {w.me(two)}. What am I?",
        f"I {w.me(one)} and {w.me(two)}. Who am I?", f"which {kind} {one}?",
        f"it {one}, and it {two}. What can it be?", f"you find it {thing.place}. It {one}. "
        "What is it?", f"which thing {one} and {two}?",
        f"I {w.me(one)}, and I {w.me(two)}. What is my name?",
    ])
    return question, three


def quiz(w):
    lines = []
    for _ in range(w.rng.randrange(1, 4)):
        thing = w.pick(w.things)
        question, fact = guess(w, thing)
        answer = f"{thing.name}. It {fact}." if w.rng.random() < 0.7 else f"{thing.name}."
        lines.append(f"Question: {sentence_case(question)}\nAnswer: {sentence_case(answer)}")
    return w.fill("\n".join(lines))


def plain_questions(w):
    lines = []
    for _ in range(w.rng.randrange(1, 4)):
        useful, solid, thing = w.pick(w.useful), w.pick(w.solid), w.pick(w.things)
        question, answer = w.pick([
            (f"what is {useful.name} for?", f"people use it to {useful.use}."),
            (f"what do we need to {useful.use}?", f"{useful.name}."),
            (f"what is {solid.name} made of?", f"it is made of {solid.made_of}."),
            (f"where do you find {thing.name}?", f"{thing.place}."),
            (f"what is {thing.name}?", f"{thing.kind}. It {w.pick(thing.phrases)}."),
            (f"what can you say about {thing.the}?", f"it {w.pick(thing.phrases)}."),
        ])
        lines.append(f"Question: {sentence_case(question)}\nAnswer: {sentence_case(answer)}")
    return w.fill("\n".join(lines))


def game(w):
    """Children think of things: clues first, the name at the end, in prose."""
    thing = w.pick(w.things)
    names = w.people()
    names["name"] = thing.name
    clues = [f"it {phrase}" for phrase in w.some(thing.phrases, w.rng.randrange(2, 4))]
    joined = ". ".join(sentence_case(clue) for clue in clues)
    return w.fill(w.pick([
        f"\"I am thinking of something,\" said {{N}}. \"{joined}. What is it?\" {{M}} thought "
        f"[for a while|hard|for a moment]. \"{{name}}!\" {{he2}} [said|cried|called].",
        f"\"Guess what I saw today,\" said {{N}}. \"{joined}.\" \"It was {{name}}!\" {{said}} "
        "{M}. \"[Yes|That is right|You are right],\" said {N}.",
        f"{{N}} played a game with {{his}} {{relative}}. \"{joined}. Do you know it?\" "
        f"\"That must be {{name}},\" said the {{relative}}.",
        f"The {{job}} asked the children about a thing. {joined}. {{N}} knew it at once. "
        f"It was {{name}}.",
    ]), names)


def groups(w):
    thing = w.pick(w.things)
    others = [other for other in w.things if other.kind == thing.kind and other is not thing]
    other = w.pick(others or w.things)
    far = w.pick([x for x in w.things if x.kind != thing.kind])
    template = w.pick([
        f"{thing.name} is {thing.kind}, but {far.name} is {far.kind}.",
        f"{thing.name} {w.pick(thing.phrases)}. {other.name} {w.pick(other.phrases)}.",
        f"{thing.name} {w.pick(thing.phrases)}, but {far.name} {w.pick(far.phrases)}.",
        f"{thing.name} is not {far.name}. {thing.name} {w.pick(thing.phrases)}. {far.name} "
        f"{w.pick(far.phrases)}.",
        f"you find {thing.name} {thing.place} and {far.name} {far.place}.",
    ])
    if others and w.rng.random() < 0.3:
        template = f"{thing.name} and {other.name} are not the same, but each of them is " \
                   f"{thing.kind}. " + template
    return w.fill(template)


# ---------------------------------------------------------------------------- stories, dialogues

STORIES = [
    # something is lost and found
    ["{N} [lived|had a house] {far} with {his} {relative}. ", "{when} {N} could not find {the}. ",
     "[{he} needed it to {his_use}. |It was {place} every day, but now it was gone. |]",
     "{he} looked [under the bed|behind the door|in every room|in the drawer|on the shelf]. ",
     "[{he} looked in the {place2}, too. |Then {he} asked {his} {relative}. |]",
     "\"Have you seen my {bare}?\" {he} asked {M}. ",
     "\"[No|Not today|I am sorry, no],\" {said} {M}, \"but I will help you [look|search].\" ",
     "They looked for a long time. ",
     "At last they found {the} [under a chair|in the {place2}|behind the curtain|in a box|on the "
     "roof|beside the stove|in the grass]. ",
     "{N} was {glad}. ", "[\"Thank you,\" {he} said. |That evening they laughed about it. |"
     "From that day on {he} kept it {place}. |]"],
    # a gift
    ["{when} {M} came to visit {N}. ", "[{weather}. |]",
     "{he2} had a {size} box under {his2} arm. ",
     "\"What is in the box?\" asked {N}. ", "\"Open it and see,\" {said} {M}. ",
     "{N} opened it {softly}. ", "Inside was {a}. ", "It was {color} and very {nice}. ",
     "\"Now you can {use}!\" said {M}. ", "{N} was {glad}. ",
     "[They drank {drink} together and talked until the evening. |{he} put it {place}. |"
     "{he} showed it to {his} {relative}. |]"],
    # an animal
    ["[Once there was|There was once] {beast} that lived {far}. ", "It {beast1}. ",
     "{when} it met {beast_b}. ", "\"Who are you?\" asked {the_beast}. ",
     "\"I am {beast_b},\" it {said}. \"I {beast_b_me}.\" ",
     "\"And I {beast_me},\" said {the_beast}. ",
     "[They became good friends. |They played until the sun went down. |They shared some {food}. |"
     "Then they went home. |They were not friends at first, but then they laughed. ]",
     "[After that they met every {day}. |And if you go there today, you may see them. |]"],
    # a day with weather
    ["{weather} when {N} woke up. ", "It was {day}. ",
     "{he} [got up|jumped out of bed|washed {his} face|put on {his} clothes] and "
     "[went to the kitchen|looked out of the window|ate some {food}|drank a cup of {drink}]. ",
     "[{his} {relative} was already at work. |The house was quiet. |"
     "The {animal} was still asleep. |]",
     "\"[Today I want|I would like] to go to the {place2},\" {he} said to {his} {relative}. ",
     "\"[Good|Fine|Very well], but take {a} with you,\" said the {relative}. ",
     "So {N} took {the} and went out. ",
     "On the way {he} [met {M}|saw {beast}|found a {color} stone|heard a bell|lost {his} hat]. ",
     "[In the evening {he} came home {mood} but {glad}. |When {he} came home, dinner was ready. |"
     "It was a {nice} day. |]"],
    # work
    ["The {job} had {a}. ", "[It was old but good. |It was new. |It was {color} and {size}. |]",
     "[Nobody worked better with it. |It was needed every {day}. |]",
     "{when} it [broke|fell down|was gone|did not work]. ",
     "\"What shall I do [now|without it]?\" said the {job}. ",
     "{N}, who lived next door, heard it. ",
     "\"You can have mine,\" {he} said. \"[I do not need it today|I have two of them|"
     "I bought a new one].\" ", "The {job} thanked {him} and gave {him} some {food}. ",
     "[So both were {glad}. |Now they are good friends. |]"],
    # a walk in nature
    ["{when} {N} and {M} walked [to the {place2}|through the forest|along the river|up the hill]. ",
     "{weather}. ", "They saw {beast}. ", "\"Look,\" {said} {N}, \"it {beast1}.\" ",
     "\"Yes,\" said {M}, \"and it {beast2}.\" ",
     "[Then they sat down and ate some {food}. |They walked on {softly}. |"
     "They stood very still. |]",
     "Under a tree lay {a}. ", "\"Who left this here?\" asked {M}. ",
     "[Nobody knew. |\"Maybe the {job},\" {said} {N}. |They took it home. |They left it there. ]"],
    # a lesson about a thing
    ["\"What is this?\" asked {N}. ", "\"This is {a},\" said {his} {relative}. \"It {fact1}.\" ",
     "\"And what is it for?\" ", "\"[You use it|People use it|We use it] to {use}. It {fact2}, "
     "too.\" ", "{N} looked at {the} {softly}. ",
     "[\"I want one,\" {he} said. |\"How {nice}!\" {he} said. |"
     "\"May I hold it?\" {he} asked. |Now {he} knew it. ]"],
]

HOW_TO = [
    "To make tea, [first|you first] fill the kettle with water. Put it on the stove and wait until "
    "it [whistles|boils]. Then pour the [hot|boiling] water into the teapot. [Wait a little. |]"
    "Add [sugar|honey|lemon|milk] if you like it [sweet|that way]. Drink the tea from a cup.",
    "To bake bread, mix flour and water [in a bowl|with salt]. Wait until the dough rises. Put the "
    "[dough|bread] into the hot oven. [After an hour|When the crust is brown] the bread is ready. "
    "Cut it with a knife and eat it with [butter|cheese|honey].",
    "To write a letter, take a pen and some paper. [Start with a hello.|Write the name first.] "
    "Tell the [news|story]. End with your name. Put the letter into an envelope and do not "
    "forget the stamp.",
    "To plant a [flower|tree|rose], dig a [small|deep] hole in the [ground|garden]. Put the seed "
    "into the earth. Give it water every [day|morning]. [Soon|In spring|After some weeks] "
    "a green leaf comes out.",
    "To build a snowman, roll three [big|white] balls of snow. Put [one ball on another|the "
    "smallest on top]. A carrot is the nose. [Give him an old hat|Stones are the eyes]. When the "
    "sun comes, he melts.",
    "To wash your hands, [take|use] soap and [warm|clean] water. [Rub your hands|Make bubbles]. "
    "Dry them with a towel.",
    "To sew on a button, [take|you need] a needle and thread. Pull the thread through the eye of "
    "the needle. [Go up and down|Sew] through the [four|small] holes. Cut the thread with a pair "
    "of scissors.",
    "To hang a picture, [take|you need] a hammer and a nail. [Stand on a chair or a ladder.|] Hit "
    "the nail [softly|carefully] with the hammer. Hang the picture on the nail.",
    "To cook soup, put water into a pot. Cut [a carrot|an onion|a potato] and [an onion|a tomato|a "
    "carrot] with a knife. Add salt. [Stir it with a spoon.|] Wait until the soup is hot. Eat it "
    "from a bowl.",
    "To clean the floor, take a broom and sweep the dust away. Then fill a bucket with "
    "[warm|clean] water. Wash the floor with a mop. [Now it shines.|Now the floor is clean.|]",
]

CALENDAR = [
    "In {season} the days are [long|short|warm|cold|bright]. [Children|The children|People] "
    "like to [play outside|walk in the forest|swim in the lake|build a snowman|fly a kite|"
    "pick flowers]. [After winter comes spring|After spring comes summer|"
    "After summer comes autumn|After autumn comes winter].",
    "On {day} it was [cold|hot|sunny|wet|windy], and on the next day it was [cold|hot|sunny|wet|"
    "windy], too. The {job} [stayed at home|went to the market|worked in the garden]. {weather}.",
    "A week has seven days, and a year has twelve months. [An hour has sixty minutes.|A day has "
    "twenty-four hours.] [After {day} we rest.|On {day} we go to the market.|]",
    "When it rains, [the streets get wet|people open an umbrella|the flowers grow|"
    "the river rises]. When it snows, [the roofs are white|children build a snowman|"
    "the roads are slippery]. When the wind blows, [the leaves fall|kites fly|"
    "the curtain moves]. When the sun shines, [the snow melts|the clothes dry|people are {glad}].",
    "When you are [hungry|very hungry], you eat {food}. When you are thirsty, you drink {drink}. "
    "When you are tired, you [go to bed|sleep]. When you are cold, you [put on a coat|sit by the "
    "fire|take a blanket].",
    "In the morning [the sun rises|we wake up]. [At noon|In the afternoon] we eat {food}. In the "
    "evening the sun sets. At night [the moon shines|the stars shine|we sleep].",
    "[Can|Does] a {animal} [fly|swim|talk|climb]? [Some animals can do it|I do not know|Ask the "
    "{job}], but [not all of them|a stone cannot]. Birds have wings. Fish have fins. Insects have "
    "six legs. [A spider has eight.|People have two legs.|]",
    "I have {number} {animal}s and you have {number}. [That is a lot.|We are both {glad}.|]",
]

TALK = [
    "{N}: [Hello|Good morning|Good evening], {M}. How are you?\n{M}: [I am fine|I am well|I am a "
    "little {mood}], thank you. And you?\n{N}: I am {mood}. [I am looking for {a}|I lost {the}].\n"
    "{M}: [It is {place}|Look {place}|Maybe it is {place}].\n{N}: [Thank you|Of course, there it "
    "is|You are right]!",
    "{N}: What are you doing?\n{M}: I am using {a}. I want to {use}.\n"
    "{N}: [May I help|Can I try]?\n{M}: [Yes, please|Of course|No, it is too hard for you]. "
    "It {fact1}.",
    "{N}: Do you know what {fact1}?\n{M}: [Let me think|Give me a moment|Hm]. Is it {a}?\n"
    "{N}: [Yes, it is|That is right|Right]. It {fact2}, too.",
    "{N}: Where is {the}?\n{M}: [It is {place}|You left it {place}|I saw it {place}].\n{N}: [Thank "
    "you|I see]. I need it to {use}.",
    "{N}: What is the weather like?\n{M}: {weather} [this morning|when I came in].\n"
    "{N}: Then I take [my coat|an umbrella|my hat|my scarf] with me.",
    "{N}: Are you hungry?\n{M}: Yes, I am. [Is there any {food}|What do we have]?\n{N}: We have "
    "some {food} [on the table|in the kitchen|in the fridge]. [Take a plate|Sit down], please.",
]


def cast(w):
    """The names of one story: two people, a useful portable thing, two animals."""
    thing = w.pick([thing for thing in w.portable if thing.use])
    one, two = w.some(w.animals, 2)
    facts, habits = w.some(thing.phrases, 2), w.some(one.phrases, 2)
    names = w.people()
    own = "himself" if names["he"] == "he" else "herself"
    return names | {
        "his_use": thing.use.replace("their", names["his"]).replace("themselves", own),
        "use": thing.use.replace("their", "your").replace("themselves", "yourself"),
        "a": thing.name, "the": thing.the, "bare": thing.bare, "place": thing.place,
        "fact1": facts[0], "fact2": facts[1], "place2": w.pick(LEXICON["place"]),
        "beast": one.name, "the_beast": one.the, "beast1": habits[0], "beast2": habits[1],
        "beast_me": w.me(habits[0]), "beast_b": two.name, "beast_b_me": w.me(w.pick(two.phrases))}


def story(w):
    return w.fill("".join(w.pick(STORIES)), cast(w)).strip()


def talk(w):
    return w.fill(w.pick(TALK), cast(w))


def everyday(w):
    return w.fill(w.pick(HOW_TO if w.rng.random() < 0.4 else CALENDAR), cast(w))


# How often each kind of document is written.
KINDS = [(story, 20), (description, 22), (two_facts, 8), (monologue, 12), (quiz, 26),
         (plain_questions, 10), (game, 14), (groups, 8), (talk, 8), (everyday, 6)]


def documents(characters, seed):
    """Yields documents until they hold that many characters."""
    w = Writer(seed)
    wheel = [kind for kind, weight in KINDS for _ in range(weight)]
    while characters > 0:
        text = w.pick(wheel)(w)
        characters -= len(text)
        yield text


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--characters", type=int, default=12_000_000)
    parser.add_argument("--seed", type=int, default=1)
    options = parser.parse_args()
    for text in documents(options.characters, options.seed):
        sys.stdout.write(text + "\n\n")


if __name__ == "__main__":
    main()
