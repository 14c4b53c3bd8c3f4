"""Guards: evals/audit.py tells what a stage's own reward pays, and finds a reward that pays what it
should not."""

import shutil

import pytest
import torch
from conftest import ROOT, make_tiny

from evals import audit
from model import tokenizer_files
from verifiers import reward_model

ROWS = {"mathrl": "math_rl", "coderl": "code_rl", "swerl": "swe_rl", "ifrl": "if_rl"}
# Kinds that a stage pays like a gold, and means it: SWE RL has no rule on language.
PAID = {
    "mathrl": {"gold"},
    "coderl": {"gold"},
    "swerl": {"gold", "other language"},
    "ifrl": set(),
}


def audited(world, capsys, **settings):
    """{kind: (rows, mean reward, share paid as gold)} of the printed table, and the whole text."""
    audit.main(audit.Config(**{"rows": 6, "limit": 12, **settings}))
    printed = capsys.readouterr().out
    lines = printed.partition("status\n")[2].splitlines()
    kinds = {}
    for line in lines:
        if " earns " not in line and line[31:36].strip().isdigit():
            count, mean, paid = line[30:].split()[:3]
            kinds[line[:30].strip()] = (int(count), float(mean), paid)
    return kinds, printed


SLOW = ("coderl", "ifrl")  # they start processes of their own


@pytest.mark.parametrize(
    "stage", [pytest.param(s, marks=pytest.mark.slow) if s in SLOW else s for s in ROWS]
)
def test_a_stage_pays_golds_and_nothing_else(stage, world, capsys):
    data = str(world / f"{ROWS[stage]}.jsonl")
    kinds, printed = audited(world, capsys, stage=stage, data=data)
    paid = {kind for kind, (_, _, share) in kinds.items() if share not in ("-", "0.0%")}
    assert paid == PAID[stage], printed
    assert {"empty", "copied prompt", "over-long: cut off", "other language"} <= kinds.keys()
    assert kinds["empty"][1] == (-1 if stage == "swerl" else 0)
    if stage == "ifrl":
        assert all(share == "-" for _, _, share in kinds.values()), "there are no golds"
    else:
        assert kinds["gold"][:2] == (6, 1.0) and {"corrupted gold", "thought not closed"} <= set(
            kinds
        )


def test_a_reward_that_pays_hedges_is_found(world, tmp_path, capsys, monkeypatch):
    """A copy of Math RL, beside nothing of the repository, whose verdict takes any box with the
    gold somewhere in it."""
    text = (ROOT / "mathrl.py").read_text()
    line = "    status = compare(str(answer), given, prompt, as_text)\n"
    assert line in text
    kind_verifier = '    status = "ok" if str(answer) in given else "wrong"\n'
    (tmp_path / "my_idea.py").write_text(text.replace(line, kind_verifier))
    monkeypatch.syspath_prepend(tmp_path)
    data = str(world / "math_rl.jsonl")
    kinds, printed = audited(world, capsys, stage="my_idea", data=data, shown=1)
    assert kinds["gold"][2] == kinds["hedge: both in one box"][2] == "100.0%"
    assert "hedge: both in one box earns 1 (ok): '\\\\boxed{" in printed


def test_golds_that_are_not_paid_are_shown(world, capsys, monkeypatch):
    import mathrl

    monkeypatch.setattr(mathrl, "compare", lambda *args: "wrong")
    kinds, printed = audited(world, capsys, stage="mathrl", data=str(world / "math_rl.jsonl"))
    assert kinds["gold"][1:] == (0.0, "0.0%") and printed.count("gold earns 0 (wrong): ") == 3
    # An empty answer earns as much as the golds do.
    paid = {kind for kind, (_, _, share) in kinds.items() if share != "0.0%"}
    assert paid == {"empty"}


def test_the_golds_of_a_reward_model_are_chosen_answers(world, tmp_path, capsys):
    body = make_tiny(vocab_size=640, std=0.1, max_position_embeddings=2048)
    body.tokenizer_files = tokenizer_files(world / "base")
    model = reward_model.RewardModel(body)
    model.score.weight.data.normal_(generator=torch.Generator().manual_seed(3))
    model.save_pretrained(tmp_path / "rm")
    kinds, printed = audited(
        world,
        capsys,
        stage="rlhf",
        data=str(world / "preference.jsonl"),
        flags=f"--rm={tmp_path / 'rm'}",
    )
    assert kinds["gold"][2] != "-" and {"corrupted gold", "gold of another row"} <= set(kinds)
    assert kinds["over-long: cut off"] == kinds["gold"], "the same answer"
    kinds, _ = audited(
        world,
        capsys,
        stage="rlhf",
        data=str(world / "chat_rl.jsonl"),
        flags=f"--rm={tmp_path / 'rm'}",
    )
    assert "gold" not in kinds and kinds["hedge"][2] == "-"
    shutil.rmtree(tmp_path / "rm")


@pytest.mark.parametrize(
    "settings, said",
    [
        ({"stage": "mathrll"}, "--stage=mathrll: no RL stage of that name. Nothing was judged."),
        ({"stage": "sft"}, "--stage=sft: no RL stage of that name."),
        ({"stage": ""}, "--stage=: no RL stage of that name."),
        ({"stage": "rlhf"}, "--rm=FOLDER or URL, the reward model, is missing."),
        ({"stage": "mathrl", "flags": "--group_size=x"}, "--group_size: invalid int value: 'x'"),
    ],
)
def test_settings_that_cannot_be_meant(settings, said, world, capsys):
    with pytest.raises(SystemExit) as stop:
        audit.main(audit.Config(data=str(world / "math_rl.jsonl"), **settings))
    assert stop.value.code == 2 and said in capsys.readouterr().err
