"""What a run does where numbers go bad: it stops, leaves steps out, or goes back; and what it says of memory."""

import contextlib
from collections.abc import Callable, Iterator

from ghostnet import checkpoint
from ghostnet.engine import Recipe, TrainState
from ghostnet.errors import SampleError, UserError, is_out_of_memory
from ghostnet.nonfinite import Faults
from ghostnet.saving import Saver

MOST_SKIPS = 20
"""Steps that may be skipped one after another: looked at where metrics are read."""
MOST_REWINDS = 3
"""Times that a run may be taken back to one and the same step."""
SMALLEST_SCALE = 1.0
"""A dynamic loss scale below it has collapsed: at 1 it does nothing, and 16 overflows in a row bring it there."""


class Rescue:
    """Looks at a run where its loop waits for the device anyway, and before each of its saves."""

    def __init__(
        self, state: TrainState, recipe: Recipe, saver: Saver, steps_per_epoch: int, say: Callable[[str], None]
    ) -> None:
        self.state, self.recipe, self.saver, self.steps_per_epoch, self.say = state, recipe, saver, steps_per_epoch, say
        self.told = state.watch.read(state.ranks).skipped

    def start(self) -> None:
        """Before the first step: a run that may be taken back has somewhere to go. All ranks call it."""
        if self.state.on_nan == "rewind" and not (self.saver.folder / checkpoint.REWIND).exists():
            self.saver.save(self.state, checkpoint.REWIND)

    @property
    def names(self) -> tuple[str, ...]:
        """The files of a save that is due by the config, beside the best: a run is taken back to no other."""
        return (checkpoint.REWIND, checkpoint.LAST) if self.state.on_nan == "rewind" else (checkpoint.LAST,)

    def check(self) -> bool:
        """Whether the run was taken back. UserError where it can't go on. All ranks call it; waits for the device."""
        state = self.state
        self._check_scale()
        faults, finite = state.watch.read(state.ranks), state.is_finite()
        self._tell_skipped(faults)
        if finite and (not faults.step or (state.on_nan == "skip" and faults.in_a_row < MOST_SKIPS)):
            return False
        what, step = (str(faults), faults.step) if faults.step else ("weights are not finite", state.step)
        if state.on_nan == "rewind":
            return self._rewind(what, step)
        if faults.in_a_row:
            what = f"{faults.in_a_row} steps in a row were skipped, and no more than {MOST_SKIPS} may be: {what}"
        raise UserError(f"{what}, first {self._at(step)}. {self._ways_out(skip=state.on_nan != 'skip')}")

    def _check_scale(self) -> None:
        scale, amp = self.state.amp.scale(), self.state.amp
        if scale is not None and scale < SMALLEST_SCALE:
            raise UserError(
                f"amp={amp.name}: the loss scale has collapsed to {scale:.3g} {self._at(self.state.step)}: gradients "
                f"overflow whatever it is. {self._last()} Try amp=bf16 or amp=none, which need no loss scale, a lower "
                "optim.lr, or a longer schedule.warmup_epochs."
            )

    def _tell_skipped(self, faults: Faults) -> None:
        if faults.skipped > self.told:
            news = faults.skipped - self.told
            what = "1 step that was" if news == 1 else f"{news} steps that were"
            last = f"; {faults.in_a_row} in a row up to now: {faults}" if faults.in_a_row else ""
            self.say(f"skipped {what} not finite, {faults.skipped} in all{last}")
            self.told = faults.skipped

    def _rewind(self, what: str, step: int) -> bool:
        state, path = self.state, self.saver.folder / checkpoint.REWIND
        where = self._at(step)
        self.saver.flush(state)
        saved = state.ranks.from_main(lambda: checkpoint.load(path))
        rewinds = [*state.rewinds, saved["step"]]
        if rewinds[-MOST_REWINDS - 1 :] == [saved["step"]] * (MOST_REWINDS + 1):
            raise UserError(
                f"{what}, first {where}, after {MOST_REWINDS} rewinds to step {saved['step']:,}, each with the samples "
                f"in another order. {self._ways_out(rewind=False)}"
            )
        with checkpoint.fitting(path):
            state.load_state_dict(saved)
        state.rewinds = rewinds
        self.say(
            f"rewind  {what}, first {where}. The run goes on from step {saved['step']:,}, with what is left of the "
            f"epoch in another order (rewind {len(rewinds)}; at most {MOST_REWINDS} to one step)"
        )
        return True

    def _at(self, step: int) -> str:
        epoch = (step - 1) // self.steps_per_epoch + 1
        return f"at epoch {epoch}, step {step:,}, learning rate {self.recipe.schedule(step - 1):.4g}"

    def _last(self) -> str:
        """The checkpoint that is left, in a sentence; waits until it is written."""
        self.saver.flush(self.state)
        last = self.saver.folder / checkpoint.LAST
        return f"The last good checkpoint is {last}." if last.exists() else "There is no checkpoint yet."

    def _ways_out(self, skip: bool = True, rewind: bool = True) -> str:
        others = ["on_nan=skip leaves such steps out"] if skip else []
        others += ["on_nan=rewind goes back to the last checkpoint and on with other samples"] if rewind else []
        amp = self.state.amp
        return (
            f"amp={amp.name} {amp.suspicion()}. {self._last()} Try a lower optim.lr, a longer schedule.warmup_epochs "
            f"or a smaller clip_grad_norm; {'; '.join(others)}."
        )


@contextlib.contextmanager
def memory_told(batch_size: int, accumulate: int = 0, alone: bool = False) -> Iterator[None]:
    """Where memory runs out inside, a UserError with the batch size to try; accumulate: 0 for evaluation.

    alone: no other rank waits for this one, so that what was trained before an evaluation is saved: a SampleError.
    """
    try:
        yield
    except Exception as error:
        if not is_out_of_memory(error):
            raise
        text = _evaluation(batch_size) if not accumulate else _training(batch_size, accumulate)
        raise (SampleError if alone and not accumulate else UserError)(f"out of memory {text}") from error


def _evaluation(batch_size: int) -> str:
    way_out = f"Try data.eval_batch_size={batch_size // 2}, which changes no result" if batch_size > 1 else SMALLER
    return f"in evaluation with data.eval_batch_size={batch_size}. {way_out}. resume=auto goes on from last.pt."


SMALLER = "Try a smaller data.image_size or model.width, or device=cpu"


def _training(batch_size: int, accumulate: int) -> str:
    smaller = next((size for size in range(batch_size // 2, 0, -1) if batch_size % size == 0), 1)
    if batch_size == 1:
        way_out = f"{SMALLER}."
    elif smaller * 4 < batch_size:  # a prime or nearly one
        way_out = f"Try data.batch_size={batch_size // 2}, which makes the global batch and the learning rate smaller."
    else:
        way_out = (
            f"Try data.batch_size={smaller} accumulate={accumulate * batch_size // smaller}, which keep the global "
            "batch and the learning rate; resume=auto goes on from last.pt."
        )
    also = f" accumulate={accumulate}" if accumulate > 1 else ""
    return f"in training with data.batch_size={batch_size}{also}. {way_out}"
