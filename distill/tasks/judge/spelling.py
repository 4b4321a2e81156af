r"""Normalise the spelling of answers to plain LaTeX.

`clean` removes what does not change the value (boxes, fonts, sizes, spaces, a preface) and writes the rest in one way:
typographic signs and full-width letters as ASCII or LaTeX commands, fractions and roots with braces, matrices as
`pmatrix`, program spelling (`x**2`, `sqrt(x)`) as LaTeX. It never computes. `structure` and `numbers` read the result.
"""

from __future__ import annotations

import re
import unicodedata
from fractions import Fraction

_SUPER = str.maketrans("⁰¹²³⁴⁵⁶⁷⁸⁹⁺⁻", "0123456789+-")
_SUPER_RUN = re.compile("[⁰¹²³⁴⁵⁶⁷⁸⁹⁺⁻]+")
_SUB = str.maketrans("₀₁₂₃₄₅₆₇₈₉", "0123456789")
_SUB_RUN = re.compile("[₀₁₂₃₄₅₆₇₈₉]+")
_VULGAR = re.compile("(\\d*)\\s*([¼½¾⅐-⅞↉])")
_SYMBOLS = {
    "−": "-", "–": "-", "—": "-", "‒": "-", "\u200b": "", "\ufeff": "", "×": r"\times ", "·": r"\cdot ", "⋅": r"\cdot ", "÷": r"\div ",
    "∗": "*", "π": r"\pi ", "∞": r"\infty ", "≤": r"\le ", "≥": r"\ge ", "⩽": r"\le ", "⩾": r"\ge ", "≠": r"\ne ", "±": r"\pm ",
    "∈": r"\in ", "∪": r"\cup ", "∩": r"\cap ", "∅": r"\emptyset ", "θ": r"\theta ", "°": r"^\circ ",
    "’": "'", "′": "'", "“": '"', "”": '"', "⁄": "/", "≈": r"\approx ", "℃": r"^\circ C", "℉": r"^\circ F", "△": r"\triangle ",
    "∠": r"\angle ", "ℝ": r"\mathbb{R}", "。": ". ", "、": ", ", "，": ", ", "；": "; ", "…": "...", "µ": r"\mu ", "μ": r"\mu ", "Ω": r"\Omega ",
    "【": "[", "】": "]", "〔": "(", "〕": ")", "√": "√",
}  # fmt: skip
_CJK = "\u3400-\u9fff"
_FONTS = (
    "text textbf textit textrm textsf textsc texttt textnormal textup emph mbox hbox mathrm mathbf mathit mathsf mathtt "
    "mathnormal boldsymbol bm pmb operatorname underline uline rm bf it boxed fbox framebox mathop mathord ensuremath uppercase"
)
_FONT = re.compile(rf"\\(?:{'|'.join(_FONTS.split())})\*?\s*\{{([^{{}}]*)\}}")
_SIZES = (
    "left right displaystyle textstyle scriptstyle limits nolimits tiny small normalsize large Large LARGE huge Huge "
    "bf it rm bfseries itshape normalfont centering checkmark boldmath big Big bigg Bigg bigl bigr Bigl Bigr biggl biggr "
    "Biggl Biggr mleft mright therefore because blacksquare square qed Box"
)
_DROP = re.compile(rf"\\(?:left|right)\.|\\(?:{'|'.join(_SIZES.split())})(?![a-zA-Z])|\\!")
_SPACE = re.compile(
    r"(?<!\\)\\[,;:> ]|\\(?:quad|qquad|enspace|thinspace|medspace|thickspace|nobreakspace)(?![a-zA-Z])|~"
)
_INVISIBLE = re.compile(r"\\(?:[hv]space\*?|[hv]?phantom|label|tag)\s*\{[^{}]*\}")
_COLOR = re.compile(r"\\(?:text)?color\s*(?:\[\w+\])?\s*\{[^{}]*\}")
_TAGS = re.compile(r"</?(?:b|i|em|strong|sub|sup|span|p|u|br)(?: [^<>]*)?/?>", re.IGNORECASE)
_ALIASES = {
    "leq": r"\le", "leqslant": r"\le", "geq": r"\ge", "geqslant": r"\ge", "neq": r"\ne", "lt": "<", "gt": ">", "lbrace": r"\{",
    "rbrace": r"\}", "lbrack": "[", "rbrack": "]", "langle": "(", "rangle": ")", "lvert": "|", "rvert": "|", "vert": "|", "mid": "|",
    "lVert": r"\|", "rVert": r"\|", "dots": "...", "ldots": "...", "cdots": "...", "dotsc": "...", "varnothing": r"\emptyset",
    "tfrac": r"\frac", "dfrac": r"\frac", "cfrac": r"\frac", "dbinom": r"\binom", "tbinom": r"\binom", "land": r"\text{ and }",
    "lor": r"\text{ or }", "to": r"\to", "Pr": "P", "lg": r"\log_{10}", "arcctg": r"\arccot", "tg": r"\tan", "ctg": r"\cot", "R": r"\mathbb{R}",
    "imath": "i", "cr": r"\\", "tabularnewline": r"\\", "Reals": r"\mathbb{R}", "bigcup": r"\cup", "degree": r"^\circ",
}  # fmt: skip
_ALIAS = re.compile(rf"\\({'|'.join(sorted(_ALIASES, key=len, reverse=True))})(?![a-zA-Z])")
_FUNCTION_NAMES = "arcsin arccos arctan sinh cosh tanh sin cos tan cot sec csc ln exp gcd lcm max min"
_BARE_FUNCTION = re.compile(
    rf"(?<![\\A-Za-z])({'|'.join(_FUNCTION_NAMES.split())})(?=\s*(?:\(|\\|\d|[a-z](?![a-z])|\^))"
)
_PREFACE = re.compile(
    r"(?:(?:therefore|thus|hence|so),? )?(?:(?:the )?(?:final |correct )*answer(?: is)?:? |it(?: is|'s) "
    r"|(?:the )?(?:(?:minimum|maximum|smallest|largest|least|greatest|total|required|exact) )?"
    r"(?:result|total|sum|value|solution|number|minimum|maximum|area|volume|length|probability|product|distance|perimeter|remainder)"
    r"(?: of [A-Za-z ]+?)? (?:is:?|:) ?"
    r"|(?:therefore|thus|hence|so),? |(?:the )?(?:correct )?(?:option|choice)(?: is)?:? (?=\(?[A-J]\)?(?![A-Za-z])))|= ?"
    r"|(?:因此|所以|故|综上)?,? ?(?:正确|最终|最后)?的?(?:答案|结果|选项)(?:应?是|应?为|:)+ ?|(?:故|应|因此|所以)?(?:选项|选择?) ?(?=\(?[A-J]\)?(?![A-Za-z]))|(?:因此|所以|故|解得|答|一共有?|总共有?|共有?|共计|合计)[:,]? ?",
    re.IGNORECASE,
)
_WRAPS = (
    re.compile(r"\$\$(.*)\$\$", re.DOTALL),
    re.compile(r"\$([^$]*)\$", re.DOTALL),
    re.compile(r"\\\((.*)\\\)", re.DOTALL),
    re.compile(r"\\\[(.*)\\\]", re.DOTALL),
    re.compile(r"\*\*([^*]*)\*\*", re.DOTALL),
    re.compile(r"\*([^*]*)\*", re.DOTALL),
    re.compile(r"__(.*)__", re.DOTALL),
    re.compile(r"`(.*)`", re.DOTALL),
    re.compile(r"\\f?boxed\s*\{(.*)\}", re.DOTALL),
    re.compile(r"\\begin\{(?:aligned|align\*?|equation\*?|gathered|split)\}(.*)\\end\{\w+\*?\}", re.DOTALL),
    re.compile(r"\\(?:text|mathrm|mathbf|textbf)\s*\{([^{}]*)\}", re.DOTALL),
)
_LOOSE_SPACE = re.compile(r"(?<![\w\\]) | (?!\w)")


def clean(text: str) -> str:
    """The answer in plain LaTeX, without wrappers, typographic variants and a final full stop."""
    if not text.isascii():
        text = _without_typography(text)
    text = _unwrap(text)
    if "<" in text:
        text = _TAGS.sub("", text)
    if "**" in text:
        text = re.sub(r"(?<![\w)}*])\*\*([^*]+)\*\*", r"\1", text)
    if "\\" in text or "{" in text:
        text = _plain_latex(text)
    text = _plain_program(text)
    text = text.replace("~", " ").replace("<=", r"\le ").replace(">=", r"\ge ").replace("!=", r"\ne ")
    text = " ".join(text.replace("<", " < ").replace(">", " > ").split())
    while preface := _PREFACE.match(text):
        if not preface[0] or preface.end() == len(text):
            break
        text = text[preface.end() :]
    return _unwrap(text)


def same_text(one: str, other: str) -> bool:
    """Return whether two cleaned texts differ only in spaces without a meaning (unlike `4 2` and `42`)."""
    return _LOOSE_SPACE.sub("", one) == _LOOSE_SPACE.sub("", other)


def balanced(text: str) -> bool:
    """Whether the unescaped braces of a text match."""
    depth = 0
    for char in re.sub(r"\\.", "", text):
        depth += {"{": 1, "}": -1}.get(char, 0)
        if depth < 0:
            return False
    return depth == 0


def depth(text: str) -> int:
    """The nesting depth of brackets of any kind."""
    deepest = level = 0
    for char in text:
        if char in "([{":
            level += 1
            deepest = max(deepest, level)
        elif char in ")]}":
            level -= 1
    return deepest


def _without_typography(text: str) -> str:
    text = _VULGAR.sub(_spell_vulgar, text)
    text = _SUPER_RUN.sub(lambda run: "^{%s}" % run[0].translate(_SUPER), text)  # noqa: UP031
    text = _SUB_RUN.sub(lambda run: "_{%s}" % run[0].translate(_SUB), text)  # noqa: UP031
    for symbol, spelled in _SYMBOLS.items():
        text = text.replace(symbol, spelled)
    text = unicodedata.normalize("NFKC", text)
    # 或 ("or") and 和 ("and") join two answers if one of their neighbours is not a Chinese word.
    text = re.sub(rf"(?<![{_CJK}])\s*或者?\s*|\s*或者?\s*(?![{_CJK}])", " or ", text)
    text = re.sub(rf"(?<=[^{_CJK}\s])\s*(?:和|与|以及|及)\s*(?=[^{_CJK}\s])", " and ", text)
    return re.sub(r"√\s*(\d+|[A-Za-z]|\(([^()]*)\))", _spell_root, text).replace("√", r"\sqrt ")


def _spell_vulgar(found: re.Match[str]) -> str:
    value = Fraction(unicodedata.numeric(found[2])).limit_denominator(100)
    if found[1]:
        value += int(found[1])
    return rf"\frac{{{value.numerator}}}{{{value.denominator}}}"


def _spell_root(found: re.Match[str]) -> str:
    return r"\sqrt{%s}" % (found[1] if found[2] is None else found[2])


def _plain_latex(text: str) -> str:
    text = re.sub(r"\\\\\s*\[[\d.]+\s*(?:pt|ex|em|mm|cm|in)\]", r"\\\\ ", text)
    text = re.sub(r"\\!\s*(?=\d)", "", text).replace(r"\!", "")  # 12,\! 345
    text = re.sub(r"\\math(?:bb|cal|frak)\s*\{(\d+)\}", r"\1", text)
    text = re.sub(r"(?<=\d)(?:\\[,;:> ])+(?=\d{3}(?!\d))", "", text)  # 12\,345
    text = _COLOR.sub("", _INVISIBLE.sub("", text))
    text = re.sub(r"\\(?:mathrm|text|operatorname|rm|mathbf)\s*\{\s*([ie])\s*\}", r"\1", text)
    for _ in range(3):  # fonts within fonts
        if (plain := _FONT.sub(r" \1 ", text)) == text:
            break
        text = plain
    text = _ALIAS.sub(lambda name: _ALIASES[name[1]] + " ", _SPACE.sub(" ", _DROP.sub("", text)))
    text = re.sub(r"\{([^{}]*)\\over(?![a-zA-Z])([^{}]*)\}", r"\\frac{\1}{\2}", text)
    text = _braced(text)
    text = re.sub(r"\^\s*(?:\{\s*\\circ\s*\}|\\circ)", " degrees ", text)
    text = re.sub(r"(\d)\s*\{\s*,\s*\}\s*(?=\d{3})", r"\1", text)
    for command, plain in (
        (r"\$", "$"),
        (r"\%", "%"),
        (r"\not=", r"\ne "),
        (r"\not =", r"\ne "),
        (r"\&", "&"),
        (r"\#", "#"),
        (r"\prime", "'"),
    ):
        text = text.replace(command, plain)
    text = re.sub(r"\^\s*\{?\s*('+)\s*\}?", r"\1", text)
    text = re.sub(r"_ ?\{ ?(\w) ?\}", r"_\1", text)
    if r"\begin" in text:
        text = _matrices(text)
    return re.sub(r"(\\(?:log|ln)(?:_\w|_\{\w+\})?) ?\{([^{}]*)\}", r"\1(\2)", text)


def _argument(text: str, at: int) -> tuple[str, int]:
    """The argument of a LaTeX command that begins at `at`, without its braces, and its end position."""
    while at < len(text) and text[at] == " ":
        at += 1
    if at >= len(text):
        return "", at
    if text[at] == "{":
        depth = 0
        for end in range(at, len(text)):
            depth += (text[end] == "{") - (text[end] == "}")
            if depth == 0:
                return text[at + 1 : end], end + 1
        return text[at + 1 :], len(text)
    if command := re.compile(r"\\[a-zA-Z]+").match(text, at):
        if command[0] in (r"\sqrt", r"\frac"):
            _, end = _argument(text, command.end())
            if command[0] == r"\frac":
                _, end = _argument(text, end)
            return text[at:end], end
        return command[0], command.end()
    return text[at], at + 1


_BRACED = re.compile(r"\\(frac|sqrt|binom)(?![a-zA-Z])\s*(\[[^\[\]]*\])?")


def _braced(text: str, depth: int = 0) -> str:
    r"""The text with braces around every argument of `\frac12`, `\frac{1}2`, `\frac\pi2`, `\sqrt2`, `\sqrt(2)`."""
    out, at = [], 0
    for found in _BRACED.finditer(text):
        if found.start() < at:
            continue
        out.append(text[at : found.start()])
        at = found.end()
        if found[1] == "sqrt" and (round_ := re.compile(r"\s*\(([^()]*)\)").match(text, at)):
            arguments, at = [round_[1]], round_.end()
        elif found[1] == "sqrt":
            argument, at = _argument(text, at)
            arguments = [argument]
        else:
            top, at = _argument(text, at)
            bottom, at = _argument(text, at)
            arguments = [top, bottom]
        if depth < 20:
            arguments = [_braced(argument, depth + 1) for argument in arguments]
        out.append(f"\\{found[1]}{found[2] or ''}" + "".join(f"{{{a.strip()}}}" for a in arguments))
    return "".join(out) + text[at:]


def _matrices(text: str) -> str:
    r"""The text with arrays in brackets and all matrices as `pmatrix`, without a final `\\`; determinants are kept."""
    text = re.sub(r"\\(begin|end)\{(?:[bB]|small|p|)matrix\*?\}", r"\\\1{pmatrix}", text)
    text = re.sub(
        r"(?:\[|\(|\\\{)?\s*\\begin\{array\}\s*(?:\{[^{}]*\})?(.*?)\\end\{array\}\s*(?:\]|\)|\\\})?",
        r"\\begin{pmatrix}\1\\end{pmatrix}",
        text,
        flags=re.DOTALL,
    )
    text = re.sub(r"\\hline", "", text)
    text = re.sub(
        r"[\[(]\s*(\\begin\{pmatrix\}(?:(?!\\begin).)*?\\end\{pmatrix\})\s*[\])]",
        r"\1",
        text,
        flags=re.DOTALL,
    )
    return re.sub(r"(?:\\\\\s*)+\\end\{pmatrix\}", r"\\end{pmatrix}", text)


def _plain_program(text: str) -> str:
    """Program spelling as LaTeX: powers, roots, functions."""
    if "**" in text:
        text = re.sub(r"(?<=[\w)}\]])\s*\*\*\s*(?=[\w({\\+-])", "^", text)
    if "pi" in text:
        text = re.sub(r"(?<![\\A-Za-z])pi(?![A-Za-z])", r"\\pi ", text)
    if "^" in text:
        text = re.sub(r"\^\s*(-?\d+(?:\.\d+)?)(?![\d.])", r"^{\1}", text)
        text = re.sub(r"\^\s*\(([^()]*)\)", r"^{\1}", text)
    if "(" in text:
        text = re.sub(r"(?<![\\A-Za-z])sqrt\s*\(([^()]*)\)", r"\\sqrt{\1}", text)
        text = re.sub(r"(?<![\\A-Za-z])abs\s*\(([^()]*)\)", r"|\1|", text)
        text = re.sub(r"(?<![\\A-Za-z])log\s*\(", r"\\ln(", text)
        text = re.sub(r"(?<![\\A-Za-z])log10\s*\(", r"\\log_{10}(", text)
    if _BARE_FUNCTION.search(text):
        spelled = _BARE_FUNCTION.sub(r"\\\1 ", text)
        if not re.search(r"(?<![\\A-Za-z])[A-Za-z]{5}", spelled):  # prose
            text = spelled
    return re.sub(r"\\exp\s*\(([^()]*)\)", r"e^{\1}", text) if r"\exp" in text else text


def _unwrap(text: str) -> str:
    """Remove dollar signs, boxes, bold and the like around the whole text, repeatedly."""
    while True:
        before = text
        text = text.strip()
        if not text.endswith("..."):
            text = re.sub(r"(?:(?<!\\)[.,;:])+$", "", text).strip()
        text = re.sub(r"(?:\\\\\s*)+$", "", text)
        for wrap in _WRAPS:
            if (match := wrap.fullmatch(text)) and balanced(match[1]):
                text = match[1]
        if text == before:
            return text
