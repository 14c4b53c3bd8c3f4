"""Fields of a data set that nobody looked at: they are said, and those that matter stop the run.

A row read in a way that its owner did not mean shows after days of training. Whatever a new schema
brings, the fields that no code looked at tell: an instruction, a label, an image that is left out.
"""

import re

# What a field holds by its name, where a row means something else without it. A question that lacks
# one of the first three asks something else, in every stage.
ASKED = {
    "an instruction": r"(system|developer)(_prompt|_message|_instruction)?|(.*_)?instructions?"
    r"|context|passage|history|persona",
    "an image": r"((input|question|prompt|user|decoded)_)?(images?|videos?|audios?|attachments?)"
    r"(_(urls?|paths?|files?))?",
    "a tool": r"((available|allowed)_)?(tools?|functions?)|(tool|function)_(calls?|choice)",
}
# Where answers are trained on, the last two count besides.
ANSWERED = {
    "a thought": r"(.*_)?(reasoning|thinking|thoughts?|think|cot|chain_of_thought|rationale"
    r"|scratchpad|analysis)(_(content|text|details|blocks|trajectory|process))?|tool_plan",
    "a label": r"label|kto_tag|(.*_)?(score|rating|preference)|reward|quality|winner|rank|chosen"
    r"|(is_)?correct(ness)?|helpfulness|rejected(_responses?)?|(loss_)?weight|loss|train",
}


class Watched(dict):
    """A JSON object that remembers in `seen` which of its keys were looked at.

    So do the objects in its fields, and in lists in its fields. To ask whether a key is there, or
    to list the keys, is not to look at it.
    """

    def __init__(self, fields, deep=True):
        super().__init__(fields)
        self.seen = set()
        if deep:
            for key, value in fields.items():
                if isinstance(value, dict):
                    super().__setitem__(key, Watched(value, deep=False))
                elif isinstance(value, list) and any(isinstance(item, dict) for item in value):
                    super().__setitem__(key, [watched_item(item) for item in value])

    def __getitem__(self, key):
        self.seen.add(key)
        return super().__getitem__(key)

    def get(self, key, default=None):
        self.seen.add(key)
        return super().get(key, default)

    def items(self):
        self.seen.update(self)
        return super().items()

    def values(self):
        self.seen.update(self)
        return super().values()

    def __or__(self, other):
        """A copy with changed fields. What is looked at in the copy is seen in this object, too."""
        changed = Watched(dict.__or__(self, other), deep=False)
        changed.seen = self.seen
        return changed

    def unread(self):
        """Names of the fields that hold something and were not looked at, like "messages[].id".

        A field inside of one that was not looked at is not named by itself.
        """
        names = set()
        for key, value in super().items():
            if value in (None, "", [], {}):
                continue
            if key not in self.seen:
                names.add(key)
            elif isinstance(value, Watched):
                names |= {f"{key}.{name}" for name in value.unread()}
            elif isinstance(value, list):
                for item in value:
                    if isinstance(item, Watched):
                        names |= {f"{key}[].{name}" for name in item.unread()}
        return names


def watched_item(item):
    """An item of a list: an object is Watched, without what lies deeper in it."""
    return Watched(item, deep=False) if isinstance(item, dict) else item


def kind_of_field(name, kinds):
    """What the field holds by its name, like "an image"; "" if a row means the same without it.

    name: as Watched.unread gives it. kinds: ASKED, or ASKED | ANSWERED.
    """
    last = re.split(r"\.|\[\]\.", name)[-1].lower().replace("-", "_")
    for kind, pattern in kinds.items():
        if re.fullmatch(pattern, last):
            return kind
    return ""


def may_be_ignored(name, ignore_fields):
    """Whether the flag --ignore_fields names this field, by its whole name or by the last part."""
    allowed = {part.strip() for part in ignore_fields.split(",")}
    return name in allowed or re.split(r"\.|\[\]\.", name)[-1] in allowed
