r"""Units: what stands behind a number, or before it, and whether two of them agree.

    python units.py "5\text{ cm}^2"            # -> 5, and its unit in base units

The idea. A gold may say 5\text{ cm} where the answer says 5, or the other way round: a unit is
split off, and when only one side has one it does not count. When both have one they must have the
same dimension, and the values are compared in base units: 1 m is 100 cm, not 1 cm.

The rule. A unit is made of words of the tables below, with powers, `/` and `per`; and of nouns that
no table knows, as word problems have them: a plural in -s (5 apples), anything for a single one (1
apple), anything after `per` (5 dollars per ticket). Up to two more words may describe them (5 red
marbles, 5 cups of flour). All of the text must be read so: a digit, a sign or a macro in it, or a
word that counts, computes, compares or hedges (REFUSED: 5 halves, 5 times, 5 squared, 5 or more)
makes it no unit, and the answer text. Nouns are dimensions of their own: 5 apples are not 5 pears.

Policies: dozen, thousand, million... multiply. Percent is 1/100, so 50\% is 50 and 0.5, while 50 is
not 0.5. 90^\circ is 90, not \pi/2. Without \text a single letter is a variable: 5 m.
"""

import re
import sys
from fractions import Fraction
from typing import NamedTuple

from runtime.flags import BadInput, guarded
from verifier.latex import clean


class Unit(NamedTuple):
    factor: Fraction  # of the base unit
    dimension: tuple  # ((base unit, power), ...)
    # a million, 1/100 of percent: counts even where the other side has no unit
    count: Fraction = Fraction(1)


SIZES = {
    "meter": "m 1 meter 1 metre 1 cm .01 centimeter .01 centimetre .01 mm .001 millimeter .001 millimetre .001 nm 1e-9 nanometer 1e-9 "
    "km 1000 kilometer 1000 kilometre 1000 in .0254 inch .0254 inche .0254 ft .3048 foot .3048 "
    "feet .3048 yd .9144 yard .9144 "
    "mi 1609.344 mile 1609.344 angstrom 1e-10",
    "gram": "g 1 gram 1 gm 1 kg 1000 kilogram 1000 mg .001 milligram .001",
    "second": "s 1 sec 1 second 1 min 60 minute 60 h 3600 hr 3600 hour 3600 day 86400 week 604800",
    "liter": "l 1 L 1 liter 1 litre 1 ml .001 mL .001 milliliter .001 millilitre .001",
    "dollar": "dollar 1 usd 1 buck 1 cent .01",
    "degree": "degree 1 deg 1",
    "am": "am 1",
    "pm": "pm 1",
    "": "unit 1",
}
OTHERS = (
    "N J W V A K C F T kN kJ kW kWh kPa Pa Hz kHz MHz GHz eV keV MeV GeV MW mW AU Mpc kpc pc mol "
    "cal kcal rad sr oz lb gal qt pt "
    "mph kmh kph fps rpm bit erg hp ohm joule newton watt volt ampere kelvin celsius fahrenheit "
    "hertz euro inr rupee yen pound ounce "
    "ton tonne acre pint quart gallon cup month year person people man men woman women child "
    "children fish sheep deer mice geese "
    "dice teeth path moth booth"
)  # dimensions of their own, each
UNITS = {word: (Fraction(1), word) for word in OTHERS.split()} | {
    word: (Fraction(size), base)
    for base, words in SIZES.items()
    for word, size in zip(words.split()[::2], words.split()[1::2])
}
COUNTS = {
    "percent": Fraction(1, 100),
    "dozen": Fraction(12),
    "hundred": Fraction(100),
    "thousand": Fraction(1000),
} | {word: Fraction(10) ** (6 + 3 * i) for i, word in enumerate(("million", "billion", "trillion"))}
SMALL = (
    "zero one two three four five six seven eight nine ten eleven twelve thirteen fourteen fifteen "
    "sixteen seventeen eighteen "
    "nineteen"
)
TENS = "twenty thirty forty fifty sixty seventy eighty ninety"
NO_UNITS = f"""{SMALL} {TENS} half halves halved halving quarter third score gross pair couple trio lakh crore grand myriad googol kilo
    mega giga milli micro nano single double doubled triple tripled twice thrice once nil null none plus minus time times multiply
    multiplied divide divided add added subtract subtracted over into by factorial choose mod modulo modulus log sin cos tan sqrt inverse
    reciprocal negative positive opposite repeating recurring increase increased decrease decreased reduced raised equal is are was were be
    been become became mean give exceed versus vs against or and nor either neither both but not no non never without with above below
    beneath beyond more less fewer least most minimum maximum almost nearly about around roughly approximately approx circa between under
    up down after before past until till to from than then through if unless otherwise alternative alternatively else instead except
    excluding including maybe perhaps possible possibly probably likely unlikely guess wrong incorrect false infinite infinity many several
    few some any all every mille"""
REFUSED, JOINING = set(NO_UNITS.split()), {"of", "in", "the", "a", "an", "on", "at", "for", "each"}
POWERS = {"square": 2, "sq": 2, "cubic": 3, "cu": 3, "squared": 2, "cubed": 3}
NO_UNIT = Unit(Fraction(1), ())
PERCENT = Unit(Fraction(1), (), COUNTS["percent"])
PIECE = re.compile(
    r"\\text ?\{|\\cdot(?![a-zA-Z])|\^ ?(?:\{ ?(-?[0-9]) "
    r"?\}|(-?[0-9]))|([A-Za-z]+|/)|(?<=[A-Za-z])-(?=[A-Za-z])|[}. ]"
)
NUMBER = re.compile(
    r"([+-]?[0-9.]+(?:[/:][0-9]+)?|[+-]?[0-9]* ?\\frac\{[0-9]+\}\{[0-9]+\})( ?)(?=[A-Za-z])"
)
DEGREES = re.compile(r"(.*[^ ]) ?\^ ?(?:\{ ?\\circ ?\}|\\circ) ?(?:\\text ?\{ ?[CF] ?\}|[CF])?")
FUNCTION = re.compile(r"(?<![a-z])(?:sin|cos|tan|sec|csc|cot|log|ln|sqrt|pi|exp)(?![a-z])")
CURRENCY = re.compile(
    r"([+-]?) ?(?:\\text ?\{ ?)?(\\\$|[£€¥])(?: ?\})? ?([^$£€¥]+)|([^$£€¥]+)(\\\$|[£€¥])"
)


def with_unit(text):
    """-> (what the unit belongs to, Unit or None). A hedge ("3 or 4", "not 3") is not a unit."""
    money = CURRENCY.fullmatch(text)
    if not money:
        return behind(text)
    sign, coin, head = (
        (money[1], money[2], money[3]) if money[2] else ("", money[5], money[4].rstrip())
    )
    head, unit = behind(head)
    coin = "dollar" if coin == "\\$" else coin
    return sign + head, (unit or NO_UNIT)._replace(
        dimension=tuple(sorted({coin: 1, **dict(unit.dimension if unit else ())}.items()))
    )


def behind(text):
    """with_unit for what stands behind a number: %, degrees, words in \\text, bare words."""
    if text.endswith("%"):
        return text[:-1].rstrip(), PERCENT
    match = DEGREES.fullmatch(text)
    if match and not FUNCTION.search(text):
        return match[1], Unit(Fraction(1), (("degree", 1),))
    at = text.find("\\text", 1)
    if at > 0:
        head = text[:at].removesuffix("\\cdot").rstrip("/ ")
        unit = unit_of(text[len(head) :], head)
    else:
        match = NUMBER.match(text)
        if not match or not (
            is_known(text[match.end() :]) if not match[2] else len(text) > match.end() + 1
        ):
            return text, None
        head, unit = match[1], unit_of(text[match.end() :], match[1])
    return (head, unit) if unit else (text, None)


def is_known(word):
    """Whether bare letters beside a number (5cm) are a unit and not a product: a word of the
    tables, longer than a letter."""
    return len(word) > 1 and (found(word) is not None or word in COUNTS)


def found(word):
    """-> (size, base) of a word of the tables, in the plural too, in any case unless it is a
    letter; None for another."""
    lower = word.lower()
    return (
        UNITS.get(word) or (len(word) > 1 and (UNITS.get(lower) or UNITS.get(stem(lower)))) or None
    )


def stem(word):
    """A word without the ending of a plural."""
    return re.sub(r"(?:(?<=[oxz])|(?<=[cs]h)|(?<=[su]s))es$|s$", "", re.sub(r"ies$", "y", word))


def is_refused(word):
    """Whether a word of no table counts, computes, compares or hedges: in REFUSED, or made like
    sixth, twofold, zillion, quintuple."""
    return (
        word in REFUSED
        or stem(word) in REFUSED
        or re.search(r"(?:th|fold|illion|upled?)s?$", word) is not None
    )


def unit_of(text, head=""):
    """-> Unit of " cm^2", "miles per hour", "m/s", "p.m.", "red marbles", by the rule above; None
    for what is none. head: its number."""
    text = re.sub(r"([apAP])\.? ?[mM]\.?(?![a-zA-Z])", r"\1m", text.replace(r"\AA", "angstrom"))
    pieces = list(PIECE.finditer(text))
    if sum(len(piece[0]) for piece in pieces) < len(text):
        return None
    factor, count, powers, others = Fraction(1), Fraction(1), {}, 0
    # last: what ^2 behind it raises; named: this side of `per` has its noun
    sign, power, last, named = 1, 1, None, False
    for piece in pieces:
        word, base = piece[3] or "", stem((piece[3] or "").lower())
        raised = piece[1] or piece[2] or (POWERS[word] if word in ("squared", "cubed") else None)
        known = found(word) if word and not (word == "in" and named) else None
        if raised:
            if last is None:
                return None
            more = sign * (int(raised) - 1)
            factor, powers[last[1]] = factor * last[0] ** more, powers.get(last[1], 0) + more
        elif word in POWERS:
            power = POWERS[word]
        elif word in ("/", "per"):
            sign, last, named = -1, None, False
        elif known:
            last, named = known, True
            factor, powers[known[1]], power = (
                factor * known[0] ** (sign * power),
                powers.get(known[1], 0) + sign * power,
                1,
            )
        elif base in COUNTS:
            if named or sign < 0:
                return None
            count, named = count * COUNTS[base], base == "percent"
        elif word and word.lower() not in JOINING:
            if power != 1 or len(word) < 3 or is_refused(word.lower()):
                return None
            if not named and (sign < 0 or head == "1" or re.search(r"[^siu]s$", word)):
                last, named, powers[base] = None, True, powers.get(base, 0) + sign
            else:
                others += 1
    if power != 1 or others > 2 or not (powers or count != 1):
        return None
    return Unit(
        factor,
        tuple(sorted((base, number) for base, number in powers.items() if base and number)),
        count,
    )


def main():
    if len(sys.argv) != 2:
        raise BadInput("usage: python units.py QUANTITY")
    print(*with_unit(clean(sys.argv[1])), sep="\n")


if __name__ == "__main__":
    guarded(main)
