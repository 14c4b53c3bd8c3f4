"""Guards: a run can be watched and compared on a page, from its first step on, for one stage as for
a cascade. The page fits a desk and a phone, in light and in dark, and can be read.
"""

import html
import json
import re
import shutil
import subprocess
import threading
import time

import pytest
from test_report import CATCH, cell, folder, measured, read_data, write_jsonl  # noqa: F401
from test_watching import rollouts_of

import mathrl
from evals import report, training
from lib import logs


def train(run, steps=12, num_steps=50, done=False, **flags):
    """Write with the stages' own logger what a run leaves in its folder while it trains."""
    run.mkdir(parents=True)
    logger = logs.Logger(mathrl.Config(out_dir=str(run), num_steps=num_steps, **flags), 0)
    for step in range(1, steps + 1):
        metrics = {"reward": step / 50, "len": 2000.0 + step, "trunc": 0.1, "flat": 0.3}
        metrics |= {"loss": 0.01, "grad_norm": 0.2, "entropy": 0.4, "gap": 1e-3, "lr": 1e-6}
        metrics |= {"num_tokens": 40320, "time/gen": 30.0, "time/train": 10.0}
        metrics |= {"status/ok": step / 50, "status/wrong": 1 - step / 50}
        if step % 5 == 0:
            metrics["eval"] = step / 60
        logger.log(step, metrics, rollouts=rollouts_of(step))
    if done:
        (run / "final").mkdir()
        saved = json.loads((run / "run.json").read_text()) | {"step": steps, "git": "abcdef0123"}
        (run / "final" / "run.json").write_text(json.dumps(saved))
    return run


def page_of(run, **flags):
    """(data, page) of the report of a run folder."""
    report.write_report(report.Config(run=str(run), live=True, **flags))
    return read_data(run), (run / "report.html").read_text()


def compare(a, b):
    report.main(report.Config(compare=f"{a},{b}"))
    page = (a / "compare.html").read_text()
    return json.loads(re.search(r'id="data">(.*?)</script>', page, re.DOTALL)[1]), page


# ---- While a run goes on -------------------------------------------------------------------------
def test_one_stage_is_shown_while_it_trains(tmp_path):
    data, _ = page_of(train(tmp_path / "idea"))
    assert data["reload"] == 30
    assert re.fullmatch(
        r"idea: step 12 of 50, about .* left, last step at \d\d:\d\d UTC", data["subtitle"]
    )
    (run,) = data["runs"]
    assert run["steps"] == 12
    assert run["config"]["num_steps"] == 50, "known before the first checkpoint"
    assert data["metrics"] == [
        "reward",
        "completion tokens",
        "share cut off",
        "entropy, nats a token",
        "groups of equal rewards",
        "sampler - trainer gap, nats a token",
        "gradient norm",
        "loss",
        "learning rate",
        "trained tokens a second",
        "peak memory, GB",
        "statuses, share of rollouts",
    ]
    assert run["curves"]["trained tokens a second"][0] == [1, 1008.0]
    assert run["curves"]["held-out"] == [[5, 5 / 60], [10, 10 / 60]]
    assert list(run["statuses"]) == ["ok", "wrong"], "those that no rollout had are left out"


def test_a_cascade_is_shown_before_anything_was_evaluated(tmp_path):
    train(tmp_path / "rlhf", done=True)
    train(tmp_path / "mathrl", steps=3)
    train(tmp_path / "mathrl_control", steps=3)
    data, _ = page_of(tmp_path)
    assert [run["name"] for run in data["runs"]] == ["rlhf", "mathrl"]
    assert data["subtitle"].startswith("mathrl: step 3 of 50, about ")
    assert data["unmeasured"].startswith("Nothing was evaluated yet: ")
    assert {rollout["stage"] for rollout in data["rollouts"]} == {"rlhf", "mathrl"}


def test_a_cascade_is_shown_while_a_later_stage_trains(tmp_path):
    train(tmp_path / "rlhf", done=True)
    write_jsonl(tmp_path / "results.jsonl", measured(cell("rlhf", "chat", 70, 40)))
    train(tmp_path / "mathrl", steps=3)
    data, _ = page_of(tmp_path)
    assert data["stages"] == ["rlhf"]
    assert [run["progress"].split(",")[0] for run in data["runs"]] == ["", "step 3 of 50"]


def test_a_dead_run_is_told_on_the_page(tmp_path):
    run = train(tmp_path / "idea", steps=0, max_dead_steps=0)
    logger = logs.Logger(mathrl.Config(out_dir=str(run)), 0)
    for step in range(1, 8):
        row = {"reward": 0.0, "grad_norm": 0.0, "loss": 0.0, "flat": 1.0, "status/language": 1.0}
        logger.log(step, row)
    data, _ = page_of(run)
    ((fault,),) = [run["faults"] for run in data["runs"]]
    assert fault.startswith("Steps 1 to 7: no gradient: every rollout is language")


def test_live_ends_with_the_run_and_its_last_page_stands_still(tmp_path):
    run = train(tmp_path / "idea")
    cfg = report.Config(run=str(run), live=True, every=1)
    watcher = threading.Thread(target=report.main, args=(cfg,))
    watcher.start()
    while not (run / "report.md").exists():
        time.sleep(0.05)
    assert read_data(run)["reload"] == 1
    shutil.copytree(train(tmp_path / "done", done=True) / "final", run / "final")
    watcher.join(60)
    assert not watcher.is_alive()
    assert read_data(run)["reload"] == 0
    assert (run / "curves_idea.png").exists()


def test_a_folder_without_anything_is_refused(tmp_path, capsys):
    with pytest.raises(SystemExit):
        report.main(report.Config(run=str(tmp_path), live=True))
    assert "no results.jsonl there. Nothing was read." in capsys.readouterr().err


# ---- Rollouts ------------------------------------------------------------------------------------
def test_rollouts_come_from_all_over_the_training(tmp_path):
    run = train(tmp_path / "idea", steps=40)
    cfg = report.Config(training_prompts=8, training_samples=2)
    shown = training.read_training_rollouts(str(run), cfg)
    steps = [rollout["step"] for rollout in shown]
    assert steps == sorted(steps)
    assert steps[0] == 1 and steps[-1] == 40
    assert len(set(steps)) == 8
    first, second = shown[:2]
    assert (first["prompt"], first["problem"], first["sample"]) == ("q0", 10, 0)
    assert (second["text"], second["reward"], second["advantage"]) == ("x1", 1.0, 0.7)
    assert (second["set"], second["stage"], second["status"]) == ("training", "idea", "ok")


def test_a_file_of_rollouts_may_be_cut_off_anywhere(tmp_path):
    """The run is writing it: from every byte on, and up to every byte, groups are whole."""
    run = train(tmp_path / "idea", steps=3)
    path = run / "rollouts.rank0.jsonl"
    whole = path.read_bytes()
    all_groups = list(training.groups_from(path, 0))
    assert [(g[0]["step"], g[0]["prompt"], len(g)) for g in all_groups] == [
        (step, 10 * step + group, 2) for step in (1, 2, 3) for group in (0, 1)
    ]
    for at in range(0, len(whole), 37):
        for group in training.groups_from(path, at):
            assert group in all_groups
    for end in range(0, len(whole), 37):
        path.write_bytes(whole[:end])
        *before, _ = [*training.groups_from(path, 0), None]
        assert before == all_groups[: len(before)] or before[:-1] == all_groups[: len(before) - 1]
        training.evenly_spaced_groups(path, 4)


def test_the_older_half_is_shown_first(tmp_path):
    run = train(tmp_path / "idea", steps=60, keep_rollouts=2e-5)
    assert (run / "rollouts.rank0.older.jsonl").exists()
    cfg = report.Config(training_prompts=6)
    steps = [r["step"] for r in training.read_training_rollouts(str(run), cfg)]
    assert steps == sorted(steps) and steps[-1] == 60


# ---- Two runs ------------------------------------------------------------------------------------
def test_two_stages_are_compared_in_one_plot_with_the_flags_that_differ(tmp_path):
    a = train(tmp_path / "a", lr=1e-6)
    b = train(tmp_path / "b", steps=5, lr=3e-6, group_size=16)
    data, _ = compare(a, b)
    assert data["compare"]["names"] == ["a", "b"]
    (pair,) = data["compare"]["pairs"]
    assert pair["title"] == "a / b"
    assert [len(curves["reward"]) for curves in pair["curves"]] == [12, 5]
    (flags,) = data["compare"]["flags"]
    assert {row[0]: row[1:] for row in flags["rows"]} == {
        "out_dir": [str(a), str(b)],
        "group_size": ["8", "16"],
        "lr": ["1e-06", "3e-06"],
    }


def test_two_cascades_are_compared_stage_by_stage(tmp_path):
    for run in ("x/toy", "y/toy"):
        train(tmp_path / run / "mathrl")
    train(tmp_path / "x" / "toy" / "coderl")
    data, _ = compare(tmp_path / "x" / "toy", tmp_path / "y" / "toy")
    assert data["compare"]["names"] == ["x/toy", "y/toy"]
    titles = {pair["title"]: pair["curves"] for pair in data["compare"]["pairs"]}
    assert list(titles) == ["mathrl", "coderl"]
    assert titles["coderl"][1] is None
    assert [run["name"] for run in data["runs"]][0] == "x/toy: mathrl"


@pytest.mark.parametrize("flag", ["one", "a,b,c", "nothing/here,neither/here"])
def test_a_comparison_of_what_is_not_there_is_one_sentence(flag, capsys):
    with pytest.raises(SystemExit):
        report.main(report.Config(compare=flag))
    (line,) = capsys.readouterr().err.splitlines()
    assert "--compare" in line and line.endswith("Nothing was read.")


# ---- In a browser --------------------------------------------------------------------------------
WRAPPER = """<!doctype html><meta charset="utf-8"><script>
const page = __PAGE__, seen = [];

// Luminance and alpha of any CSS colour, from a pixel that is painted with it.
const canvas = document.createElement("canvas").getContext("2d", {willReadFrequently: true});
function rgba(colour) {
  canvas.clearRect(0, 0, 1, 1); canvas.fillStyle = colour; canvas.fillRect(0, 0, 1, 1);
  return [...canvas.getImageData(0, 0, 1, 1).data].map(c => c / 255);
}
const over = (top, below) => [0, 1, 2].map(i => top[i] * top[3] + below[i] * (1 - top[3]));
function luminance(rgb) {
  const [r, g, b] = rgb.map(c => c <= .04045 ? c / 12.92 : ((c + .055) / 1.055) ** 2.4);
  return .2126 * r + .7152 * g + .0722 * b;
}
function contrast(view, element) {
  const chain = [];
  for (let e = element; e && e.nodeType === 1; e = e.parentElement) chain.unshift(e);
  let below = [1, 1, 1], opacity = 1;
  for (const e of chain) {
    const style = view.getComputedStyle(e);
    below = over(rgba(style.backgroundColor), below);
    opacity *= +style.opacity;
  }
  const style = view.getComputedStyle(element);
  const ink = rgba(element instanceof view.SVGElement ? style.fill : style.color);
  ink[3] *= opacity;
  const [a, b] = [luminance(over(ink, below)), luminance(below)].sort((x, y) => y - x);
  return (a + .05) / (b + .05);
}
function weakest(view) {
  let worst = [99, ""];
  const walk = view.document.createTreeWalker(view.document.body, 4);
  while (walk.nextNode()) {
    const element = walk.currentNode.parentElement, text = walk.currentNode.data.trim();
    const skipped = element.closest("script, style, title, option, :disabled, [hidden]");
    const shown = element instanceof view.SVGElement || element.offsetParent;
    if (!text || skipped || !shown) continue;
    const found = contrast(view, element);
    if (found < worst[0]) worst = [found, text];
  }
  return worst;
}
async function look(width) {
  const frame = document.createElement("iframe");
  frame.style.cssText = `width:${width}px;height:800px;border:0`;
  frame.srcdoc = page;
  document.body.append(frame);
  await new Promise(done => frame.onload = done);
  const view = frame.contentWindow, doc = frame.contentDocument, root = doc.documentElement;
  for (let scheme = 0; scheme < 2; scheme++) {
    const pressed = ["", ...[...doc.querySelectorAll("#metrics button")].map(b => b.textContent)];
    let widest = 0, worst = [99, ""];
    for (const name of pressed) {
      const button = [...doc.querySelectorAll("#metrics button")].find(b => b.textContent === name);
      if (button) button.click();
      widest = Math.max(widest, root.scrollWidth);
      const found = weakest(view);
      if (found[0] < worst[0]) worst = found;
    }
    const cut = [...doc.querySelectorAll("svg text")].filter(text => {
      const a = text.getBoundingClientRect(), b = text.closest(".card").getBoundingClientRect();
      return a.left < b.left - 1 || a.right > b.right + 1;
    }).map(text => text.textContent);
    seen.push({
      width, inner: view.innerWidth, widest, worst, cut, errors: view.eval("errors"),
      theme: root.dataset.theme, cards: doc.querySelectorAll("#curves .card").length,
      ticks: [...doc.querySelectorAll("#curves svg text")].map(t => t.textContent),
      lines: doc.querySelectorAll("#curves .card:first-child path[stroke-width]").length,
      where: doc.getElementById("where").textContent, text: root.innerText,
    });
    doc.getElementById("theme").click();
  }
}
onload = async () => {
  await look(1280); await look(400);
  document.body.replaceChildren(); document.body.dataset.seen = JSON.stringify(seen);
};
</script><body></body>"""


def look_at(page, tmp_path):
    """What chromium shows of a page in frames of 1280 and 400 pixels, in both themes."""
    names = ("chromium", "chromium-browser", "google-chrome")
    chromium = next(filter(None, map(shutil.which, names)), None)
    if not chromium:
        pytest.skip("no chromium on this machine (Debian: apt-get install chromium)")
    text = json.dumps(page.replace("<main>", CATCH + "<main>", 1)).replace("<", "\\u003c")
    (tmp_path / "wrapper.html").write_text(WRAPPER.replace("__PAGE__", text))
    command = [chromium, "--headless", "--no-sandbox", "--disable-gpu", "--disable-sync"]
    command += ["--disable-background-networking", "--disable-component-update"]
    command += [f"--user-data-dir={tmp_path}/profile", "--enable-logging=stderr"]
    command += ["--window-size=1400,900", "--virtual-time-budget=20000"]
    command += ["--dump-dom", f"file://{tmp_path}/wrapper.html"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert [line for line in done.stderr.splitlines() if "CONSOLE" in line] == []
    seen = json.loads(html.unescape(re.search(r'data-seen="([^"]*)"', done.stdout)[1]))
    assert [(look["inner"], look["theme"]) for look in seen] == [
        (width, theme) for width in (1280, 400) for theme in (seen[0]["theme"], seen[1]["theme"])
    ]
    assert {look["theme"] for look in seen} == {"light", "dark"}
    return seen


def check_looks(seen):
    """No overflow, no console error, no text that cannot be read or leaves its card."""
    for look in seen:
        place = (look["width"], look["theme"])
        assert look["errors"] == [], place
        assert look["widest"] <= look["inner"], place
        assert look["cut"] == [], place
        weakest, text = look["worst"]
        print(f"{place}: weakest contrast {weakest:.2f} : 1, of {text!r}")
        assert weakest >= 4.5, (place, text)


@pytest.mark.slow
def test_a_browser_shows_a_run_that_trains(tmp_path):
    _, page = page_of(train(tmp_path / "idea"))
    seen = look_at(page, tmp_path)
    check_looks(seen)
    for look in seen:
        assert look["cards"] == 12, "all metrics of a single stage stand side by side"
        assert {"0.1", "0.2", "5", "10", "step"} <= set(look["ticks"])
        assert "learning rate" in look["text"]
        assert look["where"].startswith("1 of ")
        assert "step 12 of 50" in look["text"]
        assert "Flags that differ" not in look["text"]


@pytest.mark.slow
def test_a_browser_shows_a_comparison(tmp_path):
    a = train(tmp_path / "a")
    _, page = compare(a, train(tmp_path / "b", steps=5, lr=3e-6))
    seen = look_at(page, tmp_path)
    check_looks(seen)
    for look in seen:
        assert look["lines"] == 2, "both runs are in one plot"
        assert "Flags that differ" in look["text"]
        assert "3e-06" in look["text"]
        assert "What every stage gave and took" not in look["text"]


@pytest.mark.slow
def test_a_browser_shows_an_evaluated_cascade(folder, tmp_path):  # noqa: F811
    shutil.copytree(folder, tmp_path / "tiny")
    with open(tmp_path / "tiny" / "results.jsonl", "a") as f:
        f.writelines(json.dumps(line) + "\n" for line in measured(cell("swerl", "math", 100, 40)))
    train(tmp_path / "tiny" / "mathrl")
    _, page = page_of(tmp_path / "tiny")
    check_looks(look_at(page, tmp_path))
