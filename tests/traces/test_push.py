"""`distill push` and `distill traces push` against a hub of ours: what arrives there, and each refusal in plain words."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import trace_samples as samples
from huggingface_hub import DatasetCard, ModelCard
from stub_hub import StubHub

from distill.errors import MachineError, UserError
from distill.models import hub

CARD = "---\nlibrary_name: transformers\n---\n\n# Mine\n"


@pytest.fixture
def model(tmp_path: Path, tiny_dir: Path) -> Path:
    folder = tmp_path / "model"
    folder.mkdir()
    for name in ("config.json", "model.safetensors", "tokenizer.json"):
        (folder / name).symlink_to(tiny_dir / name)
    (folder / "README.md").write_text(CARD)
    return folder


def alone(*arguments: str | Path, **env: str) -> subprocess.CompletedProcess[str]:
    """The command in a fresh process, with nothing imported but what it imports itself."""
    command = [sys.executable, "-m", "distill.cli", *map(str, arguments)]
    return subprocess.run(
        command, env={**os.environ, **env}, capture_output=True, text=True, timeout=300, stdin=subprocess.DEVNULL
    )


def test_a_model_arrives_whole_and_private(model: Path) -> None:
    with StubHub() as stub:
        done = alone("push", model, "me/small", **stub.environment())
        assert done.returncode == 0, done.stderr
        assert done.stdout.splitlines()[-1] == f"{stub.url}/me/small"
        repo = stub.repos["me/small"]
        assert (repo["visibility"], repo["kind"]) == ("private", "model")
        assert len(repo["commits"]) == 1
        assert repo["files"]["model.safetensors"] == (model / "model.safetensors").read_bytes()
        assert {"config.json", "tokenizer.json", "README.md"} <= repo["files"].keys()
        assert ModelCard(repo["files"]["README.md"].decode()).data.library_name == "transformers"


def test_traces_arrive_with_their_card_and_public_if_asked(tmp_path: Path) -> None:
    stored = samples.write(tmp_path / "traces", 12)
    with StubHub() as stub:
        command = ("traces", "push", stored, "me/sums", "--license", "mit", "--public")
        done = alone(*command, **stub.environment())
        assert done.returncode == 0, done.stderr
        assert done.stdout.splitlines()[-1] == f"{stub.url}/datasets/me/sums"
        repo = stub.repos["me/sums"]
        assert (repo["visibility"], repo["kind"]) == ("public", "dataset")
        for shard in stored.glob("*.parquet"):
            assert repo["files"][shard.name] == shard.read_bytes()
        assert DatasetCard(repo["files"]["README.md"].decode()).data.license == "mit"
    assert {path.name for path in tmp_path.iterdir()} == {"traces"}


def point(monkeypatch: pytest.MonkeyPatch, stub: StubHub, token: str = "hf_test") -> None:
    """Point the hub's library of this process to the stub."""
    import huggingface_hub.constants as constants

    monkeypatch.setattr(constants, "ENDPOINT", stub.url)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)
    monkeypatch.setattr("huggingface_hub.get_token", lambda: token or None)
    monkeypatch.setenv("HF_TOKEN", token)


def upload(model: Path, private: bool = True) -> str:
    return hub.upload(model, "me/small", kind="model", private=private, message="a test")


@pytest.mark.parametrize(
    ("refuses", "kind", "words"),
    [
        ({"create": 403, "models/me": 404}, UserError, "the token may not write to me/small"),
        ({"create": 404}, UserError, "the hub has no user or organisation me"),
        ({"commit": 403}, UserError, "the token may not write to me/small"),
        ({"commit": 409}, MachineError, "changed by somebody else at the same time. Run the same command again"),
        ({"commit": 500}, MachineError, "failed. Run the same command again later"),
    ],
)
def test_refusals(
    model: Path, monkeypatch: pytest.MonkeyPatch, refuses: dict[str, int], kind: type[UserError], words: str
) -> None:
    monkeypatch.setattr("time.sleep", lambda seconds: None)  # the library's waits between attempts
    with StubHub(**refuses) as stub:
        point(monkeypatch, stub)
        with pytest.raises(UserError, match=words) as raised:
            upload(model)
        assert type(raised.value) is kind
        assert str(next(iter(refuses.values()))) in str(raised.value)


def test_a_wrong_token_and_none_are_told_apart(model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with StubHub() as stub:
        point(monkeypatch, stub, "hf_wrong")
        with pytest.raises(UserError, match="does not accept the token"):
            upload(model)
        point(monkeypatch, stub, "")
        with pytest.raises(UserError, match="there is no token for the hub"):
            upload(model)
        assert stub.repos == {}


def test_a_public_repository_gets_nothing_unless_public_is_said(model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with StubHub() as stub:
        point(monkeypatch, stub)
        upload(model, private=False)
        assert len(stub.repos["me/small"]["commits"]) == 1
        with pytest.raises(UserError, match="exists on the hub and is public, so nothing was uploaded"):
            upload(model)
        upload(model, private=False)
        assert len(stub.repos["me/small"]["commits"]) == 2


def test_a_card_that_the_hub_does_not_take_is_said(model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with StubHub() as stub:
        point(monkeypatch, stub)
        stub.card_fault = '"license" must be one of the known ones'
        with pytest.raises(
            UserError, match=r'Invalid metadata in README\.md\. - "license" must be one of the known ones'
        ):
            upload(model)
        assert stub.cards[0] == {"content": CARD, "repoType": "model"}
        assert stub.repos["me/small"]["files"] == {}


def test_without_a_network_the_exit_status_says_so(model: Path) -> None:
    done = alone("push", model, "me/small", HF_ENDPOINT="http://127.0.0.1:9", HF_HUB_OFFLINE="0")
    assert done.returncode == MachineError.exit_status
    assert "error: push: the hub (http://127.0.0.1:9) cannot be reached (it does not answer)" in done.stderr
    assert "Traceback" not in done.stderr
