"""A stand-in of the Hugging Face hub's API on this machine, as far as bundles and models need it: one branch,
files in commits (large ones by LFS), and downloads. What is stored lies in `Hub.repos`.
"""

import base64
import contextlib
import hashlib
import json
import socket
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass, field

import uvicorn
from fastapi import FastAPI, Request, Response
from fastapi.responses import JSONResponse

LARGE = (".onnx", ".data")


@dataclass
class Hub:
    """`repos`: name -> path -> content, all in one commit."""

    repos: dict[str, dict[str, bytes]] = field(default_factory=dict)
    blobs: dict[str, bytes] = field(default_factory=dict)
    large: set[str] = field(default_factory=set)
    endpoint: str = ""

    def revision(self, name: str) -> str:
        """The commit's hash."""
        parts = [path.encode() + content for path, content in sorted(self.repos[name].items())]
        return hashlib.sha1(b"".join(parts)).hexdigest()

    def app(self) -> FastAPI:
        app = FastAPI()

        @app.post("/api/repos/create")
        async def create(request: Request) -> Response:
            body = await request.json()
            name = f"{body['organization']}/{body['name']}" if body.get("organization") else body["name"]
            if name in self.repos:
                return JSONResponse({"error": "exists", "url": f"{self.endpoint}/{name}"}, 409)
            self.repos[name] = {}
            return JSONResponse({"url": f"{self.endpoint}/{name}"})

        @app.post("/api/validate-yaml")
        async def validate() -> dict[str, list[str]]:
            return {"errors": [], "warnings": []}

        @app.post("/api/models/{owner}/{name}/preupload/main")
        async def preupload(request: Request) -> dict[str, object]:
            files = (await request.json())["files"]
            modes = {file["path"]: "lfs" if file["path"].endswith(LARGE) else "regular" for file in files}
            found = [
                {"path": path, "uploadMode": mode, "shouldIgnore": False, "oid": None}
                for path, mode in modes.items()
            ]
            return {"files": found}

        @app.post("/{owner}/{name}.git/info/lfs/objects/batch")
        async def batch(request: Request) -> Response:
            objects = [
                {**item, "actions": {"upload": {"href": f"{self.endpoint}/blobs/{item['oid']}"}}}
                for item in (await request.json())["objects"]
            ]
            return JSONResponse({"transfer": "basic", "objects": objects})

        @app.put("/blobs/{oid}")
        async def upload(oid: str, request: Request) -> Response:
            content = await request.body()
            assert hashlib.sha256(content).hexdigest() == oid
            self.blobs[oid] = content
            return Response()

        @app.post("/api/models/{owner}/{name}/commit/main")
        async def commit(owner: str, name: str, request: Request) -> Response:
            repo = self.repos[f"{owner}/{name}"]
            for line in (await request.body()).splitlines():
                entry = json.loads(line)
                value = entry["value"]
                if entry["key"] == "file":
                    repo[value["path"]] = base64.b64decode(value["content"])
                elif entry["key"] == "lfsFile":
                    repo[value["path"]] = self.blobs[value["oid"]]
                    self.large.add(value["path"])
            revision = self.revision(f"{owner}/{name}")
            url = f"{self.endpoint}/{owner}/{name}/commit/{revision}"
            return JSONResponse({"commitUrl": url, "commitOid": revision, "pullRequestUrl": None})

        @app.get("/api/models/{owner}/{name}/revision/{revision}")
        async def info(owner: str, name: str) -> Response:
            repo = self.repos.get(f"{owner}/{name}")
            if repo is None:
                return self.unknown()
            files = [{"rfilename": path} for path in repo]
            return JSONResponse(
                {"id": f"{owner}/{name}", "sha": self.revision(f"{owner}/{name}"), "siblings": files}
            )

        @app.get("/api/models/{owner}/{name}/tree/{revision}")
        async def tree(owner: str, name: str) -> Response:
            files = [
                {"type": "file", "path": path, "size": len(content), "oid": hashlib.sha1(content).hexdigest()}
                for path, content in self.repos[f"{owner}/{name}"].items()
            ]
            return JSONResponse(files)

        @app.api_route("/{owner}/{name}/resolve/{revision}/{path:path}", methods=["GET", "HEAD"])
        async def resolve(owner: str, name: str, path: str, request: Request) -> Response:
            repo = self.repos.get(f"{owner}/{name}")
            if repo is None:
                return self.unknown()
            if path not in repo:
                return Response(status_code=404, headers={"X-Error-Code": "EntryNotFound"})
            content = repo[path]
            tag = hashlib.sha256(content).hexdigest()
            headers = {"ETag": f'"{tag}"', "X-Repo-Commit": self.revision(f"{owner}/{name}")}
            if request.method == "HEAD":
                return Response(headers={**headers, "Content-Length": str(len(content))})
            return Response(content, headers=headers, media_type="application/octet-stream")

        return app

    def unknown(self) -> Response:
        return JSONResponse({"error": "not found"}, 404, {"X-Error-Code": "RepoNotFound"})


@contextlib.contextmanager
def running_hub() -> Iterator[Hub]:
    """A hub with nothing in it, on a port of its own."""
    hub = Hub()
    listener = socket.create_server(("127.0.0.1", 0))
    hub.endpoint = f"http://127.0.0.1:{listener.getsockname()[1]}"
    server = uvicorn.Server(uvicorn.Config(hub.app(), log_level="error"))
    thread = threading.Thread(target=server.run, kwargs={"sockets": [listener]}, daemon=True)
    thread.start()
    while not server.started:
        time.sleep(0.01)
    try:
        yield hub
    finally:
        server.should_exit = True
        thread.join()
