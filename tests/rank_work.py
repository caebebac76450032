"""What two launched ranks find out for test_distributed.py: python -m tests.rank_work -> JSON."""

import json
import os
import signal
import sys
from collections import Counter

import torch
from torch import nn

from ghostnet import distributed, elastic, engine
from ghostnet.amp import O2, Amp
from ghostnet.data.loader import EvalLoader, Feeder, TrainLoader
from ghostnet.data.transforms import Mix
from ghostnet.distributed import ALONE, Ranks
from ghostnet.ema import Ema
from ghostnet.engine import TrainState
from ghostnet.errors import PeerFailed, SampleError
from ghostnet.models import ghostnet as model_room
from ghostnet.models.ghostnet import GhostNet
from ghostnet.signals import Interrupted, StopSignal
from tests.test_engine import AUGMENT, OPTIMIZERS, SEED, SPEC, Patterns, recipe

CPU = torch.device("cpu")
STEPS = 5


def freeze_batchnorm(model):
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.eval()
            module.train = lambda mode=True, module=module: module
            nn.init.normal_(module.running_mean, std=0.1)
    return model


def begin(ranks, amp=None, frozen=False, dist_bn="reduce", optimizer="sgd"):
    model_room.STAGES = (model_room.STAGES[0], model_room.STAGES[3])
    torch.manual_seed(0)
    model = GhostNet(5, width=0.1, dropout=0.0).to(memory_format=torch.channels_last)
    model_room.STAGES = STAGES
    model = freeze_batchnorm(model) if frozen else model
    amp = amp or Amp()
    ema = Ema(model, 0.9)
    return TrainState(model, amp.initialize(model, OPTIMIZERS[optimizer], CPU), amp, ema, CPU, ranks, dist_bn)


STAGES = model_room.STAGES


def loaders(ranks, global_batch_size=8, data=None):
    feeder = Feeder(CPU, 1, 32)
    data = data or Patterns(44)
    train_loader = TrainLoader(data, SPEC, AUGMENT, global_batch_size // ranks.world_size, SEED, feeder, ranks)
    return train_loader, EvalLoader(data, SPEC, 8, feeder, ranks)


def weights_with_frozen_batchnorm(ranks, accumulate):
    state = begin(ranks, frozen=True)
    settings = recipe(mix=Mix(0.2, 1.0), accumulate=accumulate, clip_grad_norm=1.0)
    list(engine.train(state, loaders(ranks, 8 // accumulate)[0], settings, StopSignal(ranks)))
    return {name: value.detach().double().tolist() for name, value in state.model.named_parameters()}


def same_as_one(ranks):
    """The largest difference of any weight to that of one process, beside how far the weights moved."""
    start = {name: value.detach().double() for name, value in begin(ALONE, frozen=True).model.named_parameters()}
    found = {}
    for accumulate in (1, 2):
        two, one = (weights_with_frozen_batchnorm(which, accumulate) for which in (ranks, ALONE))
        pairs = [(torch.tensor(two[name]), torch.tensor(one[name]), start[name]) for name in one]
        difference = max((a - b).abs().max().item() for a, b, _ in pairs)
        found[accumulate] = difference, max((b - c).abs().max().item() for _, b, c in pairs)
    return found


def reductions(ranks):
    """How often gradients were reduced, in which precision."""
    found = {}
    for name, amp, accumulate in (("fp32", Amp(), 1), ("accumulated", Amp(), 2), ("o2", O2(128.0), 1)):
        seen, state = Counter(), begin(ranks, amp)
        reduce = state.ranks.reduction.reduce
        buckets = []

        def watched(hook_state, bucket, reduce=reduce, seen=seen, buckets=buckets):
            seen[str(bucket.buffer().dtype)] += bucket.buffer().numel()
            buckets.append(bucket.index())
            return reduce(hook_state, bucket)

        watched.__annotations__ = {}
        state.parallel = nn.parallel.DistributedDataParallel(state.model, **{distributed.BUFFERS: False})
        state.parallel.register_comm_hook(None, watched)
        list(engine.train(state, loaders(ranks, 8 // accumulate)[0], recipe(accumulate=accumulate), StopSignal(ranks)))
        found[name] = dict(seen) | {"first buckets": buckets.count(0), "steps": state.step}
    model = begin(ALONE).model
    norms = {id(p) for m in model.modules() if isinstance(m, nn.BatchNorm2d) for p in m.parameters()}
    found["norm"] = sum(p.numel() for p in model.parameters() if id(p) in norms)
    found["all"] = sum(p.numel() for p in model.parameters())
    return found


def statistics(ranks):
    """Whether BatchNorm's statistics are each rank's own while training, and agreed on for evaluation and saving."""
    found = {}
    for dist_bn in ("reduce", "broadcast"):
        state = begin(ranks, dist_bn=dist_bn)
        list(engine.train(state, loaders(ranks)[0], recipe(), StopSignal(ranks)))
        own = state.model.bn1.running_mean.clone()
        average = state.ema.module.bn1.running_mean.clone()
        everyone = ranks.gather((own, average))
        expected = [sum(pair) / 2 if dist_bn == "reduce" else pair[0] for pair in zip(*everyone, strict=True)]
        with state.agreed():
            inside = [state.model.bn1.running_mean.clone(), state.ema.module.bn1.running_mean.clone()]
        with state.for_all_ranks() as content:
            saved = [content[where]["bn1.running_mean"].clone() for where in ("model", "ema")]
        found[dist_bn] = {
            "differ": not torch.equal(everyone[0][0], everyone[1][0]),
            "agreed": all(torch.allclose(a, b, atol=1e-7) for a, b in zip(inside, expected, strict=True)),
            "saved": all(torch.equal(a, b) for a, b in zip(saved, inside, strict=True)),
            "own again": torch.equal(state.model.bn1.running_mean, own),
            "everyone's": all(
                torch.equal(content["ranks"][k]["statistics"][: len(own)], everyone[k][0]) for k in range(2)
            ),
        }
    return found


def together_until(ranks, signalled=False, broken=False):
    """The step before which each rank ended, and how, where rank 1 alone is disturbed in the fourth step."""
    state, data = begin(ranks), Patterns(44)
    train_loader, _ = loaders(ranks, data=data)
    victim, image = int(train_loader.indices(0)[3][0]), data.image

    def broken_image(index):
        if ranks.rank == 1 and index == victim:
            raise SampleError("picture 7 is broken")
        return image(index)

    def send(module, inputs):
        if ranks.rank == 1 and state.step == 2:
            os.kill(os.getpid(), signal.SIGUSR1)

    if broken:
        data.image = broken_image
    if signalled:
        state.model.register_forward_pre_hook(send)
    with StopSignal(ranks) as stop:
        try:
            list(engine.train(state, train_loader, recipe(), stop))
            how = "went on"
        except (Interrupted, PeerFailed, SampleError) as error:
            how = f"{type(error).__name__}: {error}"
    return ranks.gather((state.step, how))


def work(argument, ranks: Ranks):
    torch.set_num_threads(1)
    ranks = ranks.on(CPU)
    evaluations = [
        engine.evaluate(begin(ALONE).model, Amp(), loaders(which)[1], StopSignal(which)) for which in (ranks, ALONE)
    ]
    return {
        "argument": argument,
        "ranks": ranks.gather((ranks.rank, ranks.local_rank, ranks.is_main, ranks.world_size, ranks.starter)),
        "largest": ranks.largest(10 * ranks.rank),
        "from main": ranks.gather(ranks.from_main(lambda: f"of {ranks.rank}")),
        "tensors": ranks.gather(tensors(ranks)),
        "pids": ranks.gather((os.getpid(), os.getppid())),
        "pinned": ranks.gather((distributed.pin(ranks, CPU), sorted(os.sched_getaffinity(0)))),
        "same as one": same_as_one(ranks),
        "reductions": reductions(ranks),
        "statistics": statistics(ranks),
        "stopped": together_until(ranks, signalled=True),
        "broken": together_until(ranks, broken=True),
        "evaluations": [(r.top1_hits, r.top5_hits, r.count, r.loss) for r in evaluations],
    }


def tensors(ranks):
    """What ranks get of each other's tensors; torch_npu warns of those that torch pickles in its format of old."""
    of_old, torch.serialization._legacy_save = torch.serialization._legacy_save, None
    try:
        all_of_them = ranks.gather({"own": torch.full((2,), ranks.rank, dtype=torch.bfloat16)})
        main = ranks.from_main(lambda: [torch.arange(3), "text"])
    finally:
        torch.serialization._legacy_save = of_old
    return [each["own"].tolist() for each in all_of_them], [main[0].tolist(), main[1]]


def fail(argument, ranks: Ranks):
    """Ends rank 1 in the way that is asked for while rank 0 waits for it."""
    ranks = ranks.on(CPU)
    if ranks.rank == 1:
        if argument == "killed":
            os.kill(os.getpid(), signal.SIGKILL)
        if argument == "sample":
            raise SampleError("picture 9 is broken")
        if argument == "bug":
            raise ZeroDivisionError("a bug of ours")
        os._exit(7)
    ranks.barrier()
    ranks.barrier()


if __name__ == "__main__":
    if len(sys.argv) > 1:
        try:
            elastic.launch(fail, sys.argv[1], 2)
        except Exception as error:
            print(type(error).__name__, error)
    else:
        result, signum = elastic.launch(work, "told", 2)
        print(json.dumps(result | {"signum": signum, "parent": os.getpid()}))
