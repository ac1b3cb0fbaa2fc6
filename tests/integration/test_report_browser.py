"""The report in a real browser: Debian's chromium, headless, on a phone and on a desktop, light and dark."""

from __future__ import annotations

import html
import json
import re
import shutil
import subprocess
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from lora_jobs.runs import append_metrics, append_submission, begin_attempt, create_run, end_attempt
from lora_jobs.runs.submissions import Submission
from lora_jobs.spec import load_spec, render_spec
from lora_jobs.units import GIB
from lora_jobs.workflows.reporting import write_report

if TYPE_CHECKING:
    from collections.abc import Iterator

CHROMIUM = shutil.which("chromium")
pytestmark = pytest.mark.skipif(CHROMIUM is None, reason="no chromium on PATH: apt-get install chromium")
ROOT = Path(__file__).resolve().parents[2]

MEASURE = """
<script>
window.faults = [];
addEventListener("error", event => faults.push(String(event.message || event.target.outerHTML)), true);
addEventListener("load", () => {
  const box = node => { const r = node.getBoundingClientRect(); return [r.width, r.height]; };
  const style = getComputedStyle(document.body);
  const answer = {
    width: innerWidth,
    scroll: document.documentElement.scrollWidth,
    dark: matchMedia("(prefers-color-scheme: dark)").matches,
    paper: style.backgroundColor,
    plots: [...document.querySelectorAll(".area svg")].map(box),
    curves: [...document.querySelectorAll("path.curve")].map(node => node.getTotalLength()),
    wide: [...document.querySelectorAll("main *")].filter(
      node => node.getBoundingClientRect().right > innerWidth + 1 && !node.closest("pre, .scroll")).length,
    labels: [...document.querySelectorAll(".y span, .x span, td, dd")].map(
      node => parseFloat(getComputedStyle(node).fontSize)),
    images: [...document.images].map(image => image.naturalWidth),
    stolen: window.stolen || 0,
    faults,
  };
  parent.postMessage(answer, "*");
});
</script>
"""


# A window of chromium is 500 pixels wide at the least, a frame in it as narrow as a phone.
FRAME = """<!DOCTYPE html><meta name="color-scheme" content="light dark"><body style="margin:0">
<script>
addEventListener("message", event => {
  const place = document.createElement("script");
  place.type = "application/json";
  place.id = "measured";
  place.textContent = JSON.stringify(event.data);
  document.body.append(place);
});
</script>
<iframe src="copy.html" style="border:0;width:WIDTHpx;height:2400px"></iframe>
"""


class Listener(ThreadingHTTPServer):
    """Remembers every path that somebody asks for."""

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Answer)
        self.asked: list[str] = []

    @property
    def address(self) -> str:
        return f"http://127.0.0.1:{self.server_address[1]}"


class Answer(BaseHTTPRequestHandler):
    def do_GET(self) -> None:
        assert isinstance(self.server, Listener)
        self.server.asked.append(self.path)
        self.send_response(204)
        self.end_headers()

    def log_message(self, *_: Any) -> None:
        pass


@pytest.fixture
def listener() -> Iterator[Listener]:
    server = Listener()
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    yield server
    server.shutdown()
    thread.join()
    server.server_close()


def browse(page: Path, *, dark: bool = False) -> tuple[str, list[str]]:
    """The page's DOM after it has loaded, and what the browser wrote to its console."""
    assert CHROMIUM is not None
    command = [
        CHROMIUM, "--headless", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage", "--no-first-run",
        "--disable-background-networking", "--disable-component-update", "--disable-sync", "--enable-logging=stderr",
        f"--user-data-dir={page.parent / 'profile'}", "--window-size=1400,2400",
        f"--blink-settings=preferredColorScheme={0 if dark else 1}", "--dump-dom", page.as_uri(),
    ]  # fmt: skip
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, check=True)
    return done.stdout, [line for line in done.stderr.splitlines() if "CONSOLE" in line]


@pytest.fixture
def report(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, listener: Listener) -> Path:
    """The report of a run whose texts try to run scripts and to reach a server, and whose words are very long."""
    monkeypatch.setenv("LORA_JOBS_HOME", str(tmp_path / "runs"))
    call = f"window.stolen=1;fetch('{listener.address}/script')"
    hostile = f"<script>{call}</script><img src='{listener.address}/image' onerror=\"{call}\">{'long' * 200}"
    drawing = (
        f'<svg viewBox="0 0 40 40" onload="{call}"><script>{call}</script><image href="{listener.address}/svg"/>'
        '<circle cx="20" cy="20" r="15" fill="teal"/></svg>'
    )
    spec = load_spec(ROOT / "jobs/gemma2_9b_svg.yaml")
    estimate = {
        "fits": True,
        "verdict": "fits",
        "world_size": 2,
        "gpu": {"name": "A100-64", "usable_bytes": 63 * GIB},
        "estimate": {
            "peak_bytes": 45 * GIB,
            "allocated_peak_bytes": 43 * GIB,
            "components": {"base_weights": 17 * GIB, "optimizer_state": 11 * GIB, "gradients": 2 * GIB},
        },
        "peak": {"what": "the optimizer's first step", "when": "at the end of step 1"},
    }
    files = {"spec.yaml": render_spec(spec), "estimate.json": json.dumps(estimate), "git.diff": hostile}
    files["git.json"] = json.dumps({"commit": "0123456789abcdef" * 4, "branch": hostile, "changed": ["x"]})
    run = create_run(tmp_path / "runs", "gemma2_9b_svg-1", files)
    now = time.time()
    append_submission(run, Submission(job_id="1", backend="local", submitted_at=now - 9, host="n", pid_created_at=1.0))
    begin_attempt(run, job_id="1", restart_count=0, backend="local", host=hostile, resume_from=None, first_step=0)
    for step in range(1, 400):
        row = {"time": now + step, "attempt": 1, "step": step, "max_steps": 400, "memory_allocated_bytes": 41 * GIB}
        noise = (step * 7919 % 101) / 300
        append_metrics(
            run,
            {**row, "kind": "train", "loss": 4 / step**0.3 + noise, "learning_rate": 1e-4, "tokens_per_second": 9e3},
            durable=False,
        )
        if step % 50 == 1:
            append_metrics(run, {**row, "kind": "eval", "eval_loss": 4.2 / step**0.3, "perplexity": 9.0}, durable=False)
    targets = {"eval_loss": {"expected": 2.0, "reached": 0.7, "met": True}}
    append_metrics(run, {"kind": "final", "step": 400, "metrics": {"eval_loss": 0.7}, "targets": targets})
    answers = dict.fromkeys(("expected", "without_adapter", "with_adapter"), hostile)
    append_metrics(run, {"kind": "sample", "step": 400, "prompt": drawing + hostile, **answers})
    end_attempt(run, job_id="1", restart_count=0, exit_code=1, state="FAILED", reason=hostile, last_committed_step=None)
    return write_report(run.id, tmp_path / "report.html")


@pytest.mark.parametrize("dark", [False, True], ids=["light", "dark"])
@pytest.mark.parametrize("width", [390, 1280])
def test_the_report_is_read_on_any_screen(report: Path, listener: Listener, width: int, dark: bool) -> None:
    text = report.read_text()
    # The check needs a script, which the page's own policy forbids; whatever else runs would be the hostile texts'.
    allowed = text.replace("default-src 'none';", "default-src 'none'; script-src 'unsafe-inline';")
    assert allowed != text
    copy = report.with_name("copy.html")
    copy.write_text(allowed.replace("</head>", f"{MEASURE}</head>"))
    frame = report.with_name("frame.html")
    frame.write_text(FRAME.replace("WIDTH", str(width)))
    dom, console = browse(frame, dark=dark)
    found = re.search(r'<script type="application/json" id="measured">(.*?)</script>', dom, re.DOTALL)
    assert found is not None, dom[-2000:]
    measured = json.loads(html.unescape(found[1]))
    assert (measured["width"], measured["dark"]) == (width, dark)
    assert measured["scroll"] <= width
    assert measured["wide"] == 0
    assert len(measured["plots"]) == 4
    assert all(plot[0] > min(width, 600) * 0.4 and plot[1] > 150 for plot in measured["plots"])
    assert all(length > 50 for length in measured["curves"])
    assert min(measured["labels"]) >= 12
    assert measured["paper"] == ("rgb(20, 23, 26)" if dark else "rgb(251, 250, 247)")
    assert measured["images"] == [measured["images"][0]]
    assert measured["images"][0] > 0
    assert (measured["stolen"], measured["faults"], console, listener.asked) == (0, [], [], [])


def test_the_page_as_it_is_says_nothing_on_the_console_and_asks_nobody(report: Path, listener: Listener) -> None:
    dom, console = browse(report)
    assert "gemma2_9b_svg-1</h1>" in dom
    assert (console, listener.asked) == ([], [])


def test_the_listener_would_hear_a_page_that_is_not_escaped(tmp_path: Path, listener: Listener) -> None:
    page = tmp_path / "open.html"
    page.write_text(f"<img src='{listener.address}/image'><script>console.log('heard')</script>")
    _, console = browse(page)
    assert "/image" in listener.asked
    assert any("heard" in line for line in console)
