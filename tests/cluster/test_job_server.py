"""A job server that cannot start jobs yet, or never will. A real one: test_submit.py."""

import json
import threading
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest
import ray

from lightning_ray.cluster import job_server
from lightning_ray.cluster.config import ClusterConfig
from lightning_ray.cluster.job_server import JobServer
from lightning_ray.cluster.submission import Submission
from lightning_ray.errors import InfrastructureError

NOBODY = "No available agent to submit job, please try again later."
JOB = Submission("train-1", "true", {})


@pytest.fixture
def without_agent() -> Iterator[Callable[[int], tuple[JobServer, list[str]]]]:
    """A job server that has no agent for so many submissions, and the jobs that it was sent."""
    servers = []

    def start(times: int) -> tuple[JobServer, list[str]]:
        sent: list[str] = []

        class Handler(BaseHTTPRequestHandler):
            def do_GET(self):
                self.reply(200, {"version": "4", "ray_version": ray.__version__, "ray_commit": ""})

            def do_POST(self):
                body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
                sent.append(body["submission_id"])
                if len(sent) <= times:
                    return self.reply(500, NOBODY)
                return self.reply(200, {"job_id": "1", "submission_id": sent[-1]})

            def reply(self, status, content):
                content = content if isinstance(content, str) else json.dumps(content)
                self.send_response(status)
                self.send_header("Content-Length", str(len(content)))
                self.end_headers()
                self.wfile.write(content.encode())

            def log_message(self, *_):
                pass

        server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        threading.Thread(target=server.serve_forever, daemon=True).start()
        servers.append(server)
        url = f"http://127.0.0.1:{server.server_port}"
        return JobServer(ClusterConfig(address=url)), sent

    yield start
    for server in servers:
        server.shutdown()
        server.server_close()


def test_a_job_is_sent_again_until_the_cluster_can_start_jobs(without_agent, monkeypatch):
    monkeypatch.setattr(job_server, "LOOK_EVERY_S", 0.01)
    server, sent = without_agent(3)
    said: list[str] = []
    server.submit(JOB, said.append)
    assert sent == ["train-1"] * 4
    assert len(said) == 1 and "no agent for jobs yet" in said[0]


def test_a_cluster_that_never_can_is_said_so(without_agent, monkeypatch):
    monkeypatch.setattr(job_server, "LOOK_EVERY_S", 0.01)
    monkeypatch.setattr(job_server, "AGENT_WAIT_S", 0.1)
    server, sent = without_agent(10**6)
    with pytest.raises(InfrastructureError, match=r"no agent for jobs for 0 s.*agent-listen-port"):
        server.submit(JOB, print)
    assert len(sent) > 1
