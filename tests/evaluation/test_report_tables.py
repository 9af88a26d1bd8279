"""Metrics in tables: each once, under its topic, parts of the images left out."""

from dataclasses import replace

import pytest

from isic_vq.evaluation.report import Metric
from isic_vq.evaluation.report_tables import (
    APPEARANCE,
    GENERATED,
    OTHER,
    number_text,
    report_tables,
    rounded,
    topic_of,
)


def metric(name, value=1.0, split="test", **labels):
    return Metric(name, value, "1", 5, split, "x", labels=labels)


def test_labels_tell_the_part_of_the_images():
    of_samples = {"images": "samples", "yardstick": "eye"}
    for labels, text, group, whole in (
        ({}, "m", None, "m"),
        ({"sex": "female"}, "m[sex=female]", ("sex", "female"), "m"),
        ({"site": "head/neck"}, "m[site=head/neck]", ("site", "head/neck"), "m"),
        ({"source": "a, b[c=d]"}, "m[source=a, b[c=d]]", ("source", "a, b[c=d]"), "m"),
        (of_samples, "m[samples, eye]", None, "m[samples, eye]"),
        (
            of_samples | {"diagnosis": "nevus"},
            "m[samples, eye, diagnosis=nevus]",
            ("diagnosis", "nevus"),
            "m[samples, eye]",
        ),
        (
            {"action": "generate", "batch": "1"},
            "m[generate, batch=1]",
            None,
            "m[generate, batch=1]",
        ),
    ):
        found = metric("m", **labels)
        assert (found.text, found.group, found.of_all.text) == (text, group, whole)


def test_every_metric_of_whole_sets_is_in_one_table_and_one_cell():
    metrics = [
        metric("psnr"),
        metric("psnr", split="other"),
        metric("psnr", sex="female"),
        metric("odd"),
        metric("usage"),
    ]
    tables = report_tables(metrics, lambda m: m.split)
    assert [table.title for table in tables] == ["Reconstruction", "Codebook", OTHER]
    assert tables[0].columns == ["test", "other"]
    assert list(tables[0].rows) == [("psnr", "")]
    shown = [cell for table in tables for row in table.rows.values() for cell in row.values()]
    assert sorted(map(id, shown)) == sorted(id(m) for m in metrics if m.group is None)


def test_kinds_of_images_are_columns():
    metrics = [
        metric("recall", images=kind, yardstick="eye, too")
        for kind in ("floor", "reconstructions", "samples")
    ]
    (table,) = report_tables(metrics, lambda m: m.split)
    assert table.title == GENERATED
    assert list(table.rows) == [("recall, eye, too", "")]
    assert table.columns == ["floor: test", "reconstructions: test", "samples: test"]
    metrics = [
        metric("texture", images="real"),
        metric("texture", images="samples"),
        metric("coherence", images="real", colour="red"),
    ]
    (table,) = report_tables(metrics, lambda m: m.split)
    assert table.title == APPEARANCE
    assert list(table.rows) == [("texture", ""), ("coherence, red", "")]
    assert table.columns == ["real: test", "samples: test"]


def test_the_same_number_twice_is_refused():
    with pytest.raises(ValueError, match="two values of psnr of test"):
        report_tables([metric("psnr"), metric("psnr", 2.0)], lambda m: m.split)


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (1537939, "1,537,939"),
        (0.00055528, "0.000555"),
        (33.73504, "33.7"),
        (1.0, "1"),
        (0, "0"),
        (3774.4, "3,774"),
        (999.6, "1,000"),
    ],
)
def test_numbers_are_rounded_and_integers_are_not(value, text):
    assert number_text(value) == text


def test_a_value_has_the_digits_that_its_interval_leaves():
    def shown(value, *interval):
        return rounded(replace(metric("psnr", value), interval=list(interval) or None))

    assert shown(32.952, 32.78, 33.13) == ("32.95", "32.78 to 33.13")
    assert shown(3.1316, 2.097, 4.167) == ("3.1", "2.1 to 4.2")
    assert shown(0.79623, 0.7914, 0.8011) == ("0.796", "0.791 to 0.801")
    assert shown(433.87, 425.6, 442.1) == ("434", "426 to 442")
    assert shown(-0.0004, -0.0172, 0.0142) == ("0.000", "-0.017 to 0.014"), "no negative zero"
    assert shown(4, 1.558, 10.19) == ("4", "2 to 10"), "counts stay whole"
    assert shown(12345.6, 11000.0, 13000.0) == ("12,346", "11,000 to 13,000")
    assert shown(0.5, 0.5, 0.5) == ("0.5", "0.5")
    assert shown(0.53674) == ("0.537", None)
    for half_width, digits in ((3.54, 1), (3.56, 0), (0.0354, 3), (0.036, 2)):
        assert shown(0.0, -half_width, half_width)[0] == f"{0:.{digits}f}"


@pytest.mark.parametrize(
    ("name", "topic"),
    [
        ("likelihood_gap", "Memorisation"),
        ("likelihood_balanced_accuracy", "Likelihood"),
        ("sensitivity", "Worth to a classifier"),
    ],
)
def test_topics_are_told_apart_by_the_beginning_of_a_name(name, topic):
    assert topic_of(metric(name)) == topic
