"""The metrics to a tracker, besides metrics.jsonl: --report_to=trackio, wandb or tensorboard.

Each is a package of its own that only its users install. How it stores and sends is its own matter
(WANDB_MODE=offline, TRACKIO_DIR, ...); TensorBoard's files are in out_dir/tensorboard.
"""

import importlib.util
import json
import math
import os
import uuid

from lib.guard import fail, first_line


def open_trackio(name, run_id, folder, config):
    import trackio

    # trackio knows a run by its name, so the id makes it the only one.
    trackio.init(project="cascade", name=f"{name}-{run_id}", config=config, resume="allow")
    return trackio.log, trackio.finish


def open_wandb(name, run_id, folder, config):
    import wandb

    run = wandb.init(
        project="cascade", name=name, id=run_id, config=config, dir=folder, resume="allow"
    )
    return run.log, run.finish


def open_tensorboard(name, run_id, folder, config):
    from torch.utils.tensorboard import SummaryWriter

    writer = SummaryWriter(os.path.join(folder, "tensorboard"))

    def log(metrics, step):
        for metric, number in metrics.items():
            writer.add_scalar(metric, number, step)

    return log, writer.close


OPEN = {"trackio": open_trackio, "wandb": open_wandb, "tensorboard": open_tensorboard}


def tracker_names(report_to):
    """The trackers that a flag names. One that is unknown or not installed ends the script."""
    names = [name for name in report_to.split(",") if name]
    for name in names:
        if name not in OPEN:
            fail(f"--report_to={report_to}: expected {', '.join(OPEN)}, joined by commas.")
        if importlib.util.find_spec(name) is None:
            fail(f"--report_to={name}: that package is not installed: pip install {name}.")
    return names


class Tracker:
    """One run in one tracker. A resumed run goes on where it was: trackers.json in its folder has
    the run's id there and the last step that was sent, so that none is lost or sent twice.

    history: the rows of metrics.jsonl so far; those that the tracker lacks are sent first.
    """

    def __init__(self, name, out_dir, config, history):
        self.name, self.path = name, os.path.join(out_dir, "trackers.json")
        self.state = self.read_states().get(name) or {"id": uuid.uuid4().hex[:8], "sent": 0}
        stage = "-".join(os.path.abspath(out_dir).split(os.sep)[-2:])
        self.send, self.close = OPEN[name](stage, self.state["id"], out_dir, config)
        for row in history:
            self.log(row)

    def read_states(self):
        if not os.path.exists(self.path):
            return {}
        with open(self.path) as f:
            return json.load(f)

    def log(self, row):
        """Send the finite numbers of a step, under the names that they have in metrics.jsonl."""
        if row["step"] <= self.state["sent"]:
            return
        numbers = {}
        for name, value in row.items():
            if name != "step" and isinstance(value, (int, float)) and math.isfinite(value):
                numbers[name] = value
        try:
            self.send(numbers, step=row["step"])
        except Exception as error:  # noqa: BLE001  a tracker that fails never ends a run
            print(f"--report_to={self.name}, step {row['step']}: {first_line(error)}", flush=True)
        self.state["sent"] = row["step"]
        states = self.read_states() | {self.name: self.state}
        with open(self.path + ".tmp", "w") as f:
            json.dump(states, f)
        os.replace(self.path + ".tmp", self.path)
