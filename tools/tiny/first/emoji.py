"""Pictures of everyday things: Noto emoji with names and tags, from two npm packages.

The packages are fetched at exact versions with `npm pack`, checked against their digests
and kept as tarballs in a cache folder; nothing of them is part of this repository.
"""

from __future__ import annotations

import hashlib
import io
import json
import random
import re
import shutil
import subprocess
import tarfile
from dataclasses import dataclass
from pathlib import Path

from PIL import Image

from .shapes import COLOURS, SIZE, Sample


@dataclass(frozen=True)
class Package:
    """An npm package at an exact version; `sha256` is the digest of its tarball."""

    name: str
    version: str
    sha256: str


IMAGES = Package(
    "emoji-datasource-google",
    "16.0.0",
    "fb5fd131b362aab7a55542d2a147a79708cce0a8b1c1bbacd470172708b5c438",
)
LABELS = Package(
    "emojibase-data",
    "16.0.3",
    "cab288279075778f15b37f3ca60dfb17759af6fe29758e07338e248879991689",
)

# Labels of emojibase; "label = name, name" gives the names to use in captions instead.
_EVERYDAY = """
monkey face = monkey, monkey face; orangutan; dog face = dog, dog face, puppy; wolf; fox; cat face
= cat, cat face, kitten; lion; tiger face = tiger, tiger face; horse face = horse, horse face;
unicorn; zebra; deer; cow face = cow, cow face; pig face = pig, pig face; ewe = sheep; goat;
camel; giraffe; elephant; mouse face = mouse, mouse face; rabbit face = rabbit, rabbit face,
bunny; bear; koala; panda; kangaroo; chicken; bird; penguin; duck; owl; flamingo; parrot; frog;
turtle; snake; dragon; sauropod = dinosaur, sauropod; spouting whale = whale, spouting whale;
dolphin; fish; shark; octopus; spiral shell = shell; jellyfish; crab; snail; butterfly; bug =
caterpillar, bug; ant; honeybee = bee, honeybee; lady beetle = ladybug, lady beetle; spider;
bouquet = bouquet, flowers; rose; sunflower; blossom = flower, blossom; tulip; seedling; potted
plant; evergreen tree = fir tree, evergreen tree; deciduous tree = tree, green tree; palm tree;
cactus; four leaf clover = clover; maple leaf; mushroom; grapes; watermelon; tangerine = orange
fruit, tangerine; lemon; banana; pineapple; red apple = red apple, apple; green apple; pear;
peach; cherries = cherries, cherry; strawberry; blueberries; tomato; coconut; avocado; eggplant;
potato; carrot; ear of corn = corn; hot pepper; broccoli; onion; bread; croissant; pretzel;
pancakes; cheese wedge = cheese; hamburger = hamburger, burger; french fries = fries, french
fries; pizza; hot dog; sandwich; taco; egg; cooking = fried egg; pot of food = soup; popcorn;
butter; salt; cooked rice = rice, bowl of rice; sushi; soft ice cream; ice cream; doughnut =
doughnut, donut; cookie; birthday cake; shortcake = cake, piece of cake; cupcake; chocolate bar =
chocolate; candy; lollipop; honey pot = honey; glass of milk = milk, glass of milk; hot beverage =
coffee, cup of coffee; teapot; wine glass = wine, glass of wine; beer mug = beer, beer mug; spoon;
kitchen knife = knife; compass; snow-capped mountain; volcano; beach with umbrella = beach; desert
island = island; house = house, home; castle; church; tent; rainbow; ferris wheel; train; bus;
fire engine = fire engine, fire truck; police car; taxi; automobile = car, red car; sport utility
vehicle = blue car; delivery truck = truck, delivery truck; tractor; motorcycle; bicycle =
bicycle, bike; skateboard; horizontal traffic light = traffic light; stop sign; anchor; sailboat;
ship; airplane; parachute; helicopter; rocket; flying saucer = ufo, flying saucer; luggage =
suitcase; hourglass done = hourglass; watch; alarm clock; full moon; crescent moon; sun; ringed
planet = planet, ringed planet; shooting star; cloud; cloud with lightning and rain =
thunderstorm; cloud with rain; tornado; umbrella with rain drops = umbrella; high voltage =
lightning; snowflake; snowman without snow = snowman; fire; droplet = drop of water; water wave =
wave; jack-o-lantern = pumpkin; Christmas tree; fireworks; balloon; wrapped gift = gift, present;
trophy; soccer ball = soccer ball, football; baseball; basketball; american football; tennis =
tennis ball; bowling; bullseye = target, bullseye; kite; video game; game die = die, dice; puzzle
piece; teddy bear; artist palette; glasses; sunglasses; necktie = tie; t-shirt = shirt; jeans;
scarf; gloves; coat; socks; dress; shorts; handbag; backpack; man's shoe = shoe; running shoe =
sneaker; hiking boot = boot; crown; woman's hat = hat; top hat; ring = gold ring, diamond ring;
gem stone = gem, jewel; bell; musical note; microphone; headphone = headphones; radio; guitar;
musical keyboard = piano, keyboard; trumpet; violin; drum; mobile phone = phone; telephone;
battery; laptop; desktop computer = computer; printer; computer mouse; television; camera;
magnifying glass tilted left = magnifying glass; candle; light bulb; closed book = book, red book;
green book; blue book; books; coin; envelope = letter, envelope; package = box, package; pencil;
paintbrush; calendar; straight ruler = ruler; scissors; locked = lock; key; hammer; axe; crossed
swords; bomb; bow and arrow; shield; gear; magnet; ladder; telescope; pill; door; window; bed;
couch and lamp; chair; toilet; bathtub; broom; bucket; toothbrush; smiling face with smiling eyes
= smiling face; smiling face with sunglasses; skull; ghost; alien; robot; gorilla; hedgehog; bat;
swan; lobster; spaghetti; pie; fountain; racing car; wheel; volleyball; saxophone; wrench;
microscope; scroll; cherry blossom; mango; rescue worker's helmet = helmet; ribbon; high-heeled
shoe; yarn; eagle; ambulance
"""


def everyday_things() -> dict[str, tuple[str, ...]]:
    """Label of the emoji → the names that captions use; the first name is the subject's own."""
    things: dict[str, tuple[str, ...]] = {}
    for entry in _EVERYDAY.replace("\n", " ").split(";"):
        label, _, names = (part.strip() for part in entry.partition("="))
        things[label] = tuple(n.strip() for n in names.split(",")) if names else (label,)
    return things


@dataclass(frozen=True)
class Emoji:
    """An everyday thing: its names, tags and 64 x 64 RGBA picture."""

    names: tuple[str, ...]
    tags: tuple[str, ...]
    image: Image.Image


def fetch(package: Package, cache: Path) -> Path:
    """Path of the package's tarball in `cache`, fetched there if it is missing.

    Raises `RuntimeError` when npm is missing, fails, or delivers something else.
    """
    tarball = cache / f"{package.name}-{package.version}.tgz"
    if not tarball.exists():
        npm = shutil.which("npm")
        if npm is None:
            raise RuntimeError("npm is needed to fetch the emoji pictures (or use --no-emoji)")
        cache.mkdir(parents=True, exist_ok=True)
        wanted = f"{package.name}@{package.version}"
        command = [npm, "pack", "--silent", "--pack-destination", str(cache), wanted]
        done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=600)
        if done.returncode != 0:
            raise RuntimeError(f"npm pack {wanted} failed: {done.stderr.strip()}")
    digest = hashlib.sha256(tarball.read_bytes()).hexdigest()
    if digest != package.sha256:
        raise RuntimeError(f"{tarball} is not {package.name} {package.version}: remove it")
    return tarball


def _plain_code(hexcode: str) -> str:
    return hexcode.lower().replace("-fe0f", "")


def load(cache: Path) -> list[Emoji]:
    """The everyday things in the order of `everyday_things`."""
    with tarfile.open(fetch(LABELS, cache)) as tar:
        member = tar.extractfile("package/en/data.json")
        assert member is not None
        records = {r["label"].replace("\u2019", "'"): r for r in json.load(member)}
    things = everyday_things()
    missing = [label for label in things if label not in records]
    if missing:
        raise RuntimeError(f"no emoji with the labels {missing}")
    codes = {_plain_code(records[label]["hexcode"]): label for label in things}
    pictures: dict[str, Image.Image] = {}
    with tarfile.open(fetch(IMAGES, cache)) as tar:
        for info in tar:
            folder, _, name = info.name.rpartition("/")
            label_ = codes.get(_plain_code(name.removesuffix(".png")))
            if label_ is None or not folder.endswith("img/google/64"):
                continue
            member = tar.extractfile(info)
            assert member is not None
            pictures[label_] = Image.open(io.BytesIO(member.read())).convert("RGBA")
    return [
        Emoji(names, _tags(records[label].get("tags", ()), names), pictures[label])
        for label, names in things.items()
        if label in pictures
    ]


def _tags(tags: list[str], names: tuple[str, ...]) -> tuple[str, ...]:
    own = set(" ".join(names).split())
    return tuple(t for t in tags if re.fullmatch("[a-z]{3,}", t) and t not in own)[:4]


def _article(name: str) -> str:
    if name.split()[-1].endswith("s") and not name.endswith(("ss", "us", "octopus", "bus")):
        return name
    return ("an " if name[0] in "aeiou" else "a ") + name


def emoji_picture(rng: random.Random, emoji: Emoji) -> Sample:
    """The thing on white or, one time in four, on a background colour that the caption names."""
    background = "white" if rng.random() < 0.75 else rng.choice(tuple(COLOURS))
    canvas = Image.new("RGB", (SIZE, SIZE), COLOURS[background])
    edge = rng.randint(54, 62)
    slack = (SIZE - edge) // 2
    x, y = (slack + rng.randint(-min(slack, 2), min(slack, 2)) for _ in range(2))
    small = emoji.image.resize((edge, edge), Image.Resampling.LANCZOS)
    canvas.paste(small, (x, y), small)

    name = emoji.names[0] if rng.random() < 0.6 else rng.choice(emoji.names)
    lead = rng.choices(
        (_article(name), name, f"a picture of {_article(name)}", f"an emoji of {_article(name)}"),
        (0.6, 0.2, 0.1, 0.1),
    )[0]
    if background != "white" or rng.random() < 0.12:
        form = rng.choice((f"a {background} background", background))
        form = form.replace("a orange", "an orange")
        lead += f" on {form}"
    elif emoji.tags and rng.random() < 0.1:
        lead += f", {rng.choice(emoji.tags)}"
    return Sample(canvas, lead, {"subject": emoji.names[0], "background": background})
