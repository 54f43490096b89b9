r"""Units: what stands behind a number, or before it, and whether two of them agree.

    python units.py "5\text{ cm}^2"            # -> 5, and its unit in base units

The idea. A gold may say 5\text{ cm} where the answer says 5, or the other way round: a unit is split off, and when only one side has
one it does not count. When both have one they must have the same dimension, and the values are compared in base units: 1 m is
100 cm, not 1 cm. Words that are in no table are dimensions of their own: 5 apples are not 5 pears.

Policies: percent is a unit of 1/100 without a dimension, so 50\% is 50 and 0.5, while 50 is not 0.5. Thousand, million... multiply.
90^\circ is 90, not \pi/2. "3 or 4", "3 more than": hedges are not units. Without \text a single letter is a variable: 5 m.
"""
import re
import sys
from fractions import Fraction
from typing import NamedTuple

from latex import clean


class Unit(NamedTuple):
    factor: Fraction         # of the base unit
    dimension: tuple         # ((base unit, power), ...)


SIZES = {
    "meter": "m 1 meter 1 metre 1 cm .01 centimeter .01 centimetre .01 mm .001 millimeter .001 km 1000 kilometer 1000 kilometre 1000 "
             "in .0254 inch .0254 inche .0254 ft .3048 foot .3048 feet .3048 yd .9144 yard .9144 mi 1609.344 mile 1609.344",
    "gram": "g 1 gram 1 kg 1000 kilogram 1000 mg .001 milligram .001",
    "second": "s 1 sec 1 second 1 min 60 minute 60 h 3600 hr 3600 hour 3600 day 86400 week 604800",
    "liter": "l 1 liter 1 litre 1 ml .001 milliliter .001",
    "dollar": "dollar 1 usd 1 buck 1 cent .01",
    "degree": "degree 1 deg 1", "am": "am 1", "pm": "pm 1",
    "": "percent .01 hundred 100 thousand 1000 million 1e6 billion 1e9 trillion 1e12 unit 1",
}
UNITS = {
    word: (Fraction(size), base) for base, words in SIZES.items() for word, size in zip(words.split()[::2], words.split()[1::2])}
HEDGES = ("or and not to than but if is are no between about approximately roughly almost at least most nor either more less fewer plus "
          "minus")
POWERS = {"square": 2, "sq": 2, "cubic": 3, "cu": 3, "squared": 2, "cubed": 3}
PERCENT = (Fraction(1, 100), ())
TAIL = re.compile(r"(.*?[^\s\\])\s*((?:(?:\\cdot|/)?\s*\\text ?\{[^{}]*\}\s*(?:\^\s*(?:\{-?[0-9]\}|[0-9]))?\s*)+)")
BARE_TAIL = re.compile(r"([+-]?[0-9.]+(?:[/:][0-9]+)?|[+-]?[0-9]*\s?\\frac\{[0-9]+\}\{[0-9]+\})(\s*)"
                       r"([A-Za-z][A-Za-z./ ]*(?:\^\{?[0-9]\}?)?)")
DEGREES = re.compile(r"(.+?)\s*\^\s*(?:\{\s*\\circ\s*\}|\\circ)\s*(?:\\text ?\{\s*[CF]\s*\}|[CF])?")
FUNCTION = re.compile(r"(?<![a-z])(?:sin|cos|tan|sec|csc|cot|log|ln|sqrt|pi|exp)(?![a-z])")
CURRENCY = re.compile(r"([+-]?)\s*(?:\\text ?\{\s*)?(\\\$|[£€¥])(?:\s*\})?\s*([^$£€¥]+)|([^$£€¥]+?)(\\\$|[£€¥])")


def with_unit(text):
    """-> (what the unit belongs to, Unit or None). A hedge ("3 or 4", "not 3") is not a unit."""
    money = CURRENCY.fullmatch(text)
    if not money:
        return behind(text)
    sign, coin, head = (money[1], money[2], money[3]) if money[2] else ("", money[5], money[4])
    head, unit = behind(head)
    dimension = unit.dimension if unit and unit.dimension else (("dollar" if coin == "\\$" else coin, 1),)
    return sign + head, Unit(unit.factor if unit else Fraction(1), dimension)


def behind(text):
    """with_unit for what stands behind a number: %, degrees, words in \\text, bare words."""
    if text.endswith("%"):
        return text[:-1].rstrip(), Unit(*PERCENT)
    match = DEGREES.fullmatch(text)
    if match and not FUNCTION.search(text):
        return match[1], Unit(Fraction(1), (("degree", 1),))
    match = TAIL.fullmatch(text)
    if match:
        unit = unit_of(match[2])
        return (match[1], unit) if unit else (text, None)
    match = BARE_TAIL.fullmatch(text)
    unit = unit_of(match[3]) if match and is_unit(match[3], bool(match[2])) and not FUNCTION.search(text) else None
    return (match[1], unit) if unit else (text, None)


def is_unit(text, apart):
    """Whether bare words are a unit: in the table and longer than a letter (5 m may be a product), or `apart` and a word (5 eggs)."""
    word = text.split()[0].rstrip("./").lower()
    return (len(word) > 1 and (word in UNITS or word.removesuffix("s") in UNITS)) or (apart and len(word) > 2)


def unit_of(text):
    """-> Unit of " cm^2", "miles per hour", "m/s", "p.m."; None for what hedges."""
    text = re.sub(r"([ap])\.\s?m\.?", r"\1m", re.sub(r"\\text|\\cdot", " ", text).lower())
    factor, powers, sign, power, last = Fraction(1), {}, 1, 1, ""
    for word in re.findall(r"[^\W\d]+|/|-?[0-9]", text):
        if word in HEDGES.split():
            return None
        if word in ("/", "per"):
            sign = -1
        elif word in POWERS and not word.endswith("ed"):
            power = POWERS[word]
        elif word in POWERS or word.lstrip("-").isdigit():
            more = sign * ((POWERS.get(word) or int(word)) - 1)
            size, base = UNITS.get(last, (Fraction(1), last))
            factor, powers[base] = factor * size ** more, powers.get(base, 0) + more
        else:
            last = word if word in UNITS else word.removesuffix("s")
            size, base = UNITS.get(last, (Fraction(1), last))
            factor, powers[base], power = factor * size ** (sign * power), powers.get(base, 0) + sign * power, 1
    return Unit(factor, tuple(sorted((base, count) for base, count in powers.items() if base and count)))


def main():
    if len(sys.argv) != 2:
        sys.exit("usage: python units.py QUANTITY")
    print(*with_unit(clean(sys.argv[1])), sep="\n")


if __name__ == "__main__":
    main()
