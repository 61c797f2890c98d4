"""What goes to the hub and comes back: the real client against a small server that speaks its language."""

from __future__ import annotations

import base64
import hashlib
import json
import re
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urlsplit

import huggingface_hub
import pytest
import torch
import transformers.utils.hub
import yaml
from click.testing import CliRunner
from datasets import Dataset
from huggingface_hub import ModelCard
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import AutoModelForCausalLM, AutoTokenizer
from trl import SFTConfig, SFTTrainer

import modq
from modq.cli import main
from modq.errors import CheckpointError
from modq.model import quantized_layers

IDS = torch.arange(4, 20)[None]


class Hub(ThreadingHTTPServer):
    """Repositories of small files, in memory: each commit is a mapping of all its files."""

    daemon_threads = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), _Requests)
        self.branches: dict[str, dict[str, str]] = {}
        self.commits: dict[str, dict[str, bytes]] = {}

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_port}"

    def files(self, repo: str, revision: str = "main") -> dict[str, bytes]:
        """Return the files of a revision."""
        return self.commits[self.branches[repo][revision]]

    def commit(self, repo: str, branch: str, files: dict[str, bytes]) -> str:
        oid = hashlib.sha1(repr((repo, branch, len(self.commits))).encode()).hexdigest()
        self.commits[oid] = files
        self.branches[repo][branch] = oid
        return oid


class _Requests(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: Hub

    def log_message(self, *args: Any) -> None:
        """Say nothing."""

    def do_GET(self) -> None:  # the base class calls it so
        path = unquote(urlsplit(self.path).path)
        if found := re.fullmatch(r"/api/models/(me/[^/]+)(?:/(revision|tree)/([^/]+)(?:/(.*))?)?", path):
            self._describe(*found.groups())
        elif found := re.fullmatch(r"/(me/[^/]+)/resolve/([^/]+)/(.+)", path):
            repo, revision, name = found.groups()
            files, headers = self._find(repo, revision)
            if files is not None:
                self._give(files, name, headers)
        else:
            self._answer(404, error="RepoNotFound")

    do_HEAD = do_GET  # noqa: N815

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers["Content-Length"]))
        path = unquote(self.path.partition("?")[0])
        if path == "/api/repos/create":
            repo = f"me/{json.loads(body)['name']}"
            known = repo in self.server.branches
            if not known:
                self.server.branches[repo] = {}
                self.server.commit(repo, "main", {".gitattributes": b""})
            self._answer(409 if known else 200, {"url": f"{self.server.url}/{repo}"})
        elif path == "/api/validate-yaml":
            errors = list(_errors(json.loads(body)["content"]))
            self._answer(400 if errors else 200, {"errors": errors, "warnings": []})
        else:
            repo, action, revision = re.fullmatch(r"/api/models/(me/[^/]+)/(\w+)/(.+)", path).groups()
            files, _ = self._find(repo, "main" if action == "branch" else revision)
            if files is not None:
                getattr(self, f"_{action}")(repo, revision, files, body)

    def _preupload(self, repo: str, revision: str, files: dict[str, bytes], body: bytes) -> None:
        wanted = json.loads(body)["files"]
        modes = [{"path": f["path"], "uploadMode": "regular", "shouldIgnore": False} for f in wanted]
        self._answer(200, {"files": modes})

    def _branch(self, repo: str, revision: str, files: dict[str, bytes], body: bytes) -> None:
        if revision not in self.server.branches[repo]:
            self.server.commit(repo, revision, files)
        self._answer(200, {})

    def _commit(self, repo: str, revision: str, files: dict[str, bytes], body: bytes) -> None:
        entries = [json.loads(line) for line in body.splitlines()]
        added = {
            e["value"]["path"]: base64.b64decode(e["value"]["content"]) for e in entries if e["key"] == "file"
        }
        oid = self.server.commit(repo, revision, {**files, **added})
        url = f"{self.server.url}/{repo}/commit/{oid}"
        self._answer(200, {"commitUrl": url, "commitOid": oid})

    def _describe(self, repo: str, what: str | None, revision: str | None, folder: str | None) -> None:
        files, headers = self._find(repo, revision or "main")
        if files is None:
            return
        if what == "tree":
            inside = {n: c for n, c in files.items() if n.startswith(f"{folder}/" if folder else "")}
            listed = [{"type": "file", "path": n, "size": len(c), "oid": _oid(c)} for n, c in inside.items()]
            _ = self._answer(200, listed) if listed else self._answer(404, error="EntryNotFound")
        else:
            self._answer(200, {"id": repo, "sha": headers["X-Repo-Commit"], "siblings": []})

    def _find(self, repo: str, revision: str) -> tuple[dict[str, bytes] | None, dict[str, str]]:
        branches = self.server.branches.get(repo)
        oid = (branches or {}).get(revision, revision)
        if oid in self.server.commits:
            return self.server.commits[oid], {"X-Repo-Commit": oid}
        self._answer(404, error="RepoNotFound" if branches is None else "RevisionNotFound")
        return None, {}

    def _give(self, files: dict[str, bytes], name: str, headers: dict[str, str]) -> None:
        if name in files:
            self._answer(200, files[name], {**headers, "ETag": f'"{_oid(files[name])}"'})
        else:
            self._answer(404, headers=headers, error="EntryNotFound")

    def _answer(
        self,
        status: int,
        content: Any = None,
        headers: dict[str, str] | None = None,
        error: str | None = None,
    ) -> None:
        body = content if isinstance(content, bytes) else json.dumps(content or {}).encode()
        self.send_response(status)
        errors = {"X-Error-Code": error} if error else {}
        for key, value in {**(headers or {}), **errors, "Content-Length": str(len(body))}.items():
            self.send_header(key, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)


def _oid(content: bytes) -> str:
    return hashlib.sha1(content).hexdigest()


def _errors(card: str) -> Iterator[dict[str, str]]:
    """What the hub finds wrong with a card's front matter; here, a base model that is a path."""
    data = yaml.safe_load(card.split("---\n")[1])
    named = data.get("base_model", [])
    for name in [named] if isinstance(named, str) else named:
        if not re.fullmatch(r"[\w.-]+(/[\w.-]+)?", name):
            yield {"message": f'"base_model" with value "{name}" is not valid. Use a model id.'}


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Hub]:
    """A hub that the client reaches, with a cache of its own."""
    server = Hub()
    constants = huggingface_hub.constants
    monkeypatch.setenv("HF_HUB_OFFLINE", "0")
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(constants, "ENDPOINT", server.url)
    template = f"{server.url}/{{repo_id}}/resolve/{{revision}}/{{filename}}"
    monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)
    monkeypatch.setattr(huggingface_hub.hf_api.api, "endpoint", server.url)
    monkeypatch.setattr(transformers.utils.hub, "_hf_api", None)
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    yield server
    server.shutdown()
    thread.join()
    server.server_close()
    huggingface_hub.close_session()
    transformers.utils.hub._hf_api = None


# Bases


def quantized(folder: str | Path, **options: Any) -> Any:
    config = modq.ModqConfig("nf4", **options)
    return AutoModelForCausalLM.from_pretrained(folder, quantization_config=config)


def adapted(model: Any) -> Any:
    config = LoraConfig(r=2, target_modules="all-linear", init_lora_weights=False)
    return get_peft_model(model, config)


def card_of(hub: Hub, repo: str) -> ModelCard:
    return ModelCard(hub.files(repo)["README.md"].decode())


@pytest.fixture
def base(hub: Hub, tiny_llama: Path) -> str:
    """A quantized base on the hub, with its tokenizer."""
    quantized(tiny_llama).push_to_hub("me/base")
    AutoTokenizer.from_pretrained(tiny_llama).push_to_hub("me/base")
    return "me/base"


def test_a_base_comes_back_bit_for_bit(hub: Hub, base: str, tiny_llama: Path) -> None:
    assert hub.files(base).keys() >= {"README.md", "config.json", "model.safetensors", "tokenizer.json"}
    expected, loaded = quantized(tiny_llama), AutoModelForCausalLM.from_pretrained(base)
    layers = dict(quantized_layers(loaded))
    assert len(layers) == 14
    for name, layer in quantized_layers(expected):
        for tensor_name, tensor in layer.named_packed():
            assert torch.equal(dict(layers[name].named_packed())[tensor_name], tensor), name
    assert torch.equal(loaded(IDS).logits, expected(IDS).logits)
    card = card_of(hub, base)
    assert card.data.tags == ["modq", "quantized", "nf4"]
    assert card.data.base_model is None  # the source is a folder, which the hub refuses
    assert card.data.pipeline_tag == "text-generation"
    assert "# me/base" in card.text
    assert 'from_pretrained("me/base")' in card.text
    assert "More Information Needed" not in card.text
    assert str(tiny_llama) not in str(card)


def test_what_a_user_wrote_into_a_card_stays(hub: Hub, base: str, tiny_llama: Path) -> None:
    files = hub.files(base)
    written = files["README.md"].replace(b"# me/base", b"# My base\n\nFor the union.")
    hub.commit(
        base, "main", {**files, "README.md": written.replace(b"tags:", b"license: mit\ntags:\n- mine")}
    )
    quantized(tiny_llama, block_size=32).push_to_hub(base)
    card = card_of(hub, base)
    assert card.text.count("## Quantization") == 1
    assert "# My base\n\nFor the union." in card.text
    assert "block_size=32" in card.text
    assert (card.data.license, card.data.tags[0]) == ("mit", "mine")


def test_saving_and_pushing_in_one_gives_the_same_card(
    hub: Hub, base: str, tiny_llama: Path, tmp_path
) -> None:
    quantized(tiny_llama).save_pretrained(tmp_path / "saved", push_to_hub=True, repo_id="me/other")
    expected = hub.files(base)["README.md"].replace(b"me/base", b"me/other")
    assert hub.files("me/other")["README.md"] == expected
    dense = AutoModelForCausalLM.from_pretrained(tiny_llama)
    dense.push_to_hub("me/dense")
    assert "modq" not in str(card_of(hub, "me/dense"))


def test_a_model_of_the_hub_is_named_as_what_was_quantized(hub: Hub, tiny_llama: Path) -> None:
    AutoModelForCausalLM.from_pretrained(tiny_llama).push_to_hub("me/dense")
    quantized("me/dense").push_to_hub("me/base")
    data = card_of(hub, "me/base").data.to_dict()
    assert (data["base_model"], data["base_model_relation"]) == ("me/dense", "quantized")


def test_commands_take_names_on_the_hub(base: str) -> None:
    result = CliRunner().invoke(main, ["inspect", base, "--json"])
    assert result.exit_code == 0, result.output
    assert '"nf4"' in result.output
    result = CliRunner().invoke(main, ["generate", base, "--prompt", "the union", "--max-new-tokens", "2"])
    assert result.exit_code == 0, result.output


# Adapters


def test_an_adapter_comes_back_and_knows_its_base(hub: Hub, base: str, tiny_llama: Path) -> None:
    model = adapted(AutoModelForCausalLM.from_pretrained(base)).eval()
    model.push_to_hub("me/adapter", tags=["mine"])
    assert json.loads(hub.files("me/adapter")["modq.json"])["base"]["source"]
    loaded = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), "me/adapter")
    assert torch.equal(loaded(IDS).logits, model(IDS).logits)
    loaded = AutoModelForCausalLM.from_pretrained("me/adapter")  # transformers finds the base by itself
    assert torch.equal(loaded(IDS).logits, model(IDS).logits)
    other = quantized(tiny_llama, block_size=32)
    with pytest.raises(CheckpointError, match="adapter 'me/adapter' was trained on another base"):
        PeftModel.from_pretrained(other, "me/adapter")
    with pytest.raises(CheckpointError, match="adapter 'me/adapter' was trained on another base"):
        other.load_adapter("me/adapter")
    card = card_of(hub, "me/adapter")
    assert (card.data.base_model, card.data.library_name) == (base, "peft")
    assert {"modq", "nf4", "lora", "mine", f"base_model:adapter:{base}"} <= set(card.data.tags)
    assert "## The base" in card.text


def test_the_side_file_is_that_of_the_revision_and_the_subfolder(
    hub: Hub, base: str, tiny_llama: Path
) -> None:
    """`main` has an adapter of another base, the branch and the subfolder have this base's."""
    adapted(quantized(tiny_llama, block_size=32)).push_to_hub("me/adapter")
    own = adapted(AutoModelForCausalLM.from_pretrained(base))
    own.push_to_hub("me/adapter", revision="v2")
    main, branch = hub.files("me/adapter"), hub.files("me/adapter", "v2")
    assert main["modq.json"] != branch["modq.json"]
    inside = {f"second/{name}": content for name, content in branch.items() if name != "README.md"}
    hub.commit("me/adapter", "main", {**main, **inside})

    for where in ({"revision": "v2"}, {"subfolder": "second"}):
        PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), "me/adapter", **where)
        AutoModelForCausalLM.from_pretrained(base).load_adapter("me/adapter", adapter_kwargs=where)
        with pytest.raises(CheckpointError, match="another base"):
            PeftModel.from_pretrained(quantized(tiny_llama, block_size=32), "me/adapter", **where)
    with pytest.raises(CheckpointError, match="another base"):
        PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), "me/adapter")


def test_an_adapter_without_the_side_file_loads_unchecked(hub: Hub, base: str, tiny_llama: Path) -> None:
    adapted(AutoModelForCausalLM.from_pretrained(base)).push_to_hub("me/adapter")
    files = hub.files("me/adapter")
    hub.commit("me/adapter", "main", {n: content for n, content in files.items() if n != "modq.json"})
    loaded = PeftModel.from_pretrained(quantized(tiny_llama, block_size=32), "me/adapter")
    assert "default" in loaded.peft_config


def test_a_base_in_a_folder_is_not_named_to_the_hub(hub: Hub, tiny_llama: Path) -> None:
    adapted(quantized(tiny_llama)).push_to_hub("me/adapter")
    card = card_of(hub, "me/adapter")
    assert (card.data.base_model, card.data.library_name) == (None, "peft")
    assert str(tiny_llama) not in str(card)


def test_an_adapter_of_transformers_own_is_pushed_whole(hub: Hub, base: str, tmp_path: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(base)
    model.add_adapter(LoraConfig(r=2, target_modules=["q_proj"]))
    model.push_to_hub("me/pushed")
    model.save_pretrained(tmp_path / "saved", push_to_hub=True, repo_id="me/saved")
    for repo in ("me/pushed", "me/saved"):
        assert hub.files(repo).keys() >= {"adapter_config.json", "modq.json"}
        assert (card_of(hub, repo).data.base_model, card_of(hub, repo).data.library_name) == (base, "peft")


def test_the_trainers_push_the_side_file_and_the_facts(hub: Hub, base: str, tmp_path: Path) -> None:
    trainer = SFTTrainer(
        model=AutoModelForCausalLM.from_pretrained(base),
        args=SFTConfig(
            str(tmp_path / "run"),
            max_steps=1,
            save_steps=1,
            report_to="none",
            use_cpu=True,
            push_to_hub=True,
            hub_model_id="me/trained",
        ),
        train_dataset=Dataset.from_list([{"text": "the union is strong"}] * 2),
        processing_class=AutoTokenizer.from_pretrained(base),
        peft_config=LoraConfig(r=2, target_modules="all-linear"),
    )
    trainer.train()
    trainer._finish_current_push()  # of the checkpoint
    assert hub.files("me/trained").keys() >= {"adapter_config.json", "modq.json"}
    trainer.push_to_hub()
    card = card_of(hub, "me/trained")
    assert (card.data.base_model, card.data.library_name) == (base, "peft")
    assert {"modq", "nf4", "sft", "trl"} <= set(card.data.tags)
    assert card.text.count("## The base") == 1
    assert "It has been trained using [TRL]" in card.text
    PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), "me/trained")
