"""Spell a word backwards: a whole environment."""

import difflib

from rlloop.environment import MessageEnvironment

WORDS = ["loop", "stone", "river", "garden", "window", "planet"]


class Backwards(MessageEnvironment):
    """The reward is how similar the answer is to the word, spelled backwards."""

    def __len__(self):
        return len(WORDS)

    def task(self, index):
        return WORDS[index]

    def messages(self, task):
        return [{"role": "user", "content": f"Spell '{task}' backwards. Reply with one word."}]

    def score(self, task, rollout):
        return difflib.SequenceMatcher(None, rollout.text.strip().lower(), task[::-1]).ratio()
