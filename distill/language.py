r"""The share of a text that is in a given language: for R1's language reward, and a filter for mixed-language traces.

Words are runs of letters. Code, formulas, tags, URLs and e-mail addresses, single letters, symbols with digits, function
names and capitals such as ABC count as notation and belong to no language. Words in a script that the target language
does not use are never of the target language. Words in its script are classified by py3langid. That is unreliable for
single words, so words are classified in chunks of a few, and the most likely sequence of languages is found (Viterbi): a
change of language costs SWITCH nats, and the target language has an advantage of BENEFIT nats.
"""

from __future__ import annotations

import copy
import functools
import itertools
import re
import threading
import unicodedata
from typing import TYPE_CHECKING

import numpy as np
import regex

from distill.errors import UserError
from distill.plug import nearest

if TYPE_CHECKING:
    from distill.records import Array

CHUNK_WORDS = 4
"""Maximum words of a chunk."""
MIN_CHUNK_WORDS = 2
"""A shorter chunk is joined with the next one of its script."""
SWITCH = 2.0
"""Cost in nats of a change of language between two neighbouring chunks."""
BENEFIT = 1.5
"""Nats added to the target's score in every chunk."""
FLOOR = -6.0
"""Lower bound of a chunk's log-probabilities, so that no single chunk outweighs many others."""

# Alternatives to the target, of the 139 languages that py3langid knows: fewer candidates make fewer mistakes on short chunks.
_CANDIDATES = (
    "ar be bg ca cs da de el en es et fa fi fr he hi hr hu id it ja kk ko lt lv mk mr ne nl no pl pt ro ru "
    "sk sl sr sv th tr uk ur vi zh"
)
_SCRIPTS = {
    "ARABIC": "ar ary arz fa ps sdh ug ur",
    "ARMENIAN": "hy",
    "BENGALI": "as bn",
    "CJK": "ja wuu yue zh",
    "CYRILLIC": "ba be bg kk ky mk mn ru sr tg tt uk",
    "DEVANAGARI": "gom hi mr ne sa",
    "ETHIOPIC": "am",
    "GEORGIAN": "ka",
    "GREEK": "el grc",
    "GUJARATI": "gu",
    "GURMUKHI": "pa",
    "HANGUL": "ko",
    "HEBREW": "hbo he",
    "KANNADA": "kn",
    "KHMER": "km",
    "LAO": "lo",
    "MALAYALAM": "ml",
    "MYANMAR": "my",
    "ORIYA": "or",
    "SINHALA": "si",
    "TAMIL": "ta",
    "TELUGU": "te",
    "THAI": "th",
    "TIBETAN": "dz",
}
"""Script (Unicode name) -> languages written in it, Latin excepted. Serbian is written in Latin script too."""

_UNSPACED = {"CJK": 2, "THAI": 4, "LAO": 4, "KHMER": 4, "MYANMAR": 4, "TIBETAN": 4}
"""Approximate letters per word in scripts without spaces: a run of n letters counts as n / this many words."""

_NOTATION = re.compile(
    r"```.*?(?:```|\Z)|`[^`\n]*`"
    r"|\$\$.{0,2000}?\$\$|\\\[.{0,2000}?\\\]|\\\(.{0,2000}?\\\)|(?<!\\)\$(?! )[^$\n]{0,200}(?<![ \\])\$(?!\d)"
    r"|\\begin\{(\w+\*?)\}.{0,4000}?\\end\{\1\}|\\[A-Za-z]+"
    r"|</?[A-Za-z][\w-]*(?: +[\w-]+=\"[^\"<>]*\")* */?>"
    r"|(?:https?://|www\.)\S+|(?<![\w.+-])[\w.+-]++@[\w-]+\.[\w.]+",
    re.DOTALL,
)
_PIECES = regex.compile(
    r"(?P<stop>[.!?;:…。！？；：।؟\n]+)"
    r"|(?P<unspaced>[\p{Han}\p{Hiragana}\p{Katakana}ー々]++)"
    r"|(?P<spaced>(?<![\p{Latin}\p{Greek}\p{M}\p{N}_])[\p{Latin}\p{Greek}][\p{Latin}\p{Greek}\p{M}]*+"
    r"(?:['’-][\p{Latin}\p{Greek}][\p{Latin}\p{Greek}\p{M}]*+)*+(?![\p{N}_]))"
    r"|(?P<other>[[\p{L}--\p{Latin}--\p{Greek}--\p{Han}--\p{Hiragana}--\p{Katakana}]]"
    r"[[\p{L}\p{M}'’\u200c\u200d]--\p{Latin}--\p{Greek}--\p{Han}--\p{Hiragana}--\p{Katakana}]*+)",
    regex.V1,
)
_KANA = regex.compile(r"[\p{Hiragana}\p{Katakana}]")
_FUNCTION_NAMES = (
    "sin cos tan cot sec csc arcsin arccos arctan sinh cosh tanh log ln lg exp max min sup inf lim mod gcd lcm "
    "det dim deg"
)
_FUNCTIONS = frozenset(_FUNCTION_NAMES.split())


def language_share(text: str, target: str) -> float | None:
    """Share of the words of a text that are in the language `target` (ISO 639-1); None if the text has no words.

    The language consistency reward of DeepSeek-R1 (DeepSeek-AI 2025, section 2.3.2): words of the target language over
    all words. Raises UserError for a language that py3langid does not know.
    """
    scripts = scripts_of(target)
    if not text.isascii():
        text = unicodedata.normalize("NFKC", text)  # maps full-width letters to ordinary ones
    total, in_target = 0.0, 0.0
    chunks: list[tuple[str, float]] = []  # in the target's script, to be classified
    for script, words in _chunks(text):
        num = sum(_num_words(word, script) for word in words)
        total += num
        if script not in scripts:
            continue
        if _SCRIPTS.get(script) == target:
            in_target += num  # no other language uses this script
        else:
            chunks.append((("" if script == "CJK" else " ").join(words), num))
    if not total:
        return None
    is_target = _most_likely([chunk for chunk, _ in chunks], target)
    in_target += sum(num for (_, num), yes in zip(chunks, is_target, strict=True) if yes)
    return in_target / total


@functools.cache
def scripts_of(language: str) -> frozenset[str]:
    """The scripts of a language, by their Unicode names. Raises UserError for an unknown language."""
    known = _identifier(None).labels
    if language not in known:
        raise UserError(
            f"language {language!r} is not known: give its ISO 639-1 code, such as en or zh.{nearest(language, known)}"
        )
    found = {script for script, languages in _SCRIPTS.items() if language in languages.split()}
    return frozenset(found | {"LATIN"} if language == "sr" or not found else found)


# ----------------------------------------------------------------------------------------------- words


def _chunks(text: str) -> list[tuple[str, list[str]]]:
    """(script, words) chunks of a text in order; each of one script and, unless it would be too short, one sentence."""
    chunks: list[tuple[str, list[str]]] = []
    for script, words in _sentences(_NOTATION.sub(" ", text)):
        if chunks and chunks[-1][0] == script and len(chunks[-1][1]) < MIN_CHUNK_WORDS:
            words = chunks.pop()[1] + words
        num = -(-len(words) // CHUNK_WORDS)
        bounds = [len(words) * n // num for n in range(num + 1)]
        chunks.extend((script, words[a:b]) for a, b in itertools.pairwise(bounds))
    return chunks


def _sentences(text: str) -> list[tuple[str, list[str]]]:
    """(script, words) for each run of words of one script within a sentence."""
    runs: list[tuple[str, list[str]]] = []
    open_script = ""
    for piece in _PIECES.finditer(text):
        word, kind = piece[0], piece.lastgroup
        if kind == "stop":
            open_script = ""
            continue
        script = "CJK" if kind == "unspaced" else _script(word[0])
        if not script or (kind == "spaced" and _is_symbol(word)):
            continue
        if script != open_script:
            runs.append((script, []))
            open_script = script
        runs[-1][1].append(word)
    return runs


@functools.lru_cache(maxsize=4096)
def _script(letter: str) -> str:
    """The script of a letter: LATIN, CYRILLIC, ...; "" for letters used only in formulas."""
    name = unicodedata.name(letter, "").split(" ")[0]
    return name if name == "LATIN" or name in _SCRIPTS else ""


def _is_symbol(word: str) -> bool:
    return len(word) == 1 or (len(word) <= 3 and word.isupper()) or (len(word) <= 6 and word in _FUNCTIONS)


def _num_words(word: str, script: str) -> float:
    return max(1.0, len(word) / _UNSPACED[script]) if script in _UNSPACED else 1.0


# ------------------------------------------------------------------------------------------- languages


def _most_likely(chunks: list[str], target: str) -> list[bool]:
    """Whether each chunk is in the target language, by the most likely sequence of languages (Viterbi)."""
    if not chunks:
        return []
    score_NL = np.stack([_scores(chunk, target) for chunk in chunks])
    if (score_NL.argmax(1) == 0).all():
        return [True] * len(chunks)
    best_L = score_NL[0]
    previous_NL = np.zeros(score_NL.shape, np.int64)
    stay_L = np.arange(len(best_L))
    for n in range(1, len(chunks)):
        leader = int(best_L.argmax())
        switched = best_L[leader] - SWITCH
        previous_NL[n] = np.where(best_L >= switched, stay_L, leader)
        best_L = np.maximum(best_L, switched) + score_NL[n]
    path = [int(best_L.argmax())]
    for n in range(len(chunks) - 1, 0, -1):
        path.append(int(previous_NL[n, path[-1]]))
    return [language == 0 for language in reversed(path)]


@functools.lru_cache(maxsize=65536)
def _scores(chunk: str, target: str) -> Array:
    """Log-probabilities [L] of the languages in `_order`, at least FLOOR; the target's with BENEFIT added."""
    order = _order(target)
    if _KANA.search(chunk) and "ja" in order:
        score_L = np.full(len(order), FLOOR)
        score_L[order.index("ja")] = 0.0
    else:
        found = dict(_identifier(target).rank(chunk))
        probs_L = np.array([found[language] for language in order], dtype=np.float64)
        score_L = np.maximum(np.log(np.maximum(probs_L, 1e-30)), FLOOR)
    score_L[0] += BENEFIT
    return score_L


@functools.cache
def _order(target: str) -> list[str]:
    """The languages that a chunk may be in, the target first."""
    return [target, *(other for other in _CANDIDATES.split() if other != target)]


_loading = threading.Lock()


def _identifier(target: str | None) -> _Identifier:
    with _loading:
        return _load(target)


@functools.cache
def _load(target: str | None) -> _Identifier:
    """py3langid for all languages (None), or for a target and its alternatives; all share the model's large tables."""
    from py3langid.langid import MODEL_FILE, LanguageIdentifier

    if target is None:
        return LanguageIdentifier.from_model_file(MODEL_FILE, norm_probs=True)
    identifier = copy.copy(_load(None))
    identifier.set_languages(_order(target))
    return identifier


if TYPE_CHECKING:
    from py3langid.langid import LanguageIdentifier as _Identifier
