"""Where each stage's rows come from: the TinyHH world, or a file of real preference pairs."""

from dataclasses import dataclass, field

from minippo.hh import format_dialogue, load_preferences
from minippo.tinyhh import rows as tiny

SFT_ROWS = 8000  # TinyHH demonstrations
PPO_PROMPTS = 6000
PRETRAIN_TEXTS = 60_000


@dataclass
class Source:
    """The rows of `--data`; of a file the last tenth is held out from every training."""

    data: str
    limit: int | None = None
    report: str = field(default="", init=False)

    def __post_init__(self):
        self._pairs = None if self.is_tiny else self._load()

    @property
    def is_tiny(self) -> bool:
        """True if there is an annotator who can rank and judge."""
        return self.data == "tiny_hh"

    def _load(self, split: str | None = None) -> list[dict]:
        dataset, report = load_preferences(self.data, split, on_error="skip", limit=self.limit)
        self.report = str(report)
        return dataset.to_list()

    def _training(self) -> list[dict]:
        return self._pairs[: len(self._pairs) - self._held_out()]

    def _held_out(self) -> int:
        return max(1, len(self._pairs) // 10)

    def texts(self) -> list[str]:
        """What the base model reads."""
        if self.is_tiny:
            return tiny.pretrain_texts(PRETRAIN_TEXTS)
        keys = ("chosen", "rejected")
        rows = self._training()
        return [format_dialogue(r["instruction"], r[k], r["history"]) for r in rows for k in keys]

    def demonstrations(self) -> list[dict]:
        """Prompts with one `answer`: the mixed crowd's of TinyHH, the chosen ones of a file."""
        if self.is_tiny:
            return tiny.demonstrations("sft", SFT_ROWS)
        return [{**row, "answer": row["chosen"]} for row in self._training()]

    def pairs(self) -> tuple[list[dict], list[dict]]:
        """Preference pairs for training, and others held out."""
        if self.is_tiny and self._pairs is None:
            self._pairs = self._load("preference")
        return self._training(), self._pairs[-self._held_out() :]

    def prompts(self, split: str, count: int) -> list[dict]:
        """Prompts of "preference", "ppo" or "test"; of a file, test prompts are the held-out."""
        if self.is_tiny:
            return tiny.prompt_rows(split, count)
        rows = self._pairs[-self._held_out() :] if split == "test" else self._training()
        return rows[:count]
