"""A Hub of one's own, as a program: the HTTP interface by which huggingface_hub uploads models.

`python -m tests.training.stand_in_hub FOLDER` prints its address. In FOLDER it keeps
`OWNER/NAME/FILE` of its models, `requests.jsonl` of what it was asked, and reads `rules.json` again
for every request: `{"role": "read"}` of the token, `{"fail": {"/commit/": 500}}` for paths,
`{"silent": true}`. Takes files by LFS and by xet: of xet, whose blocks it does not decode, it wants
the SHA-256 of every file in what was uploaded.
"""

from __future__ import annotations

import base64
import contextlib
import hashlib
import json
import sys
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from tests.training.hub_metadata import errors_in

TOKEN = "hf_oneThatMayWrite"
USER, CLUB = "me", "club"
LARGE = (".safetensors", ".png", ".gguf")


class Hub(ThreadingHTTPServer):
    daemon_threads = True

    def __init__(self, folder: Path) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.folder = folder
        self.address = f"http://127.0.0.1:{self.server_address[1]}"
        self.objects: dict[str, bytes] = {}  # by LFS, under their SHA-256
        self.xet: list[bytes] = []  # what came by xet

    def rules(self) -> dict[str, Any]:
        file = self.folder / "rules.json"
        return json.loads(file.read_text()) if file.exists() else {}

    def has(self, sha256: str) -> bool:
        """Whether the content of a large file has come."""
        plain = bytes.fromhex(sha256)  # xet writes hashes as four numbers of 64 bits
        words = b"".join(plain[at : at + 8][::-1] for at in range(0, 32, 8))
        return sha256 in self.objects or any(plain in one or words in one for one in self.xet)


class Handler(BaseHTTPRequestHandler):
    server: Hub
    protocol_version = "HTTP/1.1"

    def do_GET(self) -> None:
        self.answer()

    do_POST = do_PUT = do_HEAD = do_GET

    def answer(self) -> None:
        path = urlsplit(self.path).path
        body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        if self.headers.get("Transfer-Encoding") == "chunked":
            body = b"".join(iter(self.chunk, b""))
        with (self.server.folder / "requests.jsonl").open("a") as log:
            log.write(json.dumps([self.command, path]) + "\n")
        rules = self.server.rules()
        if rules.get("silent"):
            time.sleep(3600)
        for part, status in rules.get("fail", {}).items():
            if part in path:
                said = self.headers.get("Authorization", "nothing")
                self.send(status, {"error": f"no luck with {said}"})
                return
        is_ours = self.headers.get("Authorization") == f"Bearer {TOKEN}"
        if path.startswith("/api/") and not is_ours:
            wrong = "Invalid credentials in Authorization header"
            self.send(401, {"error": wrong}, {"X-Error-Message": wrong})
            return
        words = path.strip("/").split("/")
        for known in (self.of_user, self.of_model, self.of_lfs, self.of_xet):
            if known(words, body):
                return
        self.send(404, {"error": f"{self.command} {path} is unknown here"})

    def chunk(self) -> bytes:
        content = self.rfile.read(int(self.rfile.readline(), 16))
        self.rfile.readline()
        return content

    def send(self, status: int, content: Any, headers: dict[str, str] | None = None) -> None:
        body = json.dumps(content).encode()
        self.send_response(status)
        for name, value in {**(headers or {}), "Content-Type": "application/json"}.items():
            self.send_header(name, value)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def of_user(self, words: list[str], body: bytes) -> bool:
        match words:
            case ["api", "whoami-v2"]:
                token = {"role": self.server.rules().get("role", "write"), "displayName": "home"}
                me = {"type": "user", "name": USER, "orgs": [{"name": CLUB}]}
                self.send(200, {**me, "auth": {"accessToken": token}})
            case ["api", "repos", "create"]:
                asked = json.loads(body)
                owner = asked.get("organization") or USER
                if owner not in (USER, CLUB):
                    self.send(403, {"error": f"You don't have the rights to create in {owner}"})
                    return True
                folder = self.server.folder / owner / asked["name"]
                is_new = not folder.exists()
                folder.mkdir(parents=True, exist_ok=True)
                if is_new:
                    is_private = asked.get("private") or asked.get("visibility") == "private"
                    (folder / ".gitattributes").write_text("private" if is_private else "public")
                url = f"{self.server.address}/{owner}/{asked['name']}"
                self.send(200 if is_new else 409, {"url": url, "name": f"{owner}/{asked['name']}"})
            case ["api", "validate-yaml"]:
                errors = [{"message": one} for one in errors_in(json.loads(body)["content"])]
                self.send(400 if errors else 200, {"errors": errors, "warnings": []})
            case _:
                return False
        return True

    def of_model(self, words: list[str], body: bytes) -> bool:
        if words[:2] != ["api", "models"] or len(words) < 4:
            return False
        name, folder = "/".join(words[2:4]), self.server.folder / words[2] / words[3]
        if not folder.is_dir():
            self.send(404, {"error": "Repository not found"}, {"X-Error-Code": "RepoNotFound"})
            return True
        match words[4:]:
            case [] | ["revision", _]:
                files = sorted(path.name for path in folder.iterdir())
                is_private = (folder / ".gitattributes").read_text() == "private"
                about = {"id": name, "sha": "0" * 40, "private": is_private, "tags": []}
                about["siblings"] = [{"rfilename": file} for file in files]
                self.send(200, about)
            case ["preupload", "main"]:
                files = json.loads(body)["files"]
                modes = [
                    {
                        "path": file["path"],
                        "uploadMode": "lfs" if file["path"].endswith(LARGE) else "regular",
                        "shouldIgnore": False,
                    }
                    for file in files
                ]
                self.send(200, {"files": modes})
            case ["commit", "main"]:
                self.commit(folder, [json.loads(line) for line in body.splitlines()])
            case ["xet-write-token", "main"]:
                token = {"casUrl": self.server.address, "accessToken": "xet", "exp": 2**33}
                headers = {"X-Xet-Cas-Url": token["casUrl"], "X-Xet-Access-Token": "xet"}
                self.send(200, token, {**headers, "X-Xet-Token-Expiration": str(token["exp"])})
            case _:
                return False
        return True

    def commit(self, folder: Path, lines: list[dict[str, Any]]) -> None:
        for line in lines:
            value = line["value"]
            if line["key"] == "file":
                (folder / value["path"]).write_bytes(base64.b64decode(value["content"]))
            if line["key"] == "deletedFile":
                (folder / value["path"]).unlink()
            if line["key"] == "lfsFile":
                if not self.server.has(value["oid"]):
                    self.send(400, {"error": f"{value['path']} has not come"})
                    return
                content = self.server.objects.get(value["oid"])
                (folder / value["path"]).write_bytes(content or value["oid"].encode())
        summary = lines[0]["value"]["summary"]
        with (self.server.folder / "commits.txt").open("a") as log:
            log.write(f"{summary}\n")
        url = f"{self.server.address}/{folder.parent.name}/{folder.name}/commit/{'1' * 40}"
        self.send(200, {"success": True, "commitOid": "1" * 40, "commitUrl": url})

    def of_lfs(self, words: list[str], body: bytes) -> bool:
        if words[-4:] == ["info", "lfs", "objects", "batch"]:
            answers = []
            for asked in json.loads(body)["objects"]:
                href = f"{self.server.address}/lfs/{asked['oid']}"
                answers.append({**asked, "actions": {"upload": {"href": href}}})
            self.send(200, {"transfer": "basic", "objects": answers})
        elif words[0] == "lfs" and self.command == "PUT":
            assert hashlib.sha256(body).hexdigest() == words[1]
            self.server.objects[words[1]] = body
            self.send(200, {})
        else:
            return False
        return True

    def of_xet(self, words: list[str], body: bytes) -> bool:
        words = words[1:] if words[0] == "v1" else []
        if words[:1] == ["xorbs"]:
            self.server.xet.append(body)
            self.send(200, {"was_inserted": True})
        elif words[:1] == ["shards"]:
            self.server.xet.append(body)
            self.send(200, {"result": 1})
        else:
            return False
        return True

    def log_message(self, *_: object) -> None:
        pass


if __name__ == "__main__":
    hub = Hub(Path(sys.argv[1]))
    print(hub.address, flush=True)
    with contextlib.suppress(KeyboardInterrupt):
        hub.serve_forever()
