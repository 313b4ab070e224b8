"""Short passages of the project's own, to compare a checkpoint with its source without other data."""

OWN_TEXT = "the project's own passages"
PASSAGES = (
    "The tide had gone out further than anyone in the village could remember. Where boats had floated the evening "
    "before, there was now a plain of gray mud, ribbed like a washboard, and beyond it a line of white water. "
    "Children ran out to look for shells. Their grandmothers, who had been told stories about such mornings by "
    "grandmothers of their own, called them back and began to pack.",
    "To divide one fraction by another, multiply the first by the reciprocal of the second. For example, three "
    "quarters divided by two fifths is three quarters times five halves, which is fifteen eighths, or one and seven "
    "eighths. The rule works because dividing by a number undoes multiplying by it.",
    "def mean(values):\n    total = 0.0\n    for value in values:\n        total += value\n    "
    "return total / len(values)\n\n\ndef variance(values):\n    center = mean(values)\n    "
    "return mean([(value - center) ** 2 for value in values])\n",
    "A heat pump moves heat instead of making it. A liquid that boils at a low temperature takes up warmth from the "
    "air or the ground outside, is compressed until it is hot, gives its warmth to the water of the house, and "
    "expands again. For every unit of electricity it uses, it can deliver three or four units of heat.",
    "Question: Which planet is closest to the Sun?\nAnswer: Mercury. It goes round the Sun once in 88 days.\n\n"
    "Question: Why do we see only one side of the Moon?\nAnswer: The Moon turns once on its axis in the time it takes "
    "to go once round the Earth, so the same side always faces us.",
    "Dear Ms Okafor,\n\nThank you for your letter of 3 March. The committee met last Thursday and was glad to accept "
    "your proposal. Please let us know before the end of the month which of the two rooms would suit you better, and "
    "how many chairs and tables you will need.\n\nWith kind regards,\nThe secretary",
    "Bread needs only flour, water, salt and time. Mix them in the evening, with a spoonful of yesterday's dough, and "
    "leave the bowl covered overnight. In the morning fold the dough a few times, shape it, let it rise once more and "
    "bake it in a very hot oven until the crust is dark and it sounds hollow when you knock on it.",
    "The first railways were laid for coal. Horses pulled waggons on wooden rails from the pits to the rivers long "
    "before anyone thought of carrying people. When steam engines grew light enough to move themselves, the rails "
    "were already there, and within thirty years most large towns of the country were joined by them.",
)
