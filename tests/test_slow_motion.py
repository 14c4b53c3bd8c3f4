"""Guards: the slow motion of a step runs for every RL stage, on that stage's own functions; its
numbers are those of a hand computation; its page is one file that fits a phone and a desk, in light
and in dark, and cannot be broken by what a model wrote.
"""

import copy
import html
import json
import math
import re
import shutil
import subprocess

import pytest
import torch
from conftest import ROOT, make_tiny, run_python

from extras import slow_motion, slow_motion_view
from lib.flags import field_comments, field_names
from model import tokenizer_files
from verifiers import reward_model

# Problems that the model was taught, so that some rewards differ.
DATA = {
    "rlhf": "chat_rl",
    "ifrl": "if_rl",
    "mathrl": "math_sft",
    "coderl": "code_sft",
    "swerl": "swe_sft",
}
STAGES = list(DATA)
RUN_ALL = """
import json, sys
from extras import slow_motion
from lib.common import finish
for flags in json.loads(sys.argv[1]):
    slow_motion.main(slow_motion.Config(**flags))
finish()
"""


@pytest.fixture(scope="module")
def rm(world, tmp_path_factory):
    """Folder of a small reward model. Its head is not zero, so that answers score differently."""
    folder = tmp_path_factory.mktemp("rm") / "rm"
    body = make_tiny(vocab_size=640, std=0.1)
    body.tokenizer_files = tokenizer_files(world / "base")
    model = reward_model.RewardModel(body)
    torch.nn.init.normal_(model.score.weight, generator=torch.Generator().manual_seed(3))
    model.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def shown(world, taught, rm, tmp_path_factory):
    """(folder of the pages, what was printed): all five stages, in one process."""
    out = tmp_path_factory.mktemp("slow_motion")
    runs = []
    for stage in STAGES:
        flags = {"stage": stage, "init_from": str(taught), "rm": str(rm)}
        flags |= {"data": f"{world}/{DATA[stage]}.jsonl", "out": f"{out}/{stage}.html"}
        runs.append(flags | {"prompts": 6, "group_size": 4, "max_new_tokens": 60})
    _, printed, _ = run_python("-c", RUN_ALL, json.dumps(runs))
    return out, printed


def read_run(page):
    """The numbers that a page holds."""
    return json.loads(
        re.search(r'<script type="application/json" id="data">(.*?)</script>', page)[1]
    )


@pytest.fixture(scope="module")
def runs(shown):
    folder, _ = shown
    return {stage: read_run((folder / f"{stage}.html").read_text()) for stage in STAGES}


# ---- It runs -------------------------------------------------------------------------------------
@pytest.mark.slow
def test_it_runs_by_its_path_on_the_files_of_the_run(world, taught, tmp_path):
    """The README's command: the data are found beside the checkpoint, which is only read."""
    out = tmp_path / "page.html"
    before = (taught / "model.safetensors").read_bytes()
    code, printed, _ = run_python(
        "extras/slow_motion.py", f"--init_from={taught}", "--prompts=4", f"--out={out}"
    )
    assert code == 0 and (taught / "model.safetensors").read_bytes() == before
    assert read_run(out.read_text())["data"] == f"{world}/math_rl.jsonl"
    assert (
        max(len(line) for line in printed.splitlines() if str(tmp_path.parent) not in line) <= 100
    )
    assert "\033" not in printed, "colours only in a terminal"


@pytest.mark.slow
@pytest.mark.parametrize("stage", STAGES)
def test_every_stage_shows_the_seven_steps(stage, shown, runs):
    folder, printed = shown
    page = (folder / f"{stage}.html").read_text()
    assert runs[stage]["has_gradient"], "no group of 6 has rewards that differ"
    assert [f"step{n}" for n in range(1, 8)] == re.findall(r'<section id="(\w+)"', page)
    part = printed.split("One GRPO step of ")[1 + STAGES.index(stage)]
    assert re.findall(r"^---- (\d)\.", part, re.MULTILINE) == list("1234567")
    seconds = runs[stage]["seconds"]
    print(f"{stage}: {seconds:.1f} s")
    assert seconds < 60


def test_every_flag_is_explained():
    comments = field_comments(slow_motion.Config)
    assert [name for name in field_names(slow_motion.Config) if not comments[name]] == []


@pytest.mark.parametrize(
    ("flags", "sentence"),
    [
        ({"stage": "sft"}, "--stage=sft: expected rlhf, ifrl, mathrl, coderl, swerl."),
        ({"init_from": "nowhere"}, "--init_from=nowhere: no such folder"),
        ({"data": "nowhere.jsonl"}, "nowhere.jsonl"),
        ({"stage": "rlhf", "rm": "nowhere"}, "--rm: nowhere is not there"),
    ],
)
def test_wrong_input_ends_with_a_sentence(flags, sentence, taught, tmp_path, capsys):
    with pytest.raises(SystemExit) as end:
        slow_motion.main(slow_motion.Config(**{"init_from": str(taught), **flags}))
    assert end.value.code == 2
    said = capsys.readouterr().err
    assert sentence in said and said.count("\n") == 1


def test_without_the_file_of_the_toy_it_says_how_to_make_it(world, tmp_path, capsys):
    """The base model is in no run: two folders above it there are no data."""
    folder = shutil.copytree(world / "base", tmp_path / "sft2" / "final")
    with pytest.raises(SystemExit):
        slow_motion.main(slow_motion.Config(init_from=str(folder)))
    expected = f"--data: {tmp_path}/data/math_rl.jsonl is not there. Pass a file, or make it with"
    assert expected in capsys.readouterr().err


# ---- Its numbers ---------------------------------------------------------------------------------
def close(what, value, expected, tolerance):
    error = abs(value - expected)
    print(f"{what}: error {error:.1e}, tolerance {tolerance:.0e}")
    assert error <= tolerance


@pytest.mark.slow
@pytest.mark.parametrize("stage", STAGES)
def test_advantages_denominator_and_loss_are_those_of_a_hand_computation(stage, runs, shown):
    run = runs[stage]
    rollouts = run["rollouts"]

    # advantage = (reward - mean) / (std + 1e-6), std with n - 1, in every group.
    groups = {}
    for r in rollouts:
        groups.setdefault(r["group"], []).append(r)
    error = 0.0
    for group in groups.values():
        rewards = [r["reward"] for r in group if r["in_loss"]]
        if len(set(rewards)) < 2:
            assert all(r["advantage"] == 0 for r in group)
            continue
        mean = sum(rewards) / len(rewards)
        std = math.sqrt(sum((x - mean) ** 2 for x in rewards) / (len(rewards) - 1))
        for r in group:
            expected = (r["reward"] - mean) / (std + 1e-6) if r["in_loss"] else 0.0
            error = max(error, abs(r["advantage"] - expected))
    close(f"{stage}, advantages", error, 0.0, 1e-9)

    # loss = -sum of advantage over all tokens / their number. (RLHF's KL is 0 in the first step.)
    num_tokens = sum(r["length"] for r in rollouts if r["in_loss"])
    assert run["num_tokens"] == run["metrics"]["num_tokens"] == num_tokens
    loss = -sum(r["advantage"] * r["length"] for r in rollouts) / num_tokens
    close(f"{stage}, grpo_loss", sum(run["losses"]), loss, 1e-6)
    close(f"{stage}, train_step", run["metrics"]["loss"], loss, 1e-6)

    # What is printed are these numbers.
    part = shown[1].split("One GRPO step of ")[1 + STAGES.index(stage)]
    for r in run["group"]:
        assert f"{r['advantage']:+.4f}" in part or not r["in_loss"]
    assert f"denominator: {num_tokens} completion tokens in the loss" in part
    assert f"loss of train_step: {run['metrics']['loss']:.4g}" in part


@pytest.mark.slow
@pytest.mark.parametrize("stage", STAGES)
def test_the_tokens_of_a_group_are_those_of_the_loss(stage, runs):
    run = runs[stage]
    gain = 0.0
    for r in run["group"]:
        assert len(r["tokens"]) == r["length"]
        if r["advantage"] == 0:
            continue
        for token in r["tokens"]:
            assert token["ratio"] == token["weight"] == 1 and token["old"] == token["logprob"]
            assert abs(token["sampler"] - token["logprob"]) < 1e-4
            assert token["share"] == -r["advantage"] / run["num_tokens"]
            assert token["gradient"] == pytest.approx(token["share"], rel=1e-5)
            gain += r["advantage"] * (token["after"] - token["logprob"])
    print(f"{stage}: sum of advantage x change of log-prob {gain:+.3f}")
    assert gain > 0, "the update went against the advantages"


@pytest.mark.slow
@pytest.mark.parametrize("stage", STAGES)
def test_the_micro_batch_is_packed_as_it_says(stage, runs):
    batch = runs[stage]["micro_batch"]
    ids = [token["id"] for token in batch["tokens"]]
    offsets = batch["cu_seqlens"]
    assert offsets[0] == 0 and offsets[-1] == len(ids) <= 512 and offsets == sorted(set(offsets))
    in_loss = set(batch["loss_index"])
    assert {t for t, a in enumerate(batch["advantages"]) if a != 0} == in_loss
    if batch["first"] is not None:
        assert [ids[batch["first"][u]] for u in batch["copy"]] == ids
    # The best completion of the group ends one of its sequences.
    best = runs[stage]["group"][runs[stage]["best"]]
    prompt = [token["id"] for token in runs[stage]["prompt"]]
    sequence = prompt + [token["id"] for token in best["tokens"]]
    assert sequence in [ids[a:b] for a, b in zip(offsets, offsets[1:])]


@pytest.mark.slow
def test_a_step_without_a_gradient_ends_after_the_second(world, taught, tmp_path, capsys):
    """One completion a group has nothing to be compared with."""
    flags = {"init_from": str(taught), "data": f"{world}/math_sft.jsonl", "group_size": 1}
    slow_motion.main(slow_motion.Config(**flags, out=str(tmp_path / "page.html")))
    printed = capsys.readouterr().out
    assert re.findall(r"^---- (\d)\.", printed, re.MULTILINE) == ["1", "2"]
    words = " ".join(printed.split())
    assert "there is nothing to learn" in words and "overlong filter" not in words


# ---- Its page ------------------------------------------------------------------------------------
HOSTILE = (
    "</script></span><script>document.title='taken'</script><img src=x onerror=alert(1)>__STEPS__"
)


@pytest.mark.slow
def test_no_text_of_a_model_becomes_markup_or_reaches_the_terminal_raw(runs, tmp_path, capsys):
    run = copy.deepcopy(runs["mathrl"])
    for part in (run["prompt"], run["micro_batch"]["tokens"], *(r["tokens"] for r in run["group"])):
        for token in part:
            token["text"] = HOSTILE + "\033[2J\n"
    slow_motion_view.write_page(str(tmp_path / "page.html"), run)
    page = (tmp_path / "page.html").read_text()
    assert page.count("</script>") == page.count("<script") == 1 and "<img" not in page
    assert page.count("<section") == 7
    assert read_run(page)["prompt"][0]["text"] == HOSTILE + "\033[2J\n"
    slow_motion_view.print_steps(run)
    printed = capsys.readouterr().out
    assert "\033" not in printed and max(map(len, printed.splitlines())) <= 100


@pytest.mark.slow
def test_the_page_is_one_file_without_scripts_or_addresses(shown):
    page = (shown[0] / "mathrl.html").read_text()
    links = re.findall(r'(?:src|href)="([^"]*)"', page)
    assert [link for link in links if not link.startswith(("#step", "data:,"))] == []
    assert "http" not in page and "url(" not in page and "@import" not in page
    assert re.findall(r"<script[^>]*>", page) == ['<script type="application/json" id="data">']


def test_the_template_is_ascii_and_its_colours_have_contrast():
    """WCAG: 4.5 to 1 for text, in light and in dark."""
    template = (ROOT / "extras" / "slow_motion_template.html").read_text()
    assert template.isascii()

    def luminance(colour):
        total = 0.0
        for share, digits in ((0.2126, colour[1:3]), (0.7152, colour[3:5]), (0.0722, colour[5:7])):
            value = int(digits, 16) / 255
            total += share * (value / 12.92 if value <= 0.04 else ((value + 0.055) / 1.055) ** 2.4)
        return total

    pairs = [(text, back) for text in ("ink", "soft") for back in ("paper", "card", "wash")]
    pairs += [("accent", "paper"), ("card", "accent"), ("up-ink", "up"), ("down-ink", "down")]
    schemes = re.findall(r":root \{(.*?)\}", template, re.DOTALL)
    assert len(schemes) == 2
    for scheme in schemes:
        colours = dict(re.findall(r"--([\w-]+): (#\w{6})", scheme))
        for text, back in pairs:
            low, high = sorted((luminance(colours[text]), luminance(colours[back])))
            assert (high + 0.05) / (low + 0.05) >= 4.5, (text, back)


CATCH = """<script>
const errors = [];
addEventListener("error", e => errors.push(e.message));
for (const kind of ["error", "warn"]) console[kind] = (...a) => errors.push(a.join(" "));
</script>"""
WRAPPER = """<!doctype html><style>:root { color-scheme: light dark }</style><script>
const page = __PAGE__, seen = {};
async function look(width) {
  const frame = document.createElement("iframe");
  frame.style.cssText = `width:${width}px;height:800px;border:0`;
  frame.srcdoc = page;
  document.body.append(frame);
  await new Promise(done => frame.onload = done);
  const view = frame.contentWindow, root = frame.contentDocument.documentElement;
  const token = frame.contentDocument.querySelector("span.up, span.down");
  token.focus();
  seen[width] = {
    inner: view.innerWidth, scroll: root.scrollWidth, errors: view.eval("errors"),
    paper: view.getComputedStyle(frame.contentDocument.body).backgroundColor,
    tip: view.getComputedStyle(token, "::after").content,
  };
}
onload = async () => {
  await look(1280); await look(400);
  document.body.replaceChildren(); document.body.dataset.seen = JSON.stringify(seen);
};
</script><body></body>"""


@pytest.mark.slow
@pytest.mark.parametrize("stage", ["rlhf", "coderl"])
def test_a_browser_shows_the_page_without_overflow_or_console_error(stage, shown, tmp_path):
    """In frames of 1280 and 400 pixels, light and dark. A tapped token shows its numbers."""
    names = ("chromium", "chromium-browser", "google-chrome")
    chromium = next(filter(None, map(shutil.which, names)), None)
    if not chromium:
        pytest.skip("no chromium on this machine (Debian: apt-get install chromium)")
    page = (shown[0] / f"{stage}.html").read_text().replace("<main>", CATCH + "<main>", 1)
    text = json.dumps(page).replace("<", "\\u003c")
    (tmp_path / "wrapper.html").write_text(WRAPPER.replace("__PAGE__", text))
    paper = {}
    for number, scheme in enumerate(("dark", "light")):
        command = [chromium, "--headless", "--no-sandbox", "--disable-gpu", "--disable-sync"]
        command += ["--disable-background-networking", "--disable-component-update"]
        command += [f"--blink-settings=preferredColorScheme={number}", "--window-size=1400,900"]
        command += [f"--user-data-dir={tmp_path}/{scheme}", "--enable-logging=stderr"]
        command += ["--virtual-time-budget=5000", "--dump-dom", f"file://{tmp_path}/wrapper.html"]
        done = subprocess.run(command, capture_output=True, text=True, timeout=120)
        console = [line for line in done.stderr.splitlines() if "CONSOLE" in line]
        assert console == []
        seen = json.loads(html.unescape(re.search(r'data-seen="([^"]*)"', done.stdout)[1]))
        for width in ("1280", "400"):
            assert seen[width]["inner"] == int(width)
            assert seen[width]["scroll"] <= seen[width]["inner"], (scheme, width)
            assert seen[width]["errors"] == []
            assert "advantage" in seen[width]["tip"]
        paper[scheme] = seen["400"]["paper"]
    assert paper["dark"] != paper["light"]
