"""The ISIC archive on this machine: API v2, bucket, snapshot and challenge archives, failing on demand.

What it serves is as the archive's pages describe it; images are generated, or those of ISIC_VQ_DATA.
"""

import functools
import io
import os
import re
import zipfile
from pathlib import Path

import pyarrow
import pyarrow.parquet
from fault_server import Answer, FaultServer

from isic_vq.data.synthetic_images import synthetic_image

SNAPSHOT_TIME = "2026-08-21T04:00:00+00:00"
D2_MELANOMA = "Malignant melanocytic proliferations (Melanoma)"
# What takes turns among the served images, by hand: (d1, d2, d3, expected diagnosis).
DIAGNOSES = [
    ("Benign", "Benign melanocytic proliferations", "Nevus", "nevus"),
    ("Malignant", D2_MELANOMA, "Melanoma in situ", "melanoma"),
    (
        "Malignant",
        "Malignant adnexal epithelial proliferations - Follicular",
        "Basal cell carcinoma",
        "basal_cell_carcinoma",
    ),
    (
        "Indeterminate",
        "Indeterminate epidermal proliferations",
        "Solar or actinic keratosis",
        "actinic_keratosis",
    ),
    ("Benign", "Benign epidermal proliferations", "Seborrheic keratosis", "benign_keratosis"),
    ("Benign", "Benign soft tissue proliferations - Fibro-histiocytic", "Dermatofibroma", "dermatofibroma"),
    ("Benign", "Benign soft tissue proliferations - Vascular", "Hemangioma", "vascular_lesion"),
    (
        "Malignant",
        "Malignant epidermal proliferations",
        "Squamous cell carcinoma, Invasive",
        "squamous_cell_carcinoma",
    ),
    ("Benign", "Inflammatory or infectious diseases", "Scabies", "unknown"),
    ("Indeterminate", None, None, "unknown"),
    (None, None, None, "unknown"),
]
LICENSES = ["CC-0", "CC-BY", "CC-BY-NC"]
TYPES = ["dermoscopic", "dermoscopic", "clinical: close-up", "TBP tile: close-up"]
SITES = [
    ("Head & neck", "head/neck"),
    ("posterior torso", "posterior torso"),
    (None, None),
    ("palms/soles", "palms/soles"),
]


def jpeg(image, quality=90):
    buffer = io.BytesIO()
    image.save(buffer, format="JPEG", quality=quality)
    return buffer.getvalue()


@functools.cache
def synthetic(index):
    return jpeg(synthetic_image(index, 0, size=64))


def images(number, real=False):
    """Encoded images: generated ones of 64 pixels, or the first ones of HAM10000's validation file."""
    if not real:
        return [synthetic(index) for index in range(number)]
    (path,) = (Path(os.environ["ISIC_VQ_DATA"]) / "ham10000").glob("validation-*.parquet")
    column = pyarrow.parquet.read_table(path, columns=["image"]).slice(0, number)["image"]
    return [image["bytes"] for image in column.to_pylist()]


def about(index):
    """The metadata of an image, flat, as the snapshot has it."""
    d1, d2, d3, _ = DIAGNOSES[index % len(DIAGNOSES)]
    return {
        "isic_id": f"ISIC_{index:07d}",
        "attribution": f"Hospital {index % 4}",
        "copyright_license": LICENSES[index % 3],
        "patient_id": f"IP_{index // 4:07d}" if index % 2 else None,
        "lesion_id": f"IL_{index // 2:07d}" if index % 3 else None,
        "age_approx": float(20 + 5 * (index % 12)) if index % 5 else None,
        "sex": ("male", "female", None)[index % 3],
        "anatom_site_general": SITES[index % 4][0],
        "diagnosis_1": d1,
        "diagnosis_2": d2,
        "diagnosis_3": d3,
        "diagnosis_4": None,
        "diagnosis_5": None,
        "image_type": TYPES[index % 4],
        "image_manipulation": "synthetic" if index % 10 == 9 else "instrument only",
    }


def is_synthetic(index):
    return index % 10 == 9


class ArchiveServer(FaultServer):
    """Serves `number` images of the archive. `collections` are image numbers by id; "77" is every third image."""

    def __init__(self, number=150, real=False):
        super().__init__()
        self.contents = images(number, real)
        self.rows = [about(index) for index in range(number)]
        self.collections = {"77": set(range(0, number, 3)), "78": set(range(0, number, 5))}
        self.shift = 0  # images that are added in front between two pages: what they push on is listed twice
        for row, content in zip(self.rows, self.contents, strict=True):
            self.files[f"/bucket/thumbnails/{row['isic_id']}_thumbnail.jpg"] = content
            self.files[f"/bucket/images/{row['isic_id']}.jpg"] = content + b"full"
        table = pyarrow.Table.from_pylist(self.rows).replace_schema_metadata(
            {"snapshot_timestamp": SNAPSHOT_TIME}
        )
        sink = io.BytesIO()
        pyarrow.parquet.write_table(table, sink, row_group_size=40)
        self.files["/bucket/snapshots/ISIC_metadata.parquet"] = sink.getvalue()
        self.routes["/api/images/search/"] = self._search

    def environment(self):
        """What points the sources here, and makes retries fast."""
        return {
            "ISIC_VQ_API_URL": f"{self.url}/api",
            "ISIC_VQ_BUCKET_URL": f"{self.url}/bucket",
            "ISIC_VQ_CHALLENGE_URL": f"{self.url}/challenge",
            "ISIC_VQ_BACKOFF": "0.001",
            "ISIC_VQ_READ_TIMEOUT": "20",  # a busy machine is slow, too, and must not look like a fault
        }

    def _search(self, request):
        """GET images/search/: pages by an opaque cursor, `count` on the first one only."""
        query = {key: values[0] for key, values in request.query.items()}
        found = set(range(len(self.rows)))
        if "collections" in query:
            found &= set().union(
                *(self.collections.get(key, set()) for key in query["collections"].split(","))
            )
        try:
            found = {index for index in found if _matches(query.get("query", ""), self.rows[index])}
        except ValueError:
            return Answer.of({"message": "Could not parse search query."}, 400)
        limit = min(int(query.get("limit", 10)), 100)
        start = int(query.get("cursor", 0))
        listed = sorted(found)
        page = listed[start : start + limit]
        following = start + limit - self.shift
        host = "https://api.isic-archive.com/api/v2/images/search/"  # as a mirror would pass it on
        return Answer.of(
            {
                "results": [_item(self.rows[index]) for index in page],
                "next": f"{host}?cursor={following}&limit={limit}" + _rest(query)
                if following < len(listed)
                else None,
                "previous": None,
                **({"count": len(listed)} if not start else {}),
            }
        )


def _rest(query):
    return "".join(f"&{key}={query[key]}" for key in ("collections", "query") if key in query)


def _matches(query, row):
    for term in filter(None, query.split(" AND ")):
        match = re.fullmatch(r'(-?)(\w+):(?:"([^"]*)"|(\S+))', term.strip())
        if match is None or match[2] not in row:
            raise ValueError(term)
        value = match[3] if match[3] is not None else match[4]
        if (str(row[match[2]]) == value) == bool(match[1]):
            return False
    return True


def _item(row):
    groups = {"acquisition": ("image_type", "image_manipulation"), "clinical": ()}
    outer = ("isic_id", "copyright_license", "attribution")
    clinical = {k: v for k, v in row.items() if k not in (*outer, *groups["acquisition"]) and v is not None}
    return {
        "public": True,
        **{name: row[name] for name in outer},
        "files": {
            "full": {"url": "https://example.org/full.jpg", "size": 1},
            "thumbnail_256": {"url": "https://example.org/t.jpg", "size": 1},
        },
        "metadata": {
            "acquisition": {name: row[name] for name in groups["acquisition"]},
            "clinical": clinical,
        },
    }


# --- challenges ----------------------------------------------------------------------------------------------------

ONE_HOT = {
    "2018": ["MEL", "NV", "BCC", "AKIEC", "BKL", "DF", "VASC"],
    "2019": ["MEL", "NV", "BCC", "AK", "BKL", "DF", "VASC", "SCC", "UNK"],
}
WORDS_2020 = ["nevus", "melanoma", "seborrheic keratosis", "lentigo NOS", "lichenoid keratosis", "solar lentigo",
              "cafe-au-lait macule", "atypical melanocytic proliferation", "unknown"]  # fmt: skip


def zipped(files, method=zipfile.ZIP_STORED):
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", method) as archive:
        for name, content in files.items():
            archive.writestr(name, content)
    return buffer.getvalue()


def one_hot_csv(year, names):
    classes = ONE_HOT[year]
    rows = [
        ",".join([name, *(f"{float(i % len(classes) == j)}" for j in range(len(classes)))])
        for i, name in enumerate(names)
    ]
    return "\n".join(["image," + ",".join(classes), *rows]).encode()


def challenge_files(year, contents, method=zipfile.ZIP_STORED):
    """The files of a year's training part, by path relative to the challenges' address; and the ids."""
    names = [f"ISIC_{5000000 + index:07d}" for index in range(len(contents))]
    folder = f"ISIC_{year}_Training"
    members = {
        f"{folder}/": b"",
        f"{folder}/LICENSE.txt": b"CC",
        f"{folder}/{names[0]}_superpixels.png": b"mask",
    }
    members |= {f"{folder}/{name}.jpg": content for name, content in zip(names, contents, strict=True)}
    members = {name: content for name, content in members.items() if not name.endswith("/")}
    pack = zipped(members, method)
    if year == "2016":
        table = "\n".join(
            f"{name},{'malignant' if i % 3 == 0 else 'benign'}" for i, name in enumerate(names)
        ).encode()
        stem = "2016/ISBI2016_ISIC_Part3_Training"
        return {f"{stem}_Data.zip": pack, f"{stem}_GroundTruth.csv": table}, names
    if year == "2017":
        rows = [f"{name},{float(i % 3 == 0)},{float(i % 3 == 1)}" for i, name in enumerate(names)]
        table = "\n".join(["image_id,melanoma,seborrheic_keratosis", *rows]).encode()
        return {
            "2017/ISIC-2017_Training_Data.zip": pack,
            "2017/ISIC-2017_Training_Part3_GroundTruth.csv": table,
        }, names
    if year == "2018":
        stem = "2018/ISIC2018_Task3_Training"
        lesions = "\n".join(
            [
                "image,lesion_id,diagnosis_confirm_type",
                *(f"{n},HAM_{i // 2:07d},histo" for i, n in enumerate(names)),
            ]
        )
        truth = zipped({"GT/ISIC2018_Task3_Training_GroundTruth.csv": one_hot_csv(year, names)})
        return {
            f"{stem}_Input.zip": pack,
            f"{stem}_GroundTruth.zip": truth,
            f"{stem}_LesionGroupings.csv": lesions.encode(),
        }, names
    if year == "2019":
        stem = "2019/ISIC_2019_Training"
        rows = [
            f"{n},{'' if i % 4 == 0 else 5 * (i % 26)},{'anterior torso' if i % 2 else ''},{'' if i % 3 else f'BCN_{i}'},{'male' if i % 2 else ''}"
            for i, n in enumerate(names)
        ]
        meta = "\n".join(["image,age_approx,anatom_site_general,lesion_id,sex", *rows])
        return {
            f"{stem}_Input.zip": pack,
            f"{stem}_GroundTruth.csv": one_hot_csv(year, names),
            f"{stem}_Metadata.csv": meta.encode(),
        }, names
    rows = [
        f"{n},IP_{i // 3:07d},IL_{i:07d},{'female' if i % 2 else 'male'},45.0,torso,{WORDS_2020[i % 9]},benign,0"
        for i, n in enumerate(names)
    ]
    header = "image_name,patient_id,lesion_id,sex,age_approx,anatom_site_general_challenge,diagnosis,benign_malignant,target"
    return {
        "2020/ISIC_2020_Training_JPEG.zip": pack,
        "2020/ISIC_2020_Training_GroundTruth_v2.csv": "\n".join([header, *rows]).encode(),
    }, names
