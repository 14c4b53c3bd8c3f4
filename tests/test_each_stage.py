"""Guards: each of the six stages by itself, as a stranger tries it: its help, then two steps on two
ranks with the row that README.md prints, and a report of that one run."""

import json
import sys

import pytest
from conftest import run_python
from test_data import rows_of_the_readme

import coderl
import ifrl
import mathrl
import rlhf
import sft
import swerl
from evals import report
from lib import flags

STAGES = {
    "sft": sft,
    "rlhf": rlhf,
    "ifrl": ifrl,
    "mathrl": mathrl,
    "coderl": coderl,
    "swerl": swerl,
}
SMALL = {"num_steps": 2, "micro_batch_tokens": 2048}
SMALL_RL = {
    "prompts_per_step": 2,
    "group_size": 2,
    "max_prompt_tokens": 768,
    "max_new_tokens": 8,
    "reward_workers": 1,
    "rope_factor": 0,
}
OWN = {
    "sft": {"samples_per_step": 2, "max_seq_len": 256},
    "rlhf": {"rm_samples_per_step": 2, "rm_max_len": 256},
    "ifrl": {"max_refill_rounds": 1},
    "swerl": {"min_prompt_tokens": 0},
}


def help_of(Config, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["stage.py"])
    return flags.make_parser(Config).format_help()


@pytest.mark.parametrize("stage", STAGES)
def test_help_says_what_every_flag_means(stage, monkeypatch):
    """Each flag with its comment and its default; those of the machine apart."""
    Config = STAGES[stage].Config
    text = help_of(Config, monkeypatch)
    squeezed = "".join(text.split())
    comments = flags.field_comments(Config)
    for name in flags.field_names(Config):
        assert f"--{name} " in text
        default = f"{comments[name]} (default {Config.__dataclass_fields__[name].default!r})"
        assert "".join(default.split()) in squeezed
    stage_flags, machine = text.split("the machine, and what is watched")
    assert "--lr " in stage_flags and "--shard " in machine and "--shard " not in stage_flags


def test_help_reads_comments_beside_and_above_a_field():
    source = (
        "class Config:\n"
        "    lr: float = 1e-6  # AdamW; a # in it\n"
        "    # first line,\n"
        "    # second line\n"
        '    path: str = "a # no comment"\n'
        "    bare: int = 0\n"
        "\n"
        "    # of a group, not of a field\n"
        "\n"
        "    last: int = 0  # beside\n"
    )
    assert flags.comments_of_class(source) == {
        "lr": "AdamW; a # in it",
        "path": "first line, second line",
        "bare": "",
        "last": "beside",
    }


def parse(monkeypatch, *arguments):
    monkeypatch.setattr(sys, "argv", ["mathrl.py", *arguments])
    return flags.parse_config(mathrl.Config)


def test_dashes_in_a_flag_are_underscores(monkeypatch):
    cfg = parse(monkeypatch, "--num-steps=7", "--out-dir", "out/my-run", "--overlong-filter")
    assert (cfg.num_steps, cfg.out_dir, cfg.overlong_filter) == (7, "out/my-run", True)


@pytest.mark.parametrize(
    "flag, meant",
    [("--num-step=3", "--num_steps"), ("--lrr=1", "--lr"), ("--groupsize=8", "--group_size")],
)
def test_a_flag_that_does_not_exist_is_answered_with_the_one_that_was_meant(
    flag, meant, monkeypatch, capsys
):
    with pytest.raises(SystemExit):
        parse(monkeypatch, flag)
    assert f"(did you mean {meant}?). Nothing was trained." in capsys.readouterr().err


@pytest.mark.slow
@pytest.mark.parametrize("stage", STAGES)
def test_two_steps_on_two_ranks_with_the_readme_s_row_and_a_report(stage, world, taught, tmp_path):
    rows = dict(rows_of_the_readme())
    settings = {**SMALL, **(SMALL_RL if stage != "sft" else {}), **OWN.get(stage, {})}
    settings["data"] = tmp_path / "rows.jsonl"
    settings["data"].write_text((rows[stage] + "\n") * 4)
    if stage == "rlhf":
        settings["rm_data"] = tmp_path / "pairs.jsonl"
        settings["rm_data"].write_text((rows["rm"] + "\n") * 4)
    if stage == "ifrl":
        settings["rm"] = ""
    given = [f"--{name}={value}" for name, value in settings.items()]
    out = tmp_path / f"my_{stage}"
    command = (f"{stage}.py", f"--init_from={taught}", f"--out_dir={out}", *given)
    run_python(*command, ranks=2)
    logged = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    assert logged[-1]["step"] == 2

    report.main(report.Config(run=str(out)))
    assert (out / "report.html").exists()
    written = (out / "report.md").read_text()
    assert f"| my_{stage} | 2 |" in written and f"{stage}.py" in written
