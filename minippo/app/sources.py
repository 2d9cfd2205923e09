"""Where each stage's rows come from: the TinyHH world, or a file of real preference pairs."""

from dataclasses import dataclass, field

from minippo.hh import format_dialogue, format_prompt, load_preferences
from minippo.preferences import group_by_prompt
from minippo.worlds.tinyhh import rows as tiny

SFT_ROWS = 8000  # TinyHH demonstrations
PPO_PROMPTS = 6000
PRETRAIN_TEXTS = 300_000


@dataclass
class Source:
    """The rows of `--data`; of a file the last tenth of the prompts is held out from all training.

    Raises ValueError if there are not two prompts, or if options do not fit the data.
    """

    data: str
    limit: int | None = None
    split: str = ""
    report: str = field(default="", init=False)

    def __post_init__(self):
        self._train, self._held_out = [], []
        if not self.is_tiny:
            self._load(self.split or None)
        elif self.limit or self.split:
            message = "--limit and --split belong to --data FILE; how much of TinyHH is used is set"
            raise ValueError(f"{message} by --steps and --prompts")

    @property
    def is_tiny(self) -> bool:
        """True if there is an annotator who can rank and judge."""
        return self.data == "tiny_hh"

    def _load(self, split: str | None) -> None:
        dataset, report = load_preferences(self.data, split, on_error="skip", limit=self.limit)
        self.report, pairs = str(report), dataset.to_list()
        prompts = [format_prompt(pair["instruction"], pair["history"]) for pair in pairs]
        different = list(dict.fromkeys(prompts))
        if len(different) < 2:
            message = f"{self.data} has usable pairs of {len(different)} prompt only"
            raise ValueError(f"{message}; at least 2 are needed, since one is held out")
        kept = set(different[: len(different) - max(1, len(different) // 10)])
        for pair, prompt in zip(pairs, prompts, strict=True):
            (self._train if prompt in kept else self._held_out).append(pair)

    def texts(self) -> list[str]:
        """What the base model reads."""
        if self.is_tiny:
            return tiny.pretrain_texts(PRETRAIN_TEXTS)
        sides = [(row, row[key]) for row in self._train for key in ("chosen", "rejected")]
        return [format_dialogue(row["instruction"], text, row["history"]) for row, text in sides]

    def demonstrations(self) -> list[dict]:
        """Prompts with one `answer`: the mixed crowd's of TinyHH, the chosen ones of a file."""
        if self.is_tiny:
            return tiny.demonstrations("sft", SFT_ROWS)
        return [{**row, "answer": row["chosen"]} for row in self._train]

    def pairs(self) -> tuple[list[dict], list[dict]]:
        """Preference pairs for training, and others held out."""
        if not self._train:
            self._load("preference")
        return self._train, self._held_out

    def rankings(self) -> tuple[list[dict], list[dict]]:
        """The same as rows of `candidates`, best first: the pairs of one ranking stay together."""
        train, held_out = self.pairs()
        return group_by_prompt(train), group_by_prompt(held_out)

    def prompts(self, split: str, count: int) -> list[dict]:
        """Different prompts of a TinyHH split; of a file, "test" is the held-out tenth.

        Raises ValueError if "validation" is asked of a file, which has none.
        """
        if self.is_tiny:
            return tiny.prompt_rows(split, count)
        if split == "validation":
            raise ValueError(f"{self.data} has no validation prompts; use --prompts-of test")
        unique: dict[str, dict] = {}
        for row in self._held_out if split == "test" else self._train:
            unique.setdefault(format_prompt(row["instruction"], row["history"]), row)
        return list(unique.values())[:count]
