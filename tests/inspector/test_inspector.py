"""The trace page: numbers by hand, the packed data, and the page in a real browser."""

from __future__ import annotations

import base64
import json
import math
import re
import struct
import zlib
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from distill.inspector import sections, token_text, top_tokens, trace_page
from distill.inspector.trace_page import Page, Row
from distill.records import Completion, TopK

HOSTILE = (
    "<script>document.title='owned'</script><img src=x onerror=\"document.title='owned'\"></script>"
    " \"quotes' \x00\x1b[31m \u202eturned\u202c \ud800 שלום " + "w" * 4000
)
PIECES = [b"<think>", b"</think>", b" the", b"\xf0\x9f", b"\x98\x80", b"!", b"\n", b"<|im_end|>"]
PIECES += [HOSTILE.encode("utf-8", "surrogatepass"), b"</script><b>", b"\x00", b"seven"]
END = 7


def bytes_of(ids: Any) -> list[bytes]:
    return [PIECES[i] if i < len(PIECES) else f" w{i}".encode() for i in ids]


def top(*positions: dict[int, float]) -> TopK:
    """A TopK from probabilities by id at each position; the tail is 1 minus their sum."""
    width = max(len(one) for one in positions)
    ids = np.full((len(positions), width), -1)
    logp = np.full((len(positions), width), -np.inf)
    for t, one in enumerate(positions):
        ids[t, : len(one)], logp[t, : len(one)] = list(one), np.log(list(one.values()))
    return TopK.from_dense(ids, logp)


def row(n: int, ids: list[int], distribution: TopK | None, **changes: Any) -> Row:
    made = Row(
        trace_id=f"trace{n}", problem_id=f"problem{n}", sample=0,
        messages=[{"role": "user", "content": f"question {n}"}], prompt_ids=np.array([2, 20 + n]),
        ids_T=np.array(ids), logprob_T=np.linspace(-0.1, -3.0, len(ids)).astype(np.float32),
        top=distribution, answer="7", gold="7", correct=True, finish_reason="stop", rewards={"accuracy": 1.0},
    )  # fmt: skip
    return replace(made, **changes)


def unpack(html: str) -> tuple[dict[str, Any], dict[str, np.ndarray]]:
    """Decode a page's data, as its script does."""
    packed = re.search(r'id="data">([^<]*)<', html)
    assert packed is not None
    data = zlib.decompress(base64.b64decode(packed[1]), 31)
    (length,) = struct.unpack("<I", data[:4])
    header = json.loads(data[4 : 4 + length])
    arrays, offset = {}, 4 + length
    for name, (planes, count) in header["arrays"].items():
        raw = np.frombuffer(data, np.uint8, planes * count, offset).reshape(planes, count)
        arrays[name] = (raw.astype(np.int64) << 8 * np.arange(planes)[:, None]).sum(0)
        offset += planes * count
    assert offset == len(data)
    return header, arrays


def many(num: int, length: int, width: int = 16, student: bool = True) -> list[Row]:
    rng = np.random.default_rng(0)
    found = []
    for n in range(num):
        ids = rng.integers(12, 4000, length)
        cand = np.stack([rng.permutation(4000)[:width] + 12 for _ in range(length)])
        logp = np.sort(rng.gumbel(size=(length, width)) * 2, 1)[:, ::-1]
        logp = logp - np.logaddexp.reduce(logp, 1, keepdims=True) - 0.02
        second = logp + rng.normal(0, 0.4, logp.shape)
        second -= np.logaddexp.reduce(second, 1, keepdims=True) + 0.05
        scored = Completion(f"trace{n}", ids, -rng.exponential(size=length).astype(np.float32),
                            TopK.from_dense(cand, second), "stop")  # fmt: skip
        found.append(
            row(n, ids.tolist(), TopK.from_dense(cand, logp), student=scored if student else None,
                correct=[True, False, None][n % 3], finish_reason="length" if n % 4 == 3 else "stop")
        )  # fmt: skip
    return found


# ------------------------------------------------------------------------------------------------ tokens


@pytest.mark.parametrize(
    ("piece", "byte_level", "expected"),
    [
        ("Ġthe", True, b" the"),
        ("Ċ", True, b"\n"),
        ("ðŁ", True, b"\xf0\x9f"),
        ("▁the", False, b" the"),
        ("<0x0A>", False, b"\n"),
        ("<|im_end|>", True, b"<|im_end|>"),
        ("<｜begin▁of▁sentence｜>", True, "<｜begin▁of▁sentence｜>".encode()),
        (None, True, b""),
    ],
)
def test_pieces_as_bytes(piece: str | None, byte_level: bool, expected: bytes) -> None:
    added = {"<|im_end|>", "<｜begin▁of▁sentence｜>"}
    assert token_text.piece_bytes([piece], byte_level, added) == [expected]


def test_pieces_of_a_real_tokenizer_give_its_text(tokenizer: Any) -> None:
    text = "Zürich 😀 𝔘 中文 \t\n x=½"
    ids = tokenizer(text, add_special_tokens=False).input_ids
    pieces = token_text.piece_bytes(tokenizer.convert_ids_to_tokens(ids), True)
    assert b"".join(pieces).decode() == text


def test_partial_characters_are_shown_as_bytes_and_completed() -> None:
    assert token_text.shown(b"a\xf0\x9f") == "a‹F0 9F›"
    assert token_text.shown(b"\x98\x80z\xff") == "‹98 80›z‹FF›"
    assert token_text.shown(b"\x00\x1b[1m\n") == "‹U+0000›‹U+001B›[1m\n"
    assert token_text.visible("a\u202eb\ud800") == "a‹U+202E›b‹U+D800›"
    smile = [b"x", b"\xf0\x9f", b"\x98", b"\x80!", b"y"]
    assert token_text.completed(smile) == {3: "😀!"}
    assert token_text.completed([b"\xf0\x9f", b"x", b"\x98\x80"]) == {}
    assert token_text.completed([b"\xf0\x9f", b"\xf0\x9f", b"\x98\x80"]) == {2: "😀"}
    assert token_text.completed([b"\xc3", b"\xa9\xc3", b"\xa9"]) == {1: "é‹C3›", 2: "é"}


@pytest.mark.parametrize(
    ("prompt", "spelled", "expected"),
    [
        (b"", [b"<think>", b"a", b"</", b"think", b">", b"7"], (5, None)),
        (b"", [b"a", b"</think>7", b"b"], (2, 8)),  # opened by the prompt
        (b"", [b"<think>", b"a", b"</", b"think", b"><", b"answer", b">"], (5, 1)),
        (b"", [b"<think>a</think>b</think>", b"7"], (1, None)),  # judges read what follows the last
        (b"...<think>\n", [b"a", b"b"], (2, None)),  # opened by the prompt, never closed
        (b"", [b"<think>", b"a"], (2, None)),
        (b"<think> in the question", [b"7"], (0, None)),
        (b"", [b"say <think>", b"7"], (0, None)),
        (b"", [], (0, None)),
        (b"", [b"[TH", b"INK]", b"a", b"[/TH", b"INK]", b"7"], (5, None)),
        (b"", [b"<seed:think>", b"a", b"</seed:think>", b"7"], (3, None)),
        ("◁think▷".encode(), [b"a", "◁/think▷é".encode()], (2, 8)),
        (b"", [b"<|channel|>analysis<|message|>", b"a", b"<|end|>", b"<|start|>assistant",
               b"<|channel|>analysis<|message|>", b"b", b"<|end|>", b"<|start|>", b"7<|end|>"], (7, None)),
        (b"", [b"7", b"<|end|>"], (0, None)),  # other families end their turns with it
    ],
)  # fmt: skip
def test_where_thinking_ends(prompt: bytes, spelled: list[bytes], expected: tuple[int, int | None]) -> None:
    assert sections.thinking(prompt, spelled) == expected


# ----------------------------------------------------------------------------------------------- numbers


def test_entropy_by_hand() -> None:
    two = top_tokens.entropy(top({3: 0.5, 4: 0.5}, {3: 0.5, 4: 0.25}, {3: 1.0}))
    assert two == pytest.approx([math.log(2), 1.5 * math.log(2), 0.0], abs=1e-6)


def test_kl_and_candidates_by_hand() -> None:
    """Stored by both: 3 and 4; 5 is the teacher's only, 6 the student's only, so they are in the rest of both."""
    teacher = top({3: 0.6, 4: 0.2, 5: 0.1})
    student = top({6: 0.5, 3: 0.3, 4: 0.1})
    found = top_tokens.match(teacher, student)
    by_hand = 0.6 * math.log(2) + 0.2 * math.log(2) + 0.2 * math.log(0.2 / 0.6)
    assert found.kl_T == pytest.approx([by_hand], abs=1e-6)
    shown = found.candidates(8)
    assert shown.ids_E.tolist() == [3, 4, 5, 6]
    assert np.exp(shown.teacher_E) == pytest.approx([0.6, 0.2, 0.1, np.nan], nan_ok=True)
    assert np.exp(shown.student_E) == pytest.approx([0.3, 0.1, np.nan, 0.5], nan_ok=True)
    assert np.exp(shown.teacher_rest_T) == pytest.approx([0.1], abs=1e-6)
    assert np.exp(shown.student_rest_T) == pytest.approx([0.1], abs=1e-6)
    # With one of the teacher's candidates, the student's three bring 4 back, with both numbers.
    narrow = found.candidates(1)
    assert narrow.ids_E.tolist() == [3, 6, 4]
    assert np.exp(narrow.teacher_E) == pytest.approx([0.6, np.nan, 0.2], nan_ok=True)
    assert np.exp(narrow.teacher_rest_T) == pytest.approx([0.2], abs=1e-6)


def test_kl_is_a_lower_bound_and_zero_for_the_teacher_itself() -> None:
    rng = np.random.default_rng(3)
    p, q = rng.dirichlet(np.full(50, 0.3), 40), rng.dirichlet(np.full(50, 0.3), 40)
    ids = np.tile(np.arange(50), (40, 1))
    full = TopK.from_dense(ids, np.log(p))
    other = TopK.from_dense(ids, np.log(q))
    exact = (p * np.log(p / q)).sum(1)
    whole = top_tokens.match(full, other).kl_T
    assert whole == pytest.approx(exact, rel=1e-4, abs=1e-4)
    cut = top_tokens.match(full.truncate(mass=0.9), other.truncate(top_k=40)).kl_T
    assert (cut <= exact + 1e-4).all()
    assert cut.mean() > 0.3 * exact.mean()
    assert top_tokens.match(full.truncate(mass=0.9), full).kl_T == pytest.approx(0, abs=1e-5)


def test_ids_are_matched_within_their_own_position() -> None:
    teacher, student = top({3: 0.9}, {4: 0.8}), top({4: 0.7}, {3: 0.6})
    found = top_tokens.match(teacher, student).candidates(8)
    assert found.ids_E.tolist() == [3, 4, 4, 3]
    assert np.isnan(found.student_E[0])
    assert np.isnan(found.teacher_E[1])


# -------------------------------------------------------------------------------------------- what it carries


def test_packed_data_decodes_to_the_input() -> None:
    teacher = top({2: 0.5, 11: 0.25}, {11: 0.9}, {END: 0.99})
    html = trace_page.render([row(0, [2, 11, END], teacher)], bytes_of, frozenset([END]), Page("t"))
    header, arrays = unpack(html)
    table = header["table"]
    assert [table[i] for i in arrays["ids"]] == [" the", "seven", "<|im_end|>"]
    assert [table[i] for i in arrays["cand_ids"]] == [" the", "seven", "seven", "<|im_end|>"]
    assert np.exp(-arrays["cand_teacher"] / 1000) == pytest.approx([0.5, 0.25, 0.9, 0.99], abs=5e-4)
    assert np.exp(-arrays["rest"] / 1000) == pytest.approx([0.25, 0.1, 0.01], abs=5e-4)
    assert arrays["nll"].tolist() == [100, 1550, 3000]
    assert [header["table_ids"][i] for i in header["special"]] == [END]
    assert "kl" not in arrays


def test_traces_without_distributions() -> None:
    header, arrays = unpack(trace_page.render([row(0, [2, END], None)], bytes_of, frozenset(), Page("t")))
    assert set(arrays) == {"ids", "nll"}
    assert header["traces"][0]["tokens"] == 2


def test_a_page_keeps_its_size_limit_and_says_what_it_left_out() -> None:
    rows = many(30, 100, student=False)
    whole = trace_page.render(rows, bytes_of, frozenset(), Page("t"))
    assert unpack(whole)[0]["width"] == 8
    limit = len(whole) * 3 // 4
    narrower = trace_page.render(rows, bytes_of, frozenset(), Page("t"), limit)
    assert len(narrower.encode()) <= limit
    assert unpack(narrower)[0]["width"] < 8
    assert len(unpack(narrower)[0]["traces"]) == 30
    limit = len(whole) // 3
    fewer = trace_page.render(rows, bytes_of, frozenset(), Page("t"), limit)
    num = len(unpack(fewer)[0]["traces"])
    assert len(fewer.encode()) <= limit
    assert 0 < num < 30
    assert f"{30 - num} more traces of the sample are left out" in fewer


def test_untrusted_text_appears_only_in_the_packed_data() -> None:
    hostile = row(0, [8, 9, 10], None, trace_id="trace0", answer=HOSTILE,
                  messages=[{"role": "user", "content": HOSTILE}])  # fmt: skip
    html = trace_page.render([hostile], bytes_of, frozenset(), Page(HOSTILE, [(HOSTILE, HOSTILE)]))
    assert html.count("<script") == 2
    assert "<img" not in html
    assert "owned'&lt;/" not in html
    assert "\x00" not in html
    assert "\u202e" not in html
    assert "script-src 'sha256-" in html


# ----------------------------------------------------------------------------------------- in the browser


@pytest.fixture(scope="module")
def page_of(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    def write(rows: list[Row], **page: Any) -> Path:
        html = trace_page.render(rows, bytes_of, frozenset([END]), Page("run / traces", **page))
        path = tmp_path_factory.mktemp("page") / "inspect.html"
        path.write_text(html, encoding="utf-8")
        return path

    return write


def ready(page: Any) -> Any:
    page.wait_for_selector("html[data-ready]")
    return page


def texts(page: Any, selector: str) -> list[str]:
    return page.locator(selector).all_inner_texts()


def test_hover_and_keys(page_of: Callable[..., Path], visit: Callable[..., Any]) -> None:
    teacher = top({0: 0.9}, {2: 0.5, 11: 0.25}, {1: 0.9}, {11: 0.7}, {END: 0.99})
    rows = [
        row(0, [0, 11, 1, 11, END], teacher),
        row(1, [2, 3, 4, 5], top({2: 0.5}, {3: 0.9}, {4: 1.0}, {5: 0.3}), correct=False),
        row(2, [2, 2], top({2: 0.5}, {2: 0.5}), correct=None, finish_reason="length"),
    ]  # fmt: skip
    page = ready(visit(page_of(rows)))
    assert [" ".join(text.split()) for text in texts(page, "main h3")] == [
        "PROMPT", "THINKING 3 tokens", "ANSWER 2 tokens", "VERDICT",
    ]  # fmt: skip
    page.hover(".tokens span >> nth=1")
    assert page.inner_text("#detail .token") == "seven"
    assert texts(page, "#detail tbody td:first-child") == ["·the", "▸seven", "all others"]
    assert [text.strip() for text in texts(page, "#detail tbody td:nth-child(2)")] == [
        "50.0%", "25.0%", "25.0%",
    ]  # fmt: skip
    page.mouse.move(5, 5)
    page.keyboard.press("j")
    assert page.evaluate("location.hash") == "#trace1"
    assert page.evaluate("[...document.querySelectorAll('.tokens span')].map(s => s.textContent)") == [
        " the", "‹F0 9F›", "😀", "!",
    ]  # fmt: skip
    for _ in range(3):
        page.keyboard.press("ArrowRight")
    assert page.evaluate("location.hash") == "#trace1.2"
    assert page.evaluate("document.activeElement.textContent") == "😀"
    assert page.inner_text("#detail .where").startswith("token 3 of 4")
    page.keyboard.press("ArrowLeft")
    assert page.evaluate("document.activeElement.textContent") == "‹F0 9F›"
    page.keyboard.press(".")  # the next lower NLL: they rise along the trace
    assert page.evaluate("location.hash") == "#trace1.0"
    page.keyboard.press(",")
    page.keyboard.press(",")
    assert page.evaluate("location.hash") == "#trace1.2"
    page.keyboard.press("2")
    assert page.is_checked("input[name=shade][value=entropy]")
    page.keyboard.press("Escape")
    assert page.evaluate("location.hash") == "#trace1"
    page.keyboard.press("k")
    assert page.evaluate("location.hash") == "#trace0"


CLOSE = 40


def cut_bytes(ids: Any) -> list[bytes]:
    """As `bytes_of`, with the closing tag of a real tokenizer: its last piece also begins the answer's tag."""
    own = {CLOSE: b"</", CLOSE + 1: b"think", CLOSE + 2: b"><", CLOSE + 3: b"answer", CLOSE + 4: b">"}
    return [own.get(i, *bytes_of([i])) for i in ids]


def test_a_tag_of_several_tokens_is_whole_on_either_side(tmp_path: Path, visit: Callable[..., Any]) -> None:
    ids = [0, 11, CLOSE, CLOSE + 1, CLOSE + 2, CLOSE + 3, CLOSE + 4, 11, END]
    teacher = top(*({i: 0.5} for i in ids))
    path = tmp_path / "inspect.html"
    path.write_text(trace_page.render([row(0, ids, teacher)], cut_bytes, frozenset([END]), Page("a")), encoding="utf-8")
    page = ready(visit(path))
    joined = "[...document.querySelectorAll('.tokens')].map(e => [...e.children].map(s => s.textContent).join(''))"
    assert page.evaluate(joined) == ["<think>seven</think>", "<answer>seven<|im_end|>"]
    page.click(".tokens span[data-n='4'] >> nth=1")
    assert page.inner_text("#detail .token") == "><"
    assert page.evaluate("[...document.querySelectorAll('.tokens .at')].map(s => s.textContent)") == [">", "<"]
    page.keyboard.press("ArrowRight")
    assert page.evaluate("location.hash") == "#trace0.5"
    assert page.evaluate("document.activeElement.textContent") == "answer"
    page.fill("#search", "think><ans")
    assert page.evaluate("[...document.querySelectorAll('.tokens .hit')].map(s => s.textContent)") == [
        "think", ">", "<", "answer",
    ]  # fmt: skip


def test_keys_belong_to_the_control_they_are_pressed_in(
    page_of: Callable[..., Path], visit: Callable[..., Any]
) -> None:
    page = ready(visit(page_of(many(8, 20, student=False)), hash="#trace0.3"))
    where = "location.hash"
    page.click("#search")
    page.keyboard.type("j.12k")
    for key in ("ArrowLeft", "ArrowRight", "ArrowDown"):
        page.keyboard.press(key)
    assert page.evaluate(where) == "#trace0.3"
    assert page.input_value("#search") == "j.12k"
    page.fill("#search", "")
    page.focus("#sort")
    page.keyboard.press("ArrowDown")
    page.keyboard.press("ArrowRight")
    assert page.evaluate(where) == "#trace0.3"
    assert page.input_value("#sort") != "stored"
    assert page.evaluate("document.activeElement.id") == "sort"
    page.select_option("#sort", "stored")
    page.focus("input[name=filter]:checked")
    page.keyboard.press("ArrowRight")
    assert page.is_checked("input[name=filter][value=right]")
    assert page.evaluate(where) == "#trace0.3"
    # Used with the pointer, a filter gives the keys back to the page.
    page.click("#filter label >> nth=0")
    page.keyboard.press("ArrowRight")
    assert page.is_checked("input[name=filter][value=all]")
    assert page.evaluate(where) == "#trace0.4"


def test_the_page_opens_with_a_trace_that_is_shaded(page_of: Callable[..., Path], visit: Callable[..., Any]) -> None:
    sure = {"logprob_T": np.zeros(3, np.float32)}
    rows = [row(n, [2, 2, 2], top({2: 1.0}, {2: 1.0}, {2: 1.0}), **sure) for n in range(3)]
    rows.insert(2, row(7, [2, 3, 4], top({2: 0.5}, {3: 0.5}, {4: 0.5}), logprob_T=np.log([0.5, 0.01, 0.5])))
    page = ready(visit(page_of(rows)))
    assert page.evaluate("location.hash") == "#trace7"
    assert page.locator("#list button[aria-current=true]").inner_text().count("question 7") == 1
    assert page.locator(".tokens [class*=h]").count() == 3
    flat = [row(0, [2, 2], top({2: 0.5}, {2: 0.5}), logprob_T=np.zeros(2, np.float32))]
    page = ready(visit(page_of(flat)))  # the sampled tokens were certain: the entropy is what there is to see
    assert page.is_checked("input[name=shade][value=entropy]")
    assert page.locator(".tokens [class*=h]").count() == 2


@pytest.mark.parametrize("width", [1280, 390])
def test_no_control_is_clipped(page_of: Callable[..., Path], visit: Callable[..., Any], width: int) -> None:
    page = ready(visit(page_of(many(8, 20)), width=width))
    clipped = """[...document.querySelectorAll('select, button, label, legend + label, h1, h2, .facts span')]
        .filter(e => e.offsetParent && (e.scrollWidth > e.clientWidth + 1 && getComputedStyle(e).overflowX !== 'visible'
            || e.getBoundingClientRect().right > innerWidth + 1)).map(e => e.textContent)"""
    assert page.evaluate(clipped) == []
    # A select shows its whole choice: it is as wide as its widest option wants.
    wide = "(() => { const s = document.getElementById('sort'), c = s.cloneNode(true); c.style.width = 'auto'; c.style.position = 'absolute';"
    assert page.evaluate(wide + " s.after(c); const w = c.offsetWidth; c.remove(); return s.offsetWidth >= w; })()")


def test_printed_it_is_black_on_white_and_whole(page_of: Callable[..., Path], visit: Callable[..., Any]) -> None:
    page = ready(visit(page_of(many(2, 400)), scheme="dark"))
    page.emulate_media(media="print", color_scheme="dark")
    assert page.evaluate("getComputedStyle(document.body).backgroundColor") == "rgb(255, 255, 255)"
    assert page.evaluate("getComputedStyle(document.querySelector('.tokens span')).printColorAdjust") == "exact"
    assert page.evaluate("(e => e.scrollHeight <= e.clientHeight + 1)(document.getElementById('trace'))")
    assert not page.is_visible("nav")
    assert not page.is_visible(".steps")


def test_filter_search_and_deep_link(page_of: Callable[..., Path], visit: Callable[..., Any]) -> None:
    path = page_of(many(12, 20, student=False))
    page = ready(visit(path, hash="#trace5.3"))
    assert page.inner_text("#detail .where").startswith("token 4 of 20")
    assert page.locator("#list button[aria-current=true]").inner_text().count("question 5") == 1
    assert texts(page, "#filter i") == ["12", "4", "4", "3"]
    page.check("input[name=filter][value=wrong]", force=True)
    assert [t.split("\n")[0] for t in texts(page, "#list .what")] == [
        "question 1", "question 4", "question 7", "question 10",
    ]  # fmt: skip
    page.keyboard.press("/")
    page.keyboard.type("question 10")
    assert texts(page, "#list .what") == ["question 10"]
    page.keyboard.press("Escape")
    word = page.evaluate("document.querySelector('.tokens span').textContent")
    page.check("input[name=filter][value=all]", force=True)
    page.fill("#search", word)
    assert page.locator(".tokens .hit").count() >= 1
    page.fill("#search", "nowhere at all")
    assert page.is_visible("#none")
    page.goto(path.as_uri() + "#trace2")
    assert "question 2" in page.inner_text("main")


def test_the_students_numbers_and_sorting_by_kl(page_of: Callable[..., Path], visit: Callable[..., Any]) -> None:
    same = top({2: 0.5, 11: 0.25}, {11: 0.9})
    far = top({5: 0.9, 2: 0.02}, {11: 0.9})
    scored = [Completion(f"trace{n}", np.array([2, 11]), np.log([0.5, 0.9]).astype(np.float32), t, "stop")
              for n, t in enumerate((same, far))]  # fmt: skip
    rows = [row(n, [2, 11], same, student=one) for n, one in enumerate(scored)]
    page = ready(visit(page_of(rows, student="kl")))
    assert page.input_value("#sort") == "kl"
    assert texts(page, "#list .what") == ["question 1", "question 0"]
    page.keyboard.press(".")
    assert page.evaluate("location.hash") == "#trace1.0"
    assert texts(page, "#detail thead th") == ["token", "teacher", "student"]
    rows_shown = page.evaluate(
        "[...document.querySelectorAll('#detail tbody tr')].map(r => [...r.cells].map(c => c.textContent))"
    )
    assert rows_shown == [
        ["▸·the", "50.0%", "2.00%"], ["seven", "25.0%", "–"], ["!", "–", "90.0%"],
        ["all others", "25.0%", "8.00%"],
    ]  # fmt: skip
    page.check("input[name=tab][value=tokens]", force=True)
    page.click("#list button >> nth=0")
    assert page.evaluate("location.hash") == "#trace1.0"


@pytest.mark.parametrize(("width", "scheme"), [(1280, "light"), (390, "dark")])
def test_hostile_text_stays_text(
    page_of: Callable[..., Path], visit: Callable[..., Any], width: int, scheme: str
) -> None:
    hostile = row(0, [8, 9, 10, END], top({8: 0.5, 9: 0.4}, {9: 0.9}, {10: 0.9}, {END: 0.9}),
                  answer=HOSTILE, gold=HOSTILE, messages=[{"role": "user", "content": HOSTILE}])  # fmt: skip
    page = ready(visit(page_of([hostile], facts=[("by", HOSTILE)]), width, scheme))
    page.click(".tokens span >> nth=1")
    assert page.title() == "run / traces – traces"
    assert page.locator("img").count() == 0
    assert page.locator("main b").count() == 0
    assert "<script>document.title='owned'</script>" in page.inner_text("main")
    assert page.inner_text("#detail .token") == "</script><b>"
    assert "‹U+202E›turned" in page.inner_text("main")
    assert "‹U+0000›" in page.inner_text("main")
    assert page.evaluate("document.documentElement.scrollWidth - innerWidth") <= 0


def test_two_hundred_traces_of_500_tokens(page_of: Callable[..., Path], visit: Callable[..., Any]) -> None:
    """Size and speed of a large page: changing the trace takes well under a tenth of a second."""
    path = page_of(many(200, 500, width=8), student="kl")
    assert path.stat().st_size < 5_000_000
    page = ready(visit(path))
    assert page.locator("#list button").count() == 200
    took, known = page.evaluate(
        """async () => {
          const took = [], known = [];
          for (let i = 0; i < 21; i++) {
            const started = performance.now();
            let sum = 0;
            for (let n = 0; n < 4e6; n++) sum += Math.sqrt(n);
            known.push(sum > 0 ? performance.now() - started : 0);
            const began = performance.now();
            document.body.dispatchEvent(new KeyboardEvent("keydown", { key: "j", bubbles: true }));
            document.body.offsetHeight;
            took.push(performance.now() - began);
            await new Promise(done => requestAnimationFrame(() => setTimeout(done)));
          }
          const median = values => values.sort((a, b) => a - b)[10];
          return [median(took), median(known)];
        }"""
    )
    # Relative to known work on the same machine at the same time (four million square roots, some 10 ms on an idle one).
    assert took < 6 * known, (took, known)
    assert page.locator(".tokens span").count() == 500
