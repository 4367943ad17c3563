"""What a run of train.py will take: counts, memory and hours, said before it begins.

Tokens are those of paths, rollouts and the evaluation, at most (every path as long as it may be)
until the lengths of real paths are known. Rates are measured on the machine at hand, by a few
steps.
"""
import dataclasses


@dataclasses.dataclass
class Plan:
    """A run's work, in numbers. Lengths are in tokens, rates in tokens a second, times in
    seconds."""
    problems: int           # to make labels from; 0 where the labels are given
    paths: int              # a problem
    prefixes: int           # to label or, where labels are given, to train on
    rollouts: int           # a prefix
    tests: int              # held-out problems
    n: int                  # paths of each, to evaluate
    path_length: float      # of a path, prompt apart
    rollout_length: float   # of a rollout, from the checkpoint on
    rate: float             # of decoding
    fit_seconds: float

    def tokens(self):
        """{part: tokens to decode}."""
        return {
            "paths": self.problems * self.paths * self.path_length,
            "rollouts": self.prefixes * self.rollouts * self.rollout_length,
            "evaluation": self.tests * self.n * self.path_length}

    def hours(self):
        """{part: hours}, in the order of the work."""
        tokens = self.tokens()
        decoding = {part: count / self.rate / 3600 for part, count in tokens.items()}
        return {
            "paths": decoding["paths"],
            "rollouts": decoding["rollouts"],
            "fit": self.fit_seconds / 3600,
            "evaluation": decoding["evaluation"]}

    def describe_work(self):
        """Lines that say how much there is to do."""
        tokens = self.tokens()
        lines = []
        if self.problems:
            lines.append(
                f"{self.problems:,} problems x {self.paths} paths, "
                f"{tokens['paths'] / 1e6:,.1f} M tokens")
            lines.append(
                f"{self.prefixes:,} prefixes x {self.rollouts} rollouts, "
                f"{tokens['rollouts'] / 1e6:,.1f} M tokens")
        if self.tests:
            lines.append(
                f"{self.tests:,} held-out problems x {self.n} paths, "
                f"{tokens['evaluation'] / 1e6:,.1f} M tokens")
        return lines

    def describe_hours(self):
        """One line of hours a part, and together."""
        hours = self.hours()
        parts = ", ".join(f"{part} {value:.2f} h" for part, value in hours.items() if value > 0)
        return f"{parts}; together {sum(hours.values()):.2f} h at {self.rate:,.0f} tok/s"
