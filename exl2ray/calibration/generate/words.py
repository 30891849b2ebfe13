"""Word lists of the generated text, and small helpers that draw from them."""

from __future__ import annotations

import random
import re

SLOT = re.compile(r"\{(\w+)\}")  # of the sentence templates
GIVEN = """Abena Agnes Ailsa Akira Alois Amira Anouk Arthur Astrid Baraka Beatriz Benedek Bruno Callum Carla Chidi
Clara Dagny Daniel Dario Deniz Edith Elias Emeka Enid Esra Fatima Felix Fiona Freya Gavin Gerda Gita Hanna Hassan
Henrik Hugo Ilse Imogen Ines Ivan Jaya Joanna Jonas Kamal Katrin Kenji Kofi Lars Leila Lena Liam Lucia Magda Malik
Marek Maren Mateo Mei Milan Mina Moritz Nadia Naoki Nell Nils Noor Odile Olga Omar Oskar Paloma Parisa Pavel Petra
Priya Quentin Rafael Rania Rosa Rowan Ruben Sada Samir Selma Silvia Simon Sofia Stellan Sunita Tamar Tariq Tessa Theo
Tomas Ulla Uma Vera Viktor Wanda Wei Xenia Yara Yusuf Zadie Zoran""".split()
FAMILY = """Abbott Adeyemi Alvarez Baranov Bell Berg Bianchi Blom Castell Chen Costa Dahl Danso Delgado Demir Dietz
Eaton Ekwueme Farah Fischer Fonseca Garza Grant Haddad Hale Hartmann Horvat Ito Iyer Jansen Kaya Keller Khan Kowal
Kruger Lam Lindqvist Lowe Marsh Mbeki Mehta Molnar Moreau Nakata Novak Nyberg Obi Okafor Olsen Osei Park Pereira
Petrov Quist Rahman Rossi Sato Schuster Silva Soto Stark Suzuki Tan Thorne Torres Ueda Urban Vance Vega Virtanen
Wagner Ward Weiss Yilmaz Zhou Zubiri""".split()
PLACES = """Aldermoor Arvika Bexcombe Birchend Brannoch Calder-Bay Carrow Castelmora Dunmere Eastlow Elmsgate Fairholt
Farrowby Fennwick Galdhus Glenrath Greyport Halvik Hartness Highfold Innsbeck Kestrel-Point Kirkdale Langstrand
Larkhill Lindmouth Lowmarsh Marlstead Millbrook Morvane Netherby Norwald Oakhollow Orsova Pellworth Pinegrove
Port-Ansel Quarrby Ravnsund Redcliffe Rosthwaite Saltmere Sandgate Silverford Skelby Southmoor Stonebridge Strandby
Tarnside Thornbury-End Ulvsted Upper-Dale Valmere Vesterhavn Wainfleet Westerlea Whitcombe Windrush Wolverdale
Yarrow""".split()
NOUNS = """anchor archive balcony barrel basket beacon bellows bench blanket boiler bracket bridge bucket cabinet
cable candle canvas carpet cellar chart chimney clock compass copper cradle curtain dial drawer engine fence ferry
filter flask forge furnace gallery garden gate gauge glacier greenhouse hammer harbour hedge helmet hinge hull
instrument kettle ladder lantern ledger lens lever lighthouse lock loom magnet manual map mast meadow mill mirror
mortar motor museum needle net notebook oar orchard oven paddle parcel pasture pendulum piano pier pillar pipe planet
plough pocket pump quarry quilt radio railing ramp reservoir ribbon roof rope saddle sail satellite scaffold scale
schedule screen seed sensor shelf shutter signal sketch sleeve socket spindle spring stable staircase statue stove
survey switch syringe tablet tank telescope tent terrace thermostat timber toolbox tower tractor tray trellis tunnel
turbine umbrella valve vault vessel violin wagon warehouse well wheel window workshop""".split()
ADJECTIVES = """abrupt ample ancient awkward bare blunt brisk brittle broad calm cautious cheap clumsy coarse compact
costly crooked curious damp dense dim distant dull durable dusty eager early empty even faint familiar fragile fresh
gentle grim hasty heavy hollow honest humid idle jagged keen late lean lively local loose modest muddy narrow neat
noisy obscure odd old ordinary pale patient plain polished proper quiet rare raw remote rigid robust rough rusty
scarce secret shallow sharp silent slender slow smooth sober sparse spare stale steady steep stiff stout subtle sudden
tall tame temporary thick thin tidy tired tough uneven unusual urgent vague vast vivid warm weary wide worn""".split()
VERBS = """adjusted answered arranged assembled balanced borrowed bought carried checked cleaned collected compared
copied counted covered delivered described designed discovered divided doubted emptied examined exchanged
explained filled finished fixed folded followed gathered greased guarded ignored imported improved inspected
joined labelled lifted loaded lost lowered marked measured mended moved noticed opened ordered packed painted
photographed pointed polished praised priced printed pulled pushed recorded refused rented repaired replaced reported
rescued returned sealed searched separated shared shipped sketched sold sorted stacked stored studied tested
tied traced traded trimmed turned unlocked unpacked washed watched weighed wrapped""".split()
ADVERBS = """again already alone almost anyway badly barely briefly calmly carefully cheaply clearly daily directly
early easily entirely eventually evenly finally firmly gently gladly gradually hardly hastily honestly instantly late
later lightly loudly mostly neatly nearly often once openly partly patiently perhaps politely poorly promptly properly
quickly quietly rarely regularly safely seldom separately sharply slowly soon steadily suddenly thoroughly together
twice usually""".split()
SUBJECTS = """acoustics archaeology astronomy baking beekeeping botany bookbinding carpentry cartography ceramics
chess climatology cycling demography dentistry economics electronics ecology farming fencing fisheries forestry
genetics gardening geology glaciology grammar heraldry hydrology immunology insurance irrigation journalism knitting
law libraries linguistics logistics masonry medicine metallurgy meteorology mining music navigation nutrition
oceanography optics ornithology pharmacy philosophy photography plumbing poetry pottery printing psychology radiology
robotics rowing sailing seismology statistics surveying taxation theatre toxicology translation typography veterinary
virology weaving winemaking zoology""".split()
UNITS = "kg g m km cm mm litres hours days weeks minutes metres tonnes sheets boxes bags pages degrees percent".split()
WEEKDAYS = "Monday Tuesday Wednesday Thursday Friday Saturday Sunday".split()
MONTHS = "January February March April May June July August September October November December".split()


def person(rng: random.Random) -> str:
    return f"{rng.choice(GIVEN)} {rng.choice(FAMILY)}"


def place(rng: random.Random) -> str:
    return rng.choice(PLACES).replace("-", " ")


def count(rng: random.Random) -> str:
    return str(rng.randint(2, 99)) if rng.random() < 0.7 else f"{rng.randint(100, 99999):,}"


def number(rng: random.Random) -> str:
    """A number as text writes it: small ones often, now and then decimals, thousands or a percentage."""
    form = rng.random()
    if form < 0.5:
        return str(rng.randint(2, 99))
    if form < 0.75:
        return f"{rng.uniform(0, 100):.{rng.randint(1, 2)}f}"
    return f"{rng.randint(100, 99999):,}"


def clock(rng: random.Random) -> str:
    return f"{rng.randint(0, 23):02d}:{rng.randint(0, 59):02d}"


def date(rng: random.Random) -> str:
    return f"{rng.randint(1, 28)} {rng.choice(MONTHS)} {rng.randint(1890, 2031)}"


def iso_time(rng: random.Random) -> str:
    day = f"{rng.randint(1995, 2031)}-{rng.randint(1, 12):02d}-{rng.randint(1, 28):02d}"
    return f"{day}T{clock(rng)}:{rng.randint(0, 59):02d}Z"


def plural(word: str) -> str:
    if word.endswith("y") and word[-2] not in "aeiou":
        return word[:-1] + "ies"
    return word + ("es" if word.endswith(("s", "x", "ch", "sh")) else "s")


def article(word: str) -> str:
    return f"an {word}" if word[0] in "aeiou" else f"a {word}"
