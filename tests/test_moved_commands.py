"""What could be done by the commands of earlier versions can be done by today's."""

from pathlib import Path

import typer

from isic_vq import cli
from isic_vq.cli.app import GROUPS, MOVED

ROOT = Path(__file__).resolve().parents[1]
# Commands as they were, with their options.
OPTIONS = {
    "evaluate": "--data --train-codes --train-data --features --floor-data --lpips --output --gallery --seed --max-corrupt-share",
    "score": "--model --output --label --marginalize --limit --train-codes --max-corrupt-share",
    "ood": "--data --train-codes --model --non-skin --split --limit --seed --output --max-corrupt-share",
    "audit": "--train-codes --held-out-codes --model --features --samples --samples-from --seed --limit --train-images --pairs --output --max-corrupt-share",
    "compress": "--model --portable --label --max-corrupt-share",
    "decompress": "--model",
    "demo": "--model --host --port --index --share",
    "generate": "--num-images --label --model --output --seed --batch-size --backend --temperature --top-k --top-p --guidance-scale --guidance-power --cluster --shards --shard-size",
    "sheets": "--model --output --seed --particles --data --max-corrupt-share",
    "reconstruct": "--model --output --limit --max-corrupt-share",
    "edit": "--mask --box --lower-half --label --num-images --particles --seed --dilation --model --output",
    "export": "--train-codes --bf16 --onnx",
    "onnx": "--model --output",
    "info": "",
    "encode": "--data --output --views --part --validation-share --license --max-corrupt-share --batch-size --classes --drop-other-classes",
    "figures": "--output",
    "push": "--private --create-pr --revision --tag --message --dry-run",
    "pull": "--output --revision",
    "train vqvae": "--config --resume",
    "train prior": "--config --resume",
    "train decoder": "--config --resume",
    "train classifier": "--config --resume",
    "data summary": "--sample --json --seed --classes --drop-other-classes",
    "data prepare": "--data --size --encoding --quality --format --rows-per-shard --validation-share --test-share --license --seed --workers --extend --keep-duplicates --max-corrupt-share --classes --drop-other-classes",
    "data verify": "",
    "card write": "",
    "card check": "",
    "card record": "",
    "card classifier": "",
    "study utility": "--train --test --model --output --work-dir --seeds --steps --limit --split --auc-of",
    "study realism": "--train --test --model --output --work-dir --seeds --steps --limit --split",
}
# Where an option went that has another name, or is an argument, now.
RENAMED = {
    "train vqvae": {"--config": "config"},
    "train prior": {"--config": "config"},
    "train decoder": {"--config": "config"},
    "train classifier": {"--config": "config"},
    "ood": {"--model": "model", "--split": "--data"},
    "sheets": {"--model": "model"},
    "onnx": {"--model": "model", "--output": "output"},
    "study utility": {
        **{"--model": "model", "--train": "--train-data", "--test": "--data", "--split": "--data"},
        **{"--auc-of": "--positive", "--steps": "--smoke", "--limit": "--smoke"},
    },
    "study realism": {"--model": "model", "--train": "--train-data", "--test": "--data", "--split": "--data"},
}


def names_of(words):
    """Names of a command's arguments, and its options."""
    command = typer.main.get_command(cli.app)
    for word in words:
        command = command.commands[word]
    return {name for parameter in command.params for name in (parameter.name, *parameter.opts)}


def test_every_option_is_where_it_was_or_where_it_moved():
    lost = []
    for old, options in OPTIONS.items():
        program, *new = MOVED.get(old, f"isic-vq {old}").split()
        assert program == "isic-vq"
        words = [word for word in new if word.islower() and not word.startswith("--")]
        known = names_of(words[: 2 if words[0] == "data" else 1])
        renamed = RENAMED.get(old, {})
        lost += [f"{old} {option}" for option in options.split() if renamed.get(option, option) not in known]
        lost += [f"{old}: {word}" for word in new if word.startswith("--") and word not in known]
    assert lost == []


def test_an_old_command_is_answered_with_the_new_one(run):
    for old, new in MOVED.items():
        for more in ([], ["somewhere"], ["--help"]):
            code, out, err = run(*old.split(), *more)
            assert (code, out, err) == (1, "", f"error: isic-vq {old} is now {new}\n")


def test_groups_hold_every_command_once():
    named = [name for names in GROUPS.values() for name in names]
    assert len(named) == len(set(named))
    assert set(named) == set(typer.main.get_command(cli.app).commands)


def test_studies_are_scripts():
    scripts = [new.split()[1] for new in MOVED.values() if new.startswith("python ")]
    assert [script for script in scripts if not (ROOT / script).is_file()] == []
    assert len(scripts) == 3
