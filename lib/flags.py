"""Command-line flags: every field of a stage's Config is one."""

import argparse
import dataclasses
import sys

from lib.guard import fail, file_trouble

# ---- Flags ---------------------------------------------------------------------------------------
# Numbers are finite and not negative (unless their default is); these are more than 0 (unless their
# default is 0) ...
POSITIVE = set(
    """n num_steps schedule_steps block_rows samples_per_step prompts_per_step group_size max_seq_len max_prompt_tokens max_new_tokens
    micro_batch_tokens save_every reward_workers lr grad_clip temperature top_p rm_samples_per_step rm_epochs rm_lr rm_max_len test_seconds memory_mb
    chars_per_token max_files vocab_size hidden_size num_layers num_heads head_dim problems samples characters points rounds""".split()
)
# ... and these at most 1 (AdamW's betas less).
MOST = dict(
    beta1=0.9999,
    beta2=0.9999,
    top_p=1,
    think_share=1,
    readmit_hard=1,
    readmit_easy=1,
    max_infra=1,
    noisy_share=1,
    lexical_floor=1,
    final_lr=1,
)


def parse_config(Config):
    """Every dataclass field is a flag: --lr=1e-6 or --lr 1e-6. Types come from the annotations; unknown flags are errors."""
    parser = argparse.ArgumentParser(
        allow_abbrev=False,
        epilog="What a flag means stands beside it in class Config, at the top of the script.",
    )
    parser.error = lambda message: fail(f"{message}.")
    sys.excepthook = file_trouble
    for f in dataclasses.fields(Config):
        # --flag is --flag=true
        alone = dict(nargs="?", const=True, type=boolean) if f.type is bool else dict(type=f.type)
        parser.add_argument(
            f"--{f.name}",
            default=f.default,
            metavar=f.type.__name__,
            help=f"default {f.default!r}".replace("%", "%%"),
            **alone,
        )
    cfg = Config(**vars(parser.parse_args()))
    for f in (f for f in dataclasses.fields(Config) if f.type in (int, float)):
        value, least, most = getattr(cfg, f.name), min(f.default, 0), MOST.get(f.name, 2**63 - 1)
        above = f.name in POSITIVE and f.default > 0
        if not least <= value <= most or above and value == 0:  # nan fails the comparison
            fail(
                f"--{f.name}={value}: expected a number {'above' if above else 'from'} {least}"
                + f" to {most}." * (most < 2)
                + "." * (most > 2)
            )
    return cfg


def boolean(text):
    return bool(("false", "true").index(text.lower()))
