"""Lists the entities of the synthetic streams, one pool per split, and what can be said of them.

Knows nothing of wordings. The pools of "train" and "test" share no entry; inside a split no entry stands
inside another one (a substring score could not tell "rice" from "rice cake").
"""

# One entry a line would make these tables hard to survey.
# fmt: off
from __future__ import annotations

import dataclasses

from ._synthetic_wording import listed


@dataclasses.dataclass(frozen=True)
class Attribute:
    """Says what can be known about a person or a project.

    Attributes:
        of: "person" or "project".
        changes: Whether a later chunk may replace the value.
        drops: Whether a later chunk may withdraw the value without a new one.
        shared: Whether two subjects may have the same value, so that "how many people …" is worth asking.
    """

    of: str
    changes: bool = True
    drops: bool = False
    shared: bool = False


ATTRIBUTES = {
    "city": Attribute("person", shared=True),
    "job": Attribute("person"),
    "employer": Attribute("person"),
    "pet": Attribute("person", changes=False),
    "food": Attribute("person", shared=True),
    "drink": Attribute("person", shared=True),
    "instrument": Attribute("person", drops=True, shared=True),
    "phone": Attribute("person"),
    "sport": Attribute("person", drops=True, shared=True),
    "language": Attribute("person", drops=True, shared=True),
    "trip": Attribute("person", drops=True),
    "color": Attribute("person", changes=False),
    "deadline": Attribute("project"),
    "lead": Attribute("project"),
    "room": Attribute("project"),
    "meeting": Attribute("project", drops=True),
    "client": Attribute("project"),
}

# Long stories, told in one entry a day and summarized at the end.
CHAINS = {"tour": "person", "course": "person", "log": "project"}

WEEKDAYS = ("Monday", "Tuesday", "Wednesday", "Thursday", "Friday", "Saturday", "Sunday")


def _dates(months: str) -> tuple[str, ...]:
    # Two-digit days only: "3 May" stands inside "13 May".
    return tuple(f"{day} {month}" for month in months.split() for day in range(10, 29))


def _times(minutes: tuple[str, ...]) -> tuple[str, ...]:
    return tuple(f"{day} at {hour}:{m}" for day in WEEKDAYS[:5] for hour in range(10, 18) for m in minutes)


POOLS: dict[str, dict[str, tuple[str, ...]]] = {
    "train": {
        "she": listed(
            "Alma, Clara, Dora, Elif, Greta, Hana, Ines, Jana, Keiko, Leila, Maren, Nadia, Olga, Petra, Rosa, Sofia, "
            "Tamar, Yara, Zoe, Bianca"
        ),
        "he": listed(
            "Adam, Boris, Carlo, Dario, Emil, Felix, Goran, Hugo, Ivan, Jonas, Kofi, Luca, Marco, Nils, Omar, Pavel, "
            "Ravi, Stefan, Tariq, Viktor"
        ),
        "surname": listed(
            "Lindholm, Okafor, Bellini, Duarte, Haas, Petrov, Moreau, Castell, Nakata, Brandt, Silva, Novotny, "
            "Fischer, Aydin, Kowal, Jansen, Rossetti, Mensah, Berg, Tanaka"
        ),
        "project": listed(
            "Falcon, Amber, Meridian, Cobalt, Juniper, Lantern, Orbit, Pebble, Quartz, Riverbank, Sunrise, Tundra, "
            "Willow, Zephyr, Beacon, Compass"
        ),
        "city": listed(
            "Turin, Lisbon, Bergen, Krakow, Graz, Porto, Leeds, Ghent, Malmo, Seville, Bilbao, Cork, Dresden, "
            "Lyon, Utrecht, Tartu, Split, Verona, Aarhus, Basel, Nantes, Riga, Zagreb, Toledo, Bristol, Lund"
        ),
        "job": listed(
            "nurse, baker, electrician, teacher, lawyer, plumber, architect, dentist, gardener, "
            "journalist, physicist, "
            "pilot, tailor, translator, carpenter, accountant, librarian, mechanic, optician, florist"
        ),
        "employer": listed(
            "Brightwell, Northgate, Solvero, Kestrel Foods, Alderman Bank, Pinecrest, Vantora, "
            "Helix Labs, Marlow Press, "
            "Corvina, Tidewater, Granfield, Ostrava Steel, Luminex, Fernhill, Dalton Freight"
        ),
        "pet": listed(
            "Biscuit, Pepper, Muffin, Shadow, Ginger, Pickle, Domino, Mango, Bandit, Clover, Pudding, Rocket, Socks, "
            "Whiskers, Teddy, Nugget, Marble, Snowy"
        ),
        "species": listed("dog, cat, rabbit, parrot, hamster"),
        "food": listed(
            "lasagne, paella, sushi, goulash, falafel, risotto, curry, moussaka, dumplings, pancakes, "
            "ramen, couscous, "
            "pizza, tacos, gnocchi, ratatouille, schnitzel, omelette"
        ),
        "drink": listed(
            "green tea, lemonade, cocoa, apple juice, espresso, ginger beer, iced coffee, tonic water, cider, "
            "peach nectar, mint tea, ayran"
        ),
        "instrument": listed(
            "piano, violin, flute, guitar, cello, trumpet, harp, clarinet, drums, accordion, saxophone, "
            "ukulele, organ"
        ),
        "phone": listed(
            "Nova 5, Zenfone Lite, Pixon 3, Halo Max, Orion X2, Kite Mini, Vela 7, Stratos 4, Echo Prime, Lumo 9, "
            "Arc Plus, Tango S8"
        ),
        "sport": listed(
            "rowing, badminton, climbing, fencing, judo, table tennis, archery, volleyball, swimming, "
            "squash, karate, "
            "cycling, handball"
        ),
        "language": listed(
            "Spanish, Japanese, Turkish, Polish, Arabic, Greek, Swedish, Korean, Italian, Dutch, Hindi, "
            "Finnish, Czech"
        ),
        "trip": listed(
            "Iceland, Morocco, Peru, Vietnam, Jordan, Malta, Cyprus, Chile, Nepal, Cuba, Kenya, Tunisia, Bolivia, "
            "Georgia, Ecuador, Laos"
        ),
        "color": listed("red, green, yellow, purple, orange, silver, beige, black"),
        "deadline": _dates("January February March April May June July August"),
        "room": listed(
            "Oak Room, Maple Room, Garden Hall, Rose Room, Attic Studio, Copper Room, Lake Room, "
            "Tower Room, Canal Hall, "
            "Cedar Room, Mirror Hall, Map Room"
        ),
        "meeting": _times(("00", "30")),
        "client": listed(
            "Arbor Hotels, Castor Airlines, Delmar Shipping, Everly Clinics, Grove Schools, "
            "Hartman Toys, Inland Rail, "
            "Jasper Mills, Lakeside Museum, Norland Farms, Polar Ferries, Redstone Mining"
        ),
        "tour": listed(
            "castle, harbour, cathedral, lighthouse, botanical garden, glass museum, old mill, "
            "fish market, fortress, "
            "clock tower, zoo, opera house, waterfall, stone bridge, monastery, vineyard"
        ),
        "course": listed(
            "sourdough bread, onion tart, apple strudel, mushroom pie, lentil stew, plum jam, "
            "cheese souffle, carrot cake, "
            "potato salad, fish soup, almond biscuits, stuffed peppers, lemon mousse, spinach quiche"
        ),
        "log": listed(
            "wiring, roof, floor plan, budget table, safety test, prototype, user survey, foundation, "
            "training video, "
            "database, front door, sensor array, price list, backup server, logo, contract"
        ),
    },
    "test": {
        "she": listed("Agnes, Beatriz, Celine, Daria, Esther, Freya, Gwen, Helga, Irena, Judith, Kira, Lucia"),
        "he": listed("Aldo, Bruno, Conrad, Dmitri, Enzo, Farid, Gilbert, Henrik, Igor, Jakob, Kaspar, Leon"),
        "surname": listed(
            "Ferrant, Holm, Ibarra, Kovacs, Larsen, Mbeki, Oduya, Pereira, Quist, Romero, Sato, Thorne, Ulrich, Varga"
        ),
        "project": listed("Granite, Harvest, Ivory, Kingfisher, Mosaic, Nimbus, Onyx, Prairie, Saffron, Velvet"),
        "city": listed(
            "Genoa, Tampere, Brno, Galway, Valencia, Rouen, Linz, Odense, Leiden, Stavanger, Trieste, "
            "Coimbra, Ljubljana, "
            "Dundee, Bruges, Gdansk"
        ),
        "job": listed(
            "butcher, vet, plasterer, surgeon, photographer, welder, pharmacist, cook, engineer, barber, "
            "receptionist, sailor"
        ),
        "employer": listed(
            "Stonebrook, Averra, Quillon Media, Beckford Glass, Silverline, Mirano, Hobart Tools, "
            "Zelanto, Westmere, Ketch Insurance"
        ),
        "pet": listed("Cookie, Smokey, Peanut, Tiger, Hazel, Bramble, Pippin, Dusty, Noodle, Acorn"),
        "species": listed("tortoise, pony, canary, terrier, kitten"),
        "food": listed(
            "pierogi, carbonara, biryani, kebab, fondue, burritos, pho, meatloaf, hummus, tempura, "
            "cannelloni, bouillabaisse"
        ),
        "drink": listed(
            "orange squash, cappuccino, tomato juice, root beer, chai, cranberry soda, oat milk, elderflower water"
        ),
        "instrument": listed("oboe, banjo, mandolin, trombone, bassoon, xylophone, viola, bagpipes, zither"),
        "phone": listed("Delta 6, Sirius Pro, Finch 2, Mira Ultra, Comet Z1, Polaris 8, Raven Fold, Tempo 10"),
        "sport": listed("water polo, wrestling, golf, rugby, gymnastics, surfing, hockey, boxing, tennis"),
        "language": listed("Portuguese, Mandarin, Hungarian, Danish, Hebrew, Norwegian, Welsh, Swahili, Romanian"),
        "trip": listed("Japan, Albania, Oman, Scotland, Egypt, Uruguay, Thailand, Canada, Senegal, Armenia"),
        "color": listed("turquoise, white, pink, brown, golden, maroon"),
        "deadline": _dates("September October November December"),
        "room": listed(
            "Harbour Suite, Studio Nine, Birch Lounge, North Gallery, Old Chapel, Terrace Lounge, "
            "Clock Suite, Fern Gallery"
        ),
        "meeting": _times(("15", "45")),
        "client": listed(
            "Bluebird Travel, Cascade Parks, Fairway Stores, Helmond Paper, Ironbridge Theatre, Mayfield Dairy, "
            "Orchard Books, Sandhill Resorts"
        ),
        "tour": listed(
            "aquarium, palace, windmill, salt mine, rose gardens, railway museum, town hall, observatory, abbey, "
            "chocolate factory, cable car, Roman baths"
        ),
        "course": listed(
            "rye crackers, pear crumble, bean chilli, walnut loaf, tomato relish, cherry pie, "
            "leek gratin, honey buns, "
            "pumpkin ravioli, rice pudding"
        ),
        "log": listed(
            "heating system, staircase, user manual, payment page, fire drill, translation, risk review, mobile app, "
            "east wall, seating chart, test report, newsletter"
        ),
    },
}

# The hidden rule of a stream with labeled examples gives each category a number. The messages of a category are
# the subject with any of its complaints; the subject's noun is what a memory can hold on to.
CATEGORIES: dict[str, dict[str, tuple[str, ...]]] = {
    "train": {
        "the printer": listed(
            "is jammed, is out of ink, prints blank pages, makes a loud noise, prints everything twice, "
            "smells burnt, "
            "does not switch on, cuts off the last line"
        ),
        "the wifi": listed(
            "drops every hour, is very slow today, rejects visitors, is down on the second floor, "
            "needs a new router, "
            "stops during calls, does not reach the basement"
        ),
        "my password": listed(
            "has expired, is not accepted, must be reset, was sent to the wrong person, is too short, is locked"
        ),
        "the radiator": listed(
            "is cold, leaks on the carpet, rattles all night, is far too hot, cannot be turned down, hisses"
        ),
        "the car park": listed(
            "is full again, gate does not open, is icy, lights are broken, ticket machine eats coins, is flooded"
        ),
        "the keyboard": listed(
            "has a sticky key, types double letters, lost its space bar, has tea in it, is missing, has no cable"
        ),
        "my payslip": listed(
            "shows the wrong month, did not arrive, has an error in the tax, lacks my overtime, is in the old format"
        ),
        "the window": listed(
            "does not close, has a crack, is dirty, lets the rain in, handle came off, is painted shut"
        ),
    },
    "test": {
        "the lift": listed(
            "is stuck between two floors, shakes, stops at every floor, doors will not shut, "
            "has no light, is too slow"
        ),
        "the projector": listed(
            "shows a green picture, overheats, has no remote control, flickers, needs a new lamp, hangs crooked"
        ),
        "the vending machine": listed(
            "swallowed my money, is empty, gives the wrong snack, hums too loudly, takes no cards, is unplugged"
        ),
        "the invoice": listed(
            "was paid twice, names the wrong company, is overdue, lacks a date, has a wrong total, got lost"
        ),
        "my badge": listed(
            "does not open the gate, has an old photo, fell apart, was stolen, shows the wrong name, stopped beeping"
        ),
        "the sink": listed(
            "is blocked, drips all day, has no hot tap, overflows, smells bad, "
            "came loose from the wall"
        ),
    },
}
