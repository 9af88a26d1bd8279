"""What tests of several processes run in them: forked off a server by `start`."""

import json
import math
import multiprocessing
import os
import resource
import sys
import time
from collections.abc import Callable
from multiprocessing.process import BaseProcess
from pathlib import Path

# Forking off a process that has the imports behind it makes a process in milliseconds.
SERVER = multiprocessing.get_context("forkserver")
SERVER.set_forkserver_preload(["isic_vq.cli", "isic_vq.training.vqvae", "isic_vq.training.prior"])


def start(log: Path, *arguments: object, fsdp: bool = False, **environment: object) -> BaseProcess:
    """Start `isic-vq ARGUMENTS` in a process of its own that writes its output to `log`."""
    return start_function(log, _command_line, [*map(str, arguments)], fsdp, **environment)


def start_function(
    log: Path, function: Callable[..., None], *arguments: object, **environment: object
) -> BaseProcess:
    """Start a function of this module in a process of its own that writes its output to `log`."""
    variables = {name: str(value) for name, value in environment.items()}
    process = SERVER.Process(target=_logged, args=(log, variables, function, arguments), daemon=True)
    process.start()
    return process


def _logged(
    log: Path, environment: dict[str, str], function: Callable[..., None], arguments: tuple[object, ...]
) -> None:
    with log.open("ab") as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
    import torch

    torch.set_num_threads(1)
    os.environ.update(environment, CUDA_VISIBLE_DEVICES="")
    function(*arguments)


def _command_line(arguments: list[str], fsdp: bool) -> None:
    from isic_vq import cli

    sys.argv = ["isic-vq", *arguments]
    if fsdp:
        _pretend_gpus()
    cli.main()


def _pretend_gpus() -> None:
    """Let accelerate take this process for one of several with GPUs: on CPUs it does not look at FSDP's variables."""
    from accelerate import PartialState
    from accelerate.utils import DistributedType

    PartialState(cpu=True)
    PartialState._shared_state["distributed_type"] = DistributedType.MULTI_GPU


def make_trainer(task, folder, **loop):
    from isic_vq.training.loop import Trainer
    from isic_vq.training.processes import Processes
    from isic_vq.training.recipe import LoopRecipe
    from isic_vq.training.run import Run

    fields = {"max_steps": 6, "batch_size": 4, "warmup_steps": 2, "save_every": 3, "precision": "fp32"}
    recipe = LoopRecipe(**{**fields, "process_timeout": 120, **loop})
    folder.mkdir(exist_ok=True)
    return Trainer(task, recipe, Run(folder, "0123abcd"), Processes(recipe, folder), settings={})


def error_of(trainer):
    try:
        trainer.train()
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    return None


def nan_in_one_process(folder):
    """A parameter of the second process alone becomes NaN before the fifth step."""
    import torch
    from line_task import LineTask

    task = LineTask()

    def poison(step):
        if step == 4 and task.processes.rank == 1:
            with torch.no_grad():
                task.model[0].weight.fill_(math.nan)

    task.before = poison
    return {"error": error_of(make_trainer(task, folder))}


def full_disk_in_one_process(folder):
    """From the sixth step on, the second process alone cannot write files."""
    from line_task import LineTask

    task, (soft, hard) = LineTask(), resource.getrlimit(resource.RLIMIT_FSIZE)

    def fill(step):
        if step == 5 and task.processes.rank == 1:
            resource.setrlimit(resource.RLIMIT_FSIZE, (100, hard))

    task.before = fill
    trainer = make_trainer(task, folder)
    try:
        return {"error": error_of(trainer)}
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def make_vqvae_task(corrupt=()):
    """A tokenizer and eight images, some of them corrupt."""
    from isic_vq.data.loading import DecodedImages
    from isic_vq.data.sources import open_source
    from isic_vq.models.configuration_vqvae import VQVAEConfig
    from isic_vq.models.image_processing_isic_vq import IsicVQImageProcessor
    from isic_vq.models.modeling_vqvae import VQVAEModel
    from isic_vq.training.recipe import DataRecipe, LoopRecipe, VQVAERecipe
    from isic_vq.training.vqvae import VQVAETask

    images = DecodedImages(open_source("synthetic:8:0"), IsicVQImageProcessor(size=16), cache=True)
    images.cache.update({index: f"image {index}: corrupt" for index in corrupt})
    model = VQVAEModel(VQVAEConfig(image_size=16, hidden_sizes=[4, 8], num_codes=8, code_dim=4))
    recipe = VQVAERecipe(data=DataRecipe(max_corrupt_share=0.5), loop=LoopRecipe(batch_size=4))
    return VQVAETask(model, images.image_processor, images, images, recipe)


def evaluation_in_one_process(folder):
    """The first process validates and runs the model, wrapped and not, while the second looks on."""
    import torch

    task = make_vqvae_task()
    trainer = make_trainer(task, folder)
    measured = folder / "measured"
    if trainer.processes.is_main:
        loss = task.validate()["loss"]
        with torch.no_grad():
            for candidate in (task.model, trainer.model):
                candidate.eval()(torch.rand(2, 3, 16, 16))
        measured.write_text(str(loss))
    deadline = time.monotonic() + 60
    while not measured.exists() and time.monotonic() < deadline:
        time.sleep(0.01)
    found = measured.exists()
    trainer.processes.wait()
    return {"measured": found}


def no_image_for_kmeans_in_one_process(folder):
    """The two images of the second process in the first batch of k-means are corrupt."""
    import torch

    order = torch.randperm(8, generator=torch.Generator().manual_seed(0)).tolist()
    task = make_vqvae_task(corrupt=order[2:4])
    make_trainer(task, folder)
    try:
        task.start_codebook()
    except ValueError as error:
        return {"error": str(error)}
    return {"error": None}


def main(folder: Path, prior_recipe: Path) -> None:
    """Run every scenario and write down what this process saw; a prior is trained at the end."""
    from isic_vq.training.load import load_recipe
    from isic_vq.training.prior import train_prior
    from isic_vq.training.recipe import PriorRecipe

    scenarios = [
        nan_in_one_process,
        full_disk_in_one_process,
        evaluation_in_one_process,
        no_image_for_kmeans_in_one_process,
    ]
    seen = {scenario.__name__: scenario(folder / scenario.__name__) for scenario in scenarios}
    (folder / f"process-{os.environ['RANK']}.json").write_text(json.dumps(seen))
    train_prior(load_recipe(PriorRecipe, prior_recipe, [f"output_dir={folder / 'prior'}", *NO_DROPOUT]))


NO_DROPOUT = ["model.dropout=0", "model.class_dropout=0", "loop.max_steps=12", "context_noise=0.5"]
