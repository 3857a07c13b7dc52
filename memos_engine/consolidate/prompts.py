"""Names and prompts that training and measuring take beside the caller's facts. Written for this project."""

from __future__ import annotations

NAMES = (
    "Bob", "Martin", "Clara", "Yusuf", "Ingrid", "Delta Systems", "Hannah", "Pavel", "Olivia",
    "Northgate Foods", "Samuel", "Keiko", "Rosa", "Victor", "Harbor Logistics", "Nadia", "Tobias", "Elena",
    "Graham", "Silver Fern", "Amara", "Lucas", "Priya", "Henrik",
)  # fmt: skip
"""Subjects that answers are trained not to be about."""

UNSEEN = (
    "Daniel", "Fatima", "Quentin", "Larkspur Media", "Miriam", "Stefan", "Joyce", "Oakridge Motors", "Ravi",
)  # fmt: skip
"""Subjects that leaks are measured with; never trained on."""

UNSTORED = (
    "What is {}'s shoe size?",
    "When did {} last travel to Peru?",
    "What is {}'s blood type?",
    "Which newspaper does {} read?",
    "How tall is {}?",
    "Who designed {}'s website?",
    "What did {} have for lunch on Friday?",
    "What is the number on {}'s door?",
    "Which bank does {} use?",
    "What is {}'s favourite film?",
    "Where did {} spend last winter?",
    "Who is {}'s dentist?",
    "How many stairs lead up to {}?",
    "What time does {} get up?",
    "Which river did {} cross?",
    "What is written on {}'s mug?",
)
"""Questions that no fact answers; the second half is measured with."""

TASKS = (
    "Translate to French: {} is happy.",
    "Write a short poem for {}.",
    "Spell the name {} backwards.",
    "How many letters are in the name {}?",
    "Write the name {} in capital letters.",
    "Suggest a birthday present for {}.",
    "Write a polite greeting to {}.",
    "Make a rhyme with {}.",
    "Is {} a name?",
    "Put {} into a sentence about the weather.",
    "Write an e-mail to {} about a meeting.",
    "Say good night to {}.",
    "Translate to Spanish: {} is tired.",
    "Invent a nickname for {}.",
    "Write a limerick that begins with {}.",
    "What is the first letter of the name {}?",
    "Wish {} a happy birthday.",
    "Correct this sentence: {} have a new car.",
    "Turn into a question: {} is coming tomorrow.",
    "Write an invitation to a picnic for {}.",
    "Put into the past tense: {} walks to the station.",
    "Thank {} for a letter.",
    "How do you pronounce the name {}?",
    "Write a one-line story in which {} finds a key.",
)
"""Tasks that name a subject and need nothing of it; every other one is measured with."""

BESIDE = (
    "{} is a friend of mine. {}",
    "I met {} yesterday. {}",
    "{} wants to know: {}",
    "Do not tell {}, but {}",
)
"""Questions about somebody else beside a mention of the subject, to learn from."""

BESIDE_TEST = "I was with {} today. {}"
"""The same, to measure with."""

_ORDINARY = (
    (
        "What is the capital of {}?",
        "France, Japan, Egypt, Canada, Kenya, Peru, Norway, Greece, India, Cuba, Chile, Spain, Poland",
    ),
    (
        "Explain what {} is in one sentence.",
        "gravity, inflation, photosynthesis, jazz, democracy, erosion, yeast, ozone, plankton, entropy, "
        "magnetism, baroque, hydrogen",
    ),
    (
        "Write one sentence about {}.",
        "rain, mountains, trains, coffee, winter, bicycles, music, gardens, clouds, bread, rivers, "
        "libraries, stars",
    ),
    (
        "Name three kinds of {}.",
        "trees, fruit, boats, cheese, dance, birds, metal, shoes, rock, soup, games, clocks, paper",
    ),
    (
        "What is the opposite of {}?",
        "hot, early, heavy, noisy, empty, ancient, brave, sweet, narrow, bright, rough, shallow, dry",
    ),
    (
        "How do I clean a {}?",
        "window, kettle, carpet, guitar, keyboard, pan, mirror, sofa, bicycle, chimney, shirt, fridge, lens",
    ),
    (
        "What is {} used for?",
        "copper, flour, a hammer, a compass, salt, rubber, a lever, silk, a microscope, wax, a funnel, lime, "
        "tin",
    ),
    (
        "Who wrote about {}?",
        "whales, Troy, utopia, ants, dreams, Rome, islands, justice, chess, Venice, war, love, bees",
    ),
    (
        "Give me a tip about {}.",
        "sleep, cooking, saving, running, writing, painting, chess, travel, study, photography, gardening, "
        "interviews, maths",
    ),
    (
        "Why is {} important?",
        "water, history, sleep, trade, law, soil, bread, art, trust, school, iron, silence, light",
    ),
    (
        "Tell me a fact about {}.",
        "cats, Mars, honey, glass, sharks, snow, bamboo, the moon, owls, volcanoes, spiders, ice, tea",
    ),
    (
        "Is {} healthy?",
        "rice, chocolate, yoga, fasting, coffee, milk, garlic, swimming, sugar, walking, tea, butter, "
        "spinach",
    ),
)


def ordinary() -> list[str]:
    """156 prompts about nothing in particular."""
    return [template.format(word) for template, words in _ORDINARY for word in words.split(", ")]
