"""A run's loop: train, and in their turn evaluate, save and log, from the step it is at to the last."""

import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from ghostnet import checkpoint, engine, rescue
from ghostnet.data.loader import EvalLoader, TrainLoader
from ghostnet.engine import Recipe, TrainState
from ghostnet.errors import PeerFailed, SampleError
from ghostnet.loggers import ConsoleLogger, Logger, Row
from ghostnet.rescue import Rescue
from ghostnet.saving import Saver
from ghostnet.signals import Interrupted, StopSignal


@dataclass(frozen=True)
class Cadence:
    """After which steps (optimizer updates, counted from 1) a run does what."""

    steps_per_epoch: int
    total_steps: int
    log_every: int
    """Steps."""
    eval_every: int
    """Epochs."""
    save_every: int | None
    """Steps, beside the end of each epoch; None: there alone."""

    def ends_epoch(self, step: int) -> bool:
        """Also before the first step."""
        return step % self.steps_per_epoch == 0

    def evaluates(self, step: int) -> bool:
        """Also before the first step, and after the last in any case."""
        on_time = step // self.steps_per_epoch % self.eval_every == 0
        return self.ends_epoch(step) and (on_time or step == self.total_steps)

    def logs(self, step: int) -> bool:
        """Metrics of training."""
        return step % self.log_every == 0 or self.ends_epoch(step)

    def saves(self, step: int) -> bool:
        """Within an epoch."""
        return bool(self.save_every) and step % (self.save_every or 1) == 0 and not self.ends_epoch(step)


@dataclass
class Loop:
    """All that takes part. Every rank runs it; only the main one has loggers."""

    state: TrainState
    recipe: Recipe
    train_loader: TrainLoader
    eval_loader: EvalLoader
    cadence: Cadence
    saver: Saver
    console: ConsoleLogger
    loggers: list[Logger]
    is_hopeless: Callable[[Row], bool]
    """Asked by the main rank after each evaluation: whether the run need not go on."""
    rescue: Rescue = field(init=False)

    def __post_init__(self) -> None:
        self.rescue = Rescue(self.state, self.recipe, self.saver, self.cadence.steps_per_epoch, self.console.say)

    def run(self, stop: StopSignal) -> bool:
        """Go on to the last step, all saved -> whether it was hopeless and ended before.

        Asked to stop, or where a sample can't be read, or a peer failed: what was trained is saved first.
        """
        state, cadence = self.state, self.cadence
        hopeless = False
        try:
            self.rescue.start()
            while True:
                if cadence.evaluates(state.step) and state.evaluated < state.step:
                    self._evaluate(stop)
                    hopeless = state.ranks.from_main(lambda: self.is_hopeless(state.last))
                if cadence.ends_epoch(state.step) and state.step:
                    is_best = state.best is state.last and state.evaluated == state.step
                    self.saver.save(state, *([checkpoint.BEST] if is_best else []), *self.rescue.names)
                if state.step >= cadence.total_steps or hopeless:
                    break
                self._train(stop)
        except (Interrupted, SampleError, PeerFailed):
            self._is_taken_back()
            self.saver.save(state, checkpoint.LAST)
            self.saver.flush(state)
            raise
        self.saver.flush(state)
        return hopeless

    def _train(self, stop: StopSignal) -> None:
        """To the end of the epoch, or until the run is taken back."""
        state, cadence = self.state, self.cadence
        with rescue.memory_told(self.train_loader.batch_size, self.recipe.accumulate):
            for step in engine.train(state, self.train_loader, self.recipe, stop):
                self.console.advance(step)
                self.saver.check()
                logs, saves = cadence.logs(step), cadence.saves(step)
                if (logs or saves) and self._is_taken_back():
                    break
                if logs:
                    self._log(self._train_row())
                    self._tell_skipped()
                if saves:
                    self.saver.save(state, *self.rescue.names)
                    state.speed.resume()

    def _is_taken_back(self) -> bool:
        """Whether numbers went bad and the run goes on from an earlier step, as its loggers are then told."""
        if not self.rescue.check():
            return False
        for logger in self.loggers:
            logger.back(self.state.step, self.state.evaluated)
        return True

    def _log(self, row: Row) -> None:
        for logger in self.loggers:
            logger.log(row)

    def _tell_skipped(self) -> None:
        if self.train_loader.skip:
            news = self.train_loader.skipped.news() + self.eval_loader.skipped.news()
            for faults in self.state.ranks.gather(news):
                for fault in faults:
                    self.console.say(f"skipped {fault}")

    def _train_row(self) -> Row:
        """The metrics since the last row; waits for the device."""
        state = self.state
        state.train_loss = state.meter.read(state.ranks)
        speed = state.speed.read(state.ranks)
        row = {
            "step": state.step,
            "epoch": (state.step - 1) // self.cadence.steps_per_epoch + 1,
            "time": time.time(),
            "train/loss": state.train_loss,
            "train/lr": state.optimizer.param_groups[0]["lr"],
            "train/fps": speed.fps,
            "train/compute": speed.compute,
            "train/data_wait": speed.data_wait,
        }
        row |= {"train/reduction": speed.reduction} if state.ranks.world_size > 1 else {}
        row |= {"train/skipped": state.watch.read(state.ranks).skipped} if state.on_nan == "skip" else {}
        return row | ({"train/rewinds": len(state.rewinds)} if state.on_nan == "rewind" else {})

    def _evaluate(self, stop: StopSignal) -> None:
        """Evaluate the weights and their average, and log it; the row becomes the state's last, and its best if so."""
        state, loader = self.state, self.eval_loader
        with rescue.memory_told(loader.batch_size, alone=state.ranks.world_size == 1):
            row = self._eval_row(stop)
        monitored = "ema/top1" if state.ema else "eval/top1"
        row["best"] = not state.best or row[monitored] > state.best[monitored]
        state.last, state.evaluated = row, state.step
        if row["best"]:
            state.best = row
        self._log(row)
        self._tell_skipped()
        if loader.cache and loader.cache.fault:
            self.console.say(f"note    {loader.cache}")

    def _eval_row(self, stop: StopSignal) -> Row:
        state, loader = self.state, self.eval_loader
        done, total = 0, sum(map(len, loader.indices)) * (2 if state.ema else 1)

        def on_batch(images: int) -> None:
            nonlocal done
            done += images
            self.console.evaluating(done, total)

        epoch = state.step // self.cadence.steps_per_epoch
        with state.agreed():
            model = state.amp.for_evaluation(state.model, state.device)
            result = engine.evaluate(model, state.amp, loader, stop, on_batch)
            row: dict[str, Any] = {"step": state.step, "epoch": epoch, "time": time.time(), "eval/loss": result.loss}
            row |= {"eval/top1": result.top1, "eval/top5": result.top5, "eval/fps": result.fps}
            if state.ema:
                average = state.amp.for_evaluation(state.ema.module, state.device)
                result = engine.evaluate(average, state.amp, loader, stop, on_batch)
                row |= {"ema/loss": result.loss, "ema/top1": result.top1, "ema/top5": result.top5}
        return row
