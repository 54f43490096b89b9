r"""Splits the unit off a quantity, and gives it in base units so that two units can be compared.

    python -m verifier.answers "5\text{ cm}^2" "5 mm"     # shows both units and their dimensions

The idea. A gold may be written 5\text{ cm} where the answer is 5, or the other way round. So the
unit is split off, and answers.py ignores a unit that only one side has. When both sides have one,
the dimensions must agree and the values are compared in base units: 1 m is 100 cm, not 1 cm.

A unit consists of words of the tables below, with powers, `/` and `per`, and of unknown nouns, as
word problems have them: 5 apples, 1 apple, 5 dollars per ticket. An unknown noun is a dimension of
its own: 5 apples are not 5 pears. The whole text behind the number must be read in this way. A
digit, a sign, a macro or a word that counts, computes, compares or hedges (NOT_UNITS: 5 halves,
5 times, 5 squared, 5 or more) makes the text no unit, because it may change the number.
"""

import re
from fractions import Fraction
from typing import NamedTuple


class Unit(NamedTuple):
    """A unit in base units: 5 km is 5 * factor meters. `count` multiplies the number itself."""

    factor: Fraction  # size in the base unit
    dimension: tuple  # ((base unit, power), ...), sorted
    # a million, or 1/100 for percent: counts even where the other side has no unit
    count: Fraction = Fraction(1)


# ---- tables --------------------------------------------------------------------------------------

SIZES = {  # base unit: words and their sizes in it
    "meter": (
        "m 1 meter 1 metre 1 cm .01 centimeter .01 centimetre .01 mm .001 millimeter .001 "
        "millimetre .001 nm 1e-9 nanometer 1e-9 km 1000 kilometer 1000 kilometre 1000 in .0254 "
        "inch .0254 inche .0254 ft .3048 foot .3048 feet .3048 yd .9144 yard .9144 mi 1609.344 "
        "mile 1609.344 angstrom 1e-10"
    ),
    "gram": "g 1 gram 1 gm 1 kg 1000 kilogram 1000 mg .001 milligram .001",
    "second": (
        "s 1 sec 1 second 1 min 60 minute 60 h 3600 hr 3600 hour 3600 day 86400 week 604800"
    ),
    "liter": "l 1 L 1 liter 1 litre 1 ml .001 mL .001 milliliter .001 millilitre .001",
    "dollar": "dollar 1 usd 1 buck 1 cent .01",
    # 90^\circ is 90: degrees are a unit, not \pi/180
    "degree": "degree 1 deg 1",
    "am": "am 1",
    "pm": "pm 1",
    "": "unit 1",  # "5 units" has no dimension
}
# each of these is a dimension of its own
OTHERS = (
    "N J W V A K C F T kN kJ kW kWh kPa Pa Hz kHz MHz GHz eV keV MeV GeV MW mW AU Mpc kpc pc mol "
    "cal kcal rad sr oz lb gal qt pt mph kmh kph fps rpm bit erg hp ohm joule newton watt volt "
    "ampere kelvin celsius fahrenheit hertz euro inr rupee yen pound ounce ton tonne acre pint "
    "quart gallon cup month year person people man men woman women child children fish sheep deer "
    "mice geese dice teeth path moth booth"
)
UNITS = {word: (Fraction(1), word) for word in OTHERS.split()} | {
    word: (Fraction(size), base)
    for base, words in SIZES.items()
    for word, size in zip(words.split()[::2], words.split()[1::2])
}
# 50\% is 50 and 0.5, while 50 is not 0.5
COUNTS = {
    "percent": Fraction(1, 100),
    "dozen": Fraction(12),
    "hundred": Fraction(100),
    "thousand": Fraction(1000),
    "million": Fraction(10**6),
    "billion": Fraction(10**9),
    "trillion": Fraction(10**12),
}
SMALL = (
    "zero one two three four five six seven eight nine ten eleven twelve thirteen fourteen fifteen "
    "sixteen seventeen eighteen nineteen"
)
TENS = "twenty thirty forty fifty sixty seventy eighty ninety"
NOT_UNITS = set(
    f"""{SMALL} {TENS} half halves halved halving quarter third score gross pair couple trio lakh
    crore grand myriad googol kilo mega giga milli micro nano single double doubled triple tripled
    twice thrice once nil null none plus minus time times multiply multiplied divide divided add
    added subtract subtracted over into by factorial choose mod modulo modulus log sin cos tan sqrt
    inverse reciprocal negative positive opposite repeating recurring increase increased decrease
    decreased reduced raised equal is are was were be been become became mean give exceed versus vs
    against or and nor either neither both but not no non never without with above below beneath
    beyond more less fewer least most minimum maximum almost nearly about around roughly
    approximately approx circa between under up down after before past until till to from than then
    through if unless otherwise alternative alternatively else instead except excluding including
    maybe perhaps possible possibly probably likely unlikely guess wrong incorrect false infinite
    infinity many several few some any all every mille""".split()
)
JOINING = {"of", "in", "the", "a", "an", "on", "at", "for", "each"}
POWERS = {"square": 2, "sq": 2, "cubic": 3, "cu": 3, "squared": 2, "cubed": 3}
NO_UNIT = Unit(Fraction(1), ())
PERCENT = Unit(Fraction(1), (), COUNTS["percent"])

# what a unit is made of: \text{, \cdot, a power (1 or 2), a word or a slash (3), a hyphen, a space
PIECE = re.compile(
    r"\\text ?\{|\\cdot(?![a-zA-Z])|\^ ?(?:\{ ?(-?[0-9]) ?\}|(-?[0-9]))"
    r"|([A-Za-z]+|/)|(?<=[A-Za-z])-(?=[A-Za-z])|[}. ]"
)
# a number (1) directly before a letter, with the space between them (2)
NUMBER = re.compile(
    r"([+-]?[0-9.]+(?:[/:][0-9]+)?|[+-]?[0-9]* ?\\frac\{[0-9]+\}\{[0-9]+\})( ?)(?=[A-Za-z])"
)
DEGREES = re.compile(r"(.*[^ ]) ?\^ ?(?:\{ ?\\circ ?\}|\\circ) ?(?:\\text ?\{ ?[CF] ?\}|[CF])?")
FUNCTION = re.compile(r"(?<![a-z])(?:sin|cos|tan|sec|csc|cot|log|ln|sqrt|pi|exp)(?![a-z])")
# sign, coin, amount; or amount, coin
CURRENCY = re.compile(
    r"([+-]?) ?(?:\\text ?\{ ?)?(\\\$|[£€¥])(?: ?\})? ?([^$£€¥]+)|([^$£€¥]+)(\\\$|[£€¥])"
)


# ---- splitting -----------------------------------------------------------------------------------


def split_unit(text):
    """text: a cleaned answer -> (what the unit belongs to, Unit or None).

    A hedge ("3 or 4", "not 3") is not a unit.
    """
    money = CURRENCY.fullmatch(text)
    if not money:
        return split_unit_behind(text)
    if money[2]:
        sign, coin, amount = money[1], money[2], money[3]
    else:
        sign, coin, amount = "", money[5], money[4].rstrip()
    # "$5 per ticket" has a coin in front and a unit behind
    amount, unit = split_unit_behind(amount)
    unit = unit or NO_UNIT
    coin = "dollar" if coin == "\\$" else coin
    dimension = {coin: 1, **dict(unit.dimension)}
    return sign + amount, unit._replace(dimension=tuple(sorted(dimension.items())))


def split_unit_behind(text):
    """split_unit for a unit behind the number: %, degrees, words in \\text, bare words."""
    if text.endswith("%"):
        return text[:-1].rstrip(), PERCENT
    match = DEGREES.fullmatch(text)
    if match and not FUNCTION.search(text):  # in \sin 30^\circ the degrees are not a unit
        return match[1], Unit(Fraction(1), (("degree", 1),))
    # Words in \text: 5\text{ cm}.
    at = text.find("\\text", 1)
    if at > 0:
        head = text[:at].removesuffix("\\cdot").rstrip("/ ")
        unit = unit_of(text[len(head) :], head)
        return (head, unit) if unit else (text, None)
    # Bare words. Without \text a single letter is a variable: 5 m and 5m have no unit.
    match = NUMBER.match(text)
    if not match:
        return text, None
    word = text[match.end() :]
    is_unit = len(word) > 1 and (match[2] or table_unit(word) or word in COUNTS)
    unit = unit_of(word, match[1]) if is_unit else None
    return (match[1], unit) if unit else (text, None)


def table_unit(word):
    """-> (size, base unit) of a word of the tables, in the plural too; None for any other word.

    Case counts for single letters only.
    """
    lower = word.lower()
    return (
        UNITS.get(word) or (len(word) > 1 and (UNITS.get(lower) or UNITS.get(stem(lower)))) or None
    )


def stem(word):
    """A word without the ending of a plural."""
    return re.sub(r"(?:(?<=[oxz])|(?<=[cs]h)|(?<=[su]s))es$|s$", "", re.sub(r"ies$", "y", word))


def is_refused(word):
    """Whether a lower-case word counts, computes, compares or hedges.

    It does when it is in NOT_UNITS, or ends like sixth, twofold, zillion, quintuple.
    """
    return (
        word in NOT_UNITS
        or stem(word) in NOT_UNITS
        or re.search(r"(?:th|fold|illion|upled?)s?$", word) is not None
    )


def unit_of(text, number=""):
    """-> Unit of " cm^2", "miles per hour", "m/s", "p.m.", "red marbles"; None for any other text.

    number: the number before the unit; behind a 1 an unknown noun needs no plural.
    """
    text = re.sub(r"([apAP])\.? ?[mM]\.?(?![a-zA-Z])", r"\1m", text.replace(r"\AA", "angstrom"))
    pieces = list(PIECE.finditer(text))
    if sum(len(piece[0]) for piece in pieces) < len(text):
        return None  # a digit, a sign or a macro in between
    factor, count, powers = Fraction(1), Fraction(1), {}
    sign, power = 1, 1  # sign: -1 behind "per"; power: 2 behind "square"
    last = None  # (size, base) that a ^2 raises
    has_noun = False  # on this side of "per"
    describing = 0  # words like red and flour in "5 red marbles", "5 cups of flour"
    # From left to right. A word of the tables adds its size and dimension, "per" and "/" turn the
    # sign, a power raises the unit before it, an unknown noun is a dimension of its own.
    for piece in pieces:
        word = piece[3] or ""
        base = stem(word.lower())
        exponent = piece[1] or piece[2]
        if word in ("squared", "cubed"):
            exponent = POWERS[word]
        known = table_unit(word) if word and not (word == "in" and has_noun) else None
        if exponent:
            if last is None:
                return None
            size, raised = last
            more = sign * (int(exponent) - 1)  # the first power is counted already
            factor *= size**more
            powers[raised] = powers.get(raised, 0) + more
        elif word in POWERS:
            power = POWERS[word]
        elif word in ("/", "per"):
            sign, last, has_noun = -1, None, False
        elif known:
            last, has_noun = known, True
            size, raised = known
            factor *= size ** (sign * power)
            powers[raised] = powers.get(raised, 0) + sign * power
            power = 1
        elif base in COUNTS:
            if has_noun or sign < 0:
                return None  # "5 cm dozen", "5 per dozen"
            count *= COUNTS[base]
            has_noun = base == "percent"
        elif word and word.lower() not in JOINING:
            if power != 1 or len(word) < 3 or is_refused(word.lower()):
                return None
            # An unknown noun counts in the plural, behind a 1 or behind "per": 5 apples, 1 apple,
            # 5 cm per apple. All other unknown words describe: 5 red marbles.
            is_plural = re.search(r"[^siu]s$", word)
            if not has_noun and (sign < 0 or number == "1" or is_plural):
                last, has_noun = None, True
                powers[base] = powers.get(base, 0) + sign
            else:
                describing += 1
    if power != 1 or describing > 2 or not (powers or count != 1):
        return None
    dimension = sorted((base, power) for base, power in powers.items() if base and power)
    return Unit(factor, tuple(dimension), count)
