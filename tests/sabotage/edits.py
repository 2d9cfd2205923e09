"""The edits: for each notebook three that must make its comparison fail.

A sign, a shift, a mask, or what a lesson is about besides. Each is a mistake that somebody could
make: the package still imports, the shapes still fit, and a number is wrong.
"""

from dataclasses import dataclass


@dataclass(frozen=True)
class Edit:
    """One wrong version of one file."""

    notebook: str  # its number
    file: str  # below minippo/
    old: str  # stands exactly once in the file
    new: str
    what: str  # what is wrong now


EDITS = (
    # 00, the tour
    Edit("00", "rewards.py", ", 0) - penalty", ", 0) + penalty", "sign: the KL is rewarded"),
    Edit(
        "00", "engine/packing.py",
        ".flatten()[slots] - 1", ".flatten()[slots]",
        "shift: a token is read off the logits at its own place",
    ),
    Edit(
        "00", "masking.py",
        "is_eos.cumsum(dim=1) - is_eos == 0", "is_eos.cumsum(dim=1) == 0",
        "mask: the EOS does not count",
    ),
    # 01, SFT
    Edit(
        "01", "losses.py",
        "return -masked_mean(gather_logprobs(logits, tokens), mask)",
        "return masked_mean(gather_logprobs(logits, tokens), mask)",
        "sign: SFT makes its demonstrations less likely",
    ),
    Edit(
        "01", "engine/packing.py",
        "targets = tokens[:, -response_length:]", "targets = tokens[:, -response_length - 1 : -1]",
        "shift: a place is asked for its own token, not for the next",
    ),
    Edit("01", "masking.py", ".sum(dim) / mask.sum(dim)", ".mean(dim)", "mask: padding counts"),
    # 02, preference data
    Edit(
        "02", "preferences.py",
        'float(scores[i] - scores[j])', 'float(scores[j] - scores[i])',
        "sign: the margin is that of the rejected answer",
    ),
    Edit(
        "02", "hh.py",
        r"\n\n(Human|Assistant):", r"\n+(Human|Assistant):",
        "parsing: one newline makes a turn",
    ),
    Edit(
        "02", "worlds/tinyhh/annotator.py",
        "key=lambda i: -noisy[i]", "key=lambda i: noisy[i]",
        "order: the annotator ranks the worst answer first",
    ),
    # 03, tokens and log-probabilities
    Edit(
        "03", "losses.py",
        "return -masked_mean(gather_logprobs(logits, tokens), mask)",
        "return masked_mean(gather_logprobs(logits, tokens), mask)",
        "sign: SFT makes its demonstrations less likely",
    ),
    Edit(
        "03", "logprobs.py",
        "x[:, last - response_length : last]", "x[:, last - response_length + 1 :]",
        "shift: the response window begins one place late",
    ),
    Edit(
        "03", "engine/passes.py",
        "tokens.shape[1] :]\n    seen =", "tokens.shape[1] :] + 1\n    seen =",
        "positions: all tokens stand one place further on",
    ),
    # 04, the reward model
    Edit(
        "04", "losses.py",
        "gap = chosen_scores - rejected_scores", "gap = rejected_scores - chosen_scores",
        "sign: the rejected answer is to score higher",
    ),
    Edit(
        "04", "engine/passes.py",
        "[rows, lengths - 1]", "[rows, lengths - 2]",
        "shift: the score is read at the token before the last",
    ),
    Edit(
        "04", "losses.py",
        "count, count, offset=1", "count, count, offset=0",
        "pairs: each answer is compared with itself too",
    ),
    # 05, the KL
    Edit(
        "05", "kl.py",
        "log_ratio = ref_logprobs - logprobs", "log_ratio = logprobs - ref_logprobs",
        "sign: k3 has the two policies exchanged",
    ),
    Edit(
        "05", "rewards.py",
        "mask & (counted_from_here_on == 1)", "mask & (counted_from_here_on == 2)",
        "shift: the score comes one token early",
    ),
    Edit(
        "05", "rewards.py",
        "kl_coef * kl.masked_fill(~mask, 0)", "kl_coef * kl", "mask: padding pays for its KL",
    ),
    # 06, values and advantages
    Edit(
        "06", "advantages.py",
        "gamma * next_value - values[:, t]", "gamma * next_value + values[:, t]",
        "sign: V is added where it is to be taken off",
    ),
    Edit(
        "06", "engine/packing.py",
        "read(hidden.flatten(0, 1).index_select(0, packed.positions))",
        "read(hidden.flatten(0, 1).index_select(0, packed.positions + 1))",
        "shift: V is that of the state after the token",
    ),
    Edit(
        "06", "advantages.py",
        "values.masked_fill(~mask, 0)\n    advantage =", "values\n    advantage =",
        "mask: what the critic says of padding counts",
    ),
    # 07, the losses
    Edit(
        "07", "losses.py",
        "clipped = -advantages * ratio.clamp", "clipped = advantages * ratio.clamp",
        "sign: the clipped term is the objective, not the loss",
    ),
    Edit(
        "07", "engine/passes.py",
        "kept)[:, -kept:-1]", "kept)[:, 1 - kept :]",
        "shift: the update sees the logits one place late",
    ),
    Edit("07", "masking.py", ".sum(dim) / mask.sum(dim)", ".mean(dim)", "mask: padding counts"),
    # 08, the loop
    Edit("08", "rewards.py", ", 0) - penalty", ", 0) + penalty", "sign: the KL is rewarded"),
    Edit(
        "08", "logprobs.py",
        "x[:, last - response_length : last]", "x[:, last - response_length + 1 :]",
        "shift: the response window begins one place late",
    ),
    Edit(
        "08", "masking.py",
        "is_eos.cumsum(dim=1) - is_eos == 0", "is_eos.cumsum(dim=1) == 0",
        "mask: the EOS does not count",
    ),
    # 12, scaling up
    Edit(
        "12", "engine/packing.py",
        "counts * chunk.token_count / self.token_count",
        "counts * len(chunk.mask) / len(self.mask)",
        "weight: a mean of the processes' means, not one over the tokens of all",
    ),
    Edit(
        "12", "optim.py",
        "gradients(plan[step])", "gradients(plan[step - first])",
        "resume: the data begin anew, the steps do not",
    ),
    Edit(
        "12", "engine/packing.py",
        ".flatten()[slots] - 1", ".flatten()[slots]",
        "shift: packed rows read a token off the logits at its own place",
    ),
)  # fmt: skip
