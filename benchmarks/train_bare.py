"""A plain torch loop over the batches of a run, one JSON line an interval of its log: what `launch/pretrain.py` is held against.

    python benchmarks/train_bare.py CONFIG

Loader, preparation, model, loss and Adam are the product's. There is no engine, guard, meter, record, checkpoint or Ray.
"""

import argparse
import json
import time
from pathlib import Path

import torch

from cromss_dist.losses import CromssLoss
from cromss_dist.parse import parse_run
from cromss_dist.pretrain.task import Pretraining
from cromss_dist.train.step.engine import resolve_memory_format


def main() -> None:
    """Trains for the length of the run."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("config", type=Path, metavar="CONFIG")
    config = parse_run(["--config", str(parser.parse_args().config)]).config
    torch.set_num_threads(config.launch.cpus_per_worker)
    task, train = Pretraining.of(config, 1), config.train
    model, loss = task.build_model(), CromssLoss(config.loss)
    optimizer = torch.optim.Adam(model.parameters(), train.lr, weight_decay=train.weight_decay, fused=True)
    memory_format = resolve_memory_format(config.engine, torch.device("cpu"))
    timeline = task.timeline
    with task.data.train_loader(task.plan) as batches:
        started = time.perf_counter()
        for step in range(1, timeline.total_steps + 1):
            example = task.example(next(batches), torch.device("cpu"))
            s1, s2 = (x.contiguous(memory_format=memory_format) for x in example.images.values())
            progress = timeline.epochs((step - 1) * timeline.global_batch)
            logits_s1, logits_s2 = model(s1, s2)
            total = loss(logits_s1, logits_s2, example.label, example.prior, progress, example.weights).total
            total.backward()  # type: ignore[no-untyped-call]
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
            if step % train.log_every_steps == 0:
                samples_per_s = train.log_every_steps * timeline.global_batch / (time.perf_counter() - started)
                print(json.dumps({"samples_per_s": samples_per_s, "loss": float(total.detach())}), flush=True)
                started = time.perf_counter()


if __name__ == "__main__":
    main()
