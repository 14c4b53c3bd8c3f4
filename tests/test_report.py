"""Guards: the report of a run is one file that asks no network and says what results.jsonl says.

It cannot be broken by what a model wrote, and it works in a browser: rollouts are stepped through
and the console stays empty. A stage that no cascade knows is shown under its own name, also from
its own folder, before and after it was evaluated.
"""

import html
import json
import re
import shutil
import subprocess

import pytest
from conftest import ROOT, run_python
from test_evaluate import cell, write_jsonl

from evals import report

HOSTILE = (
    "</think></script><script>document.title='taken'</script>"
    "<img src=x onerror=\"document.title='taken'\">"
)


# ---- A run folder --------------------------------------------------------------------------------
def train(folder, script, steps=5, saved="final", rewards=True):
    """Write what a stage leaves in its folder: metrics.jsonl, and run.json of a checkpoint."""
    rows = []
    for step in range(1, steps + 1):
        row = {"step": step, "loss": 2.0 / step, "num_tokens": 100, "time/train": 1.5}
        if rewards:
            row |= {"reward": step / 10, "len": 9.0, "trunc": 0.0, "entropy": 1.0, "time/gen": 0.5}
        rows.append(row)
    rows[-1]["eval"] = 0.5
    folder.mkdir(parents=True, exist_ok=True)
    write_jsonl(folder / "metrics.jsonl", rows)
    if saved:
        run = {
            "step": steps,
            "command": [script, "--lr=1e-3", "--data=a b"],
            "git": "abcdef0123456789",
            "torch": "2.13.0",
            "world": 2,
            "config": {},
        }
        (folder / saved).mkdir()
        (folder / saved / "run.json").write_text(json.dumps(run))


def sample(folder, stage, task, hostile=False):
    """Write two samples of two problems of a task, as an evaluation of this stage keeps them."""
    rows = []
    for p in range(2):
        for k in range(2):
            row = {
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
            rows.append(row)
    if hostile:
        rows[1]["text"] = HOSTILE
    path = folder / "samples" / stage / f"{task}_think_sampled.rank0.jsonl"
    path.parent.mkdir(parents=True, exist_ok=True)
    write_jsonl(path, rows)
    with open(path, "a") as f:
        f.write('{"key": "cut of')


def measured(*lines):
    return [line | {"tokens": 31.0} for line in lines]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A run of two stages has left this, with one completion that would like to be markup."""
    run = tmp_path_factory.mktemp("runs") / "tiny"
    train(run / "sft2", "sft2.py", rewards=False)
    train(run / "rlhf", "rlhf.py")
    sample(run, "sft", "math", hostile=True)
    sample(run, "rlhf", "math", hostile=True)
    lines = [
        cell("sft", "math", 40, 40),
        cell("rlhf", "math", 60, 40),
        cell("sft", "chat", 70, 40),
        cell("sft", "chat", 70, 40, "no_think"),
        cell("rlhf", "chat", 71, 40),
        cell("rlhf", "chat", 71, 40, "no_think"),
        cell("rlhf", "math", 65, 20) | {"decoding": "greedy"},
    ]
    write_jsonl(run / "results.jsonl", measured(*lines))
    report.main(report.Config(run=str(run)))
    return run


def read_data(run):
    """Read the data of a written page."""
    page = (run / "report.html").read_text()
    return json.loads(re.search(r'id="data">(.*?)</script>', page, re.DOTALL)[1])


def write_report(run):
    report.main(report.Config(run=str(run)))
    return read_data(run), (run / "report.md").read_text()


# ---- The page ------------------------------------------------------------------------------------
def test_the_page_is_one_file_without_any_address(folder):
    page = (folder / "report.html").read_text()
    assert re.findall(r"<(?:link|script|img|iframe)[^>]*(?:src|href)=", page) == []
    assert "@import" not in page
    assert "url(" not in page
    addresses = set(re.findall(r"https?://[^\s\"'<>]+", page))
    assert addresses == {"http://www.w3.org/2000/svg"}  # a name, never fetched
    assert page.count("</script>") == 2  # its own two


def test_the_numbers_are_those_of_the_run(folder):
    data = read_data(folder)
    assert data["stages"] == ["sft", "rlhf"]
    assert len(data["cells"]) == 7
    assert len(data["rollouts"]) == 8
    assert (data["gates"], data["unchecked"], data["unmeasured"]) == ([], "", "")
    assert data["own"] == {"rlhf": "chat"}
    assert [run["name"] for run in data["runs"]] == ["sft2", "rlhf"]
    rlhf = data["runs"][1]
    assert (rlhf["gen"], rlhf["train"], rlhf["tokens"], rlhf["steps"]) == (2.5, 7.5, 500, 5)
    assert rlhf["curves"]["held-out"] == [[5, 0.5]]
    assert rlhf["command"] == "rlhf.py --lr=1e-3 '--data=a b'"
    text = (folder / "report.md").read_text()
    assert "| rlhf | 71.0 [" in text
    assert "60.0 [" in text
    assert "Every gate holds." in text
    assert "rlhf.py --lr=1e-3" in text


def test_a_broken_gate_is_in_the_report(folder, tmp_path):
    shutil.copytree(folder, tmp_path / "run")
    with open(tmp_path / "run" / "results.jsonl", "a") as f:
        f.write(json.dumps(cell("rlhf", "math", 5, 4000)) + "\n")
    _, text = write_report(tmp_path / "run")
    assert "math (think, sampled) is at 5.0 after rlhf" in text


# ---- Stages that no cascade knows ----------------------------------------------------------------
def test_a_copy_of_a_stage_inside_a_cascade_is_shown_under_its_own_name(folder, tmp_path, capsys):
    run = tmp_path / "run"
    shutil.copytree(folder, run)
    train(run / "my_idea2", "my_idea2.py")
    train(run / "an_idea", "an_idea.py")
    train(run / "not_evaluated", "not_evaluated.py")
    train(run / "rlhf_control", "sft.py")
    sample(run, "my_idea2", "countdown")
    with open(run / "results.jsonl", "a") as f:
        for line in measured(
            cell("my_idea2", "math", 62, 40),
            cell("rlhf_control", "math", 1, 4000),
            cell("an_idea", "math", 5, 4000),
            cell("my_idea2", "countdown", 30, 40),
        ):
            f.write(json.dumps(line) + "\n")
    data, text = write_report(run)
    printed = capsys.readouterr().out

    # After the stages of the recipe, in the order of results.jsonl; controls are no stages.
    assert data["stages"] == ["sft", "rlhf", "my_idea2", "an_idea"]
    names = [stage["name"] for stage in data["runs"]]
    assert names == ["sft2", "rlhf", "my_idea2", "an_idea", "not_evaluated"]
    assert data["tiles"][0] == ["5", "training runs"]
    assert data["subtitle"].startswith("sft > rlhf > my_idea2 > an_idea, measured ")
    assert "\nmy_idea2 " in printed
    assert "| my_idea2 | - | - | 62.0 [" in text
    assert "| my_idea2 | 5 | 10 s |" in text
    assert "my_idea2.py --lr=1e-3" in text

    # A task that nobody listed is the last column, and its rollouts can be stepped through.
    assert data["columns"][-1] == ["countdown", "think"]
    last = data["rollouts"][-1]
    assert (last["stage"], last["set"]) == ("my_idea2", "countdown, think")

    # Each is held against the best score before it.
    (broken,) = data["gates"]
    assert broken.startswith("math (think, sampled) is at 5.0 after an_idea, 57.0 below my_idea2")

    for stage in ("rlhf", "my_idea2", "an_idea"):
        assert (run / f"curves_{stage}.png").stat().st_size > 1000
    assert not (run / "curves_rlhf_control.png").exists()


def test_a_stage_s_own_folder_has_a_report_before_anything_was_evaluated(tmp_path, capsys):
    run = tmp_path / "my_idea"
    train(run, "my_idea.py")
    data, text = write_report(run)
    assert "Nothing was evaluated yet" in capsys.readouterr().out
    assert data["name"] == "my_idea"
    assert (data["stages"], data["columns"], data["cells"]) == ([], [], [])
    assert data["unmeasured"].startswith("Nothing was evaluated yet: python evaluate.py --model=")
    assert data["unchecked"] == "No gate was checked: nothing was evaluated yet."
    (stage,) = data["runs"]
    assert (stage["name"], stage["steps"], stage["train"]) == ("my_idea", 5, 7.5)
    assert "reward" in stage["curves"]
    for said in (
        "Nothing was evaluated yet",
        "No gate was checked: nothing was evaluated yet.",
        "| my_idea | 5 | 10 s |",
        "my_idea.py --lr=1e-3",
        "torch 2.",
    ):
        assert said in text
    assert "very gate holds" not in text
    assert (run / "curves_my_idea.png").stat().st_size > 1000
    assert not (run / "matrix.png").exists()


def test_a_stage_s_own_folder_may_hold_its_results(tmp_path):
    run = tmp_path / "my_idea"
    train(run, "my_idea.py")
    sample(run, "my_idea", "math")
    write_jsonl(run / "results.jsonl", measured(cell("my_idea", "math", 62, 40)))
    data, text = write_report(run)
    assert data["stages"] == ["my_idea"]
    assert [stage["name"] for stage in data["runs"]] == ["my_idea"]
    assert len(data["rollouts"]) == 4
    assert (run / "curves_my_idea.png").exists()
    # One stage alone has nothing that it could have lost.
    unchecked = "No gate was checked: no two stages have a score of the same task."
    assert data["unchecked"] == unchecked
    assert unchecked in text
    assert "very gate holds" not in text


@pytest.mark.parametrize("saved", ["step_000005", ""])
def test_a_stage_that_still_trains_has_curves(saved, tmp_path):
    """Before its end it has no final checkpoint, before the first save none at all."""
    run = tmp_path / "my_idea"
    train(run, "my_idea.py", saved=saved)
    with open(run / "metrics.jsonl", "a") as f:
        f.write('{"step": 6, "rew')
    data, text = write_report(run)
    (stage,) = data["runs"]
    assert stage["steps"] == 5
    assert ("my_idea.py --lr=1e-3" in text) == bool(saved)
    assert (run / "curves_my_idea.png").exists()


def test_a_copy_of_sft_has_curves_without_rewards(tmp_path):
    train(tmp_path / "my_sft", "my_sft.py", rewards=False)
    data, _ = write_report(tmp_path / "my_sft")
    assert data["metrics"] == ["loss", "trained tokens a second"]
    assert (tmp_path / "my_sft" / "curves_my_sft.png").exists()


def test_a_folder_with_neither_results_nor_metrics_is_refused_in_one_sentence(tmp_path):
    code, _, err = run_python("-m", "evals.report", f"--run={tmp_path}", check=False)
    assert code == 2
    assert len(err.splitlines()) == 1
    assert "no results.jsonl there. Nothing was read." in err


# ---- In a browser --------------------------------------------------------------------------------
DRIVER = """<script>
const log = [], byId = id => document.getElementById(id);
const pressed = id => byId(id).click(), read = id => byId(id).textContent;
log.push(read("where"), read("reply"));
for (let i = 0; i < 7; i++) { pressed("next"); log.push(read("where") + " " + read("verdict")); }
pressed("next"); log.push(read("where"), byId("next").disabled);
dispatchEvent(new KeyboardEvent("keydown", {key: "ArrowLeft"})); log.push(read("where"));
const stage = byId("stage"); stage.value = "rlhf"; stage.onchange();
log.push(read("where"), read("reply"));
for (const b of document.querySelectorAll("#metrics button, #decodings button")) b.click();
pressed("theme");
const wide = document.documentElement.scrollWidth > innerWidth;
const cells = [...document.querySelectorAll("#matrix td.heat b")].map(b => b.textContent);
const dots = [...document.querySelectorAll("#stages circle title")].map(t => t.textContent);
const title = document.title;
document.body.replaceChildren();
document.body.dataset.log = JSON.stringify({log, errors, wide, cells, dots, title});
</script></html>"""
CATCH = """<script>
const errors = [];
addEventListener("error", e => errors.push(e.message));
for (const kind of ["error", "warn"]) console[kind] = (...a) => errors.push(a.join(" "));
</script>"""


def browse(page, tmp_path, width):
    """Open a page in chromium and return the DOM that it leaves; skip the test without one."""
    names = ("chromium", "chromium-browser", "google-chrome")
    found = [path for path in map(shutil.which, names) if path]
    if not found:
        pytest.skip("no chromium on this machine (Debian: apt-get install chromium)")
    (tmp_path / "page.html").write_text(page)
    command = [found[0], "--headless", "--no-sandbox", "--disable-gpu"]
    command += [f"--user-data-dir={tmp_path}/profile", f"--window-size={width},900"]
    command += ["--enable-logging=stderr", "--dump-dom", f"file://{tmp_path}/page.html"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    console = [line for line in done.stderr.splitlines() if "CONSOLE" in line]
    assert console == []
    return done.stdout


@pytest.mark.parametrize("width", [1280, 500])
def test_a_browser_steps_through_the_rollouts_without_a_console_error(folder, tmp_path, width):
    page = (folder / "report.html").read_text().replace("<main>", CATCH + "<main>", 1).rstrip()
    assert page.endswith("</html>")
    dom = browse(page.removesuffix("</html>") + DRIVER, tmp_path, width)
    seen = json.loads(html.unescape(re.search(r'data-log="([^"]*)"', dom)[1]))
    assert seen["errors"] == []
    assert seen["title"] == "tiny: cascade report"
    assert not seen["wide"]
    log = seen["log"]
    assert log[:2] == ["1 of 8", "0+1sft says 0"]
    assert log[2:9] == [f"{i} of 8 score {'1.00' if i % 2 == 0 else '0'}" for i in range(2, 9)]
    assert log[9:12] == ["8 of 8", True, "7 of 8"]
    assert log[12:14] == ["1 of 4", "0+1rlhf says 0"]
    assert seen["cells"] == ["65.0"]  # greedy, pressed last
    # Each benchmark over the stages: chat in two modes, math; sampled.
    dots = [dot.partition(" [")[0] for dot in seen["dots"]]
    assert dots == ["sft: 70.0", "rlhf: 71.0"] * 2 + ["sft: 40.0", "rlhf: 60.0"]


@pytest.mark.parametrize("width", [1280])
def test_a_browser_shows_that_nothing_was_evaluated(tmp_path, width):
    train(tmp_path / "my_idea", "my_idea.py")
    write_report(tmp_path / "my_idea")
    dom = browse((tmp_path / "my_idea" / "report.html").read_text(), tmp_path, width)
    shown = dom.partition('<script type="application/json"')[0]
    assert "Nothing was evaluated yet" in shown
    assert "No gate was checked" in shown
    assert "Every gate holds" not in shown


def test_the_template_is_ascii_and_names_no_host():
    text = (ROOT / "evals" / "report_template.html").read_text()
    assert text.isascii()
    assert "__DATA__" in text
