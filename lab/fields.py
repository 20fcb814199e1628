"""What the fields of log.jsonl mean, and which of them lab.report draws in one chart.

    python -m lab.report fields        print the whole list

pretrain.py, train_vit.py and rl.py write one line of JSON a step. FIELDS explains every field that
can be in it; a test compares the list with what the scripts write. A field that is not measured at
every step (`held_out`, `accuracy`, the probes) is missing from the other lines.
"""
import re
from dataclasses import dataclass


@dataclass(frozen=True)
class Field:
    """keys: one or more names, separated by blanks; N in a name stands for a number, NAME for the
    name of a source."""
    keys: str
    unit: str
    meaning: str

    def covers(self, key: str) -> bool:
        return any(re.fullmatch(name.replace("NAME", r"\w+").replace("N", r"\d+"), key)
                   for name in self.keys.split())


FIELDS = {
    "all three scripts": (
        Field("step", "steps", "Optimizer steps that are done, counted from 1."),
        Field("lr", "", "Learning rate of this step, after warm-up and decay; Muon and AdamW share "
                        "it."),
        Field("norm", "", "Norm of the whole gradient. A sudden peak means an unusual batch or a "
                          "learning rate that is too high."),
        Field("dt", "seconds", "Duration of this step."),
        Field("loading", "seconds", "Time in which the step waited for samples. It is written only "
                                    "where it is more than 5% of the step."),
        Field("skipped", "count", "Steps whose loss or gradient was not finite, samples that were "
                                  "too long, and records of own data that can't be used, since the "
                                  "start; all of them were left out."),
    ),
    "pretrain.py and train_vit.py": (
        Field("loss", "nats a token", "Training loss on this step's batch. Pretraining: "
                                      "cross-entropy of the next token. train_vit.py has a loss of "
                                      "its own, without this unit, for every stage."),
        Field("img/s", "1/second", "Images a second."),
    ),
    "pretrain.py and rl.py": (
        Field("tok/s", "1/second", "Tokens a second: all packed tokens in pretraining, the model's "
                                   "own tokens that it learns from in RL."),
    ),
    "pretrain.py": (
        Field("held_out", "nats a token", "The same loss on held-out samples, which training never "
                                          "sees. Where it rises while `loss` falls, the model "
                                          "memorises."),
        Field("held_out_NAME", "nats a token", "The held-out loss of one source alone, such as a "
                                               "file of your own data."),
        Field("mtpN", "nats a token", "Loss of the multi-token prediction head at depth N: it "
                                      "predicts the token N places after the next one. The head "
                                      "learns only in the last part of a run (--mtp_share)."),
        Field("mfu", "share", "Model FLOPs utilisation: useful operations a second over what the "
                              "device's data sheet promises. Only on a GPU."),
    ),
    "train_vit.py": (
        Field("cos_semantic cos_texture", "-1 to 1", "Stage distill: cosine between the student's "
                                                     "prediction and the features of a teacher."),
        Field("linear knn", "share", "Right answers of a linear probe, or of a vote of the 10 "
                                     "nearest neighbours, to: which colour and shape has this "
                                     "thing?"),
        Field("dense", "share", "Right answers of a linear probe to: which shape does this patch "
                                "show? Mean over the classes."),
        Field("zero_shot_en zero_shot_zh", "share", "Pictures named rightly by comparing them with "
                                                    "48 English or Chinese names, without any "
                                                    "training on the names."),
        Field("i2t_en i2t_zh t2i_en t2i_zh", "share", "Retrieval at rank 1 among held-out pairs: "
                                                      "image to text (i2t) and text to image "
                                                      "(t2i)."),
        Field("chance_en chance_zh", "share", "What this retrieval reaches by picking blindly."),
        Field("moves_en moves_zh", "share", "Two-frame clips for which the right one of four "
                                            "directions is chosen; 0.25 by chance."),
        Field("pairs_i2t pairs_t2i pairs_chance", "share", "The same retrieval among held-out "
                                                           "pairs of your own folder (--pairs)."),
        Field("pairs", "count", "Held-out pairs that this retrieval chooses from."),
    ),
    "rl.py": (
        Field("reward", "0 to 1", "Mean reward of the rollouts that ended in this step, sampled at "
                                  "temperature 1."),
        Field("passN", "share", "Tasks with at least one full reward among N sampled rollouts."),
        Field("accuracy", "share", "Held-out tasks that are solved in full with greedy replies, "
                                   "mean over the categories. This is the figure to judge a run "
                                   "by."),
        Field("by", "", "The same figures for each category: reward, pass1, passN, errors."),
        Field("pg_loss", "", "The policy-gradient loss. It is near 0 by construction, since the "
                             "advantages of a group add up to 0, and does not measure progress."),
        Field("no_signal", "share", "Groups without signal: all their rollouts earned the same "
                                    "reward, so there is nothing to learn from."),
        Field("truncated", "share", "Rollouts that were cut off because a reply or the "
                                    "conversation grew too long."),
        Field("errors", "share", "Rollouts that ended in an error of the environment or of the "
                                 "verifier. They are not learnt from."),
        Field("samples", "count", "Rollouts that ended in this step."),
        Field("groups", "count", "Groups of rollouts that this step learnt from."),
        Field("tokens", "count", "Sampled tokens that this step learnt from."),
        Field("entropy", "nats a token", "Entropy of the policy over the next token. If it falls "
                                         "to 0, all rollouts of a task become equal."),
        Field("clipped", "share", "Tokens whose probability ratio is outside the clip band; they "
                                  "are clipped or masked."),
        Field("mismatch mismatch_max", "nats", "Difference between the log-probability in training "
                                               "and at sampling, mean and largest over the "
                                               "tokens."),
        Field("stale stale_max", "steps", "Age of the sampled tokens: optimizer steps between the "
                                          "weights that sampled them and those that learn from "
                                          "them; mean and largest."),
        Field("learning", "seconds", "Time of the forward and backward passes and of the "
                                     "optimizer."),
        Field("waited", "seconds", "Time in which the trainer waited for rollouts."),
        Field("idle", "seconds", "Time in which the engine had nothing to generate; of several, "
                                 "the longest."),
        Field("stalled", "seconds", "Time in which generation stopped to load new weights."),
        Field("dropped", "count", "Groups that were given up, because they were too old or took "
                                  "too long, since the start."),
        Field("twice", "count", "Rollouts that arrived twice, or too late, since the start."),
    ),
}


def field_of(key: str) -> Field | None:
    """The explanation of a key of log.jsonl, or None."""
    return next((field for fields in FIELDS.values() for field in fields if field.covers(key)),
                None)


def print_fields():
    """Print FIELDS as plain text, grouped by script."""
    for scripts, fields in FIELDS.items():
        print(f"\n{scripts}")
        for field in fields:
            unit = f" [{field.unit}]" if field.unit else ""
            print(f"  {', '.join(field.keys.split())}{unit}\n      {field.meaning}")


# ---- the lines of a log -------------------------------------------------------------------------

def numbers(row: dict) -> dict:
    """The values of `row` that can be drawn. NaN, of a step that was skipped or of rollouts that
    were all errors, is none of them."""
    return {key: value for key, value in row.items()
            if type(value) in (int, float) and abs(value) < 1e30}


def usable(lines: list) -> list[dict]:
    """The lines of a log without what is damaged: of each line its numbers, and those in `by`. A
    line without a step is left out."""
    kept = []
    for line in lines:
        if not isinstance(line, dict) or type(line.get("step")) is not int or line["step"] < 0:
            continue
        by = line.pop("by", {})
        kept.append(numbers(line))
        if isinstance(by, dict) and by:
            kept[-1]["by"] = {name: numbers(row) for name, row in by.items()
                              if isinstance(row, dict)}
    return kept


# ---- charts -------------------------------------------------------------------------------------

@dataclass(frozen=True)
class Chart:
    """Fields that are drawn in one chart. lines: {key: name in the legend}; a key that ends with *
    stands for all fields that begin so. smooth: draw means over short stretches, since single steps
    vary. minor: fold the chart away, since it only helps to find a fault."""
    title: str
    lines: dict
    smooth: bool = True
    minor: bool = False

    def fields(self, lines: list[dict]) -> dict[str, str]:
        """{key: name in the legend} of the chart's fields that occur in the lines of a log."""
        present, found = dict.fromkeys(key for line in lines for key in line), {}
        for key, name in self.lines.items():
            if key.endswith("*"):
                found |= {k: name + k.removeprefix(key[:-1]) for k in present
                          if k.startswith(key[:-1])}
            elif key in present:
                found[key] = name
        return found


def same(*keys: str) -> dict:
    """Keys that are good names as they are."""
    return {key: key for key in keys}


CHARTS = (
    Chart("loss", {"loss": "training", "held_out": "held out", "held_out_*": "held out, "}),
    Chart("loss of the multi-token prediction head, nats a token",
          {"mtp1": "depth 1", "mtp2": "depth 2", "mtp3": "depth 3"}),
    Chart("reward in training, accuracy on held-out tasks",
          {"reward": "sampled reward", "pass1": "pass@1", "accuracy": "held-out accuracy"}),
    Chart("probes: shares of right answers", same("linear", "knn", "dense")),
    Chart("naming and retrieval: shares of right answers",
          same("zero_shot_en", "zero_shot_zh", "i2t_en", "i2t_zh")),
    Chart("retrieval among your own pairs, direction of movement: shares of right answers",
          same("pairs_i2t", "pairs_t2i", "moves_en", "moves_zh")),
    Chart("cosine to the features of a teacher",
          {"cos_semantic": "semantic teacher", "cos_texture": "texture teacher"}),
    Chart("shares of rollouts, and of tokens outside the clip band",
          {"truncated": "truncated", "errors": "errors", "clipped": "outside the band"}),
    Chart("share of groups without signal", {"no_signal": "without signal"}),
    Chart("entropy of the policy, nats a token", {"entropy": "entropy"}),
    Chart("age of the sampled tokens, steps", {"stale": "mean", "stale_max": "largest"}),
    Chart("difference between training and sampling, nats", {"mismatch": "mismatch"}, minor=True),
    Chart("seconds a step", {"dt": "all", "learning": "learning", "waited": "waiting for rollouts",
                             "idle": "engine idle", "loading": "waiting for samples"}, minor=True),
    Chart("tokens a second", {"tok/s": "tokens"}, minor=True),
    Chart("gradient norm", {"norm": "norm"}, minor=True),
    Chart("learning rate", {"lr": "learning rate"}, smooth=False, minor=True))
