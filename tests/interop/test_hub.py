"""A folder goes to the hub and comes back, by this library, timm and transformers, over HTTP on this machine."""

from __future__ import annotations

import base64
import hashlib
import http.server
import json
import os
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from cgh.interop import build_backbone, push_to_hub, save_pretrained

for package in ("huggingface_hub", "safetensors", "timm", "transformers"):
    pytest.importorskip(package)

COMMIT = 40 * "a"
TOKEN = "Bearer hf_none"


class Hub(http.server.ThreadingHTTPServer):
    """As much of the hub as uploads and downloads need: weights are kept in a store beside it, as the hub does."""

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.address = f"http://127.0.0.1:{self.server_port}"
        self.store = f"http://localhost:{self.server_port}/store"  # another host, as those who send tokens see it
        self.repositories: list[dict[str, Any]] = []
        self.files: dict[str, bytes] = {}  # of the repository, and weights by their digest
        self.digests: dict[str, str] = {}  # of the weights, by their place in the repository
        self.asked: set[str] = set()


class Handler(http.server.BaseHTTPRequestHandler):
    server: Hub

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers["Content-Length"]))
        if self.path == "/api/repos/create":
            self.server.repositories.append(json.loads(body))
            self.answer({"url": f"{self.server.address}/user/name"})
        elif self.path == "/api/validate-yaml":
            assert json.loads(body)["content"].startswith("---\nlibrary_name: timm\n")
            self.answer({"errors": [], "warnings": []})
        elif "/preupload/" in self.path:
            paths = [file["path"] for file in json.loads(body)["files"]]
            modes = {True: "lfs", False: "regular"}
            files = [
                {"path": path, "uploadMode": modes[path.endswith("safetensors")], "shouldIgnore": False, "oid": None}
                for path in paths
            ]
            self.answer({"files": files})
        elif self.path.endswith("/info/lfs/objects/batch"):
            actions = [
                {**file, "actions": {"upload": {"href": f"{self.server.store}/{file['oid']}"}}}
                for file in json.loads(body)["objects"]
            ]
            self.answer({"transfer": "basic", "objects": actions})
        elif "/commit/" in self.path:
            for line in map(json.loads, body.splitlines()):
                if line["key"] == "file":
                    self.server.files[line["value"]["path"]] = base64.b64decode(line["value"]["content"])
                elif line["key"] == "lfsFile":
                    self.server.digests[line["value"]["path"]] = line["value"]["oid"]
            self.answer({"commitUrl": f"{self.server.address}/user/name/commit/{COMMIT}", "commitOid": COMMIT})

    def do_PUT(self) -> None:
        self.server.files[self.path.rpartition("/")[2]] = self.rfile.read(int(self.headers["Content-Length"]))
        self.answer({})

    def do_GET(self) -> None:
        path, name = self.path.partition("?")[0], self.path.rpartition("/")[2]
        names = [*self.server.digests, *(name for name in self.server.files if "." in name)]
        if path.startswith("/store/"):
            assert "Authorization" not in self.headers
            self.answer(self.server.files[name])
        elif "/tree/" in path:
            self.answer([self.describe(name) for name in names])
        elif path.startswith("/api/models/user/name"):
            self.answer({"id": "user/name", "sha": COMMIT, "siblings": [{"rfilename": name} for name in names]})
        elif path.startswith("/user/name/resolve/") and name in names:
            assert self.headers["Authorization"] == TOKEN
            headers = {"X-Repo-Commit": COMMIT}
            self.server.asked.add(name)
            if name in self.server.digests:
                digest = self.server.digests[name]
                linked = {"X-Linked-Etag": f'"{digest}"', "X-Linked-Size": str(len(self.server.files[digest]))}
                self.answer(b"", 302, {"Location": f"{self.server.store}/{digest}", **headers, **linked})
            else:
                content = self.server.files[name]
                self.answer(content, headers={"ETag": f'"{hashlib.sha256(content).hexdigest()}"', **headers})
        else:
            kind = "EntryNotFound" if "user/name" in path else "RepoNotFound"
            self.answer({}, 404, {"X-Error-Code": kind, "X-Repo-Commit": COMMIT})

    def do_HEAD(self) -> None:
        self.do_GET()

    def describe(self, name: str) -> dict[str, Any]:
        digest = self.server.digests.get(name)
        content = self.server.files[digest or name]
        entry: dict[str, Any] = {"type": "file", "path": name, "size": len(content), "oid": 40 * "b"}
        return entry | ({"lfs": {"oid": digest, "size": len(content), "pointerSize": 134}} if digest else {})

    def answer(self, content: Any, status: int = 200, headers: dict[str, str] | None = None) -> None:
        content = content if isinstance(content, bytes) else json.dumps(content).encode()
        self.send_response(status)
        for name, value in {"Content-Length": str(len(content)), **(headers or {})}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(content)

    def log_message(self, *args: object) -> None: ...


@pytest.fixture
def hub() -> Iterator[Hub]:
    server = Hub()
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield server
    server.shutdown()
    server.server_close()


THERE_AND_BACK = """
import sys, timm, torch, transformers
from cgh.interop import from_pretrained, push_to_hub

folder = sys.argv[1]
push_to_hub(folder, "user/name", private=True)
images = torch.randn(2, 3, 32, 32)
expected = from_pretrained(folder).eval()(images)
for name in ("hf-hub:user/name", "hf-hub:user/name@main"):
    assert torch.equal(from_pretrained(name).eval()(images), expected)
assert from_pretrained("hf-hub:user/name", heads=True).dims == {"global": 8, "hypercolumn": 8}
theirs = timm.create_model("hf-hub:user/name", pretrained=True, num_classes=0).eval()
assert torch.equal(theirs(images), expected)
auto = transformers.AutoModel.from_pretrained("user/name").eval()
torch.testing.assert_close(auto(images).pooler_output, expected, rtol=1e-5, atol=1e-6)
try:
    from_pretrained("hf-hub:user/nobody")
except OSError as error:
    assert "user/nobody" in str(error), error
"""


def test_a_folder_goes_to_the_hub_and_comes_back(hub: Hub, tmp_path: Path) -> None:
    import cgh

    torch.manual_seed(0)
    backbone = build_backbone("timm/convnext_atto", image_size=32)
    model = cgh.CGH(backbone, ["stages.2", "stages.3"], dim=8, hidden_dim=8, memory_size=32, image_shape=(3, 32, 32))
    save_pretrained(model, tmp_path / "folder", image_size=32, heads=True)
    (tmp_path / "folder" / "notes.txt").write_text("mine")
    # Read when huggingface_hub is imported. Its own storage, Xet, speaks no plain HTTP: it falls back to Git LFS.
    settings = {"HF_ENDPOINT": hub.address, "HF_HOME": str(tmp_path / "cache"), "HF_TOKEN": "hf_none"}
    settings |= {"HF_HUB_DISABLE_XET": "1", "HF_HUB_DISABLE_PROGRESS_BARS": "1", "HF_HUB_OFFLINE": "0"}
    command = [sys.executable, "-c", THERE_AND_BACK, str(tmp_path / "folder")]
    done = subprocess.run(command, env={**os.environ, **settings}, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    (asked,) = hub.repositories
    assert asked["name"] == "name"
    assert asked.get("private") or asked.get("visibility") == "private"  # by the version of huggingface_hub
    assert {name for name in hub.files if "." in name} == {"config.json", "README.md"}
    assert hub.digests.keys() == {"model.safetensors", "heads.safetensors"}
    weights = (tmp_path / "folder" / "model.safetensors").read_bytes()
    assert hub.digests["model.safetensors"] == hashlib.sha256(weights).hexdigest()
    assert hub.files[hub.digests["model.safetensors"]] == weights
    assert hub.asked >= {"config.json", "model.safetensors", "heads.safetensors"}
    assert "README.md" not in hub.asked, "only what is read comes back"


def test_a_folder_without_a_model_is_not_sent(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"no config\.json"):
        push_to_hub(tmp_path, "user/name")
