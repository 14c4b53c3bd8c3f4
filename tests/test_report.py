"""Guards: the report of a run is one file that asks no network, says what results.jsonl says, cannot be broken by what a model
wrote, and works in a browser: rollouts are stepped through and the console stays empty.
"""

import json
import re
import shutil
import subprocess

import pytest
from conftest import ROOT
from test_evaluate import cell

from evals import report

HOSTILE = "</think></script><script>document.title='taken'</script><img src=x onerror=\"document.title='taken'\">"


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """What a run of two stages leaves behind, with one completion that would like to be markup."""
    run = tmp_path_factory.mktemp("runs") / "tiny"
    lines = [
        cell(s, "math", 40 + 20 * i, 40) | {"tokens": 31.0} for i, s in enumerate(("sft", "rlhf"))
    ]
    lines += [
        cell(s, "chat", 70 + i, 40, mode) | {"tokens": 12.0}
        for i, s in enumerate(("sft", "rlhf"))
        for mode in ("think", "no_think")
    ]
    lines += [cell("rlhf", "math", 65, 20) | {"decoding": "greedy"}]
    for stage, name in (("sft", "sft2"), ("rlhf", "rlhf")):
        (run / name / "final").mkdir(parents=True)
        (run / "samples" / stage).mkdir(parents=True)
        steps = [
            {"step": s, "loss": 2.0 / s, "num_tokens": 100, "time/train": 1.5}
            | (
                {"reward": s / 10, "len": 9.0, "trunc": 0.0, "entropy": 1.0, "time/gen": 0.5}
                if name == "rlhf"
                else {}
            )
            for s in range(1, 6)
        ]
        steps[-1]["eval"] = 0.5
        (run / name / "metrics.jsonl").write_text("".join(json.dumps(m) + "\n" for m in steps))
        command = [f"{name}.py", "--lr=1e-3", "--data=a b"]
        (run / name / "final" / "run.json").write_text(
            json.dumps(
                {
                    "step": 5,
                    "command": command,
                    "git": "abcdef0123456789",
                    "torch": "2.13.0",
                    "world": 2,
                    "config": {},
                }
            )
        )
        rows = [
            {
                "key": f"{p}{k}",
                "problem": p,
                "sample": k,
                "prompt": f"what is {p} + 1?",
                "text": f"<think>\n{p}+1\n</think>\n{stage} says {p + k}",
                "finish_reason": "stop",
                "tokens": 9,
                "score": float(k == 1),
                "weight": 1.0,
                "reward": float(k == 1),
                "status": "ok" if k else "wrong",
            }
            for p in range(2)
            for k in range(2)
        ]
        rows[1]["text"] = HOSTILE
        (run / "samples" / stage / "math_think_sampled.rank0.jsonl").write_text(
            "".join(json.dumps(r) + "\n" for r in rows) + '{"key": "cut of'
        )
    (run / "results.jsonl").write_text("".join(json.dumps(r) + "\n" for r in lines))
    report.main(report.Config(run=str(run)))
    return run


def test_the_page_is_one_file_without_any_address(folder):
    page = (folder / "report.html").read_text()
    assert (
        re.findall(r"<(?:link|script|img|iframe)[^>]*(?:src|href)=", page) == []
        and "@import" not in page
        and "url(" not in page
    )
    addresses = set(re.findall(r"https?://[^\s\"'<>]+", page))
    assert addresses == {"http://www.w3.org/2000/svg"}  # a name, never fetched
    assert page.count("</script>") == 2  # its own two


def test_the_numbers_are_those_of_the_run(folder):
    data = json.loads(
        re.search(
            r'<script type="application/json" id="data">(.*?)</script>',
            (folder / "report.html").read_text(),
            re.S,
        )[1]
    )
    assert (
        data["stages"] == ["sft", "rlhf"]
        and len(data["cells"]) == 7
        and len(data["rollouts"]) == 8
        and data["gates"] == []
    )
    rlhf = next(r for r in data["runs"] if r["name"] == "rlhf")
    assert (rlhf["gen"], rlhf["train"], rlhf["tokens"], rlhf["steps"]) == (
        2.5,
        7.5,
        500,
        5,
    ) and rlhf["curves"]["held-out"] == [[5, 0.5]]
    assert rlhf["command"] == "rlhf.py --lr=1e-3 '--data=a b'"
    text = (folder / "report.md").read_text()
    assert (
        "| rlhf | 71.0 [" in text
        and "60.0 [" in text
        and "Every gate holds." in text
        and "rlhf.py --lr=1e-3" in text
    )


def test_a_broken_gate_is_in_the_report(folder, tmp_path):
    shutil.copytree(folder, tmp_path / "run")
    with open(tmp_path / "run" / "results.jsonl", "a") as f:
        f.write(json.dumps(cell("rlhf", "math", 5, 4000)) + "\n")
    report.main(report.Config(run=str(tmp_path / "run")))
    assert "math (think) is at 5.0 after rlhf" in (tmp_path / "run" / "report.md").read_text()


DRIVER = """<script>
const log = [], pressed = id => document.getElementById(id).click(), read = id => document.getElementById(id).textContent;
log.push(read("where"), read("reply"));
for (let i = 0; i < 7; i++) { pressed("next"); log.push(read("where") + " " + read("verdict")); }
pressed("next"); log.push(read("where"), document.getElementById("next").disabled);
dispatchEvent(new KeyboardEvent("keydown", {key: "ArrowLeft"})); log.push(read("where"));
const stage = document.getElementById("stage"); stage.value = "rlhf"; stage.onchange(); log.push(read("where"), read("reply"));
for (const b of document.querySelectorAll("#metrics button, #decodings button")) b.click();
pressed("theme");
const wide = document.documentElement.scrollWidth > innerWidth;
const cells = [...document.querySelectorAll("#matrix td.heat b")].map(b => b.textContent), title = document.title;
document.body.replaceChildren(); document.body.dataset.log = JSON.stringify({log, errors, wide, cells, title});
</script></html>"""
CATCH = """<script>const errors = []; addEventListener("error", e => errors.push(e.message));
for (const kind of ["error", "warn"]) console[kind] = (...a) => errors.push(a.join(" "));</script>"""


@pytest.mark.parametrize("width", [1280, 500])
def test_a_browser_steps_through_the_rollouts_without_a_console_error(folder, tmp_path, width):
    chromium = next(
        filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None
    )
    if not chromium:
        pytest.skip("no chromium on this machine (Debian: apt-get install chromium)")
    page = (folder / "report.html").read_text().replace("<main>", CATCH + "<main>", 1)
    assert page.rstrip().endswith("</html>")
    (tmp_path / "page.html").write_text(page.rstrip().removesuffix("</html>") + DRIVER)
    done = subprocess.run(
        [
            chromium,
            "--headless",
            "--no-sandbox",
            "--disable-gpu",
            f"--user-data-dir={tmp_path}/profile",
            f"--window-size={width},900",
            "--enable-logging=stderr",
            "--dump-dom",
            f"file://{tmp_path}/page.html",
        ],
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert "CONSOLE" not in done.stderr, [
        line for line in done.stderr.splitlines() if "CONSOLE" in line
    ]
    import html

    seen = json.loads(html.unescape(re.search(r'data-log="([^"]*)"', done.stdout)[1]))
    assert seen["errors"] == [] and seen["title"] == "tiny: cascade report" and not seen["wide"]
    log = seen["log"]
    assert log[0] == "1 of 8" and log[1] == "0+1sft says 0"
    assert log[2:9] == [f"{i} of 8 score {'1.00' if i % 2 == 0 else '0'}" for i in range(2, 9)]
    assert (
        log[9:12] == ["8 of 8", True, "7 of 8"]
        and log[12] == "1 of 4"
        and log[13] == "0+1rlhf says 0"
    )
    assert seen["cells"] == ["65.0"]  # greedy, pressed last


def test_the_template_is_ascii_and_names_no_host():
    text = (ROOT / "evals" / "report_template.html").read_text()
    assert text.isascii() and "__DATA__" in text
