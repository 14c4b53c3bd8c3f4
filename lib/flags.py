"""Command-line flags: every field of a script's Config is one, and the comment beside it is its
help.

    @dataclass
    class Config(RolloutFlags):
        group_size: PositiveInt = 8  # completions per prompt (G); paper T17

becomes --group_size=16, and in --help "completions per prompt (G); paper T17 (default 8)". A type
says what values a flag takes; fields that are no choice of the paper but of the machine are
declared here once.
"""

import argparse
import ast
import dataclasses
import difflib
import inspect
import io
import math
import os
import re
import sys
import textwrap
import tokenize
from dataclasses import dataclass
from typing import Annotated, get_args, get_origin

from lib.guard import fail, file_trouble


@dataclass(frozen=True)
class Bounds:
    """What a number may be: at least `low` (or above it), at most `high`."""

    above: bool = False
    low: float = 0
    high: float = math.inf


# An int or float without a name from this list is at least 0, or at least its default if that is
# less.
PositiveInt = Annotated[int, Bounds(above=True)]
PositiveFloat = Annotated[float, Bounds(above=True)]
Share = Annotated[float, Bounds(high=1)]  # from 0 to 1
TopP = Annotated[float, Bounds(above=True, high=1)]  # a share of probability, never 0
Beta = Annotated[float, Bounds(high=0.9999)]  # a decay rate of AdamW's moments


# ---- Flags of the machine ------------------------------------------------------------------------
@dataclass
class MachineFlags:
    """Flags that every training script has: memory, checkpoints, time limits.

    None changes the algorithm, but for what fits: --optimizer and --lora_rank.
    """

    micro_batch_tokens: PositiveInt = 32768  # tokens of one packed forward pass on one rank
    # where weights and optimizer live: full (sharded over all ranks), hybrid (sharded inside a
    # node, replicated across nodes), offload (sharded, in host memory), replicate (whole on every
    # rank)
    shard: str = "full"
    # how many layers keep their input alone in forward and are computed again in backward: auto (on
    # GPUs as few as memory allows, on CPUs none), all, or a number; no gradient changes by a bit
    checkpoint_layers: str = "auto"
    # keep these inputs in host memory: for sequences that are too long for the GPU otherwise
    offload_activations: bool = False
    # adamw (weights and moments in fp32), or adamw_bf16 (in bf16, rounded stochastically: half of
    # the memory)
    optimizer: str = "adamw"
    # train adapters of this rank (lib/lora.py) instead of all weights, usually 8 to 64; 0: off
    lora_rank: int = 0
    lora_alpha: float = 0.0  # adapters count alpha / rank times; 0: twice the rank
    save_every: PositiveInt = 10  # steps between checkpoints
    # seconds that a phase of a step (rollout, evaluate) may last before the run ends and says where
    # it was; in train_step a 20th of it, 5 minutes at least, from one micro-batch to the next
    phase_timeout: float = 7200.0
    # fields that may stay unread in rows of data although a row means something else without them,
    # like label; commas join several (lib/unread.py)
    ignore_fields: str = ""
    # steps in a row without a gradient, or with another fault of lib/health.py, after which the run
    # ends with exit code 3; 0: never
    max_dead_steps: int = 20
    # trackers that get the metrics, too: trackio, wandb or tensorboard; commas join several
    report_to: str = ""
    # load data, model and verifier, run the self test, show ten prompts as the model reads them and
    # what a step costs, and end before the first one
    check: bool = False


@dataclass
class RolloutFlags(MachineFlags):
    """Flags that every RL script has besides: the sampler and what is watched."""

    # sampler: torch (built in), vllm, or auto (vllm where it is installed beside a GPU)
    engine: str = "auto"
    # ranks of a node that share one vLLM (tensor parallelism), each with a slice of every layer
    tensor_parallel: PositiveInt = 1
    # the run stops when a larger share of a step's rewards are infrastructure failures
    max_infra: Share = 0.02
    sample_every: int = 10  # steps between printed samples; 0: never
    # GB of rollouts that are kept in out_dir, the newest ones, for all ranks together; 0: none
    keep_rollouts: float = 10.0


# ---- From the command line to a Config -----------------------------------------------------------
def parse_config(Config, words=None):
    """Config from the command line: --lr=1e-6 or --lr 1e-6, also --num-steps for --num_steps.

    words: the flags; None: those of this process. A flag that does not exist, a value of another
    type or out of bounds ends the script with a sentence.
    """
    sys.excepthook = file_trouble
    parser = make_parser(Config)
    words = sys.argv[1:] if words is None else words
    arguments = [underscores(word) for word in words]
    values, unknown = parser.parse_known_args(arguments)
    if unknown:
        parser.error(f"unrecognized arguments: {' '.join(unknown)}{did_you_mean(unknown, Config)}")
    cfg = Config(**vars(values))
    for field in dataclasses.fields(Config):
        check_bounds(field, getattr(cfg, field.name))
    return cfg


def make_parser(Config):
    """An argparse parser with a flag for every field, those of the machine listed apart."""
    script = os.path.basename(sys.argv[0])
    module = sys.modules[Config.__module__]
    parser = argparse.ArgumentParser(
        allow_abbrev=False,
        usage=f"{script} [--flag=value ...]",
        description=(module.__doc__ or "").partition("\n\n")[0],
        formatter_class=lambda prog: argparse.HelpFormatter(prog, max_help_position=30, width=100),
    )
    parser.error = exit_with_sentence
    stage = parser.add_argument_group("this script")
    machine = parser.add_argument_group("the machine, and what is watched (lib/flags.py)")
    shared = field_names(MachineFlags) | field_names(RolloutFlags)
    meanings = field_comments(Config)
    for field in dataclasses.fields(Config):
        kind = base_type(field)
        meaning = f"{meanings.get(field.name, '')} (default {field.default!r})".strip()
        options = {"type": kind}
        if kind is bool:
            # --flag alone means --flag=true.
            options = {"type": boolean, "nargs": "?", "const": True}
        group = machine if field.name in shared and issubclass(Config, MachineFlags) else stage
        group.add_argument(
            f"--{field.name}",
            default=field.default,
            metavar=kind.__name__,
            help=meaning.replace("%", "%%"),
            **options,
        )
    return parser


def exit_with_sentence(message):
    fail(f"{message}.")


def boolean(text):
    if text.lower() not in ("true", "false"):
        raise ValueError(text)  # argparse makes its sentence from this
    return text.lower() == "true"


def underscores(word):
    """--num-steps=3 -> --num_steps=3. Values stay as they are."""
    if not word.startswith("--"):
        return word
    name, equals, value = word.partition("=")
    return "--" + name[2:].replace("-", "_") + equals + value


def did_you_mean(unknown, Config):
    """ " (did you mean --lr?)" if the first unknown flag resembles one that exists, else ""."""
    name = unknown[0].lstrip("-").partition("=")[0]
    close = difflib.get_close_matches(name, field_names(Config), n=1)
    return f" (did you mean --{close[0]}?)" if close else ""


def check_bounds(field, value):
    """End the script if a number is out of the bounds of its field's type."""
    kind = base_type(field)
    if kind not in (int, float):
        return
    bounds = next((b for b in get_args(field.type) if isinstance(b, Bounds)), Bounds())
    low = min(field.default, bounds.low)
    high = min(bounds.high, 2**63 - 1)
    # Written so that nan, which compares false with everything, is out of bounds.
    inside = low < value <= high if bounds.above else low <= value <= high
    if inside:
        return
    expected = f"a number {'above' if bounds.above else 'from'} {low}"
    if bounds.high <= 1:
        expected += f" to {bounds.high}"
    elif value > high:
        expected += f" to {high:.3g}"
    fail(f"--{field.name}={value}: expected {expected}.")


# ---- What a Config says about itself -------------------------------------------------------------
def field_names(Config):
    return {field.name for field in dataclasses.fields(Config)}


def base_type(field):
    """int of PositiveInt, float of Share; a plain type is itself."""
    return get_args(field.type)[0] if get_origin(field.type) is Annotated else field.type


def field_comments(Config):
    """{field: its comment}: the one behind it, or the lines above it, read from the source of the
    class."""
    comments = {}
    for cls in reversed(Config.__mro__):
        if dataclasses.is_dataclass(cls):
            comments |= comments_of_class(textwrap.dedent(inspect.getsource(cls)))
    return comments


def comments_of_class(source):
    """{field: comment} from the source of one class."""
    trailing, own_line = {}, {}
    for token in tokenize.generate_tokens(io.StringIO(source).readline):
        if token.type == tokenize.COMMENT:
            stands_alone = not token.line[: token.start[1]].strip()
            target = own_line if stands_alone else trailing
            target[token.start[0]] = re.sub(r"^#\s*", "", token.string)
    comments = {}
    for node in ast.parse(source).body[0].body:
        if not isinstance(node, ast.AnnAssign):
            continue
        lines = []
        row = node.lineno - 1
        while row in own_line:
            lines.insert(0, own_line[row])
            row -= 1
        lines += [
            trailing[row] for row in range(node.lineno, node.end_lineno + 1) if row in trailing
        ]
        comments[node.target.id] = " ".join(lines)
    return comments
