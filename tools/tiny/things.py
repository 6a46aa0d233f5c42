"""What the icons show, in the words that people use for it."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

# Signs that are writing or need a legend, and variants that differ only in which way they look.
_DROPPED = re.compile(
    r"""japanese-(?!castle|dolls)|keycap|-facing-right$|^flag-martinique|(?<!three)-oclock$|-thirty$|input-|-on-the-viewer
    |^(0|1|2|3|4|5|6|7|8|9|asterisk|pound|pound-symbol|on-.*arrow|soon-arrow|end-arrow|top-arrow|back-arrow)$
    |^(a|ab|b|o|p|ng|cl|vs|id|new|free|cool|ok|sos|up|eject|dim|bright|reverse|shuffle.*|repeat.*|fast-.*)-?button
    |button-blood-type|^on-exclamation|^up-exclamation|^digit-|part-alternation|mahjong|flower-playing|squared
    |^(aquarius|aries|cancer|capricorn|gemini|leo|libra|ophiuchus|pisces|sagittarius|scorpio|taurus|virgo)$
    |^(bald|red-haired|curly-haired|white-haired|copyright|registered|trade-mark|mobile-phone-off|vibration-mode)$
    |^(antenna-bars|atm-sign|circled-m|customs|passport-control|left-luggage|baggage-claim|p-button|currency-exchange)$
    |^(khanda|om|wheel-of-dharma|hamsa|kaaba|place-of-worship|menorah|fleur-de-lis|trident-emblem|label|placard)$
    |^(eight-spoked-asterisk|dotted-six-pointed-star|curly-loop|double-curly-loop|wavy-dash|sparkle|divide|minus)$
    |^(multiply|heavy-dollar-sign|heavy-equals-sign|exclamation-question-mark|double-exclamation-mark|information)$
    |^(no-mobile-phones|no-one-under-eighteen|no-pedestrians|no-littering|non-potable-water|no-bicycles|love-hotel)$
    |^(litter-in-bin-sign|potable-water|water-closet|restroom|mens-room|womens-room|baby-symbol|wireless|cinema)$
    |-small-square$|-medium-square$|-square-button$|^small-.*-diamond$|-with-veil$|breast-feeding|middle-finger
    |^(face-with-.*tongue-and|face-with-open-mouth-and-cold|smiling-face-with-open-mouth|face-savouring|pouting-face)
    |^(man|woman|person)-(bowing|gesturing|facepalming|tipping|pouting|frowning|in-steamy|getting|kneeling)
    |^(man|woman|person)-.*(white-cane|wheelchair|deaf)|^deaf-|^couple-with-heart-|^kiss-(man|woman)|^family-
    |^(men|women|man|woman|person)-(with-bunny-ears|wrestling)|^people-(with-bunny-ears|wrestling)|levitating|cigarette
    |^(backhand|index-pointing|left-facing-fist|right-facing-fist|leftwards|rightwards|palm-(up|down)|palms-)|gibbous
    |^(pager|fax-machine|name-badge|optical-disk|computer-disk|no-smoking|transgender|symbols|funeral-urn|coffin)
    |^(first|last)-quarter|^new-moon|unknown-flag|reminder-ribbon|^(up|down)wards-button|track-button|playback
    |left-right-arrow|up-down-arrow|curving|clockwise|closed-mailbox|open-mailbox|box-tray|-pointing-magnifying
    |disappointed-but|with-cold-sweat|savouring|symbols-over|globe-showing-(asia|europe)|pregnant|bust""",
    re.VERBOSE,
)

# Names that are one thing but look like many, and names of stuff that takes no article.
_PLURAL = frozenset(
    """glasses sunglasses goggles jeans trousers pants scissors grapes cherries fries chips swords tools scales chains
    headphones skis noodles leaves flowers houses books sparkles fireworks masks sunglasses underpants briefs shorts
    socks gloves eyes lips spectacles eyeglasses footprints beans peanuts blueberries olives chopsticks pancakes bags
    notes rails logs herbs peas hands clips tabs dolls maracas knobs stairs springs hearts glass's beers""".split()
)
_STUFF = frozenset(
    """bread rice milk honey cheese corn salad pasta spaghetti soup coffee beer wine champagne whiskey chocolate butter
    salt garlic ginger sushi bacon meat popcorn fire wood ice water yarn wool thread music money blood smoke fog wind
    glitter confetti lightning lettuce wheat broccoli curry ramen cutlery luggage sleep soap coral love yoga custard
    lavender earth saturn dracula santa treasure fondue""".split()
)
_IRREGULAR = {
    "mouse": "mice", "goose": "geese", "sheep": "sheep", "deer": "deer", "fish": "fish", "ox": "oxen", "man": "men",
    "woman": "women", "child": "children", "person": "people", "tooth": "teeth", "foot": "feet", "leaf": "leaves",
    "wolf": "wolves", "knife": "knives", "loaf": "loaves", "die": "dice", "moose": "moose", "bison": "bison",
    "squid": "squid", "shrimp": "shrimp", "policeman": "policemen", "fireman": "firemen", "snowman": "snowmen",
    "spaceman": "spacemen", "elf": "elves", "calf": "calves", "scarf": "scarves", "blowfish": "blowfish", "salmon": "salmon",
    "pufferfish": "pufferfish", "jellyfish": "jellyfish", "cactus": "cacti", "dice": "dice", "reindeer": "reindeer",
    "merman": "mermen", "lady": "ladies", "businessman": "businessmen", "wife": "wives", "thief": "thieves",
}  # fmt: skip
_SOUNDS_LIKE_U = re.compile(r"^(uni|eu|ufo|usb|one|ukulele)")
_VOWEL = re.compile(r"^([aeiou]|hour|x-ray|suv\b)")
_TAIL = re.compile(
    r" (of|with|in|on|at|from|covering|pointing|and|taking|riding|behind|over|doing|feeding|rowing|holding|lifting|playing"
    r"|going|blowing|landing|running|walking|dancing|climbing|swimming|surfing|golfing|juggling|skiing|meditating)\b.*"
)


KINDS = frozenset(
    "animal fruit vegetable food vehicle flower bird insect drink building tool sport instrument weather dessert".split()
)
"""Tags that people ask for by themselves: "an animal"."""


COMMON = frozenset((Path(__file__).with_name("common.txt")).read_text().split("\n")) - {""}
"""What people ask for first."""


@dataclass(frozen=True)
class Thing:
    """Something that icons show: `key` in the packages by style word, and the names for it, the commonest first.

    `tags` are words that go with it, but for faces and people, whose tags tell moods and slang.
    """

    keys: tuple[tuple[str, str], ...]
    names: tuple[str, ...]
    person: bool
    tags: tuple[str, ...]

    @property
    def weight(self) -> int:
        """How often it is drawn, against others."""
        return 4 if COMMON.intersection(self.names) else 1

    def key(self, style: str) -> str | None:
        return dict(self.keys).get(style)


def article(name: str) -> str:
    """`name` with the article that it takes."""
    first = name.split()[0]
    if is_plural(name) or first in _STUFF or first in ("mount", "two", "lock", "thumbs"):
        return name
    an = bool(_VOWEL.match(name)) and not _SOUNDS_LIKE_U.match(name)
    return ("an " if an else "a ") + name


def is_plural(name: str) -> bool:
    return _TAIL.sub("", name).split()[-1] in _PLURAL


def plural(name: str) -> str:
    """The name of several: "cup of tea" → "cups of tea"."""
    if is_plural(name):
        return name
    tail = _TAIL.search(name)
    head, rest = (name[: tail.start()], tail.group()) if tail else (name, "")
    *before, last = head.split()
    if last in _IRREGULAR:
        last = _IRREGULAR[last]
    elif re.search(r"(s|x|z|ch|sh|tomato|potato|mango|hero)$", last):
        last += "es"
    elif re.search(r"[^aeiou]y$", last):
        last = last[:-1] + "ies"
    else:
        last += "s"
    return " ".join([*before, last]) + rest


def countable(name: str) -> bool:
    """Whether "two" of it can be said."""
    return (
        not is_plural(name)
        and name.split()[-1] not in _STUFF
        and not re.search(r"^two |\b(and|sleep|up|down)\b", name)
    )


def _names() -> dict[str, tuple[str, ...]]:
    """What names.txt says, by key."""
    told = {}
    for line in Path(__file__).with_name("names.txt").read_text().splitlines():
        if not line.startswith("#"):
            key, _, names = line.partition(" =")
            told[key] = tuple(name.strip() for name in names.split(",") if name.strip())
    return told


def _own_names(key: str) -> tuple[str, ...]:
    words = key.split("-")
    if words[0] in ("man", "woman", "person") and len(words) > 1:
        who, rest = words[0], " ".join(words[1:])
        if rest.endswith("ing") and len(words) == 2:
            return (f"{who} {rest}", f"{rest} {who}")
        if who == "person":
            return (f"person {rest}",)
        return (f"{'male' if who == 'man' else 'female'} {rest}", f"{who} {rest}")
    if words[0] == "letter" and len(words) == 2:
        return (f"letter {words[1]}",)
    return (" ".join(words),)


_PEOPLE = re.compile(
    r"^(man|woman|person|boy|girl|child|older-person|old-(man|woman)|people|men|women|couple|kiss|family|prince|princess)(-|$)"
    r"|^baby$|^baby-angel|worker$|officer$|student|teacher|judge$|farmer|^cook$|mechanic|scientist|technologist|singer|^artist$|pilot|astronaut"
    r"|firefighter|detective|^guard$|ninja|claus|superhero|supervillain|^(mage|fairy|vampire|mermaid|merman|merperson|elf"
    r"|genie|zombie|troll)$|skier|snowboarder|horse-racing|-hand$|^hand-|^handshake|hands$|fist|thumbs|fingers|^ear$|^nose$|selfie|biceps"
    r"|^leg$|^foot$|-face$|ballet-dancer"
)


def collect(keys: Iterable[tuple[str, str]], tags: Mapping[str, tuple[str, ...]]) -> list[Thing]:
    """The things that icons with these (style, key) show; no name stands for two things. `tags` are by key."""
    told = _names()
    styles: dict[tuple[str, ...], dict[str, str]] = {}
    origin: dict[tuple[str, ...], str] = {}
    for style, key in keys:
        if _DROPPED.search(key):
            continue
        names = told.get(key, _own_names(key))
        if names:
            styles.setdefault(names, {})[style] = key
            origin.setdefault(names, key)
    # A name belongs to the thing that has it first in its list.
    firsts = {names[0] for names in styles}
    taken: set[str] = set()
    things = []
    for names, found in sorted(styles.items()):
        own = (names[0], *(n for n in names[1:] if n not in firsts))
        own = tuple(n for n in own if n not in taken)
        taken.update(own)
        if own:
            animal = re.search(
                "(cat|dog|horse|cow|pig|mouse|rabbit|tiger|monkey|dragon|moon)-face$", origin[names]
            )
            person = bool(_PEOPLE.search(origin[names])) and not animal
            about = () if person or "face" in own[0] else tags.get(origin[names], ())
            known = {word for name in (*own, *firsts) for word in name.split()}
            about = tuple(tag for tag in about if tag in KINDS or tag not in known)
            things.append(Thing(tuple(sorted(found.items())), own, person, about))
    return things
