"""Code that runs a model under the prompt that it was trained on: for its card, with transformers and with vLLM.

In: the prompt and the sampling. Out: Python text. `NAME_LINE` names the model by the folder that the card lies in; `named`
puts the repository's name there when the model is published.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

QUESTION = "What is 17 + 25?"
NAME_LINE = 'name = "."  # this folder; or the repository on the hub, as owner/name'


@dataclass(frozen=True, slots=True)
class Usage:
    """How a model is prompted and sampled.

    messages: turns before the question, such as the system message; plain: the text around {question} for a model that is
    prompted with plain text, else empty. before_question: text in front of it, where a chat template has no system role. prefill: what the
    reply is begun with. options: of the chat template. rendered: the
    whole prompt of {question} as the model reads it. temperature 0 takes the most probable token.
    """

    rendered: str
    messages: Sequence[Mapping[str, str]] = ()
    plain: str = ""
    before_question: str = ""
    prefill: str = ""
    options: Mapping[str, Any] = field(default_factory=dict)
    temperature: float = 0.7
    top_p: float = 1.0
    max_tokens: int = 512


def transformers_code(usage: Usage) -> str:
    """A script that prints a reply, with transformers."""
    special = "" if usage.plain else ", add_special_tokens=False"
    sampling = (
        f"do_sample=True, temperature={usage.temperature:g}, top_p={usage.top_p:g}, top_k=0"
        if usage.temperature
        else "do_sample=False"
    )
    return f"""from transformers import AutoModelForCausalLM, AutoTokenizer

{NAME_LINE}
tokenizer = AutoTokenizer.from_pretrained(name)
model = AutoModelForCausalLM.from_pretrained(name, dtype="auto")

{_prompt(usage)}
inputs = tokenizer(prompt{special}, return_tensors="pt").to(model.device)
output = model.generate(**inputs, max_new_tokens={usage.max_tokens}, {sampling})
print(tokenizer.decode(output[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True))"""


def vllm_code(usage: Usage) -> str:
    """A script that prints a reply, with vLLM."""
    special = "" if usage.plain else ", add_special_tokens=False"
    sampling = f"temperature={usage.temperature:g}, top_p={usage.top_p:g}, max_tokens={usage.max_tokens}"
    return f"""from transformers import AutoTokenizer
from vllm import LLM, SamplingParams

{NAME_LINE}
tokenizer = AutoTokenizer.from_pretrained(name)
llm = LLM(name)

{_prompt(usage)}
ids = tokenizer(prompt{special})["input_ids"]
(answer,) = llm.generate([{{"prompt_token_ids": ids}}], SamplingParams({sampling}))
print(answer.outputs[0].text)"""


def named(text: str, repo: str) -> str:
    """Return a card's text with the repository's name in its scripts."""
    return text.replace(NAME_LINE, f"name = {_literal(repo)}")


def _prompt(usage: Usage) -> str:
    lines = [f"question = {_literal(QUESTION)}"]
    if usage.plain:
        lines.append(f'prompt = {_literal(usage.plain)}.replace("{{question}}", question)')
    else:
        turns = [f"    {_literal(dict(turn))}," for turn in usage.messages]
        before = f"{_literal(usage.before_question)} + " if usage.before_question else ""
        turns.append(f'    {{"role": "user", "content": {before}question}},')
        options = "".join(f", {key}={value!r}" for key, value in usage.options.items())
        lines += ["messages = [", *turns, "]"]
        lines.append(
            f"prompt = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True{options})"
        )
    if usage.prefill:
        lines.append(f"prompt += {_literal(usage.prefill)}  # the reply begins with it")
    return "\n".join(lines)


def _literal(value: Any) -> str:
    """A text, or a dictionary of texts, as Python with double quotes."""
    return json.dumps(value, ensure_ascii=False)
