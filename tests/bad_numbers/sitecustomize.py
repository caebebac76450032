"""Faults in any process that finds this folder on its path.

BAD: '12 pixel', '12-14 gradients', '12 pixel rank=1', '3- pixel always': the forward passes, counted from 0, in which a
pixel is infinite, or the gradients are and the loss isn't; on that rank alone; and after the run was taken back too.
MEMORY_LEFT: so many MB are left to the process from its first forward pass on. BAD_PICTURE: the file that makes a
loader's thread raise. TERM_IN: the pass in which the process sends itself SIGTERM. CLOCK_JUMPS: by hours.
"""

import os
import resource
import signal
import time
from pathlib import Path

if "BAD" in os.environ:
    from ghostnet import engine
    from ghostnet.data.transforms import Mix

    span, kind, *rest = os.environ["BAD"].split()
    first, _, last = span.partition("-")
    chosen = range(int(first), int(last or (first if span[-1] != "-" else 10**9)) + 1)
    options = dict(word.partition("=")[::2] for word in rest)
    mix, cross_entropy = Mix.__call__, engine.cross_entropy
    now = [False]

    def bad_mix(self, images, labels, seed, step):
        images, mixed = mix(self, images, labels, seed, step)
        now[0] = step in chosen and (seed == 42 or "always" in options)
        now[0] &= options.get("rank", os.environ.get("RANK", "0")) == os.environ.get("RANK", "0")
        if str(step) == os.environ.get("TERM_IN"):
            signal.raise_signal(signal.SIGTERM)
        if now[0] and kind == "pixel":
            images[0, 0, 0, 0] = float("inf")
        return images, mixed

    def bad_cross_entropy(logits, *others):
        if now[0] and kind == "gradients":
            logits.register_hook(lambda gradient: gradient * float("inf"))
        return cross_entropy(logits, *others)

    Mix.__call__, engine.cross_entropy = bad_mix, bad_cross_entropy

if "MEMORY_LEFT" in os.environ:
    from ghostnet.data.transforms import Mix

    plain_mix = Mix.__call__

    def mix_in_little_memory(*arguments):
        Mix.__call__ = plain_mix
        used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
        limit = used + 2**20 * int(os.environ["MEMORY_LEFT"])
        resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
        return plain_mix(*arguments)

    Mix.__call__ = mix_in_little_memory

if "BAD_PICTURE" in os.environ:
    # What no check foresaw, inside a thread of the loader.
    from ghostnet.data.datasets import ImageFolder

    image = ImageFolder.image

    def bad_image(self, index):
        if self.path(index).name == os.environ["BAD_PICTURE"]:
            raise ZeroDivisionError("of no kind that is foreseen")
        return image(self, index)

    ImageFolder.image = bad_image

if "CLOCK_JUMPS" in os.environ:
    # Each look at the clock finds it hours ahead of, or behind, the last.
    wall, looks = time.time, [0]

    def jumping():
        looks[0] += 1
        return wall() + 7 * 3600 * (-1) ** looks[0]

    time.time = jumping
