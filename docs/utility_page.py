"""What docs/utility.md shows of the utility study's reports: half-widths, findings, gains, skin tone, audits, cost."""

from pathlib import Path
from typing import Any

from isic_vq.evaluation.report import Report
from isic_vq.evaluation.report_tables import markdown_table
from isic_vq.evaluation.utility import GENERATED, PLANTED

FOLDER = Path(__file__).parent / "utility"
SITES = {"ham10000": "HAM10000", "rosendahl": "rosendahl, unseen", "rosendahl-seen": "rosendahl, seen"}
TESTS = {"validation": "its own held-out images", "rosendahl": "its own other images", "uda1": "UDA-1"}
SECONDS_PER_GPU_STEP = 0.003  # assumed: launching some 200 kernels, none of which fills the device


def utility_sections() -> dict[str, str]:
    """What stands between the marks of docs/utility.md."""
    reports = {name: Report.load(FOLDER / f"{name}.json") for name in SITES}
    audits = {name: Report.load(FOLDER / f"{name}-audit.json") for name in SITES}
    return {
        "half-widths": half_widths(reports),
        "findings": significant_table(reports),
        **{name: gains_table(report) for name, report in reports.items()},
        "planted": planted_table({name: reports[name] for name in ("ham10000", "rosendahl")}),
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


def p_value(value: float) -> str:
    """To three decimals."""
    return "< 0.001" if value < 0.001 else f"{value:.3f}"


def half_widths(reports: dict[str, Report]) -> str:
    """How small a gain each test can show."""
    numbers = sorted({number for report in reports.values() for number in real_numbers(report)})
    rows = [
        [
            SITES[name],
            TESTS[test],
            f"{widths['positive']:,} and {widths['other']:,}",
            f"{widths['expected']:.3f}",
            *(
                f"{median_half_width(report, test, number):.3f}" if number in real_numbers(report) else ""
                for number in numbers
            ),
        ]
        for name, report in reports.items()
        for test, widths in report.tables["half_widths"].items()
    ]
    head = ["site", "tested on", "melanomas and others", "one AUC of .8, expected"]
    return markdown_table([*head, *(f"a gain, n = {number:,}" for number in numbers)], rows, texts=2)


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


def significant_table(reports: dict[str, Report]) -> str:
    """Every gain and loss by generated images that is significant after the correction and has one sign in all seeds."""
    return markdown_table(
        [
            "site",
            "n",
            "tested on",
            "AUC with real images alone",
            "generated images",
            "change of AUC",
            "corrected p",
        ],
        [
            [
                SITES[name],
                f"{row['real']:,}",
                TESTS[row["test"]],
                f"{report.value('auc', row['test'], real=str(row['real']), arm='flips'):.2f}",
                row["name"].replace("rare", "melanoma"),
                gain(row),
                p_value(row["corrected"]),
            ]
            for name, report in reports.items()
            for row in report.tables["comparisons"]
            if row["added"] in GENERATED and row["verdict"] != "not significant"
        ],
        texts=3,
    )


def gains_table(report: Report) -> str:
    """Gains of all arms but the planted ones; in bold the significant ones."""
    tests = list(report.tables["half_widths"])
    columns = [(real, test) for real in real_numbers(report) for test in tests]
    rows = report.tables["comparisons"]
    names = list(dict.fromkeys(row["name"] for row in rows if row["added"] not in PLANTED))
    cells = {(row["name"], row["real"], row["test"]): row for row in rows}

    def cell(name: str, real: int, test: str) -> str:
        row = cells.get((name, real, test))
        if row is None:
            return ""
        return f"**{gain(row)}**" if row["verdict"] != "not significant" else gain(row)

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


def planted_table(reports: dict[str, Report]) -> str:
    """Gains from held-out real images and from noise."""
    return markdown_table(
        ["site", "in place of generated images", "n", "tested on", "gain", "corrected p"],
        [
            [
                SITES[name],
                row["name"],
                f"{row['real']:,}",
                TESTS[row["test"]],
                gain(row),
                p_value(row["corrected"]),
            ]
            for name, report in reports.items()
            for row in report.tables["comparisons"]
            if row["added"] in PLANTED
        ],
        texts=4,
    )


def audits_table(reports: dict[str, Report], audits: dict[str, Report]) -> str:
    """The generator's audit, and the typology angles of real and generated images."""
    parts = []
    for name, report in reports.items():
        angles = report.tables["ita"]
        shares = [key for key in angles["real"] if key.endswith("%")]
        parts += [
            f"{SITES[name]}. {audits[name].tables['verdict']}",
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
    first = next(iter(reports.values()))
    steps = total["images_shown"] / first.model["classifier"]["batch_size"]
    return (
        f"{total['images_generated']:,} images generated, {total['classifiers']:,} classifiers, "
        f"{total['images_shown'] / 1e6:.1f} million images shown to them, {total['operations'] / 1e12:.0f} tera-operations: "
        f"{total['seconds'] / 3600:.1f} processor hours of {first.environment['device']}, generating included, beside other work, so about half of "
        "that in hours on two free cores. Estimated, not measured: on a GPU the arithmetic takes seconds and the "
        f"{steps:,.0f} optimizer steps decide; at {1000 * SECONDS_PER_GPU_STEP:.0f} ms each, {steps * SECONDS_PER_GPU_STEP / 60:.0f} minutes."
    )
