"""Rewards against values computed by hand, and a reward model that learns to tell right from wrong."""

import math
import random as stdlib_random
import subprocess
import sys

import pytest

from distill import plug
from distill.errors import UserError
from distill.records import Group, Problem, Template, Verdict
from distill.tasks import rewards, templates

RIGHT, WRONG = Verdict(True, 1.0, "4"), Verdict(False, 0.0, "5", "wrong")
PARTIAL, UNJUDGED = Verdict(False, 0.25, "3", "wrong"), Verdict(None, None, "9^9^9", "timeout")


def group(*texts, template=templates.think_answer, **changes):
    num = len(texts)
    fields = {
        "problem": Problem("p1", "sums", "2+2?", ({"role": "user", "content": "2+2?"},), "4"),
        "template": template,
        "texts": texts,
        "num_tokens": (10,) * num,
        "finished": (True,) * num,
        "verdicts": (RIGHT,) * num,
        "max_tokens": 100,
    }
    return Group(**{**fields, **changes})


# ----------------------------------------------------------------------------------------- accuracy


def test_accuracy_is_one_for_right_zero_for_wrong_and_nothing_for_unjudged():
    verdicts = (RIGHT, WRONG, PARTIAL, UNJUDGED)
    assert rewards.accuracy(group(*"abcd", verdicts=verdicts)) == [1.0, 0.0, 0.0, None]


def test_partial_credit_is_an_option():
    verdicts = (RIGHT, WRONG, PARTIAL, UNJUDGED)
    scores = rewards.accuracy(group(*"abcd", verdicts=verdicts), partial=True)
    assert scores == [1.0, 0.0, 0.25, None]


# -------------------------------------------------------------------------------------------- format

PREFILLED = Template("prefilled", "s", "{question}", templates.think_answer.extract, prefill="<think>")
FORMATS = [
    # think_answer
    ("think_answer", 1, "<think>2+2 is 4</think><answer>4</answer>"),
    ("think_answer", 1, " <think>\n2+2 is 4\n</think>\n\n<answer>\n4\n</answer>\n"),
    ("think_answer", 1, r"<think>so</think><answer>\boxed{4}</answer>"),
    ("think_answer", 1, "<think>1 < 2 > 0, so \\boxed{3}? no</think><answer>4</answer>"),
    ("think_answer", 0, ""),
    ("think_answer", 0, "4"),
    ("think_answer", 0, "<think>2+2 is 4</think>"),
    ("think_answer", 0, "<answer>4</answer>"),
    ("think_answer", 0, "<think></think><answer>4</answer>"),
    ("think_answer", 0, "<think> \n </think><answer>4</answer>"),
    ("think_answer", 0, "<think>so</think><answer></answer>"),
    ("think_answer", 0, "<think>so</think><answer> </answer>"),
    ("think_answer", 0, "<think>so<answer>4</answer>"),
    ("think_answer", 0, "<think>so</think><answer>4"),
    ("think_answer", 0, "so</think><answer>4</answer>"),
    ("think_answer", 0, "Well, <think>so</think><answer>4</answer>"),
    ("think_answer", 0, "<think>so</think><answer>4</answer> I hope that helps."),
    ("think_answer", 0, "<think>so</think>It is <answer>4</answer>"),
    ("think_answer", 0, "<think>a</think><think>b</think><answer>4</answer>"),
    ("think_answer", 0, "<think>a<think>b</think></think><answer>4</answer>"),
    ("think_answer", 0, "<think>a<think>b</think><answer>4</answer>"),
    ("think_answer", 0, "<think>a</think><answer>4</answer><think>b</think>"),
    ("think_answer", 0, "<think>a</think><answer>3</answer><answer>4</answer>"),
    ("think_answer", 0, "<think>a</think><answer><answer>4</answer></answer>"),
    ("think_answer", 0, "<think>maybe <answer>3</answer></think><answer>4</answer>"),
    ("think_answer", 0, "<think>so <answer>4</answer></think>"),
    ("think_answer", 0, "<answer>4</answer><think>so</think>"),
    ("think_answer", 0, "<THINK>so</THINK><ANSWER>4</ANSWER>"),
    ("think_answer", 0, r"<think>so</think>\boxed{4}"),
    # the prompt begins the assistant's turn
    ("prefilled", 1, "<think>so</think><answer>4</answer>"),
    ("prefilled", 0, "<think><think>so</think><answer>4</answer>"),
    ("prefilled", 0, "<think></think><answer>4</answer>"),
    # boxed
    ("boxed", 1, r"<think>2+2 is 4</think>\boxed{4}"),
    ("boxed", 1, "<think>so</think>\n\nThe sum is $\\boxed{ 4 }$."),
    ("boxed", 1, r"<think>so \boxed{3}? no</think>**Answer:** \[ \boxed{\frac{8}{2}} \]"),
    ("boxed", 0, r"<think>so</think>\boxed{4} as I said"),
    ("boxed", 0, r"<think>so</think>\boxed{3}, no, \boxed{4}"),
    ("boxed", 0, r"<think>so \boxed{4}</think>"),
    ("boxed", 0, r"<think>so \boxed{4}</think>It is 4."),
    ("boxed", 0, r"<think>so</think>\boxed{}"),
    ("boxed", 0, r"<think>so</think>\boxed{4"),
    ("boxed", 0, r"<think></think>\boxed{4}"),
    ("boxed", 0, "<think>so</think><answer>4</answer>"),
    ("boxed", 0, r"<think>so</think><answer>\boxed{4}</answer>"),
    ("boxed", 0, r"The sum is \boxed{4}."),
    # r1_zero: a bare number is accepted as an answer, but the format needs the tags
    ("r1_zero", 1, "<think>so</think> <answer>4</answer>"),
    ("r1_zero", 0, "<think>so</think> It is 4"),
    ("r1_zero", 0, "4"),
    # raw: any text with an answer
    ("raw", 1, "<think>so</think>It is 4"),
    ("raw", 0, "<think>so</think> \n"),
    ("raw", 0, "It is 4"),
]


@pytest.mark.parametrize(("template", "expected", "text"), FORMATS)
@pytest.mark.fault(22)
def test_format(template, expected, text):
    found = {**templates.TEMPLATES, "prefilled": PREFILLED}[template]
    assert rewards.think_format(group(text, template=found)) == [expected]


def test_a_cut_completion_has_no_format():
    text = "<think>so</think><answer>4</answer>"
    assert rewards.think_format(group(text, text, finished=(True, False))) == [1.0, 0.0]


def test_a_template_of_ones_own_is_asked_for_its_form():
    def extract(text):
        return templates.last_box(text.rpartition("</think>")[2]) if "</think>" in text else None

    own = Template("own", None, "{question}", extract, chat=False, prefill="<think>")
    texts = (
        r"<think>so</think>\boxed{4}",
        r"<think>so</think>\boxed{4} and more",
        "<think>so</think>4",
    )
    assert rewards.think_format(group(*texts, template=own)) == [1.0, 0.0, 0.0]


# ------------------------------------------------------------------------------------------ language


def test_language_is_that_of_the_reasoning_alone():
    texts = (
        "<think>First we add the numbers. Then we stop here.</think><answer>vier und nicht fünf</answer>",
        "<think>Zuerst addieren wir die Zahlen und dann sind wir fertig.</think><answer>four it is</answer>",
        "First we add the numbers and then we stop here.",
        "<think>First we add the numbers and then we are cut",
        "opened by the prompt, we add the numbers</think><answer>vier und nicht fünf</answer>",
    )
    assert rewards.language(group(*texts)) == [1.0, 0.0, 1.0, 1.0, 1.0]
    assert rewards.language(group(*texts[:2]), target="de") == [0.0, 1.0]


def test_the_template_s_prefill_is_not_the_models_own_language():
    prefilled = Template("german", None, "{question}", str, prefill="Denken wir zuerst gründlich nach. ")
    text = prefilled.prefill + "First we add the numbers and then we stop here."
    assert rewards.language(group(text, template=prefilled)) == [1.0]


def test_half_and_half_is_a_half():
    text = "<think>So the answer must be twelve. 所以这个问题的答案是十二。</think>"  # 6 words, 12 characters = 6
    assert rewards.language(group(text)) == [0.5]


def test_arithmetic_is_in_every_language_and_silence_in_none():
    texts = (
        "<think>2 + 2 = 4</think><answer>4</answer>",
        "",
        " \n",
        "<think> </think><answer>4</answer>",
    )
    assert rewards.language(group(*texts)) == [1.0, 0.0, 0.0, 0.0]


# -------------------------------------------------------------------------------------------- length


def test_length_is_daposs_soft_punishment():
    num_tokens = (1, 80, 81, 90, 95, 100, 100, 40)
    finished = (True, True, True, True, True, True, False, False)
    cut = group(*"abcdefgh", num_tokens=num_tokens, finished=finished)
    assert rewards.length(cut, cache=20) == pytest.approx([0, 0, -0.05, -0.5, -0.75, -1, -1, -1])


def test_a_cache_as_large_as_the_limit_punishes_from_the_first_token():
    assert rewards.length(group("a", num_tokens=(25,)), cache=100) == [-0.25]


def test_a_cache_beyond_the_limit_is_a_mistake():
    with pytest.raises(UserError, match=r"cache is 101 tokens.*at most 100"):
        rewards.length(group("a"), cache=101)


# -------------------------------------------------------------------------------------------- random


def test_random_is_a_coin_with_the_probability_asked_for():
    scores = [score for seed in range(500) for score in rewards.random(group(*"abcdefgh", seed=seed), probability=0.3)]
    assert set(scores) == {0.0, 1.0}
    assert sum(scores) / 4000 == pytest.approx(0.3, abs=4 * math.sqrt(0.3 * 0.7 / 4000))


def test_random_knows_the_seed_the_problem_and_the_place_only():
    base = rewards.random(group(*"abcdefghijklmnop", seed=3))
    assert rewards.random(group(*"ponmlkjihgfedcba", seed=3)) == base
    assert rewards.random(group(*"abcdefghijklmnopqrst", seed=3))[:16] == base
    assert rewards.random(group(*"abcdefghijklmnop", seed=4)) != base
    other = Problem("p2", "sums", "3+3?", ({"role": "user", "content": "3+3?"},))
    assert rewards.random(group(*"abcdefghijklmnop", seed=3, problem=other)) != base
    assert rewards.random(group("a"), probability=0.0) == [0.0]
    assert rewards.random(group("a"), probability=1.0) == [1.0]


# --------------------------------------------------------------------------------------------- plugs


def test_every_public_function_is_a_reward_and_none_changes_its_group():
    found = plug.names("distill.tasks.rewards")
    assert {"accuracy", "think_format", "language", "length", "model", "random"} <= set(found)
    options = {"length": {"cache": 20}}
    for name in ("accuracy", "think_format", "language", "length", "random"):
        reward = plug.bind(name, options.get(name, {}), "distill.tasks.rewards")
        texts = ("<think>we add</think><answer>4</answer>", "", "�\x00\ud800 <think>")
        first, again = reward(group(*texts)), reward(group(*texts))
        assert len(first) == 3
        assert first == again
        assert reward(group()) == []


def test_options_are_checked():
    with pytest.raises(UserError, match="greater than 0"):
        plug.bind("length", {"cache": 0}, "distill.tasks.rewards")
    with pytest.raises(UserError, match="Did you mean 'target'"):
        plug.bind("language", {"targt": "de"}, "distill.tasks.rewards")


def test_importing_rewards_loads_nothing_heavy():
    code = (
        "import sys, distill.tasks.rewards, distill.tasks.combined_reward\n"
        "print([m for m in ('torch', 'transformers', 'py3langid', 'latex2sympy2_extended', 'reasoning_gym') if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


# -------------------------------------------------------------------------------------- reward models


def classifier(tokenizer, num_labels=1):
    import torch
    from transformers import LlamaConfig, LlamaForSequenceClassification

    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=2,
        max_position_embeddings=128,
        pad_token_id=tokenizer.pad_token_id,
        num_labels=num_labels,
        initializer_range=0.1,
    )
    return LlamaForSequenceClassification(config)


FILLER = "so then we have it now and this is what I found after a long while"


def pairs(num, seed):
    """A request for an even number, and two replies with different words: one with an even digit, one with an odd one."""
    draw = stdlib_random.Random(seed)

    def reply(digits):
        said = " ".join(draw.choices(FILLER.split(), k=draw.randint(1, 6)))
        return f"<think>{said}</think><answer>{draw.choice(digits)}</answer>"

    return [(f"Even, above -{draw.randint(10, 99)}", reply("02468"), reply("13579")) for _ in range(num)]


def posed(question, *texts):
    problem = Problem(question, "repeat", question, ({"role": "user", "content": question},))
    return group(*texts, problem=problem)


def train(model, tokenizer, steps=40):
    """Bradley-Terry training on pairs with plain torch: one padded batch per step, no code of distill."""
    import torch

    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    for step in range(steps):
        drawn = pairs(16, seed=f"train {step}")
        texts = [
            tokenizer.apply_chat_template(
                [{"role": "user", "content": question}, {"role": "assistant", "content": text}],
                tokenize=False,
            )
            for question, right, wrong in drawn
            for text in (right, wrong)
        ]
        inputs = tokenizer(texts, padding=True, return_tensors="pt", add_special_tokens=False)
        logits = model(**inputs).logits[:, 0].reshape(-1, 2)
        loss = -torch.nn.functional.logsigmoid(logits[:, 0] - logits[:, 1]).mean()
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()


@pytest.fixture(scope="module")
def reward_dir(tmp_path_factory, tokenizer):
    from distill import models

    model = classifier(tokenizer)
    train(model, tokenizer)
    folder = tmp_path_factory.mktemp("reward")
    models.save(model, tokenizer, folder)
    return str(folder)


def test_a_reward_model_ranks_right_over_wrong_on_pairs_it_has_not_seen(reward_dir):
    won = 0
    for question, right, wrong in pairs(100, seed="held out"):
        better, worse = rewards.model(posed(question, right, wrong), path=reward_dir, dtype="float32")
        won += better > worse
    assert won >= 90


def test_a_reward_model_gives_the_logit_of_prompt_and_reply_whatever_the_batch(reward_dir, tokenizer):
    import torch
    from transformers import AutoModelForSequenceClassification

    texts = (
        "<answer>3</answer>",
        "<answer>4</answer> " + "and so on " * 20,
        "",
        "<answer>7</answer>",
    )

    def scores(*texts, **options):
        return rewards.model(posed("Even?", *texts), path=reward_dir, dtype="float32", **options)

    plain = AutoModelForSequenceClassification.from_pretrained(reward_dir).eval()
    alone = []
    for text in texts:
        turns = [{"role": "user", "content": "Even?"}, {"role": "assistant", "content": text}]
        ids = tokenizer.apply_chat_template(turns, return_tensors="pt", return_dict=True)["input_ids"]
        with torch.no_grad():
            alone.append(plain(input_ids=ids).logits.item())
    assert len({round(logit, 3) for logit in alone}) == 4
    assert scores(*texts) == pytest.approx(alone, abs=1e-4)
    assert scores(*texts, batch_size=2) == pytest.approx(alone, abs=1e-4)
    squashed = [1 / (1 + math.exp(-logit)) for logit in alone]
    assert scores(*texts, sigmoid=True) == pytest.approx(squashed, abs=1e-4)


def test_what_is_too_long_for_a_reward_model_is_not_judged(reward_dir):
    texts = ("<answer>3</answer>", "word " * 500)
    scores = rewards.model(posed("Repeat 3", *texts), path=reward_dir, dtype="float32")
    assert isinstance(scores[0], float)
    assert scores[1] is None


def test_a_classifier_of_several_labels_is_no_reward_model(tmp_path, tokenizer):
    from distill import models

    models.save(classifier(tokenizer, num_labels=2), tokenizer, tmp_path)
    with pytest.raises(UserError, match=r"num_labels = 2.*one logit"):
        rewards.model(group("a"), path=str(tmp_path))


def test_a_language_model_with_one_label_has_no_head(tmp_path, tiny_dir, tokenizer):
    import json
    import shutil

    shutil.copytree(tiny_dir, tmp_path / "lm")
    config = json.loads((tmp_path / "lm/config.json").read_text())
    config.update(id2label={"0": "LABEL_0"}, label2id={"LABEL_0": 0})
    (tmp_path / "lm/config.json").write_text(json.dumps(config))
    with pytest.raises(UserError, match=r"no weights for score\.weight"):
        rewards.model(group("a"), path=str(tmp_path / "lm"))


def test_a_reward_model_that_is_not_there():
    with pytest.raises(UserError, match="does not exist"):
        rewards.model(group("a"), path="./no/such/folder")


def test_a_tokenizer_without_chat_template_gets_question_and_reply(tmp_path, tokenizer):
    """A BERT without a chat template gets question and reply as two segments, and scores two replies differently."""
    import torch
    from tokenizers import Tokenizer
    from tokenizers.models import WordLevel
    from tokenizers.pre_tokenizers import Whitespace
    from tokenizers.processors import TemplateProcessing
    from transformers import BertConfig, BertForSequenceClassification, PreTrainedTokenizerFast

    from distill import models

    words = ["[PAD]", "[CLS]", "[SEP]", "[UNK]", "two", "four", "five"]
    backend = Tokenizer(WordLevel({word: n for n, word in enumerate(words)}, unk_token="[UNK]"))
    backend.pre_tokenizer = Whitespace()
    backend.post_processor = TemplateProcessing(
        single="[CLS] $A [SEP]",
        pair="[CLS] $A [SEP] $B [SEP]",
        special_tokens=[("[CLS]", 1), ("[SEP]", 2)],
    )
    bert = PreTrainedTokenizerFast(
        tokenizer_object=backend,
        pad_token="[PAD]",
        cls_token="[CLS]",
        sep_token="[SEP]",
        unk_token="[UNK]",
    )
    torch.manual_seed(0)
    config = BertConfig(
        vocab_size=7,
        hidden_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        intermediate_size=16,
        num_labels=1,
    )
    model = BertForSequenceClassification(config).eval()
    models.save(model, bert, tmp_path)
    with torch.no_grad():
        expected = [model(input_ids=torch.tensor([[1, 4, 2, *reply, 2]])).logits.item() for reply in ([5], [6, 6])]
    scores = rewards.model(posed("two", "four", "five five"), path=str(tmp_path), dtype="float32")
    assert scores == pytest.approx(expected, abs=1e-5)
