r"""From what is written to an expression: LaTeX and Unicode cleaned, and a subset of it read into a
small tree. Never evaluated.

    python latex.py "\dfrac12 x²"              # -> the cleaned text and its tree

The idea. Answers come in many spellings. `clean` gives what only looks different one spelling;
`parse` reads the rest with a recursive descent into tuples (operation, operands...): num, name, +
and * of any number of operands, unary - and /, ^ and call. The tree says what is written, nothing
is worked out: algebra.py decides what is equal. What is read is hostile: whatever is not of the
subset, or nested too deeply, is Unreadable.

Policies: x^10 is unreadable, as TeX makes x^1 0 of it (10^37 is meant as it looks). a/bc is (a/b)c.
2\frac12 is 5/2. x2 is 2x. \log without a base is natural. i is the imaginary unit.
"""

import functools
import re
import sys
import unicodedata
from fractions import Fraction
from typing import NamedTuple

from runtime.flags import BadInput, guarded

DEPTH = 25  # brackets in brackets


class Unreadable(Exception):
    """Not an expression of the subset."""


class Expression(NamedTuple):
    # (operation, operands...): num, name, + and * of any number, unary - and /, ^, call
    tree: tuple
    names: frozenset  # its variables, and i
    text: str


# ---- cleaning ------------------------------------------------------------------------------------

IGNORED = (
    "left right big Big bigg Bigg bigl bigr Bigl Bigr biggl biggr Biggl Biggr displaystyle "
    "textstyle scriptstyle limits mathbf "
    "boldsymbol bm mathit mathcal mathopen mathclose bf rm hfill !"
)
SPACES = "quad qquad thinspace enspace , ; : ( ) [ ]"
TEXTS = "textbf textrm textnormal textit textsf texttt mathrm mathsf mathtt mbox hbox operatorname"
MACROS = (
    {"\\" + name: "" for name in IGNORED.split()}
    | {"\\" + name: " " for name in SPACES.split()}
    | {"\\" + name: r"\text" for name in TEXTS.split()}
    | {
        r"\dfrac": r"\frac",
        r"\tfrac": r"\frac",
        r"\cfrac": r"\frac",
        r"\dbinom": r"\binom",
        r"\tbinom": r"\binom",
        r"\le": r"\leq",
        r"\ge": r"\geq",
        r"\leqslant": r"\leq",
        r"\geqslant": r"\geq",
        r"\lt": "<",
        r"\gt": ">",
        r"\ne": r"\neq",
        r"\lbrace": r"\{",
        r"\rbrace": r"\}",
        r"\lvert": "|",
        r"\rvert": "|",
        r"\vert": "|",
        r"\lbrack": "[",
        r"\rbrack": "]",
        r"\colon": ":",
        r"\%": "%",
        r"\degree": r"^\circ",
        r"\varnothing": r"\emptyset",
        r"\dots": r"\ldots",
        r"\cdots": r"\ldots",
        r"\infin": r"\infty",
        r"\ast": "*",
        r"\sim": r"\approx",
        r"\simeq": r"\approx",
        r"\lparen": "(",
        r"\rparen": ")",
        r"\prime": "'",
        r"\asin": r"\arcsin",
        r"\acos": r"\arccos",
        r"\atan": r"\arctan",
        r"\bar": r"\overline",
        r"\land": r"\text{and}",
        r"\lor": r"\text{or}",
        "\\ ": " ",
    }
)
SIGNS = (
    r"− - – - — - ﹣ - × \times ⋅ \cdot · \cdot ∙ \cdot ÷ / ⁄ / π \pi √ \sqrt ∞ \infty ≤ \leq ≥ "
    r"\geq ≠ \neq ⩽ \leq ⩾ \geq ∪ \cup "
    r"∩ \cap ∈ \in ∅ \emptyset ± \pm ∓ \mp ≈ \approx ° ^\circ ′ ' ℝ \mathbb{R} 〈 \langle ⟨ \langle "
    r"〉 \rangle ⟩ \rangle "
    r"α \alpha β \beta γ \gamma δ \delta θ \theta λ \lambda μ \mu ρ \rho σ \sigma φ \phi ω \omega"
)
GLYPHS = {
    sign: macro + " " * (len(macro) > 1)
    for sign, macro in zip(SIGNS.split()[::2], SIGNS.split()[1::2])
}
RAISED = re.compile("[⁰¹²³⁴-⁹⁻⁺ⁿ]+|[₀-₉]+")
GROUP = re.compile(r"(?<=[0-9])(?:\\[,!;: ]|\{,\}|,\\!) ?(?=[0-9]{3}(?![0-9]))")


def plain_glyphs(text):
    """Mathematical Unicode as LaTeX: π, √, ≤, x², ½, full-width and bold digits. Digits of other
    scripts stay what they are."""
    text = RAISED.sub(
        lambda run: (
            ("_" if run[0][0] in "₀₁₂₃₄₅₆₇₈₉" else "^")
            + "{"
            + unicodedata.normalize("NFKC", run[0]).replace("−", "-")
            + "}"
        ),
        unicodedata.normalize("NFC", text),
    )
    return "".join(char if char < "\x80" else glyph(char) for char in text)


def glyph(char):
    """One character as LaTeX."""
    if char in GLYPHS:
        return GLYPHS[char]
    if unicodedata.category(char) == "Cf":
        return ""  # zero-width spaces and marks of direction
    compatible = unicodedata.normalize("NFKC", char)
    if "⁄" in compatible:
        return r"\frac{{{}}}{{{}}}".format(*tuple(compatible.split("⁄")))
    return compatible if compatible.isascii() else GLYPHS.get(compatible, char)


@functools.lru_cache(2048)
def clean(text):
    """One spelling for what only looks different: Unicode, spacing, sizes, fonts, dollars, \\dfrac,
    thousands in 1{,}000.

    Spaces between digits stay: "1 2" is not 12. Macros are taken whole, so the \\\\ of a matrix
    never loses a half.
    """
    text = text if text.isascii() else plain_glyphs(text)
    if "\\" in text or "{,}" in text:
        text = UPRIGHT.sub(r"\1 ", COLOR.sub("", GROUP.sub("", text)))
        text = MACRO.sub(lambda macro: MACROS.get(macro[0], macro[0]), text)
    text = DOLLAR.sub("", text).replace("~", " ")
    return " ".join(text.split()).rstrip(".,;。 ")


COLOR = re.compile(r"\\(?:text)?color\s*(?:\[[^\]]*\])?\{[a-zA-Z0-9,.]*\}")
UPRIGHT = re.compile(
    r"\\(?:operatorname\*?|mathrm|text)\s*\{\s*(e|i|arc[a-z]+|sin|cos|tan|cot|log|ln|exp)\s*\}"
)
MACRO = re.compile(r"\\(?:[a-zA-Z]+|.)")
DOLLAR = re.compile(r"(?<!\\)\$")


# ---- reading -------------------------------------------------------------------------------------

FUNCTIONS = (
    "arcsin",
    "arccos",
    "arctan",
    "sinh",
    "cosh",
    "tanh",
    "sin",
    "cos",
    "tan",
    "cot",
    "sec",
    "csc",
    "log",
    "ln",
    "lg",
    "exp",
)
GREEK = (
    "alpha beta gamma delta epsilon varepsilon zeta eta theta vartheta kappa lambda mu nu xi rho "
    "sigma tau phi varphi chi psi omega "
    "Gamma Delta Theta Lambda Sigma Phi Psi Omega ell infty"
)
ATOMS = {
    "\\" + name
    for name in (*FUNCTIONS, *GREEK.split(), "pi", "frac", "sqrt", "binom", "lfloor", "lceil")
}
BARE = "|".join((*FUNCTIONS, "sqrt", "pi"))
TOKEN = re.compile(
    r"\s*(\\[a-zA-Z]+|[0-9]*\.[0-9]*\\overline\{[0-9]{1,50}\}|(?:[0-9]+\.?[0-9]*|\.[0-9]+)(?:[eE][+-]?[0-9]+)?"
    rf"|(?:np\.|math\.)?(?:{BARE})(?![a-z])|\*\*|\S)"
)
TIMES = {"*", r"\times", r"\cdot"}
OVER = {"/", r"\div"}
CLOSING = {"(": ")", "[": "]", "{": "}", "|": "|", r"\lfloor": r"\rfloor", r"\lceil": r"\rceil"}


def number(text):
    """The tree of a number token: 12, 1.50, 4.5e33 or 0.1\\overline{6}. A power of ten stays a
    power: it may be a huge one."""
    if "\\" in text:
        head, period = text.rstrip("}").split(r"\overline{")
        whole, _, fixed = head.partition(".")
        return (
            "num",
            Fraction(f"{whole or 0}.{fixed or 0}")
            + Fraction(int(period), (10 ** len(period) - 1) * 10 ** len(fixed)),
        )
    mantissa, _, exponent = text.lower().partition("e")
    value = ("num", Fraction(mantissa.removesuffix(".")))
    return (
        ("*", value, ("^", ("num", Fraction(10)), ("num", Fraction(int(exponent)))))
        if exponent
        else value
    )


class Parser:
    """Recursive descent: sum -> product -> power -> atom. Sums and products are flat, so long ones
    need no depth."""

    def __init__(self, text):
        if not text.isascii():
            raise Unreadable("digits and letters of other scripts")
        self.tokens, self.at, self.depth, self.names = TOKEN.findall(text) + [""], 0, 0, set()
        self.bars = False  # inside |...|: there the next bar closes

    def next(self):
        """The next token, which stays; "" at the end."""
        return self.tokens[self.at]

    def take(self, *wanted):
        """The next token, which must be one of `wanted` when given."""
        token = self.tokens[self.at]
        if not token or (wanted and token not in wanted):
            raise Unreadable(token)
        self.at += 1
        return token

    def whole(self):
        """-> the tree of all tokens."""
        tree = self.sum()
        if self.next():
            raise Unreadable(self.next())
        return tree

    def sum(self):
        """Products with + and - between them; one sign may stand before the first."""
        terms = []
        while not terms or self.next() in ("+", "-"):
            sign = self.take() if self.next() in ("+", "-") else "+"
            term = self.product()
            terms.append(("-", term) if sign == "-" else term)
        return terms[0] if len(terms) == 1 else ("+", *terms)

    def product(self):
        """Powers with *, / or nothing between them, from left to right."""
        factors = [self.power()]
        while True:
            token = self.next()
            if token in TIMES or token in OVER:
                self.take()
                sign = self.take() if self.next() == "-" else ""
                factor = ("-", self.power()) if sign else self.power()
                factors.append(("/", factor) if token in OVER else factor)
            elif self.starts(token):
                self.beside(factors, self.power())
            else:
                return factors[0] if len(factors) == 1 else ("*", *factors)

    def starts(self, token):
        """Whether a factor can start with token: what stands side by side is multiplied."""
        return (
            token in ATOMS
            or token[:1].isalnum()
            or token[:1] in ("(", "[", "{", ".")
            or (token == "|" and not self.bars)
        )

    def beside(self, factors, factor):
        """A factor without a sign before it: 2\\frac12 is a mixed number, 1 2 is nothing, all else
        is a product."""
        before = factors[-1]
        if before[0] == "num" and factor[0] == "num":
            raise Unreadable("two numbers side by side")
        if (
            before[0] == "num"
            and factor[0] == "*"
            and len(factor) == 3
            and factor[1][0] == "num"
            and factor[2][0] == "/"
        ):
            above, below = factor[1][1], factor[2][1]
            if (
                below[0] == "num"
                and above < below[1]
                and before[1].denominator == above.denominator == below[1].denominator == 1
            ):
                factors[-1] = ("num", before[1] + above / below[1])
                return
        factors.append(factor)

    def power(self):
        """An atom with a factorial or an exponent."""
        base = self.atom()
        for operator in ("!", "^"):  # one of each: n!! is another function, and x^2^3 is none
            if self.next() == operator or (self.next() == "**" and operator == "^"):
                base = self.raised(base, self.take())
        if self.next() in ("!", "^", "**"):
            raise Unreadable(self.next())
        return base

    def raised(self, base, operator):
        """base with what follows it: a factorial, an exponent, a degree sign."""
        if operator == "!":
            return ("call", "!", base)
        if operator == "**":
            return ("^", base, self.deeper(self.power))
        circle = ["{", r"\circ", "}"] if self.next() == "{" else [r"\circ"]
        if self.tokens[self.at : self.at + len(circle)] == circle:
            self.at += len(circle)
            return ("*", base, ("name", "degree"))
        return ("^", base, self.exponent(base))

    def exponent(self, base):
        """What stands after ^: a group, one digit, one letter, a macro. After 10 and after a minus
        a whole number is meant."""
        sign = self.take() if self.next() == "-" else ""
        if self.next().isdigit() and (base == ("num", 10) or len(self.next()) == 1):
            tree = number(self.take())
        elif self.next()[:1].isdigit():
            raise Unreadable("an exponent of several digits without braces")
        else:
            tree = self.argument()
        return ("-", tree) if sign else tree

    def argument(self):
        """What a macro takes: a group or a single token; of 12 in \\frac12 only the 1."""
        token = self.next()
        if token.isdigit() and len(token) > 1:
            self.tokens[self.at] = token[1:]
            return number(token[0])
        return self.atom()

    def deeper(self, rule):
        """What rule() reads, one level further in."""
        self.depth += 1
        if self.depth > DEPTH:
            raise Unreadable("nested too deeply")
        tree = rule()
        self.depth -= 1
        return tree

    def group(self, opening):
        """Up to the bracket that closes `opening`, which has been taken."""
        bars, self.bars = self.bars, opening == "|"
        tree = self.deeper(self.sum)
        self.take(CLOSING[opening])
        self.bars = bars
        return tree

    def atom(self):
        """A number, a variable, a group in brackets, or a macro with what it takes."""
        token = self.take()
        bare = token.split(".")[-1].lstrip("\\")
        if token[0].isdigit() or token[0] == ".":
            if not any(map(str.isdigit, token)):
                raise Unreadable(token)
            return number(token)
        if token in CLOSING:
            tree = self.group(token)
            return (
                tree
                if token in "([{"
                else ("call", {"|": "abs", r"\lfloor": "floor", r"\lceil": "ceil"}[token], tree)
            )
        if bare in FUNCTIONS:
            return self.deeper(lambda: self.function(bare))
        if bare == "sqrt":
            return self.deeper(self.root)
        if token in (r"\frac", r"\binom"):
            above, below = self.deeper(self.argument), self.deeper(self.argument)
            return (
                ("*", above, ("/", below)) if token == r"\frac" else ("call", "binom", above, below)
            )
        if bare == "pi" or token == "e":
            return ("name", bare)
        if token in ATOMS or (token.isascii() and token.isalpha()):
            return self.variable(token)
        raise Unreadable(token)

    def variable(self, token):
        """A letter with what belongs to it: x, x_1, x_{12}, x'."""
        name = token
        if self.next() == "_":
            self.take()
            start = self.at
            self.deeper(self.argument if self.next() != "{" else self.atom)
            name += "_" + "".join(self.tokens[start : self.at]).strip("{}")
        while self.next() == "'":
            name += self.take()
        self.names.add(name)
        return ("name", name)

    def root(self):
        r"""\sqrt x, \sqrt[3]{x}."""
        if self.next() == "[":
            degree = self.group(self.take())
            return ("call", "root", self.argument(), degree)
        return ("call", "sqrt", self.argument())

    def function(self, name):
        r"""\sin x, \sin^2 x, \log_2 3, \sin 2x, \sin(x)y: without brackets the argument goes on to
        the next sign or function."""
        base, power = None, None
        while self.next() in ("_", "^"):
            if self.take() == "_":
                base = self.argument()
            else:
                power = self.exponent(None)
        if self.next() in ("(", "[", "{"):
            tree = self.atom()
        else:
            factors = [self.power()]
            while self.starts(self.next()) and self.next().lstrip("\\") not in FUNCTIONS:
                factors.append(self.power())
            tree = factors[0] if len(factors) == 1 else ("*", *factors)
        if power == ("-", ("num", 1)) and name in ("sin", "cos", "tan"):
            return ("call", "arc" + name, tree)
        tree = ("call", name, tree) if base is None else ("call", name, tree, base)
        return tree if power is None else ("^", tree, power)


def parse(text):
    """-> Expression. Raises Unreadable for what is not one."""
    parser = Parser(text)
    tree = parser.whole()
    return Expression(tree, frozenset(parser.names), text)


def main():
    if len(sys.argv) != 2:
        raise BadInput("usage: python latex.py EXPRESSION")
    print(clean(sys.argv[1]))
    try:
        print(parse(clean(sys.argv[1])).tree)
    except Unreadable as error:
        raise BadInput(f"not an expression: {error}") from None


if __name__ == "__main__":
    guarded(main)
