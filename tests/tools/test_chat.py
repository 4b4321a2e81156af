"""`distill chat`: which prompt, what is generated, what is reasoning, and how it ends."""

from __future__ import annotations

import builtins
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml
from rich.console import Console

from distill import models, recipe, run_folder
from distill.errors import DataError
from distill.progress import Screen
from distill.records import UserError
from distill.tools import chat, chat_terminal

SYSTEM = "Reply as <think>reasoning</think><answer>result</answer>."
SUMS = {"fn": "reasoning_gym", "dataset": "basic_arithmetic", "options": {}}


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory, tiny_dir: Path) -> Path:
    """A run whose stage `kl` has its model, and whose stage `sft` has none yet."""
    tree = {
        "name": "talks", "models": {"base": str(tiny_dir)}, "tasks": {"sums": SUMS},
        "stages": {
            "traces": {"kind": "generate", "model": "base", "task": "sums", "problems": 4, "top_logprobs": 4},
            "kl": {"kind": "train", "model": "base", "data": "traces", "steps": 1},
            "sft": {"kind": "train", "model": "base", "data": "traces", "steps": 1, "loss": {"fn": "cross_entropy"}},
        },
    }  # fmt: skip
    folder = tmp_path_factory.mktemp("runs") / "talks"
    folder.mkdir()
    resolved = recipe.validate(tree)
    (folder / run_folder.RESOLVED).write_text(yaml.safe_dump(resolved.model_dump(mode="json")))
    shutil.copytree(tiny_dir, folder / "kl" / "model")
    run_folder.write(folder / "sft", run_folder.State(kind="train", config={}, inputs={}, status="failed"))
    return folder


def opened(reference: str | Path, **options: Any) -> chat.Chat:
    given = {"system": None, "temperature": 0.0, "max_tokens": 8, "screen": Screen(), **options}
    return chat.open_chat(str(reference), **given)[0]


def test_a_stages_model_is_asked_under_the_prompt_of_its_task(run: Path, tokenizer: Any) -> None:
    for reference in (run / "kl", run / "kl" / "model", run / "base"):
        found = chat.find(str(reference))
        assert (found.task, found.template.system) == ("sums", SYSTEM)
    talking = opened(run / "kl")
    asked = [{"role": "system", "content": SYSTEM}, {"role": "user", "content": "2 + 3"}]
    assert talking.next_prompt("2 + 3") == tokenizer.apply_chat_template(
        asked, tokenize=False, add_generation_prompt=True
    )
    talking.use_system(None)
    assert SYSTEM not in talking.next_prompt("2 + 3")
    assert "Be brief." in opened(run / "kl", system="Be brief.").next_prompt("2 + 3")
    assert chat.find(str(run / "kl" / "model").replace(str(run), f"{run}/")).template.name == "think_answer"


def test_a_folder_outside_a_run_has_its_chat_template_alone(tiny_dir: Path) -> None:
    assert chat.find(str(tiny_dir)).template.system is None


def test_a_reply_is_what_transformers_generates(tiny_dir: Path, tokenizer: Any) -> None:
    talking = opened(tiny_dir, max_tokens=6)
    ids = tokenizer.apply_chat_template(
        [{"role": "user", "content": "2 + 3"}], add_generation_prompt=True, return_tensors="pt", return_dict=True
    )
    greedy = models.load(tiny_dir, dtype=str(talking.model.dtype).removeprefix("torch.")).generate(
        **ids, max_new_tokens=6, do_sample=False
    )
    expected = models.decode(tokenizer, greedy[0, ids["input_ids"].shape[1] :].numpy())
    said: list[str] = []
    reply = talking.ask("2 + 3", lambda piece, thinking: said.append(piece))
    assert "".join(said) == expected
    assert reply.answer == expected.strip()
    assert reply.is_cut
    assert [message["role"] for message in talking.messages] == ["user", "assistant"]
    assert "2 + 3" in talking.next_prompt("and 4?")
    talking.reset()
    assert "2 + 3" not in talking.next_prompt("and 4?")


def test_an_adapter_is_loaded_on_its_base(tiny_dir: Path, tmp_path: Path) -> None:
    import torch
    from peft import LoraConfig, get_peft_model

    torch.manual_seed(0)
    config = LoraConfig(r=4, target_modules="all-linear", init_lora_weights=False)
    adapted = get_peft_model(models.load(tiny_dir, dtype="float32"), config)
    adapted.peft_config["default"].base_model_name_or_path = str(tiny_dir)
    adapted.save_pretrained(tmp_path / "adapter")
    loaded = opened(tmp_path / "adapter").model.float()
    ids = torch.arange(5, 25)[None]
    with torch.inference_mode():
        assert torch.allclose(loaded(ids).logits, adapted.eval()(ids).logits, atol=2e-2)
        assert not torch.allclose(loaded(ids).logits, models.load(tiny_dir, dtype="float32")(ids).logits, atol=2e-2)


def test_a_base_model_without_a_chat_template_gets_the_tasks_plain_prompt(run: Path, tmp_path: Path) -> None:
    folder = tmp_path / "talks"
    shutil.copytree(run, folder)
    for name in ("chat_template.jinja",):
        (folder / "kl" / "model" / name).unlink()
    talking = opened(folder / "kl")
    prompt = talking.next_prompt("2 + 3")
    assert prompt.startswith("A conversation between User and Assistant.")
    assert prompt.endswith("User: 2 + 3\nAssistant:")
    with pytest.raises(UserError, match="plain text, without a place for a system message"):
        talking.use_system("x")
    assert talking.ask("2 + 3", lambda piece, thinking: None).tokens == 8


@pytest.mark.parametrize(
    ("name", "kind", "words"),
    [
        ("sft", DataError, "talks/sft has no model yet: the stage is failed"),
        ("traces", UserError, "is a generate stage, which makes no model; name .*talks/kl"),
        ("other", UserError, "has no stage or model 'other'; its models are"),
        ("", UserError, "is a run; name one of its models: .*talks/kl, .*talks/base"),
    ],
)
def test_what_is_no_model_is_one_message(run: Path, name: str, kind: type[UserError], words: str) -> None:
    with pytest.raises(UserError, match=words) as raised:
        chat.find(str(run / name))
    assert type(raised.value) is kind


def test_a_damaged_model_is_one_message(run: Path, tmp_path: Path) -> None:
    folder = tmp_path / "model"
    shutil.copytree(run / "kl" / "model", folder)
    weights = folder / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1000])
    with pytest.raises(DataError, match=r"model\.safetensors"):
        chat.find(str(folder))


# ------------------------------------------------------------------------------------------------ streaming


def streamed(text: str, begun: str = "", step: int = 1) -> tuple[str, str]:
    """The reasoning and the answer of a text that grows by `step` characters."""
    parts: dict[bool, str] = {True: "", False: ""}

    def write(piece: str, thinking: bool) -> None:
        parts[thinking] += piece

    pieces = chat._Pieces(begun, write)
    for n in range(0, len(text), step):
        pieces.show(text[: n + step])
    pieces.end()
    return parts[True], parts[False]


@pytest.mark.parametrize("step", [1, 2, 3, 100])
@pytest.mark.parametrize(
    ("text", "begun", "reasoning", "answer"),
    [
        ("<think>a < b</think>7", "", "a < b", "7"),
        ("a </th b</think>\n7", "<think>\n", "a </th b", "\n7"),
        ("plain <think> talk", "", "", "plain <think> talk"),
        ("[THINK]a[/THINK]b", "", "a", "b"),
        ("<|channel|>analysis<|message|>x<|end|>y", "", "x", "y"),
        ("<think>never closed", "", "never closed", ""),
        ("7 < 8", "", "", "7 < 8"),
    ],
)
def test_reasoning_is_told_from_the_answer(text: str, begun: str, reasoning: str, answer: str, step: int) -> None:
    assert streamed(text, begun, step) == (reasoning, answer)


def test_what_controls_a_terminal_is_not_written() -> None:
    assert streamed("a\x1b[31mb") == ("", "a\ufffd[31mb")


def test_an_interrupted_reply_stays_in_the_conversation(tiny_dir: Path) -> None:
    talking = opened(tiny_dir, max_tokens=50)
    said: list[str] = []

    def write(piece: str, thinking: bool) -> None:
        said.append(piece)
        if len(said) == 1:
            raise KeyboardInterrupt

    reply = talking.ask("hello", write)
    assert reply.stopped
    assert not reply.is_cut
    assert len(talking.messages) == 2


def test_ctrl_c_stops_a_reply_and_a_second_one_ends(tiny_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    talking = opened(tiny_dir, max_tokens=2)
    console = Console(file=open(os.devnull, "w"), force_terminal=True)  # noqa: SIM115
    events: Iterator[Any] = iter(["hello", KeyboardInterrupt, "again", "/reset", KeyboardInterrupt, KeyboardInterrupt])

    def typed(prompt: str) -> str:
        event = next(events)
        if event is KeyboardInterrupt:
            raise KeyboardInterrupt
        return event

    monkeypatch.setattr(builtins, "input", typed)
    chat_terminal._talk(talking, chat.FoundModel(tiny_dir), console)
    assert next(events, "the end") == "the end"
    assert talking.messages == []


def test_one_question_in_a_fresh_process_prints_the_answer(run: Path) -> None:
    command = [sys.executable, "-m", "distill.cli", "chat", str(run / "kl"), "--ask", "2 + 3", "--temperature", "0"]
    done = subprocess.run([*command, "--max-tokens", "5"], capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stderr
    expected = opened(run / "kl", max_tokens=5).ask("2 + 3", lambda piece, thinking: None)
    assert done.stdout == expected.answer + "\n"
    assert "cut after 5 tokens" in done.stderr
    assert "--max-tokens 10" in done.stderr
    assert json.loads((run / "kl" / "model" / "config.json").read_text())["model_type"] == "llama"
