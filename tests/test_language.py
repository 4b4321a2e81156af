"""Language shares, against sentences whose words were counted by hand."""

import pytest

from distill.errors import UserError
from distill.language import language_share


@pytest.mark.parametrize(
    ("target", "text"),
    [
        ("en", "First we add the two numbers, then we divide the sum by three."),
        ("en", "Okay. Hmm, wait. So n equals 5."),
        ("en", "Yes"),
        ("en", "carry 1, write 2"),
        ("en", "Maria, José and Günther share 12 apples between Düsseldorf and Zürich."),
        ("en", "area, perimeter, radius, diameter, circumference"),
        ("en", "THE ANSWER IS FORTY TWO"),
        ("en", "It costs $5 for Tom and $6 for Anna, in total eleven dollars."),
        ("zh", "首先我们把两个数字相加，然后除以三。"),
        ("zh", "在三角形 ABC 中，AB = AC，所以角 B 等于角 C，sin 的值是 0.5。"),
        ("ja", "計算結果：十二。まず二つの数を足します。次に三で割ります。"),
        ("ko", "먼저 두 수를 더한 다음 3으로 나눕니다."),
        ("ru", "Сначала сложим два числа, затем разделим на три."),
        ("uk", "Спочатку додамо два числа, потім поділимо на три."),
        ("ar", "في البداية نجمع العددين ثم نقسم على ثلاثة"),
        ("hi", "हम पहले दोनों संख्याओं को जोड़ते हैं"),
        ("th", "ก่อนอื่นเราบวกตัวเลขสองตัว"),
        ("el", "Πρώτα προσθέτουμε τους δύο αριθμούς"),
        ("de", "Zuerst addieren wir die beiden Zahlen, dann teilen wir durch drei."),
        ("fr", "D'abord on additionne les deux nombres, ensuite on divise par trois."),
        ("es", "Primero sumamos los dos números y luego dividimos entre tres."),
    ],
)
def test_a_text_in_the_target_language_has_share_one(target, text):
    assert language_share(text, target) == 1.0


@pytest.mark.parametrize(
    ("target", "text"),
    [
        ("en", "首先我们把两个数字相加，然后除以三。"),
        ("en", "Zuerst addieren wir die beiden Zahlen, dann teilen wir durch drei."),
        ("en", "Premièrement nous additionnons les deux nombres, puis nous divisons par trois."),
        ("en", "Сначала сложим два числа."),
        ("zh", "まず二つの数を足します。次に三で割ります。"),
        ("ru", "Спочатку додамо два числа, потім поділимо на три."),
        ("ar", "ابتدا دو عدد را جمع می‌کنیم و سپس بر سه تقسیم می‌کنیم"),
        ("de", "First we add the two numbers, then we divide the sum by three."),
    ],
)
def test_a_text_in_another_language_has_share_zero(target, text):
    assert language_share(text, target) == 0.0


@pytest.mark.parametrize(
    ("text", "num_english", "num_others"),
    [
        # Two Chinese characters count as a word: 9 of them are 4.5 words.
        ("First we add the two numbers. 然后除以三得到答案。 So the answer is four.", 11, 4.5),
        (
            "First we add the two numbers. Dann teilen wir die Summe durch drei. So the answer is four.",
            11,
            7,
        ),
        (
            "Let me look at the remainder of this division.\n"
            "Attends, il faut vérifier encore une fois le résultat.\n"
            "Now the remainder is two, so we are done here.",
            19,
            9,
        ),
        (
            "We need the total. Es decir, tenemos que encontrar el resto de la división. Then stop.",
            6,
            10,
        ),
        ("The sum is twelve, значит ответ двенадцать, and we are done.", 8, 3),
    ],
)
def test_the_share_of_a_mixed_text(text, num_english, num_others):
    expected = num_english / (num_english + num_others)
    assert language_share(text, "en") == pytest.approx(expected, abs=0.11)


def test_a_change_of_language_within_a_sentence_counts():
    share = language_share("First we add die beiden Zahlen zusammen und then divide by three", "en")
    assert 0.4 < share < 0.8


@pytest.mark.parametrize(
    "text",
    [
        "",
        " \n",
        "12 + 30 = 42",
        "x = 5, y_1 = 2n + 3rd",
        "$$ the $$ \\(so\\) \\frac{1}{2} \\sqrt{x}",
        "```python\nprint('hello world')\n```",
        "```\nunclosed code for ever",
        "<think></think><answer>42</answer>",
        "https://example.com/the/answer",
        "sin(x) + cos(y), gcd(12, 8), ABC",
    ],
)
def test_a_text_without_words_has_no_share(text):
    assert language_share(text, "en") is None


def test_notation_does_not_count():
    prose = "So we can divide both sides by four and then subtract. 因此答案是三。"
    notation = (
        "`das ist code` $die Summe$ \\[ \\text{und die Summe} \\] https://beispiel.de/das-ist-deutsch "
        "```\nfür jede zahl in der liste\n``` <ergebnis> \\begin{align} die summe ist \\end{align} ABC sin 3 "
    )
    assert language_share(notation + prose, "en") == language_share(prose, "en")


def test_dollar_amounts_are_not_formulas():
    text = "It costs $5 und das ist aber wirklich sehr teuer für uns alle and $6 more."
    assert language_share(text, "en") < 0.5


def test_an_unknown_language_is_an_error():
    with pytest.raises(UserError, match=r"'english' is not known.*ISO 639-1"):
        language_share("word", "english")


def test_the_share_does_not_depend_on_earlier_texts():
    texts = ["Also gut", "so n equals", "Wait, let me double check", "la suma es", "и"]
    forth = [language_share(text, "en") for text in texts]
    back = [language_share(text, "en") for text in reversed(texts)]
    assert forth == back[::-1]
