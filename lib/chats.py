"""Conversations in the schemas of the field, as messages [{"role", "content", ...}].

Turns: `role` and `content`, or ShareGPT's `from` and `value`; a content in parts; tool calls and
thoughts in fields of their own or in the text. Rows: a list of turns under several names, or a
question and its answer in fields (Alpaca, prompt and completion, Llama-Nemotron).
"""

import json
import re

from lib.data import BadRow, first_nonempty
from model import REASONING, ROLES, SYSTEM_ROLES

# ---- Turns ---------------------------------------------------------------------------------------
# Other names of the roles, as sets and servers have them.
ROLE_NAMES = {
    "human": "user",
    "prompter": "user",
    "gpt": "assistant",
    "chatgpt": "assistant",
    "bot": "assistant",
    "model": "assistant",
    "ai": "assistant",
    "observation": "tool",
    "tool_response": "tool",
    "tool_result": "tool",
    "ipython": "tool",
}
# ShareGPT has turns whose text is a tool call.
CALL_ROLES = ("function_call", "tool_call")
# What a chat about images has in its text where the image stood: at an end, or on its own line.
PLACEHOLDER = re.compile(
    r"\A\s*<(image|video|audio)>|<(image|video|audio)>\s*\Z|^\s*<(image|video|audio)>\s*$"
    r"|<\|(image|video)_pad\|>",
    re.M,
)


def as_messages(turns, name="prompt"):
    """Chat messages [{"role", "content", ...}] from the forms that data sets have.

    A string is a user's turn. Content that is a list of parts is joined, and null is empty text.
    name: the field, for the reason under which a bad row is dropped.
    """
    if isinstance(turns, str):
        turns = [{"role": "user", "content": turns}]
    if not isinstance(turns, list) or not all(has_role(turn) for turn in turns):
        raise BadRow(f'field "{name}" is no list of chat messages with a role each')
    return [as_message(turn, name) for turn in turns]


def only_question(turns, name):
    """The text of the only user turn of a prompt, without the set's own system turn.

    BadRow if it is a conversation: its last turn alone would ask something else.
    """
    messages = [turn for turn in as_messages(turns, name) if turn["role"] not in SYSTEM_ROLES]
    if not messages:
        raise BadRow("empty problem or answer")
    if len(messages) > 1 or messages[0]["role"] != "user":
        raise BadRow("a conversation where one question is expected")
    return messages[0]["content"].strip()


def has_role(turn):
    """Whether a turn is an object with the role of its speaker, like "user"."""
    if not isinstance(turn, dict):
        return False
    return isinstance(turn.get(first_nonempty(turn, "role", "from")), str)


def as_message(turn, name):
    """One turn with "role" and "content", a text. BadRow if it has an image or an unknown role."""
    role = turn[first_nonempty(turn, "role", "from")]
    content = turn.get(first_nonempty(turn, "content", "value", "text"))
    role = ROLE_NAMES.get(role, role)
    changes = {"role": role, "content": content or ""}
    if role in CALL_ROLES:
        changes = {"role": "assistant", "content": "", "tool_calls": content}
    elif role not in ROLES:
        raise BadRow("a turn of an unknown role")
    elif isinstance(content, list):
        changes |= read_parts(content, role)
    elif not isinstance(changes["content"], str):
        raise BadRow(f'field "{name}" has a message whose content is not text')
    if role == "user" and PLACEHOLDER.search(changes["content"]):
        raise BadRow("a message has an image, a video or audio that is not text")
    return turn | changes


def read_parts(parts, role):
    """{"content"} of a message's parts, their texts a line each; with the thoughts and the calls of
    an assistant.

    BadRow: a part is an image or other content. A prompt without its image asks for what nobody can
    answer, so its row is dropped, counted.
    """
    texts, thoughts, calls = [], [], []
    for part in parts:
        kind = part.get("type") if isinstance(part, dict) else None
        text = text_of_part(part)
        if text is None:
            raise BadRow("a message has a part that is not text")
        if kind in (None, "text", "input_text", "output_text"):
            texts.append(text)
        elif role == "assistant" and kind in ("thinking", "reasoning"):
            thoughts.append(text)
        elif role == "assistant" and kind == "tool_call":
            calls += json_objects(text, "tool_call", or_one=True)
        else:
            raise BadRow("a message has a part that is not text")
    message = {"content": "\n".join(texts)}
    if thoughts:
        message["reasoning_content"] = "\n".join(thoughts)
    if calls:
        message["tool_calls"] = calls
    return message


def text_of_part(part):
    """The text of a part of a message, which has it under one of several names; None without."""
    if isinstance(part, str):
        return part
    if isinstance(part, dict) and not part.get("image") and not part.get("image_url"):
        for name in ("text", "value", "content", "thinking", "reasoning"):
            if isinstance(part.get(name), str):
                return part[name]
    return None


# ---- Thoughts ------------------------------------------------------------------------------------
# Fields in which servers and sets keep the thinking of an assistant's turn beside its text.
THOUGHT_FIELDS = (
    *REASONING,
    "thoughts",
    "think",
    "thinking_content",
    "reasoning_text",
    "reasoning_details",
    "thinking_blocks",
    "chain_of_thought",
    "cot",
    "rationale",
    "scratchpad",
    "tool_plan",
)
# Marks around a thought inside the text. The opening one is often missing: the templates of
# DeepSeek-R1 and Qwen3-Thinking write it into the prompt.
THOUGHT_MARKS = (
    ("<think>", "</think>"),
    ("<thinking>", "</thinking>"),
    ("<thought>", "</thought>"),
    ("<reasoning>", "</reasoning>"),
    ("[THINK]", "[/THINK]"),
    ("<seed:think>", "</seed:think>"),
    ("\u25c1think\u25b7", "\u25c1/think\u25b7"),
    ("<|begin_of_thought|>", "<|end_of_thought|>"),
)


def split_thought(text):
    """(thought, answer) of an assistant's text that begins with a thought; ("", text) if it does
    not. BadRow if it is not plain what is thought and what is answer."""
    for opening, closing in THOUGHT_MARKS:
        head, closed, tail = text.partition(closing)
        opened = head.lstrip().startswith(opening)
        if opened and not closed:
            raise BadRow("a thought that is not closed")
        if not closed:
            continue
        thought = head.lstrip().removeprefix(opening)
        if opening in thought or opening in tail or closing in tail:
            raise BadRow("several thoughts, or a mark of thoughts inside an answer")
        # A few sets mark the answer as well.
        answer = tail.strip().removeprefix("<|begin_of_solution|>")
        return thought.strip(), answer.removesuffix("<|end_of_solution|>").strip()
    if "<think>" in text:
        raise BadRow("several thoughts, or a mark of thoughts inside an answer")
    return "", text


def thought_in_fields(message):
    """The thought of a message or a row that stands in a field of its own, or "".

    It is a text, or a list of parts with a text each. Every name is looked at: a message often has
    the same thought twice.
    """
    thoughts = []
    for name in THOUGHT_FIELDS:
        value = message.get(name)
        if isinstance(value, list):
            texts = [text_of_part(part) for part in value]
            if None in texts:
                raise BadRow(f'field "{name}" of a turn has a part that is not text')
            value = "\n".join(texts)
        if isinstance(value, dict):
            raise BadRow(f'field "{name}" of a turn is not text')
        if isinstance(value, str) and value.strip():
            thoughts.append(value.strip())
    return thoughts[0] if thoughts else ""


def with_thought(message):
    """(content, whether it has a thought) of an assistant's turn.

    The content begins with the thought between <think> tags, wherever the turn has it. Where it has
    these tags already it stays as it is. An empty thought, as Qwen3 writes it before a reply
    without one, is taken off.
    """
    content = message["content"]
    beside = thought_in_fields(message)
    thought, answer = split_thought(content)
    if thought and content.lstrip().startswith("<think>"):
        return content, True
    thought = thought or beside
    if not thought:
        return answer, False
    return f"<think>\n{thought}\n</think>\n\n{answer}", True


# ---- Tools ---------------------------------------------------------------------------------------
# A tool's reply that brings tags of its own: one or more <tool_response> blocks and nothing else.
TAGGED_REPLIES = re.compile(
    r"(\s*<tool_response>((?!</?tool_response>).)*</tool_response>\s*)+", re.S
)


def without_tags(content):
    """A tool's reply without <tool_response> tags, which the chat template writes around it."""
    if not TAGGED_REPLIES.fullmatch(content):
        return content
    replies = re.findall(r"<tool_response>\n?(.*?)\n?</tool_response>", content, re.S)
    # Between two replies the tags have to stay, since the template writes only the outer ones.
    return "\n</tool_response>\n<tool_response>\n".join(replies)


def tool_calls_of(message):
    """The tool calls of a turn: name and arguments each, at their top or under "function"."""
    calls = []
    for name in ("tool_calls", "function_call"):
        calls += json_objects(message.get(name), name, or_one=True)
    for call in calls:
        function = call.get("function") or call
        is_named = isinstance(function, dict) and isinstance(function.get("name"), str)
        if not is_named or "arguments" not in function:
            raise BadRow("a tool call without name and arguments")
    return calls


def json_objects(value, name, or_one=False):
    """A list of objects. A row holds it as a list or as JSON text, or has none: that is [].

    or_one: a single object is a list of one.
    """
    if isinstance(value, str):
        try:
            value = json.loads(value.strip() or "[]")
        except ValueError:
            raise BadRow(f'field "{name}" is not valid JSON')
    if not value:
        return []
    if or_one and isinstance(value, dict):
        value = [value]
    if not isinstance(value, list) or not all(isinstance(item, dict) for item in value):
        raise BadRow(f'field "{name}" is no list of objects')
    # What is in them is used whole, so nothing of it is unread.
    return [dict(item.items()) for item in value]


# ---- Rows ----------------------------------------------------------------------------------------
CHATS = ("messages", "conversations", "conversation", "dialogue", "dialog")
QUESTIONS = ("instruction", "prompt", "question", "query", "input")
ANSWERS = ("output", "response", "completion", "answer")


def read_chat(row):
    """(messages, mode) of a row in any of the schemas; BadRow if it is in none of them.

    mode: True (think), False (no_think), or None where the row does not say.
    """
    row = with_template_fields(row)
    name = first_nonempty(row, *CHATS)
    if name in row:
        turns = row[name]
        if isinstance(turns, str):
            turns = json_objects(turns, name)  # a .csv has its lists as text
        messages = as_messages(turns, name)
        mode = row.get(first_nonempty(row, "thinking", "enable_thinking"))
        if not isinstance(mode, (bool, type(None))):
            raise BadRow('field "thinking" is neither true nor false')
    else:
        messages, mode = read_question_and_answer(row)
    return with_system(row, messages), mode


# What rows say to the chat template (SmolTalk2), and the field of a row that means the same.
TEMPLATE_FIELDS = {"custom_instructions": "system_prompt", "enable_thinking": "thinking"}


def with_template_fields(row):
    """The row with what its chat_template_kwargs hold in fields of its own.

    SmolTalk2 has taken the system prompt out of the messages and put it there, and the tools, too:
    their form differs from set to set, so a row with tools is dropped.
    """
    given = row.get("chat_template_kwargs") or {}
    if not isinstance(given, dict):
        raise BadRow('field "chat_template_kwargs" is no object')
    if given.get("xml_tools") or given.get("python_tools"):
        raise BadRow("tools in chat_template_kwargs")
    fields = {}
    for name, field in TEMPLATE_FIELDS.items():
        if given.get(name) not in (None, ""):
            fields[field] = given[name]
    return row | fields


def with_system(row, messages):
    """The messages, behind a system turn if the row has a system prompt in a field of its own."""
    system = row.get(first_nonempty(row, "system", "system_prompt"))
    # Llama-Nemotron switches the mode by its system prompt. Here the mode is said by a flag.
    if not system or re.fullmatch("detailed thinking (on|off)", str(system)):
        return messages
    if messages and messages[0]["role"] in SYSTEM_ROLES:
        if messages[0]["content"].strip() == str(system).strip():
            return messages
        raise BadRow("a system prompt in the row and another in its messages")
    return [*as_messages([{"role": "system", "content": system}], "system"), *messages]


def read_question_and_answer(row):
    """(messages, mode) of a row that has question and answer in fields of their own."""
    answered = first_nonempty(row, *ANSWERS)
    if first_nonempty(row, *QUESTIONS) not in row or answered not in row:
        if "chosen" in row or "rejected" in row:
            raise BadRow("a preference row (chosen, rejected), which is data of a reward model")
        raise BadRow(f'no "messages" field (has: {", ".join(map(str, row))})')
    messages = read_question(row)

    # The answer, and beside it a thought or the mode: "reasoning" is on or off in Llama-Nemotron.
    answer = row[answered]
    mode = {"on": True, "off": False}.get(str(row.get("reasoning")))
    if not isinstance(answer, list):
        answer = [{"role": "assistant", "content": answer}]
        if mode is None:
            answer[0]["reasoning_content"] = thought_in_fields(row)
    if mode is None and isinstance(row.get("thinking"), bool):
        mode = row["thinking"]
    return [*messages, *as_messages(answer, answered)], mode


def read_question(row):
    """The messages of a row's question, which stands in one of QUESTIONS."""
    asked = first_nonempty(row, *QUESTIONS)
    messages = as_messages(row[asked], asked)
    # Alpaca says what to do in the instruction, and to what in the input (Dolly: the context).
    about = ""
    if asked != "input":
        about = row.get(first_nonempty(row, "input", "context"))
    if about:
        if not isinstance(about, str) or not messages:
            raise BadRow('field "input" beside the question is not text')
        messages[-1]["content"] = f"{messages[-1]['content'].strip()}\n\n{about.strip()}"
    # LLaMA-Factory's Alpaca rows have the turns before as pairs of texts.
    for pair in reversed(row.get("history") or []):
        if not isinstance(pair, list) or len(pair) != 2:
            raise BadRow('field "history" is no list of pairs')
        earlier = [{"role": "user", "content": pair[0]}, {"role": "assistant", "content": pair[1]}]
        messages = [*as_messages(earlier, "history"), *messages]
    return messages


# ---- Chats in one text ---------------------------------------------------------------------------
# Marks before the turns of a chat that is one text: hh-rlhf, and HelpSteer, which has its first
# turn without a mark.
TURN_MARKS = {
    "\n\nHuman:": "user",
    "\n\nAssistant:": "assistant",
    "<extra_id_1>User\n": "user",
    "<extra_id_1>Assistant\n": "assistant",
}


def split_text(text):
    """The turns of a chat that is one text with a mark before every turn; [] if it is none."""
    marks = "|".join(map(re.escape, TURN_MARKS))
    first, *rest = re.split(f"({marks})", text)
    if not rest or (first.strip() and "<extra_id_1>" not in text):
        return []
    turns = [{"role": "user", "content": first}] if first.strip() else []
    for mark, content in zip(rest[::2], rest[1::2], strict=True):
        turns.append({"role": TURN_MARKS[mark], "content": content.strip()})
    return turns
