"""A prefix cache: which blocks of a prompt an engine has read before."""

from __future__ import annotations

from collections import OrderedDict
from hashlib import blake2b

from loadtests.emulator.request import BYTES_A_TOKEN


class PrefixCache:
    """The blocks used last, up to a number of them. A block is known by itself, all before it and a salt: callers who
    don't share that learn nothing from each other's timing."""

    def __init__(self, *, blocks: int, block_tokens: int) -> None:
        self.blocks = blocks
        self.block_tokens = block_tokens
        self.queried_tokens = 0
        self.hit_tokens = 0
        self._known: OrderedDict[bytes, None] = OrderedDict()

    def __len__(self) -> int:
        return len(self._known)

    def look_up(self, prompt: bytes, salt: str) -> int:
        """How many of its tokens, from the first on, need not be read: never all, the last being in no whole block."""
        cached_tokens = 0
        for key in self._keys(prompt, salt):
            if key not in self._known:
                break
            self._known.move_to_end(key)
            cached_tokens += self.block_tokens
        self.queried_tokens += len(prompt) // BYTES_A_TOKEN + 1
        self.hit_tokens += cached_tokens
        return cached_tokens

    def store(self, prompt: bytes, salt: str) -> None:
        """It has been read."""
        for key in self._keys(prompt, salt):
            self._known[key] = None
            self._known.move_to_end(key)
        while len(self._known) > self.blocks:
            self._known.popitem(last=False)

    def _keys(self, prompt: bytes, salt: str) -> list[bytes]:
        """Of its whole blocks."""
        size = self.block_tokens * BYTES_A_TOKEN
        key, keys = blake2b(salt.encode(), digest_size=16).digest(), []
        for start in range(0, len(prompt) - size + 1, size):
            key = blake2b(key + prompt[start : start + size], digest_size=16).digest()
            keys.append(key)
        return keys
