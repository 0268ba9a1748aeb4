"""The report: every number from its record, none beside a failed check, and a page that a browser shows."""

import html
import json
import re
import shutil
import subprocess
from pathlib import Path

import numpy as np
import pytest

pytest.importorskip("jinja2")

from gradlab._errors import InputError
from gradlab.bench.profiling import si
from gradlab.bench.report import write
from gradlab.bench.report.lines import cell, is_speed, lines, span, tabulate
from gradlab.bench.report.records import newest, read

RESULTS = Path(__file__).parent.parent / "results"
PLANTED = 0.0123456  # seconds of a call whose result is wrong: si gives "12.3 ms"


def last(name):
    return json.loads((RESULTS / f"{name}.jsonl").read_text().splitlines()[-1])


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Real records, made small; one wrong result; claims; a script that nobody knows; a broken line."""
    folder = tmp_path_factory.mktemp("results")
    put = lambda name, *records: (folder / f"{name}.jsonl").write_text(
        "".join(json.dumps(r) + "\n" for r in records)
    )
    bench = [json.loads(line) for line in (RESULTS / "bench.jsonl").read_text().splitlines()]
    for record in bench:
        record["rows"] = [row for row in record["rows"] if row.get("problem") != "transformer_128"]
    wrong = bench[0]["rows"][1]
    wrong["variants"]["gradlab"] |= {"error": 0.5, "median_s": PLANTED, "gradients": 98.7654}
    skipped = {"problem": "mlp_10k", "operation": "sparse", "mode": "compiled", "skipped": "no C++ compiler"}
    failed = {"problem": "mlp_10k", "operation": "dense", "mode": "compiled", "failed": "TypeError: no"}
    bench[0]["rows"] += [skipped, failed]
    for name in ("gradlab", "jvp(grad)"):
        bench[0]["rows"][0]["variants"][name]["bytes"] = 123_000_000
    put("bench", *bench)
    put("implicit_regression", last("implicit_regression"))
    put("meta_cost", last("meta_cost"))
    put("ode_speed", last("ode_speed"))
    unknown = [{"size": n, "seconds": {"a": 0.001 * n, "b": 0.002 * n}, "passed": True} for n in (1, 10, 100)]
    unknown[2]["passed"] = False
    put("never_heard_of", {"experiment": "never_heard_of", "rows": unknown, "config": {"framework": "jax"}})
    claims = [
        {
            "claim": "jax <is> faster",
            "measured": "hvp",
            "value": 1.5,
            "low": 1.4,
            "high": 1.6,
            "verdict": "confirmed",
        },
        {
            "claim": "torch is faster",
            "measured": "hvp",
            "value": 0.7,
            "low": 0.6,
            "high": 0.8,
            "verdict": "refuted",
        },
    ]
    put("framework_comparison", {"experiment": "framework_comparison", "claims": claims})
    with (folder / "meta_cost.jsonl").open("a") as file:
        file.write('{"half a record": \n')
    shutil.copy(RESULTS / "verify.json", folder)
    return folder


@pytest.fixture(scope="module")
def written(folder, tmp_path_factory):
    page, plain = write(folder, tmp_path_factory.mktemp("report"))
    return page, page.read_text(), plain.read_text()


def section(text, heading):
    return text.split(f"## {heading}\n")[1].split("\n## ")[0]


def table_rows(text):
    lines = [line for line in text.splitlines() if line.startswith("|")]
    return [[part.strip() for part in line.strip("|").split(" | ")] for line in lines]


def test_numbers_are_those_of_the_records(folder, written):
    _, page, plain = written
    rows = table_rows(section(plain, "Against hand-written code"))
    record = json.loads((folder / "bench.jsonl").read_text().splitlines()[1])  # torch, the paper preset
    checked = 0
    for row in record["rows"]:
        if "variants" in row:
            (found,) = [r for r in rows if r[:3] == [row["problem"], row["operation"], f"torch {row['mode']}"]
                        and "✓" in r[3]]  # fmt: skip
            ours, best = row["variants"]["gradlab"], row["variants"][row["best_by_hand"]]
            assert found[4] == si(ours["median_s"], "s")
            assert found[5] == f"{si(best['median_s'], 's')} ({row['best_by_hand']})"
            assert found[6].startswith(f"{row['ratio_to_best'][0]:.2f} (")
            assert f'data-k="{ours["median_s"]}"' in page
            checked += 1
    assert checked > 10


def test_a_wrong_result_shows_no_speed(written):
    _, page, plain = written
    assert "123 MB" in plain
    row, failed = [
        r for r in table_rows(section(plain, "Against hand-written code")) if len(r) == 9 and "✗" in r[3]
    ]
    assert failed[3] == "✗ TypeError: no"
    assert set(failed[4:]) == {"–"}
    assert "5e-01" in row[3]
    assert row[4] == row[6] == row[7] == row[8] == "–"
    for text in (page, plain):
        assert si(PLANTED, "s") not in text
        assert str(PLANTED) not in text
        assert "98.7654" not in text
        assert not re.search(r"[|>] ?98\.8 ?[|<]", text)
    tile = re.search(r'class="tile (\w+)"><b>(\d+) of (\d+)</b><span>operations checked', page)
    assert tile[1] == "wrong"
    assert int(tile[2]) == int(tile[3]) - 2


@pytest.mark.parametrize("planted", [{"passed": False}, {"verdict": "wrong"}, {"error": float("nan")}])
def test_a_failed_check_of_any_record_shows_no_speed(planted):
    row = {
        "size": 3,
        "variants": {"a": {"seconds": 0.5, "median_s": 0.25, **planted}, "b": {"seconds": 0.75}},
    }
    texts = [[c.text for c in line] for line in tabulate(lines([row])).rows]
    assert not {"500 ms", "250 ms"} & set(texts[0])
    assert "750 ms" in texts[1]
    assert is_speed("first_s")
    assert not is_speed("bytes")


def test_skipped_and_unread_are_said(written):
    _, page, plain = written
    assert "skipped: no C++ compiler" in plain
    assert "meta_cost.jsonl, line 2" in page


def test_claims(written):
    _, page, plain = written
    rows = table_rows(section(plain, "Claims"))
    assert ["jax <is> faster", "✓ confirmed", "1.50", "1.40 to 1.60", "hvp"] in rows
    assert "jax &lt;is&gt; faster" in page
    assert "<b>1 of 2</b>" in page


def test_an_unknown_record_has_a_table_and_a_chart(written):
    _, page, plain = written
    rows = table_rows(section(plain, "Never heard of"))
    assert ["10", "✓ passed", "a", "10 ms"] in rows
    assert ["100", "✗ failed", "a", "–"] in rows
    assert 'id="never_heard_of"' in page


def test_the_larger_preset_and_the_newer_run_are_shown(folder):
    found, faults = read(folder)
    assert len(faults) == 1
    chosen = {r.framework: r for r in newest(found) if r.name == "operations"}
    assert {r.config["preset"] for r in chosen.values()} == {"paper"}
    assert len([r for r in found if r.name == "operations"]) > len(chosen)


def test_values_are_read_as_their_names_say():
    assert cell("median_s", 1.5e-3).text == "1.5 ms"
    assert cell("bytes", None).text == "–"
    assert cell("bytes", 2_000_000).text == "2 MB"
    assert cell("error", 0.0).text == "0"
    assert cell("seconds", float("nan")).text == "not finite"
    assert span(1.034, 1.0, 1.1).whole == "1.03 (1.00 to 1.10)"


def test_bad_folders(tmp_path):
    with pytest.raises(InputError, match="no folder"):
        write(tmp_path / "nowhere")
    with pytest.raises(InputError, match="no record"):
        write(tmp_path)


# The browser.

CHROMIUM = next(
    (path for name in ("chromium", "chromium-browser", "google-chrome") if (path := shutil.which(name))), None
)
PROBE_FIRST = """<script>
window.faults = [];
addEventListener("error", e => faults.push(e.message));
addEventListener("unhandledrejection", e => faults.push(String(e.reason)));
for (const level of ["error", "warn"]) console[level] = (...words) => faults.push(words.join(" "));
</script>"""
PROBE_LAST = """<script>
addEventListener("load", () => {
  const head = document.querySelector("#operations th:nth-child(5) button");
  const column = () => [...document.querySelectorAll("#operations table tbody")][0].rows;
  const read = () => [...column()].map(row => row.cells[4].dataset.k).filter(k => k !== "").map(Number);
  head.click(); const up = read(); head.click(); const down = read();
  const wide = [...document.querySelectorAll("svg.chart")].map(s => s.getBoundingClientRect());
  const said = {
    faults, up, down, width: innerWidth, across: document.documentElement.scrollWidth,
    requests: performance.getEntriesByType("resource").map(e => e.name).filter(n => !n.startsWith("data:")),
    sections: [...document.querySelectorAll("section")].map(s => s.id),
    links: [...document.querySelectorAll("nav a")].map(a => a.hash.slice(1)),
    charts: wide.length, drawn: wide.filter(r => r.width > 100 && r.height > 40).length,
    ready: document.documentElement.dataset.ready,
  };
  parent.postMessage(said, "*");
});
</script>"""
FRAME = """<!doctype html><body style="margin:0"><script>
addEventListener("message", e => {
  const out = document.createElement("pre");
  out.id = "probe"; out.textContent = JSON.stringify(e.data);
  document.body.append(out);
});
</script><iframe src="page.html" style="border:0;width:WIDTHpx;height:900px"></iframe></body>"""


def browse(tmp_path, page, *flags):
    if CHROMIUM is None:
        pytest.skip("no chromium here: apt-get install chromium")
    quiet = [
        "--headless",
        "--no-sandbox",
        "--disable-gpu",
        "--disable-quic",
        "--no-first-run",
        "--hide-scrollbars",
    ]
    quiet += [f"--disable-{what}" for what in ("background-networking", "component-update", "sync")]
    closed = ["--host-resolver-rules=MAP * ~NOTFOUND", f"--user-data-dir={tmp_path / 'profile'}"]
    command = [CHROMIUM, *quiet, *closed, *flags, page.as_uri()]
    return subprocess.run(command, capture_output=True, text=True, timeout=120, check=True, cwd=tmp_path)


@pytest.mark.parametrize("width", [1280, 400])
def test_in_a_browser(written, tmp_path, width):
    _, text, _ = written
    probed = tmp_path / "page.html"
    probed.write_text(
        text.replace("<head>", "<head>" + PROBE_FIRST).replace("</body>", PROBE_LAST + "</body>")
    )
    frame = tmp_path / "frame.html"  # a window of its own is never narrower than 500
    frame.write_text(FRAME.replace("WIDTH", str(width)))
    done = browse(tmp_path, frame, "--dump-dom", "--window-size=1300,1000", "--virtual-time-budget=3000")
    said = json.loads(html.unescape(re.search(r'id="probe">(.*?)</pre>', done.stdout, re.S)[1]))
    assert said["faults"] == []
    assert said["requests"] == []
    assert said["ready"] == "yes"
    assert said["across"] <= said["width"] == width
    assert said["sections"] == said["links"]
    assert {"machine", "claims", "operations", "frameworks", "verify", "meta_cost", "never_heard_of"} <= set(
        said["sections"]
    )
    assert said["charts"] == said["drawn"] > 10
    assert said["up"] == sorted(said["up"])
    assert said["down"] == sorted(said["down"], reverse=True)
    assert len(said["up"]) > 20


def test_the_page_names_nothing_outside(written):
    _, text, _ = written
    outside = re.findall(
        r"(?:src|href)=\"(?!#|data:)[^\"]*\"|url\((?!data:)[^)]*\)|@import|https?://[^\s\"<]*", text
    )
    assert outside == []


@pytest.mark.parametrize("theme", ["light", "dark"])
def test_the_picture(written, tmp_path, theme):
    """Not blank: the ground is of the theme, a tenth of it is ink, and the accents are there."""
    image = pytest.importorskip("matplotlib.image")
    _, text, _ = written
    dressed = tmp_path / "page.html"
    dressed.write_text(text.replace("</body>", f"<script>dress('{theme}')</script></body>"))
    browse(tmp_path, dressed, "--screenshot=shot.png", "--window-size=1280,2400")
    pixels = image.imread(tmp_path / "shot.png")[..., :3]
    assert pixels.shape[:2] == (2400, 1280)
    ground = pixels[5, 5]
    assert (ground.mean() > 0.9) if theme == "light" else (ground.mean() < 0.15)
    share = (np.abs(pixels - ground).max(-1) > 0.25).mean()
    assert 0.02 < share < 0.5
    coloured = (pixels.max(-1) - pixels.min(-1) > 0.35).mean()
    assert coloured > 0.0005


def test_the_command(folder, tmp_path):
    from typer.testing import CliRunner

    from gradlab.cli import app

    done = CliRunner().invoke(app, ["report", str(folder), "--out", str(tmp_path)])
    assert done.exit_code == 0, done.output
    assert (tmp_path / "report.html").exists()
    assert CliRunner().invoke(app, ["report", str(tmp_path / "nowhere")]).exit_code == 2
