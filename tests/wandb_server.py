"""As much of a W&B server as wandb asks while it records a run; it can be told to fail."""

import gzip
import json
import re
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any, Literal


class Server(ThreadingHTTPServer):
    """Keeps what each run was told, by its id."""

    daemon_threads = True
    block_on_close = False

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.runs: dict[str, dict[str, Any]] = {}
        self.broken: Literal["close", "hang"] | int | None = None
        self.requests = 0
        threading.Thread(target=self.serve_forever, daemon=True).start()

    @property
    def environment(self) -> dict[str, str]:
        """What a command needs to record here, without a word to any other server."""
        address = f"http://127.0.0.1:{self.server_address[1]}"
        return {"WANDB_BASE_URL": address, "WANDB_API_KEY": "x" * 40, "WANDB_MODE": "online", "no_proxy": "*"}

    def handle_error(self, *words: object) -> None:
        """That wandb hangs up on a server that hangs is what the test is about."""

    def rows(self, name: str) -> list[dict[str, Any]]:
        """A run's history, without wandb's own keys."""
        rows = [json.loads(line) for line in self.runs[name]["history"]]
        return [{key: value for key, value in row.items() if not key.startswith("_")} for row in rows]


class Handler(BaseHTTPRequestHandler):
    """GraphQL, and the stream of a run's files."""

    protocol_version = "HTTP/1.1"
    server: Server

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        self.server.requests += 1
        if self.server.broken == "hang":
            time.sleep(600)
        if self.server.broken == "close":
            self.close_connection = True
            return
        if isinstance(self.server.broken, int):
            self.answer(self.server.broken, {"error": "broken, as the test wants it"})
            return
        body = gzip.decompress(body) if self.headers.get("Content-Encoding") == "gzip" else body
        if self.path == "/graphql":
            asked = json.loads(body)
            operation = re.search(r"(?:query|mutation)\s+(\w+)", asked["query"])
            answer = getattr(self, operation[1] if operation else "", lambda **variables: {})
            self.answer(200, {"data": answer(**(asked.get("variables") or {}))})
        else:
            if self.path.endswith("/file_stream"):
                self.stream(self.path.split("/")[-2], json.loads(body))
            self.answer(200, {})

    do_GET = do_PUT = do_POST  # noqa: N815

    def answer(self, code: int, content: dict[str, Any]) -> None:
        data = json.dumps(content).encode()
        self.send_response(code)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)

    def log_message(self, *words: object) -> None:
        pass

    def Viewer(self, **variables: Any) -> dict[str, Any]:  # noqa: N802 (names of the protocol)
        return {"viewer": {"id": "1", "entity": "me", "username": "me", "flags": "{}", "teams": {"edges": []}}}

    GetDefaultEntity = Viewer

    def ServerFeaturesQuery(self, **variables: Any) -> dict[str, Any]:  # noqa: N802
        return {"serverInfo": {"features": []}}

    def RunResumeStatus(self, name: str, **variables: Any) -> dict[str, Any]:  # noqa: N802
        model: dict[str, Any] = {"id": "p", "name": "p", "entity": {"id": "1", "name": "me"}, "bucket": None}
        if (run := self.server.runs.get(name)) is not None:
            tail = json.dumps(run["history"][-1:])
            model["bucket"] = {"id": name, "name": name, "displayName": run["displayName"], "config": run["config"]}
            model["bucket"] |= {"summaryMetrics": "{}", "historyLineCount": len(run["history"]), "historyTail": tail}
            model["bucket"] |= {"logLineCount": 0, "eventsLineCount": 0, "eventsTail": "[]", "tags": [], "notes": None}
            model["bucket"]["wandbConfig"] = json.dumps({"t": 1})
        return {"model": model}

    def UpsertBucket(self, name: str, **variables: Any) -> dict[str, Any]:  # noqa: N802
        run = self.server.runs.setdefault(name, {"history": [], "summary": {}, "exit": None, "times": 0})
        run |= {key: value for key, value in variables.items() if value is not None or key not in run}
        run["times"] += 1
        project = {"id": "p", "name": variables["project"], "entity": {"id": "1", "name": "me"}}
        bucket = {"id": name, "name": name, "displayName": run["displayName"] or "fancy-tree-1", "config": "{}"}
        return {"upsertBucket": {"bucket": bucket | {"project": project, "historyLineCount": 0}, "inserted": True}}

    def Run(self, name: str, **variables: Any) -> dict[str, Any]:  # noqa: N802
        lines = len(self.server.runs[name]["history"])
        run = {"id": name, "name": name, "projectId": "1", "state": "finished", "historyLineCount": lines}
        run |= {"config": "{}", "summaryMetrics": "{}", "systemMetrics": "{}", "historyKeys": None, "user": {}}
        return {"project": {"run": run}}

    def CreateRunFiles(self, run: str, files: list[str], **variables: Any) -> dict[str, Any]:  # noqa: N802
        host = f"http://127.0.0.1:{self.server.server_address[1]}"
        answers = [{"name": file, "uploadUrl": f"{host}/upload/{run}/{file}"} for file in files]
        return {"createRunFiles": {"runID": run, "uploadHeaders": [], "files": answers}}

    def stream(self, name: str, content: dict[str, Any]) -> None:
        run = self.server.runs[name]
        for file, part in (content.get("files") or {}).items():
            if file == "wandb-history.jsonl":
                run["history"][part["offset"] :] = part["content"]
            elif file == "wandb-summary.json":
                run["summary"] = json.loads(part["content"][-1])
        if content.get("complete"):
            run["exit"] = content["exitcode"]
