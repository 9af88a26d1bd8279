"""Commands about images: what is in a source, prepare it for training, check what was prepared."""

import json
import re
import sys
from pathlib import Path
from typing import Annotated, Any

import typer

from isic_vq.cli.app import (
    ClassesOption,
    OtherClassesOption,
    app,
    check_first,
    declared_classes,
    quiet_transformers,
)
from isic_vq.cli.flags import options_of

data_app = typer.Typer(help="Look at images, prepare them for training, check them.", no_args_is_help=True)
app.add_typer(data_app, name="data")


@data_app.command(
    "summary",
    epilog="Examples:\n\n  isic-vq data summary folder:my_images -o sample.png\n\n"
    "  isic-vq data summary 'isic-archive:license=CC-0&image_type=dermoscopic'",
)
def summary(
    uri: Annotated[
        str, typer.Argument(metavar="SOURCE", help="Images, as for --data of the other commands.")
    ],
    sample: Annotated[
        Path | None,
        typer.Option("--sample", "-o", help="PNG of some images, which shows the source's pixels."),
    ] = None,
    json_file: Annotated[Path | None, typer.Option("--json", help="Write the counts as JSON.")] = None,
    seed: Annotated[int, typer.Option(min=0, help="Of the images that the PNG shows.")] = 0,
    classes: ClassesOption = None,
    drop_other_classes: OtherClassesOption = False,
) -> None:
    """Count a source's images by diagnosis, source, licence and so on, and what they lack."""
    check_first(sources=[uri])
    from isic_vq.data.sources import find_source
    from isic_vq.data.summary import summarise, summary_lines
    from isic_vq.files import write_atomically

    quiet_transformers()
    source = find_source(uri, declared_classes(classes, drop_other_classes))
    counted = {"source_name": source.name, "snapshot": source.snapshot, **summarise(source.metadata())}
    counted["remarks"] = list(source.findings.lines())
    typer.echo(
        f"{source.name}: {counted['num_images']} images" + (f", {source.snapshot}" if source.snapshot else "")
    )
    for line in (*counted["remarks"], *summary_lines(counted)):
        typer.echo(line)
    if json_file is not None:
        write_atomically(json_file, (json.dumps(counted, indent=2) + "\n").encode())
        typer.echo(f"wrote {json_file}")
    if sample is not None:
        from isic_vq.pictures import write_sample

        typer.echo(f"wrote {write_sample(source, counted['num_images'], sample, seed)} images to {sample}")


@data_app.command(
    "prepare",
    epilog="Examples:\n\n  isic-vq data prepare my_data --data folder:my_images\n\n"
    "  isic-vq data prepare ham --data challenge:2018 --data test=challenge:2018:test --workers 4",
)
@options_of("data/prepare.py:prepare", "workers extend")
@options_of(
    "data/prepare.py:Preparation",
    "size encoding quality format rows_per_shard licenses seed keep_duplicates max_corrupt_share",
    licenses="license",
)
def prepare(
    output: Annotated[Path, typer.Argument(help="Folder to write.")],
    data: Annotated[
        list[str],
        typer.Option("--data", help="[SPLIT=]SOURCE; repeat it for several. SPLIT: train, validation, test."),
    ],
    validation_share: Annotated[float, typer.Option(help="Of the images without a SPLIT.")] = 0.1,
    test_share: Annotated[float, typer.Option(help="Of the images without a SPLIT.")] = 0.0,
    classes: ClassesOption = None,
    drop_other_classes: OtherClassesOption = False,
    **settings: Any,
) -> None:
    """Write images at the training size in shards, split by lesion and patient, without near-duplicates across splits."""
    check_first(sources=[_with_split(text)[1] for text in data])
    from isic_vq.data.prepare import Preparation
    from isic_vq.data.prepare import prepare as run
    from isic_vq.data.summary import counts_lines

    quiet_transformers()
    how = {name: settings.pop(name) for name in ("workers", "extend")}
    shares = {"validation": validation_share, "test": test_share}
    if "licenses" in settings:
        settings["licenses"] = tuple(settings["licenses"])
    manifest = run(
        output,
        [_with_split(text) for text in data],
        Preparation(shares=shares, **settings),
        **how,
        progress=sys.stderr.isatty(),
        classes=declared_classes(classes, drop_other_classes),
    )
    for split, counts in manifest.splits.items():
        if number := counts["num_images"]:
            typer.echo("\n".join(counts_lines(f"{split}: {number} images", counts["diagnoses"], number)))
    typer.echo(
        f"unreadable: {len(manifest.unreadable)}; near-duplicates: {manifest.duplicates['num_pairs']} pairs"
    )
    typer.echo(
        f"wrote {len(manifest.shards)} shards to {output}; train with data.train=prepared:{output}:train"
    )


@data_app.command("verify", epilog="Example:\n\n  isic-vq data verify my_data")
def verify(
    folder: Annotated[Path, typer.Argument(help="Folder that isic-vq data prepare has finished.")],
) -> None:
    """Check a prepared folder: hashes, pixels, counts, and that no lesion or patient is in two splits."""
    from isic_vq.data.sources.manifest import Manifest
    from isic_vq.data.verify import verify as check

    quiet_transformers()
    wrong = check(folder)
    for sentence in wrong:
        typer.echo(sentence)
    manifest = Manifest.read(folder)
    images = sum(shard.rows for shard in manifest.shards)
    if wrong:
        raise ValueError(f"{folder.name}: problems found: {len(wrong)}; prepare the folder again")
    typer.echo(f"{folder.name} is complete: {len(manifest.shards)} shards, {images} images, splits disjoint")


def _with_split(text: str) -> tuple[str | None, str]:
    match = re.match(r"(train|validation|test)=(.+)", text, re.DOTALL)
    return (match[1], match[2]) if match else (None, text)
