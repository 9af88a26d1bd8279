"""The README's table of sampling times is the report's."""

import json
import re
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
ROWS = {
    "the whole network for every code": "full taps, a pass per position",
    "pythae's sampler (an ungated network)": "pythae's sampler",
    "isic-vq, `eager`": "eager",
    "isic-vq, `compiled`": "compiled",
    "one forward pass, for comparison": "one full forward",
}


def test_sampling_times_of_the_readme_are_those_of_the_report():
    report = json.loads((ROOT / "benchmarks" / "reports" / "sampling.json").read_text())
    races = {race["batch"]: race["contestants"] for race in report["races"] if race["grid"] == 32}
    readme = (ROOT / "README.md").read_text()
    for label, name in ROWS.items():
        cells = re.search(rf"^\| {re.escape(label)} \| (.+) \|$", readme, re.MULTILINE).group(1).split(" | ")
        assert cells == [f"{races[batch][name]['seconds_per_image']:.3g}" for batch in (1, 16, 64)]
