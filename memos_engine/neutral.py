"""Left contexts that belong to nobody: memories are encoded behind them, so that no KV holds another memory.

The texts are ordinary statements of many kinds, written for this purpose. They stand as memories of their
own in front of the span that is encoded, and only their influence on it stays in the record.
"""

from __future__ import annotations

from collections.abc import Sequence

from memos_engine.prompt import PromptLayout

TEXTS = (
    "The lighthouse at the northern cape was built in 1871 by the harbour board. Its keeper climbed 212 "
    "steps each evening, and in winter the lamp burned for sixteen hours. A museum opened in the keeper's "
    "house after the light became automatic.",
    "Anna prefers trains to planes and books seats by the window. She keeps her tickets in a blue folder "
    "and always travels with a thermos of tea. Last spring she crossed the Alps twice in one month.",
    "Granite forms when magma cools slowly deep below the surface. It is made mostly of quartz, feldspar "
    "and mica, and its crystals can be seen without a lens. Old cities used it for bridges, kerbs and "
    "steps.",
    "The council voted in March to widen the cycle path along the river. Work will start in June, cost "
    "2.4 million, and take about a year. Shops on the bridge asked for more time to prepare.",
    "Wheat was grown in the valley long before the first written records. Farmers sowed it in autumn, cut "
    "it with sickles in summer, and stored it in clay jars. Trade in grain made the towns on the coast "
    "rich, and their kings levied a tax on every ship that left the harbour.",
    "The company's second quarter was better than expected. Sales of pumps rose by eleven percent, mainly "
    "in Asia, while the price of steel fell. Management now plans a new plant with three hundred workers.",
    "A violin has four strings tuned in fifths. The body is made of spruce and maple, and the varnish "
    "changes its tone a little. Players tighten the bow before they begin and loosen it when they finish.",
    "Penguins lose heat slowly because their feathers overlap like tiles. Parents take turns to warm the "
    "egg, sometimes for two weeks without food. The chick leaves the colony when it can swim.",
    "My brother's name is Paul and he works as a nurse in Leeds. He is allergic to nuts, plays football "
    "on Thursdays, and calls our mother every Sunday at noon.",
    "In the seventeenth century the city had nine gates, of which two still stand. The walls were taken "
    "down when the railway came. Streets still follow their line, and cellars hold parts of the towers. A "
    "plan of 1702 shows the houses of the merchants, the grain store, and the well on the market square.",
    "A function that calls itself must have a case in which it stops. Each call keeps its own variables, "
    "so that deep recursion needs memory. Many such functions can be written as loops.",
    "The trial began with forty patients, half of whom received the new drug. After six months their "
    "blood pressure had fallen, but three left because of headaches. A larger study is planned in five "
    "countries.",
    "The general crossed the river at night with six thousand men and took the fortress without a battle. "
    "Two years later he was defeated near the lakes, and the treaty that followed gave the eastern "
    "provinces to his rival. Historians still argue about whether he had been warned.",
    "The meeting is on Tuesday at three in room 4. Maria brings the drawings, Tom the budget. We have to "
    "decide about the roof before the fifteenth, because the builder's offer ends then.",
    "Sunlight reaches the forest floor only where an old tree has fallen. There, seedlings race upwards, "
    "and within a decade the gap is closed. Fungi connect the roots of neighbours and carry sugar between "
    "them.",
    "The parliament has two chambers. Members of the lower one are elected for four years by proportional "
    "representation, while the upper one is chosen by the regions. A bill becomes law when both have "
    "passed it and the president has signed it; if they disagree, a committee tries to find a compromise.",
    "I moved to the flat on Mill Lane in August. The rent is 940 a month with heating, the landlord lives "
    "downstairs, and the bus to work stops in front of the door. I would like to get a cat.",
    "A chemical reaction is faster when the molecules meet more often or hit each other harder, which is "
    "why heat helps. A catalyst lowers the energy that is needed and comes out unchanged. Enzymes are "
    "catalysts made by living cells.",
    "The band recorded its third album in eleven days, live and without headphones. Critics praised the "
    "slow songs, and the single stayed in the charts for twenty weeks. After the tour the drummer left to "
    "study law.",
    "The final was played in front of 62,000 people. The home side led after nine minutes, lost its "
    "captain to an injury before the break, and conceded twice in the last quarter of an hour. It was the "
    "visitors' fourth title, and their first since 1988.",
)
# Texts of each context: as short and as long as the memories that stand in front of another in real prompts.
SIZES = (6, 3, 8, 1, 4, 10, 2, 6)


def left_contexts(
    layout: PromptLayout, room: int | None = None, sizes: Sequence[int] = SIZES
) -> list[tuple[int, ...]]:
    """Token ids of the contexts in this layout, without the anchor. Every one begins with another text.

    room: leaves out those of more tokens.
    """
    spans = [layout.memory(text) for text in TEXTS]
    out, at = [], 0
    for size in sizes:
        out.append(tuple(token for i in range(size) for token in spans[(at + i) % len(spans)]))
        at += size
    return [ids for ids in out if room is None or len(ids) <= room]
