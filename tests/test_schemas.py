"""Guards: a row is read as its owner meant it, in whatever schema it is, or it is refused by name.

One chat in six schemas trains on the same tokens. Thoughts are found wherever sets and servers keep
them. What no code looked at is said, and what matters among it stops the run.
"""

import contextlib
import importlib
import io
import json
import os
import pathlib
import re
import tempfile

import numpy as np
import pytest
from conftest import ROOT

import coderl
import ifrl
import mathrl
import rlhf
import sft
from extras import decontaminate
from lib import chats, data
from lib.unread import ANSWERED, ASKED, Watched, kind_of_field
from verifiers import answers, programs, reward_model

ALL_KINDS = ASKED | ANSWERED


def rows_of(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def read_sft(path, ignore_fields="", can_stop=True):
    rows = data.read_rows(path)
    return list(
        data.normal_rows(rows, sft.normalize, path, ignore_fields, ALL_KINDS, can_stop=can_stop)
    )


def asked(text, answer, **more):
    """A chat of one question and its answer; `more` are further fields of the answer's turn."""
    user = {"role": "user", "content": text}
    return {"messages": [user, {"role": "assistant", "content": answer, **more}]}


# ---- One chat in six schemas ---------------------------------------------------------------------
def chat(n):
    """(system, earlier question, earlier answer, question, thought, answer); "" where none is."""
    draw = np.random.default_rng(n)
    words = ["old", "king", "Stra\u00dfe", "\u6570", "x + 1", "line\nbreak", "two", "</b>", "ends."]

    def text():
        return " ".join(draw.choice(words, 6))

    system = text() if n % 3 == 0 else ""
    earlier = (text(), text()) if n % 2 else ("", "")
    thought = text() if n % 5 < 2 else ""
    return system, *earlier, text(), thought, text()


def as_chat(row, role="role", content="content", names=("user", "assistant"), thought_field=""):
    """A list of turns. The thought stands in the text, or in a field of its own."""
    system, earlier, reply, question, thought, answer = row
    pairs = [("system", system)] if system else []
    if earlier:
        pairs += [(names[0], earlier), (names[1], reply)]
    if thought and not thought_field:
        answer = f"<think>\n{thought}\n</think>\n\n{answer}"
    turns = [{role: who, content: text} for who, text in [*pairs, (names[0], question)]]
    last = {role: names[1], content: answer}
    if thought and thought_field:
        last[thought_field] = thought
    return [*turns, last]


def messages(row):
    return {"messages": as_chat(row)}


def share_gpt(row):
    turns = as_chat(row, "from", "value", ("human", "gpt"))
    system = [turn for turn in turns if turn["from"] == "system"]
    conversations = [turn for turn in turns if turn["from"] != "system"]
    return {"conversations": conversations, "system": system[0]["value"] if system else ""}


def alpaca(row):
    system, earlier, reply, question, thought, answer = row
    if thought:
        answer = f"{thought}\n</think>\n\n{answer}"  # the template wrote the opening tag
    history = [[earlier, reply]] if earlier else []
    named = {"instruction": question, "input": "", "output": answer}
    return {**named, "system": system, "history": history}


def in_parts(row):
    turns = as_chat(row, thought_field="reasoning_content")
    for turn in turns:
        turn["content"] = [{"type": "text", "value": turn["content"]}]
    return {"messages": turns}


def from_a_server(row):
    turns = as_chat(row, thought_field="reasoning")
    for turn in turns:
        if turn["role"] == "system":
            turn["role"] = "developer"
    return {"messages": turns}


def prompt_and_completion(row):
    turns = as_chat(row)
    return {"prompt": turns[:-1], "completion": turns[-1:]}


SIX = [messages, share_gpt, alpaca, in_parts, from_a_server, prompt_and_completion]


@pytest.mark.parametrize("schema", SIX[1:])
def test_the_same_chats_in_six_schemas_train_on_identical_tokens(schema, tokenizer, tmp_path):
    chats_of_the_set = [chat(n) for n in range(500)]
    cfg = sft.Config(max_seq_len=4096)

    def samples(write):
        path = rows_of(tmp_path / f"{write.__name__}.jsonl", map(write, chats_of_the_set))
        return sft.load_samples(path, tokenizer, cfg)

    expected, found = samples(messages), samples(schema)
    assert len(expected) == len(found) == 500
    for (ids, mask, _), (other_ids, other_mask, _) in zip(expected, found, strict=True):
        assert ids.tolist() == other_ids.tolist() and mask.tolist() == other_mask.tolist()


# ---- Thoughts ------------------------------------------------------------------------------------
def trained_text(row, tokenizer):
    """(think, the text that is trained on) of a raw row."""
    ids, mask, _ = sft.encode(sft.normalize(Watched(row), "row 1"), tokenizer, sft.Config())
    think = sft.normalize(Watched(row), "row 1")["think"]
    return think, tokenizer.decode(ids[mask].tolist(), skip_special_tokens=False)


THOUGHT = (True, "<think>\ntwo and two\n</think>\n\n4<|im_end|>")
NONE = (False, "4<|im_end|>")


@pytest.mark.parametrize("name", chats.THOUGHT_FIELDS)
def test_a_thought_in_a_field_is_trained_on_under_every_name(name, tokenizer):
    assert trained_text(asked("2 + 2?", "4", **{name: "two and two"}), tokenizer) == THOUGHT
    parts = [{"type": "text", "text": "two and two"}]
    assert trained_text(asked("2 + 2?", "4", **{name: parts}), tokenizer) == THOUGHT
    assert trained_text(asked("2 + 2?", "4", **{name: None}), tokenizer) == NONE
    # Beside the answer of a question it has the same names.
    row = {"question": "2 + 2?", "answer": "4", name: "two and two"}
    assert trained_text(row, tokenizer) == THOUGHT


@pytest.mark.parametrize("opening, closing", chats.THOUGHT_MARKS)
def test_a_thought_in_the_text_is_trained_on_whoever_wrote_its_opening_mark(
    opening, closing, tokenizer
):
    for text in (
        f"{opening}\ntwo and two\n{closing}\n\n4",
        f"\n {opening}two and two{closing}4",
        f"two and two\n{closing}\n\n4",
    ):
        think, trained = trained_text(asked("2 + 2?", text), tokenizer)
        assert think and "".join(trained.split()) == "".join(THOUGHT[1].split())
    # An empty thought is a reply without one.
    for text in (f"{opening}\n\n{closing}\n\n4", f"\n\n{closing}\n\n4", f"{opening}{closing}4"):
        assert trained_text(asked("2 + 2?", text), tokenizer) == NONE
    for text in (f"{opening} no end", f"a{closing}b{closing}4", f"{opening}a{opening}b{closing}4"):
        with pytest.raises(data.BadRow, match="thought"):
            sft.normalize(asked("2 + 2?", text), "row 1")


def test_parts_that_are_thoughts_are_trained_on_as_thoughts(tokenizer):
    for part in (
        {"type": "thinking", "thinking": "two and two", "signature": "x"},
        {"type": "reasoning", "text": "two and two"},
    ):
        row = asked("2 + 2?", [part, {"type": "text", "text": "4"}])
        assert trained_text(row, tokenizer) == THOUGHT


def test_a_mode_that_the_thoughts_contradict_is_dropped():
    """Else one mode is taught what the other one does."""
    with pytest.raises(data.BadRow, match="a think conversation without a thought"):
        sft.normalize({**asked("2 + 2?", "<think>\n</think>4"), "thinking": True}, "row 1")
    with pytest.raises(data.BadRow, match="reasoning in a no_think conversation"):
        sft.normalize({**asked("2 + 2?", "two\n</think>4"), "thinking": False}, "row 1")
    with pytest.raises(data.BadRow, match="the last assistant turn is empty"):
        sft.normalize(asked("2 + 2?", "<think>two and two</think>"), "row 1")


# ---- Questions and turns -------------------------------------------------------------------------
BRIEF = {"role": "system", "content": "Be brief."}


def question_of(row):
    return sft.normalize(row, "row 1")["messages"][-2]["content"]


@pytest.mark.parametrize(
    "row",
    [
        {"instruction": "Translate.", "input": "Good morning", "output": "Bonjour"},  # Alpaca
        {"instruction": "Translate.", "context": "Good morning", "response": "Bonjour"},  # Dolly
        {"query": "Translate.\n\nGood morning", "response": "Bonjour"},  # MetaMath
        {"prompt": "Translate.\n\nGood morning", "completion": "Bonjour"},  # TRL
    ],
)
def test_an_instruction_and_what_it_is_about_are_both_in_the_question(row):
    assert question_of(row) == "Translate.\n\nGood morning"


def test_a_turn_that_is_a_call_and_its_observation_are_a_tool_call_and_its_reply():
    call = {"name": "add", "arguments": {"a": 2}}
    turns = [
        {"from": "human", "value": "2 + 2?"},
        {"from": "function_call", "value": json.dumps(call)},
        {"from": "observation", "value": "4"},
        {"from": "gpt", "value": "It is 4."},
    ]
    tools = json.dumps([{"name": "add", "parameters": {}}])
    row = sft.normalize({"conversations": turns, "tools": tools}, "row 1")
    roles = [message["role"] for message in row["messages"]]
    assert roles == ["user", "assistant", "tool", "assistant"] and len(row["tools"]) == 1
    assert row["messages"][1]["tool_calls"] == [call] and row["messages"][1]["content"] == ""


@pytest.mark.parametrize(
    "row, reason",
    [
        ({"prompt": "Hi", "chosen": "a", "rejected": "b"}, "a preference row"),
        (asked("<image>\nWhat is this?", "A cat."), "an image"),
        (asked("What is this?\n<image>", "A cat."), "an image"),
        (asked("Look:\n<image>\nWhat is this?", "A cat."), "an image"),
        (asked([{"type": "image_url", "image_url": {"url": "x"}}], "A cat."), "not text"),
        (asked([{"type": "text", "text": "What?", "image": "x"}], "A cat."), "not text"),
        (
            {
                **asked("Hi", "Ho"),
                "messages": [BRIEF, *asked("Hi", "Ho")["messages"]],
                "system": "x",
            },
            "a system prompt in the row and another",
        ),
        (asked("Hi", "Ho", weight=0), "not to be trained on"),
        (asked("Hi", "Ho", loss_weight=0.0), "not to be trained on"),
        (asked("Hi", "Ho", train=False), "not to be trained on"),
        ({**asked("Hi", "Ho"), "messages": "no chat"}, "not valid JSON"),
        ({"instruction": "Hi", "output": "Ho", "history": ["x"]}, "no list of pairs"),
    ],
)
def test_a_row_that_sft_cannot_mean_is_dropped_with_its_reason(row, reason):
    with pytest.raises(data.BadRow, match=reason):
        sft.normalize(row, "row 1")


def test_a_word_about_images_is_no_image():
    question = "Does <image> stand before <video> in the specification?"
    assert question_of(asked(question, "Yes.")) == question


# ---- What nobody read ----------------------------------------------------------------------------
def test_a_watched_row_knows_what_was_looked_at():
    row = Watched({"a": 1, "b": {"c": 2, "d": 3}, "e": [{"f": 4, "g": 5}], "h": None, "i": []})
    assert row.unread() == {"a", "b", "e"}
    assert row["b"]["c"] == 2 and row.get("e")[0]["f"] == 4
    assert "a" in row and list(row) == ["a", "b", "e", "h", "i"]  # neither is a look at it
    assert row.unread() == {"a", "b.d", "e[].g"}
    changed = row | {"x": 7}
    assert changed["a"] == 1 and row.unread() == {"b.d", "e[].g"}
    assert json.loads(json.dumps(row["b"])) == {"c": 2, "d": 3} and row.unread() == {"e[].g"}
    assert row == {"a": 1, "b": {"c": 2, "d": 3}, "e": [{"f": 4, "g": 5}], "h": None, "i": []}


def test_fields_that_nobody_looked_at_are_said_with_their_shares(tmp_path, capsys):
    rows = [{**asked("Hi", f"Ho {n}"), "source": "x", "id": n if n else None} for n in range(4)]
    path = rows_of(tmp_path / "rows.jsonl", rows)
    assert len(read_sft(path)) == 4
    assert f"data {path}: not read: source in 4 of 4 rows, id in 3 of 4 rows\n" in (
        capsys.readouterr().out
    )


MATTERS = [  # row of SFT, the field that nobody reads, what it is
    ({**asked("Hi", "Ho"), "label": False}, "label", "a label"),  # KTO
    ({**asked("Hi", "Ho"), "kto_tag": True}, "kto_tag", "a label"),
    ({"prompt": "Hi", "completion": "Ho", "label": True}, "label", "a label"),
    ({"prompt": "Hi", "response": "Ho", "helpfulness": 0}, "helpfulness", "a label"),
    ({**asked("Hi", "Ho"), "rejected_response": "No"}, "rejected_response", "a label"),
    ({**asked("Hi", "Ho"), "images": ["a.png"]}, "images", "an image"),
    ({**asked("Hi", "Ho"), "image": {"bytes": "x"}}, "image", "an image"),
    (asked("Hi", "Ho", images=["a.png"]), "messages[].images", "an image"),
    ({**asked("Hi", "Ho"), "instruction": "Answer."}, "instruction", "an instruction"),
    ({**asked("Hi", "Ho"), "context": "It rains."}, "context", "an instruction"),
    ({**asked("Hi", "Ho"), "deepseek_reasoning": "Hm."}, "deepseek_reasoning", "a thought"),
    (asked("Hi", "Ho", internal_thoughts="Hm."), "messages[].internal_thoughts", "a thought"),
    ({**asked("Hi", "Ho"), "tool_choice": "auto"}, "tool_choice", "a tool"),
]


@pytest.mark.parametrize("row, field, kind", MATTERS)
def test_a_field_that_matters_and_that_nobody_reads_stops_the_run(
    row, field, kind, tmp_path, capsys
):
    path = rows_of(tmp_path / "rows.jsonl", [asked("Hi", "Ho"), row])
    with pytest.raises(SystemExit) as stop:
        read_sft(path)
    said = capsys.readouterr().err
    assert stop.value.code == 2 and said.count("\n") == 1
    assert f"{field}, {kind} by its name, is in 1 of 2 rows (first: {path} row 2)" in said
    # A flag allows it, by the whole name or by its last part.
    for allowed in (field, f"other, {field.split('.')[-1]}"):
        assert len(read_sft(path, allowed)) == 2
    # Days into a run it is a row that is dropped.
    assert len(read_sft(path, can_stop=False)) == 1


@pytest.mark.parametrize(
    "stage, row, field",
    [
        (rlhf, {"prompt": "Hi", "images": ["x"]}, "images"),
        (rlhf, {"prompt": "Hi", "system_prompt": "Be brief."}, "system_prompt"),
        (mathrl, {"problem": "1 + 1?", "answer": "2", "image": "x"}, "image"),
        (mathrl, {"question": "How many?", "context": "3 men", "answer": "3"}, "context"),
        (
            ifrl,
            {
                "prompt": "Hi",
                "instruction_id_list": ["punctuation:no_comma"],
                "kwargs": [{}],
                "tools": [{"name": "f"}],
            },
            "tools",
        ),
        (
            coderl,
            {
                "problem": "Double it.",
                "tests": {"inputs": ["1"], "outputs": ["2"]},
                "input_image": "x",
            },
            "input_image",
        ),
    ],
)
def test_what_a_question_lacks_stops_every_stage(stage, row, field, tmp_path, capsys):
    path = rows_of(tmp_path / "rows.jsonl", [row])
    with pytest.raises(SystemExit):
        stage.load_rows(stage.Config(data=path))
    assert f"--ignore_fields={field} allows that" in capsys.readouterr().err
    assert stage.load_rows(stage.Config(data=path, ignore_fields=field))


def test_what_does_not_matter_in_a_name_stops_nothing():
    for name in ("docker_image", "image_name", "source", "messages[].id", "reward_model", "task"):
        assert kind_of_field(name, ALL_KINDS) == ""
    # Where nothing is learned from answers, neither thoughts nor labels matter.
    assert kind_of_field("reasoning", ASKED) == kind_of_field("label", ASKED) == ""


# ---- One row never ends a run --------------------------------------------------------------------
def test_half_of_a_surrogate_pair_is_a_dropped_row_in_every_stage(tmp_path, capsys, tokenizer):
    """It once ended a run at the same row for ever."""
    bad = json.loads('"half \\ud800"')
    for name, good, broken in (
        (sft, asked("Hi", "Ho"), asked(bad, "Ho")),
        (mathrl, {"problem": "1 + 1?", "answer": "2"}, {"problem": bad, "answer": "2"}),
        (rlhf, {"prompt": "Hi"}, {"prompt": bad}),
    ):
        path = rows_of(tmp_path / f"{name.__name__}.jsonl", [good, broken])
        if name is sft:
            assert len(sft.load_samples(path, tokenizer, sft.Config())) == 1
        else:
            contents = {
                row["messages"][-1]["content"] for row in name.load_rows(name.Config(data=path))
            }
            assert len(contents) == 1
        said = capsys.readouterr().out
        assert "dropped 1 of 2 rows, a text with half of a surrogate pair" in said
        assert f"(first: {path} row 2)" in said


@pytest.mark.parametrize(
    "line",
    [
        '{"messages": [',  # torn
        "[1, 2]",  # no object
        "[" * 100_000,
        json.dumps(asked("Hi \ud800", "Ho")),
        json.dumps({**asked("Hi", "Ho"), "label": False}),
        json.dumps(asked("Hi", "Ho " * 5000)),  # too long
        json.dumps(asked("Hi", "Ho", tool_calls=[{"name": "f"}])),
        json.dumps({"messages": {"a": 1}}),
        json.dumps({"messages": [None]}),
        json.dumps({**asked("Hi", "Ho"), "history": 7, "tools": 7}),
    ],
)
def test_a_bad_row_of_a_later_block_is_dropped_and_training_goes_on(
    line, tokenizer, tmp_path, capsys
):
    """The block holds nothing else, and even then the next one is read."""
    good = [json.dumps(asked("Hi", f"Ho {n}")) for n in range(4)]
    path = tmp_path / "rows.jsonl"
    path.write_text("\n".join([*good[:2], line, line, *good[2:]]) + "\n")
    cfg = sft.Config(data=str(path), block_rows=2, samples_per_step=1, max_seq_len=512)
    state = {"epoch": 0, "block": 0, "position": 0, "files": {}, "seen": {}}
    stream = sft.stream_steps(tokenizer, state, cfg)
    answers = set()
    for _ in range(4):
        ((ids, mask, _),) = next(stream)
        answers.add(tokenizer.decode(ids[mask].tolist()))
    assert answers == {f"Ho {n}" for n in range(4)} and state["epoch"] == 0
    said = capsys.readouterr().out
    assert "dropped 2 of 2 rows" in said and f"(first: {path} row 3)" in said
    # At the start it is said before anything is trained.
    path.write_text(line + "\n")
    with pytest.raises(SystemExit):
        next(sft.stream_steps(tokenizer, dict(state, files={}, seen={}), cfg))


# ---- Math: problems and answers ------------------------------------------------------------------
def math_rows(tmp_path, rows):
    cfg = mathrl.Config(data=rows_of(tmp_path / "math.jsonl", rows), reward_workers=1)
    return {row["messages"][0]["content"][-6:]: row["answer"] for row in mathrl.load_rows(cfg)}


def test_the_answer_of_gsm8k_is_what_follows_its_mark(tmp_path, capsys):
    """579 of its 7,473 rows once fell out, because their solutions are long."""
    solution = "Half of 48 is <<48/2=24>>24. " * 30 + "\n#### 1,072"
    assert math_rows(tmp_path, [{"question": "2 + 2?", "answer": solution}]) == {"2 + 2?": "1,072"}
    assert "not read" not in capsys.readouterr().out


def test_an_answer_that_is_no_number_is_dropped(tmp_path, capsys):
    rows = [
        {"problem": f"{n} + 2?", "answer": float(text)} for n, text in enumerate(["nan", "inf"])
    ]
    assert math_rows(tmp_path, [*rows, {"problem": "2 + 2?", "answer": 4}]) == {"2 + 2?": "4"}
    said = capsys.readouterr().out
    assert 'field "answer" is nan' in said and 'field "answer" is inf' in said


def test_copies_of_a_problem_with_other_answers_are_said_and_the_most_frequent_counts(
    tmp_path, capsys
):
    rows = [{"problem": "1 + 1?", "answer": "2"}] * 50 + [{"problem": "1 + 1?", "answer": "3"}]
    rows += [{"problem": "2 + 2?", "answer": answer} for answer in ("4", "5", " 4")]
    rows += [{"problem": "3 + 3?", "answer": answer} for answer in ("6", "7")]
    assert math_rows(tmp_path, rows) == {"1 + 1?": "2", "2 + 2?": "4"}
    said = capsys.readouterr().out
    assert "dropped 53 repeated problems" in said
    assert "3 problems have different answers; 1 without a most frequent one are dropped" in said


@pytest.mark.parametrize("stage", [mathrl, coderl])
def test_a_conversation_is_no_problem(stage, tmp_path, capsys):
    user, bot = asked("Double it.", "How?")["messages"]
    rest = {"answer": "2", "tests": {"inputs": ["1"], "outputs": ["2"]}}
    brief = {"role": "system", "content": "Be brief."}
    rows = [{"prompt": turns, **rest} for turns in ([user, bot, user], [user, bot], [brief, user])]
    path = rows_of(tmp_path / "rows.jsonl", rows)
    (row,) = stage.load_rows(stage.Config(data=path))
    assert "Double it." in row["messages"][-1]["content"]
    assert "dropped 2 of 3 rows, a conversation where one" in capsys.readouterr().out


def test_answers_are_verified_once_for_a_set_and_a_verifier(tmp_path, monkeypatch, capsys):
    """Distinct ones, in parallel; the verdicts lie beside the data, in a hidden file."""
    rows = [{"problem": f"{n} + 1?", "answer": "}{" if n == 7 else str(n % 3)} for n in range(9)]
    checked = []

    def counting_trouble_of(gold):
        checked.append(gold)
        return trouble_of(gold)

    trouble_of = answers.trouble_of
    monkeypatch.setattr(answers, "trouble_of", counting_trouble_of)
    first = math_rows(tmp_path, rows)
    assert len(first) == 8 and sorted(checked) == ["0", "1", "2", "}{"]
    assert "checking that 4 answers verify" in capsys.readouterr().out
    assert len(list(tmp_path.glob(".golds_*.json"))) == 1
    # A second start reads them.
    assert math_rows(tmp_path, rows) == first and len(checked) == 4
    assert "checking" not in capsys.readouterr().out
    # Another verifier checks again, and so do other answers.
    monkeypatch.setattr(answers, "__file__", __file__)
    assert math_rows(tmp_path, rows) == first and len(checked) == 8
    assert len(math_rows(tmp_path, rows[:2])) == 2 and len(checked) == 10


def test_where_the_folder_of_the_data_cannot_be_written_to_the_run_keeps_the_verdicts(
    tmp_path, monkeypatch
):
    path = rows_of(tmp_path / "rows.jsonl", [{"a": 1}])
    assert data.cache_folder(f"{path},{path}", "out") == str(tmp_path)
    assert data.cache_folder(str(tmp_path), "out") == str(tmp_path)
    assert data.cache_folder("nvidia/Nemotron-Cascade-RL-Math", "out") == "out"
    monkeypatch.setattr(os, "access", lambda path, mode: False)
    assert data.cache_folder(path, "out") == "out"


# ---- Pairs for the reward model ------------------------------------------------------------------
@pytest.fixture()
def read_pairs(monkeypatch, tmp_path):
    """read_pairs(rows) -> [(turns of the context, chosen, rejected)]."""
    monkeypatch.setattr(
        reward_model,
        "score_ids",
        lambda tokenizer, messages, answer: (
            [[m["role"], m["content"]] for m in messages],
            answer,
        ),
    )

    def read(rows, **flags):
        path = rows_of(tmp_path / "pairs.jsonl", rows)
        pairs = reward_model.load_pairs(path, None, rlhf.Config(**flags))
        for chosen, rejected in pairs:
            assert chosen[0] == rejected[0]
        return [(chosen[0], chosen[1], rejected[1]) for chosen, rejected in pairs]

    return read


HI = {"role": "user", "content": "Hi"}
PAIR = ([["user", "Hi"]], "Ho", "No")


@pytest.mark.parametrize(
    "row",
    [
        {"prompt": "Hi", "chosen": "Ho", "rejected": "No"},
        {"chosen": "\n\nHuman: Hi\n\nAssistant: Ho", "rejected": "\n\nHuman: Hi\n\nAssistant: No"},
        {"question": "Hi", "chosen": "Ho", "rejected": "No"},
        {"instruction": "Hi", "input": "", "chosen": "Ho", "rejected": "No"},
        {
            "conversations": [{"from": "human", "value": "Hi"}],
            "chosen": {"from": "gpt", "value": "Ho"},
            "rejected": {"from": "gpt", "value": "No"},
        },
        {
            "chosen": [HI, {"role": "assistant", "content": "Ho"}],
            "rejected": [HI, {"role": "assistant", "content": "No"}],
        },
        {
            "prompt": "Hi",
            "response_1": "No",
            "response_2": "Ho",
            "preference_strength": 1,
            "preference_statement": "x",
        },
        {"context": [HI], "response1": "Ho", "response2": "No", "overall_preference": -3},
    ],
)
def test_a_pair_is_read_in_every_schema(row, read_pairs):
    assert read_pairs([row]) == [PAIR]


def test_a_text_with_marks_is_a_chat_of_several_turns(read_pairs):
    before = "\n\nHuman: Hi\n\nAssistant: Ho\n\nHuman: A Human: and more?\n\nAssistant:"
    ((context, chosen, rejected),) = read_pairs(
        [{"chosen": f"{before} Yes.", "rejected": f"{before} No."}]
    )
    assert context == [["user", "Hi"], ["assistant", "Ho"], ["user", "A Human: and more?"]]
    assert (chosen, rejected) == ("Yes.", "No.")
    with pytest.raises(SystemExit):  # answers to two different conversations
        read_pairs([{"chosen": f"{before} Yes.", "rejected": "\n\nHuman: Ha\n\nAssistant: No"}])


def test_rated_answers_to_one_prompt_are_pairs(read_pairs):
    """HelpSteer 2 has two rows a prompt, HelpSteer 1 up to four."""

    def rated(prompt, response, helpfulness, correctness=4, coherence=4):
        scores = {"helpfulness": helpfulness, "correctness": correctness, "coherence": coherence}
        return {"prompt": prompt, "response": response, **scores, "complexity": 1, "verbosity": 1}

    two_turns = "Hi<extra_id_1>Assistant\nHo<extra_id_1>User\nAnd?"
    rows = [
        rated("Hi", "worse", 2),
        rated("Hi", "better", 3),
        rated("Ha", "a", 3, 4),
        rated("Ha", "b", 3, 3),  # the next score decides
        rated("Hu", "a", 1),
        rated("Hu", "b", 1),  # nothing decides
        rated(two_turns, "a", 4),
        rated(two_turns, "b", 0),
    ]
    pairs = read_pairs(rows)
    assert pairs[:2] == [([["user", "Hi"]], "better", "worse"), ([["user", "Ha"]], "a", "b")]
    turns = [["user", "Hi"], ["assistant", "Ho"], ["user", "And?"]]
    assert pairs[2:] == [(turns, "a", "b")]
    with pytest.raises(SystemExit):
        read_pairs(rows[4:6])


def test_pairs_about_an_image_stop_the_run(read_pairs):
    row = {"prompt": "Hi", "chosen": "Ho", "rejected": "No", "images": ["x"]}
    with pytest.raises(SystemExit):
        read_pairs([row])
    assert read_pairs([row], ignore_fields="images") == [PAIR]


# ---- Tests that are asserts ----------------------------------------------------------------------
DOUBLE = 'def double(x: int) -> int:\n    """ Twice x. """\n'
CHECK = """
METADATA = {"author": "x"}

def check(candidate):
    "A text."
    assert 1, "runs"
    assert candidate(2) == 4, "a message"
    assert candidate(-3) == -6
"""
HUMAN_EVAL = {
    "task_id": "x/0",
    "prompt": DOUBLE,
    "entry_point": "double",
    "canonical_solution": "    return 2 * x\n",
    "test": CHECK,
}
MBPP = {
    "task_id": 1,
    "text": "Write a function that doubles.",
    "code": "def double(x):\n    return 2 * x",
    "test_list": ["assert double(2) == 4", "assert double(-3) == -6"],
    "challenge_test_list": [],
}


@pytest.mark.parametrize("raw", [HUMAN_EVAL, MBPP, {**MBPP, "text": None, "prompt": "Double."}])
def test_asserts_become_calls_and_the_reference_passes_them(raw, tmp_path):
    path = rows_of(tmp_path / "rows.jsonl", [raw])
    (row,) = coderl.load_rows(coderl.Config(data=path))
    tests = {"inputs": ["2", "-3"], "outputs": ["4", "-6"], "fn_name": "double"}
    assert row["tests"] == {**tests, "time_limit": None}
    assert "double" in row["messages"][0]["content"]
    assert coderl.reward(programs.fenced(row["solution"]), row["tests"]) == 1
    assert coderl.reward(programs.fenced("def double(x):\n    return x"), row["tests"]) == 0


@pytest.mark.parametrize(
    "line, inputs, outputs",
    [
        ("assert f('1', [2.5], {'a': None}) == '10'", ['"1"\n[2.5]\n{"a": null}'], ['"10"']),
        ("assert f(1) == (1, 2)", ["1"], ["[1, 2]"]),
        ("assert f(1) == [[1]]", ["1"], ["[[1]]"]),
        ("assert f([]) == -1", ["[]"], ["-1"]),
    ],
)
def test_a_result_keeps_its_type(line, inputs, outputs):
    row = {"prompt": "Write f.", "test_list": [line]}
    tests = coderl.normalize(row, "row 1")["tests"]
    assert (tests["inputs"], tests["outputs"]) == (inputs, outputs)


@pytest.mark.parametrize(
    "line",
    [
        "assert set(f(1)) == {1}",
        "assert f(1) == {1, 2}",
        "assert abs(f(1) - 0.5) < 1e-6",
        "assert f((1, 2)) == 3",  # the program may need a tuple
        "assert f(x) == 3",
        "assert f(1) == 2 == 2",
        "assert f(1)",
        "assert f(1, b=2) == 3",
        "for i in range(3):\n    assert f(i) == i",
        "assert f(1) == 1\nassert g(1) == 1",
        "assert f(1) ==",
    ],
)
def test_a_row_with_an_assert_that_is_not_plain_is_dropped(line):
    """Without that assert its tests would pay programs that are wrong."""
    row = {"prompt": "Write f.", "test_list": ["assert f(0) == 0", line]}
    with pytest.raises(data.BadRow, match="no plain asserts"):
        coderl.normalize(row, "row 1")


# ---- Decontamination -----------------------------------------------------------------------------
ASKING = {  # schema: the row of a question
    "problem": lambda text: {"problem": text, "answer": "2"},
    "gsm8k": lambda text: {"question": text, "answer": "#### 2"},
    "messages": lambda text: asked(text, "Ho"),
    "parts": lambda text: asked([{"type": "text", "value": text}], "Ho"),
    "sharegpt": lambda text: {
        "conversations": [{"from": "human", "value": text}, {"from": "gpt", "value": "Ho"}]
    },
    "alpaca": lambda text: {"instruction": "Answer this.", "input": text, "output": "Ho"},
    "alpaca without input": lambda text: {"instruction": text, "input": "", "output": "Ho"},
    "prompt": lambda text: {"prompt": text, "completion": "Ho"},
    "prompt as turns": lambda text: {"prompt": [{"role": "user", "content": text}]},
    "query": lambda text: {"query": text, "response": "Ho"},
    "input": lambda text: {"input": [{"role": "user", "content": text}], "output": "Ho"},
    "hh-rlhf": lambda text: {
        "chosen": f"\n\nHuman: {text}\n\nAssistant: Ho",
        "rejected": f"\n\nHuman: {text}\n\nAssistant: No",
    },
    "pairs as turns": lambda text: {
        "chosen": asked(text, "Ho")["messages"],
        "rejected": asked(text, "No")["messages"],
    },
    "dpo": lambda text: {
        "conversations": [{"from": "human", "value": text}],
        "chosen": {"from": "gpt", "value": "Ho"},
        "rejected": {"from": "gpt", "value": "No"},
    },
    "csv": lambda text: {"messages": json.dumps(asked(text, "Ho")["messages"])},
    "mbpp": lambda text: {"text": text, "code": "x = 1", "test_list": ["assert f(1) == 1"]},
    "nemotron": lambda text: {"responses_create_params": {"input": text}},
    "swe": lambda text: {"problem_statement": text, "patch": "x"},
    "wildchat": lambda text: {"conversation": [{"role": "user", "content": text}]},
    "aime": lambda text: {"ID": "I-1", "Problem": text, "Answer": 2},
}
# Twenty letters each of scripts without spaces.
CHINESE = "".join(map(chr, range(0x4E00, 0x4E14)))
THAI = "".join(map(chr, range(0x0E01, 0x0E15)))


def shared_with(rows, held_out):
    def named(rows):
        return [(f"row {n}", row) for n, row in enumerate(rows, 1)]

    return [shared for _, _, shared in decontaminate.decontaminate(named(rows), named(held_out))]


@pytest.mark.parametrize("schema", ASKING)
def test_a_set_against_itself_loses_every_row_in_every_schema(schema):
    """It once said "removed 0 of 300 rows", since it knew no field of the rows."""
    texts = ["Hi", "What is 2 + 2?", CHINESE, THAI, "word " * 30, "Same."]
    # Twenty equal rows are no wording around problems, and neither are short ones.
    rows = [ASKING[schema](text) for text in [*texts, *["Same."] * 20, *["Say: " + "a " * 9] * 20]]
    assert all(shared_with(rows, rows))
    # In another schema the questions are the same.
    if not schema.startswith("alpaca"):
        assert all(shared_with(rows, [ASKING["messages"](text) for text in texts] + rows[-1:]))
    # Other questions share nothing, and answers are not compared.
    others = [ASKING[schema](text) for text in ("Why?", CHINESE[::-1], THAI[::-1])]
    assert shared_with(others, rows) == ["", "", ""]


@pytest.mark.parametrize("text", [CHINESE, THAI])
def test_a_run_of_characters_is_an_overlap_where_no_spaces_part_words(text):
    """Eighteen characters are as nine words; seventeen are not."""
    tokens = decontaminate.tokens_of(text)
    assert len(tokens) >= 18
    before, behind = CHINESE[::-1][:6], THAI[::-1][:6]
    held_out = [{"problem": text}]
    for count, found in ((18, True), (17, False)):
        part = "".join(tokens[:count])
        (shared,) = shared_with([{"problem": f"{before} {part} {behind}"}], held_out)
        assert bool(shared) == found
    # In the midst of words of another language, too, and in the wide forms of its letters.
    (shared,) = shared_with([{"problem": f"Solve for x: {''.join(tokens[:18])} ok"}], held_out)
    assert shared


def test_letters_and_digits_of_other_forms_are_the_same():
    wide = "\uff26\uff49\uff4e\uff44 \uff11\uff12 Stra\u00dfe"
    assert decontaminate.tokens_of(wide) == decontaminate.tokens_of("find 12 STRASSE")
    # The vowels of Hindi are marks inside its words.
    assert (
        len(decontaminate.tokens_of("\u0939\u093f\u0928\u094d\u0926\u0940 \u092e\u0947\u0902")) == 2
    )


def test_rows_that_ask_nothing_are_said_and_a_set_of_them_is_no_all_clear(tmp_path, capsys):
    unknown = {"utterance": "What is 2 + 2?", "label": 4}
    known = {"problem": "What is 2 + 2?"}

    def run(train, held_out):
        paths = [
            rows_of(tmp_path / f"{name}.jsonl", rows)
            for name, rows in (("train", train), ("held_out", held_out))
        ]
        out = tmp_path / "out.jsonl"
        cfg = decontaminate.Decontamination(paths[0], paths[1], str(out))
        decontaminate.write_decontaminated(cfg)
        return len(out.read_text().splitlines()), capsys.readouterr().out

    left, said = run([known, unknown, unknown], [known, unknown])
    assert left == 2 and "removed 1 of 3 rows" in said
    assert "2 of 3 rows ask nothing and are kept" in said and "has: utterance, label" in said
    assert "1 of 2 rows ask nothing and cannot be found in the training set" in said
    for train, held_out in (([unknown], [known]), ([known], [unknown]), ([{}], [known])):
        with pytest.raises(SystemExit) as stop:
            run(train, held_out)
        assert stop.value.code == 2
        assert "asks anything in a known field" in capsys.readouterr().err


# ---- Files ---------------------------------------------------------------------------------------
def test_a_comma_in_the_name_of_a_file_or_folder_separates_nothing(tmp_path):
    folder = tmp_path / "old, new"
    folder.mkdir()
    one = rows_of(folder / "a,b.jsonl", [{"n": 1}])
    two = rows_of(tmp_path / "c.jsonl", [{"n": 2}])
    assert data.data_files(one) == data.data_files(str(folder)) == [one]
    assert data.data_files(f"{two},{one},{two}") == [two, one, two]
    assert data.data_files(f"{folder},{folder}") == [one, one]
    with pytest.raises(SystemExit):
        data.data_files(f"{two},{tmp_path}/none,{two}")


def test_folders_that_save_to_disk_wrote_are_read_and_read_on_from_any_cursor(tmp_path):
    datasets = pytest.importorskip("datasets")

    def table(name, count):
        rows = [{"n": n, "messages": asked(name, str(n))["messages"]} for n in range(count)]
        return datasets.Dataset.from_list(rows)

    table("one", 150).save_to_disk(tmp_path / "one", num_shards=2)
    rows = [row for _, row in data.read_rows(str(tmp_path / "one"))]
    assert [row["n"] for row in rows] == list(range(150))
    assert rows[7]["messages"] == asked("one", "7")["messages"]
    (file, _) = data.data_files(str(tmp_path / "one"))
    read = list(data.read_file(file))
    assert read[-1][2][2] == 1
    for n in (0, 5, 63, 64, 74):
        rest = [row for _, row, _ in data.read_file(file, read[n][2])]
        assert rest == [row for _, row, _ in read[n + 1 :]]

    splits = {"train": table("train", 3), "test": table("test", 2)}
    datasets.DatasetDict(splits).save_to_disk(tmp_path / "two")
    for name, count in (("two", 3), ("two@train", 3), ("two@test", 2)):
        assert len(data.read_rows(str(tmp_path / name))) == count
    with pytest.raises(SystemExit):
        data.data_files(str(tmp_path / "two@none"))


def test_a_hidden_file_in_a_folder_is_no_data(tmp_path):
    path = rows_of(tmp_path / "rows.jsonl", [{"n": 1}])
    (tmp_path / ".golds.json").write_text("[]")
    assert data.data_files(str(tmp_path)) == [path]


# ---- The table of docs/data.md: schema x stage ---------------------------------------------------
IMAGE = {"type": "image_url", "image_url": {"url": "x"}}
IFEVAL = {
    "prompt": "Hi",
    "instruction_id_list": ["punctuation:no_comma"],
    "kwargs": [{}],
}
SWE = {
    "problem_statement": "The sum is wrong.",
    "relevant_file_contents": {"a.py": "x = 1\n"},
    "golden_patch": "--- a/a.py\n+++ b/a.py\n@@ -1 +1 @@\n-x = 1\n+x = 2\n",
}
SCHEMAS = {  # what it is: its smallest row
    "messages": asked("Hi", "Ho"),
    "messages, thought in the text": asked("Hi", "<think>\nHm.\n</think>\n\nHo"),
    "messages, the template opened the thought": asked("Hi", "Hm.\n</think>\n\nHo"),
    "messages, thought in a field": asked("Hi", "Ho", reasoning_content="Hm."),
    "messages, empty thought": asked("Hi", "<think>\n\n</think>\n\nHo"),
    "messages, contents in parts": asked([{"type": "text", "value": "Hi"}], "Ho"),
    "messages, an image among the parts": asked([{"type": "text", "text": "Hi"}, IMAGE], "Ho"),
    "messages and images": {**asked("Hi", "Ho"), "images": ["a.png"]},
    "messages and a label (KTO)": {**asked("Hi", "Ho"), "label": False},
    "ShareGPT": {
        "conversations": [{"from": "human", "value": "Hi"}, {"from": "gpt", "value": "Ho"}]
    },
    "Alpaca": {"instruction": "Translate.", "input": "Hi", "output": "Ho"},
    "prompt and completion": {"prompt": "Hi", "completion": "Ho"},
    "Llama-Nemotron": {"input": [{"role": "user", "content": "Hi"}], "output": "Ho"},
    "prompt": {"prompt": "Hi"},
    "chosen and rejected": {"prompt": "Hi", "chosen": "Ho", "rejected": "No"},
    "hh-rlhf": ASKING["hh-rlhf"]("Hi"),
    "HelpSteer3": {
        "context": [{"role": "user", "content": "Hi"}],
        "response1": "Ho",
        "response2": "No",
        "overall_preference": -1,
    },
    "IFEval": IFEVAL,
    "problem and answer (MATH)": {"problem": "1 + 1?", "answer": "2"},
    "question and solution (GSM8K)": {"question": "1 + 1?", "answer": "1 + 1 is two.\n#### 2"},
    "prompt and reward_model (verl)": {
        "prompt": [{"role": "user", "content": "1 + 1?"}],
        "reward_model": {"ground_truth": "2"},
    },
    "problem and tests (APPS, DeepCoder)": {
        "problem": "Double it.",
        "tests": {"inputs": ["1\n"], "outputs": ["2\n"]},
    },
    "HumanEval": HUMAN_EVAL,
    "MBPP": MBPP,
    "issue, files and patch": SWE,
}
COLUMNS = ("sft", "rlhf", "its pairs", "ifrl", "mathrl", "coderl", "swerl")
BEGIN, END = "<!-- begin: schemas -->\n", "<!-- end: schemas -->\n"


def what_is_done(column, path):
    """A cell: "read", "-" where no field is known, or why the row is dropped or stops the run."""
    said = io.StringIO()
    with contextlib.redirect_stderr(said), contextlib.redirect_stdout(io.StringIO()):
        try:
            if column == "sft":
                read_sft(path)
            elif column == "its pairs":
                reward_model.load_pairs(path, None, rlhf.Config())
            else:
                stage = importlib.import_module(column)
                flags = {"swerl": {"min_prompt_tokens": 0}, "mathrl": {"reward_workers": 1}}
                stage.load_rows(stage.Config(data=path, **flags.get(column, {})))
            return "read"
        except SystemExit:
            pass
    sentence = said.getvalue()
    if "(has: " in sentence:
        return "-"
    stops = re.search(r": (\S+), an? \w+ by its name", sentence)
    if stops:
        return f"stops: `{stops[1]}`"
    return "no: " + re.search(r"no usable row \(\d+ x (.*)\)", sentence)[1]


def schema_table(folder):
    """The table as Markdown, measured: every row is given to every stage."""
    lines = [f"| a row of | {' | '.join(COLUMNS)} |", "|---" * (len(COLUMNS) + 1) + "|"]
    for name, row in SCHEMAS.items():
        path = rows_of(folder / "row.jsonl", [row])
        cells = [what_is_done(column, path) for column in COLUMNS]
        lines.append(f"| {name} | {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


@pytest.fixture()
def without_a_tokenizer(monkeypatch):
    monkeypatch.setattr(reward_model, "score_ids", lambda *args: [0])


def test_the_table_of_the_data_page_is_what_the_stages_do(without_a_tokenizer, tmp_path):
    """`python tests/test_schemas.py` writes it anew."""
    page = (ROOT / "docs" / "data.md").read_text()
    assert schema_table(tmp_path) == page.partition(BEGIN)[2].partition(END)[0]


if __name__ == "__main__":
    reward_model.score_ids = lambda *args: [0]
    page = ROOT / "docs" / "data.md"
    before, _, rest = page.read_text().partition(BEGIN)
    behind = rest.partition(END)[2]
    with tempfile.TemporaryDirectory() as folder:
        page.write_text(before + BEGIN + schema_table(pathlib.Path(folder)) + END + behind)
