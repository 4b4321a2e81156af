"""The data card of a folder of traces: Markdown with the hub's YAML front matter.

In: the folder, and the licence. Out: text that says what the traces are, which model wrote them, their number and size,
whether they were verified, and how to decode them without this package. Examples are left to the hub, which shows rows.
"""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from distill.printable import printable
from distill.tail_draws import DRAW_MASS
from distill.traces import folder, provenance
from distill.traces.reader import SELECTION_FILE, TraceReader, open_traces
from distill.traces.summary import Stats, stats

LICENCE_TO_FILL = "unknown"
_SIZES = ((1e3, "n<1K"), (1e4, "1K<n<10K"), (1e5, "10K<n<100K"), (1e6, "100K<n<1M"), (1e7, "1M<n<10M"),
          (1e8, "10M<n<100M"), (1e9, "100M<n<1B"), (math.inf, "n>1B"))  # fmt: skip


def card(path: str | Path, *, name: str, licence: str = LICENCE_TO_FILL) -> str:
    """Return the card's text. name: of the data set; licence: the hub's identifier of a licence."""
    from huggingface_hub import DatasetCardData

    reader, held = open_traces(path), stats(path)
    front = DatasetCardData(
        license=licence,
        pretty_name=name,
        task_categories=["text-generation"],
        tags=["distillation", "knowledge-distillation", "logits", "reasoning-traces", "distill"],
        size_categories=[next(word for bound, word in _SIZES if held.traces < bound)],
        configs=[{"config_name": "default", "data_files": [{"split": "train", "path": "*.parquet"}]}],
    )
    parts = [
        f"---\n{front.to_yaml()}\n---\n",
        f"# {_plain(name)}\n",
        _summary(reader, held),
        "## Where it comes from\n\n" + _table(_lineage(reader)),
        "## What it holds\n\n" + _table(_sizes(held)),
        *_prompt(reader),
        *_filters(Path(path)),
        "## Integrity\n\n" + _integrity(reader),
        "## Reading it\n\n" + _reading(reader),
        "## Licence\n\n" + _licence(licence),
    ]
    return "\n".join(parts).rstrip() + "\n"


def _summary(reader: TraceReader, held: Stats) -> str:
    kept = (
        "and, at every position of the completion, the model's distribution over the next token"
        if reader.metadata.top_k
        else "without distributions"
    )
    return (
        f"{held.traces:,} traces of {held.problems:,} problems: prompt and completion as text and as token ids, {kept}. "
        "Made with `distill`.\n"
    )


def _lineage(reader: TraceReader) -> list[tuple[str, str]]:
    meta = reader.metadata
    sampling = ", ".join(f"{key} {value}" for key, value in meta.model_dump()["sampling"].items())
    writer = provenance.text_from(reader)
    scored = bool(meta.source)
    rows = [
        ("text written by", _code(writer)),
        ("distributions of", f"{_code(meta.model)}, weights {_code(meta.weights)}"),
        ("how", "that text scored by teacher forcing" if scored else "recorded during sampling"),
        ("tokenizer", f"{_code(meta.tokenizer)}, {meta.vocab_size:,} tokens"),
        ("chat template", _code(meta.chat_template) if meta.chat_template else "none"),
        ("task", f"{_code(meta.task)} ({_code(meta.task_fingerprint)}), template {_code(meta.template)}"),
        ("sampling", "as far as known: " + sampling if scored else sampling),
        ("log-probabilities", f"{meta.logprob_mode}, temperature {meta.logprob_temperature:g}: before top-p"),
        ("support", f"at most {meta.top_k} entries a position, until they hold {meta.mass:g} of the mass"
         if meta.top_k else "none"),
        *(
            [("draws from the tail", f"up to {meta.tail_draws} a position: `draw_count`, `draw_ids`, `draw_logprobs`; each stands for "
              f"max(exp(tail_logprob), {DRAW_MASS:g}) / {meta.tail_draws} of the tail's mass")]
            if meta.tail_draws
            else []
        ),
        ("engine", _code(f"{meta.engine} {meta.dtype}".strip())),
        ("packages", ", ".join(_code(f"{key} {value}") for key, value in meta.versions.items()) or "not recorded"),
    ]  # fmt: skip
    return rows


def _prompt(reader: TraceReader) -> list[str]:
    """A section on the conversation that the traces were sampled under."""
    prompt = reader.metadata.prompt
    if prompt is None:
        return ["## The prompt\n\nNot recorded beside the traces; `prompt_ids` hold every prompt as it was.\n"]
    how = "The chat template of the model rendered it" if prompt.chat else "Plain text, without a chat template"
    if prompt.options:
        how += ", with " + ", ".join(f"{_code(key)} = {_code(str(value))}" for key, value in prompt.options.items())
    text = f"## The prompt\n\n{how}. For a question in the place of `{{question}}` the model read:\n\n"
    text += _fenced(prompt.rendered or prompt.plain) if prompt.rendered or prompt.plain else ""
    if prompt.chat:
        system = "begin with the system message above" if prompt.system else "have no system message but their own"
        text += f"\n`messages` hold the whole conversation, and {system}."
        if prompt.system and not prompt.roles:
            text += " The chat template has no system role: its text stands in the first question, before a blank line."
        text += "\n"
    else:
        text += "\n`messages` hold the conversation without the text around the question.\n"
    if prompt.begun:
        text += f"\nThe prompt has begun the reply with {_code(prompt.begun)}; `completion` is what follows.\n"
    return [text]


def _fenced(text: str) -> str:
    """Text in a fence that it cannot end."""
    longest = max((len(run) for run in re.findall(r"`+", text)), default=0)
    fence = "`" * max(3, longest + 1)
    return f"{fence}text\n{printable(text)}\n{fence}\n"


def _sizes(held: Stats) -> list[tuple[str, str]]:
    shown = [
        (key.replace("_", " "), f"{value:,}" if isinstance(value, int) else f"{value:.4g}")
        for key, value in held.as_dict().items()
        if isinstance(value, int) or (isinstance(value, float) and not math.isnan(value))
    ]
    longest = max(held.completion_lengths, default=0)
    return [*shown, ("longest completion", f"at most {longest:,} tokens")]


def _filters(path: Path) -> list[str]:
    """Return a section on what a selection left out, with the reasons."""
    if not (path / SELECTION_FILE).is_file():
        return []
    tree = folder.read_json(path / SELECTION_FILE)
    rows = [(_code(f["fn"]) + _options(f["options"]), f"{f['dropped']:,}", _plain(f["why"])) for f in tree["filters"]]
    text = f"{tree['kept']:,} of {tree['rows']:,} traces were kept, the ones that every filter keeps:\n\n"
    return ["## What was left out\n\n" + text + _table(rows, ("filter", "dropped", "why"))]


def _options(options: dict[str, Any]) -> str:
    return "".join(f" {_plain(key)}={_code(str(value))}" for key, value in options.items())


def _integrity(reader: TraceReader) -> str:
    found = provenance.certificate(reader)
    text = (
        "Every page of every shard has a checksum, and the manifests hold each shard's rows and SHA-256: "
        "`distill traces verify .` compares them.\n\n"
    )
    if found is None:
        return text + "No audit was made: no positions were scored again with the weights named above.\n"
    text += (
        f"Audit of {found['date']}: {found['positions']:,} random positions of {found['traces']:,} traces were scored again "
        f"with these weights ({found['engine']}, {found['dtype']}). Differences in nats:\n\n"
    )
    rows = [
        (label, f"{found[f'{key}_mean']:.2g}", f"{found[f'{key}_worst']:.2g}")
        for key, label in (
            ("token", "log-probability of the trace's token"),
            ("entry", "log-probability of a kept entry"),
            ("kl", "KL of the stored distribution from the one scored again"),
        )
        if reader.metadata.top_k or key == "token"
    ]
    return text + _table(rows, ("", "mean", "worst"))


def _reading(reader: TraceReader) -> str:
    text = (
        'Plain Parquet, one row a trace, read by `datasets.load_dataset(NAME, split="train")`. `messages` is the conversation '
        "before the reply, `completion` the reply; `prompt_ids` and `completion_ids` are the tokens that the model saw and wrote, `logprob` their log-probabilities.\n"
    )
    if not reader.metadata.top_k:
        return text
    text += (
        "\nPosition t (token t of the completion) has `top_count[t]` entries, position after position, the most probable "
        "first: `top_ids` and "
    )
    if reader.metadata.position_share < 1:
        text = text.replace(
            "\nPosition t",
            f"\nDistributions are stored at {reader.metadata.position_share:.0%} of each completion's positions, chosen by "
            f"{_code(reader.metadata.positions)}; at the others `top_count` is 0.\n\nPosition t",
        )
    steps = reader.metadata.steps_per_nat
    if reader.metadata.exact:
        text += "their log-probabilities `top_logprobs`."
        value, pandas = "top_logprobs", ("np.exp(trace.top_logprobs[entries])", "weight")
        sql = ("exp(value)", "weight")
    else:
        text += (
            f"`top_steps`, how far each lies below the one before it in 1/{steps} nat. With x the running sum of a "
            f"position's steps over {steps}, an entry's probability is exp(−x) / Σ exp(−x) · (1 − exp(tail_logprob))."
        )
        value = "top_steps"
        pandas = (
            f"np.exp(np.cumsum(trace.top_steps[entries]) / -{steps})",
            "weight / weight.sum() * (1 - tail)",
        )
        sql = (
            f"exp(sum(value) over (partition by entries.trace_id, t order by i) / -{steps}.0)",
            "weight / sum(weight) over (partition by trace_id, t) * (1 - exp(tail))",
        )
    return (
        text
        + " `tail_logprob` is the log of the mass of all other tokens.\n\nWith pandas:\n\n"
        + _fill(_PANDAS, *pandas, value)
        + "\nWith DuckDB 2.0 or newer, one row an entry:\n\n"
        + _fill(_DUCKDB, *sql, value)
    )


def _fill(example: str, weight: str, share: str, value: str) -> str:
    return example.replace("WEIGHT", weight).replace("SHARE", share).replace("VALUE", value)


_PANDAS = """```python
import glob

import numpy as np
import pandas as pd

frame = pd.concat(map(pd.read_parquet, sorted(glob.glob("*.parquet"))))


def distribution(trace, t):
    \"\"\"Probabilities of the entries of position t, by token id, and that of all other tokens.\"\"\"
    start = trace.top_count[:t].sum()
    entries = slice(start, start + trace.top_count[t])
    tail = np.exp(float(trace.tail_logprob[t]))
    weight = WEIGHT
    return dict(zip(trace.top_ids[entries], SHARE)), tail
```
"""

_DUCKDB = """```sql
with counts as (
    select trace_id, generate_subscripts(top_count, 1) as t, unnest(top_count) as num, unnest(tail_logprob) as tail
    from '*.parquet'
), positions as (
    select *, sum(num) over (partition by trace_id order by t) - num + 1 as first from counts where num > 0
), entries as (
    select trace_id, generate_subscripts(top_ids, 1) as i, unnest(top_ids) as id, unnest(VALUE) as value
    from '*.parquet'
), weights as (
    select entries.trace_id, t, i, id, tail, WEIGHT as weight
    from entries asof join positions on entries.trace_id = positions.trace_id and i >= first
)
select trace_id, t - 1 as t, id,
       SHARE as probability, exp(tail) as tail
from weights
order by trace_id, t, i
```
"""


def _licence(licence: str) -> str:
    if licence == LICENCE_TO_FILL:
        return "To be filled in by whoever publishes this, here and in the header.\n"
    return f"{_code(licence)}, as stated by whoever published this.\n"


def _table(rows: Sequence[Sequence[str]], head: Sequence[str] = ("", "")) -> str:
    lines = [head, ["---"] * len(head), *rows]
    return "".join("| " + " | ".join(line) + " |\n" for line in lines)


def _plain(text: str) -> str:
    """Escape text so that it has no meaning in Markdown or HTML."""
    for char in "\\`*_[]<>|#&":
        text = text.replace(char, f"\\{char}" if char not in "<>&" else f"&#{ord(char)};")
    return " ".join(text.split())


def _code(text: str) -> str:
    """Return text as inline code, whatever characters it has."""
    return "`" + " ".join(text.replace("`", "'").replace("|", "¦").split()) + "`"
