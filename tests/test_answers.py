"""verifier.equal: equal and different answers, category by category."""

import random
import re

import pytest

from verifier import algebra, answers, equal
from verifier.answers import LONGEST, Interval, Matrix, Sequence, read
from verifier.latex import clean
from verifier.units import split_unit

CASES = [  # category, gold, right answers, wrong answers
    ("int", "0", ["-0"], []),
    ("int", "12", ["+12", "{12}", "12.", "12.00"], []),
    ("int", "-5", ["(-5)", "−5"], []),
    ("int", "5", ["05", "five", "|-5|", "5,", "5;", r"5\,"], ["-5", "5x"]),
    ("int", "16", [], ["15.99"]),
    ("int", "17", ["seventeen"], []),
    ("int", "21", [r"\text{twenty-one}"], []),
    ("int", "100", ["1e2"], ["10 0"]),
    ("int", "8", ["2^3", "2^{3}"], []),
    ("int", "9", [r"\sqrt{81}"], ["4+5"]),
    ("int", "120", ["5!", r"\binom{10}{3}"], []),
    ("int", "3", [r"\lfloor \pi \rfloor"], []),
    ("int", "1234567", [], ["1234576"]),
    (
        "boxed",
        "5",
        [
            r"\text{5}",
            r"\mathrm{5}",
            r"\mathbf{5}",
            r"\textbf{5}",
            r"\displaystyle 5",
            "$5$",
            r"\(5\)",
            r"{\color{blue}5}",
            r"\textcolor{red}{5}",
            r"\color{red}5",
        ],
        [],
    ),
    (
        "comma",
        "1000",
        ["1{,}000", r"1\,000", r"1\!000", r"1,\!000", r"\$1,000", r"\$1,000.00"],
        ["1, 000"],
    ),
    ("comma", "1000000", ["1,000,000", "1{,}000{,}000", r"1\,000\,000"], []),
    ("comma", "10000", [], ["10,00", "10 000"]),
    ("comma", "12345", ["12,345"], []),
    ("comma", "12345.67", ["12,345.67"], []),
    ("comma", "1,2,3", ["1, 2, 3", "3,2,1"], ["123"]),
    ("comma", "2,3", [], ["2.3"]),
    ("comma", "0.5", [], ["0,5"]),
    ("comma", "-1000", ["-1,000"], []),
    ("comma", "1,000", ["1000"], []),
    ("comma", "100,200", ["100, 200"], []),
    ("percent", r"50\%", ["50"], []),
    ("percent", "50%", [r"50\%"], []),
    ("percent", "0.5", [r"50\%"], []),
    ("percent", "50", [], ["0.5"]),
    ("percent", "5", [r"500\%"], ["500"]),
    ("percent", "12.5", [r"12.5\%"], []),
    ("percent", r"12.5\%", [r"\frac{25}{2}\%", "0.125"], []),
    ("percent", r"20\%", [], ["0.02", r"2\%"]),
    ("percent", "20", [r"20 \text{ percent}", "20 percent", r"20 \%"], []),
    ("percent", "7", [], ["0.07"]),
    ("percent", r"\frac{1}{4}", [r"25\%"], []),
    ("percent", "1", [r"100\%"], []),
    ("unit", "5", ["5 cm", r"5\text{cm}", r"5~\text{cm}"], [r"5\text{ or }6", r"5\text{ million}"]),
    ("unit", r"5\text{ cm}", [], [r"5 \text{ m}"]),
    ("unit", r"5\text{ m}", [r"500\text{ cm}"], []),
    ("unit", r"5\text{ inches}", ["5", r"5\text{ in}"], []),
    ("unit", r"12 \text{ inches}", [r"1\text{ foot}"], []),
    ("unit", r"90^\circ", ["90"], []),
    ("unit", "90", [r"90^{\circ}", "90°", r"90\text{ degrees}", r"90\degree"], []),
    ("unit", r"30^\circ", [], [r"45^\circ"]),
    ("unit", r"36\pi", [r"36\pi\text{ cm}^2"], ["36"]),
    ("unit", r"24\text{ cm}^2", ["24", r"24\text{ cm}^2", r"24 \text{ square centimeters}"], []),
    ("unit", "24", [r"24\text{ square units}"], []),
    ("unit", r"24\pi\text{ square units}", [r"24\pi"], []),
    ("unit", "15", [r"15\text{ mph}"], []),
    ("unit", "60", [r"60\text{ miles per hour}"], []),
    ("unit", r"60\text{ mph}", [r"60\text{ mph}"], []),
    ("unit", "18.90", [r"\$18.9", "18.90 dollars"], []),
    ("unit", r"\$32{,}348", ["32348", r"\$32,348"], []),
    ("unit", "75", ["75 cents", r"75\text{ cents}"], []),
    ("unit", "0.75", [], [r"75\text{ cents}"]),
    ("unit", r"3\text{ hours}", [r"180\text{ minutes}"], [r"3\text{ minutes}"]),
    ("unit", "5,6", [r"5\text{ or }6", r"5\text{ and }6", "5 and 6"], []),
    ("unit", "3", [], [r"3\text{ not }4"]),
    ("unit", "10", [r"10\text{ students}", "10 students"], []),
    ("unit", "6", [r"\text{6 dollars}", r"6\text{ units}"], []),
    ("unit", "5000000", [r"5\text{ million}", "5 million"], []),
    ("unit", "5x", [], [r"5\text{ x}"]),
    ("unit", "€20", ["20"], []),
    ("unit", "20", ["£20"], []),
    ("unit", r"20\text{ m/s}", [r"20\ \mathrm{m/s}"], []),
    ("unit", "9.8", [r"9.8\ \mathrm{m}/\mathrm{s}^2"], []),
    ("unit", "-5", [r"-5^\circ\text{C}"], []),
    ("unit", "2", [], [r"2\text{ more than } x"]),
    (
        "fraction",
        r"\frac{1}{2}",
        ["1/2", r"\frac12", r"\dfrac{1}{2}", r"\frac{2}{4}", ".5", "0.50", "½"],
        ["2/1"],
    ),
    ("fraction", r"-\frac{1}{2}", ["-1/2", "-0.5"], [r"\frac{1}{2}", r"-\frac{-1}{2}"]),
    ("fraction", r"\frac{1}{3}", [r"0.\bar{3}"], ["0.333333333333"]),
    ("fraction", r"\frac{1}{6}", [r"0.1\overline{6}"], []),
    ("fraction", r"\frac{1}{7}", [r"0.\overline{142857}"], []),
    ("fraction", r"\frac{3}{4}", [r"\frac{3}{4}\text{ cups}", "{3}/{4}", "3 / 4"], []),
    ("fraction", r"\frac34", [r"\frac{3}4"], []),
    ("fraction", r"\frac{a}{b}", ["a/b"], [r"\frac{b}{a}"]),
    ("fraction", r"\frac{11}{36}", [], [r"\frac{1}{1}\frac{1}{36}"]),
    ("fraction", r"\frac{\frac{1}{2}}{3}", [r"\frac{1}{6}"], []),
    ("fraction", r"\frac{10}{3}", [r"3.\overline{3}"], []),
    ("fraction", "0.25", [r"\frac14"], []),
    ("fraction", "3", [], ["3/0"]),
    ("mixed", r"2\frac{1}{2}", ["2.5", r"\frac{5}{2}"], []),
    ("mixed", r"\frac{5}{2}", ["2 1/2", r"2 \frac{1}{2}", "2½"], []),
    ("mixed", r"-2\frac{1}{2}", ["-2.5"], []),
    ("mixed", r"-\frac{3}{2}", [], [r"-2\frac{1}{2}"]),
    ("mixed", r"1\frac{4}{5}", [r"\frac{9}{5}"], [r"\frac{4}{5}"]),
    ("mixed", "14/3", [r"4\frac23"], []),
    ("mixed", r"3\frac12", ["3.5"], []),
    (
        "surd",
        r"\sqrt{2}",
        ["2^{1/2}", "2^{0.5}", "√2", "sqrt(2)", r"\sqrt2"],
        ["1.414", "1.41421356"],
    ),
    ("surd", r"\frac{1}{\sqrt{2}}", [r"\frac{\sqrt{2}}{2}"], []),
    ("surd", r"2\sqrt{3}", [r"\sqrt{12}", r"2\sqrt3"], [r"3\sqrt{2}"]),
    ("surd", r"\sqrt[3]{2}", [], [r"\sqrt{2}"]),
    ("surd", r"\sqrt[3]{8}", ["2"], []),
    ("surd", r"\sqrt{3}-1", [r"-1+\sqrt{3}"], []),
    ("surd", r"\frac{1+\sqrt{5}}{2}", [r"\frac{\sqrt{5}+1}{2}", r"\frac12+\frac{\sqrt5}{2}"], []),
    ("surd", r"2\pi", [r"2 \cdot \pi", "2pi"], ["6.28"]),
    ("surd", r"\pi", [], ["3.14159"]),
    ("surd", "e^2", [], ["7.389"]),
    ("surd", "e", [r"\exp(1)"], []),
    ("surd", r"\ln 2", [r"\log 2"], []),
    ("surd", r"\log_2 3", [r"\frac{\ln 3}{\ln 2}"], []),
    ("surd", r"\log_{2}{8}", ["3"], []),
    ("surd", r"\ln(4)", [r"2\ln 2"], []),
    ("surd", r"\frac{\pi}{6}", [r"\frac{1}{6}\pi", r"\arcsin(1/2)"], []),
    ("surd", r"\sqrt{-4}", ["2i"], []),
    ("surd", r"\sqrt{5+2\sqrt{6}}", [r"\sqrt{2}+\sqrt{3}"], []),
    ("surd", r"\frac{1}{2}", [r"\sin 30^\circ"], []),
    ("surd", r"\frac{\sqrt{3}}{2}", [r"\cos \frac{\pi}{6}"], []),
    ("surd", "2^{1009}", [r"2\cdot 2^{1008}"], ["2^{1008}"]),
    ("surd", "3^{2024}", [], ["3^{2023}"]),
    ("algebra", "x^2+2x+1", ["(x+1)^2"], []),
    ("algebra", "2x", ["x+x", "x2", r"2 \cdot x", "2*x"], ["2y"]),
    ("algebra", "x^2", ["x*x", "x^{2}", "x**2"], []),
    ("algebra", "x^{10}", ["x^{5}x^{5}"], []),
    ("algebra", "(x-1)(x+1)", ["x^2-1"], []),
    ("algebra", r"\frac{x^2-1}{x-1}", ["x+1"], []),
    ("algebra", "n(n+1)/2", [r"\frac{n^2+n}{2}"], []),
    ("algebra", r"\sin 2x", [r"2\sin x\cos x"], []),
    ("algebra", r"\sin^2 x+\cos^2 x", [], ["1"]),
    ("algebra", r"\tan x", [r"\frac{\sin x}{\cos x}"], []),
    ("algebra", r"\sqrt{x^2}", [], ["x"]),
    ("algebra", "|x|", [r"\sqrt{x^2}"], []),
    ("algebra", "2^{n+1}", [r"2\cdot 2^n"], []),
    ("algebra", "2^{n}-1", ["2^n - 1"], []),
    ("algebra", r"\binom{n}{2}", [r"\frac{n(n-1)}{2}"], []),
    ("algebra", "n!", ["n(n-1)!"], []),
    ("algebra", "(-1)^{2n} n", ["n"], []),
    ("algebra", "3+4i", ["4i+3"], ["3-4i"]),
    ("algebra", "i^2", ["-1"], []),
    ("algebra", r"\frac{1}{1+i}", [r"\frac{1-i}{2}"], []),
    ("algebra", r"e^{i\pi}", ["-1"], []),
    ("algebra", "a+b", ["b+a"], []),
    ("algebra", "ab", ["ba"], []),
    ("algebra", "a-b", [], ["b-a"]),
    ("algebra", "a_1", [], ["a_2"]),
    ("algebra", "a_{n}", ["a_n"], []),
    ("algebra", "x_{1}+x_2", ["x_2+x_1"], []),
    ("algebra", r"\alpha+\beta", [r"\beta+\alpha"], []),
    ("algebra", "-x+1", ["1-x"], []),
    ("algebra", "x(x+1)", ["x^2+x"], []),
    ("algebra", r"\frac{x}{2}", ["0.5x", "x/2"], []),
    ("algebra", "1/x", ["x^{-1}"], []),
    ("algebra", "X", [], ["x"]),
    ("algebra", "2(x+3)", ["2x+6"], []),
    ("algebra", "k^3+3k", ["3k+k^3"], []),
    ("equation", "x=5", ["5=x", "2x=10"], ["y=5", "x=6"]),
    (
        "equation",
        "5",
        ["x=5", "y = 5", "x = 10/2 = 5", "2+3=5", "n=5", r"\text{Area}=5"],
        ["x = 10/2 = 6", "5=6", "6=5"],
    ),
    ("equation", "y=2x+1", ["2x+1", "y-2x=1"], ["y=2x-1"]),
    ("equation", "x^2+y^2=4", ["y^2+x^2=4", "x^2+y^2-4=0", "2x^2+2y^2=8"], ["4"]),
    ("equation", "f(x)=2x", ["y=2x"], ["g(x)=2x", "f(x)=3x"]),
    ("equation", "x=1,y=2", ["y=2,x=1", "(1,2)"], ["x=2,y=1"]),
    ("equation", "(1,2)", ["x=1,y=2", "(x,y)=(1,2)"], ["x=2,y=1"]),
    ("equation", "x=2,x=3", ["2,3"], []),
    ("equation", "x=2,3", ["2,3"], []),
    ("equation", r"x=2\text{ or }x=3", ["2,3"], []),
    ("equation", "2,3", [], ["x=2"]),
    ("equation", r"\frac13", [r"x = \frac13 \approx 0.33"], [r"\approx 0.333"]),
    ("equation", "2x+3y=6", ["4x+6y=12"], ["2x+3y=7"]),
    ("equation", "x^2=4", [], ["x=2"]),
    ("interval", "(1,2)", ["(1, 2)"], ["[1,2)"]),
    ("interval", "[1,2]", [r"\left[1,2\right]", r"1\le x\le 2", r"x\in[1,2]"], []),
    ("interval", "[1,2)", [r"1\le x<2"], []),
    ("interval", r"(-\infty,2]", [r"x\le 2"], ["x<2"]),
    ("interval", r"(2,\infty)", ["x>2", r"(2,+\infty)"], [r"(2,-\infty)"]),
    ("interval", r"(-\infty,\infty)", [r"\mathbb{R}"], []),
    ("interval", r"\mathbb{R}", [r"(-\infty,\infty)"], []),
    (
        "interval",
        r"(-\infty,1)\cup(2,\infty)",
        [r"x<1\text{ or }x>2", "x<1 or x>2"],
        [r"(-\infty,1]\cup(2,\infty)", r"(-\infty,1)"],
    ),
    ("interval", "x>3", ["x > 3"], ["y>3", "x<3", "3"]),
    ("interval", "3", [], ["x>3"]),
    ("interval", r"x\ge 3", [r"3\le x"], []),
    ("interval", "2x+y<3", ["y<3-2x"], ["y>3-2x"]),
    ("interval", "1<x<2", ["2>x>1"], []),
    ("interval", r"x\neq 2", [r"x\ne 2", r"2\neq x"], [r"x\neq 3"]),
    ("interval", "(0,1]", [r"\left(0, 1\right]"], []),
    ("interval", r"[0,\infty)", [r"x \geq 0"], []),
    ("interval", r"\left[-\frac12,\frac12\right]", ["[-0.5,0.5]"], []),
    ("interval", r"[0,\pi]", [], ["[0,3.14]"]),
    ("tuple", "(3,4)", ["(3, 4)", "(3.0,4)"], ["3,4", r"\{3,4\}", "[3,4]", "-(3,4)"]),
    ("tuple", "(3,4,5)", [], ["(3,4)", "(3,5,4)"]),
    ("tuple", r"\left(3,\frac{\pi}{2}\right)", [r"(3,\pi/2)"], []),
    ("tuple", "(1,1),(3,2)", ["(3,2),(1,1)"], ["(1,1),(3,2),(0,0)"]),
    ("tuple", "(0,0)", [], ["0"]),
    ("tuple", r"\langle 1,2\rangle", ["(1,2)"], []),
    ("tuple", "(1,2)", [r"\langle 1, 2 \rangle"], []),
    ("tuple", "(a,b)", [], ["(b,a)"]),
    ("tuple", "((1,2),3)", ["((1,2),3)"], []),
    ("set", r"\{1,2\}", [r"\{2,1\}", "2,1"], ["(1,2)", r"\{1,2,2\}"]),
    ("set", "1,2", [r"1 \text{ and } 2", "1 or 2", "1;2"], ["(1,2)"]),
    ("set", r"\{1,2,3\}", [], [r"\{1,2,4\}"]),
    ("set", r"\emptyset", [r"\{\}", "∅"], ["0"]),
    ("set", "1,-2", ["-2, 1"], []),
    ("set", "1,2,3", ["1, 2, and 3"], []),
    ("set", r"\{5\}", ["5"], []),
    ("set", r"\sqrt{2},-\sqrt{2}", [r"-\sqrt{2},\sqrt{2}"], []),
    ("set", r"\frac12,\frac13", ["1/3, 0.5"], []),
    ("set", "$69$,$84$", ["84,69"], ["69,48"]),
    ("set", "x=1, x=-3", ["1,-3"], []),
    ("set", r"\text{A}, \text{B}", ["B, A"], []),
    ("set", "A,B,C", ["C,A,B"], ["A,B"]),
    ("pm", r"\pm 2", ["±2", "-2,2", r"\mp 2"], ["2"]),
    ("pm", "2,-2", [r"\pm 2"], []),
    ("pm", r"1\pm\sqrt{2}", [r"1-\sqrt2, 1+\sqrt2"], [r"\sqrt2\pm1"]),
    ("pm", r"x=\pm 2", [r"\pm 2", "x=2,x=-2"], []),
    ("pm", r"\pm\frac{1}{2}", ["0.5,-0.5"], []),
    ("pm", r"\frac{-1\pm\sqrt{5}}{2}", [r"\frac{-1+\sqrt5}{2},\frac{-1-\sqrt5}{2}"], []),
    ("pm", r"\pm 2, 0", ["0, 2, -2"], []),
    (
        "matrix",
        r"\begin{pmatrix} 1 & 2 \\ 3 & 4 \end{pmatrix}",
        [r"\begin{bmatrix} 1 & 2 \\ 3 & 4 \end{bmatrix}"],
        [
            r"\begin{pmatrix} 1 & 3 \\ 2 & 4 \end{pmatrix}",
            r"\begin{pmatrix} 1 & 2 \\ 3 & 5 \end{pmatrix}",
        ],
    ),
    (
        "matrix",
        r"\begin{pmatrix} 1 \\ 2 \end{pmatrix}",
        ["(1,2)", r"\begin{pmatrix} 1 \\ 2 \\ \end{pmatrix}"],
        ["(2,1)", r"-\begin{pmatrix} 1 \\ 2 \end{pmatrix}"],
    ),
    (
        "matrix",
        r"\begin{pmatrix} -1/2 \\ 2 \end{pmatrix}",
        [r"\begin{pmatrix} -\frac{1}{2} \\ 2 \end{pmatrix}"],
        [],
    ),
    ("matrix", r"\begin{pmatrix} 1 & 2 \end{pmatrix}", [], [r"\begin{pmatrix} 12 \end{pmatrix}"]),
    (
        "matrix",
        r"\frac{1}{2}\begin{pmatrix} 2 & 4 \end{pmatrix}",
        [r"\begin{pmatrix} 1 & 2 \end{pmatrix}"],
        [],
    ),
    (
        "matrix",
        r"\begin{pmatrix} a & b \\ c & d \end{pmatrix}",
        [r"\left[\begin{array}{cc} a & b \\ c & d \end{array}\right]"],
        [],
    ),
    (
        "scientific",
        "4.5e33",
        [r"4.5\times 10^{33}", r"4.5 \times 10^33", "4.5E33", "45e32", "4.5 * 10^33", "4.5×10³³"],
        ["4.5e34"],
    ),
    ("scientific", "1e-5", ["10^{-5}", "0.00001"], ["0"]),
    ("scientific", "1e-7", [], ["2e-7", "0.0000002"]),
    (
        "scientific",
        "6.63e-34",
        [r"6.63 \times 10^{-34}", r"6.63 \times 10^{-34}\ \mathrm{J\cdot s}"],
        ["6.64e-34"],
    ),
    ("scientific", "3e8", ["300000000", "300,000,000", r"3 \cdot 10^8"], []),
    ("scientific", "-1./3", [r"-\frac{1}{3}"], ["-0.333"]),
    ("scientific", "np.arcsin(10/13)", [r"\arcsin(\frac{10}{13})"], [r"\arccos(10/13)"]),
    ("scientific", "1.6", ["1.6e0"], []),
    ("scientific", "0.0001", [r"1\times10^{-4}"], []),
    ("scientific", "2.45e6", ["2450000"], []),
    ("scientific", "6e23", [], ["6.02e23"]),
    ("scientific", "1.1e4", ["11000"], []),
    ("text", r"\text{Evelyn}", ["Evelyn", r"\textbf{Evelyn}", r"\mathrm{Evelyn}"], []),
    ("text", r"\text{even}", ["even", r"\text{Even}"], [r"\text{not even}"]),
    ("text", r"\text{east}", [], ["seat"]),
    ("text", "C", ["(C)", r"\textbf{(C)}", r"\text{(C)}", "C."], [r"\text{D}", "c"]),
    ("text", r"\text{(A)}", ["A"], []),
    ("text", r"\text{June 20}", ["June 20", r"\text{june 20}"], []),
    ("text", r"\text{Yes}", ["yes"], ["no"]),
    ("text", r"\text{No solution}", [r"\text{no solution}"], []),
    ("text", r"\text{increasing}", [], [r"\text{decreasing}"]),
    ("text", r"\text{Navin}", [r"\text{navin.}"], []),
    ("text", r"\text{red and blue}", [], [r"\text{blue}"]),
    ("text", r"\text{Monday}", [], [r"\text{Tuesday}"]),
    ("text", r"\text{the circle}", [r"\text{circle}"], []),
    ("base", "1011_2", ["1011_{2}", "1011", r"1011_{\text{two}}"], ["1110_2", "11"]),
    ("base", "2516_8", ["2516_{8}"], ["2517"]),
    ("base", "A2_{16}", ["A2_{16}"], []),
    ("base", "204_5", ["(204)_5"], []),
    ("ratio", "3:2", ["3/2", "6:4", "1.5", "3:2"], ["2:3"]),
    ("ratio", "1:2:3", ["1:2:3"], ["3:2:1"]),
    ("ratio", r"\frac{3}{2}", ["3:2"], []),
    ("set", "1,1,2", ["1,2,1"], ["1,2,2", "1,2"]),
    ("unit", r"5\text{ m}", [], [r"5\text{ s}", r"5\text{ g}"]),
    ("time", "3:30", [], ["1:10"]),
    ("interval", "2x+y>3", ["3<y+2x"], [r"2x+y\ge 3"]),
    ("text", "east", ["East"], ["seat"]),
    ("equation", "6", ["x=12/2=6"], ["x=10/2=6"]),
    ("equation", "(1,2)", ["y=2,x=1"], ["x=2,y=1"]),
    ("tuple", "(1,2)+(3,4)", ["(1,2) + (3,4)"], ["(1,2)", "(4,6)"]),
    ("ratio", "5:4", [r"5\text{ to }4", "5 to 4", "5 : 4"], [r"4\text{ to }5"]),
    ("unicode", "-7", ["\u22127", "-7\u200b", "\u200e-7"], ["7\u200b"]),
    (
        "time",
        r"3:30\text{ p.m.}",
        ["3:30", "3:30 pm", r"\text{3:30 PM}"],
        [r"3:30\text{ a.m.}", r"3:31\text{ p.m.}"],
    ),
    ("time", "10:00", [], ["10:30"]),
    ("time", "4:30", [r"4:30 \text{ p.m.}"], []),
    ("unicode", r"\sqrt{2}", ["√2", "√(2)"], []),
    ("unicode", r"\pi", ["π"], []),
    ("unicode", "42", ["４２"], []),
    ("unicode", "-3", ["－3"], []),
    ("unicode", r"x\le 2", ["x ≤ 2"], []),
    ("unicode", r"\infty", ["∞"], []),
    ("unicode", r"2\pi", ["2π"], []),
    ("unicode", r"3\times 4x", ["3×4x"], []),
    ("unicode", r"\frac{3}{4}", ["¾"], []),
    ("unicode", "x_1", ["x₁"], []),
    ("unicode", r"\theta", ["θ"], []),
    ("unicode", r"(-\infty,1)\cup(2,\infty)", ["(−∞,1)∪(2,∞)"], []),
    ("unicode", "5", ["５", "5。"], ["٥"]),
    ("unicode", "1,2", ["1，2"], []),
    ("special", r"\infty", [r"+\infty"], [r"-\infty", "5"]),
    ("special", "5", [], ["inf", "NaN"]),
    ("special", "0", ["0.0"], [r"\emptyset", r"\frac{0}{0}", "1e-30"]),
    ("special", "1", [], [r"\frac{x}{x}"]),
    ("special", r"\text{DNE}", ["DNE"], [r"\text{does not exist}"]),
    ("special", r"\text{undefined}", [r"\text{Undefined}"], []),
    (
        "hack",
        "3",
        [r"\{3\}", "(3)", "3=3", "~3", "03"],
        [
            r"3 \text{ or } 4",
            "1,2,3",
            "[3,3]",
            r"4\neq 3",
            r"\ne 3",
            r"\text{answer: }3",
            "x",
            r"\boxed",
            "3 3",
            "3,3",
            "3|3",
            r"\max(1,2,3)",
            r"3\pm 0",
            r"3\pm 1",
            ">3",
            "3?",
            r"3 \ldots",
            r"\leq 3",
            "a=3=b",
        ],
    ),
    ("hack", "12", [], [r"\{0,1,\ldots,100\}"]),
    ("hack", "0", [], ["x-x"]),
    ("hack", "5", [], [r"5\%5"]),
    (
        "inject",
        "5",
        ["{5}"],
        [
            'eval("5")',
            'os.system("echo 5")',
            "5 # comment",
            "5 // 1",
            '"5"',
            "5\\\\",
            'int("5")',
            "5;5",
            "0x5",
            "0b101",
            "True+4",
            r"\input{5}",
        ],
    ),
    (
        "benchmarks",
        r"\frac{3\sqrt{3}}{4}",
        [r"\frac{3}{4}\sqrt{3}", r"0.75\sqrt3"],
        [r"\frac{3\sqrt{3}}{2}"],
    ),
    ("benchmarks", "p - q", ["p-q"], []),
    ("benchmarks", r"\frac{270}7\text{ degrees}", [r"\frac{270}{7}", r"\frac{270}{7}^\circ"], []),
    ("benchmarks", "(6,31,-1)", ["(6, 31, -1)"], []),
    ("benchmarks", r"-\frac{35}{9}", ["-35/9"], []),
    ("benchmarks", r"x \in [-2,7]", ["[-2,7]", r"-2 \le x \le 7"], []),
    ("benchmarks", "[-2,7]", [r"x \in [-2,7]"], []),
    ("benchmarks", r"\text{(E)}", ["E", r"\text{E}"], [r"\text{(D)}"]),
    ("benchmarks", r"5.4 \text{ cents}", ["5.4"], []),
    ("benchmarks", r"\$5.4", ["5.40"], []),
    ("benchmarks", r"11,\! 111,\! 111,\! 100", ["11111111100", "11,111,111,100"], []),
    ("benchmarks", r"10,\!000", ["10000"], []),
    (
        "benchmarks",
        r"\left( 3, \frac{\pi}{2} \right)",
        [r"(3, \pi/2)"],
        [r"\left(\frac{\pi}{2},3\right)"],
    ),
    ("benchmarks", "y = 2x + 3", ["2x+3"], []),
    ("benchmarks", "3x - y = 5", ["y = 3x-5", "6x - 2y - 10 = 0"], ["3x - y = -5"]),
    ("benchmarks", r"\frac{1}{2}, -\frac{1}{2}", [r"\pm\frac{1}{2}"], []),
    ("benchmarks", "-2, 1, 3", ["3, -2, 1"], []),
    ("benchmarks", r"\{-2,1\}", [r"\left\{ -2, 1 \right\}"], []),
    ("benchmarks", r"(-\infty, -8) \cup (8, \infty)", [], ["|x|>8"]),
    ("benchmarks", r"1 \pm \sqrt{19}", [r"1+\sqrt{19}, 1-\sqrt{19}"], []),
    ("benchmarks", "x^3 + 3x - 6", ["x^3+3x-6"], []),
    ("benchmarks", "x^{3}+3 x-6", ["x^3 + 3x - 6"], []),
    ("benchmarks", "2k", ["2 k"], []),
    ("benchmarks", r"\sqrt{51}", [r"\sqrt{51} \approx 7.14"], []),
    ("benchmarks", "6r^2-4r-24", ["6r^{2} - 4r - 24", "2(3r^2-2r-12)"], []),
    (
        "benchmarks",
        r"\begin{pmatrix} -1 & 0 \\ 0 & -1 \end{pmatrix}",
        [],
        [r"\begin{pmatrix} -1 & 0 \\ 0 & 1 \end{pmatrix}"],
    ),
    (
        "benchmarks",
        r"\begin{pmatrix} 16/49 \\ 48/49 \\ 24/49 \end{pmatrix}",
        [r"\begin{pmatrix} \frac{16}{49} \\ \frac{48}{49} \\ \frac{24}{49} \end{pmatrix}"],
        [],
    ),
    ("benchmarks", r"\frac{3}{56}", [r"\dfrac{3}{56}"], []),
    ("benchmarks", r"\cot x", [r"\frac{\cos x}{\sin x}", r"\frac{1}{\tan x}"], [r"\tan x"]),
    ("benchmarks", r"\sec x", [r"\frac{1}{\cos x}"], []),
    ("benchmarks", r"\tan^2 x", [r"\sec^2 x - 1"], []),
    ("benchmarks", r"\arctan 2", [r"\tan^{-1} 2"], []),
    ("benchmarks", r"\cos 2\theta", [r"1-2\sin^2\theta"], []),
    ("benchmarks", "e^{2x}", ["(e^x)^2"], []),
    ("benchmarks", "a^2+b^2", ["(a+b)^2-2ab"], ["(a+b)^2"]),
    ("benchmarks", r"\sqrt{a^2+b^2}", ["(a^2+b^2)^{1/2}"], []),
    ("benchmarks", r"\sqrt{ab}", [r"\sqrt{a}\sqrt{b}"], []),
    ("benchmarks", r"\frac{1}{n+1}\binom{2n}{n}", [r"\binom{2n}{n}/(n+1)"], []),
    ("benchmarks", r"\frac{n!}{(n-2)!}", ["n(n-1)"], []),
    ("benchmarks", "2^{2n}", ["4^n"], ["2^{n}"]),
    ("benchmarks", "F_{n}", ["F_n"], []),
    ("benchmarks", r"\frac{2^{2021}-1}{3}", [r"\frac{2^{2021}-1}{3}"], []),
    ("benchmarks", r"\frac{2^{2022}-1}{3}", [r"\frac{4^{1011}-1}{3}"], [r"\frac{4^{1011}+1}{3}"]),
    ("benchmarks", r"\frac{\sqrt{6}+\sqrt{2}}{4}", [r"\cos 15^\circ"], []),
    ("benchmarks", r"\frac{\sqrt{6}-\sqrt{2}}{4}", [r"\sin 15^{\circ}"], []),
    ("benchmarks", r"2 \sin 20^\circ", [r"2\sin\frac{\pi}{9}"], []),
    ("benchmarks", r"-\frac{1}{2}+\frac{\sqrt{3}}{2}i", [r"e^{2\pi i/3}"], []),
    (
        "benchmarks",
        r"\frac{1+i\sqrt{3}}{2}",
        [r"\frac{1}{2}+\frac{\sqrt{3}}{2}i"],
        [r"\frac{1-i\sqrt{3}}{2}"],
    ),
    ("benchmarks", r"2\mathrm{i}", ["2i"], []),
    ("benchmarks", r"12\mathrm{e}", ["12e"], []),
    ("benchmarks", r"120^\circ", [], [r"\frac{2\pi}{3}"]),
    ("benchmarks", r"\sqrt[4]{16}", ["2"], []),
    ("benchmarks", r"\sqrt[3]{-8}", ["-2"], []),
    ("benchmarks", r"\sqrt[3]{x}", ["x^{1/3}"], []),
    ("benchmarks", r"0.\overline{12}", [r"\frac{4}{33}"], []),
    ("benchmarks", r"1.2\overline{3}", [r"\frac{37}{30}"], []),
    ("benchmarks", r"1\frac{1}{3}\text{ cups}", [r"\frac43"], []),
    ("benchmarks", r"10\%", [r"\frac{1}{10}"], []),
    ("benchmarks", r"300\%", ["3"], []),
    ("benchmarks", "1e-5", [r"1 \times 10^{-5}"], []),
    ("benchmarks", "6.7e-28", [r"6.7 \cdot 10^{-28}"], []),
    ("benchmarks", "1.4e6", [r"1.4 \times 10^6\text{ K}"], []),
    ("benchmarks", "2.88e16", [r"2.88 \times 10^{16} \mathrm{~cm}"], []),
    ("benchmarks", "7353", [r"7353\ \text{\AA}"], []),
    ("benchmarks", "-7.0e5", [r"-7.0 \times 10^{5}"], []),
    ("benchmarks", r"\theta(t)", [r"\theta(t)"], []),
    ("benchmarks", r"x_{0} \cos (\omega t)", [r"x_0\cos(\omega t)"], []),
    ("benchmarks", r"x_{0} \cos (\omega t)+\dot{x}_0", [r"x_{0} \cos (\omega t)+\dot{x}_0"], []),
    ("benchmarks", r"\frac{1}{2} m v^2", [r"\frac{mv^2}{2}"], []),
    ("benchmarks", "m_p c^2", ["c^2 m_p"], []),
    ("benchmarks", r"I=\frac{V}{R}", [r"\frac{V}{R}"], []),
    ("benchmarks", r"\frac{V}{R}", ["I = V/R"], ["V/r"]),
    ("benchmarks", r"8 \pi-16", [r"8(\pi-2)"], []),
    ("benchmarks", "(8,14)", [], ["(14,8)"]),
    ("benchmarks", "(1,2),(2,1)", ["(2,1),(1,2)", "(1,2) and (2,1)"], []),
    ("benchmarks", "1,2,3", [r"\{1,2,3\}"], []),
    ("benchmarks", "2^{n-1}", [r"\frac{2^n}{2}"], []),
    ("benchmarks", r"\frac{1}{2 n+2}", [r"\frac{1}{2(n+1)}"], []),
    ("benchmarks", r"\lfloor n/2 \rfloor", [r"\left\lfloor \frac{n}{2} \right\rfloor"], ["n/2"]),
    ("benchmarks", r"\lceil n/2 \rceil", [], [r"\lfloor n/2 \rfloor"]),
    ("benchmarks", r"\log_{10} 2", [r"\frac{\ln 2}{\ln 10}"], []),
    ("benchmarks", r"2\log 3", [r"\log 9"], []),
    ("benchmarks", r"\log_3 9x", [r"2+\log_3 x"], []),
    ("benchmarks", "(-1,0)", ["(-1, 0)"], []),
    ("benchmarks", "(2,-3]", ["(2,-3]"], []),
    ("benchmarks", "0 < x < 1", ["(0,1)"], []),
    ("benchmarks", "0<x<1", [], [r"0 \leq x \leq 1"]),
    ("benchmarks", "x>0", [r"(0,\infty)"], []),
    ("benchmarks", r"x < -1 \text{ or } x > 1", [r"(-\infty,-1)\cup(1,\infty)"], []),
    ("benchmarks", r"x<1 \text{ and } x>2", [], [r"(-\infty,1)\cup(2,\infty)"]),
    ("benchmarks", r"(0,1)\cup\{2\}", [r"\{2\}\cup(0,1)"], []),
    ("benchmarks", "1:3", [r"\frac13"], []),
    ("benchmarks", "12:30", [r"12:30 \text{ PM}"], []),
    ("benchmarks", "2:1", ["4:2"], []),
    ("benchmarks", r"\text{Tuesday}", ["tuesday", "Tuesday."], []),
    ("benchmarks", r"\text{10 apples}", ["10"], []),
    ("benchmarks", r"\text{two}", ["2"], []),
    ("benchmarks", r"\text{odd}", [], [r"\text{an odd function}"]),
    ("benchmarks", r"\text{neither}", [], [r"\text{even}"]),
    ("benchmarks", r"\text{Circle}", [r"\text{circle}"], []),
    ("benchmarks", "3", ["x_1=3", r"\text{three}"], [r"3\text{ and }3"]),
    ("benchmarks", "7", [r"\text{7}", r"\text{$7$}", r"\text{ 7 }"], []),
    ("benchmarks", "1000", [r"1 \text{ thousand}"], []),
    ("benchmarks", "1500", [r"1.5\text{ thousand}"], []),
    (
        "benchmarks",
        "18",
        [
            r"18\text{ eggs per day}",
            r"\text{18 eggs}",
            r"\$18\text{ per day}",
            "18 USD",
            r"18\$",
            "18€",
            "+18",
            "18.0",
            "{18}",
            "18/1",
            "36/2",
            r"3 \cdot 6 = 18",
            "20 - 2 = 18",
            "18 = 18",
            "[18]",
            "(18)",
            "|18|",
            "|-18|",
            "18^1",
            r"\lceil 17.5 \rceil",
        ],
        [
            "1 8",
            r"6 \cdot 3",
            "6(3)",
            "(6)(3)",
            "20-2",
            r"18 \neq 19",
            r"x = 18 \text{ or } x = -18",
            r"\{18, 19\}",
            r"18 \pm 1",
            "0o22",
            "18L",
            "18f",
            "18j",
            "18x^0",
            "_18_",
            "'18'",
        ],
    ),
]


ONE_WAY = {"2 1/2", r"2 \frac{1}{2}"}  # as a gold these are two numbers between spaces


@pytest.mark.parametrize("category", dict.fromkeys(case[0] for case in CASES))
def test_right_answers_are_equal_and_wrong_ones_are_not(category):
    """Catches false negatives (a right answer scored 0), false positives (a hole that a policy
    would learn), and verdicts that depend on the order."""
    for _, gold, right, wrong in (case for case in CASES if case[0] == category):
        assert equal(gold, gold), gold
        for answer in right:
            assert equal(answer, gold), (answer, gold)
            assert equal(gold, answer) or answer in ONE_WAY, (gold, answer)
        for answer in wrong:
            assert not equal(answer, gold), (answer, gold)


def test_golds_differ_from_each_other():
    """Catches comparisons that accept too much, and verdicts that depend on the order: of all pairs
    of golds only a few have one value."""
    golds = list(dict.fromkeys(case[1] for case in CASES))
    pairs = {(a, b) for i, a in enumerate(golds) for b in golds[i + 1 :] if equal(a, b)}
    assert [(a, b) for a, b in pairs if not equal(b, a)] == []
    rng = random.Random(0)
    for a, b in (rng.sample(golds, 2) for _ in range(1000)):
        assert equal(a, b) == equal(b, a), (a, b)
    pairs |= {(b, a) for a, b in pairs}
    assert {("3:2", r"\frac{3}{2}"), (r"\frac34", r"\frac{3}{4}")} <= pairs
    different = {("(1,2)", "[1,2]"), ("(3,4)", "1,2"), ("x>3", r"(2,\infty)"), ("1,2", "(1,2)")}
    assert not different & pairs
    assert len(pairs) / 2 < len(golds)


def mutations(gold, rng):
    """Changes after which a gold is another answer: a digit, a sign, the order of a tuple."""
    digits = [match.start() for match in re.finditer(r"[0-9]", gold)]
    if digits:
        at = rng.choice(digits)
        yield gold[:at] + rng.choice([d for d in "123456789" if d != gold[at]]) + gold[at + 1 :]
    signed = r"[1-9][0-9]*|\\frac\{?[1-9].*|\\sqrt.*|[xn].*[0-9a-z]|[0-9.]+e[0-9-]+"
    if re.fullmatch(signed, gold) and "=" not in gold and ">" not in gold:
        yield "-" + gold if not re.search(r"[-+,]", gold) else f"-({gold})"
    if re.fullmatch(r"\([^(),]+,[^(),]+\)", gold):
        yield "({1},{0})".format(*gold[1:-1].split(","))


def test_mutated_golds_are_wrong():
    """Catches a parser that drops a digit, a sign or the order: every gold of the tables with one
    of them changed, 20 times."""
    rng, tried = random.Random(1), 0
    for gold in {case[1]: 0 for case in CASES if case[1] not in (r"(-1)^{2n} n", "i^2", "(0,0)")}:
        for mutated in [m for _ in range(20) for m in mutations(gold, rng)]:
            tried += 1
            assert not equal(mutated, gold), (mutated, gold)
    assert tried > 2000


def test_spaces_never_join_digits():
    """Catches cleaning that deletes white space, or a half of \\\\: 1 2 is not 12, but 1\\,000 and
    1{,}000 are one number."""
    assert clean(r"1\ 2") == clean(r"1\,2") == "1 2"
    assert clean(r"1\,000") == "1000" and clean(r"1{,}000{,}000") == "1000000"
    assert clean(r"\begin{pmatrix}1\\ 2\end{pmatrix}") == r"\begin{pmatrix}1\\ 2\end{pmatrix}"
    assert not equal(r"1\,2", "12") and not equal("1 2", "12") and not equal("1~2", "12")


def test_brackets_rows_and_ends_are_read():
    """Catches structures read as products."""
    assert not isinstance(read("(1,2)+(3,4)"), Sequence)
    assert read("(1,2)").kind == "tuple" and read("1,2").kind == "list"
    assert read("[1,2)").brackets == "[)"
    assert isinstance(read("1<x<2"), Interval) and read("1<x<2").name == "x"
    matrix = read(r"\begin{pmatrix} 1 & 2 \\ 3 & 4 \end{pmatrix}")
    assert isinstance(matrix, Matrix) and [len(row) for row in matrix.rows] == [2, 2]


def test_units_are_split_off():
    """Catches hedges and variables taken for units, and units that lose their power."""
    for text, head, dimension in (
        (r"24\text{ cm}^2", "24", (("meter", 2),)),
        (r"9.8\text{m}/\text{s}^2", "9.8", (("meter", 1), ("second", -2))),
        ("5 apples", "5", (("apple", 1),)),
        (r"\$5", "5", (("dollar", 1),)),
        (r"90^\circ", "90", (("degree", 1),)),
    ):
        amount, unit = split_unit(text)
        assert (amount, unit.dimension) == (head, dimension)
    for text in (
        r"3\text{ or }4",
        r"3\text{ or more}",
        "5 m",
        "5m",
        "3xy",
        "2 pi",
        r"\sin 30^\circ",
        "7",
    ):
        assert split_unit(text)[1] is None, text


HOSTILE = [
    "(" * 400 + "1" + ")" * 400,
    "1+" * 490 + "1",
    "1/" * 490 + "1",
    "x^" * 490 + "2",
    "2^{" * 300 + "2" + "}" * 300,
    r"\{" * 240 + r"\}" * 240,
    "(1," * 240 + "1" + ")" * 240,
    "|" * 900,
    "5" + "!" * 900,
    "(x+1)^{100}" * 80,
    r"\sqrt{" * 140 + "2" + "}" * 140,
    r"\sin " * 190 + "x",
    "1," * 490 + "1",
    "x=1," * 240,
    r"\pm " * 240,
    "5" + r"\text{ a }" * 100 + "!",
    "9" * 900 + "^{" + "9" * 20 + "}",
    "99999999!",
    "500!^{16}",
    "x!!!!!!!",
    "(2x)^{9999999999999999999999}",
    r"10^{400}\sqrt{2}",
    "1e999999999",
    "1e" + "9" * 900,
    "2^{1e999}",
    "5 " + "a" * 900 + "!",
    "5 " + "a " * 400 + "!",
    r"\begin{pmatrix}" * 30 + r"\end{pmatrix}" * 30,
    "=".join(["500!"] * 100),
    "500!+" * 160 + "1",
    r"\frac{1}{500!+1}+" * 60 + "1",
    "1:" * 400 + "1",
    "{" * 490 + "1" + "}" * 490,
    "-" * 990 + "5",
    r"\$" * 400 + "5",
    "5" + r"^\circ" * 150,
    "-(1+2*(3+\\sin " * 60,
    r"\binom{10^{9}}{5\cdot10^{8}}",
    "10**10**10",
    "((100!)!)!",
    r"(-1)^{" * 100 + "n" + "}" * 100,
    "<".join("x" * 400),
    "x^{x^{x^{x^{x^{9}}}}}",
    "+2*-(x+\\frac{1}{x" * 23 + "})" * 23,
]


def test_hostile_answers_are_cheap(monkeypatch):
    """Catches exponential parsing, towers of powers and deep nesting: each verdict checks the clock
    at most 6,000 times."""
    checks = [0]

    def clock():
        checks[0] += 1
        return 0.0

    monkeypatch.setattr(algebra, "clock", clock)
    for hostile in HOSTILE:
        for gold in ("5", "x", r"\sqrt{2}", "(1,2)", "1,2,3", "x>1", r"\text{a}", "x^2=1"):
            checks[0] = 0
            assert not equal(hostile, gold), (hostile[:40], gold)
            assert checks[0] < 6_000, (hostile[:40], checks[0])
        assert equal(hostile, hostile) == (len(hostile) <= LONGEST)


def test_equal_strings_need_no_evaluation(monkeypatch):
    """Catches 2^{1000000} being computed where both texts are the same, except for spaces."""
    monkeypatch.setattr(answers, "read", lambda text: 1 / 0)
    for text in ("2^{1000000}", "10^{10^{10}}", "100!", r"\sum_{k=1}^{n} k"):
        assert equal(text.replace("^", " ^ "), text)
