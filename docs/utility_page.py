"""What docs/utility.md shows of the utility study's reports: half-widths, findings, gains, skin tone, audits, cost."""

from pathlib import Path
from typing import Any

from isic_vq.evaluation.report import Report
from isic_vq.evaluation.report_tables import markdown_table

FOLDER = Path(__file__).parent / "utility"
SITES = {
    "ham10000": "a site like those that the generator was trained on",
    "rosendahl": "a site that the generator never saw",
}
TESTS = {"validation": "its own held-out images", "rosendahl": "its own other images", "uda1": "UDA-1"}
MIXES = {"same mix": "of the site's mix of diagnoses", "rare alone": "of melanoma alone"}
PLANTED = ("held-out real images", "noise")
SECONDS_PER_GPU_STEP = 0.003  # assumed: launching some 200 kernels, none of which fills the device


def utility_sections(audit: Report) -> dict[str, str]:
    """What stands between the marks of docs/utility.md; `audit` is that of isic-vq-128."""
    reports = {name: Report.load(FOLDER / f"{name}.json") for name in SITES}
    audits = {"ham10000": audit, "rosendahl": Report.load(FOLDER / "rosendahl-audit.json")}
    return {
        "half-widths": half_widths(reports),
        "findings": "\n".join(f"- {finding}" for name in SITES for finding in findings(name, reports[name])),
        **{name: gains_table(report) for name, report in reports.items()},
        "planted": planted_table(reports["ham10000"]),
        "audits": audits_table(reports, audits),
        "cost": cost(reports),
    }


def number(value: float) -> str:
    """A difference of AUC with its sign."""
    return f"{value:+.3f}"


def gain(row: dict[str, Any]) -> str:
    """A gain with its interval."""
    low, high = row["interval"]
    return f"{number(row['value'])} ({number(low)} to {number(high)})"


def half_widths(reports: dict[str, Report]) -> str:
    """How small a gain each test can show."""
    rows = []
    for name, report in reports.items():
        for test, widths in report.tables["half_widths"].items():
            rows.append(
                [
                    SITES[name],
                    TESTS[test],
                    f"{widths['positive']:,} and {widths['other']:,}",
                    f"{widths['expected']:.3f}",
                    *(
                        f"{median_half_width(report, test, real):.3f}" if real in real_numbers(report) else ""
                        for real in (50, 200, 500, 1000)
                    ),
                ]
            )
    head = ["site", "tested on", "melanomas and others", "one AUC of .8, expected"]
    return markdown_table([*head, *(f"a gain, n = {n:,}" for n in (50, 200, 500, 1000))], rows, texts=2)


def real_numbers(report: Report) -> list[int]:
    """How many real images the classifiers had."""
    return sorted({row["real"] for row in report.tables["comparisons"]})


def median_half_width(report: Report, test: str, real: int) -> float:
    """Of the gains' intervals."""
    widths = sorted(
        (row["interval"][1] - row["interval"][0]) / 2
        for row in report.tables["comparisons"]
        if row["test"] == test and row["real"] == real and row["added"] not in PLANTED
    )
    return float(widths[len(widths) // 2])


def findings(name: str, report: Report) -> list[str]:
    """A sentence for each test and number of real images: what is told after the correction, where all seeds agree."""
    rows = [row for row in report.tables["comparisons"] if row["added"] in MIXES]
    sentences = []
    for real in real_numbers(report):
        for test in report.tables["half_widths"]:
            mine = [row for row in rows if row["real"] == real and row["test"] == test]
            alone = report.value("auc", test, real=str(real), arm="flips")
            told = [
                f"{row['ratio']} per real image {MIXES[row['added']]}: {gain(row)}"
                for row in mine
                if row["verdict"] != "not told"
            ]
            agreeing = [
                f"{row['name'].replace('rare', 'melanoma')} {number(row['value'])}"
                for row in mine
                if row["verdict"] == "not told" and len({value > 0 for value in row["seeds"]}) == 1
            ]
            sentence = f"At {SITES[name]}, {real:,} real images, tested on {TESTS[test]} (AUC {alone:.2f} with real images alone): "
            sentence += (
                f"a change of AUC is told for {'; '.join(told)}." if told else "no gain or loss can be told."
            )
            if agreeing:
                sentence += (
                    f" Of one sign in every seed, but not told after the correction: {', '.join(agreeing)}."
                )
            sentences.append(sentence)
    return sentences


def gains_table(report: Report) -> str:
    """Gains of all arms but the planted ones; in bold what is told."""
    tests = list(report.tables["half_widths"])
    columns = [(real, test) for real in real_numbers(report) for test in tests]
    rows = report.tables["comparisons"]
    names = list(dict.fromkeys(row["name"] for row in rows if row["added"] not in PLANTED))
    cells = {(row["name"], row["real"], row["test"]): row for row in rows}

    def cell(name: str, real: int, test: str) -> str:
        row = cells.get((name, real, test))
        if row is None:
            return ""
        return f"**{gain(row)}**" if row["verdict"] != "not told" else gain(row)

    first = [
        "real images alone: AUC",
        *(f"{report.value('auc', test, real=str(real), arm='flips'):.3f}" for real, test in columns),
    ]
    return markdown_table(
        ["", *(f"n = {real:,}, {test}" for real, test in columns)],
        [
            first,
            *(
                [name.replace("rare", "melanoma"), *(cell(name, *column) for column in columns)]
                for name in names
            ),
        ],
    )


def planted_table(report: Report) -> str:
    """Gains from held-out real images and from noise."""
    rows = [row for row in report.tables["comparisons"] if row["added"] in PLANTED]
    return markdown_table(
        ["in place of generated images", "n", "tested on", "gain", "corrected p"],
        [
            [row["name"], f"{row['real']:,}", TESTS[row["test"]], gain(row), f"{row['corrected']:.2g}"]
            for row in rows
        ],
        texts=3,
    )


def audits_table(reports: dict[str, Report], audits: dict[str, Report]) -> str:
    """The generator's audit, and the typology angles of real and generated images."""
    parts = []
    for name, report in reports.items():
        angles = report.tables["ita"]
        shares = [key for key in angles["real"] if key.endswith("%")]
        parts += [
            f"For {SITES[name]}: {audits[name].tables['verdict']}",
            markdown_table(
                ["ITA in degrees", "n", *shares],
                [
                    [kind, f"{values['n']:,}", *(f"{values[share]:.0f}" for share in shares)]
                    for kind, values in angles.items()
                ],
            ),
        ]
    return "\n\n".join(parts)


def cost(reports: dict[str, Report]) -> str:
    """Hours and operations, and what they would be on a GPU."""
    costs = [report.tables["cost"] for report in reports.values()]
    total = {key: sum(each[key] for each in costs) for key in costs[0]}
    steps = total["images_shown"] / next(iter(reports.values())).model["classifier"]["batch_size"]
    machine = next(iter(reports.values())).environment
    return (
        f"{total['classifiers']:,.0f} classifiers, {total['images_shown'] / 1e6:.2f} million images shown, "
        f"{total['operations'] / 1e12:.0f} tera-operations: {total['seconds'] / 3600:.2f} processor hours on one thread of "
        f"{machine['device']} beside other work, so about half of that in hours on two free cores. Estimated, not measured: on a GPU "
        f"the arithmetic takes seconds and the {steps:,.0f} optimizer steps decide; at {1000 * SECONDS_PER_GPU_STEP:.0f} ms each, "
        f"{steps * SECONDS_PER_GPU_STEP / 60:.0f} minutes."
    )
