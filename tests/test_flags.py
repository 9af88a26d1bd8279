"""Options that are read from what they set: the library's own names, defaults and words, and no others."""

import inspect

import pytest
import typer

from isic_vq import cli
from isic_vq.cli.flags import options_of, settings_of
from isic_vq.data.prepare import Preparation
from isic_vq.evaluation.audit import audit_checkpoint
from isic_vq.models.sampling import Sampling
from isic_vq.pictures import write_edits, write_generated


def options(command):
    parameters = typer.main.get_command(cli.app).commands
    for word in command.split():
        found = parameters[word]
        parameters = getattr(found, "commands", {})
    return {parameter.name: parameter for parameter in found.params}


@pytest.mark.parametrize(
    ("command", "target", "names"),
    [
        ("generate", write_generated, "num_images seed backend cluster"),
        ("edit", write_edits, "mask lower_half label num_images particles seed dilation"),
        ("audit", audit_checkpoint, "num_samples samples_from seed limit max_corrupt_share"),
        (
            "data prepare",
            Preparation,
            "size encoding quality format rows_per_shard seed keep_duplicates max_corrupt_share",
        ),
    ],
)
def test_defaults_are_those_of_what_is_set(command, target, names):
    found = options(command)
    for name in names.split():
        assert found[name].default == inspect.signature(target).parameters[name].default, name
        assert found[name].help, name


@pytest.mark.parametrize("command", ["generate", "export"])
def test_sampling_has_no_defaults_of_the_command_but_the_checkpoints(command):
    found = options(command)
    for name in vars(Sampling()):
        assert found[name].default is None, name
        assert found[name].help, name


def test_help_is_the_docstring_without_its_references():
    text = options("generate")["guidance_scale"].help
    assert text == "1 is off, larger values follow the label more closely."
    assert "guidance_share" in settings_of("models/sampling.py:Sampling")["guidance_power"].help


def test_a_continued_line_of_the_docstring_is_read():
    help = settings_of("evaluation/evaluate.py:evaluate_checkpoint")["train_codes"].help
    assert help.startswith("code cache of the training images; ")
    assert help.endswith("first view.")


def test_what_was_not_given_keeps_its_default():
    seen = {}

    @options_of("models/sampling.py:Sampling", "temperature top_k", top_k="most")
    def command(**settings):
        seen.update(settings)

    assert list(inspect.signature(command).parameters) == ["temperature", "top_k"]
    command(temperature=0.5, top_k=None)
    assert seen == {"temperature": 0.5}
    with pytest.raises(KeyError):
        options_of("models/sampling.py:Sampling", "warmth")
