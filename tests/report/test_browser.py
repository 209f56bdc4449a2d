"""The page in a real browser: it loads, tells values under the pointer, sorts, filters, prints."""

from __future__ import annotations

import json
import re
import shutil
import subprocess

import pytest
import simulated

from ur_jax.report import build

BROWSER = next(
    filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), ""
)
pytestmark = pytest.mark.skipif(not BROWSER, reason="there is no Chromium (Debian: chromium)")

PROBE = """<script>
const found = {}, figure = document.querySelector("figure.live");
const svg = figure.querySelector("svg"), frame = svg.getBoundingClientRect();
const told = () => {
  svg.dispatchEvent(new PointerEvent("pointermove", {
    clientX: frame.left + 0.3 * frame.width, clientY: frame.top + 0.5 * frame.height}));
  return figure.querySelector("output").textContent;
};
found.told = told();
const box = figure.querySelector("fieldset input");
box.click();
found.without = told();
found.hidden = [...svg.querySelectorAll("[id^=c]")].filter(e => e.style.display === "none").length;
const table = document.getElementById("all-numbers"), first = () => table.tBodies[0].rows[0];
svg.parentElement.dispatchEvent(new KeyboardEvent("keydown", {key: "Escape"}));
svg.parentElement.dispatchEvent(new KeyboardEvent("keydown", {key: "ArrowRight"}));
found.first = figure.querySelector("output").textContent;
svg.parentElement.dispatchEvent(new KeyboardEvent("keydown", {key: "ArrowLeft"}));
found.last = figure.querySelector("output").textContent;
const agreement = document.querySelector("#correlation figure.live [role=img]");
agreement.dispatchEvent(new KeyboardEvent("keydown", {key: "ArrowDown"}));
found.row = agreement.parentElement.querySelector("output").textContent;
const heads = [...table.querySelectorAll("th")].map(head => head.textContent.trim());
const place = heads.indexOf("value");
table.querySelectorAll("th button")[place].click();
found.least = first().cells[place].textContent;
const field = document.querySelector('input[data-filter="all-numbers"]');
field.value = "weak overlap";
field.dispatchEvent(new Event("input"));
found.shown = [...table.tBodies[0].rows].filter(row => !row.hidden).length;
found.sideways = document.documentElement.scrollWidth > window.innerWidth;
found.requests = performance.getEntriesByType("resource").length;
found.width = window.innerWidth;
parent.postMessage(found, "*");
</script></body>"""

WIDTHS = (1300, 400)
FRAMES = """<!doctype html><title>frames</title><pre id="probe"></pre><script>
const found = [];
addEventListener("message", event => {
  found.push(event.data);
  document.getElementById("probe").textContent = JSON.stringify(found);
});
</script>""" + "".join(
    f'<iframe src="probed.html" width="{w}" height="900" style="border:0"></iframe>' for w in WIDTHS
)


def browse(*flags):
    command = [BROWSER, "--headless", "--no-sandbox", "--disable-gpu", "--enable-logging=stderr"]
    return subprocess.run([*command, *flags], capture_output=True, text=True, timeout=120)


def test_in_a_browser(tmp_path):
    folder = tmp_path / "work"
    simulated.make(folder, ("strong", "middle", "weak"), 40, 6, 30, 50)
    build.main(build.Config(folder))
    report = folder / "report.html"
    probed = tmp_path / "probed.html"
    probed.write_text(report.read_text().replace("</body>", PROBE))
    frames = tmp_path / "frames.html"  # a window is no narrower than 500 pixels, a frame is
    frames.write_text(FRAMES)
    done = browse("--dump-dom", "--virtual-time-budget=20000", f"file://{frames}")
    assert "CONSOLE" not in done.stderr, done.stderr
    text = re.search(r'<pre id="probe">(.+?)</pre>', done.stdout, re.S)
    assert text, done.stdout[-500:]
    every = json.loads(text[1])
    assert sorted(found["width"] for found in every) == sorted(WIDTHS)
    for found in every:
        line = r"[\d.]+ \([\d.]+ to [\d.]+\)"
        told = rf"attack step: \d\nweak: {line}\nmiddle: {line}\nstrong: {line}"
        assert re.fullmatch(told, found["told"])
        assert "weak: " in found["without"] and "middle" not in found["without"]
        # Keys: from the first step of the first panel back to the last step of the last one.
        assert found["first"].startswith("attack step: 0\nstrong: ")
        assert found["last"].startswith("attack step: 5\nstrong: ")
        row = r"universal quantile, eps 0.05, step 5\n(probe, \w+: .* \(tau .*, n = 3\)\n?){3}"
        assert re.fullmatch(row, found["row"])
        assert found["hidden"] == 4  # the line and the band of two panels
        assert float(found["least"]) == 0 and found["shown"] == 2 and not found["sideways"]
        assert found["requests"] == 0
    browse(f"--print-to-pdf={tmp_path / 'report.pdf'}", f"file://{report}")
    assert (tmp_path / "report.pdf").read_bytes()[:5] == b"%PDF-"
