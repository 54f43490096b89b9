r"""Reads LaTeX and Unicode: cleans an answer, and parses a subset of LaTeX into a small tree.

    python -m verifier.answers "\dfrac12 x²" "x^2/2"      # shows both trees

The idea. Answers come in many spellings. `clean` maps spellings that only look different to one
text. `parse` reads that text by recursive descent into tuples (operation, operands...): num and
name; + and * of any number of operands; unary - and /; ^ and call. The tree keeps what is written
and nothing is worked out: algebra.py decides what is equal. Model text is hostile and never
evaluated by Python: text outside of the subset, or nested too deeply, is Unreadable.
"""

import functools
import re
import unicodedata
from fractions import Fraction
from typing import NamedTuple

DEPTH = 25  # brackets in brackets


class Unreadable(Exception):
    """The text is not an expression of the subset."""


class Expression(NamedTuple):
    # (operation, operands...): num, name, + and * of any number, unary - and /, ^, call
    tree: tuple
    names: frozenset  # its variables, and i
    text: str


# ---- cleaning ------------------------------------------------------------------------------------

IGNORED = (
    "left right big Big bigg Bigg bigl bigr Bigl Bigr biggl biggr Biggl Biggr displaystyle "
    "textstyle scriptstyle limits mathbf boldsymbol bm mathit mathcal mathopen mathclose bf rm "
    "hfill !"
)
SPACES = "quad qquad thinspace enspace , ; : ( ) [ ]"
TEXTS = "textbf textrm textnormal textit textsf texttt mathrm mathsf mathtt mbox hbox operatorname"
RENAMED = r"""
    \dfrac \frac  \tfrac \frac  \cfrac \frac  \dbinom \binom  \tbinom \binom
    \le \leq  \ge \geq  \leqslant \leq  \geqslant \geq  \lt <  \gt >  \ne \neq
    \lbrace \{  \rbrace \}  \lbrack [  \rbrack ]  \lparen (  \rparen )
    \lvert |  \rvert |  \vert |  \colon :  \% %  \ast *  \prime '
    \degree ^\circ  \varnothing \emptyset  \infin \infty  \dots \ldots  \cdots \ldots
    \sim \approx  \simeq \approx  \bar \overline  \land \text{and}  \lor \text{or}
    \asin \arcsin  \acos \arccos  \atan \arctan
"""
SIGNS = r"""
    − - – - — - ﹣ - × \times ⋅ \cdot · \cdot ∙ \cdot ÷ / ⁄ / π \pi √ \sqrt ∞ \infty ≤ \leq ≥ \geq
    ≠ \neq ⩽ \leq ⩾ \geq ∪ \cup ∩ \cap ∈ \in ∅ \emptyset ± \pm ∓ \mp ≈ \approx ° ^\circ ′ '
    ℝ \mathbb{R} 〈 \langle ⟨ \langle 〉 \rangle ⟩ \rangle α \alpha β \beta γ \gamma δ \delta
    θ \theta λ \lambda μ \mu ρ \rho σ \sigma φ \phi ω \omega
"""
MACROS = (
    {"\\" + name: "" for name in IGNORED.split()}
    | {"\\" + name: " " for name in SPACES.split()}
    | {"\\" + name: r"\text" for name in TEXTS.split()}
    | dict(zip(RENAMED.split()[::2], RENAMED.split()[1::2]))
    | {"\\ ": " "}
)
GLYPHS = {  # a space behind a macro: "2πx" is 2\pi x, not 2\pix
    sign: macro + " " * (len(macro) > 1)
    for sign, macro in zip(SIGNS.split()[::2], SIGNS.split()[1::2])
}
RAISED = re.compile("[⁰¹²³⁴-⁹⁻⁺ⁿ]+|[₀-₉]+")
# the thousands separators 1\,000 and 1{,}000
GROUP = re.compile(r"(?<=[0-9])(?:\\[,!;: ]|\{,\}|,\\!) ?(?=[0-9]{3}(?![0-9]))")
COLOR = re.compile(r"\\(?:text)?color\s*(?:\[[^\]]*\])?\{[a-zA-Z0-9,.]*\}")
# e, i and functions in upright letters
UPRIGHT = re.compile(
    r"\\(?:operatorname\*?|mathrm|text)\s*\{\s*(e|i|arc[a-z]+|sin|cos|tan|cot|log|ln|exp)\s*\}"
)
MACRO = re.compile(r"\\(?:[a-zA-Z]+|.)")
DOLLAR = re.compile(r"(?<!\\)\$")


@functools.lru_cache(2048)
def clean(text):
    """-> text with one spelling for what only looks different.

    That is Unicode, spacing, sizes, fonts, dollars, \\dfrac, and thousands as in 1{,}000. Spaces
    between digits stay: "1 2" is not 12. Macros are taken whole, so \\\\ in a matrix stays whole.
    """
    text = text if text.isascii() else plain_glyphs(text)
    if "\\" in text or "{,}" in text:
        # The order matters: thousands while their \, stands, colours, upright functions, then all
        # macros.
        text = UPRIGHT.sub(r"\1 ", COLOR.sub("", GROUP.sub("", text)))
        text = MACRO.sub(lambda macro: MACROS.get(macro[0], macro[0]), text)
    text = DOLLAR.sub("", text).replace("~", " ")
    return " ".join(text.split()).rstrip(".,;。 ")


def plain_glyphs(text):
    """Mathematical Unicode as LaTeX: π, √, ≤, x², ½, full-width and bold digits.

    Digits of other scripts stay as they are: parse refuses them.
    """
    text = RAISED.sub(raised_glyphs, unicodedata.normalize("NFC", text))
    return "".join(char if char < "\x80" else plain_glyph(char) for char in text)


def raised_glyphs(run):
    """A match of RAISED as LaTeX: x¹⁰ is x^{10}, x₁ is x_{1}."""
    sign = "_" if run[0][0] in "₀₁₂₃₄₅₆₇₈₉" else "^"
    digits = unicodedata.normalize("NFKC", run[0]).replace("−", "-")
    return f"{sign}{{{digits}}}"


def plain_glyph(char):
    """One character as LaTeX."""
    if char in GLYPHS:
        return GLYPHS[char]
    if unicodedata.category(char) == "Cf":
        return ""  # zero-width spaces and marks of direction
    compatible = unicodedata.normalize("NFKC", char)
    if "⁄" in compatible:  # ½ is 1⁄2
        return r"\frac{{{}}}{{{}}}".format(*tuple(compatible.split("⁄")))
    return compatible if compatible.isascii() else GLYPHS.get(compatible, char)


# ---- parsing -------------------------------------------------------------------------------------

FUNCTION_NAMES = "arcsin arccos arctan sinh cosh tanh sin cos tan cot sec csc log ln lg exp"
FUNCTIONS = tuple(FUNCTION_NAMES.split())  # as an alternation, the longest prefix first
GREEK = (
    "alpha beta gamma delta epsilon varepsilon zeta eta theta vartheta kappa lambda mu nu xi rho "
    "sigma tau phi varphi chi psi omega Gamma Delta Theta Lambda Sigma Phi Psi Omega ell infty"
)
ATOMS = {
    "\\" + name
    for name in (*FUNCTIONS, *GREEK.split(), "pi", "frac", "sqrt", "binom", "lfloor", "lceil")
}
BARE = "|".join((*FUNCTIONS, "sqrt", "pi"))
# a macro; 0.1\overline{6}; a number; a function without its backslash (np.sin); **; one character
TOKEN = re.compile(
    r"\s*(\\[a-zA-Z]+"
    r"|[0-9]*\.[0-9]*\\overline\{[0-9]{1,50}\}"
    r"|(?:[0-9]+\.?[0-9]*|\.[0-9]+)(?:[eE][+-]?[0-9]+)?"
    rf"|(?:np\.|math\.)?(?:{BARE})(?![a-z])"
    r"|\*\*|\S)"
)
TIMES = {"*", r"\times", r"\cdot"}
OVER = {"/", r"\div"}
CLOSING = {"(": ")", "[": "]", "{": "}", "|": "|", r"\lfloor": r"\rfloor", r"\lceil": r"\rceil"}
BRACKET_CALLS = {"|": "abs", r"\lfloor": "floor", r"\lceil": "ceil"}


def parse(text):
    """text: cleaned -> Expression. Raises Unreadable for text that is not one."""
    parser = Parser(text)
    tree = parser.whole()
    return Expression(tree, frozenset(parser.names), text)


def number_tree(text):
    """The tree of a number token: 12, 1.50, 4.5e33 or 0.1\\overline{6}.

    A power of ten stays a power in the tree, because it may be huge.
    """
    if "\\" in text:
        head, period = text.rstrip("}").split(r"\overline{")
        whole, _, fixed = head.partition(".")
        # 0.1\overline{6}: period 6 / 9, behind one fixed digit 6 / 90; 0.1 + 6 / 90 is 1 / 6.
        repeating = Fraction(int(period), (10 ** len(period) - 1) * 10 ** len(fixed))
        return ("num", Fraction(f"{whole or 0}.{fixed or 0}") + repeating)
    mantissa, _, exponent = text.lower().partition("e")
    value = ("num", Fraction(mantissa.removesuffix(".")))
    if not exponent:
        return value
    return ("*", value, ("^", ("num", Fraction(10)), ("num", Fraction(int(exponent)))))


class Parser:
    """Recursive descent: sum -> product -> power -> atom.

    Sums and products are flat, so long ones need no depth.
    """

    def __init__(self, text):
        if not text.isascii():
            raise Unreadable("digits and letters of other scripts")
        self.tokens = [*TOKEN.findall(text), ""]  # "" is the end
        self.at = 0
        self.depth = 0
        self.names = set()
        self.in_bars = False  # inside |...| the next bar closes

    def peek(self):
        """The next token, which stays; "" at the end."""
        return self.tokens[self.at]

    def take(self, *wanted):
        """Takes the next token, which must be one of `wanted` when these are given."""
        token = self.tokens[self.at]
        if not token or (wanted and token not in wanted):
            raise Unreadable(token)
        self.at += 1
        return token

    def whole(self):
        """-> the tree of all tokens."""
        tree = self.sum()
        if self.peek():
            raise Unreadable(self.peek())
        return tree

    def sum(self):
        """Products with + and - between them; one sign may stand before the first."""
        terms = []
        while not terms or self.peek() in ("+", "-"):
            sign = self.take() if self.peek() in ("+", "-") else "+"
            term = self.product()
            terms.append(("-", term) if sign == "-" else term)
        return terms[0] if len(terms) == 1 else ("+", *terms)

    def product(self):
        """Powers with *, / or nothing between them, from left to right: a/bc is (a/b)c."""
        factors = [self.power()]
        while True:
            token = self.peek()
            if token in TIMES or token in OVER:
                self.take()
                sign = self.take() if self.peek() == "-" else ""
                factor = ("-", self.power()) if sign else self.power()
                factors.append(("/", factor) if token in OVER else factor)
            elif self.starts_factor(token):
                self.append_beside(factors, self.power())
            else:
                return factors[0] if len(factors) == 1 else ("*", *factors)

    def starts_factor(self, token):
        """Whether a factor can start with token: factors side by side are multiplied, x2 is 2x."""
        return (
            token in ATOMS
            or token[:1].isalnum()
            or token[:1] in ("(", "[", "{", ".")
            or (token == "|" and not self.in_bars)
        )

    def append_beside(self, factors, factor):
        """Appends a factor that has no sign before it.

        2\\frac12 is the mixed number 5/2, 1 2 is Unreadable, everything else is a product.
        """
        before = factors[-1]
        if before[0] == "num" and factor[0] == "num":
            raise Unreadable("two numbers side by side")
        # The tree of \frac{a}{b}, with numbers in both places.
        is_fraction = (
            factor[0] == "*"
            and len(factor) == 3
            and factor[1][0] == "num"
            and factor[2][0] == "/"
            and factor[2][1][0] == "num"
        )
        if before[0] == "num" and is_fraction:
            whole, above, below = before[1], factor[1][1], factor[2][1][1]
            # A proper fraction behind a whole number: a mixed number.
            if above < below and whole.denominator == above.denominator == below.denominator == 1:
                factors[-1] = ("num", whole + above / below)
                return
        factors.append(factor)

    def power(self):
        """An atom with a factorial or an exponent."""
        base = self.atom()
        for operator in ("!", "^"):  # one of each: n!! is another function, and x^2^3 is none
            if self.peek() == operator or (self.peek() == "**" and operator == "^"):
                base = self.raised(base, self.take())
        if self.peek() in ("!", "^", "**"):
            raise Unreadable(self.peek())
        return base

    def raised(self, base, operator):
        """base with what follows it: a factorial, an exponent, a degree sign."""
        if operator == "!":
            return ("call", "!", base)
        if operator == "**":
            return ("^", base, self.deeper(self.power))
        circle = ["{", r"\circ", "}"] if self.peek() == "{" else [r"\circ"]
        if self.tokens[self.at : self.at + len(circle)] == circle:
            self.at += len(circle)
            return ("*", base, ("name", "degree"))
        return ("^", base, self.exponent(base))

    def exponent(self, base):
        """What stands after ^: a group, one digit, one letter, a macro.

        x^10 is Unreadable, as TeX makes x^1 0 of it. After 10 a whole number is meant: 10^37.
        """
        sign = self.take() if self.peek() == "-" else ""
        if self.peek().isdigit() and (base == ("num", 10) or len(self.peek()) == 1):
            tree = number_tree(self.take())
        elif self.peek()[:1].isdigit():
            raise Unreadable("an exponent of several digits without braces")
        else:
            tree = self.argument()
        return ("-", tree) if sign else tree

    def argument(self):
        """What a macro takes: a group or a single token; of 12 in \\frac12 only the 1."""
        token = self.peek()
        if token.isdigit() and len(token) > 1:
            # \frac12: the 2 stays, and is the next argument.
            self.tokens[self.at] = token[1:]
            return number_tree(token[0])
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
        outer, self.in_bars = self.in_bars, opening == "|"
        tree = self.deeper(self.sum)
        self.take(CLOSING[opening])
        self.in_bars = outer
        return tree

    def atom(self):
        """A number, a variable, a group in brackets, or a macro with its arguments."""
        token = self.take()
        # np.sin, math.sin, \sin and sin are one function.
        bare = token.split(".")[-1].lstrip("\\")
        if token[0].isdigit() or token[0] == ".":
            if not any(map(str.isdigit, token)):
                raise Unreadable(token)
            return number_tree(token)
        if token in CLOSING:
            tree = self.group(token)
            return tree if token in "([{" else ("call", BRACKET_CALLS[token], tree)
        if bare in FUNCTIONS:
            return self.deeper(lambda: self.function(bare))
        if bare == "sqrt":
            return self.deeper(self.root)
        if token in (r"\frac", r"\binom"):
            above, below = self.deeper(self.argument), self.deeper(self.argument)
            if token == r"\binom":
                return ("call", "binom", above, below)
            return ("*", above, ("/", below))
        if bare == "pi" or token == "e":
            return ("name", bare)
        if token in ATOMS or (token.isascii() and token.isalpha()):
            return self.variable(token)
        raise Unreadable(token)

    def variable(self, token):
        """A letter with what belongs to it: x, x_1, x_{12}, x'. i is the imaginary unit."""
        name = token
        if self.peek() == "_":
            self.take()
            start = self.at
            self.deeper(self.argument if self.peek() != "{" else self.atom)
            name += "_" + "".join(self.tokens[start : self.at]).strip("{}")
        while self.peek() == "'":
            name += self.take()
        self.names.add(name)
        return ("name", name)

    def root(self):
        r"""\sqrt x, \sqrt[3]{x}."""
        if self.peek() == "[":
            degree = self.group(self.take())
            return ("call", "root", self.argument(), degree)
        return ("call", "sqrt", self.argument())

    def function(self, name):
        r"""\sin x, \sin^2 x, \log_2 3, \sin 2x, \sin(x)y.

        Without brackets the argument extends to the next sign or function. \log without a base is
        the natural logarithm.
        """
        base, power = None, None
        while self.peek() in ("_", "^"):
            if self.take() == "_":
                base = self.argument()
            else:
                power = self.exponent(None)
        if self.peek() in ("(", "[", "{"):
            tree = self.atom()
        else:
            factors = [self.power()]
            # \sin 2x is \sin(2x), and \sin x\cos y ends before \cos.
            while self.starts_factor(self.peek()) and self.peek().lstrip("\\") not in FUNCTIONS:
                factors.append(self.power())
            tree = factors[0] if len(factors) == 1 else ("*", *factors)
        if power == ("-", ("num", 1)) and name in ("sin", "cos", "tan"):
            return ("call", "arc" + name, tree)  # \sin^{-1} x
        tree = ("call", name, tree) if base is None else ("call", name, tree, base)
        return tree if power is None else ("^", tree, power)
