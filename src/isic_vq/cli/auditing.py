"""The command that looks for memorised training images."""

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from isic_vq.cli.app import CorruptShareOption, ModelOption, app, check_first, quiet_transformers
from isic_vq.cli.measuring import print_report

if TYPE_CHECKING:
    from isic_vq.evaluation.audit import Audit


@app.command(
    epilog="Examples:\n\n  isic-vq audit --train-codes runs/codes/train.parquet --held-out-codes "
    "runs/codes/validation.parquet --features models/derm-features\n\n  isic-vq audit --train-codes train.parquet "
    "--held-out-codes validation.parquet --samples-from folder:theirs"
)
def audit(
    train_codes: Annotated[
        Path, typer.Option(help="Code cache of the training images, best in all eight views.")
    ],
    held_out_codes: Annotated[
        Path, typer.Option(help="Code cache of images of the same origin that are new to the model.")
    ],
    model: ModelOption = None,
    features: Annotated[
        list[str] | None,
        typer.Option(help="Folder or Hub id of an image model to compare by, too; repeat it for several."),
    ] = None,
    num_samples: Annotated[int, typer.Option("--samples", min=1, help="How many images to generate.")] = 500,
    samples_from: Annotated[
        str | None, typer.Option(help="Audit these images instead, as for encode --data.")
    ] = None,
    seed: Annotated[int, typer.Option(min=0, help="Of samples, subsets and resampling.")] = 0,
    limit: Annotated[
        int, typer.Option(min=2, help="At most this many images of each kind whose likelihood is compared.")
    ] = 1000,
    train_images: Annotated[
        str | None,
        typer.Option(
            help="The training images, to be shown in pairs; without it, what their codes decode to."
        ),
    ] = None,
    pairs: Annotated[
        Path,
        typer.Option(help="Folder for pictures of the closest pairs: they may show patients' images."),
    ] = Path("runs/audit/pairs"),
    output: Annotated[Path, typer.Option("--out", "--output", "-o", help="Report to write.")] = Path(
        "runs/audit/report.json"
    ),
    max_corrupt_share: CorruptShareOption = 0.01,
) -> None:
    """Tell whether samples are nearer to training images than new images are, and show the closest pairs."""
    check_first(model, codes=[train_codes, held_out_codes])
    from isic_vq.evaluation.audit import audit_checkpoint
    from isic_vq.figures.closest_pairs import write_pairs

    quiet_transformers()
    result = audit_checkpoint(
        model,
        train_codes,
        held_out_codes,
        features or [],
        num_samples=num_samples,
        samples_from=samples_from,
        seed=seed,
        limit=limit,
        max_corrupt_share=max_corrupt_share,
        progress=sys.stderr.isatty(),
    )
    result.report.save(output)
    print_report(result.report)
    for path in write_pairs(result, pairs, train_images):
        typer.echo(f"wrote {path}")
    typer.echo(f"wrote {output}")
    for line in _verdict(result):
        typer.echo(line)


def _verdict(result: "Audit") -> list[str]:
    """What was decided, in a line per channel and one for all."""
    lines = []
    for channel, excess in result.excess.items():
        needed = "no number is" if excess.threshold is None else f"from {excess.threshold} on it is"
        found = sum(pair.found for pair in result.pairs[channel])
        lines.append(
            f"{channel}: {excess.count} samples are near to training images, {excess.expected:.1f} by chance "
            f"(p = {excess.p_value:.2g}; {needed} a verdict); {found} found as copies"
        )
    decided = "more samples are near to training images than" if result.verdict else "no more than"
    return [*lines, f"verdict: {decided} chance explains"]
