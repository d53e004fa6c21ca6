"""W&B's server as far as its own SDK needs it here: runs, pictures, artifacts, sweeps, saved views, the public API.

A method of Operations has the name of a GraphQL operation and gets its variables; what it returns is a superset of what
any client asks for, so that no query needs to be read. `wandb_server.serve()` listens on a port of this machine.
"""
# ruff: noqa: N802, N803, N815 (the names are those of W&B)

import gzip
import itertools
import json
import os
import re
import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest

ENTITY = "me"
Answer = dict[str, Any]


@dataclass
class Run:
    """What the server knows of a run."""

    entity: str
    project: str
    id: str
    about: Answer = field(default_factory=dict)  # displayName, group, jobType, tags, notes, sweepName, ...
    state: str = "running"
    config: Answer = field(default_factory=dict)
    summary: Answer = field(default_factory=dict)
    history: list[str] = field(default_factory=list)  # JSON, a row each
    events: list[str] = field(default_factory=list)
    files: dict[str, bytes] = field(default_factory=dict)
    used: list[str] = field(default_factory=list)  # artifacts
    preempting: bool = False

    @property
    def rows(self) -> list[Answer]:
        return [json.loads(line) for line in self.history]

    def values(self) -> Answer:
        """The config without the server's wrapping, and without what the SDK says of itself."""
        return {key: item["value"] for key, item in self.config.items() if key != "_wandb"}

    def get(self, path: str) -> Any:
        """What a filter calls `path`, None where there is no such thing."""
        head, *rest = path.split(".")
        names = {"display_name": "displayName", "job_type": "jobType", "sweep": "sweepName"}
        own = {"name": self.id, "state": self.state, "config": self.config, "summary_metrics": self.summary}
        found: Any = own.get(head, self.about.get(names.get(head, head)))
        while rest:  # the keys themselves may have dots
            key = ".".join(rest)
            for cut in range(len(rest), 0, -1):
                key = ".".join(rest[:cut])
                if isinstance(found, dict) and key in found:
                    break
            found = found.get(key) if isinstance(found, dict) else None
            rest = rest[cut:]
        return found

    def view(self, url: str) -> Answer:
        files = [
            {"node": {"id": name, "name": name, "url": f"{url}/storage/{self.key}/{name}", "sizeBytes": len(content)}
             | {"directUrl": f"{url}/storage/{self.key}/{name}", "mimetype": "", "md5": "", "updatedAt": DATE},
             "cursor": name}
            for name, content in self.files.items()
        ]  # fmt: skip
        keys = {key for row in self.rows for key in row}
        return {
            "id": f"Run:{self.key}", "name": self.id, "displayName": self.id, "tags": [], "state": self.state,
            "config": json.dumps(self.config), "summaryMetrics": json.dumps(self.summary), "systemMetrics": "{}",
            "historyLineCount": len(self.history), "eventsLineCount": len(self.events), "logLineCount": 0,
            "historyTail": json.dumps(self.history[-1:]), "eventsTail": json.dumps(self.events[-1:]),
            "historyKeys": {"lastStep": max((row["_step"] for row in self.rows), default=-1),
                            "keys": {key: {"typeCounts": [{"type": "number", "count": 1}]} for key in keys}},
            "wandbConfig": json.dumps({"t": self.config.get("_wandb", {}).get("value", {}).get("t", {})}),
            "project": _project(self.entity, self.project), "projectId": "1", "readOnly": False, "stopped": False,
            "createdAt": DATE, "heartbeatAt": DATE, "user": {"name": ENTITY, "username": ENTITY},
            "fileCount": len(files), "files": _edges(files),
        } | self.about  # fmt: skip

    @property
    def key(self) -> str:
        return f"{self.entity}/{self.project}/{self.id}"


DATE = "2020-01-01T00:00:00Z"


def _project(entity: str, project: str) -> Answer:
    return {"id": "1", "internalId": "1", "name": project, "entity": {"id": "1", "name": entity}, "readOnly": False}


def _edges(edges: list[Answer]) -> Answer:
    return {"edges": edges, "pageInfo": {"endCursor": None, "hasNextPage": False}}


@dataclass
class Operations:
    """The state of the server, and what each operation does with it."""

    url: str = ""
    runs: dict[str, Run] = field(default_factory=dict)  # by entity/project/id
    artifacts: list[Answer] = field(default_factory=list)
    stored: dict[str, bytes] = field(default_factory=dict)  # files of artifacts
    views: list[Answer] = field(default_factory=list)
    sweeps: dict[str, Answer] = field(default_factory=dict)
    asked: list[str] = field(default_factory=list)  # operations, in their order
    failures: list[int] = field(default_factory=list)  # statuses to answer with next

    def run(self, id: str) -> Run:
        (found,) = [run for run in self.runs.values() if run.id == id]
        return found

    def _run(self, entity: str | None, project: str | None, id: str) -> Run | None:
        return self.runs.get(f"{entity or ENTITY}/{project}/{id}")

    def _in_project(self, project: str, entity: str | None, **found: Any) -> Answer:
        return {"project": _project(entity or ENTITY, project) | found}

    # Runs

    def Viewer(self, **_: Any) -> Answer:
        teams = _edges([{"node": {"name": ENTITY}}])
        return {"viewer": {"id": "1", "entity": ENTITY, "username": ENTITY, "email": "", "flags": "{}", "teams": teams}}

    GetDefaultEntity = Viewer

    def OrganizationCoreWeaveOrganizationID(self, **_: Any) -> Answer:
        return {"entity": {"organization": None}}

    def GetProjects(self, entity: str, **_: Any) -> Answer:
        found = sorted({run.project for run in self.runs.values() if run.entity == entity})
        about = {"entityName": entity, "createdAt": DATE, "isBenchmark": False, "user": None}
        return {"models": _edges([{"node": _project(entity, project) | about} for project in found])}

    def RunResumeStatus(self, project: str, name: str, entity: str | None = None) -> Answer:
        run = self._run(entity, project, name)
        return {"model": _project(entity or ENTITY, project) | {"bucket": run and run.view(self.url)}}

    def UpsertBucket(self, **given: Any) -> Answer:
        if "name" in given:
            entity = given.get("entity") or ENTITY
            key = f"{entity}/{given['project']}/{given['name']}"
            new = key not in self.runs
            run = self.runs.setdefault(key, Run(entity, given["project"], given["name"]))
        else:
            new, run = False, self.runs[given["id"].removeprefix("Run:")]
        names = {"groupName": "group", "sweep": "sweepName"}
        kept = ("displayName", "groupName", "jobType", "tags", "notes", "sweep", "commit")
        run.about |= {names.get(key, key): given[key] for key in kept if given.get(key) is not None}
        if given.get("config"):
            run.config = json.loads(given["config"])
        if given.get("summaryMetrics"):
            run.summary |= json.loads(given["summaryMetrics"])
        run.state = given.get("state") or run.state
        return {"upsertBucket": {"bucket": run.view(self.url), "inserted": new}}

    def stream(self, key: str, body: Answer) -> Answer:
        """Rows of a run as they come, each file's from its own offset on."""
        run = self.runs[key]
        for name, part in (body.get("files") or {}).items():
            start, lines = part.get("offset", 0), part["content"]
            if name == "wandb-summary.json":
                run.summary = json.loads(lines[-1])
            elif name in ("wandb-history.jsonl", "wandb-events.jsonl"):
                kept = run.history if "history" in name else run.events
                kept[start : start + len(lines)] = lines
        run.preempting |= bool(body.get("preempting"))
        run.state = "preempting" if run.preempting else "running"
        if body.get("complete"):
            failed = "preempted" if run.preempting else "failed"
            run.state, run.preempting = failed if body.get("exitcode") else "finished", False
        return {"exitcode": None, "limits": {}}

    def CreateRunFiles(self, entity: str, project: str, run: str, files: list[str]) -> Answer:
        urls = [{"name": name, "uploadUrl": f"{self.url}/storage/{entity}/{project}/{run}/{name}"} for name in files]
        return {"createRunFiles": {"runID": run, "uploadHeaders": [], "files": urls}}

    def MarkRunFilesUploaded(self, **_: Any) -> Answer:
        return {"markRunFilesUploaded": {"success": True}}

    # The public API

    def Runs(self, project: str, entity: str | None = None, **given: Any) -> Answer:
        chosen = json.loads(given.get("filters") or "{}")
        found = [run for run in self.runs.values() if (run.entity, run.project) == (entity or ENTITY, project)]
        found = [run for run in found if matches(run.get, chosen)]
        if (given.get("order") or "-").startswith("-"):
            found.reverse()
        edges = [{"node": run.view(self.url), "cursor": run.id} for run in found]
        return self._in_project(project, entity, runCount=len(found), runs=_edges(edges))

    def Run(self, project: str, name: str, entity: str | None = None, **_: Any) -> Answer:
        run = self._run(entity, project, name)
        return self._in_project(project, entity, run=run and run.view(self.url))

    RunFiles = RunHistoryKeys = Run

    def RunSampledHistory(self, project: str, name: str, specs: list[str], entity: str | None = None) -> Answer:
        run = self._run(entity, project, name)
        sampled = []
        for keys in [json.loads(spec)["keys"] for spec in specs]:
            sampled.append([{key: row[key] for key in keys} for row in run.rows if set(keys) <= row.keys()])
        return self._in_project(project, entity, run={"sampledHistory": sampled})

    def RunParquetHistory(self, project: str, runName: str, entity: str, **_: Any) -> Answer:
        live = self._run(entity, project, runName).rows
        return self._in_project(project, entity, run={"parquetHistory": {"parquetUrls": [], "liveData": live}})

    def HistoryPage(self, project: str, run: str, minStep: int, maxStep: int, entity: str, **_: Any) -> Answer:
        lines = self._run(entity, project, run).history
        page = [line for line in lines if minStep <= json.loads(line)["_step"] < maxStep]
        return self._in_project(project, entity, run={"history": page})

    # Saved views

    def UpsertView2(self, **given: Any) -> Answer:
        view = given | {"id": given.get("id") or f"view{len(self.views)}"}
        self.views = [other for other in self.views if other["id"] != view["id"]] + [view]
        return {"upsertView": {"view": view, "inserted": True}}

    upsertView = UpsertView2

    def View(self, entityName: str, name: str, viewName: str, **_: Any) -> Answer:
        found = [{"node": view} for view in self.views if viewName in (view["name"], view["displayName"])]
        return self._in_project(name, entityName, allViews=_edges(found))

    # Sweeps: a grid, whose runs are handed out one after the other

    def UpsertSweep(self, **given: Any) -> Answer:
        import yaml

        if given.get("id"):
            return {"upsertSweep": {"sweep": self.sweeps[given["id"]]}}
        config = yaml.safe_load(given["config"])
        axes = {key: axis.get("values", [axis.get("value")]) for key, axis in config["parameters"].items()}
        grid = [dict(zip(axes, point, strict=True)) for point in itertools.product(*axes.values())]
        name = f"sweep{len(self.sweeps)}"
        self.sweeps[name] = {
            "id": name, "name": name, "config": given["config"], "state": "RUNNING", "runs": _edges([]),
            "project": _project(ENTITY, given["projectName"]), "left": grid, "program": config.get("program"),
        }  # fmt: skip
        return {"upsertSweep": {"sweep": self.sweeps[name], "configValidationWarnings": []}}

    def SweepWithRuns(self, project: str, sweep: str, entity: str | None = None, **_: Any) -> Answer:
        return self._in_project(project, entity, sweep=self.sweeps[sweep])

    def CreateAgent(self, sweep: str, **_: Any) -> Answer:
        return {"createAgent": {"agent": {"id": sweep}}}

    def Heartbeat(self, id: str, runState: str, **_: Any) -> Answer:
        sweep, commands = self.sweeps[id], []
        if not json.loads(runState):
            commands = [{"type": "exit"}]
            if sweep["left"]:
                args = {key: {"value": value} for key, value in sweep["left"].pop(0).items()}
                run = f"{id}-{len(sweep['left'])}"
                commands = [{"type": "run", "run_id": run, "program": sweep["program"], "args": args}]
        return {"agentHeartbeat": {"agent": {"id": id}, "commands": json.dumps(commands)}}

    # Artifacts

    def ClientIDMapping(self, clientID: str) -> Answer:
        ids = [number for number, found in enumerate(self.artifacts) if found["clientID"] == clientID]
        return {"clientIDMapping": {"serverID": str(ids[0])} if ids else None}

    def CreateArtifact(self, input: Answer) -> Answer:
        known = [(_name(found), found["digest"]) for found in self.artifacts]
        if (_name(input), input["digest"]) not in known:  # else it is that version
            known.append((_name(input), input["digest"]))
            self.artifacts.append(input | {"state": "PENDING"})
        number = known.index((_name(input), input["digest"]))
        found = {"id": str(number), "state": self.artifacts[number]["state"]}
        return {"createArtifact": {"artifact": found | {"artifactSequence": {"latestArtifact": None}}}}

    def CreateArtifactManifest(self, artifactID: str, **_: Any) -> Answer:
        url = f"{self.url}/storage/artifact/{artifactID}/manifest.json"
        file = {"id": artifactID, "uploadUrl": url, "uploadHeaders": []}
        return {"createArtifactManifest": {"artifactManifest": {"id": artifactID, "file": file}}}

    def UpdateArtifactManifest(self, artifactManifestID: str, **_: Any) -> Answer:
        return {"updateArtifactManifest": self.CreateArtifactManifest(artifactManifestID)["createArtifactManifest"]}

    def CreateArtifactFiles(self, input: Answer) -> Answer:
        def place(file: Answer) -> Answer:
            url = f"{self.url}/storage/artifact/{file['artifactID']}/{file['name']}"
            about = {"uploadUrl": url, "uploadHeaders": [], "uploadMultipartUrls": None}
            return {"storagePath": file["name"], "artifact": {"id": file["artifactID"]}} | about

        files = [{"node": place(file)} for file in input["artifactFiles"]]
        return {"createArtifactFiles": {"files": _edges(files)}}

    def CommitArtifact(self, artifactID: str) -> Answer:
        artifact = self.artifacts[int(artifactID)]
        artifact["state"] = "COMMITTED"
        return {"commitArtifact": {"artifact": {"id": artifactID, "digest": artifact["digest"]}}}

    def UseArtifact(self, input: Answer) -> Answer:
        run = self._run(input["entityName"], input["projectName"], input["runName"])
        run.used.append(_name(self.artifacts[int(input["artifactID"])]))
        return {"useArtifact": {"artifact": {"id": input["artifactID"]}}}

    def manifest(self, name: str) -> Answer:
        """The entries of the newest artifact called `name`."""
        (*_, number) = [number for number, found in enumerate(self.artifacts) if _name(found) == name]
        return json.loads(self.stored[f"{number}/manifest.json"])["contents"]


def _name(artifact: Answer) -> str:
    return (artifact.get("artifactCollectionNames") or [artifact["artifactCollectionName"]])[0]


COMPARE: dict[str, Callable[[Any, Any], bool]] = {
    "$eq": lambda found, asked: found == asked,
    "$ne": lambda found, asked: found != asked,
    "$in": lambda found, asked: bool(set(found if isinstance(found, list) else [found]) & set(asked)),
    "$gt": lambda found, asked: found is not None and found > asked,
    "$gte": lambda found, asked: found is not None and found >= asked,
    "$lt": lambda found, asked: found is not None and found < asked,
    "$lte": lambda found, asked: found is not None and found <= asked,
    "$regex": lambda found, asked: re.search(asked, found or "") is not None,
}


def matches(get: Callable[[str], Any], filters: Mapping[str, Any]) -> bool:
    """Whether a run is what MongoDB's language of filters describes, as far as it is spoken here."""
    for key, asked in filters.items():
        if key in ("$and", "$or"):
            fits = (all if key == "$and" else any)(matches(get, part) for part in asked)
        else:
            comparisons = asked if isinstance(asked, dict) else {"$eq": asked}
            fits = all(COMPARE[name](get(key), value) for name, value in comparisons.items())
        if not fits:
            return False
    return True


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: "_Server"

    def do_POST(self) -> None:
        body, state = json.loads(self._body() or b"{}"), self.server.state
        with self.server.lock:
            if state.failures:
                self._send(state.failures.pop(0), {"error": "injected"})
            elif self.path.endswith("/file_stream"):
                state.asked.append("file_stream")
                self._send(200, state.stream("/".join(self.path.strip("/").split("/")[1:4]), body))
            else:
                self._send(200, self._operation(body))

    def _operation(self, body: Answer) -> Answer:
        found = re.search(r"(?:query|mutation)\s+(\w+)", body["query"])
        name = found[1] if found else body["query"]
        self.server.state.asked.append(name)
        if not hasattr(Operations, name):
            return {"errors": [{"message": f"this server knows no {name}"}]}
        return {"data": getattr(self.server.state, name)(**(body.get("variables") or {}))}

    def do_PUT(self) -> None:
        content, state = self._body(), self.server.state
        _, place, *rest = self.path.partition("?")[0].strip("/").split("/")
        with self.server.lock:
            if place == "artifact":
                state.stored["/".join(rest)] = content
            else:
                state.runs["/".join([place, *rest[:2]])].files["/".join(rest[2:])] = content
        self._send(200, {})

    def do_GET(self) -> None:
        _, *rest = self.path.partition("?")[0].strip("/").split("/")
        run = self.server.state.runs.get("/".join(rest[:3]))
        content = run and run.files.get("/".join(rest[3:]))
        self._send(200 if content else 404, content or b"", "application/octet-stream")

    def _body(self) -> bytes:
        body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        return gzip.decompress(body) if self.headers.get("Content-Encoding") == "gzip" else body

    def _send(self, status: int, content: Any, kind: str = "application/json") -> None:
        data = content if isinstance(content, bytes) else json.dumps(content).encode()
        self.send_response(status)
        self.send_header("Content-Type", kind)
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)

    def log_message(self, *_: object) -> None:
        pass


class _Server(ThreadingHTTPServer):
    daemon_threads = True

    def __init__(self, state: Operations) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.state, self.lock = state, threading.Lock()

    def handle_error(self, *_: object) -> None:
        """Clients drop connections as they like."""


def forget_credentials(monkeypatch: pytest.MonkeyPatch, directory: Path) -> None:
    """No login and no setting of this user's reaches the SDK, which keeps what it writes in `directory`."""
    for name in [name for name in os.environ if name.startswith("WANDB_")]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("WANDB_ERROR_REPORTING", "false")
    monkeypatch.setenv("NETRC", str(directory / "netrc"))
    for name in ("HOME", "WANDB_CONFIG_DIR", "WANDB_CACHE_DIR", "WANDB_DATA_DIR"):
        monkeypatch.setenv(name, str(directory))


@contextmanager
def serve() -> Iterator[Operations]:
    """A server that listens until the context ends; its state, with `url`. `failures` are answered first."""
    state = Operations()
    with _Server(state) as server:
        state.url = f"http://127.0.0.1:{server.server_port}"
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        try:
            yield state
        finally:
            server.shutdown()
            thread.join()
